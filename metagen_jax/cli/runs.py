"""A finished run, as the commands that read one see it."""

from pathlib import Path
from typing import NamedTuple

import jax

from metagen_jax import build
from metagen_jax.build import Built, Parts
from metagen_jax.config import TrainConfig, check
from metagen_jax.meta.learners import MetaLearner
from metagen_jax.parameters import load_meta
from metagen_jax.run_directory import Provenance, RunDirectory, find, read_config, read_split
from metagen_jax.types import Params


class Finished(NamedTuple):
    """A run with its model and what was learned."""

    run: RunDirectory
    config: TrainConfig
    provenance: Provenance
    built: Built
    learner: MetaLearner
    meta: Params  # averaged meta-parameters
    step: int  # meta-steps taken


def load(path: Path | str) -> Finished:
    """Load a run without its data.

    Raises:
        ValueError: no run there, or one of another shape or version.
    """
    run = find(path)
    config, provenance = read_config(run)
    try:
        config = check(config)
    except ValueError as error:
        raise ValueError(f"{run.config}: {error}") from error
    built = build.model(config, provenance.event, provenance.binary)
    learner = build.learner(config, built)
    meta, header = load_meta(run.meta, jax.eval_shape(learner.init, jax.random.key(0)))
    if not isinstance(step := header.get("step"), int) or not 0 <= step < 2**31:
        raise ValueError(f"{run.meta} does not say how many meta-steps were taken; use the file of a run")
    return Finished(run, config, provenance, built, learner, meta, step)


def load_data(finished: Finished) -> Parts:
    """Load the data of a run, with the run's own split.

    Raises:
        ValueError: the data are not those that the run was trained on.
    """
    data = build.parts(finished.config.data)
    if data.images is None:
        return data
    return data._replace(split=read_split(finished.run, data.images, finished.provenance))
