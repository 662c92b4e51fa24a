"""Curricula: from tasks that are easy for the learner as it is to all of them.

A rule for `metagen_jax.strategies.candidates.chosen`. Shape letters: C candidates, T tasks.
"""

from typing import Any

import jax.numpy as jnp

from metagen_jax.strategies.candidates import Rule, Statistics
from metagen_jax.strategies.drawing import without_replacement
from metagen_jax.types import Array, Key


def self_paced(begin: float, num_steps: int) -> Rule:
    """Return the rule that draws among the candidates of smallest loss, a share that grows to all of them.

        share_n = begin + (1 - begin) min(n / num_steps, 1),   the ceil(share_n C) easiest (at least T), equally likely

    n counts the meta-steps that were taken. All T tasks are different and have the same weight; from `num_steps` on
    they are drawn as without a rule.

    Args:
        begin: share at the first meta-step, in (0, 1].
        num_steps: meta-steps until nothing is held back.

    Raises:
        ValueError: a share outside (0, 1], or no step.

    Source: Kumar, Packer & Koller, Self-Paced Learning for Latent Variable Models, 2010, with the linear pacing of
    Hacohen & Weinshall, On the Power of Curriculum Learning, 2019. Departure: a quantile of each meta-step's candidates
    in the place of a threshold of the loss.
    """
    if not 0 < begin <= 1 or num_steps < 1:
        raise ValueError(f"expected a share in (0, 1] and at least one meta-step, got {begin}, {num_steps}")

    def choose(state: Array, key: Key, statistics: Statistics, num_tasks: int) -> tuple[Array, Array]:
        total = statistics.loss.shape[0]
        share = begin + (1 - begin) * jnp.minimum(state / num_steps, 1.0)
        allowed = jnp.maximum(jnp.ceil(share * total - 1e-4), num_tasks)  # what rounding adds is no candidate more
        rank = jnp.argsort(jnp.argsort(statistics.loss))
        indices, _ = without_replacement(key, jnp.where(rank < allowed, 0.0, -jnp.inf), num_tasks)
        return indices, jnp.full(num_tasks, 1 / num_tasks)

    def update(state: Array, statistics: Statistics, scores: Array) -> Any:
        return state + 1

    return Rule(lambda key: jnp.zeros((), jnp.int32), choose, update)
