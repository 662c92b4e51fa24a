"""Refusing a record with values of the wrong type, for a configuration that comes from elsewhere."""

import dataclasses
import math
import types
import typing
from typing import Any, Literal, Union


def check_types(record: Any) -> None:
    """Raise `ValueError`, which names the field, unless every field of a dataclass is what its annotation says.

    A number may stand for a float, which must be finite, and a record within the record is looked at in the same way.

    Example:
        >>> from metagen_jax.config import DataConfig, TrainConfig
        >>> check_types(TrainConfig(data=DataConfig(size="28")))
        Traceback (most recent call last):
        ValueError: data.size is '28', expected int
    """
    _check(record, "")


def _check(record: Any, prefix: str) -> None:
    for name, hint in typing.get_type_hints(type(record)).items():
        value = getattr(record, name)
        if dataclasses.is_dataclass(hint) and isinstance(value, hint):  # type: ignore[arg-type]
            _check(value, f"{prefix}{name}.")
        elif not _is(value, hint):
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
