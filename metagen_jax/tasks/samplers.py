"""Samplers: which tasks to learn from next, with state on the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.types import Array, Key


class Sampler(NamedTuple):
    """A strategy for choosing tasks; all three run inside jit."""

    init: Callable[[Key], Any]
    propose: Callable[[Any, Any, Key], tuple[Spec, Array]]  # (state, data, key) -> specs [T, ...], weights [T]
    update: Callable[[Any, Spec, Array], Any]  # (state, specs [T, ...], scores [T]) -> state


def uniform(family: TaskFamily, num_tasks: int) -> Sampler:
    """Draw every task independently from the family, with equal weights that sum to one.

    Raises:
        ValueError: no task.
    """
    if num_tasks < 1:
        raise ValueError(f"expected at least one task a meta-step, got {num_tasks}")

    def propose(state: tuple[()], data: Any, key: Key) -> tuple[Spec, Array]:
        del state
        specs = jax.vmap(family.describe, in_axes=(None, 0))(data, jax.random.split(key, num_tasks))
        return specs, jnp.full(num_tasks, 1.0 / num_tasks)

    return Sampler(lambda key: (), propose, lambda state, specs, scores: state)
