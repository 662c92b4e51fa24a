"""Checkpoints: the training state by orbax, which alone is known here, and meta-parameters as one plain array file.

A training state is what a run needs to go on; it is saved in the background and restored only onto a state of the same
shapes. With it goes a seal: the schema, the versions of the packages and a checksum of every file, so that a checkpoint
that was half written, cut short or overwritten is known for what it is, and the one before it is used.

Meta-parameters are what everything else needs: a .npz file with one array for each parameter under its path
(`decoder.hidden_0.kernel`) and a JSON header, no pickle.
"""

import functools
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from metagen_jax.train import TrainState
from metagen_jax.types import ArrayTree

FORMAT = 1  # of files of meta-parameters
SCHEMA = 1  # of checkpoints
PACKAGES = ("metagen-jax", "jax", "jaxlib", "orbax-checkpoint", "optax", "numpy")
SEAL = "whole.json"  # in the folder of a checkpoint
ITEM = "default"  # folder of the state beside it, as orbax has it
TEMPORARY = ".orbax-checkpoint-tmp"  # in the names of folders that are being written


class Damaged(ValueError):
    """A checkpoint is not whole."""


class Checkpoints:
    """The training states of one run; as a context manager, leaving it waits for the last one to be written."""

    def __init__(self, path: Path | str, *, max_to_keep: int = 2, best: Literal["min", "max"] | None = None):
        """Open a folder, or make it.

        Args:
            path: the folder.
            max_to_keep: of the newest.
            best: also keep the one of the smallest or the largest metric that was given to `save`.
        """
        newest = LatestN(max_to_keep)
        sealing = ocp.AsyncOptions(post_finalization_callback=self._seal)
        options = ocp.CheckpointManagerOptions(create=True, preservation_policy=newest, async_options=sealing)
        if best is not None:
            kept = BestN(get_metric_fn=_metric, reverse=best == "min", n=1, keep_checkpoints_without_metrics=False)
            options = ocp.CheckpointManagerOptions(
                create=True,
                async_options=sealing,
                best_fn=_metric,
                best_mode=best,
                preservation_policy=AnyPreservationPolicy([newest, kept]),
            )
        self.path = Path(path).expanduser().absolute()
        self._unsealed: list[int] = []
        self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=ocp.StandardCheckpointHandler())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, state: TrainState, *, metric: float | None = None) -> None:
        """Save under the state's step, in the background; the state may be donated as soon as this returns.

        Args:
            state: to save; a step that is there already is not saved again.
            metric: by which the best is kept.
        """
        step = int(state.step)
        if step not in self.steps():
            owned = jax.block_until_ready(jax.tree.map(jnp.copy, state))  # on a CPU orbax would read donated memory
            self.wait()
            self._unsealed.append(step)
            self._manager.save(
                step,
                args=ocp.args.StandardSave(owned),
                metrics=None if metric is None else {"metric": float(metric)},
                force=True,
            )

    def wait(self) -> None:
        """Wait until what was saved is written."""
        self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints that are there, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Return the last step that was saved, None if there is none."""
        return self._manager.latest_step()

    def restore(
        self, target: TrainState, step: int | None = None, *, warn: Callable[[str], None] = warnings.warn
    ) -> TrainState:
        """Return a saved state: that of the step, or the newest one that is whole.

        Args:
            target: of the same shapes: a state, or `jax.eval_shape(init_state, ...)`. Where its leaves have a sharding,
                that is how they are restored, whatever devices they were saved on; else they are where jax puts them.
            step: which.
            warn: told of every newer checkpoint that is not whole and was skipped, in one line.

        Raises:
            ValueError: no checkpoint, none that is whole, or one of other shapes or another schema.
        """
        self.wait()
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            raise ValueError(
                f"{self.path} has no checkpoint{'' if step is None else f' of step {step}'}; steps: {steps}"
            )
        if step is not None:
            return self._restore(target, step)
        for tried in reversed(steps):
            try:
                return self._restore(target, tried)
            except Damaged as error:
                last = error
                if tried != steps[0]:
                    warn(f"{error}; using the one before it")
        if len(steps) == 1:
            raise last
        raise ValueError(f"none of the {len(steps)} checkpoints in {self.path} is whole (steps {steps}): {last}")

    def discard_after(self, step: int) -> None:
        """Take away every later checkpoint, whole or not, and what was left by savings that were cut off.

        For a run that goes on from that step, and will save the later ones again; nobody else may be writing.
        """
        self.wait()
        for later in [found for found in self.steps() if found > step]:
            shutil.rmtree(self.path / str(later))
        for entry in self.path.iterdir():
            if entry.is_dir() and TEMPORARY in entry.name:
                shutil.rmtree(entry)
        self._manager.reload()

    def _seal(self) -> None:
        """Seal what was just written; orbax calls this in the background, before the folder gets its final name."""
        while self._unsealed:
            path = max(self.path.glob(f"{self._unsealed.pop(0)}{TEMPORARY}*"), key=lambda entry: entry.stat().st_mtime)
            content = {"schema": SCHEMA, "versions": _versions(), "files": _checksums(path)}
            (path / SEAL).write_text(json.dumps(content, indent=1), encoding="utf-8")

    def _restore(self, target: TrainState, step: int) -> TrainState:
        where = f"the checkpoint of step {step} in {self.path}"
        try:
            seal = _unbroken(self.path / str(step))
            schema, versions = seal["schema"], seal["versions"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(where, error) from error
        if schema != SCHEMA:
            raise ValueError(f"{where} has schema {schema}, this version reads {SCHEMA}; use what wrote it: {versions}")
        abstract = jax.tree.map(_abstract, target)
        try:
            stored = _shapes(self._manager.item_metadata(step).tree)
        except Exception as error:  # orbax has many: every one means that this is no checkpoint
            raise _damaged(where, error) from error
        _check(where, _shapes(jax.tree.map(_data, abstract)), stored)
        try:
            found = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:
            raise _damaged(where, error) from error
        return jax.tree.map(_placed, target, found)


def _damaged(where: str, reason: object) -> Damaged:
    text = str(reason).strip() or type(reason).__name__
    short = " ".join(text.split())
    return Damaged(f"{where} is damaged ({short if len(short) < 160 else short[:157] + '...'})")


def _checksums(path: Path) -> dict[str, int]:
    """Return a CRC-32 of every file of the state in a checkpoint, by its path."""
    files = sorted(entry for entry in (path / ITEM).rglob("*") if entry.is_file())
    return {entry.relative_to(path).as_posix(): zlib.crc32(entry.read_bytes()) for entry in files}


def _unbroken(path: Path) -> dict[str, Any]:
    """Return the seal of a checkpoint, if everything is as it was when it was written.

    Raises:
        ValueError: it is not; other exceptions where there is no seal to read.
    """
    if not (path / SEAL).exists():
        raise ValueError(f"{SEAL} is missing")
    seal: dict[str, Any] = json.loads((path / SEAL).read_text(encoding="utf-8"))
    wanted, found = seal["files"], _checksums(path)
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            raise ValueError(f"{name} is {'missing' if name not in found else 'not what was written'}")
    return seal


def _metric(metrics: Any) -> float:
    return metrics["metric"]


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)


def _placed(target: Any, found: Any) -> Any:
    """Return a leaf that is bound to no device where the target's is not, as a state that was just made is."""
    if getattr(target, "sharding", None) is not None:
        return found
    if jnp.issubdtype(found.dtype, jax.dtypes.prng_key):
        bits = jnp.array(np.asarray(jax.random.key_data(found)))
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(found))
    return jnp.array(np.asarray(found))  # a copy, so that it may be donated


@functools.cache
def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def save_meta(path: Path, meta: ArrayTree, **header: Any) -> None:
    """Write parameters as one array file, whole or not at all; `header` is any JSON (the step, say)."""
    arrays = {name: np.asarray(leaf) for name, leaf in _flat(meta).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.partial.npz")
    np.savez(temporary, header=json.dumps({"format": FORMAT, **header}), **arrays)  # type: ignore[arg-type]
    temporary.replace(path)


def load_meta(path: Path, target: ArrayTree) -> tuple[Any, dict[str, Any]]:
    """Read what `save_meta` wrote.

    Args:
        path: the file.
        target: a tree of the same shapes: `jax.eval_shape(learner.init, key)`.

    Returns:
        The parameters, and the header.

    Raises:
        ValueError: no such file, damaged, of another format version, or of other shapes.
    """
    if not path.exists():
        raise ValueError(f"{path} is not there: the run was stopped before its first checkpoint; train again")
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(str(file["header"]))
            found = {name: file[name] for name in file.files if name != "header"}
            version = header["format"]
    except Exception as error:  # zip, JSON and NumPy each have their own
        raise ValueError(f"{path} is not a parameter file of this package, or is damaged ({error})") from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}, this version reads {FORMAT}; use the version that wrote it")
    wanted = _flat(target)
    _check(str(path), _shapes(target), {name: array.shape for name, array in found.items()})
    leaves = [jnp.asarray(found[name], wanted[name].dtype) for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(target), leaves), header


def _flat(tree: ArrayTree) -> dict[str, Any]:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}


def _shapes(tree: ArrayTree) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in _flat(tree).items()}


def _data(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Return the form in which a leaf is stored: typed keys as their data."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf


def _check(where: str, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    missing, surplus = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or surplus:
        raise ValueError(
            f"{where} holds other parameters than this configuration has: {len(missing)} are missing "
            f"({', '.join(missing[:3])}), {len(surplus)} are too many ({', '.join(surplus[:3])}); use the "
            "configuration and the version that wrote it"
        )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(
                f"{where} is of another shape: {name} has {list(found[name])}, this configuration has {list(shape)}; "
                "use the configuration that wrote it"
            )
