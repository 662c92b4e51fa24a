"""Variational autoencoders whose prior is learned, as cooperative games of the parts that a task may move.

    elbo(x) = E_{q(z | x)}[log p(x | z)] - KL(q(z | x), p(z)),   loss = -E log p(x | z) + beta KL, nats per image
    q(z | x) = N(mean(x), diag scale(x)^2),   p(z) = N(prior mean, diag prior scale^2)

Much of what a few examples tell about a class is where its codes lie; a prior fixed at N(0, I) forbids learning that,
so its mean and scale are parameters like the rest.

| player     | what                                                                | size (mlp)   |
|------------|---------------------------------------------------------------------|--------------|
| encoder    | kernels of the encoder, and its last layer                          | large        |
| decoder    | kernels of the decoder's hidden layers                              | large        |
| head       | the decoder's last layer, and the likelihood's own parameters       | large        |
| modulation | gain and bias of every hidden unit (or channel) of both networks    | small        |
| prior      | mean and log scale of the codes                                     | small        |

All of them share one loss. Source: Kingma & Welling, Auto-Encoding Variational Bayes, 2014.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.games import cooperative
from metagen_jax.models.likelihoods import Likelihood
from metagen_jax.models.networks import Network, join, split_modulation
from metagen_jax.types import Array, Examples, Key, LatentVariable, Metrics, Model, Params

PLAYERS = ("encoder", "decoder", "head", "modulation", "prior")
FAST = ("modulation", "prior")
"""The players that a task moves cheaply: the large kernels stay shared, so that a batch of tasks multiplies by one."""
_LOG_2_PI = 1.8378770664093453


class Vae(NamedTuple):
    """A variational autoencoder: a model, and what it can do with its latent variable."""

    model: Model
    latent: LatentVariable


def vae(
    encoder: Network, decoder: Network, likelihood: Likelihood, num_latents: int, *, beta: float = 1.0
) -> Vae:
    """Return the VAE of two networks.

    Args:
        encoder: [N, *event] -> [N, 2 * num_latents], mean and log scale of q(z | x).
        decoder: [N, num_latents] -> [N, *event], the likelihood's output.
        likelihood: `bernoulli()` or `gaussian()`.
        num_latents: Z.
        beta: weight of the KL term in the loss; metrics and likelihoods always have weight one.

    Returns:
        Model and latent-variable record. `sample` gives means of p(x | z) with z from the prior, in [0, 1]. The game's
        metrics are `elbo`, `kl` and `log_likelihood` in nats per image, weighted means over the examples.

    Raises:
        ValueError: no latent dimension, or a negative beta.
    """
    if num_latents < 1 or beta < 0:
        raise ValueError(f"expected at least one latent and beta >= 0, got num_latents={num_latents}, beta={beta}")

    def init(key: Key) -> Params:
        encoder_key, decoder_key = jax.random.split(key)
        encoder_kernels, encoder_modulation, encoder_output = split_modulation(encoder.init(encoder_key))
        decoder_kernels, decoder_modulation, decoder_output = split_modulation(decoder.init(decoder_key))
        return {
            "encoder": {"kernels": encoder_kernels, "output": encoder_output},
            "decoder": decoder_kernels,
            "head": {"output": decoder_output, "likelihood": likelihood.init},
            "modulation": {"encoder": encoder_modulation, "decoder": decoder_modulation},
            "prior": {"mean": jnp.zeros(num_latents), "log_scale": jnp.zeros(num_latents)},
        }

    def encode(params: Params, x: Array) -> tuple[Array, Array]:
        tree = join(*params["encoder"].values(), params["modulation"]["encoder"])
        mean, log_scale = jnp.split(encoder.apply(tree, x), 2, axis=-1)
        return mean, log_scale

    def decoder_output(params: Params, z: Array) -> Array:
        tree = join(params["decoder"], params["head"]["output"], params["modulation"]["decoder"])
        return decoder.apply(tree, z)

    def decode(params: Params, z: Array) -> Array:
        return likelihood.mean(params["head"]["likelihood"], decoder_output(params, z))

    def log_likelihood(params: Params, x: Array, z: Array) -> Array:
        return likelihood.log_prob(params["head"]["likelihood"], decoder_output(params, z), x)

    def log_prior(params: Params, z: Array) -> Array:
        mean, log_scale = params["prior"]["mean"], params["prior"]["log_scale"]
        return normal_log_density(z, mean[None], log_scale[None])

    def loss(params: Params, key: Key, batch: Examples) -> tuple[Array, Metrics]:
        mean, log_scale = encode(params, batch.x)
        z = mean + jnp.exp(log_scale) * jax.random.normal(key, mean.shape)
        fit = weighted_mean(log_likelihood(params, batch.x, z), batch.weight)
        prior = params["prior"]
        kl = normal_kl(mean, log_scale, prior["mean"][None], prior["log_scale"][None])
        kl = weighted_mean(kl, batch.weight)
        return beta * kl - fit, {"elbo": fit - kl, "kl": kl, "log_likelihood": fit}

    def sample(params: Params, key: Key, num: int) -> Array:
        noise = jax.random.normal(key, (num, num_latents))
        prior = params["prior"]
        return decode(params, prior["mean"][None] + jnp.exp(prior["log_scale"])[None] * noise)

    model = Model(init, cooperative(loss, PLAYERS), sample)
    return Vae(model, LatentVariable(encode, decode, log_prior, log_likelihood))


def normal_log_density(z: Array, mean: Array, log_scale: Array) -> Array:
    """Return log N(z; mean, diag exp(log_scale)^2) [N] in nats, summed over the last axis."""
    return -0.5 * (jnp.square((z - mean) * jnp.exp(-log_scale)) + _LOG_2_PI + 2 * log_scale).sum(-1)


def normal_kl(mean: Array, log_scale: Array, prior_mean: Array, prior_log_scale: Array) -> Array:
    """Return KL(N(mean, scale^2), N(prior mean, prior scale^2)) [N] in nats, summed over the last axis."""
    shift = jnp.square((mean - prior_mean) * jnp.exp(-prior_log_scale))
    ratio = log_scale - prior_log_scale
    return (0.5 * (shift + jnp.exp(2 * ratio) - 1.0) - ratio).sum(-1)


def weighted_mean(values: Array, weight: Array) -> Array:
    """Return sum(weight * values) / sum(weight), and zero for no examples: an empty support set teaches nothing."""
    total = weight.sum()
    return (weight * values).sum() / jnp.where(total > 0, total, 1.0)
