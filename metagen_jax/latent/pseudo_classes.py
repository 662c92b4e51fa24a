"""Tasks from images without labels: clusters of codes stand in for classes.

    partition p: u_p ~ U(0, 1)^Z,   labels_p = k-means of the codes z_n * u_p

Random scales of the dimensions give several partitions of the same images, each of which groups them by something
else. A cluster with enough members is a class of a new `ImageSet`, from which episodes are made as from any other; or
one family draws a partition for each task, with the images stored once and rows of indices for each partition.

Shape letters: N images, Z latent dimensions, P partitions, G clusters that are kept, of all partitions.

Source: Hsu, Levine & Finn, Unsupervised Learning via Meta-Learning, 2019 (CACTUs), section 3, algorithm 1. Departure:
clusters with too few members are left out whole, and all members of the others are used.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.latent.kmeans import kmeans
from metagen_jax.tasks.family import Spec, TaskFamily, shot_range
from metagen_jax.tasks.image_set import ImageSet, image_set
from metagen_jax.types import Array, Examples, Key, Task


class PartitionBank(NamedTuple):
    """Images once, and which of them the clusters of every partition have; on the device."""

    images: Array  # [N, H, W, C] uint8
    rows: Array  # [sum of count] int32, members of cluster after cluster, indices of images
    start: Array  # [G] int32, first of a cluster's rows
    count: Array  # type: ignore[assignment]  # [G] int32, its members
    first: Array  # [P] int32, first cluster of each partition
    number: Array  # [P] int32, its clusters


def partitions(
    num_clusters: int, num_partitions: int, *, num_steps: int = 50, restarts: int = 1
) -> Callable[[Key, Array], Array]:
    """Return the function (key, codes [N, Z]) -> labels [P, N] int32 of clusterings of randomly scaled codes.

    Args:
        num_clusters: of each partition.
        num_partitions: P.
        num_steps: of k-means.
        restarts: of k-means, of which the best is kept.

    Raises:
        ValueError: no partition, or what `kmeans` refuses.
    """
    if num_partitions < 1:
        raise ValueError(f"expected at least one partition, got {num_partitions}")
    cluster = kmeans(num_clusters, num_steps=num_steps, restarts=restarts)

    def one(key: Key, codes: Array) -> Array:
        scale_key, cluster_key = jax.random.split(key)
        scale = jax.random.uniform(scale_key, codes.shape[1:], codes.dtype)
        return cluster(cluster_key, codes * scale[None]).labels

    return lambda key, codes: jax.lax.map(lambda key: one(key, codes), jax.random.split(key, num_partitions))


def pseudo_classes(images: ImageSet, labels: np.ndarray, members: int) -> tuple[ImageSet, ...]:
    """Return the images regrouped by each partition [P]: clusters with at least so many members are the classes.

    Args:
        images: N images; what classes they are of is not looked at.
        labels: [P, N] int, the cluster of each image in each partition, in the order of `images.images`.
        members: what a task needs of a class, shot + query.

    Raises:
        ValueError: labels of other images, or no cluster that is large enough.
    """
    return tuple(_regrouped(images, of_partition, members) for of_partition in _checked(images, labels))


def over_partitions(
    images: ImageSet, labels: np.ndarray, shot: int | tuple[int, int], query: int, *, way: int = 1
) -> TaskFamily:
    """Return the family of tasks of one partition each, drawn anew for every task.

    With one partition it gives the same tasks as `episodes` of that partition's pseudo-classes. A description has
    the clusters [way], counted through all partitions, all of the same one.

    Args:
        images: N images, stored once.
        labels: [P, N] int, the cluster of each image in each partition.
        shot: support images per class, or (smallest, largest), as in `episodes`.
        query: query images per class.
        way: classes per task.

    Raises:
        ValueError: no way or query, labels of other images, or a partition with too few clusters of shot + query
            members.
    """
    low, high = shot_range(shot)
    if query < 1 or way < 1:
        raise ValueError(f"expected at least one query image and one way, got query={query}, way={way}")
    slots = high + query
    members = [_members(of_partition, slots) for of_partition in _checked(images, labels)]
    number = np.array([len(of_partition) for of_partition in members])
    if number.min() < way:
        raise ValueError(
            f"{images.name}: {way}-way tasks need {way} clusters of at least {slots} images, but partition "
            f"{int(number.argmin())} has {number.min()}; ask for fewer clusters, ways, shots or queries"
        )
    clusters = [rows for of_partition in members for rows in of_partition]
    count = np.array([len(rows) for rows in clusters])
    largest, most = int(count.max()), int(number.max())
    bank = PartitionBank(
        jnp.asarray(images.images),
        *(jnp.asarray(leaf, jnp.int32) for leaf in (np.concatenate(clusters), _begin(count), count)),
        *(jnp.asarray(leaf, jnp.int32) for leaf in (_begin(number), number)),
    )

    def describe(data: PartitionBank, key: Key) -> Spec:
        partition_key, class_key = jax.random.split(key)
        partition = jax.random.randint(partition_key, (), 0, data.number.shape[0])
        order = jax.random.uniform(class_key, (most,))
        order = jnp.where(jnp.arange(most) < data.number[partition], order, -1.0)
        return (data.first[partition] + jax.lax.top_k(order, way)[1]).astype(jnp.int32)

    def one_class(data: PartitionBank, key: Key, num_shots: Array, label: Array, which: Array) -> Task:
        order = jax.random.uniform(key, (largest,))
        order = jnp.where(jnp.arange(largest) < data.count[which], order, -1.0)
        drawn = data.rows[data.start[which] + jax.lax.top_k(order, slots)[1]]
        used = (jnp.arange(slots) < num_shots) | (jnp.arange(slots) >= high)
        x = jnp.where(used[:, None, None, None], data.images[drawn].astype(jnp.float32) / 255.0, 0.0)
        both = Examples(x, jnp.full(slots, label, jnp.int32), used.astype(jnp.float32))
        return Task(jax.tree.map(lambda leaf: leaf[:high], both), jax.tree.map(lambda leaf: leaf[high:], both))

    def make(data: PartitionBank, key: Key, spec: Spec) -> Task:
        shot_key, image_key = jax.random.split(key)
        num_shots = jax.random.randint(shot_key, (), low, high + 1)
        keys = jax.random.split(image_key, way)
        task = jax.vmap(one_class, in_axes=(None, 0, None, 0, 0))(data, keys, num_shots, jnp.arange(way), spec)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), task)

    return TaskFamily(bank, describe, make)


def _regrouped(images: ImageSet, labels: np.ndarray, members: int) -> ImageSet:
    clusters = _members(labels, members)
    if not clusters:
        raise ValueError(
            f"{images.name}: no cluster has {members} images, the largest has {np.bincount(labels).max()}; "
            "ask for fewer clusters, shots or queries"
        )
    rows, count = np.concatenate(clusters), [len(rows) for rows in clusters]
    names = [f"cluster {labels[rows[0]]}" for rows in clusters]
    return image_set(
        f"{images.name}-clusters",
        images.images[rows],
        np.repeat(np.arange(len(clusters)), count),
        names,
        groups=[""] * len(names),
        note=f"{images.note} Classes are clusters of codes, found without labels.",
    )


def _members(labels: np.ndarray, least: int) -> list[np.ndarray]:
    """Return the rows of each cluster with at least so many, in the order of the clusters."""
    order, count = np.argsort(labels, kind="stable"), np.bincount(labels)
    return [rows for rows in np.split(order, np.cumsum(count)[:-1]) if len(rows) >= max(least, 1)]


def _begin(count: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(count)[:-1]])


def _checked(images: ImageSet, labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 2 or not len(labels) or labels.shape[1] != len(images.images) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{images.name}: expected integer labels [P, {len(images.images)}], a row for each partition, got "
            f"{list(labels.shape)} {labels.dtype}; one partition is labels[None]"
        )
    if labels.min() < 0:
        raise ValueError(f"{images.name}: labels count from 0, got {labels.min()}")
    return labels
