"""The records that the command line fills, one for each part of a run.

The losses of autoencoders are nats per image summed over pixels, and the inner rates are for that unit. Settings whose
default depends on the model are None until `resolve` fills them in, so that `config.json` holds what was used.
"""

import dataclasses
from typing import Literal

Loss = Literal["saturating", "non_saturating", "least_squares", "hinge", "wasserstein", "relativistic_average"]

Strategy = Literal[
    "uniform",
    "score_softmax",
    "hard_buffer",
    "class_pairs",
    "worst_case",
    "agreement",
    "greedy_set",
    "information",
    "self_paced",
]


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
class ConditionalConfig:
    """Models of images given a few others: autoregressive, flow, statistician, matching_network, addressed_memory,
    meta_generator."""

    reader: Literal["mean", "attention", "aligned"] | None = None
    """how the support is read by amortised: the mean of what an encoder makes of its images; attention, of learned
    queries over images, or of every pixel over patches of them (autoregressive); or aligned, of every pixel over the
    images around its own place (autoregressive); aligned (autoregressive), mean (others) if not given"""
    features: int = 32
    """of a pixel (autoregressive)"""
    dilations: tuple[int, ...] = (1, 2, 4, 1, 2, 4)
    """of the blocks of the causal network; pixels look at the support after the second one, and with attention once
    more before the last (autoregressive)"""
    layers: int = 1
    """of codes, each given the one above (statistician)"""
    loss: Literal["predictive", "set"] = "predictive"
    """of images given the support, or of sets (statistician)"""
    rows: int = 64
    """numbers of a key, and of a value, of the memory (matching_network, addressed_memory)"""
    path: Literal["linear", "variance_preserving"] = "linear"
    """from noise to images (flow)"""
    target: Literal["velocity", "noise"] = "velocity"
    """of the regression: flow matching, or denoising diffusion, which wants the variance-preserving path (flow)"""
    best_of: int = 1
    """tries for each image, the nearest of which counts; with one, samples do not vary (meta_generator)"""


@dataclasses.dataclass(frozen=True)
class InnerConfig:
    """How a task is adapted to."""

    steps: int | None = None
    """gradient steps of the inner loop; if not given, 0 for learners that read a head or a prior off the support and
    for amortised conditional models, 5 for others"""
    moves: tuple[str, ...] = ("auto",)
    """players that move inside, or all (an unknown name is answered with those there are); auto: context and prior
    (vae), the contexts of both sides (gan), modulation and context (conditional models), all where there is no context;
    except for reptile (all), anil (prior of a vae, last layer of a conditional model, heads of a gan and a classifier,
    translators of cycle, decoder of aae, discriminator and generator of bigan), boil (what ordinary training moves,
    without that) and cavia (the contexts, from zero)"""
    rates: Literal["auto", "fixed", "per_step", "per_element_and_step", "per_parameter"] = "auto"
    """auto: learned per element and step, except for reptile, joint, cavia, imaml, regressed, learned_optimizer and
    classifiers (fixed) and meta_sgd (per parameter)"""
    rate: float | None = None
    """initial inner rate of network weights; 0.1 (classifier, flow), 1e-3 (others) if not given"""
    fast_rate: float | None = None
    """initial inner rate of the prior and of contexts; 0.1 (vae), 1.0 (classifier, flow), 0.02 (others) if not given"""
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
    """peak rate of Adam; 1e-3 (vae), 2e-3 (classifier, conditional models), 3e-4 (others) if not given"""
    momentum: float | None = None
    """decay of Adam's first moment; 0.5 (gan, cycle, aae, bigan), 0.9 (others) if not given"""
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
    classifier can have (labels mean something within a task only); if not given, 0 for amortised conditional models,
    500 (autoregressive, flow), 2000 (others)"""
    warm_start_rate: float | None = None
    """peak rate of Adam in joint training; 3e-4 (gan, cycle, aae, bigan), 2e-3 (others) if not given"""
    task_chunk: int | None = None
    """tasks vmapped at a time; fewer use less memory; chosen by device and size if not given"""


@dataclasses.dataclass(frozen=True)
class GeneratedConfig:
    """Training tasks and images made by a generator that was trained before, on the same training classes."""

    run: str | None = None
    """folder of a finished run of vae, gan, aae or bigan, whose model generates; needed unless decoded is 0"""
    tasks: float = 0.0
    """share of the training tasks that are made in latent space, without a label; 1 is unsupervised meta-learning"""
    anchors: Literal["images", "prior", "beyond", "between"] = "images"
    """what a generated class is made around: a training image, a code of the prior, a code beyond two images or between
    them"""
    variation: Literal["noise", "outsiders", "others"] = "noise"
    """how its other images differ: by noise, towards codes of the prior, or towards the other classes of the task"""
    strength: float = 0.5
    """of the variation: standard deviation of the noise, or share of the way"""
    decoded: float = 1.0
    """share of the images of a generated class, beyond the anchor's own, that are decoded; the others are the training
    image once more (which wants deform)"""
    images: float = 0.0
    """share of the query images of real tasks that are replaced by decoded variants of themselves"""
    binary: bool = False
    """decode zeros and ones instead of grey means, for data that are binary"""
    deform: Literal["none", "affine", "elastic"] = "none"
    """random deformation of training images: affine maps, or bending and affine maps; binary images stay binary"""
    deformed: Literal["query", "all"] = "query"
    """which images of a task are deformed"""
    weight: tuple[float, float] = (1.0, 1.0)
    """of a generated task beside a real one, in the first meta-step and in the last"""


@dataclasses.dataclass(frozen=True)
class ChoiceConfig:
    """Which tasks are learned from."""

    strategy: Strategy = "uniform"
    """uniform; competitive: score_softmax, hard_buffer, class_pairs, worst_case (of alphabets or scripts); cooperative:
    agreement, greedy_set, information; self_paced, from easy to hard"""
    candidates: int | None = None
    """tasks that are made and measured before some are chosen (score_softmax, agreement, greedy_set, information,
    self_paced); twice outer.tasks if not given"""
    begin: float = 0.5
    """share of the candidates, the easiest, allowed at the beginning; all from half of the run on (self_paced)"""


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
    conditional: ConditionalConfig = ConditionalConfig()
    generated: GeneratedConfig = GeneratedConfig()
    choice: ChoiceConfig = ChoiceConfig()
    shots: tuple[int, int] = (5, 5)
    """smallest and largest number of support images per class of a task in training"""
    query: int = 10
    """query images per class of a task"""
    way: int | None = None
    """classes per task; 5 (classifier), 1 (others, which have no other) if not given"""
    seed: int = 0
