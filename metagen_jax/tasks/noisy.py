"""Noisy tasks: some tasks of a family teach labels that are partly wrong.

    with probability `share` a task is noisy; each label y_n of a noisy task becomes
    y_n' ~ Uniform{0, ..., C - 1} with probability `fraction`, in support and query alike

A strategy that prefers hard tasks meets here tasks that are hard because nothing can be learned from them. For training
only. Shape letters: C classes of the task.
"""

from typing import Any

import jax
import jax.numpy as jnp

from metagen_jax.tasks.family import TaskFamily
from metagen_jax.types import Array, Examples, Key, Task


def with_wrong_labels(family: TaskFamily, share: float, fraction: float) -> TaskFamily:
    """Return the family in which a share of the tasks has a fraction of its labels drawn at random.

    Which tasks and which labels is decided from the task's key. A label that is drawn is right by chance once in C
    times; examples that are unlabelled (-1) stay so, and weights stay as they are.

    Args:
        family: of tasks with labels 0 to C - 1, all of which occur in the support or the query.
        share: probability that a task is noisy, in [0, 1].
        fraction: probability that a label of a noisy task is drawn anew, in [0, 1].

    Returns:
        The family; the one given where nothing is to be noisy.

    Raises:
        ValueError: a number outside [0, 1].

    Source: the condition of Yao et al., Meta-learning with an Adaptive Task Scheduler, 2021, and of noisy labels
    generally; departure: tasks of two kinds, clean and noisy, are mixed.
    """
    if not (0 <= share <= 1 and 0 <= fraction <= 1):
        raise ValueError(f"share and fraction are probabilities in [0, 1], got share={share}, fraction={fraction}")
    if not share or not fraction:
        return family

    def make(data: Any, key: Key, spec: Any) -> Task:
        make_key, noisy_key, support_key, query_key = jax.random.split(key, 4)
        task = family.make(data, make_key, spec)
        chance = jnp.where(jax.random.bernoulli(noisy_key, share), fraction, 0.0)
        num_classes = jnp.maximum(task.support.label.max(initial=0), task.query.label.max(initial=0)) + 1
        return Task(
            _relabelled(support_key, task.support, chance, num_classes),
            _relabelled(query_key, task.query, chance, num_classes),
        )

    return family._replace(make=make)


def _relabelled(key: Key, examples: Examples, chance: Array, num_classes: Array) -> Examples:
    which_key, label_key = jax.random.split(key)
    shape = examples.label.shape
    wrong = jax.random.bernoulli(which_key, chance, shape) & (examples.label >= 0)
    drawn = jax.random.randint(label_key, shape, 0, num_classes, examples.label.dtype)
    return examples._replace(label=jnp.where(wrong, drawn, examples.label))
