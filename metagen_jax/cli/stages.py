"""What is left to do of a run, stage by stage: the joint warm start, meta-training, and a short evaluation.

What is done is kept as it is done, so `carry_out` finds out what is left and does that, whether the run is new or was
killed in the joint warm start, between two dispatches, while saving or while evaluating.
"""

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax import build, report
from metagen_jax.baselines import joint_run
from metagen_jax.build import Part, Parts, Training
from metagen_jax.checkpoint import Checkpoints, load_meta, save_meta
from metagen_jax.cli import warm_start as joint
from metagen_jax.cli.interruption import Stop, stoppable
from metagen_jax.cli.monitors import shown_loss, summarise, warnings_of
from metagen_jax.config import (
    TrainConfig,
    given,
)
from metagen_jax.evaluate import adaptation_curve
from metagen_jax.meta.learners import MetaLearner
from metagen_jax.metrics.interval import over_classes
from metagen_jax.metrics.likelihood import draws, label
from metagen_jax.progress import Progress
from metagen_jax.run_directory import (
    RunDirectory,
    append,
    read_metrics,
    trim,
    write,
)
from metagen_jax.train import TrainState, init_state, train
from metagen_jax.types import Metrics, Params

CHUNK = 50  # meta-steps a dispatch, and a line of metrics.jsonl
SHORT_CLASSES, SHORT_SAMPLES = 32, 10  # of the evaluation after training

WARM_START, META, SHORT = range(3)  # what the seed's keys are folded for

Logger = Callable[[int, dict[str, Any]], None]
OnChunk = Callable[[TrainState, Metrics], None]


class Keeping(NamedTuple):
    """How a run is kept and what follows it, which changes nothing of what it learns."""

    checkpoint_every: int = 500
    tensorboard: bool = False
    short_evaluation: bool = True


def carry_out(run: RunDirectory, config: TrainConfig, training: Training, keeping: Keeping) -> None:
    """Do what is left to do of a run, whose lock is held: all of it, or what was not done when it was stopped.

    Raises:
        ValueError: its checkpoints are damaged, all of them, or of other shapes.
        Interrupted: it was told to stop, and is saved.
        Divergence: training lost finiteness; the folder keeps what was done until then.
    """
    with stoppable(f"go on with: metagen train --resume {shlex.quote(str(run.path))}") as stop:
        average = _learned(run, config, training)
        if average is None:
            with _logging(run, keeping.tensorboard) as log, Checkpoints(run.checkpoints) as checkpoints:
                average = _learn(run, config, training, keeping.checkpoint_every, checkpoints, log, stop)
        report.save(report.learning_curve(read_metrics(run)), run.figures / "learning_curve.png")
        text = ""
        if keeping.short_evaluation and isinstance(training.built, build.WithDensity):
            key = jax.random.fold_in(jax.random.key(config.seed), SHORT)
            text = _short_evaluation(config, training.data, training.built, training.learner, average, key)
            print(text)
        write(run.finished, json.dumps({"steps": config.outer.steps, "evaluation": text}, indent=1) + "\n")
    print(f"next: metagen evaluate {run.path}", flush=True)


def warn(text: str) -> None:
    """Say what a person should know, in one line."""
    print(f"metagen: {text}", file=sys.stderr, flush=True)


def _learned(run: RunDirectory, config: TrainConfig, training: Training) -> Params | None:
    """Return what was learned, if all meta-steps have been taken."""
    if not run.meta.exists():
        return None
    try:
        average, header = load_meta(run.meta, jax.eval_shape(training.learner.init, jax.random.key(0)))
    except ValueError:  # it is made again
        return None
    return average if header.get("step") == config.outer.steps else None


def _learn(
    run: RunDirectory,
    config: TrainConfig,
    training: Training,
    every: int,
    checkpoints: Checkpoints,
    log: Logger,
    stop: Stop,
) -> Params:
    """Take the meta-steps that are left, after the warm start if none was saved yet; return the average."""
    data, built, learner, family, optimizer, sampler, step = training
    num_steps = config.outer.steps
    begin_key, meta_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), META))
    if checkpoints.steps():
        target = jax.eval_shape(lambda key: init_state(learner, sampler, optimizer, key), jax.random.key(0))
        state = checkpoints.restore(target, warn=warn)
    else:
        warm = _warm(run, config, training, every, log, stop) or {}
        fresh = learner.init(begin_key)
        kept = {name: tree for name, tree in warm.items() if name in fresh}
        meta = {**fresh, **jax.tree.map(jnp.copy, kept)}  # training donates what it begins with
        state = init_state(learner, sampler, optimizer, meta_key, meta=meta)
    begin = int(state.step)
    checkpoints.discard_after(begin)
    records = trim(run, lambda record: record["phase"] != "meta" or record["step"] <= begin)

    def keep(state: TrainState) -> None:
        checkpoints.save(state)
        if int(state.step) == num_steps:
            checkpoints.wait()  # meta-parameters of the last step say that there is nothing left to learn
        save_meta(run.meta, state.average, step=int(state.step))

    with (
        Progress("meta-training", num_steps, unit="meta-step", tasks=config.outer.tasks) as progress,
        stop.finishing(),
    ):
        show = _on_chunk("meta", log, progress, _seconds(records, "meta"))
        on_chunk = _saving(show, keep, every, begin, stop)
        early = round(config.inner.first_order_until * num_steps)
        if begin < early:
            cheap = build.learner(config, built, first_order=True)
            _, first = build.meta_step(config, cheap, family, optimizer, data, built)
            state = train(first, state, family.data, early, chunk=CHUNK, on_chunk=on_chunk)
        state = train(step, state, family.data, num_steps, chunk=CHUNK, on_chunk=on_chunk)
        keep(state)
    return state.average


def _warm(
    run: RunDirectory, config: TrainConfig, training: Training, every: int, log: Logger, stop: Stop
) -> Params | None:
    """Return the parameters of the joint warm start, if there is one, taking the steps of it that are left."""
    num_steps = given(config.outer.warm_start)
    done = joint.finished(run, config, training)
    if done is not None or not num_steps:
        trim(run, lambda record: done is not None and record["phase"] == "warm start")
        return done
    key = jax.random.fold_in(jax.random.key(config.seed), WARM_START)
    step, state = joint_run(config, training.family, training.built, num_steps, jax.random.clone(key))
    with Checkpoints(run.warm_start) as checkpoints:
        state = joint.restored(checkpoints, state, warn)
        begin = int(state.step)
        records = trim(run, lambda record: record["phase"] == "warm start" and record["step"] <= begin)
        with (
            Progress("joint warm start", num_steps, unit="step", tasks=config.outer.tasks) as progress,
            stop.finishing(),
        ):
            show = _on_chunk("warm start", log, progress, _seconds(records, "warm start"))
            on_chunk = _saving(show, checkpoints.save, every, begin, stop)
            state = train(step, state, training.family.data, num_steps, chunk=CHUNK, on_chunk=on_chunk)
    joint.finish(run, training, key, state.average, num_steps)
    return state.average


def _seconds(records: list[dict[str, Any]], phase: str) -> float:
    """Return how long a phase had taken when its last record was written."""
    return next((record["seconds"] for record in reversed(records) if record["phase"] == phase), 0.0)


def _saving(show: OnChunk, save: Callable[[TrainState], None], every: int, begin: int, stop: Stop) -> OnChunk:
    """Return `show`, and then save every so many steps, and before leaving."""
    saved = begin

    def on_chunk(state: TrainState, metrics: Metrics) -> None:
        nonlocal saved
        show(state, metrics)
        told = stop.number is not None
        if int(state.step) - saved >= every or told:
            saved = int(state.step)
            save(state)
        if told:
            stop.check()

    return on_chunk


def held_out(data: Parts) -> Part:
    """Return the part to choose settings on: validation, or train where the split has no validation classes."""
    return "validation" if data.split is None or len(data.split.validation) else "train"


def _short_evaluation(
    config: TrainConfig, data: Parts, built: build.WithDensity, learner: MetaLearner, meta: Params, key: jax.Array
) -> str:
    part, steps = held_out(data), given(config.inner.steps)
    family = build.family(data, part, config.shots, config.query)
    specs = build.specs(data, part, SHORT_CLASSES)
    num = draws(built.density, SHORT_SAMPLES)
    curve = adaptation_curve(learner.path, built.density, family, meta, specs, key, steps=(0, steps), num_samples=num)
    before, after = curve.elbo[:, 0], curve.elbo[:, -1]
    if len(before) < 2 or not (np.isfinite(before).all() and np.isfinite(after).all()):
        return f"{part} classes: no interval ({np.isfinite(after).sum()} of {len(after)} classes are finite)"
    gain = over_classes(after - before)
    name = "ELBO" if built.density.kind == "importance" else f"log-likelihood ({label(built.density, num)})"
    return (
        f"{len(before)} {part} classes: {name} {before.mean():.2f} before adapting, {after.mean():.2f} after {steps} "
        f"steps (gain {gain.mean:.2f}, 95 % interval {gain.low:.2f} to {gain.high:.2f} nats per image)"
    )


def _on_chunk(phase: str, log: Logger, progress: Progress, seconds_before: float) -> OnChunk:
    begin, said = time.perf_counter() - seconds_before, set[str]()

    def on_chunk(state: TrainState, metrics: Metrics) -> None:
        step = int(state.step)
        record = summarise(metrics)
        for kind, text in warnings_of(step, record).items():
            if kind not in said or kind == "nonfinite":
                progress.note(text)
            said.add(kind)
        seconds = round(time.perf_counter() - begin, 3)
        log(step, {"phase": phase, "step": step, "seconds": seconds, **record})
        progress.update(step, shown_loss(record))

    return on_chunk


@contextlib.contextmanager
def _logging(run: RunDirectory, tensorboard: bool) -> Iterator[Logger]:
    """Write records to metrics.jsonl, and to TensorBoard where that was asked for."""
    events = tensorboard_writer()(str(run.path / "tensorboard")) if tensorboard else None

    def log(step: int, record: dict[str, Any]) -> None:
        append(run.metrics, record)
        for name, value in record.items():
            if events is not None and isinstance(value, float) and np.isfinite(value):
                events.add_scalar(f"{record['phase']}/{name}", value, step)

    try:
        yield log
    finally:
        if events is not None:
            events.close()


def tensorboard_writer() -> Callable[[str], Any]:
    """Return what writes TensorBoard events, or raise `ImportError` without the package for it."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs tensorboardX: pip install 'metagen-jax[tensorboard]'") from error
    return SummaryWriter
