"""Outer fields: how meta-parameters learn from an adapter.

Meta-learning turns a game over examples into a game over tasks,

    losses(meta, task) = game(adapt(meta, task.support), task.query),

which has a field like any game: the outer step is the same code as the inner step.
"""

import dataclasses

import jax

from metagen_jax.adapt.factored import Factored, compact, dense, is_factored, play
from metagen_jax.games import GradientField, vector_field
from metagen_jax.types import Adapt, Array, Field, Game, Key, Losses, Metrics, Params, Task, player_of


@dataclasses.dataclass(frozen=True, eq=False)
class TaskGame:
    """A game over one `Task` that knows how it adapts. Calling it is calling `play`."""

    play: Game
    adapt: Adapt

    def __call__(self, meta: Params, key: Key, task: Task, /) -> tuple[Losses, Metrics]:
        """Return `play(meta, key, task)`."""
        return self.play(meta, key, task)


def over_tasks(game: Game, adapt: Adapt) -> TaskGame:
    """Return the game over tasks: adapt to the support, be judged on the query.

    Meta-players that the game itself does not score (learned rates, a learned rule) follow their owner's loss.

    Args:
        game: over `Examples`.
        adapt: (meta, key, support) -> (params, trace).

    Returns:
        A game over one `Task`: (meta, key, task) -> ({meta-player: loss on the query}, metrics). The metrics are the
        game's on the query, and the adapter's trace under `support/`, each [K].
    """

    def outer(meta: Params, key: Key, task: Task) -> tuple[Losses, Metrics]:
        adapt_key, query_key = jax.random.split(key)
        params, trace = compact(adapt)(meta, adapt_key, task.support)
        losses, metrics = play(game, params, query_key, task.query)
        return {name: player_of(name, losses) for name in meta}, {**metrics, **_prefixed(trace)}

    return TaskGame(outer, adapt)


def through(game: Game, adapt: Adapt) -> GradientField:
    """Return the field of the query loss through the adaptation: vector_field(over_tasks(game, adapt)).

    For a game of several players, player p's direction is d L_p(phi_K(meta), Q) / d meta_p, through the inner updates
    of all of them.

    Source: Finn, Abbeel & Levine, Model-Agnostic Meta-Learning, 2017, equation 1.
    """
    return vector_field(over_tasks(game, adapt))


@dataclasses.dataclass(frozen=True, eq=False)
class Displacement:
    """Reptile's field. Calling it gives arrays; `compact` leaves the displacements of dual layers factored."""

    compact: Field
    adapt: Adapt

    def __call__(self, meta: Params, key: Key, task: Task, /) -> tuple[Params, Metrics]:
        """Return ({player: meta minus adapted}, metrics)."""
        direction, metrics = self.compact(meta, key, task)
        return dense(direction), metrics


def displacement(adapt: Adapt) -> Displacement:
    """Return Reptile's field: meta minus adapted, so that descending it moves towards the adapted parameters.

    Its batch is one `Task`, of which it uses the support.

    Source: Nichol, Achiam & Schulman, On First-Order Meta-Learning Algorithms, 2018, algorithm 1.
    """

    def between(adapted: Array | Factored, begin: Array) -> Array | Factored:
        if isinstance(adapted, Factored):
            base = None if adapted.base is None or adapted.base is begin else begin - adapted.base
            return dataclasses.replace(adapted, base=base, scale=-adapted.scale)
        return begin - adapted

    def field(meta: Params, key: Key, task: Task) -> tuple[Params, Metrics]:
        adapted, trace = compact(adapt)(meta, key, task.support)
        moved = {name: tree for name, tree in adapted.items() if name in meta}
        begin = {name: meta[name] for name in moved}
        return jax.tree.map(between, moved, begin, is_leaf=is_factored), _prefixed(trace)

    return Displacement(field, adapt)


def _prefixed(trace: Metrics) -> Metrics:
    return {f"support/{name}": value for name, value in trace.items()}
