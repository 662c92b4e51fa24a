"""Choosing among the members of a population while they are meta-trained: competitively, or at random.

    rung k: train the members that are left to n_k meta-steps each, score them, keep P / f^(k+1),   k = 0, 1, ...

in which every rung takes the same number of member-steps, so that weak members cost little and the winner is trained
in full. Successive halving is that with f = 2. With the choice made at random it is the control that takes as much
training and knows nothing; with a single rung it is training all.

Scores are of tasks that are not trained on; larger is better, and a member whose score is not a number loses.

Sources: Jamieson & Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization, 2016
(successive halving). Departure: given is how long the winner is trained, there the total; and the last rung has one
member.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.meta.annealed import field_at
from metagen_jax.meta.learners import task_keys
from metagen_jax.population.members import Make, Members, Population, Traits, num_members, take, train_members
from metagen_jax.tasks.family import TaskFamily
from metagen_jax.types import Array, Key, Params

Choose = Callable[[Key, Array, int], Array]
"""(key, scores [P], num) -> the indices [num] of members that go on."""
Score = Callable[[Members, Key], Array]
"""(members, key) -> scores [P], larger is better."""


class Rung(NamedTuple):
    """A stage of a race."""

    num_members: int
    num_steps: int  # meta-steps since the run began, at its end


class Standing(NamedTuple):
    """What was known when members were left out."""

    num_steps: int  # meta-steps taken
    members: np.ndarray  # [P] which of the first population they are
    scores: np.ndarray  # [P]


class Race(NamedTuple):
    """How a race ended."""

    members: Members  # those left, with a leading axis
    left: np.ndarray  # which of the first population they are
    history: list[Standing]


def survivors(scores: Array, num: int) -> Array:
    """Return the indices [num] of the largest scores [P], best first; NaN comes last, after minus infinity.

    Example:
        >>> survivors(jnp.array([0.5, jnp.nan, 0.9, -jnp.inf]), 3).tolist()
        [2, 0, 3]
    """
    return jnp.argsort(-scores, stable=True)[:num]


def competitive(key: Key, scores: Array, num: int) -> Array:
    """Return the best, `survivors(scores, num)`."""
    del key
    return survivors(scores, num)


def at_random(key: Key, scores: Array, num: int) -> Array:
    """Return any `num` members, all with the same chance, whatever they scored."""
    return jax.random.permutation(key, scores.shape[0])[:num]


def halving(num_members: int, num_steps: int, *, factor: int = 2) -> list[Rung]:
    """Return rungs of (nearly) equal member-steps, from all members down to one that is trained in full.

    Args:
        num_members: P, a power of the factor.
        num_steps: meta-steps of the winner.
        factor: what the number of members is divided by.

    Raises:
        ValueError: a factor below two, a number of members that is no power of it, fewer meta-steps than a rung for
            every member needs.

    Example:
        >>> halving(4, 70)
        [Rung(num_members=4, num_steps=10), Rung(num_members=2, num_steps=30), Rung(num_members=1, num_steps=70)]
        >>> member_steps(halving(4, 70))
        120
    """
    sizes = [num_members]
    while factor > 1 and sizes[-1] > 1 and sizes[-1] % factor == 0:
        sizes.append(sizes[-1] // factor)
    if factor < 2 or sizes[-1] != 1:
        raise ValueError(f"expected a power of a factor of at least 2, got {num_members} members, factor={factor}")
    shares = np.cumsum([factor**index for index in range(len(sizes))])
    ends = np.round(num_steps * shares / shares[-1]).astype(int)
    if ends[0] < 1:
        raise ValueError(f"expected at least {shares[-1]} meta-steps, one for the first rung, got {num_steps}")
    return [Rung(size, int(end)) for size, end in zip(sizes, ends, strict=True)]


def member_steps(rungs: Sequence[Rung]) -> int:
    """Return the meta-steps of all members together."""
    spans = itertools.pairwise([0, *(rung.num_steps for rung in rungs)])
    return sum(rung.num_members * (end - begin) for rung, (begin, end) in zip(rungs, spans, strict=True))


def race(
    built: Population,
    members: Members,
    data: Any,
    rungs: Sequence[Rung],
    score: Score,
    key: Key,
    *,
    choose: Choose = competitive,
    chunk: int = 50,
) -> Race:
    """Train a population by rungs, and leave members out between them.

    Args:
        built: of `population`; its program is compiled once for each number of members.
        members: before the first meta-step; they are donated.
        data: the family's arrays.
        rungs: of `halving`, or any with falling numbers of members and rising meta-steps; the first has all members.
        score: of `validation`, or any function of members.
        key: of the scores' tasks and of choices; rung k has fold_in(key, k).
        choose: who goes on, `competitive` or `at_random`.
        chunk: meta-steps per dispatch.

    Raises:
        ValueError: rungs that do not begin with all members, or do not fall and rise.
    """
    sizes, ends = [rung.num_members for rung in rungs], [rung.num_steps for rung in rungs]
    falls = all(a > b >= 1 for a, b in itertools.pairwise(sizes))
    if not rungs or sizes[0] != num_members(members.traits) or not falls or ends != sorted(ends):
        raise ValueError(
            f"expected rungs that begin with all {num_members(members.traits)} members, with falling numbers of them "
            f"and rising meta-steps, got {list(rungs)}"
        )
    left, history = np.arange(sizes[0]), []
    for index, rung in enumerate(rungs):
        if index:
            score_key, choose_key = jax.random.split(jax.random.fold_in(key, index))
            scores = score(members, score_key)
            history.append(Standing(ends[index - 1], left, np.asarray(scores)))
            chosen = choose(choose_key, scores, rung.num_members)
            members, left = take(members, chosen), left[np.asarray(chosen)]
        members = train_members(built, members, data, rung.num_steps, chunk=chunk)
    return Race(members, left, history)


def validation(
    make: Make, family: TaskFamily, num_tasks: int, *, metric: str = "accuracy", sign: float = 1.0, chunk: int = 10
) -> Score:
    """Return the score of members: `sign` times the mean of a metric over validation tasks, the same for all.

    The metric is what the members' fields report of the query after adaptation, at their averaged meta-parameters;
    the gradients beside it are not computed. A member that is not finite on any task scores NaN.

    Args:
        make: of the population.
        family: of tasks that are not trained on.
        num_tasks: tasks of a score; task i has the key folded from i.
        metric: "accuracy" of a classifier, "loss" (with sign -1) of anything.
        sign: 1 if larger is better, -1 if smaller is.
        chunk: tasks at a time.

    Raises:
        ValueError: no task; when called, a metric that the field does not report.
    """
    if num_tasks < 1:
        raise ValueError(f"expected at least one validation task, got num_tasks={num_tasks}")

    @jax.jit
    def scores(data: Any, metas: Params, traits: Traits, step: Array, key: Key) -> Array:
        def of_task(key: Key) -> Array:
            spec_key, make_key, field_key = jax.random.split(key, 3)
            task = family.make(data, make_key, family.describe(data, spec_key))

            def of_member(meta: Params, traits: Traits) -> Array:
                _, metrics = field_at(make(traits).learner.field, step)(meta, field_key, task)
                if metric not in metrics:
                    raise ValueError(f"expected a metric among {sorted(metrics)}, got {metric!r}")
                return metrics[metric]

            return jax.vmap(of_member)(metas, traits)

        return sign * jax.lax.map(of_task, task_keys(key, num_tasks), batch_size=min(chunk, num_tasks)).mean(0)

    def score(members: Members, key: Key) -> Array:
        state, traits = members
        return scores(family.data, state.average, traits, state.step.max(), key)

    return score
