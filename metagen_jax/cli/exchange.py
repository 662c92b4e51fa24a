"""`metagen export RUN FILE` and `metagen import FILE`: a run as one file, and the folder of a run made out of it again.

The file holds the averaged meta-parameters and, in its header, what else there is to know of a run: its configuration
with the provenance, the split, the meta-steps. It may come from anyone, so all of it is read and compared before
anything is written, and no name in it becomes the path of a file that is.
"""

import dataclasses
import json
import math
import os
import shlex
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

from metagen_jax import build
from metagen_jax.array_files import suffix_of
from metagen_jax.cli.messages import warn
from metagen_jax.cli.runs import load
from metagen_jax.cli.train import RUNS
from metagen_jax.config import TrainConfig, check, given
from metagen_jax.files import expanded, json_object, shown
from metagen_jax.parameters import load_meta, read_header, save_meta, shapes
from metagen_jax.run_directory import (
    PACKAGES,
    Provenance,
    RunDirectory,
    check_free,
    differences,
    next_path,
    read_config,
)
from metagen_jax.tasks import splits
from metagen_jax.tasks.image_set import image_set
from metagen_jax.types import Params
from metagen_jax.writing import write


@dataclasses.dataclass(frozen=True)
class Export:
    """Write what a run learned as one file, for another machine: metagen export runs/latest vae.safetensors."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help="the run's folder, or runs/latest")]
    file: Annotated[
        tyro.conf.Positional[Path],
        tyro.conf.arg(metavar="FILE", help="to write: .npz, or .safetensors (extra: export)"),
    ]


@dataclasses.dataclass(frozen=True)
class Import:
    """Make the folder of a run out of an exported file, to evaluate, adapt and explore."""

    file: Annotated[
        tyro.conf.Positional[Path],
        tyro.conf.arg(metavar="FILE", help="that `metagen export` wrote: .npz, .safetensors"),
    ]
    out: Path | None = None
    """the run's folder, which must not exist; runs/NAME-N after the file if not given"""
    data: str | None = None
    """the source of the data here, if it has another name or place (a folder of class folders) than there"""
    data_dir: str | None = None
    """where the data lie here, if not where they lay there"""


class Content(NamedTuple):
    """What a file says of a run beside its parameters."""

    config: dict[str, Any]  # the object in config.json
    split: dict[str, Any] | None  # the object in split.json; None for procedural data
    step: int  # meta-steps taken


def run_export(arguments: Export) -> None:
    """Carry out `metagen export`."""
    file = expanded(arguments.file)
    suffix_of(file)
    if os.path.lexists(file):
        raise ValueError(f"{file} exists already, and is never written over; choose another name")
    finished = load(arguments.run)
    run, config = finished.run, finished.config
    if finished.step != config.outer.steps:
        raise ValueError(
            f"{run.path} was stopped at meta-step {finished.step} of {config.outer.steps}, and a run that was exported "
            f"cannot go on; first: metagen train --resume {shlex.quote(str(run.path))}"
        )
    split = json_object(run.split) if finished.provenance.split is not None else None
    content = Content(json_object(run.config), split, finished.step)
    _read(content, run.path)
    save_meta(file, finished.meta, **content._asdict(), versions=_versions())
    print(f"{file}: {_count(shapes(finished.meta)):,} parameters, {file.stat().st_size:,} bytes")
    places = [place for place in (config.data.data_dir, config.generated.run) if place is not None]
    if Path(config.data.source).is_absolute():
        places.append(config.data.source)
    if places:
        print(f"it names what lies on this machine: {', '.join(shown(place) for place in places)}")
    print(f"on another machine: metagen import {shlex.quote(file.name)}")


def run_import(arguments: Import) -> None:
    """Carry out `metagen import`."""
    a = arguments
    file = expanded(a.file)
    suffix_of(file)
    if not file.is_file():
        raise ValueError(f"{file} is not there, or is no file; give a file that `metagen export` wrote")
    named = file.stem if any(c.isascii() and c.isalnum() for c in file.stem) else "imported"
    out = check_free(next_path(RUNS, named) if a.out is None else a.out)
    content, meta, config, provenance = read_run(file, {"source": a.data, "data_dir": a.data_dir})
    _write(out, content, meta)
    print(f"{out}: {config.learner} {config.model}, {content.step} meta-steps, {_count(shapes(meta)):,} parameters")
    if differs := differences(provenance):
        warn(shown(f"{'; '.join(differs)}: what it makes may not be the same to the last bit", 1000))
    if given(config.outer.warm_start):
        print("its joint warm start was not exported, so a joint baseline that is evaluated beside it begins anew")
    print(f"next: metagen evaluate {shlex.quote(str(out))}", flush=True)


def read_run(file: Path, data: dict[str, str | None]) -> tuple[Content, Params, TrainConfig, Provenance]:
    """Return what there is in an exported file, if all of it fits together; nothing is written.

    Args:
        file: the file.
        data: settings of the data that are others here than in the file; those that are None are not.

    Raises:
        ValueError: no such file, a configuration or a split that is none, or parameters of other shapes.
    """
    header = read_header(file)
    if missing := [name for name in Content._fields if name not in header]:
        raise ValueError(f"{file} has the parameters of no whole run ({missing[0]} is not in it); use `metagen export`")
    content = Content(*(header[name] for name in Content._fields))
    config, provenance = _read(content, file)
    if changes := {name: value for name, value in data.items() if value is not None}:
        content = content._replace(config=content.config | {"data": content.config["data"] | changes})
        config, provenance = _read(content, file)
    try:
        learner = build.learner(config, build.model(config, provenance.event, provenance.binary))
        target = jax.eval_shape(learner.init, jax.random.key(0))
    except Exception as error:  # sizes that no network can have
        raise ValueError(f"{file} has a configuration that nothing can be built from ({shown(error)})") from error
    return content, load_meta(file, target)[0], config, provenance


def _read(content: Content, where: Path) -> tuple[TrainConfig, Provenance]:
    """Return the configuration, checked, and the provenance, by what reads them in the folder of a run."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder))
        try:
            _write_texts(run, content)
            config, provenance = read_config(run)
            config = check(config)
            if (content.split is None) != (provenance.split is None):
                raise ValueError("it has a split, or has none, where its provenance says otherwise")
            if content.split is not None and _digest(run, content.split) != provenance.split:
                raise ValueError("its split is not the one that the run was trained with")
            if type(content.step) is not int or content.step != config.outer.steps:
                raise ValueError(f"it is of meta-step {content.step}, and its configuration has {config.outer.steps}")
        except (ValueError, TypeError) as error:
            said = shown(str(error).replace(f"{run.path}{os.sep}", ""), 1000)
            raise ValueError(f"{where} is no run that can be used: {said}") from error
    return config, provenance


def _digest(run: RunDirectory, split: dict[str, Any]) -> str:
    """Return the digest of the split of a run, read as one of images of the classes that it names itself."""
    names = [str(name) for part in splits.PARTS for name in split[part]] if set(splits.PARTS) <= set(split) else []
    if len(set(names)) != len(names) or not names:
        raise ValueError("split.json has no classes, or one of them twice")
    blank, labels = np.zeros((len(names), 1, 1, 1), np.uint8), np.arange(len(names))
    images = image_set("the file", blank, labels, names, groups=[""] * len(names), note="")
    return splits.read(run.split, images).digest


def _write(out: Path, content: Content, meta: Params) -> None:
    """Make the folder of the run, all at once."""
    whole = out.resolve()
    making = RunDirectory(whole.with_name(f".{whole.name}.{os.getpid()}.partial"))
    try:
        making.path.mkdir(parents=True)
        _write_texts(making, content)
        save_meta(making.meta, meta, step=content.step)
        write(making.finished, json.dumps({"steps": content.step, "evaluation": ""}, indent=1) + "\n")
        if whole.is_dir():
            whole.rmdir()  # empty, or this fails
        making.path.rename(whole)
    finally:
        shutil.rmtree(making.path, ignore_errors=True)


def _write_texts(run: RunDirectory, content: Content) -> None:
    """Write the configuration and the split as `run_directory.create` does."""
    write(run.config, json.dumps(content.config, indent=2) + "\n")
    if content.split is not None:
        write(run.split, json.dumps(content.split, indent=0, ensure_ascii=False) + "\n")


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def _count(of: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in of.values())
