"""`metagen train LEARNER MODEL`: meta-train, keep everything in the folder of the run, and measure it briefly."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from metagen_jax import build, report
from metagen_jax.baselines import train_joint
from metagen_jax.build import Part, Parts
from metagen_jax.checkpoint import Checkpoints, save_meta
from metagen_jax.cli.monitors import shown_loss, summarise, warnings_of
from metagen_jax.config import (
    LEARNERS,
    MODELS,
    AdversarialConfig,
    ChoiceConfig,
    ConditionalConfig,
    DataConfig,
    GeneratedConfig,
    InnerConfig,
    ModelConfig,
    OuterConfig,
    TrainConfig,
    check,
    given,
)
from metagen_jax.evaluate import adaptation_curve
from metagen_jax.meta.learners import MetaLearner
from metagen_jax.metrics.interval import over_classes
from metagen_jax.metrics.likelihood import draws
from metagen_jax.progress import Progress
from metagen_jax.run_directory import (
    RunDirectory,
    append,
    check_free,
    create,
    find,
    next_path,
    point_latest,
    read_metrics,
)
from metagen_jax.train import TrainState, init_state, train
from metagen_jax.types import Metrics, Params

CHUNK = 50  # meta-steps a dispatch, and a line of metrics.jsonl
SHORT_CLASSES, SHORT_SAMPLES = 32, 10  # of the evaluation after training
RUNS = Path("runs")

WARM_START, META, SHORT = range(3)  # what the seed's keys are folded for

Logger = Callable[[int, dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Train:
    """Meta-train a model, for example: metagen train maml vae --data omniglot_gmn --data-dir DIR."""

    learner: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="LEARNER", help=", ".join(LEARNERS))]
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help=", ".join(MODELS))]
    data: str = DataConfig.source
    """glyphs, strokes, digits, omniglot, omniglot_gmn, mnist, tfds:NAME, or a folder of class folders of pictures"""
    data_dir: str | None = DataConfig.data_dir
    """where the data lie, for sources that are not made on the spot"""
    split: Literal["auto", "class"] = "auto"
    """auto: the source's own held-out alphabets or scripts, where it has any; class: classes at random"""
    hold_out: tuple[str, ...] = DataConfig.hold_out
    """alphabets or scripts to test on, instead of the above"""
    size: int = DataConfig.size
    """height and width of the images of a user's folder"""
    symmetries: bool = DataConfig.symmetries
    """train on every class in its eight symmetries and shifted by a pixel: for few or handwritten training classes"""
    rotations: bool = DataConfig.rotations
    """train on every class turned by 90, 180 and 270 degrees as classes of their own; held-out classes stay upright"""
    shots: tuple[int, int] = TrainConfig.shots
    """smallest and largest number of support images of each class of a task"""
    query: int = TrainConfig.query
    """query images of each class of a task"""
    way: int | None = TrainConfig.way
    """classes of a task; 5 if not given (classifier)"""
    seed: int = TrainConfig.seed
    """of everything random: the same seed on the same machine gives the same run"""
    out: Path | None = None
    """the run's folder, which must not exist; runs/LEARNER-MODEL-DATA-N if not given"""
    checkpoint_every: int = 500
    """meta-steps between checkpoints"""
    tensorboard: bool = False
    """also write TensorBoard events into the run's folder (extra: tensorboard)"""
    network: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    inner: InnerConfig = dataclasses.field(default_factory=InnerConfig)
    outer: OuterConfig = dataclasses.field(default_factory=OuterConfig)
    adversarial: AdversarialConfig = dataclasses.field(default_factory=AdversarialConfig)
    conditional: ConditionalConfig = dataclasses.field(default_factory=ConditionalConfig)
    generated: GeneratedConfig = dataclasses.field(default_factory=GeneratedConfig)
    choice: ChoiceConfig = dataclasses.field(default_factory=ChoiceConfig)


def run(arguments: Train) -> None:
    """Carry out the command."""
    a = arguments
    train_run(config_of(a), a.out, checkpoint_every=a.checkpoint_every, tensorboard=a.tensorboard)


def config_of(arguments: Train) -> TrainConfig:
    """Return the configuration that the arguments ask for, unchecked."""
    a = arguments
    data = DataConfig(a.data, a.data_dir, a.split, a.hold_out, a.size, a.symmetries, a.rotations)
    generated = a.generated
    if generated.run is not None:  # not `latest`, which will soon be another one
        generated = dataclasses.replace(generated, run=str(find(generated.run).path))
    return TrainConfig(
        *(a.learner, a.model, data, a.network, a.inner, a.outer, a.adversarial, a.conditional, generated, a.choice),
        *(a.shots, a.query, a.way, a.seed),
    )


def checked(config: TrainConfig, out: Path | None, checkpoint_every: int, tensorboard: bool) -> TrainConfig:
    """Return the configuration, resolved, if a run of it can begin; nothing is written or built yet.

    Raises:
        ValueError: a setting that is off, or a folder that exists.
        ImportError: TensorBoard events without the package that writes them.
    """
    config = check(config)
    if checkpoint_every < 1:
        raise ValueError(f"--checkpoint-every must be at least 1, got {checkpoint_every}")
    if out is not None:
        check_free(out)
    if tensorboard:
        _tensorboard()
    return config


def train_run(
    config: TrainConfig,
    out: Path | None,
    *,
    stem: str | None = None,
    checkpoint_every: int = 500,
    tensorboard: bool = False,
    short_evaluation: bool = True,
    warm_start: Params | None = None,
) -> RunDirectory:
    """Train as the configuration says and return the folder of the run.

    Nothing is written before everything that the configuration asks for was found and built. A `warm_start` that is
    given stands in for the joint training that the configuration asks for.

    Raises:
        ValueError: whatever does not fit together.
        Divergence: training lost finiteness; the folder keeps what was done until then.
    """
    config = checked(config, out, checkpoint_every, tensorboard)
    writer = _tensorboard() if tensorboard else None
    data, built, learner, family, optimizer, sampler, step = build.training(config)
    outer = config.outer
    name = stem or f"{config.learner}-{config.model}-{data.images.name if data.images else config.data.source}"
    run = create(out or next_path(RUNS, name), config, data)
    point_latest(run)
    print(f"{run.path}: {config.learner} {config.model} on {_describe(data)}", flush=True)

    key = jax.random.key(config.seed)
    with _logging(run, writer) as log:
        warm, joint_steps = warm_start, given(outer.warm_start)
        if warm is None and joint_steps:
            with Progress("joint warm start", joint_steps, unit="step", tasks=outer.tasks) as progress:
                warm = train_joint(
                    config,
                    family,
                    built,
                    joint_steps,
                    jax.random.fold_in(key, WARM_START),
                    on_chunk=_on_chunk("warm start", log, progress),
                )
        if warm is not None:
            whole = {**built.model.init(jax.random.fold_in(key, WARM_START)), **warm}
            save_meta(run.path / "baselines" / "warm_start.npz", whole, step=joint_steps)
        begin_key, meta_key = jax.random.split(jax.random.fold_in(key, META))
        fresh = learner.init(begin_key)
        kept = {name: tree for name, tree in (warm or {}).items() if name in fresh}
        meta = {**fresh, **jax.tree.map(jnp.copy, kept)}  # training donates what it begins with
        state = init_state(learner, sampler, optimizer, meta_key, meta=meta)
        with Checkpoints(run.checkpoints) as checkpoints:
            saved = 0

            def keep(state: TrainState) -> None:
                checkpoints.save(state)
                save_meta(run.meta, state.average, step=int(state.step))

            with Progress("meta-training", outer.steps, unit="meta-step", tasks=outer.tasks) as progress:
                show = _on_chunk("meta", log, progress)

                def on_chunk(state: TrainState, metrics: Metrics) -> None:
                    nonlocal saved
                    show(state, metrics)
                    if int(state.step) - saved >= checkpoint_every:
                        saved = int(state.step)
                        keep(state)

                if early := round(config.inner.first_order_until * outer.steps):
                    cheap = build.learner(config, built, first_order=True)
                    _, first = build.meta_step(config, cheap, family, optimizer, data, built)
                    state = train(first, state, family.data, early, chunk=CHUNK, on_chunk=on_chunk)
                state = train(step, state, family.data, outer.steps, chunk=CHUNK, on_chunk=on_chunk)
            keep(state)
    report.save(report.learning_curve(read_metrics(run)), run.figures / "learning_curve.png")
    if short_evaluation and isinstance(built, build.WithDensity):
        print(_short_evaluation(config, data, built, learner, state.average, jax.random.fold_in(key, SHORT)))
    print(f"next: metagen evaluate {run.path}", flush=True)
    return run


def held_out(data: Parts) -> Part:
    """Return the part to choose settings on: validation, or train where the split has no validation classes."""
    return "validation" if data.split is None or len(data.split.validation) else "train"


def _describe(data: Parts) -> str:
    if data.images is None or data.split is None:
        return "procedural strokes, unlimited classes"
    counts = ", ".join(f"{len(getattr(data.split, part))} {part}" for part in ("train", "validation", "test"))
    return f"{data.images.name} ({counts} classes)"


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
    return (
        f"{len(before)} {part} classes: ELBO {before.mean():.2f} before adapting, {after.mean():.2f} after {steps} "
        f"steps (gain {gain.mean:.2f}, 95 % interval {gain.low:.2f} to {gain.high:.2f} nats per image)"
    )


def _on_chunk(phase: str, log: Logger, progress: Progress) -> Callable[[TrainState, Metrics], None]:
    begin, said = time.perf_counter(), set[str]()

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
def _logging(run: RunDirectory, writer: Callable[[str], Any] | None) -> Iterator[Logger]:
    """Write records to metrics.jsonl, and to TensorBoard where that was asked for."""
    events = writer(str(run.path / "tensorboard")) if writer else None

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


def _tensorboard() -> Callable[[str], Any]:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs tensorboardX: pip install 'metagen-jax[tensorboard]'") from error
    return SummaryWriter
