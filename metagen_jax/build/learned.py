"""From a configuration to what learners add to a model: an initialiser, a learned loss, a learned rule."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.adapt.amortised import Embed
from metagen_jax.adapt.learned_rules import LearnedRule, coordinate_lstm, coordinate_mlp
from metagen_jax.adapt.twins import Twins, twins
from metagen_jax.build.models import Built, Roles
from metagen_jax.config import TrainConfig, given
from metagen_jax.models.autoregressive import Autoregressive, autoregressive_features
from metagen_jax.models.classifier import Classifier
from metagen_jax.models.gan import Gan
from metagen_jax.models.initialiser import INITIALISER, initialiser
from metagen_jax.models.learned_losses import Features, classifier_features, vae_features, with_learned_loss
from metagen_jax.models.networks import gelu, mlp
from metagen_jax.models.vae import Vae
from metagen_jax.types import Array, Examples, Model, Params

UNITS, CODE = 64, 16  # of the initialiser's encoder
LOSS_UNITS = 32  # of a learned loss


class WithInitialiser(NamedTuple):
    """A model with initialisers among its players."""

    model: Model
    embed: Embed
    names: tuple[str, ...]  # of the initialisers


def with_initialiser(built: Built, players: tuple[str, ...]) -> WithInitialiser:
    """Return the model with an initialiser of these players, one for each side of a GAN.

    It reads what the model's own encoder or body makes of the images, or the images where there is none.

    Raises:
        ValueError: a model whose support is of two domains, or that makes no images of one kind.
    """
    see, size, num_classes = _seen(built)
    encoder = mlp((size + num_classes,), (UNITS,), (CODE,), activation=gelu)
    sides = (built.generator, built.discriminator) if isinstance(built, Gan) else (players,)
    model, embeds, names = built.model, list[Embed](), list[str]()
    for side in sides:
        if begun := tuple(player for player in players if player in side):
            names.append(f"{side[0]}/{INITIALISER}" if len(sides) > 1 else INITIALISER)
            model, embed = initialiser(encoder, CODE, players=begun, num_classes=num_classes, name=names[-1])(model)
            embeds.append(embed)

    def embed_all(meta: Params, support: Examples) -> Params:
        seen = support._replace(x=see(meta, support.x))
        return {name: tree for embed in embeds for name, tree in embed(meta, seen).items()}

    return WithInitialiser(model, embed_all, tuple(names))


def initialised(built: Built, role: Roles) -> tuple[str, ...]:
    """Return the players that an initialiser begins: small ones, which are cheap to write and move much."""
    if isinstance(built, Classifier):
        return ("head",)
    small = tuple(player for player in role.tuned if player.endswith("modulation") or player == "prior")
    return role.fast or small or role.head


def with_loss(config: TrainConfig, built: Built) -> Model:
    """Return the model of the inner loop, whose loss is partly learned.

    Raises:
        ValueError: a model that no features are known for.
    """
    features: Features
    if isinstance(built, Vae):
        features, size = vae_features(built.latent), 2 + 2 * config.network.latents
    elif isinstance(built, Classifier):
        features, size = classifier_features(built), 2 * built.num_classes + 1
    elif isinstance(built, Autoregressive):
        features, size = autoregressive_features(built), config.conditional.features + 2
    else:
        raise ValueError(f"learned_loss has features for vae, classifier and autoregressive so far; got {config.model}")
    return with_learned_loss(built.model, features, mlp((size,), (LOSS_UNITS,), (1,), activation=gelu))


def learned_rule(config: TrainConfig, built: Built, role: Roles, players: tuple[str, ...]) -> LearnedRule | Twins:
    """Return the rule that is learned, one for each side of a game with rivals; it begins at the configured rate.

    A side is called after its first player, so that its rule follows the side's own loss. Other games than a GAN may
    give every player a loss of its own, so there each player has a rule.
    """
    inner = config.inner
    rate = given(inner.fast_rate) if set(players) <= set(role.fast) else given(inner.rate)
    rule = coordinate_mlp(rate=rate) if inner.rule == "mlp" else coordinate_lstm(rate=rate)
    if len(role.turns) == 1:
        return rule
    sides = {side[0]: side for side in role.turns} if isinstance(built, Gan) else {name: (name,) for name in players}
    sides = {name: tuple(player for player in side if player in players) for name, side in sides.items()}
    moving = {name: side for name, side in sides.items() if side}
    return twins(dict.fromkeys(moving, rule), moving)


def _seen(built: Built) -> tuple[Callable[[Params, Array], Array], int, int]:
    """Return what an initialiser sees of images (params, x) -> [N, size], the size, and the number of classes."""
    if isinstance(built, Classifier):
        return built.features, built.num_features, built.num_classes
    if not isinstance(built, Vae | Gan):
        raise ValueError("an initialiser reads the support of a vae, a gan or a classifier so far")
    params = jax.eval_shape(built.model.init, jax.random.key(0))
    shapes = jax.eval_shape(lambda params, key: built.model.sample(params, key, 1), params, jax.random.key(0))
    if isinstance(built, Vae):
        latent = built.latent

        def codes(params: Params, x: Array) -> Array:
            return jnp.concatenate(latent.encode(params, x), 1)

        return codes, jax.eval_shape(codes, params, shapes).shape[1], 0
    size = shapes.size
    return lambda params, x: x.reshape(x.shape[0], size), size, 0
