"""The folder of a run: what was asked for, on what data and with which versions, and everything that came of it.

    runs/maml-vae-glyphs-1/
      config.json       the configuration and its provenance: versions, device, digests of the data and of the split
      split.json        which classes train, validate and test (not for procedural data)
      metrics.jsonl     one JSON object for each dispatch of training
      warm_start/       training states of the joint warm start, until it is done
      checkpoints/      training states, to go on from
      meta.npz          the averaged meta-parameters, to evaluate and to adapt with
      baselines/        what the evaluation trained to compare with
      evaluation.json   likelihoods with intervals
      evaluation.md     the same as a table
      figures/          PNG files
      finished.json     that training and what follows it are done

A folder that exists is never written into by a new run. Every file is written whole or not at all, so that a run that
was killed can go on; what was written after the last checkpoint is taken back first (`trim`).
"""

import contextlib
import json
import os
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from metagen_jax.build import Parts
from metagen_jax.config import TrainConfig, from_json, to_json
from metagen_jax.files import expanded, is_folder, json_object, parsed, shown, text
from metagen_jax.tasks import splits
from metagen_jax.tasks.image_set import ImageSet, digest
from metagen_jax.tasks.splits import Split
from metagen_jax.writing import write

PACKAGES = ("jax", "flax", "optax", "numpy", "metagen-jax")
LATEST = "latest"
SIDE = 1 << 14  # of an image that a run may say it has, in pixels


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
    def warm_start(self) -> Path:
        """The folder of the training states of a joint warm start that is under way."""
        return self.path / "warm_start"

    @property
    def finished(self) -> Path:
        """What was printed after training, once all is done."""
        return self.path / "finished.json"

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
    options: Mapping[str, Any] = MappingProxyType({})  # how the run is kept, which changes nothing of what it learns


def create(
    path: Path | str, config: TrainConfig, data: Parts, *, options: Mapping[str, Any] = MappingProxyType({})
) -> RunDirectory:
    """Make the folder of a new run, with its configuration and its split, all at once.

    Args:
        path: where; nothing, or an empty folder.
        config: of the run.
        data: with the split.
        options: any JSON, for who goes on with the run.

    Raises:
        ValueError: something is there already.
        OSError: it cannot be written, and nothing of it is there.
    """
    run = RunDirectory(check_free(path))
    provenance = Provenance(
        _versions(),
        _device(),
        data.event,
        data.binary,
        None if data.images is None else digest(data.images),
        None if data.split is None else data.split.digest,
        dict(options),
    )
    content = {**json.loads(to_json(config)), "provenance": provenance._asdict()}
    # A folder that a process killed half-way has left beside the run's place is no run, and in nobody's way.
    whole = run.path.resolve()
    making = RunDirectory(whole if whole.is_dir() else whole.with_name(f".{whole.name}.{os.getpid()}.partial"))
    making.path.mkdir(parents=True, exist_ok=True)
    try:
        if data.images is not None and data.split is not None:
            splits.write(data.split, data.images, making.split)
        write(making.config, json.dumps(content, indent=2) + "\n")
        if making.path != whole:
            making.path.rename(whole)
    except OSError:
        if making.path != whole:
            shutil.rmtree(making.path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                making.split.unlink(missing_ok=True)
        raise
    return run


def check_free(path: Path | str) -> Path:
    """Return the path if a new run may be made there: nothing is there, or an empty folder.

    Raises:
        ValueError: something is there already.
    """
    path = expanded(path)
    if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already, and a run is never written over; choose another folder with --out")
    return path


def next_path(root: Path | str, stem: str) -> Path:
    """Return root/stem-n with the smallest n above those that are there.

    Example:
        >>> next_path("no/such/folder", "maml-vae-glyphs").name
        'maml-vae-glyphs-1'
    """
    root = expanded(root)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")
    taken = [entry.name.removeprefix(f"{stem}-") for entry in root.glob(f"{stem}-*")] if root.is_dir() else []
    return root / f"{stem}-{1 + max((int(n) for n in taken if n.isdecimal()), default=0)}"


def point_latest(run: RunDirectory) -> None:
    """Let `latest` beside the run lead to it: a link, or a text file with its name where links are not allowed.

    Where neither can be written it leads where it did, which is said in a warning: the run needs only its own folder.
    """
    pointer = run.path.parent / LATEST
    if pointer.is_dir() and not pointer.is_symlink():
        return  # a folder of the user's own
    temporary = pointer.with_name(f".{LATEST}.{os.getpid()}.partial")
    try:
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(run.path.name, target_is_directory=True)
            temporary.replace(pointer)
        except OSError:
            temporary.unlink(missing_ok=True)
            write(pointer, run.path.name + "\n")
    except OSError as error:
        warnings.warn(f"{pointer} does not lead to {run.path} ({error.strerror})", RuntimeWarning, stacklevel=2)


def find(path: Path | str) -> RunDirectory:
    """Return the run in this folder, or where its pointer leads.

    Raises:
        ValueError: no run there.
    """
    path = expanded(path)
    if path.name == LATEST and path.is_file():
        path = path.parent / text(path, limit=4096).strip()
    if not is_folder(path) or not (path / "config.json").is_file():
        beside = path.parent.glob("*/config.json") if is_folder(path.parent) else ()
        near = sorted(entry.parent.name for entry in beside if not entry.parent.is_symlink())
        hint = f"; runs in {path.parent}: {', '.join(near[:8])}" if near else ""
        raise ValueError(f"{shown(path)} is not the folder of a run (it has no config.json){hint}")
    return RunDirectory(path.resolve())


def read_config(run: RunDirectory) -> tuple[TrainConfig, Provenance]:
    """Read what `create` wrote.

    Raises:
        ValueError: not such a file, or one of another version.
    """
    try:
        content = json_object(run.config)
        provenance = _provenance(content.pop("provenance"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run.config} is not the configuration of a run ({error})") from error
    return from_json(json.dumps(content), where=run.config), provenance


def differences(provenance: Provenance) -> list[str]:
    """Return what is not here as it was where the run was made, a phrase for each."""
    here = {**_versions(), "the device": _device()}
    there = {**provenance.versions, "the device": provenance.device}
    return [f"{name} is {here.get(name)} and was {there[name]}" for name in there if here.get(name) != there[name]]


def check_data(run: RunDirectory, data: Parts, provenance: Provenance) -> None:
    """Raise `ValueError` unless these are the data and the split that the run began with."""
    if (data.event, data.binary) != (provenance.event, provenance.binary) or (data.images is None) != (
        provenance.data is None
    ):
        raise ValueError(f"these are not the data that {run.path} began with: their images have another form")
    if data.images is None:
        return
    read_split(run, data.images, provenance)
    if data.split is None or data.split.digest != provenance.split:
        raise ValueError(
            f"the classes of {data.images.name} are not split as they were when {run.path} began (config.json or the "
            "version differs), so it cannot go on; restore it, or train again"
        )


@contextlib.contextmanager
def locked(run: RunDirectory) -> Iterator[None]:
    """Hold a run while the block runs; the system lets it go when the process ends, however it does.

    Raises:
        ValueError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with run.config.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at work on {run.path}; wait for it, or stop it") from None
        except OSError:  # a file system without locks
            pass
        yield


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


def trim(run: RunDirectory, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Take lines of metrics.jsonl back, a last one that was cut off among them, and return those that are left.

    Args:
        run: whose.
        keep: which stay.

    Raises:
        ValueError: a line that is not JSON.
    """
    records = [record for record in read_metrics(run) if keep(record)]
    kept = "".join(json.dumps(record) + "\n" for record in records)
    if run.metrics.exists() and run.metrics.read_text(encoding="utf-8") != kept:
        write(run.metrics, kept)
    return records


def read_metrics(run: RunDirectory) -> list[dict[str, Any]]:
    """Return the objects of metrics.jsonl, oldest first; a last line cut off by a crash is left out.

    Raises:
        ValueError: no such file, or a line that is not a JSON object, or whose phase, step and seconds are none.
    """
    if not os.path.lexists(run.metrics):
        return []
    try:
        lines = text(run.metrics).split("\n")
    except ValueError as error:
        raise ValueError(f"{run.metrics} cannot be read ({error})") from error
    records = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            record = parsed(line)
        except ValueError as error:
            raise ValueError(f"{run.metrics} line {number} is not JSON ({error})") from error
        kinds = {"phase": str, "step": int, "seconds": int | float}
        if not isinstance(record, dict) or any(n in record and not isinstance(record[n], kinds[n]) for n in kinds):
            raise ValueError(f"{run.metrics} line {number} is not a record of training: {shown(line, 80)}")
        records.append(record)
    return records


def _provenance(values: Any) -> Provenance:
    """Return a provenance that was read, if its values are of the types that they should be."""
    found = Provenance(**values)
    event = found.event
    if not isinstance(event, list) or len(event) != 3 or not all(type(n) is int and 1 <= n <= SIDE for n in event):
        raise ValueError(f"event must be height, width and channels, got {shown(event, 60)}")
    kinds = {"device": str, "binary": bool, "data": str | None, "split": str | None, "options": Mapping}
    for name, kind in kinds.items():
        if not isinstance(getattr(found, name), kind):
            raise ValueError(f"{name} is of another type: {shown(getattr(found, name), 60)}")
    if not isinstance(found.versions, dict) or not all(isinstance(text, str) for text in found.versions.values()):
        raise ValueError(f"versions must be texts by package, got {shown(found.versions, 60)}")
    height, width, channels = event
    return found._replace(event=(height, width, channels))


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _device() -> str:
    return f"{jax.default_backend()}: {jax.devices()[0].device_kind}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
