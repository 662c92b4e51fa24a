"""What a run needs, known before it begins: parameters, operations, memory as a line in the number of tasks, seconds.

XLA lays out the buffers of a program when it compiles it, so its memory is known without running it. As a function of
the number of tasks T it is the largest of a few straight lines, that of whichever phase of a meta-step needs most.
Compiled at the configured T and far beyond, two programs give the chord

    bytes(T) = resident + fixed + T * per_task,

exact at both, an upper bound between them, and close to it beyond; below the configured T it is a lower bound.
Resident are the state and the data, which lie there between meta-steps.
"""

import dataclasses
import os
import time
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from metagen_jax.adapt.starts import LOG_RATE
from metagen_jax.build import Training, meta_step, moving, roles
from metagen_jax.build.conditional import Conditional
from metagen_jax.build.learned import initialised
from metagen_jax.config import HEADS, SECOND_ORDER, TrainConfig
from metagen_jax.cost import Flops, Memory, bytes_at_peak, flops_of
from metagen_jax.meta.annealed import field_at
from metagen_jax.meta.batch import automatic_chunk
from metagen_jax.models.classifier import Classifier
from metagen_jax.models.gan import Gan
from metagen_jax.train import init_state, run_chunk
from metagen_jax.types import Key, Params, Task

STEPS = 5  # meta-steps of the program that is looked at: more than one, as in a run, since the loop has buffers too
REPEATS = 5  # dispatches of it that are timed
FAR = 512  # tasks, at least, of the second program, whose memory is that of its tasks
TRIES = 3  # chunks that are compiled before none is advised
SHARE = 0.9  # of the memory that there is, which a run may fill

Chunk = int | Literal["all"]
"""Tasks vmapped at a time: a number, or all of them however many."""


class Player(NamedTuple):
    """A player of the meta-parameters."""

    name: str
    num_parameters: int
    role: Literal["moves", "read", "read, then moves", "shared", "learned rate", "learned"]  # in the inner loop


class Batching(NamedTuple):
    """Memory as a function of the number of tasks T, all in bytes."""

    chunk: Chunk
    resident: int  # state and data, outputs that are not laid over them, code
    fixed: float  # temporary memory at T = 0, by the chord
    per_task: float  # temporary memory of one more task

    def temporary(self, num_tasks: int) -> float:
        """Return the temporary memory of a meta-step of T tasks."""
        return self.fixed + num_tasks * self.per_task

    def total(self, num_tasks: int) -> float:
        """Return everything that has to fit at once."""
        return self.resident + self.temporary(num_tasks)

    def largest(self, limit: float) -> int | None:
        """Return the largest number of tasks that needs at most `limit` bytes: 0 if none does, None if any does."""
        if self.total(0) > limit:
            return 0
        if self.per_task <= 0:
            return None
        number = int((limit - self.total(0)) / self.per_task)
        return number - number % self.chunk if isinstance(self.chunk, int) else number


class Timing(NamedTuple):
    """What running a few meta-steps showed."""

    seconds: float  # median, of one meta-step
    nonfinite: bool  # whether tasks lost finiteness, so that meta-steps were repeated without them


def players(config: TrainConfig, training: Training) -> list[Player]:
    """Return the players of the meta-parameters, and what an inner loop makes of them.

    A player that moves has a copy for each task; one that is shared has one copy for all. In joint training nothing
    moves, whatever is moved when it is fine-tuned later.
    """
    built, role = training.built, roles(config, training.built)
    meta = jax.eval_shape(training.learner.init, jax.random.key(0))
    moves = moving(config, role) if config.inner.steps and config.learner != "joint" else ()
    reads: tuple[str, ...] = ()
    if config.learner == "amortised" and isinstance(built, Gan | Conditional):
        support = jax.eval_shape(lambda: _draw(training, jax.random.key(0)).support)
        reads = tuple(jax.eval_shape(built.embed, meta, support))
    elif config.learner in HEADS:
        reads = ("head",) if isinstance(built, Classifier) else ("prior",)
    elif config.learner in ("initialiser", "regressed"):
        reads = initialised(built, role)

    def inside(name: str) -> Any:
        if name in reads:
            return "read, then moves" if name in moves else "read"
        if name not in role.players:
            return "learned rate" if name.endswith(f"/{LOG_RATE}") else "learned"
        return "moves" if name in moves else "shared"

    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in meta.items()}
    return [Player(name, size, inside(name)) for name, size in sizes.items()]


def trace(config: TrainConfig, training: Training) -> jax.stages.Traced:
    """Return the program of `STEPS` meta-steps as a run dispatches it, traced on shapes only.

    Raises:
        ValueError: a chunk that does not divide the tasks.
    """
    sampler, step = meta_step(
        config, training.learner, training.family, training.optimizer, training.data, training.built
    )
    key = jax.random.key(0)
    state = jax.eval_shape(lambda: init_state(training.learner, sampler, training.optimizer, key))
    data = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), training.family.data)
    program: Any = run_chunk(step, STEPS)
    return program.trace(state, data)


def operations(traced: jax.stages.Traced) -> Flops:
    """Return the operations of one meta-step of a program of `trace`, all tasks being finite."""
    count = flops_of(traced.jaxpr)
    return count._replace(products=count.products // STEPS, elementwise=count.elementwise // STEPS)


def batching(config: TrainConfig, training: Training, chunk: Chunk, memory: Memory | None = None) -> Batching:
    """Compile the meta-step at the configured number of tasks and far beyond, and return the chord of its memory.

    Args:
        config: whose `outer.tasks` is where the chord begins.
        training: of this configuration.
        chunk: tasks vmapped at a time.
        memory: of the program at `outer.tasks`, where it was compiled already.
    """
    near = config.outer.tasks
    far = max(FAR, 4 * near)
    far += -far % chunk if isinstance(chunk, int) else 0
    memory = memory or compiled_memory(config, training, near, chunk)
    beyond = compiled_memory(config, training, far, chunk)
    per_task = (beyond.temporary - memory.temporary) / (far - near)
    return Batching(chunk, memory.total - memory.temporary, memory.temporary - near * per_task, per_task)


def compiled_memory(config: TrainConfig, training: Training, num_tasks: int, chunk: Chunk) -> Memory:
    """Return the memory of a meta-step of that many tasks, by compiling it; nothing of that size is allocated."""
    return bytes_at_peak(trace(with_tasks(config, num_tasks, chunk), training).lower().compile())


def with_tasks(config: TrainConfig, num_tasks: int, chunk: Chunk) -> TrainConfig:
    """Return the configuration with another number of tasks, cut into other pieces."""
    outer = dataclasses.replace(config.outer, tasks=num_tasks, task_chunk=num_tasks if chunk == "all" else chunk)
    choice = config.choice
    if choice.candidates is not None:  # as many for each task
        choice = dataclasses.replace(choice, candidates=-(-choice.candidates // config.outer.tasks) * num_tasks)
    return dataclasses.replace(config, outer=outer, choice=choice)


def chunk_of(config: TrainConfig, training: Training) -> Chunk:
    """Return how the configuration batches its tasks, chosen by device and size where it leaves that open."""
    chunk, num_tasks = config.outer.task_chunk, config.outer.tasks
    if chunk is None:

        def look(meta: Params, keys: Key) -> None:
            nonlocal chunk
            tasks = jax.vmap(lambda key: _draw(training, key))(keys)
            chunk = automatic_chunk(field_at(training.learner.field, 0), meta, keys, tasks)

        key = jax.random.key(0)
        meta = jax.eval_shape(training.learner.init, key)
        jax.eval_shape(look, meta, jax.eval_shape(lambda: jax.random.split(key, num_tasks)))
    return "all" if chunk is None or chunk == num_tasks else chunk


def memory_there(gigabytes: float | None = None) -> tuple[float, str]:
    """Return how much memory there is, in bytes, and of what: as given, the device's, or the machine's.

    Raises:
        ValueError: a number that is not positive.
    """
    if gigabytes is not None:
        if not gigabytes > 0:
            raise ValueError(f"--memory-gb must be positive, got {gigabytes:g}")
        return 1e9 * gigabytes, "as given"
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"]), device.device_kind
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), "of this machine"


def fitting_chunk(
    config: TrainConfig, training: Training, configured: Batching, alone: Batching, limit: float
) -> tuple[int, int] | None:
    """Return the largest chunk below the configured one with which `outer.tasks` fit, and the bytes that they need.

    Divisors of the number of tasks that could fit by the chords are compiled, the largest first, until one does.

    Args:
        config: the configuration.
        training: of this configuration.
        configured: its batching.
        alone: that of tasks one after the other.
        limit: bytes.
    """
    num_tasks = config.outer.tasks
    whole = configured.chunk if isinstance(configured.chunk, int) else num_tasks
    more = (configured.total(num_tasks) - alone.total(num_tasks)) / max(whole - 1, 1)
    chunks = [n for n in range(whole - 1, 0, -1) if num_tasks % n == 0]
    for chunk in [n for n in chunks if alone.total(num_tasks) + (n - 1) * more <= limit][:TRIES]:
        need = compiled_memory(config, training, num_tasks, chunk).total
        if need <= limit:
            return chunk, need
    return None


def remedies(config: TrainConfig) -> list[str]:
    """Return the settings that make one task's inner loop smaller, as flags, where the learner reads them."""
    if config.learner not in (*SECOND_ORDER, "learned_loss", "learned_optimizer") or config.inner.steps == 0:
        return []
    flags = []
    if config.inner.inner_grad == "reverse":
        flags.append("--inner.inner-grad forward_over_reverse")
    if config.inner.remat == "none":
        flags.append("--inner.remat step")
    return flags


def measure(training: Training, compiled: jax.stages.Compiled, key: Key, begin: Params | None = None) -> Timing:
    """Run a program of `trace`, compiled, and return the median seconds of a meta-step.

    Args:
        training: whose sampler has as many tasks as the program.
        compiled: of `trace(config, training).lower().compile()`.
        key: of a run.
        begin: parameters of the model to begin with; None for random ones.
    """
    init_key, state_key = jax.random.split(key)
    meta = {**training.learner.init(init_key), **(begin or {})}
    state = init_state(training.learner, training.sampler, training.optimizer, state_key, meta=meta)
    seconds, nonfinite = list[float](), False
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, training.family.data))
        seconds.append((time.perf_counter() - start) / STEPS)
        nonfinite |= bool(metrics["num_nonfinite"].any())
    return Timing(float(np.median(seconds[1:])), nonfinite)


def _draw(training: Training, key: Key) -> Task:
    describe_key, make_key = jax.random.split(jax.random.clone(key))
    family = training.family
    return family.make(family.data, make_key, family.describe(family.data, describe_key))
