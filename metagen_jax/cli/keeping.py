"""What is kept of a run while it learns: states to go on from, lines of metrics, what was learned.

Process 0 keeps it, in the run's folder (`FolderKeeper`); with several processes the others keep nothing (`Keeper`), and
take part in everything else.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from metagen_jax import build, report
from metagen_jax.build import Part, Parts, Training
from metagen_jax.checkpoint import Checkpoints
from metagen_jax.cli import warm_start as joint
from metagen_jax.cli.messages import warn
from metagen_jax.cli.monitors import shown_loss, summarise, warnings_of
from metagen_jax.config import TrainConfig, given
from metagen_jax.evaluate import adaptation_curve
from metagen_jax.meta.learners import MetaLearner
from metagen_jax.metrics.interval import over_classes
from metagen_jax.metrics.likelihood import draws, label
from metagen_jax.parameters import load_meta, save_meta
from metagen_jax.progress import Progress
from metagen_jax.run_directory import RunDirectory, read_metrics, trim
from metagen_jax.sharding import here
from metagen_jax.train import PATIENCE, TrainState, lost
from metagen_jax.types import Key, Metrics, Params
from metagen_jax.writing import append, located, write

SHORT_CLASSES, SHORT_SAMPLES = 32, 10  # of the evaluation after training
WARM_START, META, SHORT = range(3)  # what the seed's keys are folded for

Stage = Literal["warm start", "meta"]
TITLES = {"warm start": ("joint warm start", "step"), "meta": ("meta-training", "meta-step")}


class Keeping(NamedTuple):
    """How a run is kept and what follows it, which changes nothing of what it learns."""

    checkpoint_every: int = 500
    tensorboard: bool = False
    short_evaluation: bool = True


class Phase:
    """What is kept of one stage: nothing."""

    def restored(self, target: TrainState) -> TrainState | None:
        """Return the newest state that is whole, None if none was saved."""
        return None

    def begin(self, step: int) -> None:
        """Take back whatever was kept of later steps."""

    @contextlib.contextmanager
    def shown(self, num_steps: int) -> Iterator[None]:
        """Show the progress of the block."""
        yield

    def on_chunk(self, state: TrainState, metrics: Metrics) -> None:
        """Keep the metrics of a dispatch, and show them."""

    def save(self, state: TrainState, *, ends: bool = False) -> None:
        """Keep a state, unless meta-steps come to nothing there and training may stop; with `ends`, it has not."""


class Keeper:
    """Keeps nothing."""

    def learned(self) -> Params | None:
        """Return what was learned, if all meta-steps have been taken."""
        return None

    def warm(self) -> Params | None:
        """Return what the joint warm start learned, if it was taken to its end."""
        return None

    def finish_warm(self, key: Key, warm: Params, num_steps: int) -> None:
        """Keep what the joint warm start learned."""

    @contextlib.contextmanager
    def phase(self, stage: Stage) -> Iterator[Phase]:
        """Keep one stage, which may lie within another."""
        yield Phase()

    def finish(self, average: Params) -> None:
        """Draw and evaluate what was learned, and say that all is done."""


class FolderKeeper(Keeper):
    """Keeps a run in its folder."""

    def __init__(self, run: RunDirectory, config: TrainConfig, training: Training, keeping: Keeping):
        """Take the folder of a run, whose lock is held, and what it is a run of."""
        self.run, self.config, self.training, self.keeping = run, config, training, keeping

    def learned(self) -> Params | None:
        """Return what was learned, if all meta-steps have been taken."""
        if not self.run.meta.exists():
            return None
        try:
            average, header = load_meta(self.run.meta, jax.eval_shape(self.training.learner.init, jax.random.key(0)))
        except ValueError:  # it is made again
            return None
        return average if header.get("step") == self.config.outer.steps else None

    def warm(self) -> Params | None:
        """Return what the joint warm start learned, if it was taken to its end; lines of what was not are taken back.

        Raises:
            ValueError: its file is damaged, or of another shape.
        """
        done = joint.finished(self.run, self.config, self.training)
        if done is not None or not given(self.config.outer.warm_start):
            trim(self.run, lambda record: done is not None and record["phase"] == "warm start")
        return done

    def finish_warm(self, key: Key, warm: Params, num_steps: int) -> None:
        """Keep what the joint warm start learned."""
        with located(self.run.path):
            joint.finish(self.run, self.training, key, here(warm), num_steps)

    @contextlib.contextmanager
    def phase(self, stage: Stage) -> Iterator[Phase]:
        """Keep one stage, which may lie within another."""
        folder = self.run.warm_start if stage == "warm start" else self.run.checkpoints
        with contextlib.ExitStack() as stack:
            checkpoints = stack.enter_context(Checkpoints(folder))
            yield _FolderPhase(self.run, self.config, stage, checkpoints, stack if self.keeping.tensorboard else None)

    def finish(self, average: Params) -> None:
        """Draw and evaluate what was learned, and say that all is done."""
        run, config = self.run, self.config
        with located(run.figures):
            report.save(report.learning_curve(read_metrics(run)), run.figures / "learning_curve.png")
        text = ""
        if self.keeping.short_evaluation and isinstance(self.training.built, build.WithDensity):
            key = jax.random.fold_in(jax.random.key(config.seed), SHORT)
            text = short_evaluation(
                config, self.training.data, self.training.built, self.training.learner, here(average), key
            )
            print(text)
        write(run.finished, json.dumps({"steps": config.outer.steps, "evaluation": text}, indent=1) + "\n")
        print(f"next: metagen evaluate {run.path}", flush=True)


class _FolderPhase(Phase):
    def __init__(
        self,
        run: RunDirectory,
        config: TrainConfig,
        stage: Stage,
        checkpoints: Checkpoints,
        closing: contextlib.ExitStack | None,
    ):
        self.run, self.config, self.stage, self.checkpoints = run, config, stage, checkpoints
        self.closing = closing  # of TensorBoard's writer; None for none
        self.events: Any = None
        self.seconds = 0.0  # that the stage took before this process
        self.said = set[str]()
        self.failing: int | None = None  # the step of a state at which meta-steps come to nothing

    def restored(self, target: TrainState) -> TrainState | None:
        return self.checkpoints.restore(target, warn=warn) if self.checkpoints.steps() else None

    def begin(self, step: int) -> None:
        self.checkpoints.discard_after(step)
        before = ("warm start",) if self.stage == "meta" else ()
        records = trim(
            self.run,
            lambda record: record["phase"] in before or (record["phase"] == self.stage and record["step"] <= step),
        )
        of_stage = [record["seconds"] for record in records if record["phase"] == self.stage]
        self.seconds = of_stage[-1] if of_stage else 0.0
        if self.closing is not None:  # TensorBoard passes over what is in its files of this step and later ones
            folder = self.run.path / "tensorboard" / self.stage.replace(" ", "_")
            self.events = tensorboard_writer()(str(folder), purge_step=step + 1)
            self.closing.callback(self.events.close)

    @contextlib.contextmanager
    def shown(self, num_steps: int) -> Iterator[None]:
        title, unit = TITLES[self.stage]
        with Progress(title, num_steps, unit=unit, tasks=self.config.outer.tasks) as self.progress:
            self.since = time.perf_counter() - self.seconds
            yield

    def on_chunk(self, state: TrainState, metrics: Metrics) -> None:
        step, record = int(state.step), summarise(metrics)
        self.failing = step if _failing(metrics) else None
        for kind, text in warnings_of(step, record).items():
            if kind not in self.said or kind == "nonfinite":
                self.progress.note(text)
            self.said.add(kind)
        seconds = round(time.perf_counter() - self.since, 3)
        append(self.run.metrics, {"phase": self.stage, "step": step, "seconds": seconds, **record})
        for name, value in record.items():
            if self.events is not None and isinstance(value, float) and np.isfinite(value):
                self.events.add_scalar(f"{self.stage}/{name}", value, step)
        self.progress.update(step, shown_loss(record))

    def save(self, state: TrainState, *, ends: bool = False) -> None:
        if int(state.step) == self.failing and not ends:  # a run that stops here goes on from before that
            return
        self.checkpoints.save(state)
        if self.stage == "warm start":
            return
        if int(state.step) == self.config.outer.steps:
            self.checkpoints.wait()  # meta-parameters of the last step say that there is nothing left to learn
        with located(self.run.meta):
            save_meta(self.run.meta, here(state.average), step=int(state.step))


def _failing(metrics: Metrics) -> bool:
    """Return whether the last meta-step of a dispatch was lost, or so many in a row that training stops."""
    rows = [len(list(row)) for is_lost, row in itertools.groupby(lost(metrics)) if is_lost]
    return bool(lost(metrics)[-1]) or max(rows, default=0) >= PATIENCE


def held_out(data: Parts) -> Part:
    """Return the part to choose settings on: validation, or train where the split has no validation classes."""
    return "validation" if data.split is None or len(data.split.validation) else "train"


def short_evaluation(
    config: TrainConfig, data: Parts, built: build.WithDensity, learner: MetaLearner, meta: Params, key: Key
) -> str:
    """Return in a line what adapting is worth on a few classes that were not trained on."""
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


def tensorboard_writer() -> Callable[..., Any]:
    """Return what writes TensorBoard events, or raise `ImportError` without the package for it."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs tensorboardX: pip install 'metagen-jax[tensorboard]'") from error
    return SummaryWriter
