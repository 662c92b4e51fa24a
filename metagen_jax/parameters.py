"""Meta-parameters as one plain array file, which is what everything but going on with a training needs.

One array for each parameter under its path (`decoder.hidden_0.kernel`), and a JSON header, in a .npz or a .safetensors
file (`metagen_jax.array_files`). Names, shapes and types are compared with those wanted before any array is read.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.array_files import TYPES, ArrayFile, opened, suffix_of, write_arrays
from metagen_jax.files import parsed, reason
from metagen_jax.types import ArrayTree

FORMAT = 1

Shapes = dict[str, tuple[int, ...]]


def save_meta(path: Path, meta: ArrayTree, **header: Any) -> None:
    """Write parameters as one array file, whole or not at all.

    Args:
        path: ends in .npz or .safetensors; what is there is written over.
        meta: parameters, floating-point numbers of 16, 32 or 64 bits.
        header: any JSON (the step, say).

    Raises:
        ValueError: another suffix, or leaves that are no such numbers.
        ImportError: safetensors is not installed.
    """
    leaves = flat(meta)
    if keys := [name for name, leaf in leaves.items() if jnp.issubdtype(_type(leaf), jax.dtypes.prng_key)]:
        raise ValueError(f"{keys[0]} is a random key, and {path} can hold {', '.join(TYPES)}")
    arrays = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    write_arrays(path, arrays, json.dumps({"format": FORMAT, **header}))


def load_meta(path: Path, target: ArrayTree) -> tuple[Any, dict[str, Any]]:
    """Read what `save_meta` wrote.

    Args:
        path: the file.
        target: a tree of the same shapes and types: `jax.eval_shape(learner.init, key)`.

    Returns:
        The parameters, and the header.

    Raises:
        ValueError: no such file, another suffix, damaged, of another format version, or of other shapes or types.
        ImportError: safetensors is not installed.
    """
    wanted = flat(target)
    with _opened(path) as (file, header):
        check_shapes(str(path), shapes(target), file.shapes)
        for name, leaf in wanted.items():
            if file.types[name] != str(_type(leaf)):
                raise ValueError(
                    f"{path} holds numbers of another type: {name} is {file.types[name]}, this configuration has "
                    f"{_type(leaf)}; use the configuration that wrote it"
                )
        with _naming(path):
            leaves = [jnp.asarray(file.read(name).astype(leaf.dtype, copy=False)) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(target), leaves), header


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a file; no array is read.

    Raises:
        ValueError: no such file, another suffix, damaged, or of another format version.
        ImportError: safetensors is not installed.
    """
    with _opened(path) as (_, header):
        return header


def flat(tree: ArrayTree) -> dict[str, Any]:
    """Return every leaf under its path, the parts of which are joined by dots.

    Raises:
        ValueError: two leaves have the same path then.
    """
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}
    if len(named) != len(pairs):
        raise ValueError("two parameters have the same path; use names without dots")
    return named


def shapes(tree: ArrayTree) -> Shapes:
    """Return the shape of every leaf under its path."""
    return {name: tuple(leaf.shape) for name, leaf in flat(tree).items()}


def check_shapes(where: str, wanted: Shapes, found: Shapes) -> None:
    """Raise `ValueError`, which names what is off in `where`, unless these are the same names and shapes."""
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


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[ArrayFile, dict[str, Any]]]:
    """Open a file of this format version, whatever its kind, and give its header beside it."""
    suffix_of(path)
    if not path.exists():
        raise ValueError(f"{path} is not there: the run was stopped before its first checkpoint; train again")
    with contextlib.ExitStack() as stack:
        with _naming(path):
            file = stack.enter_context(opened(path))
            header = parsed(file.header)
            version = header["format"]
        if version != FORMAT:
            raise ValueError(f"{path} has format {version}, this version reads {FORMAT}; use the version that wrote it")
        yield file, header


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Raise `ValueError` with the path for whatever is raised inside: zip, JSON and NumPy each have their own."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} is not a parameter file of this package, or is damaged ({reason(error)})") from error


def _type(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
