"""Where images come from. Every source returns an `ImageSet`; `load` finds them by name and caches what takes time."""

import hashlib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from metagen_jax.files import expanded, is_folder, shown
from metagen_jax.tasks.cache import cached
from metagen_jax.tasks.image_set import ImageSet
from metagen_jax.tasks.sources.digits import digits
from metagen_jax.tasks.sources.folder import folder, read_images
from metagen_jax.tasks.sources.glyphs import glyphs
from metagen_jax.tasks.sources.omniglot import omniglot
from metagen_jax.tasks.sources.omniglot_gmn import omniglot_gmn
from metagen_jax.tasks.sources.tfds_images import tfds_images

NAMES = ("glyphs", "digits", "omniglot", "omniglot_gmn", "mnist", "tfds:NAME", "a folder of class folders")
VERSION = 1  # raise when a source's pixels change, so that cached files are made again

__all__ = [
    "NAMES",
    "digits",
    "folder",
    "glyphs",
    "load",
    "mnist",
    "omniglot",
    "omniglot_gmn",
    "read_images",
    "tfds_images",
]


def load(name: str, *, data_dir: Path | str | None = None, download: bool = False, **options: Any) -> ImageSet:
    """Return a source by name, from the cache if it was prepared before.

    Args:
        name: one of NAMES: `tfds:NAME` is any labelled image set of tensorflow-datasets, and anything with a / in it
            or that is a folder is the user's own data.
        data_dir: where the data lie, for the sources that are not made or shipped.
        download: let the source download what is not there.
        options: of the source's own function, such as size, threshold or seed.

    Raises:
        ValueError: an unknown name (the message has the nearest ones), or whatever the source refuses.
        ImportError: an extra that the source needs is not installed.
    """
    if name == "glyphs":
        return cached(_cache_name("glyphs", options), lambda: glyphs(**options))
    if name == "digits":
        return digits(**options)
    if name == "omniglot_gmn":
        return omniglot_gmn(data_dir, **options)
    if name in ("omniglot", "mnist"):
        make = omniglot if name == "omniglot" else mnist
        return cached(_cache_name(name, options), lambda: make(data_dir=data_dir, download=download, **options))
    if name.startswith("tfds:"):
        dataset, given = name.removeprefix("tfds:"), {"data_dir": str(data_dir or ""), **options}
        key = _cache_name(f"tfds-{dataset.replace('/', '-').replace(':', '-')}", given)
        return cached(key, lambda: tfds_images(dataset, data_dir=data_dir, download=download, **options))
    if "/" in name or (name and is_folder(expanded(name))):
        return folder(name, **options)
    near = get_close_matches(name, NAMES, n=3, cutoff=0.4)
    raise ValueError(
        f"unknown data set {shown(repr(name), 100)}"
        + (f"; nearest: {', '.join(near)}" if near else "")
        + f". Known: {', '.join(NAMES)}"
    )


def mnist(
    *,
    data_dir: Path | str | None = None,
    size: int = 28,
    threshold: float | None = 0.5,
    max_per_class: int | None = None,
    download: bool = False,
) -> ImageSet:
    """Read MNIST, train and test merged: 70,000 digits of ten classes, binary at half grey (None keeps the greys).

    Source: LeCun, Cortes, Burges, The MNIST database of handwritten digits, 1998 (CC BY-SA 3.0).
    """
    found = tfds_images(
        "mnist",
        data_dir=data_dir,
        size=size,
        invert=False,
        threshold=threshold,
        max_per_class=max_per_class,
        download=download,
    )
    kind = "grey" if threshold is None else f"ink{threshold:g}"
    return found._replace(name=f"mnist-{size}-{kind}", note="MNIST (LeCun, Cortes, Burges; CC BY-SA 3.0).")


def _cache_name(source: str, options: dict[str, Any]) -> str:
    """Return a file name that differs whenever the options do."""
    if not options:
        return f"{source}-v{VERSION}"
    text = repr(sorted((key, repr(value)) for key, value in options.items()))
    return f"{source}-v{VERSION}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
