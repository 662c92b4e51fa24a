"""Generators as task makers see them: codes to images, and images to codes where there is an encoder.

Codes are white: in every coordinate the prior is N(0, 1), whatever a model has learned of its prior, so that distances
and radii mean the same for all of them,

    VAE:  e = W (z - m) / s,  z ~ p(z) the learned prior (`metagen_jax.models.vae`), W unit lower triangular
    GAN:  e = z

The parameters are an argument: a task family keeps them in its data, and a learner that trains its generator keeps them
among its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.models.adversarial_autoencoder import AdversarialAutoencoder
from metagen_jax.models.bidirectional import BidirectionalGan
from metagen_jax.models.gan import Gan
from metagen_jax.models.vae import Vae, prior_in_use, prior_sample, prior_whitened
from metagen_jax.types import Array, Params


class Generator(NamedTuple):
    """Codes to images and back; parameters are an argument."""

    decode: Callable[[Params, Array], Array]  # (params, code [N, Z]) -> x [N, *event] in [0, 1]
    encode: Callable[[Params, Array, Array], Array]  # (params, x [N, *event], noise [N, Z]) -> code [N, Z]
    num_latents: int  # Z


def of_vae(built: Vae, num_latents: int) -> Generator:
    """Return a VAE as a generator: means of p(x | z), and q(z | x) as its encoder.

    `encode` with noise ~ N(0, I) samples the code, with zeros it is the code of the mean.
    """

    def decode(params: Params, code: Array) -> Array:
        return built.latent.decode(params, prior_sample(prior_in_use(params), code))

    def encode(params: Params, x: Array, noise: Array) -> Array:
        mean, log_scale = built.latent.encode(params, x)
        return prior_whitened(prior_in_use(params), mean + jnp.exp(log_scale) * noise)

    return Generator(decode, encode, num_latents)


def of_gan(built: Gan, num_latents: int) -> Generator:
    """Return a GAN as a generator; it has no encoder, and `encode` raises `ValueError`."""

    def encode(params: Params, x: Array, noise: Array) -> Array:
        raise ValueError(
            "a GAN has no encoder, so images have no codes; take anchors from the prior, or a model with an encoder "
            "(vae, aae, bigan)"
        )

    return Generator(built.generate, encode, num_latents)


def of_adversarial_autoencoder(built: AdversarialAutoencoder, num_latents: int) -> Generator:
    """Return an adversarial autoencoder as a generator; its encoder is deterministic and leaves the noise out."""
    return Generator(built.decode, lambda params, x, noise: built.encode(params, x), num_latents)


def of_bidirectional(built: BidirectionalGan, num_latents: int) -> Generator:
    """Return a bidirectional GAN as a generator; its encoder is deterministic and leaves the noise out."""
    return Generator(built.generate, lambda params, x, noise: built.encode(params, x), num_latents)


def without_gradient(generator: Generator) -> Generator:
    """Return the generator whose parameters get no gradient through it, while its codes do."""

    def decode(params: Params, code: Array) -> Array:
        return generator.decode(jax.lax.stop_gradient(params), code)

    def encode(params: Params, x: Array, noise: Array) -> Array:
        return generator.encode(jax.lax.stop_gradient(params), x, noise)

    return Generator(decode, encode, generator.num_latents)
