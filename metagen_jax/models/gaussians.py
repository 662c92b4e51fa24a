"""Diagonal Gaussians N(mean, diag exp(log_scale)^2): draws, log density and divergence, in nats over the last axis."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.types import Array, Key

_LOG_2_PI = 1.8378770664093453


class Gaussian(NamedTuple):
    """A Gaussian for each row, or one."""

    mean: Array  # [*, D]
    log_scale: Array  # [*, D]


def standard(like: Gaussian) -> Gaussian:
    """Return N(0, I), in the shape of another."""
    return jax.tree.map(jnp.zeros_like, like)


def halves(numbers: Array) -> Gaussian:
    """Return the Gaussian whose mean and log scale a network gave, [*, 2 D], one after the other."""
    return Gaussian(*jnp.split(numbers, 2, axis=-1))


def at(of: Gaussian, noise: Array) -> Array:
    """Turn standard normal noise, like the mean, into a draw."""
    return of.mean + jnp.exp(of.log_scale) * noise


def draws(key: Key, of: Gaussian, num: int) -> Array:
    """Return draws [num, D] of one Gaussian."""
    return jax.vmap(at, (None, 0))(of, jax.random.normal(key, (num, *of.mean.shape)))


def log_density(x: Array, of: Gaussian) -> Array:
    """Return log N(x; mean, scale^2), in nats."""
    return -0.5 * (jnp.square((x - of.mean) * jnp.exp(-of.log_scale)) + _LOG_2_PI + 2 * of.log_scale).sum(-1)


def kl(q: Gaussian, p: Gaussian) -> Array:
    """Return KL(q, p), in nats.

    Example:
        >>> shifted = Gaussian(jnp.ones(3), jnp.zeros(3))
        >>> kl(shifted, standard(shifted))
        Array(1.5, dtype=float32)
    """
    ratio = q.log_scale - p.log_scale
    white = (q.mean - p.mean) * jnp.exp(-p.log_scale)
    return (0.5 * (jnp.square(white) + jnp.exp(2 * ratio) - 1.0) - ratio).sum(-1)
