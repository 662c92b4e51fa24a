"""Task families: distributions of tasks in two stages, a small description first, then the task.

A description ("spec") is the class ids [way] of a task. Samplers reason about descriptions; `make` turns one into
examples on the device. Both run inside jit, and the data is an argument, so that it is never baked into a program.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from metagen_jax.types import Array, Key, Task

Spec = Array  # [way] int32, class ids


class TaskFamily(NamedTuple):
    """A distribution over tasks."""

    data: Any  # arrays on the device (or nothing, for procedural tasks)
    describe: Callable[[Any, Key], Spec]  # (data, key) -> spec
    make: Callable[[Any, Key, Spec], Task]  # (data, key, spec) -> task


def shot_range(shot: int | tuple[int, int]) -> tuple[int, int]:
    """Return (smallest, largest) number of support examples per class.

    Raises:
        ValueError: a negative number, or the range upside down.
    """
    low, high = (shot, shot) if isinstance(shot, int) else shot
    if low < 0 or high < low:
        raise ValueError(f"expected a number of shots of at least 0, or (smallest, largest), got {shot}")
    return low, high
