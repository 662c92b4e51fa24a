"""Few-shot episodes from a bank of images, drawn on the device without replacement.

The support and the query of a task are disjoint: shot + query different images of each class are drawn at once, the
first ones become the support. Where a task has fewer examples than its slots, the rest has zero weight.
"""

import jax
import jax.numpy as jnp

from metagen_jax.tasks.family import Spec, TaskFamily, shot_range
from metagen_jax.tasks.image_set import ImageBank, ImageSet
from metagen_jax.types import Array, Examples, Key, Task


def episodes(
    images: ImageSet, shot: int | tuple[int, int], query: int, *, way: int = 1, pad: bool = False
) -> TaskFamily:
    """Return the family of `way`-way tasks with `shot` support and `query` query images of each class.

    Args:
        images: the classes to draw from, one split of a source.
        shot: support images per class, or (smallest, largest): then each task draws its number uniformly and the
            support is padded to the largest.
        query: query images per class.
        way: classes per task, all different.
        pad: let classes with fewer than shot + query images have a smaller query, padded with zero weight.

    Returns:
        A family whose support is [way * largest shot, H, W, C] and whose query is [way * query, H, W, C], both
        ordered by class.

    Raises:
        ValueError: too few classes for the ways, or too few images in a class for the shot and query asked.
    """
    low, high = shot_range(shot)
    if query < 1 or way < 1:
        raise ValueError(f"expected at least one query image and one way, got query={query}, way={way}")
    if images.num_classes < way:
        raise ValueError(f"{images.name}: {way}-way tasks need {way} classes, this split has {images.num_classes}")
    needed = high + (1 if pad else query)
    short = [f"{name} ({n})" for name, n in zip(images.class_names, images.count, strict=True) if n < needed]
    if short:
        raise ValueError(
            f"{images.name}: {high} shots and {query} query images need {needed} images in each class, but "
            f"{len(short)} of {images.num_classes} classes have fewer: {', '.join(short[:5])}"
            f"{', ...' if len(short) > 5 else ''}. Ask for fewer, leave those classes out, or allow padding (pad=True)"
        )
    slots, largest = high + query, int(images.count.max())

    def describe(data: ImageBank, key: Key) -> Spec:
        return jax.random.permutation(key, data.count.shape[0])[:way].astype(jnp.int32)

    def one_class(data: ImageBank, key: Key, num_shots: Array, label: Array, which: Array) -> Task:
        order = jax.random.uniform(key, (largest,))
        order = jnp.where(jnp.arange(largest) < data.count[which], order, -1.0)
        drawn_order, drawn = jax.lax.top_k(order, min(slots, largest))
        drawn = jnp.pad(drawn, (0, slots - drawn.shape[0]))
        exists = jnp.pad(drawn_order >= 0, (0, slots - drawn_order.shape[0]))
        x = data.images[data.start[which] + drawn].astype(jnp.float32) / 255.0
        used = exists & ((jnp.arange(slots) < num_shots) | (jnp.arange(slots) >= high))
        x = jnp.where(used[:, None, None, None], x, 0.0)
        both = Examples(x, jnp.full(slots, label, jnp.int32), used.astype(jnp.float32))
        return Task(jax.tree.map(lambda leaf: leaf[:high], both), jax.tree.map(lambda leaf: leaf[high:], both))

    def make(data: ImageBank, key: Key, spec: Spec) -> Task:
        shot_key, image_key = jax.random.split(key)
        num_shots = jax.random.randint(shot_key, (), low, high + 1)
        keys = jax.random.split(image_key, way)
        task = jax.vmap(one_class, in_axes=(None, 0, None, 0, 0))(data, keys, num_shots, jnp.arange(way), spec)
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), task)

    return TaskFamily(images.bank(), describe, make)
