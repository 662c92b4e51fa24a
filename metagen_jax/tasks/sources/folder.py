"""The user's own data: a folder of class folders of pictures, or one folder with a handful of them.

    my_data/                 my_support/
      first class/             one.png
        a.png  b.jpg           two.png
      second class/
        c.png  d.npy

Pictures are PNG, JPEG, GIF, BMP, TIFF or WebP files, or one image per .npy file (uint8, or floats in [0, 1]).
Anything else is skipped with a warning that names it. Hidden files and folders are passed over in silence.
"""

import warnings
from pathlib import Path
from typing import Literal

import numpy as np

from metagen_jax.tasks.image_set import ImageSet, image_set
from metagen_jax.tasks.resize import binarise, grey
from metagen_jax.tasks.sources.pictures import decode, fit, from_array, light_paper

PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp")
SUFFIXES = (*PICTURES, ".npy")
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
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(
            f"{path} has no folders in it; expected one folder per class, each with pictures ({', '.join(SUFFIXES)})"
        )
    if loose := [entry.name for entry in path.iterdir() if entry.is_file() and entry.suffix.lower() in SUFFIXES]:
        warnings.warn(f"{path}: {len(loose)} pictures lie outside the class folders and are skipped", stacklevel=2)
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
    raw = [_pixels(file, channels) for file in files]
    for file, pixels in zip(files, raw, strict=True):
        if not resize and pixels.shape[:2] != size:
            height, width = pixels.shape[:2]
            raise ValueError(
                f"{file}: expected {size[0]}x{size[1]} pixels, got {height}x{width}; resize it, or allow resizing"
            )
    fitted = np.stack([fit(pixels, size) for pixels in raw])
    if invert == "auto":
        invert = channels == 1 and light_paper(fitted * 255)
    ink = 1 - fitted if invert else fitted
    return grey(ink) if threshold is None else binarise(ink, threshold)


def _pixels(file: Path, channels: int) -> np.ndarray:
    if file.suffix.lower() != ".npy":
        return decode(file, channels, str(file))
    try:
        values = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file} is not a readable array ({error})") from error
    return from_array(values, channels, str(file))


def _pictures(path: Path) -> list[Path]:
    """Return the pictures of a folder by name; at least one."""
    files = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
    pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
    if others := [file.name for file in files if file.suffix.lower() not in SUFFIXES]:
        shown = ", ".join(others[:10]) + (f" and {len(others) - 10} more" if len(others) > 10 else "")
        warnings.warn(f"{path}: skipped what is not a picture: {shown}", stacklevel=3)
    if not pictures:
        raise ValueError(f"{path} has no pictures in it; expected at least one file of {', '.join(SUFFIXES)}")
    return pictures


def _existing(path: Path | str) -> Path:
    path = Path(path).expanduser()
    if not path.is_dir():
        raise ValueError(f"{path} is {'a file' if path.exists() else 'not there'}; expected a folder of pictures")
    return path
