"""Likelihoods p(x | z) of images: what a decoder's output means.

Each has one scalar output per pixel, and all log densities are sums over pixels, in nats per image.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.types import Array, ArrayTree


class Likelihood(NamedTuple):
    """A distribution of images given a decoder's output."""

    init: ArrayTree  # parameters beside the decoder's output, an empty dict if there are none
    log_prob: Callable[[ArrayTree, Array, Array], Array]  # (params, output [N, *event], x [N, *event]) -> [N] nats
    mean: Callable[[ArrayTree, Array], Array]  # (params, output) -> [N, *event]
    binary: bool  # x must be 0 or 1


def bernoulli() -> Likelihood:
    """Independent Bernoulli pixels; the output is the logit. x must be binary for this to be a likelihood."""

    def log_prob(params: ArrayTree, output: Array, x: Array) -> Array:
        del params
        return _sum(x * output - jax.nn.softplus(output))

    return Likelihood({}, log_prob, lambda params, output: jax.nn.sigmoid(output), True)


def gaussian(initial_scale: float = 0.3) -> Likelihood:
    """Independent Gaussian pixels of one learned scale; the mean is the sigmoid of the output, so it lies in [0, 1].

    A density over continuous values: nats per image can be negative, and compare only at one image range.

    Raises:
        ValueError: a scale that is not positive.
    """
    if not initial_scale > 0:
        raise ValueError(f"the initial scale must be positive, got {initial_scale}")

    def log_prob(params: ArrayTree, output: Array, x: Array) -> Array:
        log_scale = params["log_scale"]
        residual = (x - jax.nn.sigmoid(output)) * jnp.exp(-log_scale)
        return _sum(-0.5 * jnp.square(residual) - log_scale - 0.5 * math.log(2 * math.pi))

    initial = {"log_scale": jnp.array(math.log(initial_scale), jnp.float32)}
    return Likelihood(initial, log_prob, lambda params, output: jax.nn.sigmoid(output), False)


def _sum(per_pixel: Array) -> Array:
    return per_pixel.reshape(per_pixel.shape[0], -1).sum(-1)
