"""Meta-training for so much computing time, so that rows of a table are comparable whatever a meta-step costs.

A few meta-steps are timed first, on the same program; the run then has as many as fit, which its schedule ends at. What
is counted is what `clock` says. Or it has a given number of meta-steps, for tables whose rows are to have equally many.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from metagen_jax.meta.learners import MetaLearner
from metagen_jax.tasks.family import TaskFamily
from metagen_jax.tasks.samplers import Sampler
from metagen_jax.train import Step, TrainState, init_state, make_step, train
from metagen_jax.types import Key, Metrics, Params

TIMED = 5  # meta-steps, after as many that compile


class Spent(NamedTuple):
    """Meta-parameters, and what learning them took."""

    meta: Params  # averaged
    meta_steps: int
    seconds: float  # without compiling
    nonfinite_tasks: int


def clock() -> float:
    """Return seconds so far: CPU time of this process, which other programs on the machine do not lengthen much.

    On an accelerator, whose time that is not, those of the wall clock.
    """
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def train_for(
    learner: MetaLearner,
    family: TaskFamily,
    sampler: Sampler,
    rule: Callable[[int], optax.GradientTransformation],
    seconds: float,
    key: Key,
    *,
    meta_steps: int | None = None,
    begin: Params | None = None,
    chunk: int = 25,
    average_decay: float = 0.99,
    clock: Callable[[], float] = clock,
    make: Callable[..., Step] = make_step,
) -> Spent:
    """Meta-train for so many seconds.

    Args:
        learner: what learns.
        family: the training tasks.
        sampler: which of them.
        rule: meta-steps -> the outer rule, of which there are more than one.
        seconds: to spend, without compiling.
        key: of the run.
        meta_steps: to take, whatever time that is, instead of as many as fit.
        begin: meta-parameters, or some of its players, to begin with; the others are as `learner.init` makes them.
        chunk: meta-steps of one dispatch.
        average_decay: of the average that is returned.
        clock: seconds so far.
        make: `make_step`, or another with its arguments.

    Returns:
        What was learned. As many meta-steps as fit are a multiple of `chunk` where there are that many, at least two.

    Raises:
        ValueError: no time to spend.
        Divergence: of `train`.
    """
    if not seconds > 0:
        raise ValueError(f"expected a positive number of seconds, got {seconds}")
    if meta_steps is not None and meta_steps < 2:  # a schedule of one step has nowhere to go
        raise ValueError(f"expected at least two meta-steps, got {meta_steps}")
    init_key, key = jax.random.split(key)
    fresh = learner.init(init_key)
    meta = {**fresh, **{name: tree for name, tree in (begin or {}).items() if name in fresh}}

    def run(num_steps: int, chunk: int) -> tuple[TrainState, list[float], int]:
        optimizer = rule(num_steps)
        step = make(learner, family, sampler, optimizer, average_decay=average_decay)
        copy = jax.tree.map(jnp.copy, meta)
        state = init_state(learner, sampler, optimizer, jax.random.clone(key), meta=copy)
        times, lost = [clock()], [0]

        def on_chunk(state: TrainState, metrics: Metrics) -> None:
            times.append(clock())
            lost[0] += int(metrics["num_nonfinite"].sum())

        return train(step, state, family.data, num_steps, chunk=chunk, on_chunk=on_chunk), times, lost[0]

    num_steps = meta_steps
    if num_steps is None or num_steps <= chunk:
        _, times, _ = run(2 * TIMED, TIMED)  # the first dispatch compiles
        per_step = max((times[2] - times[1]) / TIMED, 1e-9)
    if num_steps is None:
        num_steps = max(2, round(seconds / per_step))
        if num_steps > chunk:
            num_steps = chunk * round(num_steps / chunk)
    state, times, lost = run(num_steps, min(chunk, num_steps))
    alone = len(times) == 2  # one dispatch, which compiled
    measured = per_step * num_steps if alone else (times[-1] - times[1]) * (len(times) - 1) / (len(times) - 2)
    return Spent(state.average, num_steps, measured, lost)
