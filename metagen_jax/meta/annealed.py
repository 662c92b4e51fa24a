"""Outer fields that change as meta-training goes on; the loss after every inner step, annealed to that of the last.

    L(meta) = sum_k w_k(progress) L(phi_k(meta, S), Q),   k = 1 ... K

A query loss that sees phi_K alone leaves the gradient of the early steps to K - 1 Jacobians; a share in the loss for
each step steadies the beginning of training, and what counts in the end is the last one. With p the progress, from 0
to 1, and f the floor,

    w_k = max((1 - p) / K, f / K)  for k < K,   w_K = 1 - sum_{k < K} w_k,   and w = (0, ..., 0, 1) from p = 1 on.

Source: Antoniou, Edwards & Storkey, How to Train Your MAML, 2019, section 4 (multi-step loss optimisation); the rule
and its floor of 0.03 as in the authors' code, HowToTrainYourMAMLPytorch, `get_per_step_loss_importance_vector`.
Departure: progress is counted in meta-steps, not in epochs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metagen_jax.meta.outer import TaskGame
from metagen_jax.types import Adapt, Array, Examples, Field, Game, Key, Losses, Metrics, Params, Task, player_of

FLOOR = 0.03
"""Share of its first weight that a step before the last keeps while annealing goes on."""
Moves = Callable[[Params, Key, Examples, int], tuple[Params, Params, Metrics]]
"""(meta, key, support, num_steps) -> (params, what moves after 0, 1, ... num_steps steps, trace), of `every_step`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Annealed:
    """A field that changes from one meta-step to the next. Calling it is calling `final`."""

    at: Callable[[Array], Field]  # meta-steps taken, [] and possibly traced -> the field to follow next
    final: Field  # what it is in the end

    def __call__(self, meta: Params, key: Key, task: Task, /) -> tuple[Params, Metrics]:
        """Return `final(meta, key, task)`."""
        return self.final(meta, key, task)


def field_at(field: Field, step: Array | int) -> Field:
    """Return the field to follow after `step` meta-steps: that of an `Annealed`, any other as it is."""
    return field.at(jnp.asarray(step)) if isinstance(field, Annealed) else field


def step_weights(num_steps: int, progress: Array | float) -> Array:
    """Return the weights [K] of the losses after steps 1 to K; they add up to one.

    Args:
        num_steps: K.
        progress: [] of the annealing, 0 where it begins, 1 and above where it is over; may be traced.

    Raises:
        ValueError: fewer than one step.

    Example:
        >>> [round(float(weight), 3) for weight in step_weights(4, 0.5)]
        [0.125, 0.125, 0.125, 0.625]
        >>> step_weights(4, 1.0).tolist()
        [0.0, 0.0, 0.0, 1.0]
    """
    if num_steps < 1:
        raise ValueError(f"the loss after every step needs at least one, got num_steps={num_steps}")
    progress = jnp.asarray(progress, float)
    early = jnp.where(progress < 1, jnp.maximum(1 - progress, FLOOR) / num_steps, 0.0)
    return jnp.full(num_steps, early).at[-1].set(1 - (num_steps - 1) * early)


def over_steps(game: Game, moves: Moves, adapt: Adapt, num_steps: int, weights: Array) -> TaskGame:
    """Return the game over tasks whose losses are those after every inner step, weighted.

    Every step is judged with the same noise, that of `over_tasks`, so that weights (0, ..., 0, 1) give its game.

    Args:
        game: over `Examples`.
        moves: of `every_step`, differentiable.
        adapt: that of the last step.
        num_steps: K.
        weights: [K] of the losses after steps 1 to K.

    Returns:
        A game over one `Task`, as of `over_tasks`. Its metrics are those after the last step; `loss`, which a field
        adds, is the weighted sum.
    """

    def outer(meta: Params, key: Key, task: Task) -> tuple[Losses, Metrics]:
        adapt_key, query_key = jax.random.split(key)
        params, moving, trace = moves(meta, adapt_key, task.support, num_steps)
        shared: dict[str, int] = {}

        def judged(moved: Params) -> tuple[list[Array], Any]:
            losses, metrics = game({**params, **moved}, query_key, task.query)
            distinct = list({id(loss): loss for loss in losses.values()}.values())
            positions = {id(loss): position for position, loss in enumerate(distinct)}
            shared.update({name: positions[id(loss)] for name, loss in losses.items()})
            return distinct, metrics

        def counting(leaf: Array) -> Array:  # zero times infinity is no loss: what does not count is judged at the end
            counts = (weights > 0).reshape(-1, *(1,) * (leaf.ndim - 1))
            return jnp.where(counts, leaf[1:], leaf[-1][None])

        values, metrics = jax.vmap(judged)(jax.tree.map(counting, moving))
        sums = [weights.astype(value.dtype) @ value for value in values]
        losses = {name: sums[position] for name, position in shared.items()}
        last = jax.tree.map(lambda leaf: leaf[-1], metrics)
        support = {f"support/{name}": value for name, value in trace.items()}
        return {name: player_of(name, losses) for name in meta}, {**last, **support}

    return TaskGame(outer, adapt)
