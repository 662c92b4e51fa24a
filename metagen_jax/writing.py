"""JSON records and texts, written whole or not at all, with errors that name the file."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON object as a line, by one write; what is not finite becomes null, arrays become lists.

    Raises:
        OSError: the line could not be written whole, and none of it is there (a full disk).
    """
    line = (json.dumps(jsonable(record), allow_nan=False) + "\n").encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        with located(path):
            before = os.fstat(file).st_size
            if os.write(file, line) != len(line):
                os.ftruncate(file, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(file)


def write(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        OSError: it cannot be written, and what was there is there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with located(path), temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def located(path: Path) -> Iterator[None]:
    """Let an `OSError` of the block that names no file, as those of a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


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
