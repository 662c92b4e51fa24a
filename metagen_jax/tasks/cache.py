"""The user's cache: each prepared image set is one array file, made once.

The folder is $METAGEN_CACHE_DIR, else $XDG_CACHE_HOME/metagen_jax, else ~/.cache/metagen_jax.
"""

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

from metagen_jax.tasks import image_set
from metagen_jax.tasks.image_set import ImageSet


def directory() -> Path:
    """Return the cache folder (not made until something is written)."""
    if chosen := os.environ.get("METAGEN_CACHE_DIR"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "metagen_jax"
    return Path.home() / ".cache" / "metagen_jax"


def cached(name: str, make: Callable[[], ImageSet]) -> ImageSet:
    """Return the image set of this name: read if it was made before, else made and kept.

    A file that cannot be read is made again, and a folder that cannot be written costs only the next run's time;
    both are said in a warning.

    Args:
        name: of the file, letters, digits and . _ - only; it must name everything that the pixels depend on.
        make: makes the set.

    Raises:
        ValueError: a name that is not a plain file name.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise ValueError(f"a cache name is made of letters, digits and . _ - (no folders); got {name!r}")
    path = directory() / f"{name}.npz"
    if path.exists():
        try:
            return image_set.load(path)
        except ValueError as error:
            warnings.warn(f"the cached set is damaged and is made again: {error}", RuntimeWarning, stacklevel=2)
    images = make()
    try:
        image_set.save(images, path)
    except OSError as error:
        message = f"{images.name} could not be kept in the cache ({error}); set METAGEN_CACHE_DIR to a folder of yours"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return images
