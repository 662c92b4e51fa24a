"""What a person is told on standard error, one line for each matter."""

import errno
import sys

import jax

MEMORY = (
    "out of memory{detail}; `metagen plan` with the same options says how much a meta-step takes. It takes less with "
    "--outer.task-chunk 1 (one task at a time), --inner.remat step (inner steps are computed again instead of kept), "
    "the learner fomaml (no second derivatives), fewer --outer.tasks or a smaller --network.hidden. What was saved is "
    "kept"
)
LOST = (
    "another process of this run ended or cannot be reached, and says why itself ({detail}); what process 0 saved is "
    "kept: go on with metagen train --resume RUN and the same --distributed options in every process"
)
GO_ON = "then give the command again, or go on with a run that had begun: metagen train --resume RUN"
FULL = (
    "{detail}: the disk is full, or a quota, or the size that a file may have is reached; what was saved before is "
    f"kept. Make room, {GO_ON}"
)
READ_ONLY = (
    "{detail}: nothing can be written there; what was saved before is kept. Make it writable, or choose another place, "
    f"{GO_ON}"
)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def warn(text: str) -> None:
    """Say what a person should know, in one line."""
    print(f"metagen: {text}", file=sys.stderr, flush=True)


def cannot_be_written(error: BaseException) -> bool:
    """Whether the place that something was to be written to failed, and not what was asked for."""
    return isinstance(error, OSError) and error.errno in (*NO_ROOM, errno.EROFS)


def explained(error: BaseException) -> str:
    """Return what happened and what to do, where the error does not say it by itself."""
    text = str(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and ("RESOURCE_EXHAUSTED" in text or "ut of memory" in text)
    ):
        return MEMORY.format(detail=f" ({_first_line(text)})" if text else "")
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return FULL.format(detail=text)
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return READ_ONLY.format(detail=text)
    if jax.distributed.is_initialized() and any(word in text for word in ("Gloo", "NCCL", "oordination service")):
        return LOST.format(detail=_first_line(text))
    if isinstance(error, jax.errors.JaxRuntimeError):
        return f"{_first_line(text)}; --traceback shows where"
    return text


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:200] if lines else ""
