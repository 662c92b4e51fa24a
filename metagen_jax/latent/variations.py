"""Variations: codes of the same class as an anchor, on which the in-class images of a generated task are decoded.

    noise        z' = z_i + s e
    outsiders    z' = (1 - s) z_i + s v,   v ~ N(0, I) of its own
    others       z' = (1 - s) z_i + s z_j, j another class of the task

With s < 1/2 an image of `others` stays nearer to its own anchor than to the other one; so does one of `outsiders` in
expectation. The codes of a GAN's prior lie near a sphere, and the straight line between two of them leaves it: the
spherical forms keep to the angle and interpolate the length instead.

Source: Khodadadeh et al., Unsupervised Meta-Learning through Latent-Space Interpolation in Generative Models, 2021
(LASIUM-N, -RO and -OC); White, Sampling Generative Networks, 2016 (spherical interpolation).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metagen_jax.types import Array, Key

Vary = Callable[[Key, Array, int], Array]
"""(key, anchors [N, Z], num) -> codes [N, num, Z] of the same classes."""
Strength = float | tuple[float, float]
"""How far from the anchor: a number, or (least, most), drawn uniformly for every code."""


def noise(strength: Strength = 0.5) -> Vary:
    """Return the variation by noise: z + s e; s = 1 is already of the size of a class distance in few dimensions.

    Raises:
        ValueError: a strength that is negative or upside down.
    """
    low, high = _range(strength, jnp.inf)

    def vary(key: Key, anchors: Array, num: int) -> Array:
        strength_key, noise_key = jax.random.split(key)
        shape = (anchors.shape[0], num)
        size = jax.random.uniform(strength_key, (*shape, 1), minval=low, maxval=high)
        return anchors[:, None] + size * jax.random.normal(noise_key, (*shape, anchors.shape[1]))

    return vary


def outsiders(strength: Strength = 0.3, *, spherical: bool = False) -> Vary:
    """Return the variation towards random codes of the prior, a new one for every image.

    Raises:
        ValueError: a strength outside [0, 1].
    """
    low, high = _range(strength, 1.0)

    def vary(key: Key, anchors: Array, num: int) -> Array:
        strength_key, target_key = jax.random.split(key)
        shape = (anchors.shape[0], num)
        share = jax.random.uniform(strength_key, (*shape, 1), minval=low, maxval=high)
        return between(anchors[:, None], jax.random.normal(target_key, (*shape, anchors.shape[1])), share, spherical)

    return vary


def others(strength: Strength = 0.3, *, spherical: bool = False) -> Vary:
    """Return the variation towards the anchors of the other classes of the task, one of them for every image.

    Raises:
        ValueError: a strength outside [0, 1]; when called, a task of one class.
    """
    low, high = _range(strength, 1.0)

    def vary(key: Key, anchors: Array, num: int) -> Array:
        way = anchors.shape[0]
        if way < 2:
            raise ValueError("variation towards other classes of the task needs at least 2 classes, got 1")
        strength_key, class_key = jax.random.split(key)
        share = jax.random.uniform(strength_key, (way, num, 1), minval=low, maxval=high)
        further = jax.random.randint(class_key, (way, num), 1, way)
        target = anchors[(jnp.arange(way)[:, None] + further) % way]
        return between(anchors[:, None], target, share, spherical)

    return vary


def between(begin: Array, end: Array, share: Array | float, spherical: bool) -> Array:
    """Return the code a share of the way from `begin` to `end` [..., Z], on a line or on a sphere.

    On the sphere the direction turns by that share of the angle, and the length changes linearly.
    """
    if not spherical:
        return (1 - share) * begin + share * end
    begin_length, end_length = _length(begin), _length(end)
    cosine = (begin * end).sum(-1, keepdims=True) / jnp.maximum(begin_length * end_length, 1e-12)
    angle = jnp.arccos(jnp.clip(cosine, -1 + 1e-6, 1 - 1e-6))
    first, second = jnp.sin((1 - share) * angle) / jnp.sin(angle), jnp.sin(share * angle) / jnp.sin(angle)
    direction = first * begin / jnp.maximum(begin_length, 1e-12) + second * end / jnp.maximum(end_length, 1e-12)
    return direction * ((1 - share) * begin_length + share * end_length)


def _length(code: Array) -> Array:
    return jnp.sqrt(jnp.square(code).sum(-1, keepdims=True))


def _range(strength: Strength, most: float) -> tuple[float, float]:
    low, high = (strength, strength) if isinstance(strength, int | float) else strength
    if not 0 <= low <= high <= most:
        raise ValueError(f"expected a strength, or (least, most), within [0, {most:g}], got {strength}")
    return float(low), float(high)
