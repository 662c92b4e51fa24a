"""Any labelled image data set of tensorflow-datasets, read without TensorFlow.

`tfds.data_source` reads the array_record form. Images are decoded here (`pictures.decode`) and not by TFDS, whose
result depends on what is installed: of a PNG with one bit per pixel Pillow makes {0, 1} and OpenCV {0, 255}.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metagen_jax.files import expanded, json_object
from metagen_jax.tasks.image_set import ImageSet, image_set
from metagen_jax.tasks.resize import binarise, grey
from metagen_jax.tasks.sources.folder import Invert
from metagen_jax.tasks.sources.pictures import decode, fit, light_paper

NEEDS_TFDS = 'data sets of tensorflow-datasets need it installed: pip install "metagen-jax[tfds]"'
NEEDS_TENSORFLOW = 'only its TensorFlow builder can prepare it: pip install "metagen-jax[tensorflow]" and try again'
CLASSES = "tensorflow_datasets."  # of every feature
CHUNK = 2000


def tfds_images(
    dataset: str,
    *,
    data_dir: Path | str | None = None,
    splits: Sequence[str] | None = None,
    size: int = 28,
    channels: int | None = None,
    invert: Invert = "auto",
    threshold: float | None = None,
    label: str = "label",
    group: str | None = None,
    max_per_class: int | None = None,
    download: bool = False,
) -> ImageSet:
    """Read a data set, resized to size x size; not cached (`sources.load("tfds:NAME")` is).

    Args:
        dataset: its name in TFDS, with "/config" where it has several.
        data_dir: where TFDS keeps its data (None: its own default).
        splits: those to merge (None: all).
        size: side of the images.
        channels: 1 for grey, 3 for RGB (None: as the data set has it).
        invert: whether ink is dark; "auto" decides for grey images by the brightness of their borders.
        threshold: share of a pixel that ink must cover to be 255 rather than 0; None keeps the grey levels.
        label: name of the class feature.
        group: name of a class feature to take the groups from, such as the alphabet.
        max_per_class: keep only the first so many images of each class.
        download: let TFDS download and prepare what is not there.

    Returns:
        Images [total, size, size, channels]; classes that have images, in the order of the labels. Examples without a
        label (-1) are left out.

    Raises:
        ImportError: tensorflow-datasets, or the TensorFlow that a builder needs, is not installed.
        ValueError: an unknown data set, feature or split, or one that is not prepared or is damaged.
    """
    builder = _builder(dataset, data_dir, download)
    with _understood(dataset, data_dir):
        features = dict(builder.info.features.items())
    image, classes, groups = _features(dataset, features, label, group)
    with _understood(dataset, data_dir):
        num_classes, num_channels = int(classes.num_classes), features[image].shape[-1]
    splits = list(builder.info.splits) if splits is None else list(splits)
    if unknown := sorted(set(splits) - set(builder.info.splits)):
        raise ValueError(f"{dataset} has no split {', '.join(unknown)}; it has {', '.join(builder.info.splits)}")
    channels = channels or (1 if num_channels == 1 else 3)
    fitted: list[np.ndarray] = []
    labels: list[int] = []
    group_of: dict[int, str] = {}
    taken = Counter[int]()
    for example in _examples(builder, splits, image, data_dir):
        c = int(example[label])
        if c >= num_classes:
            raise ValueError(f"{dataset}: image {len(labels)} is of class {c}, but there are {num_classes}")
        if c < 0 or (max_per_class is not None and taken[c] >= max_per_class):
            continue
        taken[c] += 1
        labels.append(c)
        pixels = decode(example[image], channels, f"{dataset}, image {len(labels) - 1}")
        fitted.append(grey(fit(pixels, (size, size))) if threshold is None else fit(pixels, (size, size)))
        if groups is not None:
            with _understood(dataset, data_dir):
                group_of[c] = groups.int2str(int(example[group]))
    if not fitted:
        raise ValueError(f"{dataset}: no labelled images in {', '.join(splits)}")
    ink = np.stack(fitted)
    scale = 255 if threshold is None else 1
    if invert == "auto":
        invert = channels == 1 and light_paper(ink * (255 // scale))
    if invert:
        np.subtract(scale, ink, out=ink, casting="unsafe")
    present = sorted(taken)
    with _understood(dataset, data_dir):
        names = [classes.int2str(c) for c in present]
    return image_set(
        f"tfds:{builder.info.full_name}-{size}x{channels}" + ("" if threshold is None else f"-ink{threshold:g}"),
        ink if threshold is None else binarise(ink, threshold),
        np.searchsorted(present, labels),
        names,
        groups=[group_of.get(c, "") for c in present],
        note=f"{builder.info.full_name} of tensorflow-datasets ({builder.info.homepage}), see there for its licence.",
    )


@contextlib.contextmanager
def _understood(dataset: str, data_dir: Path | str | None, *but: type[Exception]) -> Iterator[None]:
    """Raise whatever TFDS and its readers raise of files that are not as it wrote them as one `ValueError`.

    Args:
        dataset: its name.
        data_dir: where it is.
        but: what is raised as it is, beside the lack of a package or of memory.
    """
    passed: tuple[type[Exception], ...] = (ImportError, MemoryError, *but)
    try:
        yield
    except passed:
        raise
    except Exception as error:
        where = "" if data_dir is None else f" in {expanded(data_dir)}"
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{dataset}{where} cannot be read ({reason}): it is damaged, or of another version of tensorflow-datasets; "
            "prepare it again in another data_dir"
        ) from error


def _builder(dataset: str, data_dir: Path | str | None, download: bool) -> Any:
    """Return the builder of a data set that is prepared in a form which needs no TensorFlow."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(NEEDS_TFDS) from error
    where = None if data_dir is None else expanded(data_dir)
    not_found = tfds.core.registered.DatasetNotFoundError
    if where is not None:
        _check_classes(dataset, where)
    try:
        with _understood(dataset, data_dir, not_found):
            builder = tfds.builder(dataset, data_dir=where, try_gcs=False)
            prepared = builder.is_prepared()
    except not_found as error:
        from difflib import get_close_matches

        near = ", ".join(get_close_matches(dataset, tfds.list_builders(with_community_datasets=False))) or "none near"
        raise ValueError(f"tensorflow-datasets has no {dataset!r}; nearest names: {near}") from error
    except ImportError as error:
        raise ImportError(f"{dataset}: {NEEDS_TENSORFLOW} ({error})") from error
    if not prepared:
        if not download:
            raise ValueError(
                f"{dataset} is not prepared in {builder.data_dir}; give the data_dir that has it, or allow download"
            )
        try:
            builder = tfds.builder(dataset, data_dir=where, try_gcs=False, file_format="array_record")
            builder.download_and_prepare()
        except ImportError as error:
            raise ImportError(f"{dataset}: {NEEDS_TENSORFLOW} ({error})") from error
    with _understood(dataset, data_dir):
        form = builder.info.file_format.value
    if form not in ("array_record", "parquet"):
        raise ValueError(
            f"{dataset} in {builder.data_dir} is in the form {form}, which only TensorFlow reads; prepare it in "
            "another data_dir with file_format='array_record'"
        )
    return builder


def _check_classes(dataset: str, data_dir: Path) -> None:
    """Refuse a prepared set whose features are of classes that TFDS does not have, since it would import them."""
    asked = {_plain(part) for part in re.split("[:/]", dataset)}  # TFDS also takes TinyMarks for tiny_marks
    folders = [folder for folder in data_dir.glob("*") if _plain(folder.name) in asked]
    for path in sorted(path for folder in folders for path in folder.glob("**/features.json")):
        with _understood(dataset, data_dir):
            named = list(_class_names(json_object(path)))
        if others := [name for name in named if not name.startswith(CLASSES)]:
            raise ValueError(f"{path} names {others[0]!r}, which is no feature of tensorflow-datasets; nothing is read")


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _class_names(tree: Any) -> Iterator[str]:
    """Yield the names of classes in what a features.json says."""
    if isinstance(tree, dict):
        yield from (str(tree[key]) for key in ("pythonClassName", "python_class_name") if key in tree)
    inside = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    for value in inside:
        yield from _class_names(value)


def _features(dataset: str, features: dict[str, Any], label: str, group: str | None) -> tuple[str, Any, Any]:
    """Return the name of the image feature, the class feature and the group feature (or None)."""
    import tensorflow_datasets as tfds

    images = [name for name, feature in features.items() if isinstance(feature, tfds.features.Image)]
    if len(images) != 1:
        raise ValueError(f"{dataset}: expected one image feature, got {images or 'none'} of {', '.join(features)}")
    for name in [label] if group is None else [label, group]:
        if not isinstance(features.get(name), tfds.features.ClassLabel):
            known = [key for key, feature in sorted(features.items()) if isinstance(feature, tfds.features.ClassLabel)]
            raise ValueError(f"{dataset}: {name!r} is not a class feature; those are {', '.join(known) or 'none'}")
    return images[0], features[label], None if group is None else features[group]


def _examples(builder: Any, splits: Sequence[str], image: str, data_dir: Path | str | None) -> Iterator[Any]:
    """Yield the examples of the splits with the image as its file's bytes."""
    import tensorflow_datasets as tfds

    for split in splits:
        with _understood(builder.info.name, data_dir):
            source = builder.as_data_source(split=split, decoders={image: tfds.decode.SkipDecoding()})
            total = len(source)
        for start in range(0, total, CHUNK):
            with _understood(builder.info.name, data_dir):
                found = source.__getitems__(range(start, min(start + CHUNK, total)))
            yield from found
