"""The copy baseline: a mixture of the support images, with nothing learned about classes.

    p(x) = 1/t sum_j [ 0.5 Bern(x; clip(w G_s * x_j + (1 - w) b, 0.002, 0.998)) + 0.5 Bern(x; clip(x_j, 0.01, 0.99)) ]

G_s is a periodic Gaussian blur of s pixels and b the pixel means of the training images. A model that does not beat it
has learned nothing that copying does not give; where the query is in the support (episodes drawn with replacement),
nothing beats it. Without support the mixture is Bern(x; b).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.types import Array, Examples

SCALES = (1.5, 2.0, 2.5, 3.0)  # s, pixels
MIXES = (0.6, 0.75, 0.9)  # w


class Exemplars(NamedTuple):
    """The constants of the mixture."""

    background: Array  # b [H, W, C] in [0.001, 0.999]
    scale: float  # s, pixels
    mix: float  # w


def fit_exemplars(images: np.ndarray, episodes: Examples, queries: Examples) -> Exemplars:
    """Choose (s, w) for the blurred part alone on training episodes.

    Args:
        images: training images [total, H, W, C] uint8.
        episodes: supports of training episodes, [T, N, H, W, C].
        queries: their queries.
    """
    background = jnp.asarray(np.clip(images.mean(0) / 255.0, 0.001, 0.999), jnp.float32)

    @jax.jit
    def loss(candidate: Exemplars, episodes: Examples, queries: Examples) -> Array:
        blurred = jax.vmap(lambda s, x: _mixture(candidate, s, x, sharp=0.0))(episodes, queries.x)
        return -(blurred * queries.weight).sum() / queries.weight.sum()

    candidates = [Exemplars(background, s, w) for s in SCALES for w in MIXES]
    return min(candidates, key=lambda candidate: float(loss(candidate, episodes, queries)))


def exemplar_log_likelihood(exemplars: Exemplars) -> Callable[[Examples, Array], Array]:
    """Return the function (support, x [N, H, W, C] binary) -> log p(x | support) [N] in nats per image."""
    return lambda support, x: _mixture(exemplars, support, x, sharp=0.5)


def _mixture(exemplars: Exemplars, support: Examples, x: Array, sharp: float) -> Array:
    background, scale, mix = exemplars
    blurred = mix * _blur(support.x, scale) + (1 - mix) * background[None]
    parts = [_bernoulli(jnp.clip(blurred, 0.002, 0.998), x) + jnp.log(1 - sharp)]
    if sharp:
        parts.append(_bernoulli(jnp.clip(support.x, 0.01, 0.99), x) + jnp.log(sharp))
    part = jax.nn.logsumexp(jnp.stack(parts), axis=0)  # [support, N]
    known = jnp.log(support.weight)[:, None] - jnp.log(support.weight.sum())  # -inf for padding
    alone = _bernoulli(background[None], x)[0]
    return jnp.where(support.weight.sum() > 0, jax.nn.logsumexp(part + known, axis=0), alone)


def _bernoulli(mean: Array, x: Array) -> Array:
    """Return log Bern(x_n; mean_m) [M, N], summed over pixels."""
    mean, x = mean.reshape(mean.shape[0], -1), x.reshape(x.shape[0], -1)
    return jnp.log(mean) @ x.T + jnp.log1p(-mean) @ (1 - x).T


def _blur(x: Array, scale: float) -> Array:
    """Blur [N, H, W, C] with a periodic Gaussian of `scale` pixels."""
    for axis in (1, 2):
        size = x.shape[axis]
        offset = jnp.arange(size)
        distance = jnp.minimum(offset, size - offset)
        kernel = jnp.exp(-0.5 * jnp.square(distance / scale))
        matrix = (kernel / kernel.sum())[(offset[:, None] - offset[None]) % size]
        x = jnp.moveaxis(jnp.tensordot(matrix, x, ((1,), (axis,))), 0, axis)
    return x
