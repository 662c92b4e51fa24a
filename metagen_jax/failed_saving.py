"""Savings that orbax cannot finish: one error, with the system's code, instead of a traceback for every array."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keep what orbax and TensorStore print of a saving that fails off standard error: it is raised as well.

    There would be a traceback for every array that was under way: of orbax's in its log, of TensorStore's as what
    cannot be raised any more, since the loop that awaited it is closed. Those come for a while after the error.
    """
    log, before = logging.getLogger("absl"), sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    def others(record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname

    log.addFilter(others)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        log.removeFilter(others)
        if sys.unraisablehook is hook:
            sys.unraisablehook = before


def of_system(error: Exception, path: Path) -> Exception:
    """Return the error of the system for which a saving failed, or what it was where the system had none.

    Args:
        error: of orbax; one of TensorStore's is a `ValueError` with the code in its text.
        path: where the saving was to be.

    Example:
        >>> of_system(ValueError("RESOURCE_EXHAUSTED: Failed to write [os_error_code='28']"), Path("checkpoints"))
        OSError(28, 'No space left on device')
    """
    found = re.search(r"os_error_code='(\d+)'", str(error))
    code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    return error if code is None else OSError(code, os.strerror(code), str(path))
