"""What a setting is where nothing was given: the defaults of the model and the learner."""

import dataclasses
from typing import Any, TypeVar

from metagen_jax.config.names import CONDITIONAL, HEADS, INNER_READ
from metagen_jax.config.records import InnerConfig, Loss, TrainConfig

T = TypeVar("T")


def for_learner(config: TrainConfig, learner: str) -> TrainConfig:
    """Return the configuration for another learner, without the settings that it would not read."""
    plain = InnerConfig()
    unread = {name: getattr(plain, name) for name, readers in INNER_READ.items() if learner not in readers}
    return dataclasses.replace(config, learner=learner, inner=dataclasses.replace(config.inner, **unread))


def resolve(config: TrainConfig) -> TrainConfig:
    """Return the configuration with the model's own defaults where nothing was given."""
    is_vae, classifies, conditional = (
        config.model == "vae",
        config.model == "classifier",
        config.model in CONDITIONAL,
    )
    reads = config.learner in HEADS or (config.learner == "amortised" and conditional)
    inner = _filled(
        config.inner,
        steps=0 if reads else 5,
        rate=0.1 if classifies or config.model == "flow" else 1e-3,
        fast_rate=0.1 if is_vae else 1.0 if classifies or config.model == "flow" else 0.02,
    )
    begins = 500 if config.model in ("autoregressive", "flow") else 2000
    outer = _filled(
        config.outer,
        rate=1e-3 if is_vae else 2e-3 if classifies or conditional else 3e-4,
        momentum=0.9 if is_vae or classifies or conditional else 0.5,
        warm_start=0 if classifies or (conditional and config.learner == "amortised") else begins,
        warm_start_rate=2e-3 if is_vae or conditional else 3e-4,
    )
    by = "aligned" if config.model == "autoregressive" else "mean" if conditional else None
    read = _filled(config.conditional, reader=by)
    loss: dict[str, Loss] = {"gan": "wasserstein", "cycle": "least_squares"}
    adversarial = _filled(
        config.adversarial,
        loss=loss.get(config.model, "non_saturating"),
        penalty="gradient" if config.model == "gan" else "none",
    )
    filled = _filled(config, way=5 if classifies else 1)
    return dataclasses.replace(filled, inner=inner, outer=outer, adversarial=adversarial, conditional=read)


def given(value: T | None) -> T:
    """Return a setting that `resolve` fills in, or raise `ValueError` where that was not done."""
    if value is None:
        raise ValueError(
            "a setting is None that depends on the model; pass the configuration through config.check first"
        )
    return value


def _filled(record: Any, **defaults: Any) -> Any:
    return dataclasses.replace(record, **{n: value for n, value in defaults.items() if getattr(record, n) is None})
