"""From a configuration to data: a source, its split, the tasks of each part."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.config import DataConfig
from metagen_jax.files import expanded, is_folder
from metagen_jax.tasks.augment import with_symmetries
from metagen_jax.tasks.episodes import episodes
from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.tasks.image_set import ImageSet
from metagen_jax.tasks.rotations import with_rotations
from metagen_jax.tasks.sources import load
from metagen_jax.tasks.splits import Split, by_class, by_group, default
from metagen_jax.tasks.strokes import CLASSES, strokes
from metagen_jax.tasks.translation import split_styles, translation
from metagen_jax.types import Key

Part = Literal["train", "validation", "test"]
TRANSLATION = "cycle"
"""The model whose tasks are pairs of domains."""
HELD_OUT_STYLES = 8


class Parts(NamedTuple):
    """The classes of a source, by what they are for; a procedural source has no images of its own."""

    images: ImageSet | None
    split: Split | None
    event: tuple[int, int, int]  # H, W, C
    binary: bool


def parts(config: DataConfig) -> Parts:
    """Load the source and split its classes.

    Raises:
        ValueError: an unknown source, or whatever the source refuses.
    """
    if config.source == "strokes":
        return Parts(None, None, (28, 28, 1), True)
    options: dict[str, Any] = {"size": config.size} if is_folder(expanded(config.source)) else {}
    images = load(config.source, data_dir=config.data_dir, **options)
    if config.hold_out:
        split = by_group(images, test=config.hold_out)
    else:
        split = by_class(images, seed=0) if config.split == "class" else default(images)
    return Parts(images, split, images.event, images.binary)


def family(
    data: Parts,
    part: Part,
    shots: int | tuple[int, int],
    query: int,
    *,
    symmetries: bool = False,
    rotations: bool = False,
    model: str = "vae",
    way: int = 1,
) -> TaskFamily:
    """Return the tasks of one part of the split: "train", "validation" or "test".

    `symmetries` turns and mirrors whole tasks, and `rotations` makes classes of turned ones, which is for training
    only. `way` is the number of classes of a task. The tasks of the model "cycle" are pairs of
    domains, two styles of one group of classes; validation and test have styles of their own.

    Raises:
        ValueError: too few images in a class, or no class in that part; domains of procedural data.
    """
    if model == TRANSLATION:
        if data.images is None:
            raise ValueError("domains are made from stored images, and strokes has none; use glyphs or omniglot, say")
        split = split_styles(HELD_OUT_STYLES)
        chosen = {"train": split.train, "validation": split.test[::2], "test": split.test[1::2]}
        made = translation(take(data, part), shots, query, styles=chosen[part])
        return with_symmetries(made, shift=0) if symmetries else made
    if data.images is None:
        if way > 1 or rotations:
            raise ValueError("strokes are drawn one class at a time and never turned; a classifier needs stored images")
        made = strokes(shots, query, split=part)
    else:
        images = take(data, part)
        made = episodes(with_rotations(images) if rotations else images, shots, query, way=way)
    return with_symmetries(made) if symmetries else made


def take(data: Parts, part: Part) -> ImageSet:
    """Return the classes of one part of the split."""
    if data.images is None:
        raise ValueError("procedural strokes have no stored images to take")
    classes = getattr(data.split, part)
    if not len(classes):
        raise ValueError(f"{data.images.name} has no {part} classes in the split {data.split.kind!r}")  # type: ignore
    return data.images.take(classes)


def specs(data: Parts, part: Part, num: int | None = None) -> Spec:
    """Return one description per class of a part [C, 1], at most `num` of them, evenly spread.

    A procedural source has as many classes as are asked for (200 if none are).
    """
    if data.images is None:
        return (CLASSES[part][0] + jnp.arange(num or 200, dtype=jnp.int32))[:, None]
    total = take(data, part).num_classes
    chosen = np.arange(total) if num is None or num >= total else np.linspace(0, total - 1, num).round().astype(int)
    return jnp.asarray(chosen, jnp.int32)[:, None]


def pairs_of_domains(tasks: TaskFamily, num: int, key: Key) -> Spec:
    """Return descriptions [num, 4] of tasks between domains."""
    return jax.jit(jax.vmap(tasks.describe, in_axes=(None, 0)))(tasks.data, jax.random.split(key, num))
