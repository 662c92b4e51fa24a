"""What a run begins with: the joint warm start, saved as it goes and when it is done, and a generator of tasks."""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from metagen_jax import build
from metagen_jax.baselines import joint_config
from metagen_jax.build import Training
from metagen_jax.checkpoint import Checkpoints, load_meta, save_meta
from metagen_jax.config import TrainConfig, given
from metagen_jax.run_directory import RunDirectory
from metagen_jax.train import Step, TrainState, init_state, make_step, outer_optimizer
from metagen_jax.types import Key, Params


def joint_run(config: TrainConfig, training: Training, num_steps: int, key: Key) -> tuple[Step, TrainState]:
    """Return the step and the first state of joint training, as `metagen_jax.baselines.train_joint` takes them."""
    learner = build.learner(joint_config(config), training.built)
    init_key, state_key = jax.random.split(key)
    outer = config.outer
    optimizer = outer_optimizer(
        given(outer.warm_start_rate),
        num_steps,
        warmup=min(outer.warmup, num_steps - 1),
        clip=outer.clip,
        momentum=given(outer.momentum),
    )
    lasting = dataclasses.replace(config, outer=dataclasses.replace(outer, steps=num_steps))
    sampler = build.weighted(lasting, training.family)
    step = make_step(learner, training.family, sampler, optimizer, average_decay=outer.average_decay)
    state = init_state(learner, sampler, optimizer, state_key, meta=jax.tree.map(jnp.copy, learner.init(init_key)))
    return step, state


def restored(checkpoints: Checkpoints, state: TrainState, warn: Callable[[str], None]) -> TrainState:
    """Return the newest saved state that is whole, or this one if none was saved; later ones are taken away.

    Raises:
        ValueError: there are saved states, and none is whole.
    """
    if checkpoints.steps():
        state = checkpoints.restore(jax.eval_shape(lambda: state), warn=warn)
    checkpoints.discard_after(int(state.step))
    return state


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
    return hashlib.sha256((Path(config.generated.run).expanduser() / "meta.npz").read_bytes()).hexdigest()


def _path(run: RunDirectory) -> Path:
    return run.path / "baselines" / "warm_start.npz"
