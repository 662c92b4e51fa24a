"""The folder of a run: what was asked for, on what data and with which versions, and everything that came of it.

    runs/maml-vae-glyphs-1/
      config.json       the configuration and its provenance: versions, device, digests of the data and of the split
      split.json        which classes train, validate and test (not for procedural data)
      metrics.jsonl     one JSON object for each dispatch of training
      checkpoints/      training states, to go on from
      meta.npz          the averaged meta-parameters, to evaluate and to adapt with
      baselines/        what the evaluation trained to compare with
      evaluation.json   likelihoods with intervals
      evaluation.md     the same as a table
      figures/          PNG files

A folder that exists is never written into by a new run.
"""

import json
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from metagen_jax.build import Parts
from metagen_jax.config import TrainConfig, from_json, to_json
from metagen_jax.tasks import splits
from metagen_jax.tasks.image_set import ImageSet, digest
from metagen_jax.tasks.splits import Split

PACKAGES = ("jax", "flax", "optax", "numpy", "metagen-jax")
LATEST = "latest"


class RunDirectory(NamedTuple):
    """Where the parts of a run lie."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration and its provenance."""
        return self.path / "config.json"

    @property
    def split(self) -> Path:
        """The index file of the split."""
        return self.path / "split.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of the training states."""
        return self.path / "checkpoints"

    @property
    def meta(self) -> Path:
        """The averaged meta-parameters."""
        return self.path / "meta.npz"

    @property
    def figures(self) -> Path:
        """The folder of the PNG files."""
        return self.path / "figures"


class Provenance(NamedTuple):
    """What a run was made with."""

    versions: dict[str, str]
    device: str
    event: tuple[int, int, int]  # H, W, C of the images
    binary: bool  # whether their pixels are 0 or 1
    data: str | None  # sha256 of the images, None for procedural data
    split: str | None  # sha256 of the split


def create(path: Path | str, config: TrainConfig, data: Parts) -> RunDirectory:
    """Make the folder of a new run, with its configuration and its split.

    Raises:
        ValueError: something is there already.
    """
    run = RunDirectory(Path(path).expanduser())
    if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise ValueError(
            f"{run.path} exists already, and a run is never written over; choose another folder with --out"
        )
    run.path.mkdir(parents=True, exist_ok=True)
    if data.images is not None and data.split is not None:
        splits.write(data.split, data.images, run.split)
    provenance = Provenance(
        {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        f"{jax.default_backend()}: {jax.devices()[0].device_kind}",
        data.event,
        data.binary,
        None if data.images is None else digest(data.images),
        None if data.split is None else data.split.digest,
    )
    content = {**json.loads(to_json(config)), "provenance": provenance._asdict()}
    run.config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return run


def check_free(path: Path | str) -> Path:
    """Return the path if a new run may be made there: nothing is there, or an empty folder.

    Raises:
        ValueError: something is there already.
    """
    path = Path(path).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already, and a run is never written over; choose another folder with --out")
    return path


def next_path(root: Path | str, stem: str) -> Path:
    """Return root/stem-n with the smallest n above those that are there.

    Example:
        >>> next_path("no/such/folder", "maml-vae-glyphs").name
        'maml-vae-glyphs-1'
    """
    root = Path(root).expanduser()
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")
    taken = [entry.name.removeprefix(f"{stem}-") for entry in root.glob(f"{stem}-*")] if root.is_dir() else []
    return root / f"{stem}-{1 + max((int(n) for n in taken if n.isdecimal()), default=0)}"


def point_latest(run: RunDirectory) -> None:
    """Let `latest` beside the run lead to it: a link, or a text file with its name where links are not allowed."""
    pointer = run.path.parent / LATEST
    if pointer.is_dir() and not pointer.is_symlink():
        return  # a folder of the user's own
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(run.path.name, target_is_directory=True)
    except OSError:
        pointer.write_text(run.path.name + "\n", encoding="utf-8")


def find(path: Path | str) -> RunDirectory:
    """Return the run in this folder, or where its pointer leads.

    Raises:
        ValueError: no run there.
    """
    path = Path(path).expanduser()
    if path.name == LATEST and path.is_file():
        path = path.parent / path.read_text(encoding="utf-8").strip()
    if not (path / "config.json").is_file():
        beside = path.parent.glob("*/config.json") if path.parent.is_dir() else ()
        near = sorted(entry.parent.name for entry in beside if not entry.parent.is_symlink())
        hint = f"; runs in {path.parent}: {', '.join(near[:8])}" if near else ""
        raise ValueError(f"{path} is not the folder of a run (it has no config.json){hint}")
    return RunDirectory(path.resolve())


def read_config(run: RunDirectory) -> tuple[TrainConfig, Provenance]:
    """Read what `create` wrote.

    Raises:
        ValueError: not such a file, or one of another version.
    """
    try:
        content = json.loads(run.config.read_text(encoding="utf-8"))
        provenance = Provenance(**content.pop("provenance"))
        height, width, channels = provenance.event
        provenance = provenance._replace(event=(height, width, channels))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{run.config} is not the configuration of a run ({error})") from error
    return from_json(json.dumps(content), where=run.config), provenance


def read_split(run: RunDirectory, images: ImageSet, provenance: Provenance) -> Split:
    """Return the run's own split of these images.

    Raises:
        ValueError: other images than those that the run was trained on, or a split that was edited.
    """
    if digest(images) != provenance.data:
        raise ValueError(
            f"{images.name} is not the data that {run.path} was trained on (its sha256 differs), so its held-out "
            "classes could have been trained on; restore the data, or train again"
        )
    return splits.read(run.split, images)


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line; what is not finite becomes null, arrays become lists."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(jsonable(record), allow_nan=False) + "\n")


def read_metrics(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the objects of metrics.jsonl, oldest first; a last line cut off by a crash is left out.

    Raises:
        ValueError: a line that is not JSON.
    """
    if not run.metrics.exists():
        return []
    lines = run.metrics.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{run.metrics} line {number} is not JSON ({error})") from error
    return records


def jsonable(value: Any) -> Any:
    """Return plain lists, numbers and strings; None for what is not finite.

    Example:
        >>> jsonable({"loss": np.array([1.0, np.nan]), "step": np.int32(3)})
        {'loss': [1.0, None], 'step': 3}
    """
    if isinstance(value, Mapping):
        return {str(name): jsonable(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return jsonable(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
