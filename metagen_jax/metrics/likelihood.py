"""Likelihood of images under a latent-variable model, in nats per image (larger is better).

    elbo      = E_q [log p(x, z) - log q(z | x)]                                 the mean over S samples
    iwae_S    = E   [log 1/S sum_s p(x, z_s) / q(z_s | x)] <= log p(x)           tighter with every sample

Source: Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016, equation 8.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metagen_jax.types import Array, Key, LatentVariable, Params

_LOG_2_PI = 1.8378770664093453


def bounds(
    latent: LatentVariable, num_samples: int, *, chunk: int = 50
) -> Callable[[Params, Key, Array], tuple[Array, Array]]:
    """Return the function (params, key, x [N, *event]) -> (elbo [N], iwae [N]) with `num_samples` samples an image.

    Memory is that of `chunk` samples, whatever their number: log-mean-exp is accumulated with a running maximum.

    Raises:
        ValueError: no sample, or a number of samples that the chunk does not divide.
    """
    chunk = min(chunk, num_samples)
    if num_samples < 1 or num_samples % chunk:
        raise ValueError(f"expected a positive multiple of chunk={chunk} samples, got {num_samples}")

    def estimate(params: Params, key: Key, x: Array) -> tuple[Array, Array]:
        mean, log_scale = latent.encode(params, x)

        def log_weight(key: Key) -> Array:
            noise = jax.random.normal(key, mean.shape)
            z = mean + jnp.exp(log_scale) * noise
            log_q = -0.5 * (jnp.square(noise) + _LOG_2_PI + 2 * log_scale).sum(-1)
            return latent.log_likelihood(params, x, z) + latent.log_prior(params, z) - log_q

        def add(carry: tuple[Array, Array, Array], index: Array) -> tuple[tuple[Array, Array, Array], None]:
            largest, scaled, total = carry
            log_weights = jax.vmap(log_weight)(jax.random.split(jax.random.fold_in(key, index), chunk))
            new = jnp.maximum(largest, log_weights.max(0))
            scaled = scaled * jnp.exp(largest - new) + jnp.exp(log_weights - new[None]).sum(0)
            return (new, scaled, total + log_weights.sum(0)), None

        zero = jnp.zeros(x.shape[0])
        (largest, scaled, total), _ = jax.lax.scan(
            add, (jnp.full(x.shape[0], -jnp.inf), zero, zero), jnp.arange(num_samples // chunk)
        )
        return total / num_samples, largest + jnp.log(scaled / num_samples)

    return estimate
