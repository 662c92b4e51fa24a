"""Expectations over a set of examples, some of which are padding."""

import jax.numpy as jnp

from metagen_jax.types import Array


def weighted_mean(values: Array, weight: Array) -> Array:
    """Return sum(weight * values) / sum(weight), and zero for no examples: an empty set teaches nothing."""
    total = weight.sum()
    return (weight * values).sum() / jnp.where(total > 0, total, 1.0)
