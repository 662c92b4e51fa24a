"""`metagen critics --data SOURCE`: train the two frozen critics in whose features samples are measured.

They see the training classes of a source only, and are kept in the user's cache under the sha256 of those images;
`metagen evaluate` takes them from there, and has them trained if they are not there.
"""

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from metagen_jax import build
from metagen_jax.build import Parts
from metagen_jax.config import DataConfig
from metagen_jax.critics import CriticConfig, Critics, load, save, train_critics
from metagen_jax.progress import Progress
from metagen_jax.tasks.cache import directory
from metagen_jax.tasks.image_set import ImageSet, digest, image_set

STROKE_CLASSES, STROKE_DRAWINGS = 600, 20  # procedural characters that critics are trained on


@dataclasses.dataclass(frozen=True)
class TrainCritics:
    """Train the two frozen critics (a classifier and a self-supervised network) on a source's training classes."""

    data: str = DataConfig.source
    """glyphs, strokes, digits, omniglot, omniglot_gmn, mnist, tfds:NAME, or a folder of class folders of pictures"""
    data_dir: str | None = DataConfig.data_dir
    """where the data lie, for sources that are not made on the spot"""
    split: Literal["auto", "class"] = "auto"
    """auto: the source's own held-out alphabets or scripts, where it has any; class: classes at random"""
    hold_out: tuple[str, ...] = DataConfig.hold_out
    """alphabets or scripts to test on, instead of the above"""
    size: int = DataConfig.size
    """height and width of the images of a user's folder"""
    out: Path | None = None
    """where to keep them; the user's cache if not given"""
    again: bool = False
    """train even if they are there"""
    network: CriticConfig = dataclasses.field(default_factory=CriticConfig)


def run(arguments: TrainCritics) -> None:
    """Carry out the command."""
    a = arguments
    data = build.parts(DataConfig(a.data, a.data_dir, a.split, a.hold_out, a.size))
    path = critics_path(data, a.network) if a.out is None else a.out
    if path.suffix != ".npz":
        raise ValueError(f"--out must be a .npz file, got {path}")
    if path.exists() and not a.again:
        critics = load(path, training_images(data))
        print(f"{path} is there already; train again with --again")
    else:
        critics = _train(data, path, a.network)
    print(f"{path}: sha256 of the weights {critics.header['weights_sha256']}")


def critics_for(data: Parts, chosen: Path | None = None) -> Critics:
    """Return the critics of these training classes: from a file, from the cache, or trained now and kept there.

    Raises:
        ValueError: no such file, one that is damaged, or critics of other training classes.
    """
    if chosen is not None:
        return load(chosen, training_images(data))
    path = critics_path(data)
    return load(path, training_images(data)) if path.exists() else _train(data, path, CriticConfig())


def critics_path(data: Parts, config: CriticConfig = CriticConfig()) -> Path:
    """Return the file in the cache that belongs to the training classes and to how critics are trained."""
    images = training_images(data)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", images.name).strip("-.")
    how = hashlib.sha256(repr(config).encode()).hexdigest()[:6]
    return directory() / f"critics-{name}-{digest(images)[:12]}-{how}.npz"


def training_images(data: Parts) -> ImageSet:
    """Return the images of the training classes; of procedural characters, drawings of some of them."""
    if data.images is not None:
        return build.take(data, "train")
    family = build.family(data, "train", STROKE_DRAWINGS, 1)
    specs = build.specs(data, "train", STROKE_CLASSES)
    keys = jax.random.split(jax.random.key(0), len(specs))
    drawn = jax.jit(jax.vmap(lambda key, spec: family.make(family.data, key, spec).support.x))(keys, specs)
    pixels = np.asarray(drawn * 255, np.uint8).reshape(-1, *data.event)
    names = [f"character {index}" for index in range(len(specs))]
    labels = np.repeat(np.arange(len(specs)), STROKE_DRAWINGS)
    return image_set("strokes", pixels, labels, names, groups=[""] * len(names), note="Procedural characters.")


def _train(data: Parts, path: Path, config: CriticConfig) -> Critics:
    total = config.classifier_steps + config.contrastive_steps
    with Progress("critics", total, unit="step") as progress:
        critics = train_critics(training_images(data), config, on_chunk=progress.update)
    save(critics, path)
    return critics
