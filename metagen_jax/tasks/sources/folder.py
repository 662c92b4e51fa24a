"""The user's own data: a folder of class folders of pictures, or one folder with a handful of them.

    my_data/                 my_support/
      first class/             one.png
        a.png  b.jpg           two.png
      second class/
        c.png  d.npy

Pictures are PNG, JPEG, GIF, BMP, TIFF or WebP files, or one image per .npy file (uint8, or floats in [0, 1]).
Any other file is skipped with a warning that names it. Hidden files and folders are passed over in silence.

Links are followed, out of the folder too, so that a data set can be put together without copies: a folder from
somebody else may show files of yours as pictures, but nothing that is not one. What has a picture's name and is no file
(a broken link, a pipe, a device, a folder) is refused, and so are names of classes that no text file could hold.
"""

import os
import warnings
from pathlib import Path
from typing import Literal

import numpy as np

from metagen_jax.files import array, expanded, is_folder, reason, shown
from metagen_jax.tasks.image_set import ImageSet, image_set
from metagen_jax.tasks.resize import binarise, grey
from metagen_jax.tasks.sources.pictures import decode, fit, from_array, light_paper

PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp")
SUFFIXES = (*PICTURES, ".npy")
MAX_TOTAL = 1 << 33  # bytes of all images of a folder as float32, before which they are not read at all
Invert = bool | Literal["auto"]


def folder(
    path: Path | str,
    *,
    size: int = 28,
    channels: int = 1,
    invert: Invert = "auto",
    threshold: float | None = None,
    resize: bool = True,
) -> ImageSet:
    """Read a folder of class folders.

    Args:
        path: the folder; each folder in it that is not empty of pictures is a class of the folder's name.
        size: side of the images.
        channels: 1 for grey, 3 for RGB.
        invert: see `read_images`; "auto" decides once for the whole folder.
        threshold: see `read_images`.
        resize: see `read_images`.

    Returns:
        Images [total, size, size, channels], classes by name, no groups.

    Raises:
        ValueError: no such folder, no class folders, a class without pictures, or a picture that cannot be used.
    """
    path = _existing(path)
    entries = _entries(path)
    classes = [path / name for name, kind in entries if kind == "folder"]
    if not classes:
        raise ValueError(
            f"{shown(path)} has no folders in it; expected one folder per class, each with pictures "
            f"({', '.join(SUFFIXES)})"
        )
    for entry in classes:
        if not entry.name.isprintable():  # nor are lone surrogates, which stand for bytes that are not UTF-8
            raise ValueError(f"{shown(entry)}: a class is named by text in UTF-8 without control characters; rename it")
    if loose := [name for name, kind in entries if kind == "file" and _is_picture(name)]:
        warnings.warn(
            f"{shown(path)}: {len(loose)} pictures lie outside the class folders and are skipped", stacklevel=2
        )
    files = [_pictures(entry) for entry in classes]
    flat = [file for in_class in files for file in in_class]
    return image_set(
        f"folder-{path.name}",
        _read(flat, (size, size, channels), invert, threshold, resize),
        np.repeat(np.arange(len(classes)), [len(in_class) for in_class in files]),
        [entry.name for entry in classes],
        groups=[""] * len(classes),
        note=f"The pictures in the folder {path.name}.",
    )


def read_images(
    path: Path | str,
    event: tuple[int, int, int],
    *,
    invert: Invert = "auto",
    threshold: float | None = None,
    resize: bool = True,
) -> np.ndarray:
    """Read the pictures of one folder, by name.

    Args:
        path: the folder.
        event: (H, W, C) of the images wanted, C 1 or 3.
        invert: whether to turn dark ink on light paper into bright ink on black; "auto" does so for grey images when
            their borders are brighter than mid-grey on average over all of them.
        threshold: share of a pixel that ink must cover to be 255 rather than 0; None keeps the grey levels.
        resize: fit pictures of any size into the event (padded to its proportions, then averaged over areas);
            otherwise another size is an error.

    Returns:
        uint8 [N, H, W, C].

    Raises:
        ValueError: no such folder, no pictures in it, or a picture that cannot be used.
    """
    return _read(_pictures(_existing(path)), event, invert, threshold, resize)


def _read(
    files: list[Path], event: tuple[int, int, int], invert: Invert, threshold: float | None, resize: bool
) -> np.ndarray:
    size, channels = event[:2], event[2]
    if min(event) < 1 or (total := 4 * len(files) * size[0] * size[1] * channels) > MAX_TOTAL:
        what = "images without pixels" if min(event) < 1 else f"{total:,} bytes, more than the {MAX_TOTAL:,} allowed"
        raise ValueError(f"{len(files)} images of {size[0]}x{size[1]} pixels are {what}; choose another size")
    fitted = np.empty((len(files), *event), np.float32)
    for number, file in enumerate(files):  # one after the other: pictures may be a thousand times as large
        pixels = _pixels(file, channels)
        if not resize and pixels.shape[:2] != size:
            height, width = pixels.shape[:2]
            raise ValueError(
                f"{shown(file)}: expected {size[0]}x{size[1]} pixels, got {height}x{width}; resize it, or allow that"
            )
        try:
            fitted[number] = fit(pixels, size)
        except ValueError as error:
            raise ValueError(f"{shown(file)}: {error}") from error
    if invert == "auto":
        invert = channels == 1 and light_paper(fitted * 255)
    ink = 1 - fitted if invert else fitted
    return grey(ink) if threshold is None else binarise(ink, threshold)


def _pixels(file: Path, channels: int) -> np.ndarray:
    if file.suffix.lower() != ".npy":
        return decode(file, channels, str(file))
    try:
        values = array(file)
    except ValueError as error:
        raise ValueError(f"{shown(file)} is not a readable array ({error})") from error
    return from_array(values, channels, str(file))


def _pictures(path: Path) -> list[Path]:
    """Return the pictures of a folder by name; at least one."""
    entries = _entries(path)
    for name, kind in entries:
        if _is_picture(name) and kind != "file":
            raise ValueError(f"{shown(path / name)} has the name of a picture, but is a {kind}; take it away")
    if others := [shown(name, 80) for name, kind in entries if kind != "folder" and not _is_picture(name)]:
        listed = ", ".join(others[:10]) + (f" and {len(others) - 10} more" if len(others) > 10 else "")
        warnings.warn(f"{shown(path)}: skipped what is not a picture: {listed}", stacklevel=3)
    pictures = [path / name for name, _ in entries if _is_picture(name)]
    if not pictures:
        raise ValueError(f"{shown(path)} has no pictures in it; expected at least one file of {', '.join(SUFFIXES)}")
    return pictures


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _entries(path: Path) -> list[tuple[str, str]]:
    """Return what is in a folder and not hidden, by name: each name, and what it is.

    The listing itself says what most entries are; only links are looked at one by one.
    """
    try:
        with os.scandir(path) as listing:
            return sorted((entry.name, _kind(entry)) for entry in listing if not entry.name.startswith("."))
    except OSError as error:
        raise ValueError(f"{shown(path)} cannot be listed ({reason(error)})") from error


def _kind(entry: "os.DirEntry[str]") -> str:
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
        return "broken link" if entry.is_symlink() else "pipe or device"
    except OSError:  # a link to itself
        return "broken link"


def _existing(path: Path | str) -> Path:
    path = expanded(path)
    if not is_folder(path):
        there = os.path.lexists(path)
        raise ValueError(f"{shown(path)} is {'a file' if there else 'not there'}; expected a folder of pictures")
    return path
