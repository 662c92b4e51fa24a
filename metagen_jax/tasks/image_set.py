"""A labelled set of images, grouped by class, in host memory and on the device.

Every source of real images ends here, so that everything behind it (splits, episodes, evaluation) is written once.
Images lie class after class in one array; class c owns rows start[c] to start[c] + count[c].
"""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from metagen_jax.files import arrays, parsed
from metagen_jax.types import Array

FORMAT = 1


class ImageBank(NamedTuple):
    """The device form, passed to jitted functions as an argument (never closed over)."""

    images: Array  # [total, H, W, C] uint8, 0 to 255; characters are 255 where there is ink
    start: Array  # [C] int32, first row of each class
    count: Array  # type: ignore[assignment]  # [C] int32, images of each class


class ImageSet(NamedTuple):
    """The host form: NumPy arrays and names."""

    name: str  # source, and whatever distinguishes this preparation of it
    images: np.ndarray  # [total, H, W, C] uint8
    count: np.ndarray  # type: ignore[assignment]  # [C] int32, all > 0, sum = total
    class_names: tuple[str, ...]  # [C], unique
    groups: tuple[str, ...]  # [C], the alphabet or script of each class ("" where there is none)
    binary: bool  # every pixel is 0 or 255
    note: str  # origin, licence and preparation in a sentence or two, for a person

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def event(self) -> tuple[int, int, int]:
        """Shape (H, W, C) of one image."""
        return self.images.shape[1:]

    def bank(self) -> ImageBank:
        """Return the device form."""
        start = np.concatenate([[0], np.cumsum(self.count)[:-1]]).astype(np.int32)
        return ImageBank(jnp.asarray(self.images), jnp.asarray(start), jnp.asarray(self.count, jnp.int32))

    def take(self, classes: np.ndarray) -> "ImageSet":
        """Return the subset of the classes at these indices [n], in this order."""
        start = np.concatenate([[0], np.cumsum(self.count)[:-1]])
        rows = np.concatenate([np.arange(start[c], start[c] + self.count[c]) for c in classes])
        return self._replace(
            images=self.images[rows],
            count=self.count[np.asarray(classes)],
            class_names=tuple(self.class_names[c] for c in classes),
            groups=tuple(self.groups[c] for c in classes),
        )


def image_set(
    name: str, images: np.ndarray, labels: np.ndarray, class_names: list[str], *, groups: list[str], note: str
) -> ImageSet:
    """Sort labelled images by class (stable) and check them.

    Args:
        name: of the source.
        images: [total, H, W, C] uint8.
        labels: [total] int, index into class_names.
        class_names: unique names, each with at least one image.
        groups: alphabet of each class, "" where there is none.
        note: origin, licence and preparation.

    Raises:
        ValueError: wrong shape or type, a class without images, names that repeat.
    """
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(f"{name}: expected images [total, H, W, C] uint8, got {list(images.shape)} {images.dtype}")
    if len(set(class_names)) != len(class_names) or len(groups) != len(class_names):
        raise ValueError(f"{name}: class names must be unique and each have a group; got {len(class_names)} names")
    count = np.bincount(labels, minlength=len(class_names)).astype(np.int32)
    if len(labels) != len(images) or len(count) != len(class_names) or (count == 0).any():
        empty = [class_names[c] for c in np.flatnonzero(count[: len(class_names)] == 0)[:5]]
        raise ValueError(f"{name}: every class needs an image and every image a class; classes without images: {empty}")
    order = np.argsort(labels, kind="stable")
    binary = bool(((images == 0) | (images == 255)).all())
    return ImageSet(name, images[order], count, tuple(class_names), tuple(groups), binary, note)


def save(images: ImageSet, path: Path) -> None:
    """Write one array file, whole or not at all (binary images bit-packed)."""
    pixels = np.packbits(images.images > 127) if images.binary else images.images
    header = {"format": FORMAT, "name": images.name, "shape": images.images.shape, "binary": images.binary}
    header |= {"class_names": images.class_names, "groups": images.groups, "note": images.note}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.partial.npz")  # two processes may make the same set
    try:
        np.savez_compressed(temporary, pixels=pixels, count=images.count, header=json.dumps(header))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> ImageSet:
    """Read what `save` wrote.

    Raises:
        ValueError: the file is not such a file, or of another format version.
    """
    try:
        file = arrays(path)
        header = parsed(str(file["header"]))
        pixels, count = file["pixels"], file["count"]
        version, shape = header["format"], tuple(header["shape"])
        if version == FORMAT:
            total, binary = math.prod(shape), header["binary"]
            names, groups = tuple(header["class_names"]), tuple(header["groups"])
            whole = pixels.dtype == np.uint8 and count.dtype.kind in "iu" and len(shape) == 4 and min(shape) > 0
            fits = len(names) == len(groups) == len(count) == len(set(names)) and count.sum() == shape[0]
            if not (whole and fits and pixels.size == (-(-total // 8) if binary else total) and (count > 0).all()):
                raise ValueError("its parts do not fit together")
            if binary:
                pixels = np.unpackbits(pixels, count=total) * np.uint8(255)
            return ImageSet(header["name"], pixels.reshape(shape), count, names, groups, binary, header["note"])
    except Exception as error:
        message = f"{path} is not an image-set file of this package ({error}); delete it to have it made again"
        raise ValueError(message) from error
    raise ValueError(f"{path} has format {version}, this version reads {FORMAT}; delete it")


def digest(images: ImageSet) -> str:
    """Return the sha256 of pixels, counts and names: the same data has the same digest on every machine."""
    sha = hashlib.sha256(np.ascontiguousarray(images.images).tobytes())
    sha.update(images.count.astype("<i4").tobytes())
    sha.update("\n".join(images.class_names).encode())
    return sha.hexdigest()
