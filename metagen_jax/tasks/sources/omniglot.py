"""`omniglot`: 1,623 handwritten characters of 50 alphabets, 20 drawings each, prepared for TFDS without TensorFlow.

The stock builder of TFDS unpacks the four archives through TensorFlow. `prepare` writes the same data set (name,
version 3.0.0, features, keys, labels) in the array_record form, from the original archives, which it downloads and
checks against the sums that TFDS has on record, or from a folder with the zips. Archives are read in place and treated
as hostile: nothing is unpacked to a path, and every member's name, size and form is checked.

Source: Lake, Salakhutdinov, Tenenbaum, Human-level concept learning through probabilistic program induction, Science
350, 2015 (MIT licence).
"""

import hashlib
import re
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from metagen_jax.files import expanded
from metagen_jax.tasks import cache
from metagen_jax.tasks.image_set import ImageSet
from metagen_jax.tasks.resize import INK
from metagen_jax.tasks.sources.tfds_images import NEEDS_TFDS, tfds_images

ORIGIN = "https://github.com/brendenlake/omniglot/raw/master/python/"
VERSION = "3.0.0"
CANONICAL_INDEX = Path(__file__).parents[1] / "split_files" / "omniglot.json"  # class names in the order of the labels
MAX_PNG, MAX_ZIP = 1 << 14, 1 << 25  # bytes; the largest drawing has 486, the largest archive 9.5 million
MEMBER = re.compile(r"images_(?:background|evaluation)[a-z0-9_]*/([\w()' -]+)/character(\d\d)/(\d{4})_(\d\d)\.png")


class Archive(NamedTuple):
    """One of the four zips."""

    file: str
    split: str  # of the TFDS data set
    num_classes: int
    sha256: str  # of the original


ARCHIVES = (
    Archive("images_background.zip", "train", 964, "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640"),
    Archive("images_evaluation.zip", "test", 659, "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee"),
    Archive(
        "images_background_small1.zip",
        "small1",
        136,
        "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
    ),
    Archive(
        "images_background_small2.zip",
        "small2",
        156,
        "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f",
    ),
)
REQUIRED = ARCHIVES[:2]


class Drawing(NamedTuple):
    """One image of an archive."""

    alphabet: str
    character: int  # of the alphabet, from 0
    label: int  # of all characters, from 0
    file: str
    png: bytes


def omniglot(
    *, data_dir: Path | str | None = None, size: int = 28, threshold: float | None = INK, download: bool = False
) -> ImageSet:
    """Read Omniglot, preparing it first where that is needed.

    Args:
        data_dir: a TFDS folder in which `omniglot` is prepared, or a folder with the zips (then prepared in the
            cache). None: the cache, or TFDS's own folder.
        size: side of the images; the originals have 105.
        threshold: share of a pixel that ink must cover; None keeps the grey levels.
        download: download the original archives when there is nothing else.

    Returns:
        Images [32460, size, size, 1], classes "Alphabet/characterNN" in the order of TFDS's labels (background first),
        groups the alphabets.

    Raises:
        ImportError: tensorflow-datasets is not installed.
        ValueError: nothing to read from, or an archive that is not what it should be.
    """
    found = tfds_images(
        "omniglot",
        data_dir=_prepared(data_dir, download),
        splits=("train", "test"),
        size=size,
        channels=1,
        invert=True,
        threshold=threshold,
        group="alphabet",
    )
    numbered = [name.rsplit("_", 1) for name in found.class_names]
    return found._replace(
        name=f"omniglot-{size}-" + ("grey" if threshold is None else f"ink{threshold:g}"),
        class_names=tuple(f"{alphabet}/character{int(number) + 1:02d}" for alphabet, number in numbered),
        note="Omniglot (Lake, Salakhutdinov, Tenenbaum 2015, MIT licence), averaged over areas from 105x105.",
    )


def prepare(archives: Path | str, data_dir: Path | str) -> Path:
    """Write the TFDS data set `omniglot` in the array_record form.

    Args:
        archives: folder with images_background.zip and images_evaluation.zip, and the two small ones if wanted.
        data_dir: TFDS folder to write to.

    Returns:
        The folder of the data set.

    Raises:
        ImportError: tensorflow-datasets is not installed.
        ValueError: an archive that is missing or is not what it should be.
    """
    folder = expanded(archives)
    present = [archive for archive in ARCHIVES if (folder / archive.file).is_file()]
    if missing := [archive.file for archive in REQUIRED if archive not in present]:
        raise ValueError(f"{folder} has no {' and no '.join(missing)}; get them from {ORIGIN}")
    builder = _builder_class()(data_dir=expanded(data_dir), file_format="array_record")
    builder.archives = {archive: list(drawings(folder / archive.file, archive.num_classes)) for archive in present}
    builder.download_and_prepare()
    return Path(builder.data_dir)


def fetch(folder: Path | str) -> Path:
    """Download the original archives (19 MB) into a folder and check their sums; those already there are kept.

    Raises:
        ValueError: no connection, or another file than the original.
    """
    folder = expanded(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for archive in ARCHIVES:
        path = folder / archive.file
        if path.is_file() and _sha256(path.read_bytes()) == archive.sha256:
            continue
        try:
            with urllib.request.urlopen(ORIGIN + archive.file, timeout=60) as response:
                content = response.read(MAX_ZIP)
        except OSError as error:
            raise ValueError(
                f"{ORIGIN}{archive.file} cannot be read ({error}); give data_dir, a local folder"
            ) from error
        if (arrived := _sha256(content)) != archive.sha256:
            raise ValueError(f"{ORIGIN}{archive.file}: expected sha256 {archive.sha256}, got {arrived}; not used")
        path.write_bytes(content)
    return folder


def drawings(path: Path, num_classes: int) -> Iterator[Drawing]:
    """Yield the drawings of one archive by name, read in place.

    Raises:
        ValueError: not a zip, a member that is not a 105x105 PNG under a name of the data set's form, or another
            number of classes or drawings.
    """
    seen: dict[tuple[str, int], int] = {}
    count = 0
    try:
        with zipfile.ZipFile(path) as archive:
            pngs = [info for info in archive.infolist() if info.filename.endswith(".png")]
            if len({info.filename for info in pngs}) != 20 * num_classes or len(pngs) != 20 * num_classes:
                raise ValueError(f"expected {20 * num_classes} different drawings, got {len(pngs)}")
            for info in sorted(pngs, key=lambda info: info.filename):
                match = MEMBER.fullmatch(info.filename)
                if match is None or info.file_size > MAX_PNG:
                    raise ValueError(f"unexpected member {info.filename[:80]!r} of {info.file_size} bytes")
                alphabet, character, label, _ = match[1], int(match[2]) - 1, int(match[3]) - 1, match[4]
                if seen.setdefault((alphabet, character), label) != label or label < 0 or character < 0:
                    raise ValueError(f"{info.filename} has another label than the rest of its class")
                with archive.open(info) as member:
                    png = member.read(MAX_PNG + 1)
                if png[:8] != b"\x89PNG\r\n\x1a\n" or png[16:24] != (105).to_bytes(4, "big") * 2 or len(png) > MAX_PNG:
                    raise ValueError(f"{info.filename} is not a PNG of 105x105 pixels")
                count += 1
                yield Drawing(alphabet, character, label, info.filename.rsplit("/", 1)[1], png)
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError, NotImplementedError, EOFError) as error:
        raise ValueError(f"{path} is not the archive it should be: {error}") from error
    if len(seen) != num_classes:
        raise ValueError(f"{path}: expected {num_classes} characters, got {len(seen)}")


def _prepared(data_dir: Path | str | None, download: bool) -> Path | None:
    """Return a TFDS folder that has the data set, preparing it in the cache where needed (None: TFDS's default)."""
    kept = cache.directory() / "tfds"
    if data_dir is not None:
        folder = expanded(data_dir)
        if _has(folder):
            return folder
        if not any((folder / archive.file).exists() for archive in REQUIRED):
            raise ValueError(
                f"{folder} has neither omniglot/{VERSION} (prepared by TFDS) nor "
                f"{' and '.join(archive.file for archive in REQUIRED)}"
            )
        if not _has(kept):
            prepare(folder, kept)
        return kept
    if _has(kept):
        return kept
    if download:
        prepare(fetch(cache.directory() / "downloads"), kept)
        return kept
    return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _has(folder: Path) -> bool:
    return (folder / "omniglot" / VERSION / "dataset_info.json").is_file()


def _builder_class() -> Any:
    """Return the stock builder with another origin of its examples; made here because importing TFDS takes seconds."""
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import registered
    except ImportError as error:
        raise ImportError(NEEDS_TFDS) from error

    stock = tfds.image_classification.Omniglot
    with registered.skip_registration():  # the name stays with the stock builder, which reads what this one writes

        class Omniglot(stock):  # type: ignore[misc, valid-type]
            """Omniglot from drawings in memory."""

            archives: dict[Archive, list[Drawing]]

            def _split_generators(self, dl_manager):
                everything = [drawing for found in self.archives.values() for drawing in found]
                names = {drawing.label: f"{drawing.alphabet}_{drawing.character}" for drawing in everything}
                self.info.features["alphabet"].names = sorted({drawing.alphabet for drawing in everything})
                self.info.features["label"].names = [names[label] for label in sorted(names)]
                return {archive.split: self._generate_examples(found) for archive, found in self.archives.items()}

            def _generate_examples(self, found):
                for drawing in found:
                    yield (
                        f"{drawing.alphabet}_{drawing.character}_{drawing.file}",
                        {
                            "image": drawing.png,
                            "alphabet": drawing.alphabet,
                            "alphabet_char_id": drawing.character,
                            "label": drawing.label,
                        },
                    )

    return Omniglot
