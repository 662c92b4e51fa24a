"""Refusing what cannot be run, before anything is built: every message says what is off and what there is."""

import dataclasses
import math

from metagen_jax.config.defaults import given, resolve
from metagen_jax.config.names import (
    ALL_GAMES,
    CONDITIONAL,
    CONDITIONAL_READ,
    GAMES,
    INNER_READ,
    LEARNERS,
    MEASURED,
    MODELS,
    NETWORK_READ,
    READS,
    known,
)
from metagen_jax.config.records import (
    AdversarialConfig,
    ChoiceConfig,
    ConditionalConfig,
    GeneratedConfig,
    InnerConfig,
    ModelConfig,
    TrainConfig,
)
from metagen_jax.config.values import check_values


def check(config: TrainConfig) -> TrainConfig:
    """Return the configuration, resolved, or raise `ValueError` with the nearest names or the number that is off."""
    check_values(config)
    known("learner", config.learner, LEARNERS)
    known("model", config.model, MODELS)
    _check_read(config)
    config = resolve(config)
    game = config.adversarial
    positive = {
        "inner.rate": config.inner.rate,
        "inner.fast_rate": config.inner.fast_rate,
        "outer.rate": config.outer.rate,
        "outer.rate_of_rates": config.outer.rate_of_rates,
        "outer.warm_start_rate": config.outer.warm_start_rate,
        "adversarial.ahead_rate": game.ahead_rate,
        "inner.strength": config.inner.strength,
    }
    for name, value in positive.items():
        if value is None or not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    least: dict[str, tuple[float, float]] = {
        "inner.steps": (given(config.inner.steps), 0),
        "inner.teacher_steps": (config.inner.teacher_steps, 1),
        "outer.steps": (config.outer.steps, 1),
        "outer.tasks": (config.outer.tasks, 1),
        "outer.warm_start": (given(config.outer.warm_start), 0),
        "network.latents": (config.network.latents, 1),
        "network.context": (config.network.context, 0),
        "query": (config.query, 1),
        "conditional.features": (config.conditional.features, 1),
        "conditional.layers": (config.conditional.layers, 1),
        "conditional.rows": (config.conditional.rows, 1),
        "conditional.best_of": (config.conditional.best_of, 1),
        "adversarial.critic_steps": (game.critic_steps, 1),
        "adversarial.made_per_real": (game.made_per_real, 1),
        "adversarial.unrolled_steps": (game.unrolled_steps, 0),
        "adversarial.penalty_weight": (game.penalty_weight, 0),
        "adversarial.mode_seeking": (game.mode_seeking, 0),
        "adversarial.consensus_weight": (game.consensus_weight, 0),
        "adversarial.cycle_weight": (game.cycle_weight, 0),
        "adversarial.identity_weight": (game.identity_weight, 0),
        "adversarial.weight": (game.weight, 0),
    }
    for name, (value, smallest) in least.items():
        if not value >= smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")
    if config.conditional.reader == "aligned" and config.model != "autoregressive":
        raise ValueError(f"conditional.reader=aligned is for pixels of autoregressive that look; got {config.model}")
    by_patches = config.model == "autoregressive" and config.conditional.reader != "mean"
    if config.model in ("statistician", "meta_generator") and not config.network.context:
        raise ValueError(f"{config.model} knows its support by a vector, so it needs network.context >= 1; got 0")
    if not config.conditional.dilations or min(config.conditional.dilations) < 1:
        raise ValueError(f"conditional.dilations are at least one, each >= 1; got {config.conditional.dilations}")
    by_rows = config.model in ("matching_network", "addressed_memory")
    if config.learner == "amortised" and not (config.network.context or by_patches or by_rows):
        raise ValueError("amortised reads the support into the context, so it needs context > 0; got network.context=0")
    _check_classes(config)
    if config.network.network == "gated" and config.model not in ("vae", "classifier"):
        raise ValueError(f"gated networks make a structure of vae and classifier so far; got {config.model}")
    if config.learner == "imaml" and config.adversarial.dynamics not in ("alternating", "simultaneous"):
        raise ValueError(f"imaml solves the game itself, whatever the dynamics; got {config.adversarial.dynamics}")
    for name in ("multi_step_until", "first_order_until"):
        if not 0 <= (share := getattr(config.inner, name)) <= 1:
            raise ValueError(f"inner.{name} is a share of the meta-steps, in [0, 1]; got {share}")
    _check_generated(config)
    _check_choice(config)
    if not 0 <= config.shots[0] <= config.shots[1]:
        raise ValueError(f"shots must be (smallest, largest) with 0 <= smallest <= largest, got {config.shots}")
    return config


def _check_classes(config: TrainConfig) -> None:
    """Refuse settings about classes that the model has no use for."""
    way = given(config.way)
    if config.model == "classifier":
        if way < 2:
            raise ValueError(f"a classifier needs tasks of at least two classes, got way={way}")
        if config.learner == "joint" or config.outer.warm_start:
            what = "joint" if config.learner == "joint" else f"outer.warm_start={config.outer.warm_start}"
            raise ValueError(
                f"labels of a classifier mean something within a task only, so there is no joint training; got {what}"
            )
        if config.shots[0] < 1:
            raise ValueError(f"a classifier needs at least one support image of each class, got shots={config.shots}")
    elif way != 1:
        raise ValueError(f"way={way} means nothing to {config.model}, whose tasks are of one class each; leave it out")


def _check_generated(config: TrainConfig) -> None:
    """Refuse shares that are none, and settings of generated data that nothing would read."""
    made, plain = config.generated, GeneratedConfig()
    for name in ("tasks", "images", "decoded"):
        if not 0 <= (share := getattr(made, name)) <= 1:
            raise ValueError(f"generated.{name} is a share, in [0, 1]; got {share}")
    most = math.inf if made.variation == "noise" else 1.0
    if not 0 <= made.strength <= most or math.isinf(made.strength):
        raise ValueError(f"generated.strength of {made.variation} must lie in [0, {most:g}], got {made.strength}")
    if not min(made.weight) >= 0:
        raise ValueError(f"generated.weight must be at least 0, got {made.weight}")
    decodes = made.tasks > 0 and (made.decoded > 0 or made.anchors != "images")
    of_tasks, unread = ("anchors", "variation", "decoded", "weight"), []
    if made.tasks == 0:
        unread += [(name, "is about generated tasks; set generated.tasks above 0") for name in of_tasks]
    elif made.tasks == 1:
        unread += [("weight", "is beside real tasks, and with generated.tasks=1 there are none")]
        unread += [("images", "is about real tasks, and with generated.tasks=1 there are none")]
        if config.data.rotations or config.data.symmetries:
            raise ValueError("rotations and symmetries are of real tasks, and with generated.tasks=1 there are none")
    if made.anchors not in ("images", plain.anchors):
        unread += [("decoded", f"is about anchors that are images; those of {made.anchors!r} are all decoded")]
    if not (decodes or made.images > 0):
        unread += [(name, "is about what is decoded, and nothing is") for name in ("strength", "variation", "binary")]
    for name, why in unread:
        if getattr(made, name) != getattr(plain, name):
            raise ValueError(f"generated.{name} {why}")
    if made.tasks > 0 and config.shots[0] < 1:
        raise ValueError(f"a generated class has at least one support image, got shots={config.shots}")
    if made.tasks > 0 and given(config.way) < 2 and (made.variation == "others" or made.anchors == "beyond"):
        raise ValueError("generated.variation others and anchors beyond need another class in a task, so way >= 2")
    needs_generator = made.images > 0 or decodes
    if needs_generator and made.run is None:
        raise ValueError(
            "generated data need a generator: train one, `metagen train joint vae ...`, and give its folder as "
            "generated.run; or repeat training images, generated.decoded=0 and generated.deform=affine"
        )
    if made.run is not None and not needs_generator:
        raise ValueError(
            f"generated.run={made.run} would make nothing; set generated.tasks or generated.images above 0"
        )
    if made.deform == "none" and made.deformed != plain.deformed:
        raise ValueError(f"generated.deformed={made.deformed} is about images that are deformed; set generated.deform")
    used = made.tasks > 0 or made.images > 0 or made.deform != "none"
    if used and (config.model == "cycle" or config.data.source == "strokes"):
        what = "tasks of two domains" if config.model == "cycle" else "procedural strokes, which are without end"
        raise ValueError(f"generated data are mixed with stored images of classes, not with {what}; leave them out")


def _check_choice(config: TrainConfig) -> None:
    """Refuse strategies that the tasks cannot have, and settings that the strategy would not read."""
    choice, made = config.choice, config.generated
    if choice.candidates is not None:
        if choice.strategy not in MEASURED:
            raise ValueError(
                f"choice.candidates={choice.candidates} means nothing to {choice.strategy}; it is for "
                f"{', '.join(MEASURED)}"
            )
        if choice.candidates < config.outer.tasks:
            raise ValueError(
                f"{config.outer.tasks} tasks are chosen out of the candidates, so there must be at least as many; got "
                f"choice.candidates={choice.candidates}"
            )
    if choice.begin != ChoiceConfig().begin and choice.strategy != "self_paced":
        raise ValueError(f"choice.begin={choice.begin} means nothing to {choice.strategy}; it is for self_paced")
    if not 0 < choice.begin <= 1:
        raise ValueError(f"choice.begin is a share in (0, 1], got {choice.begin}")
    if choice.strategy != "uniform" and made.weight != GeneratedConfig().weight:
        raise ValueError(f"generated.weight needs tasks that are drawn uniformly; {choice.strategy} weighs them itself")
    if choice.strategy in ("class_pairs", "worst_case") and made.tasks:
        raise ValueError(f"{choice.strategy} knows tasks by their classes, and generated ones have none")
    if choice.strategy in ("class_pairs", "worst_case") and (
        config.data.source == "strokes" or config.model == "cycle"
    ):
        what = "procedural strokes never come twice" if config.data.source == "strokes" else "domains are none"
        raise ValueError(f"{choice.strategy} remembers classes, and {what}")
    if choice.strategy == "class_pairs" and given(config.way) < 2:
        raise ValueError("class_pairs needs tasks of at least two classes, a classifier's")
    if choice.strategy == "information" and config.model not in ("classifier", "vae"):
        raise ValueError(f"information needs an embedding of tasks, which classifier and vae have; got {config.model}")
    if choice.strategy == "hard_buffer" and config.outer.tasks < 2:
        raise ValueError("hard_buffer takes half of the tasks from its buffer, so it needs outer.tasks of at least 2")


def _check_read(config: TrainConfig) -> None:
    """Refuse a setting that the model or the learner would not read, rather than ignore it."""
    for name, readers in INNER_READ.items():
        value = getattr(config.inner, name)
        if value != getattr(InnerConfig(), name) and config.learner not in readers:
            raise ValueError(f"inner.{name}={value} means nothing to {config.learner}; it is for {', '.join(readers)}")
    if config.model in CONDITIONAL:
        for name, of_models in NETWORK_READ.items():
            value = getattr(config.network, name)
            if config.model not in of_models and value != getattr(ModelConfig(), name):
                there = f"; it is for {', '.join(of_models)}, vae and others" if of_models else ""
                raise ValueError(f"network.{name}={value} means nothing to {config.model}{there}")
    usual = resolve(dataclasses.replace(config, conditional=ConditionalConfig())).conditional
    reads = config.learner == "amortised" or config.model in ("statistician", "meta_generator")
    if config.model in CONDITIONAL and not reads and resolve(config).conditional.reader != usual.reader:
        raise ValueError(
            f"conditional.reader={config.conditional.reader} means nothing to {config.learner}, which reads no "
            "support; it is for amortised"
        )
    for name, readers in CONDITIONAL_READ.items():
        value = getattr(resolve(config).conditional, name)
        if config.model not in readers and value != getattr(usual, name):
            raise ValueError(
                f"conditional.{name}={value} means nothing to {config.model}; it is for {', '.join(readers)}"
            )
    if config.data.rotations and config.model == "cycle":
        raise ValueError("the tasks of cycle are pairs of styles, whose classes are not turned; leave rotations out")
    read = (*READS[config.model], *(ALL_GAMES if config.model in GAMES else ()))
    filled = resolve(config).adversarial  # a configuration that was resolved before has these instead of None
    plain = resolve(dataclasses.replace(config, adversarial=AdversarialConfig())).adversarial
    for field in dataclasses.fields(AdversarialConfig):
        value = getattr(filled, field.name)
        if field.name not in read and value != getattr(plain, field.name):
            models = [model for model, names in READS.items() if field.name in names] or ["every game"]
            raise ValueError(
                f"adversarial.{field.name}={value} means nothing to {config.model}; it is read by {', '.join(models)}"
            )
