"""Ordinary training, which learns nothing about learning."""

from collections.abc import Sequence

from metagen_jax.adapt.unroll import trajectory, unroll
from metagen_jax.dynamics import Dynamics
from metagen_jax.games import union, vector_field
from metagen_jax.meta.learners.record import MetaLearner
from metagen_jax.types import Key, Metrics, Model, Params, Task
from metagen_jax.types import Start as AnyStart


def joint(
    model: Model,
    start: AnyStart,
    num_steps: int,
    *,
    players: Sequence[str] | None = None,
    learns: Sequence[str] | None = None,
    dynamics: Dynamics = vector_field,
) -> MetaLearner:
    """Ordinary training on all classes at once: the baseline that learns nothing about learning.

    Trained on the support and the query of each task as one batch; `start` and `num_steps` say how it is fine-tuned
    when it is evaluated ("joint training, then fine-tuning"). `learns` names the players that are trained, `players`
    those that are fine-tuned; None for all; `dynamics` is that of fine-tuning.
    """
    inner = dynamics(model.game, players)
    outer = vector_field(model.game, learns)

    def field(meta: Params, key: Key, task: Task) -> tuple[Params, Metrics]:
        return outer(meta, key, union(task.support, task.query))

    adapt = unroll(inner, start, num_steps, first_order=True)
    return MetaLearner(model.init, adapt, field, trajectory(inner, start))
