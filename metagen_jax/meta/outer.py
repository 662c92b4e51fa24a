"""Outer fields: how meta-parameters learn from an adapter.

Meta-learning turns a game over examples into a game over tasks,

    losses(meta, task) = game(adapt(meta, task.support), task.query),

which has a field like any game: the outer step is the same code as the inner step.
"""

import jax

from metagen_jax.games import GradientField, vector_field
from metagen_jax.types import Adapt, Field, Game, Key, Losses, Metrics, Params, Task, player_of


def over_tasks(game: Game, adapt: Adapt) -> Game:
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
        params, trace = adapt(meta, adapt_key, task.support)
        losses, metrics = game(params, query_key, task.query)
        return {name: player_of(name, losses) for name in meta}, {**metrics, **_prefixed(trace)}

    return outer


def through(game: Game, adapt: Adapt) -> GradientField:
    """Return the field of the query loss through the adaptation: vector_field(over_tasks(game, adapt)).

    For a game of several players, player p's direction is d L_p(phi_K(meta), Q) / d meta_p, through the inner updates
    of all of them.

    Source: Finn, Abbeel & Levine, Model-Agnostic Meta-Learning, 2017, equation 1.
    """
    return vector_field(over_tasks(game, adapt))


def displacement(adapt: Adapt) -> Field:
    """Return Reptile's field: meta minus adapted, so that descending it moves towards the adapted parameters.

    Its batch is one `Task`, of which it uses the support.

    Source: Nichol, Achiam & Schulman, On First-Order Meta-Learning Algorithms, 2018, algorithm 1.
    """

    def field(meta: Params, key: Key, task: Task) -> tuple[Params, Metrics]:
        adapted, trace = adapt(meta, key, task.support)
        moved = {name: tree for name, tree in meta.items() if name in adapted}
        return jax.tree.map(lambda a, b: a - b, moved, {name: adapted[name] for name in moved}), _prefixed(trace)

    return field


def _prefixed(trace: Metrics) -> Metrics:
    return {f"support/{name}": value for name, value in trace.items()}
