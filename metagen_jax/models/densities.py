"""How likely an image is, for each kind of model that can say: the exact number, importance weights, or a bound.

    exact         log p(x)
    importance    log w, with E w = p(x): the mean of log w is the ELBO, the log of the mean of w the IWAE bound
    bound         b, with E b <= log p(x): only means of it say anything

What is exact needs one evaluation; of the others, `metagen_jax.metrics.likelihood.bounds` takes as many as asked.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metagen_jax.types import Array, Density, Key, LatentVariable, Params

_LOG_2_PI = 1.8378770664093453


def exact(log_prob: Callable[[Params, Array], Array]) -> Density:
    """Return the density of a model whose log-likelihood (params, x [N, *event]) -> [N] has a formula."""
    return Density(lambda params, key, x: log_prob(params, x), "exact")


def of_latent(latent: LatentVariable) -> Density:
    """Return the importance weights log p(x, z) - log q(z | x), z ~ q(z | x), of a latent-variable model.

    Source: Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016, equation 8.
    """

    def log_weight(params: Params, key: Key, x: Array) -> Array:
        mean, log_scale = latent.encode(params, x)
        noise = jax.random.normal(key, mean.shape)
        z = mean + jnp.exp(log_scale) * noise
        log_q = -0.5 * (jnp.square(noise) + _LOG_2_PI + 2 * log_scale).sum(-1)
        return latent.log_likelihood(params, x, z) + latent.log_prior(params, z) - log_q

    return Density(log_weight, "importance")
