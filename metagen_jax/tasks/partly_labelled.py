"""Tasks of whose support a part has labels: supervised, semi-supervised and unsupervised ones from one code path.

    support = examples with a label, then examples without (label -1, weight 1);   query: all with a label

Without a second part this is `episodes`; where the labels of the first part were made (of generated examples, or of
clusters), the task is unsupervised. What is without a label may be of the task's classes, of others (distractors), or
generated.

Two ways to come by unlabelled images of real classes:

- `partly_labelled`: most images of each class have no label, ever. Which those are is drawn once, so that labels of
  the others are all that training sees. For training classes.
- `hidden_labels`: all images have one, and of those that a task draws, some are given without. For test classes, whose
  labels teach nothing beyond their task.

Source: Ren et al., Meta-Learning for Semi-Supervised Few-Shot Classification, 2018, section 3 and figure 2.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.tasks.episodes import episodes
from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.tasks.image_set import ImageSet
from metagen_jax.types import Array, Examples, Key, Task

UNLABELLED = -1
More = Callable[[Any, Key, Spec, Task], Array]
"""(data, key, spec, task) -> images [M, *event] that the support gets without a label."""


def with_unlabelled(family: TaskFamily, more: More, data: Any = ()) -> TaskFamily:
    """Return the family whose support has more examples, without a label.

    Args:
        family: of tasks with labels, or of tasks that have unlabelled examples already.
        more: (data, key, spec, task) -> images [M, *event], jit-able: images of another pool, or generated ones, of
            which `task` has what they may be made of. Only its support is for that; its query is for judging.
        data: arrays that `more` needs (a bank of images, parameters of a generator).

    Returns:
        A family whose data is (family.data, data).

    Example:
        >>> from metagen_jax.tasks.family import TaskFamily
        >>> one = Examples(jnp.ones((1, 2)), jnp.zeros(1, int), jnp.ones(1))
        >>> family = TaskFamily((), lambda data, key: jnp.zeros(1, int), lambda data, key, spec: Task(one, one))
        >>> turned = with_unlabelled(family, lambda data, key, spec, task: -task.support.x)
        >>> task = turned.make(turned.data, jax.random.key(0), jnp.zeros(1, int))
        >>> task.support.x.tolist(), task.support.label.tolist()
        ([[1.0, 1.0], [-1.0, -1.0]], [0, -1])
    """

    def describe(both: Any, key: Key) -> Spec:
        return family.describe(both[0], key)

    def make(both: Any, key: Key, spec: Spec) -> Task:
        task_key, more_key = jax.random.split(key)
        task = family.make(both[0], task_key, spec)
        return task._replace(support=joined(task.support, more(both[1], more_key, spec, task)))

    return TaskFamily((family.data, data), describe, make)


def partly_labelled(
    images: ImageSet,
    shot: int | tuple[int, int],
    query: int,
    *,
    way: int,
    unlabelled: int,
    distractors: int = 0,
    labelled_share: float = 0.1,
    seed: int = 0,
) -> TaskFamily:
    """Return tasks of classes of which only a share of the images has labels.

    Support and query are drawn from the labelled images of `way` classes; the `unlabelled` images of each of these
    classes, and of `distractors` other ones, from the rest. A description is the ids of all of them, those of the task
    first, [way + distractors].

    Args:
        images: one split of a source. Turned classes are classes of their own here too, as in the authors' code.
        shot: support images with a label per class, or (smallest, largest).
        query: query images per class.
        way: classes per task.
        unlabelled: M, images without a label per class; zero for none.
        distractors: H, classes of which there are unlabelled images and no other.
        labelled_share: of the images of each class that have labels, (0, 1]; counts are rounded.
        seed: of the choice of the labelled images.

    Returns:
        A family whose support is [way * shot + (way + distractors) * unlabelled, H, W, C]. With labelled_share=1 and
        no unlabelled images it is that of `episodes`, with the images of each class in another order.

    Raises:
        ValueError: a share out of range, distractors without images, or what `episodes` raises: too few classes, or too
            few images of a class that have, or have not, a label.

    Source: Ren et al., 2018, section 3.1 (one share of each class labelled, M = 5, H = 5 in training).
    """
    _check_counts(unlabelled, distractors)
    known, rest = split_labels(images, labelled_share, seed)
    family = episodes(known, shot, query, way=way)
    if not unlabelled:
        return family
    pool = episodes(rest, 0, unlabelled, way=way + distractors)

    def describe(data: Any, key: Key) -> Spec:
        return pool.describe(data, key)  # the same classes in both, and as many

    def make(data: Any, key: Key, spec: Spec) -> Task:
        return family.make(data, key, spec[:way])

    def more(data: Any, key: Key, spec: Spec, task: Task) -> Array:
        del task
        return pool.make(data, key, spec).query.x

    return with_unlabelled(TaskFamily(family.data, describe, make), more, pool.data)


def hidden_labels(
    images: ImageSet, shot: int | tuple[int, int], query: int, *, way: int, unlabelled: int, distractors: int = 0
) -> TaskFamily:
    """Return tasks that draw labelled and unlabelled images from the same classes, all of them different.

    Args:
        images: one split of a source, with at least shot + query + unlabelled images of each class.
        shot: support images with a label per class, or (smallest, largest).
        query: query images per class.
        way: classes per task.
        unlabelled: M, images per class whose labels are hidden; zero for none.
        distractors: H, classes of which there are unlabelled images and no other.

    Returns:
        A family as of `partly_labelled`.

    Raises:
        ValueError: distractors without images, or what `episodes` raises.

    Source: Ren et al., 2018: in the authors' code (`refinement_dataset.py`) the classes of validation and test have
    label_ratio 1, and the unlabelled images are those left after support and query.
    """
    _check_counts(unlabelled, distractors)
    family = episodes(images, shot, query + unlabelled, way=way + distractors)

    def make(data: Any, key: Key, spec: Spec) -> Task:
        drawn = family.make(data, key, spec)
        support, rows = (
            jax.tree.map(lambda leaf: leaf.reshape(way + distractors, -1, *leaf.shape[1:]), examples)
            for examples in drawn
        )
        first, judged = (
            jax.tree.map(lambda leaf, n=n: leaf[:way, :n].reshape(-1, *leaf.shape[2:]), examples)
            for examples, n in ((support, support.x.shape[1]), (rows, query))
        )
        hidden = rows.x[:, query:].reshape(-1, *rows.x.shape[2:])
        return Task(joined(first, hidden), judged)

    return family._replace(make=make)


def split_labels(images: ImageSet, labelled_share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Return the images of each class that have labels, and those that have not.

    Both have all classes in the same order; a class of the second may have no image.

    Args:
        images: of all classes.
        labelled_share: of each class, (0, 1]; counts are rounded, to one at least.
        seed: of the permutation of each class.

    Raises:
        ValueError: a share out of range.
    """
    if not 0 < labelled_share <= 1:
        raise ValueError(f"expected a share of labelled images in (0, 1], got labelled_share={labelled_share}")
    rng = np.random.default_rng(seed)
    begin = np.cumsum(images.count) - images.count
    orders = [first + rng.permutation(count) for first, count in zip(begin, images.count, strict=True)]
    count = np.maximum(1, np.round(labelled_share * images.count)).astype(np.int32)
    known = np.concatenate([order[:n] for order, n in zip(orders, count, strict=True)])
    rest = np.concatenate([order[n:] for order, n in zip(orders, count, strict=True)])
    return (
        images._replace(name=f"{images.name}, labelled", images=images.images[known], count=count),
        images._replace(name=f"{images.name}, unlabelled", images=images.images[rest], count=images.count - count),
    )


def joined(support: Examples, x: Array) -> Examples:
    """Return the examples followed by images [M, *event] without a label."""
    num = x.shape[0]
    return Examples(
        jnp.concatenate([support.x, x.astype(support.x.dtype)]),
        jnp.concatenate([support.label, jnp.full(num, UNLABELLED, support.label.dtype)]),
        jnp.concatenate([support.weight, jnp.ones(num, support.weight.dtype)]),
    )


def _check_counts(unlabelled: int, distractors: int) -> None:
    if unlabelled < 0 or distractors < 0 or (distractors and not unlabelled):
        raise ValueError(
            "expected unlabelled >= 0 images per class, and some where there are distractor classes, which have no "
            f"other, got unlabelled={unlabelled}, distractors={distractors}"
        )
