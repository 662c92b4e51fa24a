"""From a configuration to the strategy that chooses the tasks of each meta-step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.build.data import Parts, take
from metagen_jax.build.models import Built, roles
from metagen_jax.config import TrainConfig, given
from metagen_jax.meta.learners import MetaLearner
from metagen_jax.models.classifier import Classifier
from metagen_jax.models.vae import Vae
from metagen_jax.strategies.candidates import Rule, chosen, measured, pinned
from metagen_jax.strategies.competitive import class_pairs, hard_buffer, score_softmax, worst_case
from metagen_jax.strategies.cooperative import agreement, greedy_set, information
from metagen_jax.strategies.curriculum import self_paced
from metagen_jax.tasks.family import TaskFamily
from metagen_jax.tasks.mixing import mixture
from metagen_jax.tasks.rotations import TURNS
from metagen_jax.tasks.samplers import Sampler, uniform
from metagen_jax.types import Array, Examples, Key, Metrics, Params, Task

SKETCH = 256  # numbers of a task's direction
SKETCHED = ("agreement", "greedy_set")


def weighted(config: TrainConfig, tasks: TaskFamily) -> Sampler:
    """Return the uniform sampler, with the weight of generated tasks if they have another one."""
    made, o = config.generated, config.outer
    if 0 < made.tasks < 1 and made.weight != (1.0, 1.0):
        return mixture(tasks, o.tasks, weight=made.weight, over=o.steps)
    return uniform(tasks, o.tasks)


def choice(
    config: TrainConfig, data: Parts, built: Built, learner: MetaLearner, tasks: TaskFamily
) -> tuple[TaskFamily, Sampler]:
    """Return the family whose tasks are chosen, and the strategy; the configuration is one that was checked."""
    strategy, num_tasks = config.choice.strategy, config.outer.tasks
    if strategy == "hard_buffer":
        family = pinned(tasks)
        return family, hard_buffer(family, num_tasks, capacity=max(50, num_tasks // 2))
    if strategy in ("class_pairs", "worst_case"):
        groups = [group for group in take(data, "train").groups for _ in range(TURNS if config.data.rotations else 1)]
        if strategy == "class_pairs":
            return tasks, class_pairs(tasks, num_tasks, len(groups))
        ids = np.unique(groups, return_inverse=True)[1]
        if not ids.any():
            raise ValueError(
                f"worst_case weighs groups of classes, alphabets or scripts, and {config.data.source} has only one"
            )
        return tasks, worst_case(tasks, num_tasks, ids.tolist())
    embed = None
    if strategy in ("information", "greedy_set"):
        embed = _embedding(built)
    measure = measured(
        built.model.game,
        _unadapted if config.learner == "joint" else learner.adapt,
        players=_sketched(config, built) if strategy in SKETCHED else (),
        sketch=SKETCH if strategy in SKETCHED else 0,
        embed=embed,
    )
    family = pinned(tasks)
    candidates, at_a_time = config.choice.candidates or 2 * num_tasks, config.outer.task_chunk
    chunk = None if at_a_time is None else max(n for n in range(1, at_a_time + 1) if candidates % n == 0)
    return family, chosen(family, num_tasks, candidates, measure, _rule(config, built, tasks), chunk=chunk)


def _unadapted(meta: Params, key: Key, support: Examples) -> tuple[Params, Metrics]:
    """Joint training adapts to nothing, so its tasks are measured as they are."""
    return meta, {}


def _rule(config: TrainConfig, built: Built, tasks: TaskFamily) -> Rule:
    strategy = config.choice.strategy
    if strategy == "information":
        embed = given(_embedding(built))
        task = jax.eval_shape(tasks.make, tasks.data, jax.random.key(0), _spec(tasks))
        size = jax.eval_shape(embed, jax.eval_shape(built.model.init, jax.random.key(0)), task).shape[0]
        return information(size)
    if strategy == "self_paced":
        return self_paced(config.choice.begin, max(1, config.outer.steps // 2))
    if strategy == "score_softmax":
        return score_softmax()
    return agreement() if strategy == "agreement" else greedy_set()


def _spec(tasks: TaskFamily) -> Array:
    return jax.eval_shape(tasks.describe, tasks.data, jax.random.key(0))


def _sketched(config: TrainConfig, built: Built) -> tuple[str, ...]:
    """Return the small players whose direction stands for a task's."""
    role = roles(config, built)
    small = tuple(player for player in role.players if player.endswith("modulation"))
    return small or role.head


def _embedding(built: Built) -> Callable[[Params, Task], Array] | None:
    """Return the function (meta, task) -> mean features or codes of the support [F], for models that have them."""

    def embed(meta: Params, task: Task) -> Array:
        if isinstance(built, Classifier):
            codes = built.features(meta, task.support.x)
        else:
            codes = built.latent.encode(meta, task.support.x)[0]  # type: ignore[union-attr]
        weight = task.support.weight[:, None]
        return (weight * codes).sum(0) / jnp.maximum(weight.sum(), 1.0)

    return embed if isinstance(built, Classifier | Vae) else None
