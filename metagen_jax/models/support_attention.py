"""Attention of every pixel over patches of the support images: what an autoregressive model reads of its examples.

A support image becomes a grid of patches by strided convolutions with features f_p; patches of all images are one set,

    k_p = [f_p, position] K,   v_p = [f_p, position] V,   q = [h, position] Q
    read(h) = O sum_p a_p v_p,   a = softmax over p and nothing,   logits s q . k_p / |q| |k_p| + log w_p

h being the features of a pixel, w_p the weight of the image (0 for padding), and nothing one more entry, with a
learned logit and the value 0: without support, read(h) = 0 and the model is unconditional. Positions are sines of row
and column.

The patches are read once for a task (`read`), whatever the number of pixels that look at them.

Shape letters: M support images, P patches of one, F features, W width of keys and values. Source: Reed et al., Few-shot
Autoregressive Density Estimation, 2018. Departures: patches are of one resolution, similarities are cosines with a
learned scale s, and there is an entry of nothing.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.models.convolutions import convolve
from metagen_jax.models.networks import gelu
from metagen_jax.types import Array, ArrayTree, Examples, Key

FREQUENCIES = (1.0, 2.0, 4.0)  # of positions, in half turns over the image
POSITION = 4 * len(FREQUENCIES)


Where = tuple[Array, Array] | None
"""Row and column of the one pixel that looks, or None for all pixels at once."""


class SupportAttention(NamedTuple):
    """What is read off a support, and how pixels look at it."""

    init: Callable[[Key, int], ArrayTree]  # (key, features of a pixel) -> parameters
    read: Callable[[ArrayTree, Examples], ArrayTree]  # -> the memory: keys and values of each layer, and weights
    # (params, memory, layer, h [N, H, W, F], or [N, F] of one pixel, where) -> what is added to h
    attend: Callable[[ArrayTree, ArrayTree, int, Array, Where], Array]


def support_attention(
    event: Sequence[int], layers: int, *, hidden: Sequence[int] = (16, 32), width: int = 32, scale: float = 4.0
) -> SupportAttention:
    """Return the attention of `layers` layers of a network over patches of images.

    Args:
        event: (H, W, C) of support images.
        layers: that look; each has keys, values and queries of its own.
        hidden: channels of the convolutions, each with stride 2: (16, 32) makes patches of a 28x28 image 7x7.
        width: W.
        scale: s at first.

    Raises:
        ValueError: sizes that are not positive.
    """
    if layers < 1 or width < 1 or scale <= 0 or not hidden or min(hidden) < 1:
        raise ValueError(
            f"expected at least one layer, positive channels, width and scale, got layers={layers}, "
            f"hidden={tuple(hidden)}, width={width}, scale={scale}"
        )
    grid = tuple(event[:2])
    for _ in hidden:
        grid = tuple(-(-size // 2) for size in grid)
    places, every = positions(*grid).reshape(-1, POSITION), positions(*event[:2])

    def init(key: Key, num_features: int) -> ArrayTree:
        reading_key, key = jax.random.split(key)
        params, channels = init_convolutions(reading_key, event[2], hidden), hidden[-1]
        for layer, own_key in enumerate(jax.random.split(key, layers)):
            key_key, value_key, query_key, output_key = jax.random.split(own_key, 4)
            params[f"layer_{layer}"] = {
                "key": kernel_of(key_key, channels + POSITION, width),
                "value": kernel_of(value_key, channels + POSITION, width),
                "query": kernel_of(query_key, num_features + POSITION, width),
                "output": 0.1 * kernel_of(output_key, width, num_features),
                "log_scale": jnp.log(jnp.asarray(scale)),
                "nothing": jnp.zeros(()),
            }
        return params

    def read(params: ArrayTree, support: Examples) -> ArrayTree:
        x = convolved(params, support.x, len(hidden), 2)
        num, patches = x.shape[0], places.shape[0]
        where = jnp.broadcast_to(places[None], (num, *places.shape))
        features = jnp.concatenate([x.reshape(num, patches, x.shape[3]), where], axis=-1)
        rows = features.reshape(num * patches, features.shape[2])
        memory: ArrayTree = {"weight": jnp.repeat(support.weight, patches)}
        for layer in range(layers):
            own = params[f"layer_{layer}"]
            memory[f"layer_{layer}"] = {"keys": unit(rows @ own["key"]), "values": rows @ own["value"]}
        return memory

    def attend(params: ArrayTree, memory: ArrayTree, layer: int, h: Array, where: Where = None) -> Array:
        own, stored = params[f"layer_{layer}"], memory[f"layer_{layer}"]
        place = every if where is None else every[where]
        place = jnp.broadcast_to(place[None], (*h.shape[:-1], POSITION))
        query = unit(jnp.concatenate([gelu(h), place], axis=-1) @ own["query"])
        bias = log_weight(memory["weight"])
        logits = jnp.exp(own["log_scale"]) * (query @ stored["keys"].T) + bias.reshape((1,) * (h.ndim - 1) + bias.shape)
        return (with_nothing(logits, own["nothing"]) @ stored["values"]) @ own["output"]

    return SupportAttention(init, read, attend)


def positions(height: int, width: int) -> Array:
    """Return sines and cosines of rows and columns [H, W, 4 * frequencies]; the centre of the image is 0.

    Example:
        >>> positions(2, 3).shape
        (2, 3, 12)
    """
    parts = []
    for size, axis in ((height, 0), (width, 1)):
        where = (jnp.arange(size) + 0.5) / size - 0.5
        angle = jnp.pi * where[:, None] * jnp.asarray(FREQUENCIES)[None]
        wave = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)
        wave = wave[:, None] if axis == 0 else wave[None]
        parts.append(jnp.broadcast_to(wave, (height, width, wave.shape[2])))
    return jnp.concatenate(parts, axis=-1)


def convolved(params: ArrayTree, x: Array, num: int, stride: int) -> Array:
    """Return what `num` convolutions, `convolution_0` and so on, make of images in [0, 1]."""
    x = 2 * x - 1
    for index in range(num):
        layer = params[f"convolution_{index}"]
        x = gelu(convolve(x, layer["kernel"], stride) + layer["bias"][None, None, None])
    return x


def init_convolutions(key: Key, channels: int, hidden: Sequence[int]) -> ArrayTree:
    """Return the first convolution, of 5x5, and the others, of 3x3."""
    params: ArrayTree = {}
    for index, (size, own_key) in enumerate(zip(hidden, jax.random.split(key, len(hidden)), strict=True)):
        kernel = jax.random.normal(own_key, (5 if index == 0 else 3,) * 2 + (channels, size))
        params[f"convolution_{index}"] = {
            "kernel": kernel * (2 / kernel[..., 0].size) ** 0.5,
            "bias": jnp.zeros(size),
        }
        channels = size
    return params


def log_weight(weight: Array) -> Array:
    """Return log w, -inf for padding, with finite gradients."""
    known = weight > 0
    return jnp.where(known, jnp.log(jnp.where(known, weight, 1.0)), -jnp.inf)


def with_nothing(logits: Array, nothing: Array) -> Array:
    """Return the softmax over the last axis and one more entry, without the share of that entry."""
    empty = jnp.broadcast_to(nothing, (*logits.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([logits, empty], axis=-1), axis=-1)[..., :-1]


def unit(x: Array) -> Array:
    """Return vectors of length one, but for a small constant."""
    return x / jnp.sqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)


def kernel_of(key: Key, inputs: int, outputs: int) -> Array:
    """Return a random kernel that keeps the size of what it is given."""
    return jax.random.normal(key, (inputs, outputs)) / inputs**0.5
