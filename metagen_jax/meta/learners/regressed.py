"""Regression onto the parameters of teachers: train one model per task, then learn the map from task to parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from metagen_jax.adapt.amortised import Embed, amortised_path
from metagen_jax.adapt.amortised import amortised as read_support
from metagen_jax.adapt.starts import Start
from metagen_jax.adapt.unroll import trajectory, unroll
from metagen_jax.dynamics import Dynamics
from metagen_jax.games import union, vector_field
from metagen_jax.meta.learners.record import MetaLearner, extended_init
from metagen_jax.types import Array, Key, Losses, Metrics, Model, Params, Task
from metagen_jax.types import Start as AnyStart


def regressed(
    model: Model,
    embed: Embed,
    start: AnyStart,
    num_steps: int,
    *,
    teacher_steps: int,
    players: Sequence[str],
    weights: Mapping[str, float] | None = None,
    teacher: AnyStart | None = None,
    learns: Sequence[str] = ("initialiser",),
    moves: Sequence[str] | None = None,
    dynamics: Dynamics = vector_field,
    **options: Any,
) -> MetaLearner:
    """Train one model per task, then learn the map from a task's support to those parameters.

        loss = 1/2 sum_p a_p mean_i (e(theta, S)_pi - phi*_pi)^2,   phi* = teacher_steps steps from theta on S and Q

    over the numbers i of each player p, so that a_p says what a player counts, whatever its size. phi* carries no
    gradient, and only `learns` moves: theta stays where the meta-parameters have it, from where teachers and the map
    both begin; train it before (jointly, or by Reptile) and pass it on, or leave it random. A map learned this way
    knows nothing about the gradient steps that may follow it; `amortised` is trained through them.

    Args:
        model: with an initialiser, of `metagen_jax.models.initialiser` for instance.
        embed: (meta, support) -> the players that the support determines, `players` among them.
        start: of the gradient steps that follow what is read, and of the teachers if they have none of their own.
        num_steps: K, of those gradient steps; zero for none.
        teacher_steps: of each teacher, on the support and the query as one batch.
        players: whose parameters are regressed.
        weights: a_p of each player, 1 where left out.
        teacher: start of the teachers.
        learns: the meta-players that the outer loop moves.
        moves: the players that teachers and gradient steps move; None for all.
        dynamics: how they move in a step, as in `maml`.
        **options: of `unroll`, in both.

    Returns:
        A learner whose field has the players `learns`. Its metrics are `distance/<player>`, the mean squared distance
        before weighting, and the trace of the teacher under `teacher/`, each [teacher_steps].

    Raises:
        ValueError: no step for the teachers, weights of other players, or a start with learned parameters, which
            the regression cannot teach; when called, a player that is not read.

    Source: Wang & Hebert, Learning to Learn: Model Regression Networks for Easy Small Sample Learning, 2016, who
    regress onto the parameters of models that have seen more examples. Departure: they regress from a model of the few
    examples, here any `embed` reads them.
    """
    chosen, weighting = tuple(players), dict(weights or {})
    if teacher_steps < 1 or isinstance(players, str) or not chosen or set(weighting) - set(chosen):
        raise ValueError(
            "expected at least one step for the teachers, a sequence of players and weights of these only, got "
            f"teacher_steps={teacher_steps}, players={players!r}, weights={weighting}"
        )
    if any(isinstance(one, Start) and one.learns for one in (start, teacher)):
        raise ValueError("regression cannot teach a start with learned parameters; use fixed(...)")
    inner = dynamics(model.game, moves)
    teach = unroll(inner, start if teacher is None else teacher, teacher_steps, **{**options, "first_order": True})

    def game(meta: Params, key: Key, task: Task) -> tuple[Losses, Metrics]:
        # what the teachers find is the target of a regression: nothing is learned about how they find it
        found, trace = jax.lax.stop_gradient(teach(meta, key, union(task.support, task.query)))
        made = embed(meta, task.support)
        if missing := [player for player in chosen if player not in made or player not in found]:
            raise ValueError(
                f"expected embed to give {list(chosen)}, got {sorted(made)}: {missing} cannot be regressed"
            )
        distances = {player: _mean_square(made[player], found[player]) for player in chosen}
        loss = 0.5 * jnp.stack([weighting.get(player, 1.0) * value for player, value in distances.items()]).sum()
        metrics = {f"distance/{player}": distance for player, distance in distances.items()}
        return dict.fromkeys(learns, loss), {**metrics, **{f"teacher/{name}": value for name, value in trace.items()}}

    adapt = read_support(embed, unroll(inner, start, num_steps, **options))
    path = amortised_path(embed, trajectory(inner, start))
    return MetaLearner(extended_init(model, start), adapt, vector_field(game, tuple(learns)), path)


def _mean_square(made: Any, found: Any) -> Array:
    """Return the mean squared difference over all numbers of two trees."""
    differences = jax.tree.leaves(jax.tree.map(jnp.subtract, made, found))
    return sum(jnp.square(leaf).sum() for leaf in differences) / sum(leaf.size for leaf in differences)
