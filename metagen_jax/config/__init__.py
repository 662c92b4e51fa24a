"""The configuration of a run: frozen records that the command line fills and `config.json` keeps."""

from metagen_jax.config.checks import check
from metagen_jax.config.defaults import for_learner, given, resolve
from metagen_jax.config.names import (
    ALL_GAMES,
    CONDITIONAL,
    HEADS,
    INNER_READ,
    LEARNERS,
    MEASURED,
    MODELS,
    READS,
    SECOND_ORDER,
    known,
)
from metagen_jax.config.records import (
    AdversarialConfig,
    ChoiceConfig,
    ConditionalConfig,
    DataConfig,
    GeneratedConfig,
    InnerConfig,
    Loss,
    ModelConfig,
    OuterConfig,
    Strategy,
    TrainConfig,
)
from metagen_jax.config.text import SCHEMA, from_json, to_json

__all__ = [
    "ALL_GAMES",
    "CONDITIONAL",
    "HEADS",
    "INNER_READ",
    "LEARNERS",
    "MEASURED",
    "MODELS",
    "READS",
    "SCHEMA",
    "SECOND_ORDER",
    "AdversarialConfig",
    "ChoiceConfig",
    "ConditionalConfig",
    "DataConfig",
    "GeneratedConfig",
    "InnerConfig",
    "Loss",
    "ModelConfig",
    "OuterConfig",
    "Strategy",
    "TrainConfig",
    "check",
    "for_learner",
    "from_json",
    "given",
    "known",
    "resolve",
    "to_json",
]
