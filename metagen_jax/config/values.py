"""Refusing a record with values of the wrong type, or whole numbers that no array could hold."""

import dataclasses
import math
import types
import typing
from typing import Any, Literal, Union

LARGEST = 2**31 - 1  # whole numbers on a device have 32 bits
LARGEST_SEED = 2**63 - 1


def check_values(record: Any) -> None:
    """Raise `ValueError`, which names the field, unless every field of a dataclass is what its annotation says.

    A number may stand for a float, which must be finite, a whole number has 32 bits (a seed: 64), and a record within
    the record is looked at in the same way.

    Example:
        >>> from metagen_jax.config import DataConfig, TrainConfig
        >>> check_values(TrainConfig(data=DataConfig(size="28")))
        Traceback (most recent call last):
        ValueError: data.size is '28', expected int
        >>> from metagen_jax.config import OuterConfig
        >>> check_values(TrainConfig(outer=OuterConfig(steps=10**10)))
        Traceback (most recent call last):
        ValueError: outer.steps must lie between -2147483648 and 2147483647, got 10000000000
    """
    _check(record, "")


def _check(record: Any, prefix: str) -> None:
    for name, hint in typing.get_type_hints(type(record)).items():
        value = getattr(record, name)
        if dataclasses.is_dataclass(hint) and isinstance(value, hint):  # type: ignore[arg-type]
            _check(value, f"{prefix}{name}.")
            continue
        largest = LARGEST_SEED if name == "seed" else LARGEST
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not -largest - 1 <= number <= largest:
                said = str(number) if abs(number) < 10**20 else "a number of more than 20 digits"
                raise ValueError(f"{prefix}{name} must lie between {-largest - 1} and {largest}, got {said}")
        if not _is(value, hint):
            shown, expected = repr(value), hint.__name__ if isinstance(hint, type) else str(hint)
            shown = shown if len(shown) < 80 else shown[:77] + "..."
            raise ValueError(f"{prefix}{name} is {shown}, expected {expected.replace('typing.', '')}")


def _is(value: Any, hint: Any) -> bool:
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if kind in (Union, types.UnionType):
        return any(_is(value, part) for part in parts)
    if kind is tuple:
        each = (parts[0],) * len(value) if isinstance(value, tuple) and parts[-1] is Ellipsis else parts
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_is, value, each))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint is int:
        return type(value) is int
    return isinstance(value, hint) if isinstance(hint, type) else True
