"""Checkpoints: the training state by orbax, which alone is known here.

A training state is what a run needs to go on; it is saved in the background and restored only onto a state of the same
shapes. With it goes a seal: the schema, the versions of the packages and a checksum of every file, so that a checkpoint
that was half written, cut short or overwritten is known for what it is, and the one before it is used.
"""

import contextlib
import functools
import json
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from orbax.checkpoint.options import MultiprocessingOptions

from metagen_jax.failed_saving import of_system, silenced
from metagen_jax.parameters import check_shapes, shapes
from metagen_jax.sharding import bits, here, of_bits
from metagen_jax.train import TrainState

SCHEMA = 2  # of checkpoints
PACKAGES = ("metagen-jax", "jax", "jaxlib", "orbax-checkpoint", "optax", "numpy")
SEAL = "whole.json"  # in the folder of a checkpoint
ITEM = "default"  # folder of the state beside it, as orbax has it
TEMPORARY = ".orbax-checkpoint-tmp"  # in the names of folders that are being written
DISCARD_TRIES, DISCARD_PAUSE = 20, 0.05  # at taking those away, and seconds between


class Damaged(ValueError):
    """A checkpoint is not whole."""


class Checkpoints:
    """The training states of one run; as a context manager, leaving it waits for the last one to be written.

    What cannot be written, for a full disk say, is an `OSError` with the system's code: of the next `save` or `wait`,
    or on leaving, where no other error is on its way. Nothing half-written has the name of a checkpoint then, and what
    else was written of it is taken away, at the latest by the next `discard_after`.

    They are those of one process, which alone opens the folder, and are whole in it whatever devices they were on.
    """

    def __init__(self, path: Path | str, *, max_to_keep: int = 2, best: Literal["min", "max"] | None = None):
        """Open a folder, or make it.

        Args:
            path: the folder.
            max_to_keep: of the newest.
            best: also keep the one of the smallest or the largest metric that was given to `save`.
        """
        newest = LatestN(max_to_keep)
        how: dict[str, Any] = {"preservation_policy": newest}
        if best is not None:
            kept = BestN(get_metric_fn=_metric, reverse=best == "min", n=1, keep_checkpoints_without_metrics=False)
            policy = AnyPreservationPolicy([newest, kept])
            how = {"preservation_policy": policy, "best_fn": _metric, "best_mode": best}
        alone = MultiprocessingOptions()
        if jax.process_count() > 1:  # the folder is this process's, and the others wait for nothing
            me = jax.process_index()
            alone = MultiprocessingOptions(
                primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process_{me}"
            )
        # Where a folder cannot be made, orbax's threads would wait twenty minutes for the one that was to make it.
        sealing = ocp.AsyncOptions(post_finalization_callback=self._seal, create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(
            create=False, async_options=sealing, multiprocessing_options=alone, **how
        )
        self.path = Path(path).expanduser().absolute()
        self.path.mkdir(parents=True, exist_ok=True)
        self._unsealed: list[int] = []
        self._quiet = contextlib.ExitStack()
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=handler)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed = None
        for _ in range(4):  # orbax raises each error once, and stops closing for it
            try:
                self._manager.close()
                break
            except Exception as found:
                failed = failed or found
        if failed is None and error is None:
            self._quiet.close()
        if failed is not None or isinstance(error, OSError):
            self._discard_halves()
        if failed is not None and not isinstance(error, Exception):  # but of a signal, which says that all is saved
            raise of_system(failed, self.path) from failed

    def save(self, state: TrainState, *, metric: float | None = None) -> None:
        """Save under the state's step, in the background; the state may be donated as soon as this returns.

        Args:
            state: to save, whole on every device; a step that is there already is not saved again.
            metric: by which the best is kept.

        Raises:
            OSError: the one before this could not be written, or this one cannot be begun.
        """
        step = int(state.step)
        if step not in self.steps():
            owned = jax.tree.map(_on_host, state)
            self.wait()
            self._unsealed = [step]
            self._quiet.enter_context(silenced())
            with self._speaking():
                self._manager.save(
                    step,
                    args=ocp.args.StandardSave(owned),
                    metrics=None if metric is None else {"metric": float(metric)},
                    force=True,
                )

    def wait(self) -> None:
        """Wait until what was saved is written.

        Raises:
            OSError: it could not be.
        """
        with self._speaking():
            self._manager.wait_until_finished()
        self._quiet.close()

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
        self._discard_halves()
        self._manager.reload()

    def _discard_halves(self) -> None:
        """Take away what was left by savings that were cut off; what cannot be taken away is never read.

        A saving that failed in one thread may still be writing in another, into a folder that is being removed or was:
        once there was one, it has to be gone at two looks in a row.
        """
        gone = 1
        for _ in range(DISCARD_TRIES):
            with contextlib.suppress(OSError):
                halves = [entry for entry in self.path.iterdir() if entry.is_dir() and TEMPORARY in entry.name]
                gone = 0 if halves else gone + 1
                if gone == 2:
                    return
                for entry in halves:
                    shutil.rmtree(entry, ignore_errors=True)
            time.sleep(DISCARD_PAUSE)

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        """Raise what orbax raises as what it came from."""
        try:
            yield
        except Exception as error:
            raise of_system(error, self.path) from error

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
        wanted = jax.tree.map(_stored, target)
        try:
            stored = shapes(self._manager.item_metadata(step).tree)
        except Exception as error:  # orbax has many: every one means that this is no checkpoint
            raise _damaged(where, error) from error
        check_shapes(where, shapes(wanted), stored)
        try:
            found = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
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


def _on_host(leaf: Any) -> np.ndarray:
    """Return a copy of a leaf that is whole on every device, in the form in which it is stored: of a key, its data."""
    return np.array(bits(here(leaf)))


def _stored(leaf: Any) -> np.ndarray:
    """Return an array of the shape and dtype in which a leaf is stored."""
    shape = jax.eval_shape(bits, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return np.empty(shape.shape, shape.dtype)


def _placed(target: Any, found: np.ndarray) -> Any:
    """Return a leaf where the target's is, or bound to no device where that has no place, as if it was just made."""
    leaf = of_bits(jnp.array(found), target)  # a copy, so that it may be donated
    sharding = getattr(target, "sharding", None)
    return leaf if sharding is None else jax.device_put(leaf, sharding)


@functools.cache
def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}
