"""Meta-training: many meta-steps per dispatch, data as an argument, one trace for a whole run.

The keys of a run are folded from its seed and the step number, so that a resumed run is the same run; those of a task
are folded from its index, so that nothing depends on how the tasks are cut into pieces.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metagen_jax.adapt.starts import LOG_RATE
from metagen_jax.meta.annealed import field_at
from metagen_jax.meta.batch import finite_sum, query_losses, sum_over_tasks
from metagen_jax.meta.learners import MetaLearner, task_keys
from metagen_jax.sharding import AXIS, check_axis, differing
from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.tasks.samplers import Sampler, effective_sample_size
from metagen_jax.types import Array, Key, Metrics, Params


class TrainState(NamedTuple):
    """Everything a run needs to go on."""

    step: Array  # [] int32, meta-steps taken
    meta: Params
    average: Params  # exponential moving average of meta
    opt: Any
    sampler: Any
    key: Key  # of the whole run, never consumed: step n uses fold_in(key, n)


Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def init_state(
    learner: MetaLearner,
    sampler: Sampler,
    optimizer: optax.GradientTransformation,
    key: Key,
    *,
    meta: Params | None = None,
) -> TrainState:
    """Return the state before the first meta-step; `meta` (a warm start) replaces the learner's fresh ones."""
    init_key, sampler_key, run_key = jax.random.split(key, 3)
    meta = jax.jit(learner.init)(init_key) if meta is None else meta
    return TrainState(
        jnp.zeros((), jnp.int32),
        meta,
        jax.tree.map(jnp.copy, meta),
        optimizer.init(meta),
        sampler.init(sampler_key),
        run_key,
    )


def make_step(
    learner: MetaLearner,
    family: TaskFamily,
    sampler: Sampler,
    optimizer: optax.GradientTransformation,
    *,
    mesh: jax.sharding.Mesh | None = None,
    average_decay: float = 0.999,
    task_chunk: int | None = None,
) -> Step:
    """Return one meta-step: propose tasks, take the field of each, average, follow the outer rule.

    A task whose direction or loss is not finite is left out of the mean and counted; when none that has a weight is
    finite, or the outer rule leads to parameters that are not, parameters and optimiser stay as they are.

    Args:
        learner: whose field takes one `Task`; one that is `Annealed` is followed as it is at each meta-step.
        family: makes the tasks that the sampler describes.
        sampler: proposes T tasks and their weights, and may look at the meta-parameters for it.
        optimizer: the outer rule, any optax transformation.
        mesh: over which the tasks are spread (`metagen_jax.sharding.task_mesh`); None for one device. State and data
            are whole on every device (`metagen_jax.sharding.everywhere`), and so is what comes out.
        average_decay: of the exponential moving average of the meta-parameters (bias-corrected, so that it begins as
            their plain mean).
        task_chunk: tasks that are vmapped at a time, a divisor of T (of T per device); None to choose by device and
            size (`metagen_jax.meta.batch.automatic_chunk`). Results agree up to the order of summation.

    Returns:
        (state, data) -> (state, metrics). The metrics are means over the finite tasks, by the size of their weights,
        and: `grad_norm` [], `effective_tasks` [] (`metagen_jax.tasks.samplers.effective_sample_size` of the weights of
        the finite tasks), `num_nonfinite` [] tasks left out, `finite_share` [] of those kept (0 where parameters stayed
        as they were), `bad_task` [] the first one left out (-1 if there is none) and `bad_inner_step` [] where its
        inner loop lost finiteness (-1: after it, on the query).

    Raises:
        ValueError: a decay outside [0, 1), a chunk below one, a mesh without the axis `task`.
    """
    if not 0 <= average_decay < 1:
        raise ValueError(f"average_decay must be in [0, 1), got {average_decay}")
    check_axis(mesh)

    shared, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(AXIS)
    total = functools.partial(sum_over_tasks, chunk="auto" if task_chunk is None else task_chunk)
    total(learner.field)  # which refuses a chunk below one, before anything is traced

    def over(
        meta: Params, data: Any, taken: Array, specs: Spec, weights: Array, keys: Key
    ) -> tuple[Params, Metrics, Array]:
        both = jax.vmap(jax.random.split)(keys)
        tasks = jax.vmap(family.make, in_axes=(None, 0, 0))(data, both[:, 0], specs)
        return finite_sum(total(field_at(learner.field, taken)), meta, both[:, 1], tasks, weights)

    def sharded(
        meta: Params, data: Any, taken: Array, specs: Spec, weights: Array, keys: Key
    ) -> tuple[Params, Metrics, Array]:
        if mesh is None:
            return over(meta, data, taken, specs, weights, keys)

        def per_device(meta: Params, data: Any, taken: Array, *pieces: Any) -> tuple[Params, Metrics, Array]:
            meta, data = differing((meta, data))
            direction, metrics, finite = over(meta, data, taken, *pieces)
            return jax.lax.psum(direction, AXIS), metrics, finite

        direction, *of_tasks = jax.shard_map(
            per_device,
            mesh=mesh,
            in_specs=(shared, shared, shared, split, split, split),
            out_specs=(shared, split, split),
        )(meta, data, taken, specs, weights, keys)
        # Gathered, so that what is computed from them has the order of sums that one device has.
        metrics, finite = jax.lax.with_sharding_constraint(of_tasks, jax.sharding.NamedSharding(mesh, shared))
        return direction, metrics, finite

    def step(state: TrainState, data: Any) -> tuple[TrainState, Metrics]:
        propose_key, tasks_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        specs, weights = sampler.propose(state.sampler, data, propose_key, state.meta)
        keys = task_keys(tasks_key, weights.shape[0])
        direction, per_task, finite = sharded(state.meta, data, state.step, specs, weights, keys)
        kept = jnp.where(finite, weights, 0.0)
        size = jnp.abs(kept)  # a strategy may turn tasks that conflict around
        scale = jnp.abs(weights).sum() / jnp.where(size.sum() > 0, size.sum(), 1.0)
        direction = jax.tree.map(lambda leaf: leaf * scale, direction)
        direction = completed(direction, state.meta)
        norm = optax.tree.norm(direction)
        usable = (size.sum() > 0) & jnp.isfinite(norm)
        meta, average, opt, moved = follow(optimizer, state, direction, usable, average_decay)
        first = jnp.argmin(finite)
        metrics = jax.tree.map(lambda leaf: _weighted_mean(leaf, size), per_task) | {
            "grad_norm": norm,
            "effective_tasks": effective_sample_size(kept),
            "num_nonfinite": (~finite).sum(),
            "finite_share": jnp.where(moved, finite.mean(), 0.0),
            "bad_task": jnp.where(finite.all(), -1, first),
            "bad_inner_step": jnp.where(finite.all(), -1, _first_bad(per_task, finite.shape[0])[first]),
        }
        sampler_state = sampler.update(state.sampler, specs, _scores(per_task, finite.shape[0]))
        after = TrainState(state.step + 1, meta, average, opt, sampler_state, state.key)
        if mesh is not None:  # whole on every device, so that every process can read them
            return jax.lax.with_sharding_constraint((after, metrics), jax.sharding.NamedSharding(mesh, shared))
        return after, metrics

    return step


def completed(direction: Params, meta: Params) -> Params:
    """Return a direction of all meta-parameters, in their order: zero for those that it says nothing about."""
    still = {name: jax.tree.map(jnp.zeros_like, tree) for name, tree in meta.items() if name not in direction}
    return {name: (direction | still)[name] for name in meta}


def follow(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    direction: Params,
    usable: Array,
    average_decay: float,
) -> tuple[Params, Params, Any, Array]:
    """Return meta-parameters, their average and the optimiser's state after one update, and whether there was one.

    Args:
        optimizer: the outer rule.
        state: before it.
        direction: of all meta-parameters.
        usable: [] bool, whether the direction may be followed.
        average_decay: of the exponential moving average, bias-corrected.

    Returns:
        All as they were where the direction may not be followed, or leads to parameters that are not finite.
    """
    before = state.meta, state.average, state.opt

    def moved() -> tuple[tuple[Params, Params, Any], Array]:
        updates, opt = optimizer.update(direction, state.opt, state.meta)
        meta = optax.apply_updates(state.meta, updates)
        decay = jnp.minimum(average_decay, state.step / (state.step + 1.0))
        average = jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, state.average, meta)
        fits = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((meta, average))]).all()
        return jax.tree.map(lambda new, old: jnp.where(fits, new, old), (meta, average, opt), before), fits

    (meta, average, opt), fits = jax.lax.cond(usable, moved, lambda: (before, jnp.array(False)))
    return meta, average, opt, fits


def run_chunk(step: Step, num_steps: int, *, sharding: jax.sharding.Sharding | None = None) -> Step:
    """Return the jitted function that takes `num_steps` meta-steps in one dispatch; the state given is donated.

    Args:
        step: of `make_step`.
        num_steps: of one dispatch.
        sharding: of everything that comes out, that of the state where it is spread; None to leave it to the compiler.

    Returns:
        (state, data) -> (state, metrics), each metric [num_steps, ...].
    """

    def chunk(state: TrainState, data: Any) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(lambda state, _: step(state, data), state, length=num_steps)

    return jax.jit(chunk, donate_argnums=0, out_shardings=sharding)


def outer_optimizer(
    rate: float,
    num_steps: int,
    *,
    warmup: int = 0,
    clip: float = 0.0,
    rate_of_rates: float | None = None,
    momentum: float = 0.9,
) -> optax.GradientTransformation:
    """Return Adam with linear warm-up, cosine decay to zero and clipping by the global norm.

    Args:
        rate: peak rate.
        num_steps: meta-steps of the run.
        warmup: meta-steps of the linear warm-up.
        clip: largest global norm, of the learned log-rates and of the rest apart; 0 clips nothing.
        rate_of_rates: peak rate of the learned log-rates, which have further to go than weights; `rate` if None.
        momentum: decay of Adam's first moment, b1; games do better with less of it, 0.5 or 0.

    Raises:
        ValueError: a rate that is not positive, a momentum outside [0, 1), or a warm-up longer than the run.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    if not rate > 0 or (rate_of_rates is not None and not rate_of_rates > 0) or clip < 0:
        raise ValueError(f"expected positive rates and clip >= 0, got {rate}, {rate_of_rates}, clip={clip}")
    if not 0 <= warmup < num_steps:
        raise ValueError(f"the warm-up must be shorter than the run of {num_steps} meta-steps, got {warmup}")

    def rule(peak: float) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(peak / max(warmup, 1), peak, warmup, num_steps)
        bound = optax.clip_by_global_norm(clip) if clip else optax.identity()
        return optax.chain(bound, optax.adam(schedule, b1=momentum))

    def labels(params: Params) -> dict[str, str]:
        return {name: "rates" if name.endswith(f"/{LOG_RATE}") else "weights" for name in params}

    return optax.partition({"weights": rule(rate), "rates": rule(rate_of_rates or rate)}, labels)


PATIENCE = 5
"""Meta-steps in a row that may come to nothing."""


class Divergence(RuntimeError):
    """Meta-training was stopped because its tasks kept losing finiteness."""


def train(
    step: Step,
    state: TrainState,
    data: Any,
    num_steps: int,
    *,
    chunk: int = 50,
    on_chunk: Callable[[TrainState, Metrics], None] = lambda state, metrics: None,
    patience: int = PATIENCE,
) -> TrainState:
    """Take meta-steps until `num_steps` have been taken since the run began.

    Every dispatch takes `chunk` of them but the last, which takes what is left, so that a run that goes on from the end
    of a dispatch is cut as one that was never interrupted, and two programs are compiled at most.

    Args:
        step: of `make_step`.
        state: where to go on from; it is donated.
        data: the family's arrays.
        num_steps: of the whole run.
        chunk: meta-steps per dispatch, at least one.
        on_chunk: called after each dispatch with the state and the metrics [chunk, ...] as NumPy arrays.
        patience: stop after this many meta-steps in a row that were `lost`.

    Raises:
        ValueError: a chunk below one.
        Divergence: with the meta-step, the task and the inner step, and what to do.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    begin, failures = int(state.step), 0
    whole = state.step.sharding if state.step.sharding.num_devices > 1 else None
    run = functools.cache(lambda size: run_chunk(step, size, sharding=whole))
    while begin < num_steps:
        size = min(chunk, num_steps - begin)
        state, metrics = run(size)(state, data)
        metrics = jax.device_get(metrics)
        on_chunk(state, metrics)
        for offset in range(size):
            failures = failures + 1 if lost(metrics)[offset] else 0
            if failures >= patience:
                raise Divergence(_advice(begin + offset, {name: value[offset] for name, value in metrics.items()}))
        begin += size
    return state


def lost(metrics: Metrics) -> Array:
    """Return which meta-steps [n] came to nothing: half of their tasks or more were not finite, or the update was not.

    Args:
        metrics: of a dispatch of n meta-steps.
    """
    return metrics["finite_share"] <= 0.5


def _advice(step: int, metrics: Any) -> str:
    if not metrics["num_nonfinite"]:
        return (
            f"meta-step {step}: the tasks are finite, but their direction or the parameters that it leads to are not, "
            "and so it was for several meta-steps in a row. The outer rate is too large: divide it by ten, or clip"
        )
    inner = int(metrics["bad_inner_step"])
    where = "on the query, after the inner loop" if inner < 0 else f"at inner step {inner}"
    return (
        f"meta-step {step}: {int(metrics['num_nonfinite'])} tasks are not finite, the first of them task "
        f"{int(metrics['bad_task'])} {where}, and so it was for several meta-steps in a row. The inner rate is too "
        "large for this loss (of an autoencoder it is in nats per image, summed over pixels): divide it by ten; "
        "clipping or a smaller outer rate help where it happens only late in training"
    )


def _weighted_mean(values: Array, weights: Array) -> Array:
    """Return the mean over the first axis, of those with weight only: others may not be finite."""
    weights = weights.reshape(-1, *(1,) * (values.ndim - 1))
    total = weights.sum()
    return jnp.where(weights > 0, weights * values, 0.0).sum(0) / jnp.where(total > 0, total, jnp.nan)


def _scores(metrics: Metrics, num_tasks: int) -> Array:
    """Return each task's loss on the query [T]; on the support at the last step, or zero, where nothing is scored."""
    losses = query_losses(metrics) or [value[:, -1] for value in query_losses(metrics, "support/") if value.shape[1]]
    return jnp.stack(losses).sum(0) if losses else jnp.zeros(num_tasks)


def _first_bad(metrics: Metrics, num_tasks: int) -> Array:
    """Return for each task the first inner step whose support loss is not finite [T], -1 if there is none."""
    traces = [value for value in query_losses(metrics, "support/") if value.shape[1]]
    if not traces:
        return jnp.full(num_tasks, -1)
    bad = ~jnp.isfinite(jnp.stack(traces)).all(0)
    return jnp.where(bad.any(1), jnp.argmax(bad, 1), -1)
