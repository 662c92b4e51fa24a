"""Adversarial autoencoders: a discriminator of codes makes the encoder's codes look like those of the prior.

    loss of encoder and decoder = -E log p(x | E(x)) + weight V_gen(D(z), D(E(x))),   nats per image
    loss of the discriminator   = V_dis(D(z), D(E(x))),                               z ~ N(0, I)

With the default adversarial loss these are -E log p(x | E(x)) - weight E log D(E(x)), and
-E log D(z) - E log(1 - D(E(x))). The encoder is deterministic: E(x) is one code. Encoder and decoder are partners and
share one loss, the discriminator is their rival; no gradient is stopped.

Source: Makhzani, Shlens, Jaitly, Goodfellow, Frey, Adversarial Autoencoders, 2016, section 2 (deterministic q).
Departure: both terms are one loss of one step, where the article takes turns between reconstruction and regularisation.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from metagen_jax.models.adversarial import AdversarialLoss, non_saturating
from metagen_jax.models.likelihoods import Likelihood
from metagen_jax.models.monitors import real_above_made, spread_ratio
from metagen_jax.models.networks import Network
from metagen_jax.models.weighted import weighted_mean
from metagen_jax.types import Array, Examples, Key, Losses, Metrics, Model, Params

PLAYERS = ("encoder", "decoder", "discriminator")


class AdversarialAutoencoder(NamedTuple):
    """An adversarial autoencoder: a model, and the two halves of it."""

    model: Model
    encode: Callable[[Params, Array], Array]  # (params, x [N, *event] in [0, 1]) -> z [N, Z]
    decode: Callable[[Params, Array], Array]  # (params, z [N, Z]) -> mean of p(x | z), [N, *event] in [0, 1]


def adversarial_autoencoder(
    encoder: Network,
    decoder: Network,
    discriminator: Network,
    likelihood: Likelihood,
    num_latents: int,
    *,
    weight: float = 1.0,
    loss: AdversarialLoss = non_saturating(),
) -> AdversarialAutoencoder:
    """Return the adversarial autoencoder of three networks.

    Args:
        encoder: [N, *event] in [0, 1] -> [N, Z], the code.
        decoder: [N, Z] -> [N, *event], the likelihood's output.
        discriminator: [N, Z] -> [N, 1], a logit that is high for codes of the prior.
        likelihood: `bernoulli()` or `gaussian()`; its own parameters belong to the player `decoder`.
        num_latents: Z.
        weight: of the adversarial term, in nats.
        loss: what the discriminator and the encoder want of scores; real are codes of the prior.

    Returns:
        Model and the functions `encode` and `decode`. `sample` decodes codes drawn from N(0, I), means in [0, 1].
        Metrics, all weighted means: `log_likelihood` in nats per image, and the scores `prior_score` of codes from the
        prior and `code_score` of encoded images; and the monitors of `models.monitors`, `spread_ratio` that of
        reconstructions.

    Raises:
        ValueError: no latent dimension or a negative weight; when called, an encoder or a discriminator whose output
            has another shape.

    Example:
        >>> from metagen_jax.models.likelihoods import bernoulli
        >>> from metagen_jax.models.networks import mlp
        >>> encoder, decoder = mlp((8, 8, 1), (16,), (2,)), mlp((2,), (16,), (8, 8, 1))
        >>> model, *_ = adversarial_autoencoder(encoder, decoder, mlp((2,), (16,), (1,)), bernoulli(), 2)
        >>> model.sample(model.init(jax.random.key(0)), jax.random.key(1), 3).shape
        (3, 8, 8, 1)
    """
    if num_latents < 1 or not weight >= 0:
        raise ValueError(
            f"expected at least one latent and weight >= 0, got num_latents={num_latents}, weight={weight}"
        )

    def init(key: Key) -> Params:
        encoder_key, decoder_key, discriminator_key = jax.random.split(key, 3)
        return {
            "encoder": encoder.init(encoder_key),
            "decoder": {"network": decoder.init(decoder_key), "likelihood": likelihood.init},
            "discriminator": discriminator.init(discriminator_key),
        }

    def encode(params: Params, x: Array) -> Array:
        codes = encoder.apply(params["encoder"], x)
        if codes.shape != (x.shape[0], num_latents):
            raise ValueError(
                f"the encoder must give one code an image, [{x.shape[0]}, {num_latents}], got {list(codes.shape)}; a "
                "deterministic code has no scale beside it"
            )
        return codes

    def scores(params: Params, z: Array) -> Array:
        score = discriminator.apply(params["discriminator"], z)
        if score.shape != (z.shape[0], 1):
            raise ValueError(
                f"the discriminator must give one score a code, [{z.shape[0]}, 1], got {list(score.shape)}"
            )
        return score[:, 0]

    def output(params: Params, z: Array) -> Array:
        return decoder.apply(params["decoder"]["network"], z)

    def game(params: Params, key: Key, batch: Examples) -> tuple[Losses, Metrics]:
        codes = encode(params, batch.x)
        outputs = output(params, codes)
        nats = likelihood.log_prob(params["decoder"]["likelihood"], outputs, batch.x)
        fit = weighted_mean(nats, batch.weight)
        real, made = scores(params, jax.random.normal(key, codes.shape)), scores(params, codes)
        shared = weight * loss.generator(real, made, batch.weight, batch.weight) - fit
        own = loss.discriminator(real, made, batch.weight, batch.weight)
        metrics = {
            "log_likelihood": fit,
            "prior_score": weighted_mean(real, batch.weight),
            "code_score": weighted_mean(made, batch.weight),
            "real_above_made": real_above_made(real, made, batch.weight, batch.weight),
            "spread_ratio": spread_ratio(
                likelihood.mean(params["decoder"]["likelihood"], outputs), batch.weight, batch.x, batch.weight
            ),
        }
        return {"encoder": shared, "decoder": shared, "discriminator": own}, metrics

    def decode(params: Params, z: Array) -> Array:
        return likelihood.mean(params["decoder"]["likelihood"], output(params, z))

    def sample(params: Params, key: Key, num: int) -> Array:
        return decode(params, jax.random.normal(key, (num, num_latents)))

    return AdversarialAutoencoder(Model(init, game, sample), encode, decode)
