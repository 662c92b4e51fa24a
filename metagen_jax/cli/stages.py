"""What is left to do of a run, stage by stage: the joint warm start, meta-training, and a short evaluation.

What is done is kept as it is done, so `carry_out` finds out what is left and does that, whether the run is new or was
killed in the joint warm start, between two dispatches, while saving or while evaluating.
"""

import shlex
from collections.abc import Callable

import jax
import jax.numpy as jnp

from metagen_jax import build
from metagen_jax.baselines import joint_run
from metagen_jax.build import Training
from metagen_jax.cli.interruption import Stop, stoppable
from metagen_jax.cli.keeping import META, WARM_START, FolderKeeper, Keeper, Keeping, Phase
from metagen_jax.config import TrainConfig, given
from metagen_jax.processes import agreed, agreed_tree
from metagen_jax.run_directory import RunDirectory
from metagen_jax.sharding import everywhere, here
from metagen_jax.train import TrainState, init_state, train
from metagen_jax.types import Metrics, Params

CHUNK = 50  # meta-steps a dispatch, and a line of metrics.jsonl


def carry_out(run: RunDirectory | None, config: TrainConfig, training: Training, keeping: Keeping) -> None:
    """Do what is left to do of a run: all of it, or what was not done when it was stopped.

    Args:
        run: its folder, whose lock is held; None where another process has it.
        config: of the run.
        training: what the configuration says, built.
        keeping: how the run is kept.

    Raises:
        ValueError: its checkpoints are damaged, all of them, or of other shapes.
        Interrupted: it was told to stop, and is saved.
        Divergence: training lost finiteness; the folder keeps what was done until then.
    """
    keeper = Keeper() if run is None else FolderKeeper(run, config, training, keeping)
    advice = "" if run is None else f"go on with: metagen train --resume {shlex.quote(str(run.path))}"
    with stoppable(advice) as stop:
        average = agreed_tree(keeper.learned(), jax.eval_shape(training.learner.init, jax.random.key(0)))
        if average is None:
            average = _learn(keeper, config, training, keeping.checkpoint_every, stop)
        keeper.finish(average)


def _learn(keeper: Keeper, config: TrainConfig, training: Training, every: int, stop: Stop) -> Params:
    """Take the meta-steps that are left, after the warm start if none was saved yet; return the average."""
    learner, optimizer, sampler, mesh = training.learner, training.optimizer, training.sampler, training.mesh
    num_steps = config.outer.steps
    begin_key, meta_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), META))
    target = jax.eval_shape(lambda key: init_state(learner, sampler, optimizer, key), jax.random.key(0))
    with keeper.phase("meta") as phase:
        state: TrainState | None = agreed_tree(phase.restored(target), target)
        if state is None:
            warm = _warm(keeper, config, training, every, stop) or {}
            fresh = learner.init(begin_key)
            kept = {name: tree for name, tree in warm.items() if name in fresh}
            meta = {**fresh, **jax.tree.map(jnp.copy, kept)}  # training donates what it begins with
            state = init_state(learner, sampler, optimizer, meta_key, meta=meta)
        begin = int(state.step)
        phase.begin(begin)
        with phase.shown(num_steps), stop.finishing():
            on_chunk = _saving(phase, every, begin, stop)
            data, state = everywhere((training.family.data, state), mesh)
            early = round(config.inner.first_order_until * num_steps)
            if begin < early:
                cheap = build.learner(config, training.built, first_order=True)
                _, first = build.meta_step(
                    config, cheap, training.family, optimizer, training.data, training.built, mesh=mesh
                )
                state = train(first, state, data, early, chunk=CHUNK, on_chunk=on_chunk)
            state = train(training.step, state, data, num_steps, chunk=CHUNK, on_chunk=on_chunk)
            phase.save(state, ends=True)
    return here(state.average)


def _warm(keeper: Keeper, config: TrainConfig, training: Training, every: int, stop: Stop) -> Params | None:
    """Return the parameters of the joint warm start, if there is one, taking the steps of it that are left."""
    num_steps, mesh = given(config.outer.warm_start), training.mesh
    done = keeper.warm()
    players = agreed(None if done is None else " ".join(done))
    if players is not None:
        shapes = jax.eval_shape(training.built.model.init, jax.random.key(0))
        found: Params = agreed_tree(done, {name: shapes[name] for name in players.split()})
        return found
    if not num_steps:
        return None
    key = jax.random.fold_in(jax.random.key(config.seed), WARM_START)
    step, fresh = joint_run(config, training.family, training.built, num_steps, jax.random.clone(key), mesh=mesh)
    target = jax.eval_shape(lambda: fresh)
    with keeper.phase("warm start") as phase:
        saved: TrainState | None = agreed_tree(phase.restored(target), target)
        state = fresh if saved is None else saved
        begin = int(state.step)
        phase.begin(begin)
        with phase.shown(num_steps), stop.finishing():
            data, state = everywhere((training.family.data, state), mesh)
            state = train(step, state, data, num_steps, chunk=CHUNK, on_chunk=_saving(phase, every, begin, stop))
    average: Params = here(state.average)
    keeper.finish_warm(key, average, num_steps)
    return average


def _saving(phase: Phase, every: int, begin: int, stop: Stop) -> Callable[[TrainState, Metrics], None]:
    """Return what shows and keeps a dispatch, then saves every so many steps, and before leaving."""
    saved = begin

    def on_chunk(state: TrainState, metrics: Metrics) -> None:
        nonlocal saved
        phase.on_chunk(state, metrics)
        told = stop.told()
        if int(state.step) - saved >= every or told:
            saved = int(state.step)
            phase.save(state)
        if told:
            stop.leave()

    return on_chunk
