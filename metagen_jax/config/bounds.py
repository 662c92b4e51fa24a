"""Refusing whole numbers that no array could hold, wherever they are in a record."""

import dataclasses
from typing import Any

LARGEST = 2**31 - 1  # whole numbers on a device have 32 bits
LARGEST_SEED = 2**63 - 1


def check_bounds(record: Any, prefix: str = "") -> None:
    """Raise `ValueError`, which names the field, where a whole number in a dataclass is beyond 32 bits (a seed: 64).

    Example:
        >>> from metagen_jax.config import OuterConfig, TrainConfig
        >>> check_bounds(TrainConfig(outer=OuterConfig(steps=10**10)))
        Traceback (most recent call last):
        ValueError: outer.steps must lie between -2147483648 and 2147483647, got 10000000000
    """
    for field in dataclasses.fields(record):
        value, name = getattr(record, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{name}.")
        largest = LARGEST_SEED if field.name == "seed" else LARGEST
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not -largest - 1 <= number <= largest:
                said = str(number) if abs(number) < 10**20 else "a number of more than 20 digits"
                raise ValueError(f"{name} must lie between {-largest - 1} and {largest}, got {said}")
