"""A field over a batch of tasks: the weighted sum over those that stay finite.

The sum is differentiated as one game, not task by task, so that parameters which all tasks share get one gradient
(one matrix product over all tasks) instead of one for each task.

How many tasks are taken at a time changes speed and memory, and results up to the order of summation only. An
accelerator wants all of them. On a CPU what the inner loop makes for each task should stay in the cache, so that many
tasks of a loop that moves little are taken together, and those of one that moves all weights one after the other.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import optax

from metagen_jax.adapt.factored import Adapter, Factored, compact, is_factored
from metagen_jax.games import GradientField, vector_field
from metagen_jax.meta.gathered import gathered
from metagen_jax.meta.outer import Displacement, TaskGame
from metagen_jax.sharding import differing_like
from metagen_jax.types import Adapt, Array, Examples, Field, Key, Losses, Metrics, Params, Task

TotalField = Callable[[Params, Key, Task, Array], tuple[Params, Metrics]]
"""(meta, keys [T], tasks [T, ...], weights [T]) -> (sum of weight * direction, metrics [T, ...])."""
MOVED, TAKEN_UP = 2**20, 2**22
"""Bytes of moved parameters, and of outer products in the dual form, of the tasks that a CPU takes at a time."""


def sum_over_tasks(field: Field, *, chunk: int | Literal["auto"] | None = None) -> TotalField:
    """Return the weighted sum of `field` over a batch of tasks.

    Args:
        field: whose batch is one task.
        chunk: tasks vmapped at a time, the chunks one after the other; None for all, "auto" for `automatic_chunk`.

    Raises:
        ValueError: a chunk below one; when called, one that does not divide the number of tasks.
    """
    if isinstance(chunk, int) and chunk < 1:
        raise ValueError(f"task_chunk must be at least 1, got {chunk}")
    together = _as_one_game(field) if isinstance(field, GradientField) else _one_by_one(field)

    def total(meta: Params, keys: Key, tasks: Task, weights: Array) -> tuple[Params, Metrics]:
        num_tasks = weights.shape[0]
        size = automatic_chunk(field, meta, keys, tasks) if chunk == "auto" else chunk or num_tasks
        if size == num_tasks:
            return together(meta, keys, tasks, weights)
        if num_tasks % size:
            raise ValueError(f"task_chunk={size} does not divide the {num_tasks} tasks of a device; choose a divisor")
        pieces = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), (keys, tasks, weights))

        def add(sum_so_far: Params, piece: Any) -> tuple[Params, Metrics]:
            direction, metrics = together(meta, *piece)
            return jax.tree.map(jnp.add, sum_so_far, direction), metrics

        first = jax.tree.map(lambda leaf: leaf[:size], (jax.random.clone(keys), tasks, weights))
        shapes, _ = jax.eval_shape(together, meta, *first)
        zero = jax.tree.map(lambda leaf: differing_like(jnp.zeros(leaf.shape, leaf.dtype), weights), shapes)
        direction, metrics = jax.lax.scan(add, zero, pieces)
        return direction, jax.tree.map(lambda leaf: leaf.reshape(num_tasks, *leaf.shape[2:]), metrics)

    return total


def automatic_chunk(field: Field, meta: Params, keys: Key, tasks: Task) -> int:
    """Return how many tasks to take at a time: all on accelerators, on CPUs as many as the cache holds.

    Counted is what the adapter of the field makes for a task: parameters that move, at most `MOVED` bytes in all, and
    of kernels in the dual form what they took up, at most `TAKEN_UP` bytes. A field without an adapter (joint training)
    takes all tasks together.
    """
    num_tasks = keys.shape[0]
    adapt = _adapt_of(field)
    if adapt is None or num_tasks == 1 or jax.default_backend() != "cpu":
        return num_tasks
    factored: list[bool] = []

    def made(meta: Params, key: Key, support: Examples) -> list[Any]:
        params, _ = compact(adapt)(meta, key, support)
        leaves = jax.tree.leaves(params, is_leaf=is_factored)
        factored[:] = [is_factored(leaf) for leaf in leaves]
        return [(leaf.left, leaf.right) if is_factored(leaf) else leaf for leaf in leaves]

    support = jax.tree.map(lambda leaf: leaf[0], tasks.support)
    traced, shapes = jax.make_jaxpr(made, return_shape=True)(meta, jax.random.clone(keys)[0], support)
    outputs = jax.tree.unflatten(jax.tree.structure(shapes), traced.jaxpr.outvars)
    still, sizes = set(traced.jaxpr.invars), {True: 0, False: 0}
    for kind, variables in zip(factored, outputs, strict=True):
        variables = [variable for variable in jax.tree.leaves(variables) if not isinstance(variable, jex.Literal)]
        moved = [variable.aval for variable in variables if variable not in still]
        sizes[kind] += sum(aval.size * aval.dtype.itemsize for aval in moved)
    fits = [n for n in range(1, num_tasks + 1) if n * sizes[False] <= MOVED and n * sizes[True] <= TAKEN_UP]
    return max([1, *(n for n in fits if num_tasks % n == 0)])


def _adapt_of(field: Field) -> Adapt | None:
    if isinstance(field, Displacement):
        return field.adapt
    game = getattr(field, "game", None)
    return game.adapt if isinstance(game, TaskGame) else None


def finite_sum(
    total: TotalField, meta: Params, keys: Key, tasks: Task, weights: Array
) -> tuple[Params, Metrics, Array]:
    """Sum over the tasks that are finite, leaving out the others, at the price of one evaluation where all are.

    Attempt 0 takes all tasks; attempt 1 those with finite losses; if the sum still is not finite (a gradient can
    overflow behind a finite loss), each task is tried alone and the last attempt takes those that passed. The slots of
    tasks that are left out are filled with a task that is not, at weight zero.

    Returns:
        direction (zeros if no task is finite), metrics [T, ...] of attempt 0, finite [T] bool.
    """
    num_tasks, given = weights.shape[0], (meta, keys, tasks, weights)
    last = num_tasks + 2

    @jax.jit  # traced once, for the shapes and in the loop
    def evaluate(active: Array, meta: Params, keys: Key, tasks: Task, weights: Array) -> tuple[Params, Metrics]:
        stand_in = jnp.where(active, jnp.arange(num_tasks), jnp.argmax(active))
        same = jax.random.clone(keys)  # the same noise in every attempt
        picked_keys, picked = jax.tree.map(lambda leaf: leaf[stand_in], (same, tasks))
        sums = total(meta, picked_keys, picked, jnp.where(active, weights, 0.0))
        return jax.tree.map(lambda leaf: differing_like(leaf, weights), sums)  # constants among the metrics, too

    def attempt(carry: Any) -> Any:
        number, active, _, first, passed, _, _ = carry
        direction, metrics = evaluate(active, *given)
        first = jax.tree.map(lambda old, new: jnp.where(number == 0, new, old), first, metrics)
        losses_finite = _losses_finite(first, num_tasks)
        finite = jnp.isfinite(optax.tree.norm(direction)) & active.any() & (losses_finite | ~active).all()
        probing = (number >= 2) & (number < last)
        passed = jnp.where(probing & (jnp.arange(num_tasks) == number - 2), finite, passed)
        hopeless = (number == 0) & ~losses_finite.any()
        done = (finite & ~probing) | (number == last) | hopeless
        kept = active & finite & done
        alone = jnp.arange(num_tasks) == number - 1  # the next attempt's number, less two
        following = jnp.where(number == 0, losses_finite, jnp.where(number + 1 < last, alone, passed))
        return number + 1, following, direction, first, passed, kept, done

    everything = differing_like(jnp.ones(num_tasks, bool), weights)
    direction, metrics = jax.tree.map(
        lambda leaf: differing_like(jnp.zeros(leaf.shape, leaf.dtype), weights),
        jax.eval_shape(evaluate, everything, *given),
    )
    number, done = differing_like(jnp.array(0), weights), differing_like(jnp.array(False), weights)
    begin = (number, everything, direction, metrics, ~everything, ~everything, done)
    _, _, direction, metrics, _, kept, _ = jax.lax.while_loop(lambda carry: ~carry[-1], attempt, begin)
    return jax.tree.map(lambda leaf: jnp.where(kept.any(), leaf, 0.0), direction), metrics, kept


def query_losses(metrics: Metrics, prefix: str = "") -> list[Array]:
    """Return the losses among the metrics of a field: `loss`, or `loss/<player>` for each."""
    return [value for name, value in metrics.items() if name == f"{prefix}loss" or name.startswith(f"{prefix}loss/")]


def _as_one_game(field: GradientField) -> TotalField:
    def game(meta: Params, keys: Key, batch: tuple[Task, Array]) -> tuple[Losses, Metrics]:
        tasks, weights = batch
        groups = field.groups_of(meta, jax.random.clone(keys)[0], jax.tree.map(lambda leaf: leaf[0], tasks))

        def one(key: Key, task: Task) -> tuple[list[Array], Metrics]:
            losses, metrics = field.game(meta, key, task)
            values = [losses[group[0]] for group in groups]
            named = {f"loss/{group[0]}": value for group, value in zip(groups, values, strict=True)}
            return values, {**metrics, **(named if len(groups) > 1 else {"loss": values[0]})}

        values, metrics = _each(one)(keys, tasks)
        totals: Losses = {}
        for group, value in zip(groups, values, strict=True):
            totals |= dict.fromkeys(group, (weights * value).sum())
        return totals, {"tasks": metrics}

    summed: Field = vector_field(game, field.players)
    adapt = _adapt_of(field)
    if not (isinstance(adapt, Adapter) and adapt.first_order):  # else every kernel is met once, on the query
        summed = gathered(vector_field(game, field.players))

    def total(meta: Params, keys: Key, tasks: Task, weights: Array) -> tuple[Params, Metrics]:
        direction, metrics = summed(meta, keys, (tasks, weights))
        return direction, metrics["tasks"]  # type: ignore[return-value]

    return total


def _one_by_one(field: Field) -> TotalField:
    take = field.compact if isinstance(field, Displacement) else field

    def total(meta: Params, keys: Key, tasks: Task, weights: Array) -> tuple[Params, Metrics]:
        directions, metrics = _each(lambda key, task: take(meta, key, task))(keys, tasks)
        return jax.tree.map(lambda leaf: _weighted(weights, leaf), directions, is_leaf=is_factored), metrics

    return total


def _each(function: Callable[[Key, Task], Any]) -> Callable[[Key, Task], Any]:
    """Return the function of a batch of tasks; a single task is not vmapped, so that its products stay plain ones."""

    def batched(keys: Key, tasks: Task) -> Any:
        if keys.shape[0] > 1:
            return jax.vmap(function)(keys, tasks)
        one = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[1:]), (keys, tasks))
        return jax.tree.map(lambda leaf: leaf[None], function(*one))

    return batched


def _weighted(weights: Array, leaf: Array | Factored) -> Array:
    """Return sum_t weights[t] leaf[t]; of factored matrices as one product over all tasks."""
    if not isinstance(leaf, Factored):
        return jnp.tensordot(weights, leaf, 1)
    left, right = (part.reshape(-1, part.shape[-1]) for part in (leaf.left, leaf.right))
    scale = (weights[:, None] * leaf.scale).reshape(-1, 1)
    change = jnp.matmul((scale * left).T, right, precision="highest")
    return change if leaf.base is None else change + jnp.tensordot(weights, leaf.base, 1)


def _losses_finite(metrics: Metrics, num_tasks: int) -> Array:
    losses = query_losses(metrics) + query_losses(metrics, "support/")
    flat = [jnp.isfinite(loss).reshape(num_tasks, -1).all(1) for loss in losses]
    return jnp.stack(flat).all(0) if flat else jnp.ones(num_tasks, bool)
