"""`metagen plan LEARNER MODEL`: what `metagen train` with the same flags will need, before it runs for an hour."""

import dataclasses
import time
from typing import Annotated

import jax
import tyro

from metagen_jax import build, plan
from metagen_jax.baselines import train_joint
from metagen_jax.cli.keeping import META, WARM_START
from metagen_jax.cli.stages import CHUNK
from metagen_jax.cli.train import Train, checked, config_of
from metagen_jax.config import TrainConfig, given
from metagen_jax.cost import bytes_at_peak
from metagen_jax.plan import SHARE, Batching, Player
from metagen_jax.report import table
from metagen_jax.types import Params

JOINT_DISPATCHES = 3  # of the joint warm start that are timed, the first one compiling


@dataclasses.dataclass(frozen=True)
class Plan:
    """Say what a run will need, without running or writing it: metagen plan maml vae --memory-gb 16."""

    train: Annotated[Train, tyro.conf.arg(name="")]
    memory_gb: float | None = None
    """memory that there is, in 10^9 bytes; that of the device, or of the machine, if not given"""
    time: bool = False
    """also run a few meta-steps, and say how long the run will take"""


def run(arguments: Plan) -> None:
    """Carry out the command."""
    a = arguments.train
    config = checked(config_of(a), a.out, a.checkpoint_every, a.tensorboard)
    there, where = plan.memory_there(arguments.memory_gb)
    training = build.training(config)
    num_tasks, limit = config.outer.tasks, SHARE * there
    traced = plan.trace(config, training)
    count = plan.operations(traced)
    print(f"{config.learner} {config.model}, {num_tasks} tasks a meta-step, on {jax.devices()[0].device_kind}\n")
    print(_players(plan.players(config, training)))
    per_task = count.total / num_tasks
    print(
        f"\noperations: {_number(count.total)}FLOP a meta-step, {_number(per_task)}FLOP a task, "
        f"{count.products / max(count.total, 1):.0%} of them in matrix products\n",
        flush=True,
    )
    begin = time.perf_counter()
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - begin
    configured = plan.batching(config, training, plan.chunk_of(config, training), bytes_at_peak(compiled))
    alone = configured if configured.chunk == 1 else plan.batching(config, training, 1)
    print(_memory(config, configured, alone, limit))
    print(
        f"state and data: {_bytes(configured.resident)}; there is {_bytes(there)} ({where}), a run may fill {SHARE:.0%}"
    )
    print(f"compiling: {seconds:.0f} s", flush=True)
    fits = configured.total(num_tasks) <= limit
    print(f"outer.tasks={num_tasks} fits" if fits else _advice(config, training, configured, alone, limit), flush=True)
    if arguments.time and fits:
        _time(config, training, compiled, seconds, count.total)
    elif arguments.time:
        print("not timed, since it does not fit")


def _players(players: list[Player]) -> str:
    total = sum(player.num_parameters for player in players)
    moves = sum(player.num_parameters for player in players if "moves" in player.role or "read" in player.role)
    rates = sum(player.num_parameters for player in players if player.role == "learned rate")
    rows = [[player.name, f"{player.num_parameters:,}", player.role] for player in players]
    return (
        table(["player", "parameters", "in the inner loop"], [*rows, ["all", f"{total:,}", ""]])
        + f"\n\nof a task's own: {moves:,} parameters; shared: {total - moves - rates:,}; learned rates: {rates:,}"
    )


def _memory(config: TrainConfig, configured: Batching, alone: Batching, limit: float) -> str:
    num_tasks = config.outer.tasks
    header = ["tasks", "fixed", "a task", f"at {num_tasks} tasks", "with state and data", "most tasks that fit"]
    rows = []
    for batching in [configured] if configured is alone else [configured, alone]:
        most = batching.largest(limit)
        rows.append(
            [
                _name(batching),
                _bytes(batching.fixed),
                _bytes(batching.per_task),
                _bytes(batching.temporary(num_tasks)),
                _bytes(batching.total(num_tasks)),
                "any number" if most is None else f"{most:,}",
            ]
        )
    return "temporary memory of a meta-step:\n\n" + table(header, rows) + "\n"


def _name(batching: Batching) -> str:
    if batching.chunk == 1:
        return "one after the other"
    if batching.chunk != "all":
        return f"{batching.chunk} at a time"
    return "all at once"


def _advice(config: TrainConfig, training: build.Training, configured: Batching, alone: Batching, limit: float) -> str:
    num_tasks, need = config.outer.tasks, configured.total(config.outer.tasks)
    advice = []
    if fitting := plan.fitting_chunk(config, training, configured, alone, limit):
        advice.append(f"--outer.task-chunk {fitting[0]} (needs {_bytes(fitting[1])})")
    advice += [*plan.remedies(config), "fewer tasks, or a smaller network"]
    return (
        f"outer.tasks={num_tasks} does not fit: it needs {_bytes(need)} of {_bytes(limit)}; use {', or '.join(advice)}"
    )


def _time(
    config: TrainConfig, training: build.Training, compiled: jax.stages.Compiled, compile_seconds: float, flops: int
) -> None:
    key = jax.random.key(config.seed)
    warm: Params | None = None
    joint = 0.0
    if config.outer.warm_start:
        stamps = [time.perf_counter()]
        warm = train_joint(
            config,
            training.family,
            training.built,
            JOINT_DISPATCHES * CHUNK,
            jax.random.fold_in(key, WARM_START),
            on_chunk=lambda state, metrics: stamps.append(time.perf_counter()),
        )
        joint = (stamps[-1] - stamps[1]) / (len(stamps) - 2) / CHUNK
    timing = plan.measure(training, compiled, jax.random.fold_in(key, META), warm)
    total = config.outer.steps * timing.seconds + given(config.outer.warm_start) * joint + compile_seconds
    print(f"a meta-step: {_seconds(timing.seconds)}, {_number(flops / timing.seconds)}FLOP/s")
    if timing.nonfinite:
        print("some tasks were not finite, and their meta-steps repeated without them: a healthy run is faster")
    if joint:
        print(f"a step of the joint warm start: {_seconds(joint)}")
    print(f"the whole run: {total / 60:.1f} minutes ({_parts(config)})")


def _parts(config: TrainConfig) -> str:
    warm = f"{config.outer.warm_start} joint steps, " if config.outer.warm_start else ""
    return f"{warm}{config.outer.steps} meta-steps, compiling"


def _bytes(number: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def _number(value: float) -> str:
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"
