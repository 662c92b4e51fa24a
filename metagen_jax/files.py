"""Files from outside, read with suspicion: nothing hangs, is unpickled, or takes the memory that a file claims to need.

What is read is a regular file (a pipe or a device may never end), of a bounded size; what a header claims is compared
with the bytes that are there before anything is made of it. Every complaint is a `ValueError` with a reason of one
line, to which whoever reads adds what the file should have been.
"""

import io
import json
import math
import os
import stat
import zipfile
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

MAX_TEXT = 1 << 28  # bytes of a text; a million lines of metrics.jsonl are fewer
MAX_DEPTH = 32  # of nested JSON; what this package writes has less than ten, and Python itself gives up near a thousand
MAX_MEMBER, MAX_RATIO = 1 << 30, 1000  # a larger member of an archive that is compressed more than so is a bomb
KINDS = "biufcUSV"  # of arrays: numbers, texts, and the raw bytes in which NumPy keeps bfloat16


class Claim(NamedTuple):
    """What the header of an array says of it."""

    shape: tuple[int, ...]
    in_columns: bool
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def shown(value: object, limit: int = 300) -> str:
    """Return a path or a text in one line that any terminal shows: control characters and lone surrogates escaped.

    Example:
        >>> shown("two\\nlines")
        'two\\\\nlines'
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(value))
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 3 :]}"


def expanded(path: Path | str) -> Path:
    """Return the path with ~ for a user's home.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{shown(path)} begins with the home of a user that is not here") from error


def is_folder(path: Path) -> bool:
    """Return whether this is a folder, or a link to one; a path that cannot be asked for (too long, say) is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def opened(path: Path | str, limit: int | None = None) -> BinaryIO:
    """Open a regular file for reading, without waiting for whoever writes into a pipe.

    Args:
        path: the file, or a link to it.
        limit: largest size, in bytes.

    Raises:
        ValueError: not there, not to be opened, no regular file, or too large.
    """
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:  # a null byte is a ValueError
        raise ValueError(reason(error)) from error
    file = None
    try:
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(
                "it is a folder" if stat.S_ISDIR(found.st_mode) else "it is a pipe or a device, not a file"
            )
        if limit is not None and found.st_size > limit:
            raise ValueError(f"it has {found.st_size:,} bytes, more than the {limit:,} allowed")
        file = os.fdopen(number, "rb")
    finally:
        if file is None:
            os.close(number)
    return file


def content(path: Path | str, limit: int = MAX_TEXT) -> bytes:
    """Return the bytes of a regular file; raises `ValueError` as `opened` does."""
    with opened(path, limit) as file:
        try:
            return file.read(limit + 1)
        except OSError as error:
            raise ValueError(reason(error)) from error


def text(path: Path | str, limit: int = MAX_TEXT) -> str:
    """Return the text of a regular file in UTF-8; raises `ValueError` as `opened` does, and for other bytes."""
    try:
        return content(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text in UTF-8 (byte {error.start})") from error


def parsed(source: str) -> Any:
    """Return what a JSON text says.

    Raises:
        ValueError: not JSON, nested too deeply, a number of too many digits, or an object that has a key twice.
    """
    try:
        value = json.loads(source, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(reason(error)) from error
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _inside(outer)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
    return value


def json_object(path: Path | str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: as `opened`, `text` and `parsed`, or another value than an object.
    """
    value = parsed(text(path))
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {shown(json.dumps(value), 40)}")
    return value


def array(path: Path | str) -> np.ndarray:
    """Return the array of a .npy file.

    Raises:
        ValueError: as `opened`, no such file, an array of objects or records, or another size than its header claims.
    """
    with opened(path) as file:
        return _array(file, os.fstat(file.fileno()).st_size)


def arrays(path: Path | str) -> dict[str, np.ndarray]:
    """Return the arrays of a .npz file by name.

    Raises:
        ValueError: as `opened`, no such archive, a name that comes twice, a member that unpacks to far more than the
            file has, or one that `array` would refuse.
    """
    found: dict[str, np.ndarray] = {}
    with opened(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                names = [member.filename.removesuffix(".npy") for member in members]
                if len(set(names)) != len(names):
                    raise ValueError("it has two members of one name")
                size, packed = sum(m.file_size for m in members), os.fstat(file.fileno()).st_size
                if size > MAX_MEMBER and size > MAX_RATIO * packed:
                    raise ValueError(f"its {packed:,} bytes would unpack to {size:,}")
                for name, member in zip(names, members, strict=True):
                    try:
                        with archive.open(member) as stored:
                            found[name] = _array(stored, member.file_size)
                    except ValueError as error:
                        raise ValueError(f"{shown(name, 80)}: {error}") from error
        except ValueError:
            raise
        except Exception as error:  # zip and its packings each have their own
            raise ValueError(reason(error)) from error
    return found


def claim(file: IO[bytes], size: int) -> Claim:
    """Return what the header of an array of so many bytes, header included, claims; its data are not read.

    Raises:
        ValueError: no array, one of objects or records, or another size than its header claims.
    """
    return _claimed(file, size)[0]


def reason(error: BaseException) -> str:
    """Return what an error says, in one line: without the path, which the reader of the message knows."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown(" ".join(said.split())) or type(error).__name__


def _array(file: Any, size: int) -> np.ndarray:
    """Read an array of so many bytes, header included."""
    found, data = _claimed(file, size)
    try:
        if not found.size:
            return np.zeros(found.shape, found.dtype)
        whole = data + file.read(found.size - len(data))
        values = np.frombuffer(whole, found.dtype, count=math.prod(found.shape)).copy()
        return values.reshape(found.shape, order="F" if found.in_columns else "C")
    except Exception as error:  # cut off, damaged, of a packing that is not here, or beyond the memory
        raise ValueError(reason(error)) from error


def _claimed(file: Any, size: int) -> tuple[Claim, bytes]:
    """Return what the header of an array claims, and the data that were read with it."""
    try:
        beginning = io.BytesIO(file.read(1 << 15))  # a header has at most 10,000 bytes
        version = np.lib.format.read_magic(beginning)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"it has version {version} of the format")
        shape, in_columns, dtype = readers[version](beginning)
    except Exception as error:  # a header is a Python literal, with all that parsing one may raise
        raise ValueError(f"it is not an array file: {reason(error)}") from error
    if dtype.hasobject or dtype.names is not None or dtype.kind not in KINDS:
        raise ValueError(f"it holds objects or records ({shown(dtype, 60)}), not plain numbers")
    if any(isinstance(length, bool) or length < 0 for length in shape):
        raise ValueError(f"its header claims a shape of {shown(shape, 60)}")
    found, there = Claim(shape, in_columns, dtype), size - beginning.tell()
    if found.size != there:
        raise ValueError(f"its header claims {shown(shape, 60)} of {dtype}, {found.size:,} bytes; there are {there:,}")
    return found, beginning.read()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {shown(next(n for n in names if names.count(n) > 1), 60)!r} twice")
    return values


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
