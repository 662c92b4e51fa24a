"""A VAE whose exact log-likelihood is known: everything in it is linear and Gaussian."""

import jax.numpy as jnp
import numpy as np

from metagen_jax import vae
from metagen_jax.models.likelihoods import Likelihood
from metagen_jax.models.networks import mlp

NOISE = 0.7
"""Standard deviation of x given z."""


def linear_vae(num_features, num_latents, **options):
    """Return the VAE with p(x | z) = N(z W + b, NOISE^2) and q(z | x) = N(x A + a, exp(x B + c)^2)."""

    def log_prob(params, output, x):
        del params
        return (-0.5 * jnp.square((x - output) / NOISE) - np.log(NOISE * np.sqrt(2 * np.pi))).sum(-1)

    likelihood = Likelihood({}, log_prob, lambda params, output: output, False)
    encoder = mlp((num_features,), (), (2 * num_latents,))
    decoder = mlp((num_latents,), (), (num_features,))
    return vae(encoder, decoder, likelihood, num_latents, **options)


def prior_covariance(prior):
    """Return the covariance that (I + N)(z - m) / s ~ N(0, I) implies."""
    scale = np.diag(np.exp(prior["log_scale"]))
    inverse = np.linalg.inv(np.eye(len(scale)) + np.tril(prior["coupling"], -1))
    return scale @ inverse @ inverse.T @ scale


def random_prior(num_latents, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"mean": (num_latents,), "log_scale": (num_latents,), "coupling": (num_latents, num_latents)}
    return {name: jnp.asarray(0.5 * rng.normal(size=shape)) for name, shape in shapes.items()}


def random_params(num_features, num_latents, seed=0):
    """Return parameters of `linear_vae` whose encoder is the best diagonal Gaussian but for a little error."""
    rng = np.random.default_rng(seed)
    prior = random_prior(num_latents, seed)
    weight, bias = rng.normal(size=(num_latents, num_features)), rng.normal(size=num_features)
    return with_best_encoder(weight, bias, prior, error=0.1)


def with_best_encoder(weight, bias, prior, error=0.0):
    """Return parameters whose encoder has the posterior's mean (times 1 + error) and its conditional scales."""
    num_latents, num_features = weight.shape
    inverse = np.linalg.inv(prior_covariance(prior))
    precision = inverse + weight @ weight.T / NOISE**2
    gain = weight.T @ np.linalg.inv(precision) / NOISE**2  # x -> posterior mean
    shift = np.linalg.solve(precision, inverse @ prior["mean"] - weight @ bias / NOISE**2)
    kernel = np.concatenate([(1 + error) * gain, np.zeros((num_features, num_latents))], axis=1)
    log_scale = -0.5 * np.log(np.diag(precision))
    return {
        "encoder": {
            "kernels": {},
            "output": {
                "output": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(np.concatenate([shift, log_scale]))}
            },
        },
        "decoder": {},
        "head": {"output": {"output": {"kernel": jnp.asarray(weight), "bias": jnp.asarray(bias)}}, "likelihood": {}},
        "modulation": {"encoder": {}, "decoder": {}},
        "prior": prior,
    }


def exact(params):
    """Return mean and covariance of p(x)."""
    layer = params["head"]["output"]["output"]
    weight, bias = np.asarray(layer["kernel"]), np.asarray(layer["bias"])
    covariance = weight.T @ prior_covariance(params["prior"]) @ weight + NOISE**2 * np.eye(len(bias))
    return np.asarray(params["prior"]["mean"]) @ weight + bias, covariance
