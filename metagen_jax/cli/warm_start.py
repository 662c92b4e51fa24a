"""What a run begins with: the joint warm start, saved as it goes and when it is done, and a generator of tasks."""

import hashlib
import shutil
from pathlib import Path

import jax

from metagen_jax import build
from metagen_jax.build import Training
from metagen_jax.config import TrainConfig
from metagen_jax.files import content, expanded
from metagen_jax.parameters import load_meta, save_meta
from metagen_jax.run_directory import RunDirectory
from metagen_jax.types import Key, Params


def finish(run: RunDirectory, training: Training, key: Key, warm: Params, num_steps: int) -> None:
    """Keep the parameters with which meta-training begins, for the run and for its baselines."""
    whole = {**training.built.model.init(key), **warm}
    save_meta(_path(run), whole, step=num_steps, players=sorted(warm))
    shutil.rmtree(run.warm_start, ignore_errors=True)


def finished(run: RunDirectory, config: TrainConfig, training: Training) -> Params | None:
    """Return what `finish` kept, None if the warm start is not done.

    Raises:
        ValueError: a file that is damaged, or of another shape.
    """
    if not _path(run).exists():
        return None
    shutil.rmtree(run.warm_start, ignore_errors=True)
    found, header = load_meta(_path(run), jax.eval_shape(training.built.model.init, jax.random.key(0)))
    players = header.get("players", build.roles(config, training.built).joint)
    return {name: found[name] for name in players}


def generator_digest(config: TrainConfig) -> str | None:
    """Return the sha256 of the parameters of the generator that makes tasks, None if there is none."""
    if config.generated.run is None:
        return None
    return hashlib.sha256(content(expanded(config.generated.run) / "meta.npz")).hexdigest()


def _path(run: RunDirectory) -> Path:
    return run.path / "baselines" / "warm_start.npz"
