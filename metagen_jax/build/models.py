"""From a configuration to a model, and what its players are to a learner."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.build.conditional import Conditional, conditional
from metagen_jax.build.networks import decoder, encoder, gated
from metagen_jax.config import CONDITIONAL, AdversarialConfig, ModelConfig, TrainConfig, given
from metagen_jax.models import classifier as classifiers
from metagen_jax.models.adversarial import LOSSES, AdversarialLoss, Penalty, gradient_penalty, r1_penalty
from metagen_jax.models.adversarial_autoencoder import AdversarialAutoencoder, adversarial_autoencoder
from metagen_jax.models.bidirectional import BidirectionalGan, bidirectional_gan
from metagen_jax.models.classifier import Classifier, classifier
from metagen_jax.models.cycle import CycleGan, cycle_gan
from metagen_jax.models.gan import Gan, Terms, gan
from metagen_jax.models.heads import Head, linear, matching, prototypes, relation, ridge
from metagen_jax.models.likelihoods import Likelihood, bernoulli, gaussian
from metagen_jax.models.memory_heads import attention, memory
from metagen_jax.models.networks import (
    Network,
    conv_encoder,
    conv_features,
    leaky_relu,
    mlp,
    mlp_features,
    num_features_of,
)
from metagen_jax.models.presets import conv_gan, mlp_gan
from metagen_jax.models.structure import STRUCTURE
from metagen_jax.models.vae import PLAYERS, WITH_CONTEXT, Vae, vae
from metagen_jax.types import Examples

Event = tuple[int, int, int]
Built = Vae | Gan | CycleGan | AdversarialAutoencoder | BidirectionalGan | Classifier | Conditional
RELATION_UNITS = 64
READING = ("context", "maps")
MEMORY_SLOTS, MEMORY_WIDTH = 128, 64  # slots: as many rows as a 20-way 5-shot support has, and some


class Roles(NamedTuple):
    """What a model's players are to a learner."""

    players: tuple[str, ...]  # all of them
    fast: tuple[str, ...]  # that tolerate, and need, far larger inner rates than network weights
    head: tuple[str, ...]  # that ANIL moves
    joint: tuple[str, ...]  # that ordinary training learns: a context that no task moves would add nothing
    tuned: tuple[str, ...]  # that fine-tuning moves
    turns: tuple[tuple[str, ...], ...]  # the sides of the game, in the order in which they move
    moves: tuple[str, ...] = ()  # that move inside where nothing else is said; none: the fast ones, or all


def model(config: TrainConfig, event: Event, binary: bool) -> Built:
    """Return the model for images of this shape.

    Raises:
        ValueError: a Bernoulli likelihood for images that are not binary, or sizes that do not fit together.
    """
    network, game = config.network, config.adversarial
    if config.model == "vae":
        likelihood = _likelihood(network, binary)
        return vae(
            *_pair(network, event, 2 * network.latents),
            likelihood,
            network.latents,
            beta=network.beta,
            context=network.context,
        )
    if config.model == "gan":
        return _gan(config, event)
    if config.model == "classifier":
        return _classifier(config, event)
    if config.model in CONDITIONAL:
        return conditional(config, event, binary, _likelihood(network, binary))
    if config.model == "cycle":
        return cycle_gan(
            _translator(network, event),
            _translator(network, event),
            _judge(network, event, game.discriminator),
            _judge(network, event, game.discriminator),
            _loss(game),
            cycle_weight=game.cycle_weight,
            identity_weight=game.identity_weight,
            penalty=_penalty(game),
        )
    pair = _pair(network, event, network.latents, leaky=True)
    judged = network.latents if config.model == "aae" else math.prod(event) + network.latents
    sizes = game.discriminator or network.hidden
    judge = mlp((judged,), sizes, (1,), activation=leaky_relu, precision=network.precision)
    if config.model == "aae":
        return adversarial_autoencoder(
            *pair, judge, _likelihood(network, binary), network.latents, weight=game.weight, loss=_loss(game)
        )
    return bidirectional_gan(*pair, judge, network.latents, form=game.form)


def roles(config: TrainConfig, built: Built) -> Roles:
    """Return the roles of a model's players."""
    gates = (STRUCTURE,) if config.network.network == "gated" else ()
    if isinstance(built, Vae):
        players: tuple[str, ...] = (*(WITH_CONTEXT if config.network.context else PLAYERS), *gates)
        fast: tuple[str, ...] = ("prior", *(("context",) if config.network.context else ()), *gates)
        learned = ("encoder", "decoder", "head", "modulation", *gates)
        return Roles(players, fast, ("prior",), learned, (*learned, "prior"), (players,))
    if isinstance(built, Gan):
        sides = (built.discriminator, built.generator)
        players = (*built.generator, *built.discriminator)
        contexts = tuple(player for side in sides for player in side if player.endswith("_context"))
        head = tuple(player for side in sides for player in side if player.endswith("_head"))
        still = ("_context", "_maps", "_encoder")
        joint = tuple(player for player in players if not player.endswith(still))
        return Roles(players, contexts, head, joint, joint, sides)
    if isinstance(built, CycleGan):
        sides, head = (("discriminator_a", "discriminator_b"), ("forward", "backward")), ("forward", "backward")
    elif isinstance(built, Classifier):
        players = (*(classifiers.WITH_CONTEXT if config.learner == "cavia" else classifiers.PLAYERS), *gates)
        fast = ("context",) if config.learner == "cavia" else ()
        body = ("body", "modulation", *gates)
        return Roles(players, fast, ("head",), (*body, "head"), (*body, "head"), (players,))
    elif isinstance(built, Conditional):
        return _roles_of_parts(built)
    elif isinstance(built, AdversarialAutoencoder):
        sides, head = (("discriminator",), ("encoder", "decoder")), ("decoder",)
    else:  # a generator alone would not see the support
        sides, head = (("discriminator",), ("encoder", "generator")), ("discriminator", "generator")
    players = (*sides[1], *sides[0])
    return Roles(players, (), head, players, players, sides)


def _roles_of_parts(built: Conditional) -> Roles:
    """Return the roles of a model whose players share one loss: small parts move, what reads a support is apart."""
    players = tuple(player for player in _scored(built) if player != "memory")  # which is empty until it is read
    head = tuple(player for player in players if player.endswith("head"))
    fast = tuple(player for player in players if player == "context")
    joint = tuple(player for player in players if player not in READING)
    small = tuple(player for player in joint if player.endswith("modulation"))
    return Roles(players, fast, head, joint, joint, (players,), (*small, *fast))


def _scored(built: Conditional) -> tuple[str, ...]:
    """Return the players that the game scores; a network that only reads a support is none of them."""
    key, one = jax.random.key(0), jnp.ones(1)
    params = jax.eval_shape(built.model.init, key)
    x = jax.eval_shape(lambda params, key: built.model.sample(params, key, 1), params, key)
    losses, _ = jax.eval_shape(
        lambda params, key, x: built.model.game(params, key, Examples(x, jnp.zeros(1, jnp.int32), one)), params, key, x
    )
    return tuple(losses)


def _gan(config: TrainConfig, event: Event) -> Gan:
    network, game = config.network, config.adversarial
    if game.preset:
        if network.network == "mlp":
            generator, discriminator = mlp_gan(event, network.latents, precision=network.precision)
        else:
            generator, discriminator = conv_gan(
                event, network.latents, form=network.convolution, precision=network.precision
            )
    else:
        generator, discriminator = (
            decoder(network, network.latents, event, leaky=True),
            _judge(network, event, game.discriminator),
        )
    reader = None
    if config.learner == "amortised":
        reader = encoder(network, event, network.context, leaky=True)
    terms = Terms(_penalty(game), game.mode_seeking, game.made_per_real)
    loss = _loss(game)
    return gan(generator, discriminator, loss, network.latents, terms=terms, context=network.context, encoder=reader)


def _classifier(config: TrainConfig, event: Event) -> Classifier:
    network = config.network
    if network.network == "gated":
        body = gated(network, event, None)
    elif network.network == "mlp":
        body = mlp_features(event, network.hidden, precision=network.precision)
    else:
        body = conv_features(
            event,
            network.hidden,
            pooling=network.pooling,
            form=network.convolution,
            precision=network.precision,
        )
    num_features = num_features_of(body, event)
    context = network.context if config.learner == "cavia" else 0
    return classifier(body, num_features, given(config.way), _head(config.learner, num_features), context=context)


def _head(learner: str, num_features: int) -> Head:
    """Return the head that the learner reads, or the linear one; similarities begin at the scale of one feature."""
    if learner == "prototypes":
        return prototypes(8.0 / num_features)
    if learner == "matching":
        return matching("l2", 8.0 / num_features)
    if learner == "relation":
        return relation(mlp((2 * num_features,), (RELATION_UNITS,), (1,)))
    if learner == "memory":
        return memory(MEMORY_SLOTS, MEMORY_WIDTH)
    if learner == "attention":
        return attention(2, MEMORY_WIDTH)
    return ridge() if learner == "ridge" else linear(1.0 if learner == "boil" else 0.0)


def _pair(config: ModelConfig, event: Event, num_outputs: int, *, leaky: bool = False) -> tuple[Network, Network]:
    return encoder(config, event, num_outputs, leaky=leaky), decoder(config, config.latents, event, leaky=leaky)


def _judge(config: ModelConfig, event: Event, hidden: tuple[int, ...] = ()) -> Network:
    sizes = hidden or config.hidden
    if config.network == "mlp":
        return mlp(event, sizes, (1,), activation=leaky_relu, precision=config.precision)
    return conv_encoder(
        event, sizes, 1, activation=leaky_relu, window=3, form=config.convolution, precision=config.precision
    )


def _translator(config: ModelConfig, event: Event) -> Network:
    if config.network != "mlp":
        raise ValueError("the translators of the cycle model are dense so far; use --network.network mlp")
    return mlp(event, config.hidden, event, activation=leaky_relu, normalisation="layer", precision=config.precision)


def _likelihood(config: ModelConfig, binary: bool) -> Likelihood:
    if config.likelihood == "bernoulli" and not binary:
        raise ValueError("a Bernoulli likelihood needs binary images, and these have greys; use gaussian, or auto")
    return bernoulli() if config.likelihood == "bernoulli" or (config.likelihood == "auto" and binary) else gaussian()


def _loss(config: AdversarialConfig) -> AdversarialLoss:
    return LOSSES[given(config.loss)]()


def _penalty(config: AdversarialConfig) -> Penalty | None:
    if config.penalty == "gradient":
        return gradient_penalty(config.penalty_weight)
    return r1_penalty(config.penalty_weight) if config.penalty == "r1" else None
