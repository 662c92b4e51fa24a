"""`metagen train LEARNER MODEL`: meta-train, keep everything in the folder of the run, and measure it briefly."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from metagen_jax import build
from metagen_jax.build import Parts, Training
from metagen_jax.cli import warm_start as joint
from metagen_jax.cli.distributed import Distributed, join
from metagen_jax.cli.keeping import WARM_START, Keeping, tensorboard_writer
from metagen_jax.cli.stages import carry_out
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
    to_json,
)
from metagen_jax.processes import check_same, is_first
from metagen_jax.run_directory import (
    RunDirectory,
    check_free,
    create,
    find,
    locked,
    next_path,
    point_latest,
)
from metagen_jax.sharding import task_mesh
from metagen_jax.tasks.image_set import digest
from metagen_jax.types import Params

RUNS = Path("runs")


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
    deterministic: bool = False
    """on GPUs, use only kernels that add in a fixed order, which may be slower; on CPUs it changes nothing"""
    network: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    inner: InnerConfig = dataclasses.field(default_factory=InnerConfig)
    outer: OuterConfig = dataclasses.field(default_factory=OuterConfig)
    adversarial: AdversarialConfig = dataclasses.field(default_factory=AdversarialConfig)
    conditional: ConditionalConfig = dataclasses.field(default_factory=ConditionalConfig)
    generated: GeneratedConfig = dataclasses.field(default_factory=GeneratedConfig)
    choice: ChoiceConfig = dataclasses.field(default_factory=ChoiceConfig)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)


def run(arguments: Train) -> None:
    """Carry out the command."""
    a = arguments
    join(a.distributed, deterministic=a.deterministic)
    config = config_of(a)
    if not is_first():
        take_part(checked(config, None, a.checkpoint_every, a.tensorboard), a.distributed.devices)
        return
    train_run(
        config,
        a.out,
        checkpoint_every=a.checkpoint_every,
        tensorboard=a.tensorboard,
        deterministic=a.deterministic,
        devices=a.distributed.devices,
    )


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
        tensorboard_writer()
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
    deterministic: bool = False,
    devices: int | None = None,
) -> RunDirectory:
    """Train as the configuration says and return the folder of the run.

    Nothing is written before everything that the configuration asks for was found and built. Of several processes this
    is for process 0; the others `take_part`.

    Args:
        config: of the run.
        out: the folder; None for one named after the configuration.
        stem: of that name.
        checkpoint_every: meta-steps between checkpoints.
        tensorboard: whether to write events for it, too.
        short_evaluation: whether to measure what was learned briefly.
        warm_start: parameters that stand in for the joint training that the configuration asks for.
        deterministic: kept with the run, for who goes on with it.
        devices: over which the tasks are spread at most; None for all.

    Raises:
        ValueError: whatever does not fit together.
        Divergence: training lost finiteness; the folder keeps what was done until then.
    """
    config = checked(config, out, checkpoint_every, tensorboard)
    training = spread(config, devices)
    data, keeping = training.data, Keeping(checkpoint_every, tensorboard, short_evaluation)
    name = stem or f"{config.learner}-{config.model}-{data.images.name if data.images else config.data.source}"
    options = {
        **keeping._asdict(),
        "generator": joint.generator_digest(config),
        "deterministic": deterministic,
        "devices": num_devices(training),
    }
    run = create(out or next_path(RUNS, name), config, data, options=options)
    with locked(run):
        point_latest(run)
        print(f"{run.path}: {config.learner} {config.model} on {_describe(data)}{_spread(training)}", flush=True)
        if warm_start is not None:
            key = jax.random.fold_in(jax.random.key(config.seed), WARM_START)
            joint.finish(run, training, key, warm_start, given(config.outer.warm_start))
        carry_out(run, config, training, keeping)
    return run


def take_part(config: TrainConfig, devices: int | None) -> None:
    """Train, as one of several processes, a run whose folder process 0 has.

    Raises:
        ValueError: whatever does not fit together.
        Divergence: training lost finiteness.
    """
    carry_out(None, config, spread(config, devices), Keeping())


def spread(config: TrainConfig, devices: int | None) -> Training:
    """Build a run whose tasks are spread over devices, of all processes, which have to have the same data.

    Raises:
        ValueError: whatever does not fit together.
    """
    check_same("the configuration", to_json(config))
    training = build.training(config, mesh=task_mesh(config.outer.tasks, devices))
    if jax.process_count() > 1 and training.data.images is not None:
        check_same(f"the data ({training.data.images.name})", digest(training.data.images))
    return training


def num_devices(training: Training) -> int:
    """Return how many devices the tasks of a run are spread over."""
    return 1 if training.mesh is None else int(training.mesh.size)


def _spread(training: Training) -> str:
    count, processes = num_devices(training), jax.process_count()
    several = f" of {processes} processes" if processes > 1 else ""
    return f", over {count} devices{several}" if count > 1 else several


def _describe(data: Parts) -> str:
    if data.images is None or data.split is None:
        return "procedural strokes, unlimited classes"
    counts = ", ".join(f"{len(getattr(data.split, part))} {part}" for part in ("train", "validation", "test"))
    return f"{data.images.name} ({counts} classes)"
