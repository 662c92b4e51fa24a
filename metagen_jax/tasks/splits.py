"""Which classes train, validate and test: whole alphabets, or single classes; kept as index files with a hash.

A class is in exactly one part. An index file is JSON with the class names of each part and the sha256 of

    kind, and the names of train, validation and test, one a line, the parts separated by an empty line,

so that a split that was edited, or that belongs to other data, is refused rather than silently used.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metagen_jax.files import json_object
from metagen_jax.tasks.image_set import ImageSet
from metagen_jax.tasks.sources.glyphs import TEST_SCRIPTS, VALIDATION_SCRIPTS
from metagen_jax.tasks.sources.omniglot import CANONICAL_INDEX

FORMAT = 1
PARTS = ("train", "validation", "test")


class Split(NamedTuple):
    """Class indices of the three parts, ascending and disjoint."""

    train: np.ndarray  # [n] int
    validation: np.ndarray  # [n] int, may be empty
    test: np.ndarray  # [n] int
    kind: str  # "canonical", "group" or "class", and how it was made
    digest: str  # sha256 of the names, the same for the same split on every machine


def by_group(images: ImageSet, *, test: Sequence[str], validation: Sequence[str] = ()) -> Split:
    """Hold out whole groups (alphabets, scripts); every other group trains.

    Args:
        images: the source.
        test: groups held out for testing.
        validation: groups held out for choosing settings.

    Raises:
        ValueError: a group that the source does not have or that is named twice, or nothing left for a part.
    """
    named = [*test, *validation]
    if missing := sorted(set(named) - set(images.groups)):
        have = ", ".join(sorted(set(images.groups) - {""})) or "none"
        raise ValueError(f"{images.name} has no group {', '.join(missing)}; its groups: {have}")
    if len(set(named)) != len(named):
        raise ValueError(f"a group may be held out once; got test={list(test)}, validation={list(validation)}")
    part = np.array([2 if group in test else 1 if group in validation else 0 for group in images.groups])
    return _split(images, part, f"group: {', '.join(validation)} | {', '.join(test)}")


def by_class(images: ImageSet, seed: int, *, validation: float = 0.1, test: float = 0.2) -> Split:
    """Hold out classes at random.

    Args:
        images: the source.
        seed: of the shuffle.
        validation: share of the classes held out for choosing settings, rounded; may be 0.
        test: share of the classes held out for testing, rounded, at least one class.

    Raises:
        ValueError: shares out of range, or too few classes for them.
    """
    if not (0 <= validation < 1 and 0 < test < 1 and validation + test < 1):
        raise ValueError(f"expected shares 0 <= validation, 0 < test with a sum below 1, got {validation} and {test}")
    num = images.num_classes
    num_test = max(1, round(test * num))
    num_validation = max(1, round(validation * num)) if validation > 0 else 0
    part = _at_random(images, seed, num_validation, num_test)
    return _split(images, part, f"class: seed {seed}, validation {validation:g}, test {test:g}")


def by_count(images: ImageSet, seed: int, *, validation: int, test: int) -> Split:
    """Hold out so many classes at random; 100 and 323 of Omniglot's 1,623 characters are a protocol of many articles.

    Args:
        images: the source.
        seed: of the shuffle, the same as in `by_class`.
        validation: classes held out for choosing settings; may be 0.
        test: classes held out for testing, at least one.

    Raises:
        ValueError: a number that is none, or too few classes for them.
    """
    if validation < 0 or test < 1:
        raise ValueError(f"expected at least 0 classes for validation and 1 for testing, got {validation} and {test}")
    part = _at_random(images, seed, validation, test)
    return _split(images, part, f"class: seed {seed}, {validation} for validation, {test} for testing")


def canonical(images: ImageSet) -> Split:
    """Return the split that the field (or this project) reports on, for the sources that have one.

    `omniglot`, `omniglot_gmn`: the 964 background classes train, of which the last 97 (of 964, in the order of TFDS's
    labels) validate, and the 659 evaluation classes test. `glyphs`: Armenian, Georgian, Hebrew and Lao test, Greek,
    Coptic, Lisu and Old Italic validate.

    Raises:
        ValueError: a source without a canonical split.

    Source: Lake, Salakhutdinov, Tenenbaum, Human-level concept learning through probabilistic program induction, 2015
    (background and evaluation); Giannone, Winther, SCHA-VAE: hierarchical context aggregation for few-shot
    generation, 2022 (the last 97).
    """
    source = _source(images)
    if source in ("omniglot", "omniglot_gmn"):
        return read(CANONICAL_INDEX, images)
    if source == "glyphs":
        present = set(images.groups)
        test = [script for script in TEST_SCRIPTS if script in present]
        validation = [script for script in VALIDATION_SCRIPTS if script in present]
        return by_group(images, test=test, validation=validation)
    raise ValueError(f"{images.name} has no canonical split; use by_group or by_class")


def default(images: ImageSet, seed: int = 0) -> Split:
    """Return the canonical split where there is one, and else hold out a tenth and a fifth of the classes."""
    return canonical(images) if _source(images) in ("omniglot", "omniglot_gmn", "glyphs") else by_class(images, seed)


def write(split: Split, images: ImageSet, path: Path | str) -> None:
    """Write the index file of a split of these images, whole or not at all."""
    names = {part: [images.class_names[c] for c in getattr(split, part)] for part in PARTS}
    content: dict[str, Any] = {"format": FORMAT, "source": _source(images), "kind": split.kind, **names}
    content["sha256"] = _digest(split.kind, names)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(json.dumps(content, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path | str, images: ImageSet) -> Split:
    """Read an index file and check it against its hash and these images.

    Raises:
        ValueError: not an index file, changed since it was written, or made for other classes.
    """
    try:
        content = json_object(path)
        names = {part: [str(name) for name in content[part]] for part in PARTS}
        kind, recorded, version = str(content["kind"]), content["sha256"], content["format"]
        found = _digest(kind, names)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a split index file ({type(error).__name__}: {error})") from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}, this version reads {FORMAT}; write the split again")
    if found != recorded:
        raise ValueError(f"{path} was changed after it was written (its sha256 does not agree); write the split again")
    index = {name: c for c, name in enumerate(images.class_names)}
    listed = [name for part in PARTS for name in names[part]]
    unknown, unlisted = [name for name in listed if name not in index], set(index) - set(listed)
    if unknown or unlisted or len(listed) != len(index):
        raise ValueError(
            f"{path} is a split of other classes than those of {images.name}: {len(unknown)} of its classes are not "
            f"there ({', '.join(unknown[:3])}), {len(unlisted)} of theirs are not in it "
            f"({', '.join(sorted(unlisted)[:3])}); use the index written for this data"
        )
    part = np.zeros(len(index), int)
    for number, name in enumerate(PARTS):
        part[[index[listed_name] for listed_name in names[name]]] = number
    return _split(images, part, kind)


def _at_random(images: ImageSet, seed: int, num_validation: int, num_test: int) -> np.ndarray:
    """Return the part of each class [C]: 0 trains, 1 validates, 2 tests."""
    num = images.num_classes
    if num_test + num_validation >= num:
        raise ValueError(
            f"{images.name} has {num} classes: {num_test} for testing and {num_validation} for validation leave none "
            "to train on; ask for smaller shares or use more classes"
        )
    part = np.zeros(num, int)
    order = np.random.default_rng(seed).permutation(num)
    part[order[:num_test]] = 2
    part[order[num_test : num_test + num_validation]] = 1
    return part


def _split(images: ImageSet, part: np.ndarray, kind: str) -> Split:
    """Return the split with class c in PARTS[part[c]], refused if nothing is left to train or to test on."""
    train, validation, test = (np.flatnonzero(part == number) for number in range(3))
    if not len(train) or not len(test):
        raise ValueError(
            f"a split of {images.name} needs classes to train and to test on; {kind!r} leaves {len(train)} and "
            f"{len(test)} of {images.num_classes}"
        )
    names = {name: [images.class_names[c] for c in np.flatnonzero(part == n)] for n, name in enumerate(PARTS)}
    return Split(train, validation, test, kind, _digest(kind, names))


def _digest(kind: str, names: dict[str, list[str]]) -> str:
    text = "\n\n".join([kind, *("\n".join(names[part]) for part in PARTS)])
    return hashlib.sha256(text.encode()).hexdigest()


def _source(images: ImageSet) -> str:
    return images.name.split("-", 1)[0]
