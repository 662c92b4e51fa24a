"""Samplers: which tasks to learn from next, with state on the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.types import Array, Key, Params


class Sampler(NamedTuple):
    """A strategy for choosing tasks; all three run inside jit.

    `propose` leaves the state as it is; what was learned from the tasks comes back to `update`. Weights sum to one
    (where a strategy has negative ones, their absolute values do). Descriptions may be any tree of arrays.
    """

    init: Callable[[Key], Any]
    propose: Callable[[Any, Any, Key, Params], tuple[Any, Array]]  # (state, data, key, meta) -> specs [T], weights [T]
    update: Callable[[Any, Any, Array], Any]  # (state, specs [T, ...], scores [T]) -> state


def uniform(family: TaskFamily, num_tasks: int) -> Sampler:
    """Draw every task independently from the family, with equal weights that sum to one.

    Raises:
        ValueError: no task.
    """
    if num_tasks < 1:
        raise ValueError(f"expected at least one task a meta-step, got {num_tasks}")

    def propose(state: tuple[()], data: Any, key: Key, meta: Params) -> tuple[Spec, Array]:
        del state, meta
        specs = jax.vmap(family.describe, in_axes=(None, 0))(data, jax.random.split(key, num_tasks))
        return specs, jnp.full(num_tasks, 1.0 / num_tasks)

    return Sampler(lambda key: (), propose, lambda state, specs, scores: state)


def effective_sample_size(weights: Array) -> Array:
    """Return how many equally weighted tasks these weights are worth: (sum w)^2 / sum w^2, between 1 and T.

    Args:
        weights: [T], not negative (of signed weights the number may be below one); zero if all are zero.

    Source: Kish, Survey Sampling, 1965.

    Example:
        >>> float(effective_sample_size(jnp.array([0.5, 0.5, 0.0])))
        2.0
    """
    squares = jnp.square(weights).sum()
    return jnp.square(weights.sum()) / jnp.where(squares > 0, squares, 1.0)
