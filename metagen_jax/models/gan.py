"""Generative adversarial networks as games of two sides, each of several parts that a task may move.

    x = (tanh G(z) + 1) / 2,  z ~ N(0, I);   s(x) = D(2 x - 1);   L_G and L_D of `metagen_jax.models.adversarial`

Images are in [0, 1] outside and in [-1, 1] inside the networks. Each side has the players of
`metagen_jax.models.parts`, `generator`, `generator_head`, ... and `discriminator`, `discriminator_head`, ..., all of
one side sharing its loss. The discriminator's loss depends on the generator and the other way round, and nothing stops
a gradient on the way: a field differentiates each loss in its own players only, and a meta-gradient through the game
needs the rest.

With a context, both sides have a condition vector: a conditional GAN whose discriminator is a projection discriminator.
A task moves it by gradient steps; with an encoder, it is also read off the support,

    c_G = c_0 + mean_n E_G(x_n),   c_D likewise,   by `embed`.

Sources: Goodfellow et al., Generative Adversarial Nets, 2014; Mirza & Osindero, Conditional Generative Adversarial
Nets, 2014; Miyato & Koyama, cGANs with Projection Discriminator, 2018.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.models.adversarial import AdversarialLoss, Penalty, mode_seeking
from metagen_jax.models.monitors import real_above_made, spread_ratio
from metagen_jax.models.networks import Network
from metagen_jax.models.parts import parts
from metagen_jax.models.weighted import weighted_mean
from metagen_jax.types import Array, Examples, Game, Key, Losses, Metrics, Model, Params

Generate = Callable[[Params, Array, Array], Array]  # (params, z [M, Z], label [M]) -> images [M, *event] in [0, 1]
Score = Callable[[Params, Array, Array], Array]  # (params, x [N, *event] in [0, 1], label [N]) -> logits [N]


class Gan(NamedTuple):
    """A generative adversarial network: a model, its two sides, and what they compute."""

    model: Model
    generator: tuple[str, ...]  # players
    discriminator: tuple[str, ...]  # players
    generate: Callable[[Params, Array], Array]  # (params, z [M, Z]) -> images [M, *event] in [0, 1]
    score: Callable[[Params, Array], Array]  # (params, x [N, *event] in [0, 1]) -> logits [N]
    embed: Callable[[Params, Examples], Params]  # (params, support) -> the players that condition both sides


class Terms(NamedTuple):
    """What is added to the two losses, and how many examples are made."""

    penalty: Penalty | None = None  # on the discriminator
    mode_seeking: float = 0.0  # weight of the generator's mode-seeking term
    made_per_real: int = 1  # examples made for each real one


def gan(
    generator: Network,
    discriminator: Network,
    loss: AdversarialLoss,
    num_latents: int,
    *,
    terms: Terms = Terms(),
    context: int = 0,
    encoder: Network | None = None,
) -> Gan:
    """Return the GAN of two networks.

    Args:
        generator: [M, num_latents] -> [M, *event], before the tanh.
        discriminator: [N, *event] -> [N, 1], a logit.
        loss: of `metagen_jax.models.adversarial`.
        num_latents: Z.
        terms: penalty, mode-seeking term, number of examples made.
        context: length of each side's condition; 0 for none.
        encoder: [N, *event] -> [N, context], from which each side makes an encoder of its own; None for none.

    Returns:
        Model, sides and functions. The game's metrics are `real_score` and `made_score` (mean logits), `loss_share`
        (the discriminator's share of the two absolute adversarial losses, before penalties), and the monitors
        `real_above_made` and `spread_ratio` of `metagen_jax.models.monitors`.

    Raises:
        ValueError: no latent dimension, no example made, a negative weight or context, an encoder without a context.
    """
    check_terms(num_latents, terms)
    if encoder is not None and not context:
        raise ValueError("an encoder fills the context, so it needs context > 0; got an encoder and context=0")
    made_by = parts(generator, "generator", context=context)
    judged_by = parts(discriminator, "discriminator", context=context, shifts=("bias", "kernel"))
    encoders = ("generator_encoder", "discriminator_encoder") if encoder is not None else ()
    sides = ((*made_by.players, *encoders[:1]), (*judged_by.players, *encoders[1:]))

    def init(key: Key) -> Params:
        generator_key, discriminator_key, *encoder_keys = jax.random.split(key, 2 + len(encoders))
        fresh = {} if encoder is None else {n: encoder.init(k) for n, k in zip(encoders, encoder_keys, strict=True)}
        return {**made_by.init(generator_key), **judged_by.init(discriminator_key), **fresh}

    def generate(params: Params, z: Array) -> Array:
        return to_image(made_by.apply(params, z))

    def score(params: Params, x: Array) -> Array:
        return judged_by.apply(params, 2 * x - 1)[:, 0]

    def embed(params: Params, support: Examples) -> Params:
        if encoder is None:
            raise ValueError("this GAN has no encoder, so it cannot read a support set; give gan(...) one")
        return {
            f"{side}_context": params[f"{side}_context"]
            + jax.vmap(weighted_mean, (1, None))(
                encoder.apply(params[f"{side}_encoder"], 2 * support.x - 1), support.weight
            )
            for side in ("generator", "discriminator")
        }

    game = adversarial_game(
        lambda params, z, label: generate(params, z),
        lambda params, x, label: score(params, x),
        loss,
        num_latents,
        terms,
        *sides,
    )

    def sample(params: Params, key: Key, num: int) -> Array:
        return generate(params, jax.random.normal(key, (num, num_latents)))

    return Gan(Model(init, game, sample), *sides, generate, score, embed)


def adversarial_game(
    generate: Generate,
    score: Score,
    loss: AdversarialLoss,
    num_latents: int,
    terms: Terms,
    generator: tuple[str, ...],
    discriminator: tuple[str, ...],
) -> Game:
    """Return the game of two sides on a set of examples; every example made has the weight of its real counterpart."""

    def game(params: Params, key: Key, batch: Examples) -> tuple[Losses, Metrics]:
        codes_key, others_key, penalty_key = jax.random.split(key, 3)
        repeat = terms.made_per_real
        weight, label = jnp.tile(batch.weight, repeat), jnp.tile(batch.label, repeat)
        codes = jax.random.normal(codes_key, (weight.shape[0], num_latents))
        made = generate(params, codes, label)
        scores = score(params, batch.x, batch.label), score(params, made, label), batch.weight, weight
        of_generator, of_discriminator = loss.generator(*scores), loss.discriminator(*scores)
        metrics = {
            "real_score": weighted_mean(scores[0], batch.weight),
            "made_score": weighted_mean(scores[1], weight),
            "loss_share": jnp.abs(of_discriminator) / (jnp.abs(of_discriminator) + jnp.abs(of_generator) + 1e-6),
            "real_above_made": real_above_made(*scores),
            "spread_ratio": spread_ratio(made, weight, batch.x, batch.weight),
        }
        if terms.mode_seeking:
            others = jax.random.normal(others_key, codes.shape)
            term = mode_seeking(made, generate(params, others, label), codes, others, weight)
            of_generator = of_generator + terms.mode_seeking * term
        if terms.penalty is not None:
            count = batch.weight.shape[0]  # slopes are those of D in pixels from -1 to 1
            slope = terms.penalty(
                lambda x: score(params, (x + 1) / 2, batch.label),
                2 * batch.x - 1,
                2 * made[:count] - 1,
                batch.weight,
                penalty_key,
            )
            of_discriminator = of_discriminator + slope
        return dict.fromkeys(generator, of_generator) | dict.fromkeys(discriminator, of_discriminator), metrics

    return game


def to_image(output: Array) -> Array:
    """Return (tanh(output) + 1) / 2, an image in [0, 1]."""
    return 0.5 * (jnp.tanh(output) + 1)


def check_terms(num_latents: int, terms: Terms) -> None:
    """Raise `ValueError` for sizes and weights out of range."""
    if num_latents < 1 or terms.made_per_real < 1 or not terms.mode_seeking >= 0:
        raise ValueError(
            f"expected at least one latent, one example made for each real one and a mode-seeking weight >= 0, got "
            f"num_latents={num_latents}, made_per_real={terms.made_per_real}, mode_seeking={terms.mode_seeking}"
        )
