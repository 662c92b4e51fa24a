"""From a configuration to everything that a run is made of, before it begins."""

from typing import NamedTuple

import jax
import optax

from metagen_jax.build.choice import choice, weighted
from metagen_jax.build.data import Parts, family, parts
from metagen_jax.build.generated import with_generated
from metagen_jax.build.learners import learner, outer
from metagen_jax.build.models import Built, model
from metagen_jax.config import TrainConfig, given
from metagen_jax.meta.learners import MetaLearner
from metagen_jax.tasks.family import TaskFamily
from metagen_jax.tasks.samplers import Sampler
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
    mesh: jax.sharding.Mesh | None = None  # that the step's tasks are spread over


def training(config: TrainConfig, *, mesh: jax.sharding.Mesh | None = None) -> Training:
    """Load the data and build the rest; the configuration is one that `config.check` returned.

    Args:
        config: of the run.
        mesh: to spread the tasks over, of `metagen_jax.sharding.task_mesh`; None for one device.

    Raises:
        ValueError: whatever does not fit together.
    """
    data = parts(config.data)
    built = model(config, data.event, data.binary)
    learns = learner(config, built)
    tasks = training_tasks(config, data)
    optimizer = outer(config)
    sampler, step = meta_step(config, learns, tasks, optimizer, data, built, mesh=mesh)
    return Training(data, built, learns, tasks, optimizer, sampler, step, mesh)


def training_tasks(config: TrainConfig, data: Parts) -> TaskFamily:
    """Return the tasks that the configuration trains on, generated ones among them."""
    real = family(
        data,
        "train",
        config.shots,
        config.query,
        symmetries=config.data.symmetries,
        rotations=config.data.rotations,
        model=config.model,
        way=given(config.way),
    )
    return with_generated(config, data, real)


def meta_step(
    config: TrainConfig,
    learner: MetaLearner,
    tasks: TaskFamily,
    optimizer: optax.GradientTransformation,
    data: Parts | None = None,
    built: Built | None = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Sampler, Step]:
    """Return the sampler that `config.choice` asks for, and the meta-step of `config.outer`.

    Strategies other than the uniform one need the data and the model, too.
    """
    o = config.outer
    if config.choice.strategy == "uniform":
        sampler = weighted(config, tasks)
    elif data is None or built is None:
        raise ValueError(
            f"choice.strategy={config.choice.strategy} needs the data and the model; give both to meta_step"
        )
    else:
        tasks, sampler = choice(config, data, built, learner, tasks)
    return sampler, make_step(
        learner, tasks, sampler, optimizer, mesh=mesh, average_decay=o.average_decay, task_chunk=o.task_chunk
    )
