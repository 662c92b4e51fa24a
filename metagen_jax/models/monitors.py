"""Numbers that show whether a game is healthy, whatever its losses mean. None of them carries a gradient of use."""

import jax.numpy as jnp

from metagen_jax.types import Array


def spread_ratio(made: Array, made_weight: Array, real: Array, real_weight: Array) -> Array:
    """Return the standard deviation of made examples [M, ...] over that of real ones [N, ...], mean over pixels.

    Near 0 where the generator has collapsed onto one image; 1 where its images vary as much as real ones.
    """
    return _spread(made, made_weight) / (_spread(real, real_weight) + 1e-6)


def real_above_made(real: Array, made: Array, real_weight: Array, made_weight: Array) -> Array:
    """Return the probability that a real example [N] has a larger score than a made one [M], ties counting half.

    1 where the discriminator tells every pair apart, one half where it tells none, whatever the loss and its offset.
    """
    above = (real[:, None] > made[None]) + 0.5 * (real[:, None] == made[None])
    weight = real_weight[:, None] * made_weight[None]
    return (weight * above).sum() / jnp.maximum(weight.sum(), 1e-6)


def _spread(x: Array, weight: Array) -> Array:
    """Return the standard deviation over the examples, mean over everything that an example has."""
    flat, total = x.reshape(x.shape[0], -1), jnp.maximum(weight.sum(), 1e-6)
    centre = (weight @ flat) / total
    return jnp.sqrt((weight @ jnp.square(flat - centre[None])) / total).mean()
