"""From a configuration to everything that a run is made of, before it begins."""

from typing import NamedTuple

import optax

from metagen_jax.build.data import Parts, family, parts
from metagen_jax.build.learners import learner, outer
from metagen_jax.build.models import Built, model
from metagen_jax.config import TrainConfig, given
from metagen_jax.meta.learners import MetaLearner
from metagen_jax.tasks.family import TaskFamily
from metagen_jax.tasks.samplers import Sampler, uniform
from metagen_jax.train import Step, make_step


class Training(NamedTuple):
    """The parts of a run: data in, meta-steps out."""

    data: Parts
    built: Built
    learner: MetaLearner
    family: TaskFamily  # the training tasks
    optimizer: optax.GradientTransformation
    sampler: Sampler
    step: Step


def training(config: TrainConfig) -> Training:
    """Load the data and build the rest; the configuration is one that `config.check` returned.

    Raises:
        ValueError: whatever does not fit together.
    """
    data = parts(config.data)
    built = model(config, data.event, data.binary)
    learns = learner(config, built)
    tasks = training_tasks(config, data)
    optimizer = outer(config)
    sampler, step = meta_step(config, learns, tasks, optimizer)
    return Training(data, built, learns, tasks, optimizer, sampler, step)


def training_tasks(config: TrainConfig, data: Parts) -> TaskFamily:
    """Return the tasks that the configuration trains on."""
    return family(
        data,
        "train",
        config.shots,
        config.query,
        symmetries=config.data.symmetries,
        rotations=config.data.rotations,
        model=config.model,
        way=given(config.way),
    )


def meta_step(
    config: TrainConfig, learner: MetaLearner, tasks: TaskFamily, optimizer: optax.GradientTransformation
) -> tuple[Sampler, Step]:
    """Return the sampler and the meta-step that `config.outer` asks for."""
    sampler, o = uniform(tasks, config.outer.tasks), config.outer
    return sampler, make_step(
        learner, tasks, sampler, optimizer, average_decay=o.average_decay, task_chunk=o.task_chunk
    )
