"""Array files: named arrays and a text of header in one file, whose claims are tested before memory is spent on them.

By its suffix a file is

    .npz            a zip of .npy members, uncompressed; the header is the member `header`, a string
    .safetensors    that format (extra: export); the header is the entry `header` of its metadata

A file may come from anyone. No pickle is read, nothing in a file is run and no name in it becomes a path; shapes and
types are read first and alone, and what an array claims to take is refused unless the file is as large as that.

Source of the second format: Hugging Face, safetensors, "Format", 2022.
"""

import contextlib
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from metagen_jax import files

SUFFIXES = (".npz", ".safetensors")
TYPES = ("bfloat16", "float16", "float32", "float64")
HEADER = "header"
_TAKEN = (HEADER, "file", "allow_pickle")  # names that `numpy.savez` has for itself
_SHORT = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


class ArrayFile(NamedTuple):
    """An open file, of which only what it says of itself has been read."""

    header: str
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]  # names of NumPy's
    read: Callable[[str], np.ndarray]  # name -> array


def suffix_of(path: Path) -> str:
    """Return which kind of file this is, `.npz` or `.safetensors`.

    Raises:
        ValueError: another suffix.
        ImportError: safetensors, and that is not installed.
    """
    if (suffix := path.suffix.lower()) not in SUFFIXES:
        raise ValueError(f"parameters are kept in files that end in {' or '.join(SUFFIXES)}; got {path}")
    if suffix == ".safetensors":
        _safetensors()
    return suffix


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], header: str) -> None:
    """Write an array file, whole or not at all; one that is there is written over.

    Raises:
        ValueError: another suffix, or arrays that are not numbers of `TYPES`.
        ImportError: safetensors is not installed.
    """
    suffix = suffix_of(path)
    for name, array in arrays.items():
        if array.dtype.name not in TYPES:
            raise ValueError(f"{name} is {array.dtype.name}, and {path} can hold {', '.join(TYPES)}")
        if suffix == ".npz" and name in _TAKEN:
            raise ValueError(f"{path} can hold no array of the name {name!r}; use another name, or .safetensors")
    plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.partial{suffix}")
    try:
        if suffix == ".npz":
            np.savez(temporary, header=header, **plain)  # type: ignore[arg-type]
        else:
            _safetensors().numpy.save_file(plain, temporary, metadata={HEADER: header})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[ArrayFile]:
    """Open an array file; no array is read before `read`.

    Raises:
        Exception: of whatever kind, where it is no such file, is damaged, or claims what it does not hold.
    """
    with _npz(path) if suffix_of(path) == ".npz" else _tensors(path) as file:
        yield file


class _Claim(NamedTuple):
    """What the header of a .npy member claims; its member is as large as that."""

    shape: tuple[int, ...]
    type: str


@contextlib.contextmanager
def _npz(path: Path) -> Iterator[ArrayFile]:
    with files.opened(path) as raw, zipfile.ZipFile(raw) as archive:
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise ValueError("a name is there twice")
        if sum(member.file_size for member in members.values()) > path.stat().st_size:
            raise ValueError("its members are larger than the file")
        claims = {name: _claim(archive, member) for name, member in members.items()}
        text = claims.pop(HEADER)
        if text.shape or not text.type.startswith("str"):
            raise ValueError("its header is not one string")

        def read(name: str) -> np.ndarray:
            with archive.open(members[name]) as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
            return array.view(jnp.bfloat16) if claims[name].type == "bfloat16" else array

        with archive.open(members[HEADER]) as member:
            header = str(np.lib.format.read_array(member, allow_pickle=False))
        yield ArrayFile(
            header, {name: claim.shape for name, claim in claims.items()}, {n: c.type for n, c in claims.items()}, read
        )


def _claim(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> _Claim:
    """Return what the header of a member says; refused unless the member holds exactly that, uncompressed."""
    if not member.filename.endswith(".npy") or member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{member.filename} is not an uncompressed array")
    if member.compress_size != member.file_size:
        raise ValueError(f"{member.filename} has two sizes")
    with archive.open(member) as file:
        try:
            found = files.claim(file, member.file_size)
        except ValueError as error:
            raise ValueError(f"{member.filename}: {error}") from error
    return _Claim(found.shape, "bfloat16" if found.dtype == np.dtype("V2") else found.dtype.name)


@contextlib.contextmanager
def _tensors(path: Path) -> Iterator[ArrayFile]:
    with files.opened(path) as raw:  # which knows a pipe from a file
        length = int.from_bytes(raw.read(8), "little")
        if length > min(os.fstat(raw.fileno()).st_size, files.MAX_TEXT):
            raise ValueError("its header is longer than the file")
        files.parsed(raw.read(length).decode())  # which refuses a name that is there twice
    with _safetensors().safe_open(path, framework="numpy") as file:  # which holds offsets and sizes against the file
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        types = {name: _SHORT.get(entry.get_dtype(), entry.get_dtype()) for name, entry in slices.items()}
        lengths = {name: tuple(entry.get_shape()) for name, entry in slices.items()}
        yield ArrayFile(file.metadata()[HEADER], lengths, types, file.get_tensor)


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("files of safetensors need that package: pip install 'metagen-jax[export]'") from error
    return safetensors
