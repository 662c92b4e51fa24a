"""Meta-training by persistent evolution strategies: inner loops that go on from meta-step to meta-step.

A meta-step advances every task by one truncation, follows the mean of what that says, and begins again those that have
reached the horizon, each on a new task. The particles are part of the training state, in the place of the sampler's
state and together with it, so that `train`, `run_chunk` and checkpoints work as with any other step. They begin at
staggered ages, so that each meta-step sees all parts of an inner loop.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metagen_jax.meta.batch import query_losses
from metagen_jax.meta.learners import task_keys
from metagen_jax.meta.persistent import Particles, Persistent
from metagen_jax.sharding import AXIS, check_axis, differing
from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.tasks.samplers import Sampler
from metagen_jax.train import Step, TrainState, completed, follow
from metagen_jax.types import Array, Key, Metrics, Params, Task


class Slots(NamedTuple):
    """T tasks in the middle of their inner loops."""

    specs: Spec  # [T, ...]
    weights: Array  # [T]
    bits: Array  # [T, ...] data of the keys from which a task, its beginning and its noise are made again
    particles: Particles  # [T, ...]


class Carried(NamedTuple):
    """What is in the place of the sampler's state."""

    sampler: Any
    slots: Slots


def init_persistent_state(
    method: Persistent,
    family: TaskFamily,
    sampler: Sampler,
    optimizer: optax.GradientTransformation,
    key: Key,
    *,
    meta: Params | None = None,
) -> TrainState:
    """Return the state before the first meta-step, with every task at the beginning of its inner loop.

    Task i of T counts as i / T of the horizon old (rounded down to whole truncations): the first inner loops are
    shorter, and later ones end one after the other.

    Args:
        method: of `persistent_evolution`.
        family: of the tasks.
        sampler: proposes T tasks, the number that is carried.
        optimizer: the outer rule.
        key: of the run.
        meta: what to begin with, in the place of fresh meta-parameters.
    """
    init_key, sampler_key, slots_key, run_key = jax.random.split(key, 4)
    meta = jax.jit(method.init)(init_key) if meta is None else meta
    sampler_state = sampler.init(sampler_key)
    slots = jax.jit(lambda *arguments: _new_slots(method, family, sampler, *arguments))(
        meta, family.data, sampler_state, slots_key
    )
    num_tasks, num_truncations = slots.weights.shape[0], method.horizon // method.truncation
    ages = jnp.arange(num_tasks) * num_truncations // num_tasks * method.truncation
    slots = slots._replace(particles=slots.particles._replace(age=ages.astype(jnp.int32)))
    average = jax.tree.map(jnp.copy, meta)
    state = Carried(sampler_state, slots)
    return TrainState(jnp.zeros((), jnp.int32), meta, average, optimizer.init(meta), state, run_key)


def make_persistent_step(
    method: Persistent,
    family: TaskFamily,
    sampler: Sampler,
    optimizer: optax.GradientTransformation,
    *,
    mesh: jax.sharding.Mesh | None = None,
    average_decay: float = 0.999,
    task_chunk: int | None = None,
) -> Step:
    """Return one meta-step: a truncation of every task, the outer rule, new tasks for those at the horizon.

    A task whose losses or direction are not finite is left out of the mean, counted, and begun again; where the outer
    rule leads to parameters that are not, parameters and optimiser stay as they are.

    Args:
        method: of `persistent_evolution`.
        family: makes the tasks that the sampler describes.
        sampler: proposes T tasks at each step, of which those take part whose place has become free.
        optimizer: the outer rule, any optax transformation.
        mesh: over which the particles of the T tasks are spread, as in `make_step`; None for one device.
        average_decay: of the exponential moving average of the meta-parameters, as in `make_step`.
        task_chunk: tasks that are vmapped at a time; None for all, on accelerators, and one on CPUs, whose caches hold
            no more.

    Returns:
        (state, data) -> (state, metrics), for `train` and `run_chunk`; the state is that of `init_persistent_state`.
        The metrics are means over the finite tasks of what the judge reports on a truncation, and: `grad_norm`,
        `num_nonfinite`, `finite_share`, `bad_task` and `bad_inner_step` (the age at which its truncation began) as in
        `make_step`, `num_restarted` [] and `age` [] (mean of the tasks, after the step).

    Raises:
        ValueError: a decay outside [0, 1), a chunk below one, a mesh without the axis `task`.

    Source: Vicol, Metz & Sohl-Dickstein, 2021, algorithm 2, with antithetic pairs and staggered beginnings.
    """
    if not 0 <= average_decay < 1:
        raise ValueError(f"average_decay must be in [0, 1), got {average_decay}")
    if task_chunk is not None and task_chunk < 1:
        raise ValueError(f"task_chunk must be at least 1, got {task_chunk}")
    check_axis(mesh)
    chunk = task_chunk or (1 if jax.default_backend() == "cpu" else None)
    shared, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(AXIS)

    def truncate(meta: Params, data: Any, slots: Slots, noise_keys: Key) -> tuple[Params, Particles, Metrics]:
        def one(slot: tuple[Spec, Array, Particles, Key]) -> tuple[Params, Particles, Metrics]:
            spec, bits, particles, noise_key = slot
            task, key = _made(family, data, spec, bits, jax.random.key_impl(noise_key))
            return method.advance(meta, key, noise_key, particles, task)

        each = (slots.specs, slots.bits, slots.particles, noise_keys)
        if chunk == 1:
            return jax.lax.map(one, each)
        return jax.lax.map(one, each, batch_size=chunk or slots.weights.shape[0])

    def spread(meta: Params, data: Any, slots: Slots, noise_keys: Key) -> tuple[Params, Particles, Metrics]:
        if mesh is None:
            return truncate(meta, data, slots, noise_keys)

        def per_device(meta: Params, data: Any, *pieces: Any) -> tuple[Params, Particles, Metrics]:
            return truncate(*differing((meta, data)), *pieces)

        directions, particles, per_task = jax.shard_map(
            per_device, mesh=mesh, in_specs=(shared, shared, split, split), out_specs=split
        )(meta, data, slots, noise_keys)
        # A learned rule is small: gathered, so that sums over tasks have the order that one device has.
        directions, per_task = placed((directions, per_task), shared)
        return directions, particles, per_task

    def placed(tree: Any, where: jax.sharding.PartitionSpec) -> Any:
        return tree if mesh is None else jax.lax.with_sharding_constraint(tree, jax.sharding.NamedSharding(mesh, where))

    def step(state: TrainState, data: Any) -> tuple[TrainState, Metrics]:
        carried: Carried = state.sampler
        slots, before = carried.slots, carried.slots.particles.age
        noise_key, slots_key = jax.random.split(jax.random.fold_in(state.key, state.step))
        num_tasks = slots.weights.shape[0]
        directions, particles, per_task = spread(state.meta, data, slots, task_keys(noise_key, num_tasks))
        finite = _finite((directions, query_losses(per_task)), num_tasks)
        kept = jnp.where(finite, slots.weights, 0.0)
        size = jnp.abs(kept).sum()  # weights may be negative, as those of `agreement(drop=False)` are
        scale = jnp.abs(slots.weights).sum() / jnp.where(size > 0, size, 1.0)
        direction = jax.tree.map(lambda leaf: scale * _weighted_sum(leaf, kept), directions)
        direction = completed(direction, state.meta)
        norm = optax.tree.norm(direction)
        usable = (size > 0) & jnp.isfinite(norm)
        meta, average, opt, followed = follow(optimizer, state, direction, usable, average_decay)

        scores = jnp.stack(query_losses(per_task)).sum(0)
        sampler_state = sampler.update(carried.sampler, slots.specs, scores)
        done = (particles.age >= method.horizon) | ~finite
        new = _new_slots(method, family, sampler, meta, data, sampler_state, slots_key)
        slots = jax.tree.map(lambda a, b: jnp.where(_rows(done, a), a, b), new, slots._replace(particles=particles))
        first = jnp.argmin(finite)
        total = jnp.where(kept.sum() > 0, kept.sum(), jnp.nan)
        metrics = jax.tree.map(lambda leaf: _weighted_sum(leaf, kept) / total, per_task) | {
            "grad_norm": norm,
            "num_nonfinite": (~finite).sum(),
            "finite_share": jnp.where(followed, finite.mean(), 0.0),
            "bad_task": jnp.where(finite.all(), -1, first),
            "bad_inner_step": jnp.where(finite.all(), -1, before[first]),
            "num_restarted": done.sum(),
            "age": slots.particles.age.mean(),
        }
        particles = placed(slots.particles, split)  # gathered at the end of a dispatch alone
        meta, average, opt, sampler_state = placed((meta, average, opt, sampler_state), shared)
        specs, weights, bits = placed((slots.specs, slots.weights, slots.bits), shared)
        carried = Carried(sampler_state, Slots(specs, weights, bits, particles))
        return TrainState(state.step + 1, meta, average, opt, carried, state.key), placed(metrics, shared)

    return step


def _made(family: TaskFamily, data: Any, spec: Spec, bits: Array, kind: Any) -> tuple[Task, Key]:
    """Return the task of these bits, and the key of its inner loop."""
    make_key, loop_key = jax.random.split(jax.random.wrap_key_data(bits, impl=kind))
    return family.make(data, make_key, spec), loop_key


def _new_slots(
    method: Persistent, family: TaskFamily, sampler: Sampler, meta: Params, data: Any, sampler_state: Any, key: Key
) -> Slots:
    """Return T new tasks at the beginning of their inner loops."""
    propose_key, tasks_key = jax.random.split(key)
    specs, weights = sampler.propose(sampler_state, data, propose_key, meta)
    bits = jax.random.key_data(jax.random.split(tasks_key, weights.shape[0]))

    def one(spec: Spec, bits: Array) -> Particles:
        task, loop_key = _made(family, data, spec, bits, jax.random.key_impl(key))
        return method.begin(meta, loop_key, task.support)

    return Slots(specs, weights, bits, jax.vmap(one)(specs, bits))


def _rows(mask: Array, like: Array) -> Array:
    return mask.reshape(-1, *(1,) * (like.ndim - 1))


def _finite(tree: Any, num_tasks: int) -> Array:
    """Return for each task whether all its numbers are finite [T]."""
    return jnp.stack([jnp.isfinite(leaf).reshape(num_tasks, -1).all(1) for leaf in jax.tree.leaves(tree)]).all(0)


def _weighted_sum(values: Array, weights: Array) -> Array:
    """Return the sum over tasks, of those with weight only: others may not be finite."""
    weights = _rows(weights, values)
    return jnp.where(weights != 0, weights * values, 0.0).sum(0)
