"""What a person is told on standard error, one line for each matter."""

import errno
import sys

import jax

MEMORY = (
    "out of memory{detail}; `metagen plan` with the same options says how much a meta-step takes. It takes less with "
    "--outer.task-chunk 1 (one task at a time), --inner.remat (inner steps are computed again instead of kept), the "
    "learner fomaml (no second derivatives), fewer --outer.tasks or a smaller --network.hidden. What was saved is kept"
)
LOST = (
    "another process of this run ended or cannot be reached, and says why itself ({detail}); what process 0 saved is "
    "kept: go on with metagen train --resume RUN and the same --distributed options in every process"
)
FULL = (
    "{detail}: the disk is full; what was saved before is kept. Make room, then go on with: metagen train --resume RUN"
)


def warn(text: str) -> None:
    """Say what a person should know, in one line."""
    print(f"metagen: {text}", file=sys.stderr, flush=True)


def explained(error: BaseException) -> str:
    """Return what happened and what to do, where the error does not say it by itself."""
    text = str(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, jax.errors.JaxRuntimeError) and ("RESOURCE_EXHAUSTED" in text or "ut of memory" in text)
    ):
        return MEMORY.format(detail=f" ({_first_line(text)})" if text else "")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return FULL.format(detail=text)
    if jax.distributed.is_initialized() and any(word in text for word in ("Gloo", "NCCL", "oordination service")):
        return LOST.format(detail=_first_line(text))
    if isinstance(error, jax.errors.JaxRuntimeError):
        return f"{_first_line(text)}; --traceback shows where"
    return text


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0][:200] if lines else ""
