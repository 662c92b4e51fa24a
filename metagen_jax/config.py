"""Configuration of a run: frozen records that the command line fills and `config.json` keeps.

Losses are nats per image summed over pixels, and the inner rates are for that unit.
"""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any, Literal

LEARNERS = ("maml", "fomaml", "reptile", "anil", "meta_sgd", "joint")
MODELS = ("vae",)
SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What tasks are made of."""

    source: str = "glyphs"
    """glyphs, strokes, digits, omniglot, omniglot_gmn, mnist, tfds:NAME, or a folder of class folders"""
    data_dir: str | None = None
    """where the data lie, for sources that are not made on the spot"""
    split: Literal["auto", "class"] = "auto"
    """auto: the source's own held-out alphabets or scripts, where it has any; class: classes at random"""
    hold_out: tuple[str, ...] = ()
    """alphabets, scripts or folders of classes to test on, instead of the above"""
    size: int = 28
    """height and width of the images of a user's folder"""
    symmetries: bool = False
    """train on every class in its eight symmetries and shifted by a pixel: for few or handwritten training classes"""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The generative model."""

    network: Literal["mlp", "conv"] = "mlp"
    hidden: tuple[int, ...] = (400, 400)
    """units of the hidden layers (mlp), or channels of the stride-2 convolutions (conv), from the image inwards"""
    latents: int = 32
    """dimensions of the code"""
    context: int = 128
    """length of the context vector through which a task moves gains, biases and prior; 0 for none"""
    likelihood: Literal["auto", "bernoulli", "gaussian"] = "auto"
    """auto: bernoulli for binary images, gaussian otherwise"""
    beta: float = 1.0
    """weight of the KL term in the loss"""


@dataclasses.dataclass(frozen=True)
class InnerConfig:
    """How a task is adapted to."""

    steps: int = 5
    """gradient steps of the inner loop"""
    moves: tuple[str, ...] = ("auto",)
    """players that move inside: encoder, decoder, head, modulation, prior, context, maps, or all of them; auto: context
    and prior, except for anil (the prior, which is the head of a VAE) and reptile (all)"""
    rates: Literal["auto", "fixed", "per_step", "per_element_and_step", "per_parameter"] = "auto"
    """auto: learned per element and step, except for reptile and joint (fixed) and meta_sgd (per parameter)"""
    rate: float = 1e-3
    """initial inner rate of network weights"""
    fast_rate: float = 0.1
    """initial inner rate of the prior and the context"""
    inner_grad: Literal["reverse", "forward_over_reverse"] = "reverse"
    """how the inner gradient is differentiated: equal results, less memory with forward_over_reverse"""
    remat: Literal["none", "step", "nested"] = "none"
    """what of the inner loop is recomputed instead of stored: equal results"""


@dataclasses.dataclass(frozen=True)
class OuterConfig:
    """How the meta-parameters learn."""

    steps: int = 2000
    """meta-steps"""
    tasks: int = 16
    """tasks per meta-step"""
    rate: float = 1e-3
    """peak rate of Adam"""
    rate_of_rates: float = 2e-2
    """peak rate of the learned inner log-rates"""
    warmup: int = 50
    """meta-steps of linear warm-up, before the cosine decay"""
    clip: float = 100.0
    """largest norm of the meta-gradient; 0 clips nothing"""
    average_decay: float = 0.99
    """of the exponential moving average of the meta-parameters, which is what is evaluated"""
    warm_start: int = 2000
    """steps of ordinary joint training before meta-training begins; 0 begins with random weights"""
    warm_start_rate: float = 2e-3
    task_chunk: int | None = None
    """tasks vmapped at a time; fewer use less memory"""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run."""

    learner: str = "maml"
    model: str = "vae"
    data: DataConfig = DataConfig()
    network: ModelConfig = ModelConfig()
    inner: InnerConfig = InnerConfig()
    outer: OuterConfig = OuterConfig()
    shots: tuple[int, int] = (5, 5)
    """smallest and largest number of support images per task in training"""
    query: int = 10
    """query images per task"""
    seed: int = 0


def check(config: TrainConfig) -> TrainConfig:
    """Return the configuration, or raise `ValueError` with the nearest names or the number that is off."""
    known("learner", config.learner, LEARNERS)
    known("model", config.model, MODELS)
    numbers = {
        "inner.rate": config.inner.rate,
        "inner.fast_rate": config.inner.fast_rate,
        "outer.rate": config.outer.rate,
        "outer.rate_of_rates": config.outer.rate_of_rates,
        "outer.warm_start_rate": config.outer.warm_start_rate,
    }
    for name, value in numbers.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    counts = {
        "inner.steps": (config.inner.steps, 0),
        "outer.steps": (config.outer.steps, 1),
        "outer.tasks": (config.outer.tasks, 1),
        "outer.warm_start": (config.outer.warm_start, 0),
        "network.latents": (config.network.latents, 1),
        "query": (config.query, 1),
    }
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= config.shots[0] <= config.shots[1]:
        raise ValueError(f"shots must be (smallest, largest) with 0 <= smallest <= largest, got {config.shots}")
    return config


def known(kind: str, name: str, names: tuple[str, ...]) -> str:
    """Return the name, or raise `ValueError` with the nearest ones.

    Example:
        >>> known("learner", "malm", LEARNERS)
        Traceback (most recent call last):
        ValueError: unknown learner 'malm'; did you mean 'maml'? Known: maml, fomaml, reptile, anil, meta_sgd, joint
    """
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"unknown {kind} {name!r}{hint} Known: {', '.join(names)}")


def to_json(config: TrainConfig) -> str:
    """Return the configuration as JSON text."""
    return json.dumps({"schema": SCHEMA, **dataclasses.asdict(config)}, indent=2)


def from_json(text: str, *, where: Path | str = "config") -> TrainConfig:
    """Read what `to_json` wrote.

    Raises:
        ValueError: not such a text, another schema, or fields that this version does not know.
    """
    try:
        values = json.loads(text)
        schema = values.pop("schema")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{where} is not the configuration of a run ({error})") from error
    if schema != SCHEMA:
        raise ValueError(f"{where} has schema {schema}, this version reads {SCHEMA}; use the version that wrote it")
    try:
        nested = {"data": DataConfig, "network": ModelConfig, "inner": InnerConfig, "outer": OuterConfig}
        parts = {name: record(**_tuples(values.pop(name))) for name, record in nested.items()}
        return TrainConfig(**parts, **_tuples(values))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where} does not fit this version ({error}); use the version that wrote it") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
