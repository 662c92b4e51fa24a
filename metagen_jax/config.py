"""Configuration of a run: frozen records that the command line fills and `config.json` keeps.

The losses of autoencoders are nats per image summed over pixels, and the inner rates are for that unit. Settings whose
default depends on the model are None until `resolve` fills them in, so that `config.json` holds what was used.
"""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

LEARNERS = (
    *("maml", "fomaml", "reptile", "anil", "boil", "meta_sgd", "maml_plus_plus", "cavia", "imaml"),
    *("learned_loss", "learned_optimizer", "amortised", "initialiser", "regressed"),
    *("prototypes", "matching", "relation", "ridge", "memory", "attention", "joint"),
)
SECOND_ORDER = ("maml", "anil", "boil", "meta_sgd", "maml_plus_plus", "cavia", "amortised", "initialiser")
"""Learners that may begin at first order."""
HEADS = ("prototypes", "matching", "relation", "ridge", "memory", "attention")
"""Learners that read the support in closed form: the head of a classifier."""
MODELS = ("vae", "gan", "cycle", "aae", "bigan", "classifier")
SCHEMA = 2

T = TypeVar("T")

READS = {
    "vae": (),
    "gan": ("loss", "penalty", "penalty_weight", "mode_seeking", "made_per_real", "preset"),
    "cycle": ("loss", "penalty", "penalty_weight", "cycle_weight", "identity_weight"),
    "aae": ("loss", "weight"),
    "bigan": ("form",),
    "classifier": (),
}
"""Which of the adversarial settings a model reads, beside those that all games read."""
ALL_GAMES = (
    *("discriminator", "dynamics", "critic_steps", "shaping"),
    *("ahead_rate", "unrolled_steps", "consensus_weight"),
)

INNER_READ = {
    "strength": ("imaml",),
    "rule": ("learned_optimizer",),
    "multi_step_until": ("maml_plus_plus",),
    "teacher_steps": ("regressed",),
    "first_order_until": SECOND_ORDER,
}
"""Settings of the inner loop that only these learners read."""

Loss = Literal["saturating", "non_saturating", "least_squares", "hinge", "wasserstein", "relativistic_average"]


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
    rotations: bool = False
    """train on every class turned by 90, 180 and 270 degrees as classes of their own; held-out classes stay upright"""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model."""

    network: Literal["mlp", "conv", "gated"] = "mlp"
    """dense; convolutional; or dense with gates over activations, layers and units, a player `structure` (vae,
    classifier)"""
    hidden: tuple[int, ...] = (400, 400)
    """units of the hidden layers (mlp), or channels of the stride-2 convolutions (conv), from the image inwards"""
    latents: int = 32
    """dimensions of the code"""
    context: int = 128
    """length of the context vector through which a task moves gains, biases and prior (vae), or of the condition of
    either side (gan); 0 for none"""
    likelihood: Literal["auto", "bernoulli", "gaussian"] = "auto"
    """auto: bernoulli for binary images, gaussian otherwise"""
    beta: float = 1.0
    """weight of the KL term in the loss"""
    convolution: Literal["auto", "product", "lax"] = "auto"
    """form of convolutions: patches and a matrix product (product), or the grouped convolution that XLA makes of
    kernels that differ by task (lax); auto: product"""
    pooling: Literal["stride", "max"] = "stride"
    """how the convolutions of a classifier halve height and width; max costs about four times as much"""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """of the factors of matrix products and convolutions; everything else is float32"""


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    """The game of a model that has rivals in it: gan, cycle, aae, bigan."""

    loss: Loss | None = None
    """what the sides want of scores; wasserstein (gan), least_squares (cycle), non_saturating (aae) if not given"""
    penalty: Literal["none", "gradient", "r1"] | None = None
    """on the discriminator's slope; gradient (gan), none (others) if not given"""
    penalty_weight: float = 10.0
    mode_seeking: float = 0.0
    """weight of the generator's mode-seeking term (gan)"""
    made_per_real: int = 1
    """images made for each real one (gan)"""
    preset: bool = False
    """the networks of the older articles, 128-256-512-1024-784 and 784-512-256-1 or their convolutional counterparts,
    whatever network.hidden says (gan; their codes have --network.latents 100)"""
    discriminator: tuple[int, ...] = ()
    """units or channels of the discriminator, from its input on; as network.hidden if not given"""
    dynamics: Literal["alternating", "simultaneous", "extragradient", "consensus", "unrolled"] = "alternating"
    """how the sides move in an inner step: the discriminator first, at once, ..."""
    critic_steps: int = 1
    """moves of the discriminator in an inner step (alternating)"""
    shaping: bool = False
    """let a meta-gradient go through what the rivals have adapted to: exact, and a reward for teaching them badly"""
    ahead_rate: float = 1e-3
    """rate of the steps ahead (extragradient, unrolled)"""
    unrolled_steps: int = 3
    """steps of the discriminator that the generator foresees (unrolled)"""
    consensus_weight: float = 0.1
    """weight of the consensus term (consensus)"""
    cycle_weight: float = 10.0
    """weight of the mean absolute error of the cycle (cycle)"""
    identity_weight: float = 0.0
    """weight of the mean absolute error of translating what is of the right domain (cycle)"""
    weight: float = 10.0
    """weight of the encoder's adversarial term, in nats (aae)"""
    form: Literal["standard", "literal"] = "standard"
    """of the losses (bigan)"""


@dataclasses.dataclass(frozen=True)
class InnerConfig:
    """How a task is adapted to."""

    steps: int | None = None
    """gradient steps of the inner loop; 0 for learners that read a head off the support, 5 for others if not given"""
    moves: tuple[str, ...] = ("auto",)
    """players that move inside, or all (an unknown name is answered with those there are); auto: context and prior
    (vae), the contexts of both sides (gan), all where there is no context; except for reptile (all), anil (prior of
    a vae, heads of a gan and a classifier, translators of cycle, decoder of aae, discriminator and generator of bigan),
    boil (what ordinary training moves, without that) and cavia (the contexts, from zero)"""
    rates: Literal["auto", "fixed", "per_step", "per_element_and_step", "per_parameter"] = "auto"
    """auto: learned per element and step, except for reptile, joint, cavia, imaml, regressed, learned_optimizer and
    classifiers (fixed) and meta_sgd (per parameter)"""
    rate: float | None = None
    """initial inner rate of network weights; 0.1 (classifier), 1e-3 (others) if not given"""
    fast_rate: float | None = None
    """initial inner rate of the prior and of contexts; 0.1 (vae), 1.0 (classifier), 0.02 (others) if not given"""
    strength: float = 1.0
    """of the proximal term that holds a task near the meta-parameters, in units of the loss (imaml)"""
    rule: Literal["mlp", "lstm"] = "mlp"
    """kind of the learned optimiser (learned_optimizer)"""
    multi_step_until: float = 0.5
    """share of the meta-steps in which the query loss after every inner step counts, less and less (maml_plus_plus)"""
    first_order_until: float = 0.0
    """share of the meta-steps, at the beginning, that drop second derivatives (learners of second order)"""
    teacher_steps: int = 50
    """gradient steps of the models that the map from tasks to parameters is fitted to (regressed)"""
    inner_grad: Literal["reverse", "forward_over_reverse"] = "reverse"
    """how the inner gradient is differentiated: equal results, less memory with forward_over_reverse"""
    remat: Literal["none", "step", "nested"] = "none"
    """what of the inner loop is recomputed instead of stored: equal results"""
    form: Literal["auto", "plain", "dual"] = "auto"
    """whether dense layers move without forming their kernels (dual): equal results; auto: where it applies and pays"""
    loop: Literal["auto", "scan", "peeled", "unrolled"] = "auto"
    """whether the inner steps are compiled as one, the first one apart, or each apart: equal results"""


@dataclasses.dataclass(frozen=True)
class OuterConfig:
    """How the meta-parameters learn."""

    steps: int = 2000
    """meta-steps"""
    tasks: int = 16
    """tasks per meta-step"""
    rate: float | None = None
    """peak rate of Adam; 1e-3 (vae), 2e-3 (classifier), 3e-4 (others) if not given"""
    momentum: float | None = None
    """decay of Adam's first moment; 0.9 (vae, classifier), 0.5 (others) if not given"""
    rate_of_rates: float = 2e-2
    """peak rate of the learned inner log-rates"""
    warmup: int = 50
    """meta-steps of linear warm-up, before the cosine decay"""
    clip: float = 100.0
    """largest norm of the meta-gradient; 0 clips nothing"""
    average_decay: float = 0.99
    """of the exponential moving average of the meta-parameters, which is what is evaluated"""
    warm_start: int | None = None
    """steps of ordinary joint training before meta-training begins; 0 begins with random weights, and is all that a
    classifier can have (labels mean something within a task only); 2000 (others) if not given"""
    warm_start_rate: float | None = None
    """peak rate of Adam in joint training; 2e-3 (vae), 3e-4 (others) if not given"""
    task_chunk: int | None = None
    """tasks vmapped at a time; fewer use less memory; chosen by device and size if not given"""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run."""

    learner: str = "maml"
    model: str = "vae"
    data: DataConfig = DataConfig()
    network: ModelConfig = ModelConfig()
    inner: InnerConfig = InnerConfig()
    outer: OuterConfig = OuterConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    shots: tuple[int, int] = (5, 5)
    """smallest and largest number of support images per class of a task in training"""
    query: int = 10
    """query images per class of a task"""
    way: int | None = None
    """classes per task; 5 (classifier), 1 (others, which have no other) if not given"""
    seed: int = 0


def for_learner(config: TrainConfig, learner: str) -> TrainConfig:
    """Return the configuration for another learner, without the settings that it would not read."""
    plain = InnerConfig()
    unread = {name: getattr(plain, name) for name, readers in INNER_READ.items() if learner not in readers}
    return dataclasses.replace(config, learner=learner, inner=dataclasses.replace(config.inner, **unread))


def resolve(config: TrainConfig) -> TrainConfig:
    """Return the configuration with the model's own defaults where nothing was given."""
    is_vae, classifies = config.model == "vae", config.model == "classifier"
    inner = _filled(
        config.inner,
        steps=0 if config.learner in HEADS else 5,
        rate=0.1 if classifies else 1e-3,
        fast_rate=0.1 if is_vae else 1.0 if classifies else 0.02,
    )
    outer = _filled(
        config.outer,
        rate=1e-3 if is_vae else 2e-3 if classifies else 3e-4,
        momentum=0.9 if is_vae or classifies else 0.5,
        warm_start=0 if classifies else 2000,
        warm_start_rate=2e-3 if is_vae else 3e-4,
    )
    loss: dict[str, Loss] = {"gan": "wasserstein", "cycle": "least_squares"}
    adversarial = _filled(
        config.adversarial,
        loss=loss.get(config.model, "non_saturating"),
        penalty="gradient" if config.model == "gan" else "none",
    )
    filled = _filled(config, way=5 if classifies else 1)
    return dataclasses.replace(filled, inner=inner, outer=outer, adversarial=adversarial)


def check(config: TrainConfig) -> TrainConfig:
    """Return the configuration, resolved, or raise `ValueError` with the nearest names or the number that is off."""
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
    if config.learner == "amortised" and not config.network.context:
        raise ValueError("amortised reads the support into the context, so it needs context > 0; got network.context=0")
    _check_classes(config)
    if config.network.network == "gated" and config.model not in ("vae", "classifier"):
        raise ValueError(f"gated networks make a structure of vae and classifier so far; got {config.model}")
    if config.learner == "imaml" and config.adversarial.dynamics not in ("alternating", "simultaneous"):
        raise ValueError(f"imaml solves the game itself, whatever the dynamics; got {config.adversarial.dynamics}")
    for name in ("multi_step_until", "first_order_until"):
        if not 0 <= (share := getattr(config.inner, name)) <= 1:
            raise ValueError(f"inner.{name} is a share of the meta-steps, in [0, 1]; got {share}")
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


def _check_read(config: TrainConfig) -> None:
    """Refuse a setting that the model or the learner would not read, rather than ignore it."""
    for name, readers in INNER_READ.items():
        value = getattr(config.inner, name)
        if value != getattr(InnerConfig(), name) and config.learner not in readers:
            raise ValueError(f"inner.{name}={value} means nothing to {config.learner}; it is for {', '.join(readers)}")
    if config.data.rotations and config.model == "cycle":
        raise ValueError("the tasks of cycle are pairs of styles, whose classes are not turned; leave rotations out")
    read = (*READS[config.model], *(ALL_GAMES if config.model not in ("vae", "classifier") else ()))
    filled = resolve(config).adversarial  # a configuration that was resolved before has these instead of None
    plain = resolve(dataclasses.replace(config, adversarial=AdversarialConfig())).adversarial
    for field in dataclasses.fields(AdversarialConfig):
        value = getattr(filled, field.name)
        if field.name not in read and value != getattr(plain, field.name):
            models = [model for model, names in READS.items() if field.name in names] or ["every game"]
            raise ValueError(
                f"adversarial.{field.name}={value} means nothing to {config.model}; it is read by {', '.join(models)}"
            )


def given(value: T | None) -> T:
    """Return a setting that `resolve` fills in, or raise `ValueError` where that was not done."""
    if value is None:
        raise ValueError(
            "a setting is None that depends on the model; pass the configuration through config.check first"
        )
    return value


def _filled(record: Any, **defaults: Any) -> Any:
    return dataclasses.replace(record, **{n: value for n, value in defaults.items() if getattr(record, n) is None})


def known(kind: str, name: str, names: tuple[str, ...]) -> str:
    """Return the name, or raise `ValueError` with the nearest ones.

    Example:
        >>> known("learner", "malm", LEARNERS)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: unknown learner 'malm'; did you mean 'maml'? Known: maml, fomaml, reptile, anil, boil, ...
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
        nested = {
            "data": DataConfig,
            "network": ModelConfig,
            "inner": InnerConfig,
            "outer": OuterConfig,
            "adversarial": AdversarialConfig,
        }
        parts = {name: record(**_tuples(values.pop(name))) for name, record in nested.items()}
        return resolve(TrainConfig(**parts, **_tuples(values)))  # whatever an earlier version did not know of
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where} does not fit this version ({error}); use the version that wrote it") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
