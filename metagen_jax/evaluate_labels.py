"""Evaluation of few-shot classification: accuracy on the queries of random N-way tasks, over inner steps.

Each task draws its classes and its images anew, without replacement; the adaptation never sees a query, and no query
sees another one. Accuracy is a mean over tasks, its 95 % interval 1.96 standard errors over tasks, as articles do.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.evaluate import Path
from metagen_jax.tasks.family import TaskFamily
from metagen_jax.types import Array, Key, Model, Params


class Accuracy(NamedTuple):
    """Accuracy of every task at every inner step, in [0, 1]."""

    steps: np.ndarray  # [S] inner steps
    per_task: np.ndarray  # [T, S]; NaN from where an adaptation lost finiteness

    @property
    def mean(self) -> np.ndarray:
        """Return means over tasks [S]."""
        return self.per_task.mean(0)

    @property
    def half_width(self) -> np.ndarray:
        """Return half the width of the 95 % interval [S]: 1.96 standard errors over tasks."""
        return 1.96 * self.per_task.std(0, ddof=1) / np.sqrt(len(self.per_task))


def accuracy_curve(
    path: Path, model: Model, family: TaskFamily, *, steps: Sequence[int], task_chunk: int = 25
) -> Callable[..., Accuracy]:
    """Return the function (meta, key, num_tasks, on_chunk) -> accuracy after each of `steps` inner steps.

    Args:
        path: of a learner: the adapter step by step.
        model: whose game reports `accuracy`.
        family: makes the tasks; its ways, shots and queries are the protocol's.
        steps: inner steps to report, in any range from 0.
        task_chunk: tasks at a time.

    Returns:
        The function. Task i has the key folded from i, so two systems meet the same tasks; called again, it does not
        compile again. `on_chunk` is called with the number of tasks done.

    Raises:
        ValueError: no step, or a negative one; when called, fewer than two tasks.
    """
    chosen = np.asarray(sorted(set(steps)), np.int32)
    if not len(chosen) or chosen[0] < 0:
        raise ValueError(f"expected inner steps of at least 0, got {list(steps)}")

    def one(meta: Params, data: Any, key: Key) -> Array:
        spec_key, make_key, adapt_key, query_key = jax.random.split(key, 4)
        task = family.make(data, make_key, family.describe(data, spec_key))
        params, _ = path(meta, adapt_key, task.support, int(chosen[-1]))
        params = jax.tree.map(lambda leaf: leaf[chosen], params)

        def at_step(params: Params) -> Array:
            losses, metrics = model.game(params, jax.random.clone(query_key), task.query)
            return jnp.where(jnp.isfinite(next(iter(losses.values()))), metrics["accuracy"], jnp.nan)

        return jax.lax.map(at_step, params)

    many = jax.jit(jax.vmap(one, in_axes=(None, None, 0)))

    def measure(
        meta: Params, key: Key, num_tasks: int, on_chunk: Callable[[int], None] = lambda done: None
    ) -> Accuracy:
        if num_tasks < 2:
            raise ValueError(f"an interval over tasks needs at least 2, got num_tasks={num_tasks}")
        pieces = []
        for begin in range(0, num_tasks, task_chunk):
            keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(begin, begin + task_chunk))
            pieces.append(np.asarray(many(meta, family.data, keys)))
            on_chunk(min(begin + task_chunk, num_tasks))
        return Accuracy(chosen, np.concatenate(pieces)[:num_tasks])

    return measure
