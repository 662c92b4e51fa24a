"""The configuration as JSON text, the form in which a run keeps it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from metagen_jax.config.defaults import resolve
from metagen_jax.config.records import (
    AdversarialConfig,
    ChoiceConfig,
    ConditionalConfig,
    DataConfig,
    GeneratedConfig,
    InnerConfig,
    ModelConfig,
    OuterConfig,
    TrainConfig,
)
from metagen_jax.config.values import check_values
from metagen_jax.files import parsed

SCHEMA = 2


def to_json(config: TrainConfig) -> str:
    """Return the configuration as JSON text."""
    return json.dumps({"schema": SCHEMA, **dataclasses.asdict(config)}, indent=2)


def from_json(text: str, *, where: Path | str = "config") -> TrainConfig:
    """Read what `to_json` wrote.

    Raises:
        ValueError: not such a text, another schema, fields that this version does not know, or values of another type.
    """
    try:
        values = parsed(text)
        schema = values.pop("schema")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is not the configuration of a run ({error})") from error
    if schema != SCHEMA:
        raise ValueError(f"{where} has schema {schema}, this version reads {SCHEMA}; use the version that wrote it")
    try:
        nested = {
            "data": DataConfig,
            "network": ModelConfig,
            "inner": InnerConfig,
            "outer": OuterConfig,
            "adversarial": AdversarialConfig,
        }
        parts: dict[str, Any] = {name: record(**_tuples(values.pop(name), name)) for name, record in nested.items()}
        later = {  # which runs of an earlier version do not have
            "generated": GeneratedConfig,
            "choice": ChoiceConfig,
            "conditional": ConditionalConfig,
        }
        parts |= {name: record(**_tuples(values.pop(name, {}), name)) for name, record in later.items()}
        config = TrainConfig(**parts, **_tuples(values))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} does not fit this version ({error}); use the version that wrote it") from error
    try:
        check_values(config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return resolve(config)  # whatever an earlier version did not know of


def _tuples(values: Any, name: str = "the configuration") -> dict[str, Any]:
    if not isinstance(values, dict):
        raise TypeError(f"{name} must hold settings by name")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
