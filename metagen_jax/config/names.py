"""The names of learners and models, and which settings each of them reads."""

import difflib

LEARNERS = (
    *("maml", "fomaml", "reptile", "anil", "boil", "meta_sgd", "maml_plus_plus", "cavia", "imaml"),
    *("learned_loss", "learned_optimizer", "amortised", "initialiser", "regressed"),
    *("prototypes", "matching", "relation", "ridge", "memory", "attention", "latent_gaussian", "joint"),
)
SECOND_ORDER = ("maml", "anil", "boil", "meta_sgd", "maml_plus_plus", "cavia", "amortised", "initialiser")
"""Learners that may begin at first order."""
HEADS = ("prototypes", "matching", "relation", "ridge", "memory", "attention", "latent_gaussian")
"""Learners that read the support in closed form: the head of a classifier, or the prior of a VAE."""
CONDITIONAL = (
    *("autoregressive", "flow", "statistician", "matching_network", "addressed_memory"),
    "meta_generator",
)
"""Models that may read their support by a network of their own, with one loss for all their players."""
MODELS = ("vae", "gan", "cycle", "aae", "bigan", "classifier", *CONDITIONAL)
GAMES = ("gan", "cycle", "aae", "bigan")
"""Models with rivals."""

READS = {
    "vae": (),
    "gan": ("loss", "penalty", "penalty_weight", "mode_seeking", "made_per_real", "preset"),
    "cycle": ("loss", "penalty", "penalty_weight", "cycle_weight", "identity_weight"),
    "aae": ("loss", "weight"),
    "bigan": ("form",),
    "classifier": (),
    **dict.fromkeys(CONDITIONAL, ()),
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

CONDITIONAL_READ = {
    "reader": ("autoregressive", "flow", "statistician", "meta_generator"),
    "features": ("autoregressive",),
    "dilations": ("autoregressive",),
    "layers": ("statistician",),
    "loss": ("statistician",),
    "rows": ("matching_network", "addressed_memory"),
    "path": ("flow",),
    "target": ("flow",),
    "best_of": ("meta_generator",),
}
"""Settings of conditional models, and the models that read them."""

NETWORK_READ = {
    "network": ("flow", "statistician", "matching_network", "addressed_memory", "meta_generator"),
    "hidden": ("flow", "statistician", "matching_network", "addressed_memory", "meta_generator"),
    "latents": ("statistician", "matching_network", "addressed_memory", "meta_generator"),
    "context": ("autoregressive", "flow", "statistician", "meta_generator"),
    "likelihood": ("statistician", "matching_network", "addressed_memory"),
    "beta": ("matching_network", "addressed_memory"),
    "convolution": ("flow", "matching_network", "addressed_memory", "meta_generator"),
    "pooling": (),
    "precision": ("autoregressive", "flow", "matching_network", "addressed_memory", "meta_generator"),
}
"""Settings of the network, and the conditional models that read them."""

MEASURED = ("score_softmax", "agreement", "greedy_set", "information", "self_paced")
"""Strategies for choosing tasks that measure candidates."""


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
