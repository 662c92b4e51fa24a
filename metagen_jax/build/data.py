"""From a configuration to functions: data and splits, model, learner, outer rule."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from metagen_jax.adapt.starts import Start, fixed, per_parameter, per_step
from metagen_jax.config import DataConfig, InnerConfig, ModelConfig, TrainConfig
from metagen_jax.meta.learners import MetaLearner, anil, fomaml, joint, maml, meta_sgd, reptile
from metagen_jax.models.likelihoods import bernoulli, gaussian
from metagen_jax.models.networks import conv_decoder, conv_encoder, mlp
from metagen_jax.models.vae import PLAYERS, WITH_CONTEXT, Vae, vae
from metagen_jax.tasks.augment import with_symmetries
from metagen_jax.tasks.episodes import episodes
from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.tasks.image_set import ImageSet
from metagen_jax.tasks.sources import load
from metagen_jax.tasks.splits import Split, by_class, by_group, default
from metagen_jax.tasks.strokes import CLASSES, strokes
from metagen_jax.train import outer_optimizer

FAST = ("prior", "context")
"""Players that tolerate, and need, far larger inner rates than network weights."""
JOINT = ("encoder", "decoder", "head", "modulation")
"""What ordinary joint training learns: a prior or a context that no task moves would add nothing."""


Part = Literal["train", "validation", "test"]


class Parts(NamedTuple):
    """The classes of a source, by what they are for; a procedural source has no images of its own."""

    images: ImageSet | None
    split: Split | None
    event: tuple[int, int, int]  # H, W, C
    binary: bool


def parts(config: DataConfig) -> Parts:
    """Load the source and split its classes.

    Raises:
        ValueError: an unknown source, or whatever the source refuses.
    """
    if config.source == "strokes":
        return Parts(None, None, (28, 28, 1), True)
    options: dict[str, Any] = {"size": config.size} if Path(config.source).expanduser().is_dir() else {}
    images = load(config.source, data_dir=config.data_dir, **options)
    if config.hold_out:
        split = by_group(images, test=config.hold_out)
    else:
        split = by_class(images, seed=0) if config.split == "class" else default(images)
    return Parts(images, split, images.event, images.binary)


def family(
    data: Parts, part: Part, shots: int | tuple[int, int], query: int, *, symmetries: bool = False
) -> TaskFamily:
    """Return the tasks of one part of the split: "train", "validation" or "test".

    `symmetries` turns and mirrors whole tasks, which is for training only.

    Raises:
        ValueError: too few images in a class, or no class in that part.
    """
    images = None if data.images is None else take(data, part)
    made = strokes(shots, query, split=part) if images is None else episodes(images, shots, query)
    return with_symmetries(made) if symmetries else made


def take(data: Parts, part: Part) -> ImageSet:
    """Return the classes of one part of the split."""
    if data.images is None:
        raise ValueError("procedural strokes have no stored images to take")
    classes = getattr(data.split, part)
    if not len(classes):
        raise ValueError(f"{data.images.name} has no {part} classes in the split {data.split.kind!r}")  # type: ignore
    return data.images.take(classes)


def specs(data: Parts, part: Part, num: int | None = None) -> Spec:
    """Return one description per class of a part [C, 1], at most `num` of them, evenly spread.

    A procedural source has as many classes as are asked for (200 if none are).
    """
    if data.images is None:
        return (CLASSES[part][0] + jnp.arange(num or 200, dtype=jnp.int32))[:, None]
    total = take(data, part).num_classes
    chosen = np.arange(total) if num is None or num >= total else np.linspace(0, total - 1, num).round().astype(int)
    return jnp.asarray(chosen, jnp.int32)[:, None]


def model(config: ModelConfig, event: tuple[int, int, int], binary: bool) -> Vae:
    """Return the generative model for images of this shape.

    Raises:
        ValueError: a Bernoulli likelihood for images that are not binary.
    """
    if config.likelihood == "bernoulli" and not binary:
        raise ValueError("a Bernoulli likelihood needs binary images, and these have greys; use gaussian, or auto")
    is_bernoulli = config.likelihood == "bernoulli" or (config.likelihood == "auto" and binary)
    if config.network == "mlp":
        encoder = mlp(event, config.hidden, (2 * config.latents,))
        decoder = mlp((config.latents,), config.hidden[::-1], event)
    else:
        encoder = conv_encoder(event, config.hidden, 2 * config.latents)
        decoder = conv_decoder(config.latents, config.hidden, event)
    likelihood = bernoulli() if is_bernoulli else gaussian()
    return vae(encoder, decoder, likelihood, config.latents, beta=config.beta, context=config.context)


def learner(config: TrainConfig, built: Vae) -> MetaLearner:
    """Return the meta-learner.

    Raises:
        ValueError: rates or moving players that the learner cannot have.
    """
    inner, name = config.inner, config.learner
    have = WITH_CONTEXT if config.network.context else PLAYERS
    players = _moves(config, have)
    unknown = [player for player in players if player not in have]
    if unknown:
        raise ValueError(f"inner.moves has {', '.join(unknown)}; this model's players are {', '.join(have)}, or all")
    rates = {player: inner.fast_rate if player in FAST else inner.rate for player in players}
    plain = fixed(sgd(rates))
    if name in ("joint", "reptile") and inner.rates not in ("auto", "fixed"):
        raise ValueError(f"{name} has fixed inner rates, got inner.rates={inner.rates}; leave it at auto")
    if name == "joint":
        return joint(built.model, plain, inner.steps, players=players, learns=JOINT)
    if name == "reptile":
        return reptile(built.model, plain, inner.steps)
    options = {"inner_grad": inner.inner_grad, "remat": inner.remat}
    if name == "meta_sgd":
        return meta_sgd(built.model, rates, inner.steps, players=players, **options)
    start = _start(inner, rates, plain)
    if name == "fomaml":
        return fomaml(built.model, start, inner.steps, players=players)
    if name == "anil":
        return anil(built.model, start, inner.steps, head=players, **options)
    return maml(built.model, start, inner.steps, players=players, **options)


def _moves(config: TrainConfig, have: tuple[str, ...]) -> tuple[str, ...]:
    if "all" in config.inner.moves or config.learner == "reptile":
        return have
    if config.inner.moves != ("auto",):
        return config.inner.moves
    return tuple(player for player in FAST if player in have and not (config.learner == "anil" and player == "context"))


def _start(inner: InnerConfig, rates: dict[str, float], plain: Start) -> Start:
    if inner.rates == "fixed" or inner.steps == 0:
        return plain
    if inner.rates == "per_parameter":
        return per_parameter(rates, tuple(rates))
    return per_step(inner.steps, rates, tuple(rates), elementwise=inner.rates != "per_step")


def sgd(rates: dict[str, float]) -> optax.GradientTransformation:
    """Return gradient descent with one fixed rate for each player."""
    return optax.partition(
        {player: optax.sgd(rate) for player, rate in rates.items()}, lambda params: {name: name for name in params}
    )


def outer(config: TrainConfig) -> optax.GradientTransformation:
    """Return the outer rule."""
    o = config.outer
    return outer_optimizer(
        o.rate, o.steps, warmup=min(o.warmup, o.steps - 1), clip=o.clip, rate_of_rates=o.rate_of_rates
    )
