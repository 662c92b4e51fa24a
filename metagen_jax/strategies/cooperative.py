"""Cooperative strategies: tasks that help each other, or that cover what has not been seen.

| rule        | what it prefers                                            | needs      |
|-------------|------------------------------------------------------------|------------|
| agreement   | tasks whose direction agrees with the mean direction       | sketches   |
| greedy_set  | a set of tasks that agree with each other and differ       | sketches   |
| information | tasks that are unlike those that were used                 | embeddings |

Rules for `metagen_jax.strategies.candidates.chosen`. Shape letters: C candidates, T tasks, p numbers of a sketch, F
features of an embedding, M embeddings that are remembered.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.strategies.candidates import Rule, Statistics
from metagen_jax.strategies.drawing import cosines, normalised, of_length_one
from metagen_jax.types import Array, Key


def agreement(*, drop: bool = True, unit: bool = False) -> Rule:
    """Return the rule that weighs tasks by how far their direction agrees with the mean of all candidates.

        s_i = <g_i, (1/C) sum_j g_j>,   the T largest,   w_i = s_i / sum |s|

    With as many candidates as tasks every task is learned from, and only the weights differ.

    Args:
        drop: tasks with s_i < 0 get the weight zero, and weights sum to one; otherwise they are turned around, with a
            negative weight, and absolute values sum to one.
        unit: compare g_i / |g_i|, so that every task has one vote, and no few tasks with long directions (those with
            wrong labels, in `experiments/noisy_directions.py`) say where the mean points.

    Source: Eshratifar, Eigen & Pedram, Gradient Agreement as an Optimization Objective for Meta-Learning, 2018.
    Departures: sketches of directions in the place of the displacements of the inner loop; the choice of T among C;
    `drop` and `unit`.
    """

    def choose(state: Any, key: Key, statistics: Statistics, num_tasks: int) -> tuple[Array, Array]:
        del state, key
        agrees, indices = jax.lax.top_k(with_mean(_sketches(statistics), unit), num_tasks)
        weights = normalised(jnp.maximum(agrees, 0.0) if drop else jnp.abs(agrees))
        return indices, weights if drop else jnp.where(agrees < 0, -weights, weights)

    return Rule(lambda key: (), choose)


def greedy_set(beta: float = 0.5, *, sign: int = 1, unit: bool = False) -> Rule:
    """Return the rule that builds a set of tasks, one after the other, which agree and are not copies.

        first  argmax_i sign <g_i, mean g>
        then   argmax_j sign mean_{i in S} cos(g_i, g_j) - beta max_{i in S} cos(phi_i, phi_j)

    phi is the embedding, or the sketch where there is none. All T tasks get the same weight.

    Args:
        beta: how much likeness costs, at least 0; 0 takes copies of one task if they are there.
        sign: 1 for tasks that agree; -1 for the competitive counterpart, tasks that pull apart.
        unit: of the first, too, only the way its direction points counts, as in `agreement`.

    Raises:
        ValueError: a negative beta, or another sign.
    """
    if beta < 0 or sign not in (1, -1):
        raise ValueError(f"expected beta >= 0 and sign 1 (tasks agree) or -1 (tasks conflict), got {beta}, {sign}")

    def choose(state: Any, key: Key, statistics: Statistics, num_tasks: int) -> tuple[Array, Array]:
        del state, key
        sketches = _sketches(statistics)
        agree = sign * cosines(sketches)
        alike = cosines(statistics.embedding) if statistics.embedding.shape[1] else cosines(sketches)
        first = jnp.argmax(sign * with_mean(sketches, unit))

        def add(carry: tuple[Array, Array, Array], number: Array) -> tuple[tuple[Array, Array, Array], Array]:
            total, most, taken = carry
            worth = jnp.where(taken, -jnp.inf, total / number - beta * most)
            nxt = jnp.argmax(worth)
            return (total + agree[nxt], jnp.maximum(most, alike[nxt]), taken.at[nxt].set(True)), nxt

        begin = (agree[first], alike[first], jnp.zeros(len(sketches), bool).at[first].set(True))
        _, others = jax.lax.scan(add, begin, jnp.arange(1.0, num_tasks))
        return jnp.concatenate([first[None], others]), jnp.full(num_tasks, 1 / num_tasks)

    return Rule(lambda key: (), choose)


class Used(NamedTuple):
    """The embeddings of the tasks used last, in a ring."""

    embedding: Array  # [M, F]
    seen: Array  # [] int32, tasks used since the beginning


def information(num_features: int, *, memory: int = 64, width: float = 0.5) -> Rule:
    """Return the rule that takes the tasks that are the most surprising among those used before.

        u(phi) = -log (1/M) sum_m N(phi; phi_m, h^2 I),   h^2 = width^2 times the mean squared distance of candidates

    One task after the other: each one that is taken counts as used for the next. All get the same weight.

    Args:
        num_features: F of the embeddings.
        memory: M, the tasks that are remembered.
        width: h in units of the root mean squared distance between candidates.

    Raises:
        ValueError: a number that is not positive; when called, embeddings of another size.

    Source: Kaddour, Saemundsson & Deisenroth, Probabilistic Active Meta-Learning, 2020. Departures: any
    embedding, each with the same variance, in the place of a learned posterior; remembered embeddings stay as they
    were when the task was used, and the oldest is forgotten.
    """
    if num_features < 1 or memory < 1 or not width > 0:
        raise ValueError(f"expected positive numbers, got num_features={num_features}, {memory=}, {width=}")

    def choose(state: Used, key: Key, statistics: Statistics, num_tasks: int) -> tuple[Array, Array]:
        del key
        phi = statistics.embedding
        if phi.shape[1] != num_features:
            raise ValueError(
                f"information() was told of {num_features} features, but the embeddings have {phi.shape[1]}; "
                "measure them by measured(game, adapt, embed=function) and give their number"
            )
        spread = _squared_distances(phi, phi)
        spread_mean = spread.sum() / max(phi.shape[0] * (phi.shape[0] - 1), 1)
        scale = -0.5 / (width**2 * jnp.where(spread_mean > 0, spread_mean, 1.0))
        present = jnp.arange(memory) < state.seen
        to_used = jnp.where(present[None], scale * _squared_distances(phi, state.embedding), -jnp.inf)

        def take(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
            log_density, taken = carry
            nxt = jnp.argmin(jnp.where(taken, jnp.inf, log_density))
            return (jnp.logaddexp(log_density, scale * spread[nxt]), taken.at[nxt].set(True)), nxt

        begin = (jax.scipy.special.logsumexp(to_used, axis=1), jnp.zeros(phi.shape[0], bool))
        _, indices = jax.lax.scan(take, begin, length=num_tasks)
        return indices, jnp.full(num_tasks, 1 / num_tasks)

    def update(state: Used, statistics: Statistics, scores: Array) -> Used:
        newest = statistics.embedding[-memory:]
        num_tasks, skipped = scores.shape[0], scores.shape[0] - newest.shape[0]
        places = (state.seen + skipped + jnp.arange(newest.shape[0])) % memory
        return Used(state.embedding.at[places].set(newest), state.seen + num_tasks)

    return Rule(lambda key: Used(jnp.zeros((memory, num_features)), jnp.zeros((), jnp.int32)), choose, update)


def with_mean(sketches: Array, unit: bool = False) -> Array:
    """Return <g_i, mean g> of every row [C]; with `unit`, of rows that were given the length one."""
    sketches = of_length_one(sketches) if unit else sketches
    return jnp.matmul(sketches, sketches.mean(0), precision="highest")


def _squared_distances(x: Array, y: Array) -> Array:
    return jnp.square(x[:, None] - y[None]).sum(-1)


def _sketches(statistics: Statistics) -> Array:
    if not statistics.sketch.shape[1]:
        raise ValueError(
            "this rule compares directions, but none were measured; name the players whose directions are compared, "
            "as in measured(game, adapt, players=('body',), sketch=256)"
        )
    return statistics.sketch
