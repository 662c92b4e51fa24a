"""Checkpoints: the training state by orbax, which alone is known here, and meta-parameters as one plain array file.

A training state is what a run needs to go on; it is saved in the background and restored only onto a state of the same
shapes. Meta-parameters are what everything else needs: a .npz file with one array for each parameter under its path
(`decoder.hidden_0.kernel`) and a JSON header, no pickle.
"""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from metagen_jax.train import TrainState
from metagen_jax.types import ArrayTree

FORMAT = 1


class Checkpoints:
    """The training states of one run; as a context manager, leaving it waits for the last one to be written."""

    def __init__(self, path: Path | str, *, max_to_keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, create=True)
        self.path = Path(path).expanduser().absolute()
        self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=ocp.StandardCheckpointHandler())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, state: TrainState) -> None:
        """Save under the state's step, in the background; the state may be donated as soon as this returns."""
        step = int(state.step)
        if step not in self._manager.all_steps():
            owned = jax.block_until_ready(jax.tree.map(jnp.copy, state))  # on a CPU orbax would read donated memory
            self._manager.save(step, args=ocp.args.StandardSave(owned))

    def latest(self) -> int | None:
        """Return the last step that was saved whole, None if there is none."""
        return self._manager.latest_step()

    def restore(self, target: TrainState, step: int | None = None) -> TrainState:
        """Return a saved state, the latest unless a step is given.

        Args:
            target: of the same shapes: a state, or `jax.eval_shape(init_state, ...)`.
            step: which.

        Raises:
            ValueError: no checkpoint, one that cannot be read, or one of other shapes.
        """
        self._manager.wait_until_finished()
        steps = self._manager.all_steps()
        step = self.latest() if step is None else step
        if step is None or step not in steps:
            raise ValueError(
                f"{self.path} has no checkpoint{'' if step is None else f' of step {step}'}; steps: {steps}"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
        try:
            stored = _shapes(self._manager.item_metadata(step).tree)
        except Exception as error:  # orbax has many: every one means that this is no checkpoint
            raise ValueError(f"the checkpoint of step {step} in {self.path} is damaged ({error}); delete it") from error
        _check(f"the checkpoint of step {step} in {self.path}", _shapes(jax.tree.map(_data, abstract)), stored)
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except Exception as error:
            raise ValueError(f"the checkpoint of step {step} in {self.path} is damaged ({error}); delete it") from error


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
