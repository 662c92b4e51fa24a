"""Candidates: more tasks than are needed are made and measured, and a rule chooses those that are learned from.

    C descriptions -> tasks -> statistics (loss, sketch, embedding) -> rule -> T of them, with weights

What was measured is what is learned from: a description of `pinned` determines its task exactly. A rule sees statistics
only, so that the rules of `competitive`, `cooperative` and `curriculum` serve any family and any learner. It chooses
without changing its state; the statistics of what it chose travel with the descriptions, and come back to it with the
scores once the tasks have been learned from.

Cost: C adaptations and query losses a meta-step, and C gradients where sketches are asked for, beside the T tasks that
are learned from. Shape letters: C candidates, T tasks, p numbers of a sketch, F features of an embedding.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.games import vector_field
from metagen_jax.meta.outer import over_tasks
from metagen_jax.tasks.family import TaskFamily
from metagen_jax.tasks.samplers import Sampler
from metagen_jax.types import Adapt, Array, Game, Key, Losses, Metrics, Params, Task, player_of


class Statistics(NamedTuple):
    """What is known of a task before it is learned from; of several, with a leading axis."""

    loss: Array  # [] of the query after adapting, the sum over players that have different ones
    sketch: Array  # [p] of the direction that it would move the meta-parameters in; [0] if not measured
    embedding: Array  # [F] where it lies among tasks; [0] if not measured


Measure = Callable[[Params, Key, Task], Statistics]


class Rule(NamedTuple):
    """Which candidates are learned from; all three run inside jit."""

    init: Callable[[Key], Any]
    choose: Callable[[Any, Key, Statistics, int], tuple[Array, Array]]
    """(state, key, statistics [C, ...], T) -> indices [T], weights [T] that sum to one."""
    update: Callable[[Any, Statistics, Array], Any] = lambda state, statistics, scores: state
    """(state, statistics [T, ...] of those chosen, scores [T]) -> state."""


def pinned(family: TaskFamily) -> TaskFamily:
    """Return the family whose descriptions determine their tasks exactly.

    A description is {"task": that of the family given, "seed": [2] uint32, the data of the key that makes it}; `make`
    uses that key in the place of its own, and ignores whatever else stands in a description.
    """

    def describe(data: Any, key: Key) -> Any:
        task_key, seed_key = jax.random.split(key)
        return {"task": family.describe(data, task_key), "seed": jax.random.key_data(seed_key)}

    def make(data: Any, key: Key, spec: Any) -> Task:
        stored = jax.random.wrap_key_data(spec["seed"], impl=jax.random.key_impl(key))
        return family.make(data, stored, spec["task"])

    return TaskFamily(family.data, describe, make)


def measured(
    game: Game,
    adapt: Adapt,
    *,
    players: Sequence[str] = (),
    sketch: int = 0,
    embed: Callable[[Params, Task], Array] | None = None,
) -> Measure:
    """Return the function (meta, key, task) -> statistics of a task.

    Args:
        game: over `Examples`, as a model has it.
        adapt: of the learner.
        players: of the meta-parameters, in whose part of the query loss' direction (`vector_field`; the gradient, in a
            game of one loss) the sketch is taken; empty for no sketch. A few small players (gains and biases, a last
            layer) cost less than all.
        sketch: p, into which the direction of P numbers is projected by a fixed random matrix with entries -1, 0 and 1,
            one in each column and equally many in each row, which keeps inner products in expectation; 0 for no
            projection.
        embed: (meta, task) -> [F]; None for no embedding.

    Raises:
        ValueError: a negative size, or one without players.

    Source: of the projection, Weinberger et al., Feature Hashing for Large Scale Multitask Learning, 2009;
    departure: buckets of equal size.
    """
    names = tuple(players)
    if isinstance(players, str) or sketch < 0 or (sketch and not names):
        raise ValueError(
            f"expected players as a sequence of names, and sketch >= 0 with at least one player whose direction is "
            f"sketched, got players={players!r}, sketch={sketch}"
        )
    outer = over_tasks(game, adapt)

    def scored(meta: Params, key: Key, task: Task) -> tuple[Losses, Metrics]:
        losses, _ = outer(meta, key, task)
        return losses, {"total": player_of("", losses)}  # nobody's name: the sum

    def measure(meta: Params, key: Key, task: Task) -> Statistics:
        embedding = jnp.zeros(0) if embed is None else embed(meta, task).reshape(-1)
        if not names:
            return Statistics(scored(meta, key, task)[1]["total"], jnp.zeros(0), embedding)
        direction, metrics = vector_field(scored, names)(meta, key, task)
        flat = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves([direction[name] for name in names])])
        return Statistics(metrics["total"], projected(flat, sketch) if sketch else flat, embedding)

    return measure


def chosen(
    family: TaskFamily, num_tasks: int, num_candidates: int, measure: Measure, rule: Rule, *, chunk: int | None = None
) -> Sampler:
    """Return the sampler that measures C candidates at the current meta-parameters and lets a rule choose T.

    A candidate of which something is not finite is replaced by one that is, if there is any: no rule sees it.

    Args:
        family: of `pinned`; the meta-step has to get the same one, as it makes the tasks that were measured.
        num_tasks: T.
        num_candidates: C, at least T.
        measure: of `measured`, or any function (meta, key, task) -> statistics.
        rule: `score_softmax`, `agreement`, `greedy_set`, `information`, `self_paced`, or one's own.
        chunk: candidates that are measured at a time, a divisor of C; None for all.

    Returns:
        A sampler whose descriptions are those of the family and {"statistics": of each task}.

    Raises:
        ValueError: no task, fewer candidates than tasks, a chunk that does not divide C, a family that is not pinned.
    """
    if not 1 <= num_tasks <= num_candidates:
        raise ValueError(f"expected 1 <= tasks <= candidates, got num_tasks={num_tasks}, {num_candidates} candidates")
    if chunk is not None and (chunk < 1 or num_candidates % chunk):
        raise ValueError(f"chunk={chunk} does not divide the {num_candidates} candidates; choose a divisor")
    spec = jax.eval_shape(family.describe, family.data, jax.random.key(0))
    if not (isinstance(spec, dict) and {"task", "seed"} <= set(spec)):
        raise ValueError(
            "candidates are made twice, once to be measured and once to be learned from, so their descriptions have to "
            "determine them: wrap the family, family = pinned(family), and give it to the meta-step too"
        )

    def measure_all(data: Any, meta: Params, keys: Key, specs: Any) -> Statistics:
        def one(key: Key, spec: Any) -> Statistics:
            make_key, measure_key = jax.random.split(key)
            return measure(meta, measure_key, family.make(data, make_key, spec))

        size = chunk or num_candidates
        pieces = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), (keys, specs))
        found = jax.lax.map(lambda piece: jax.vmap(one)(*piece), pieces)
        return jax.tree.map(lambda leaf: leaf.reshape(num_candidates, *leaf.shape[2:]), found)

    def propose(state: Any, data: Any, key: Key, meta: Params) -> tuple[Any, Array]:
        describe_key, measure_key, choose_key = jax.random.split(key, 3)
        specs = jax.vmap(family.describe, in_axes=(None, 0))(data, jax.random.split(describe_key, num_candidates))
        statistics = measure_all(data, meta, jax.random.split(measure_key, num_candidates), specs)
        finite = jnp.stack([jnp.isfinite(leaf).all(range(1, leaf.ndim)) for leaf in statistics]).all(0)
        stand_in = jnp.where(finite, jnp.arange(num_candidates), jnp.argmax(finite))
        specs, statistics = jax.tree.map(lambda leaf: leaf[stand_in], (specs, statistics))
        statistics = jax.tree.map(lambda leaf: jnp.where(finite.any(), leaf, 0.0), statistics)
        indices, weights = rule.choose(state, choose_key, statistics, num_tasks)
        specs, statistics = jax.tree.map(lambda leaf: leaf[indices], (specs, statistics))
        return {**specs, "statistics": statistics}, weights

    def update(state: Any, specs: Any, scores: Array) -> Any:
        return rule.update(state, specs["statistics"], scores)

    return Sampler(rule.init, propose, update)


def projected(flat: Array, size: int) -> Array:
    """Return the sketch [size] of a vector [P]: signs at random, P / size entries in random places summed for each.

    The matrix is a function of P and size alone.
    """
    rows = -(-flat.shape[0] // size)
    sign_key, place_key = jax.random.split(jax.random.key(0))
    places = jax.random.permutation(place_key, rows * size)
    signed = jax.random.rademacher(sign_key, flat.shape, flat.dtype) * flat
    return jnp.pad(signed, (0, rows * size - flat.shape[0]))[places].reshape(rows, size).sum(0)
