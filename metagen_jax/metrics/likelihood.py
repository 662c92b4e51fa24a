"""Likelihood of images under a model, in nats per image (larger is better), whatever kind of density it has.

    elbo      = E [log w]                            the mean over S draws; w = p(x, z) / q(z | x) for codes z ~ q
    iwae_S    = E [log 1/S sum_s w_s] <= log p(x)    tighter with every draw; for a bound the mean, as it has no weights

Of an exact density both are the log-likelihood itself, from one evaluation.
Source: Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016, equation 8.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metagen_jax.types import Array, Density, Key, Params

BOUND_DRAWS = 4
LABELS = {"exact": "exact", "importance": "IWAE-{num}", "bound": "bound, {num} draws"}
"""What the second number of `bounds` is called, by the kind of the density."""


def bounds(
    density: Density, num_samples: int, *, chunk: int = 50
) -> Callable[[Params, Key, Array], tuple[Array, Array]]:
    """Return the function (params, key, x [N, *event]) -> (elbo [N], iwae [N]) with `num_samples` draws an image.

    Memory is that of `chunk` draws, whatever their number: log-mean-exp is accumulated with a running maximum.

    Raises:
        ValueError: no draw, or a number of draws that the chunk does not divide.
    """
    chunk = min(chunk, num_samples)
    if num_samples < 1 or num_samples % chunk:
        raise ValueError(f"expected a positive multiple of chunk={chunk} samples, got {num_samples}")
    if density.kind == "exact":

        def once(params: Params, key: Key, x: Array) -> tuple[Array, Array]:
            value = density.log_weight(params, key, x)
            return value, value

        return once

    def estimate(params: Params, key: Key, x: Array) -> tuple[Array, Array]:
        def add(carry: tuple[Array, Array, Array], index: Array) -> tuple[tuple[Array, Array, Array], None]:
            largest, scaled, total = carry
            keys = jax.random.split(jax.random.fold_in(key, index), chunk)
            log_weights = jax.vmap(lambda key: density.log_weight(params, key, x))(keys)
            new = jnp.maximum(largest, log_weights.max(0))
            scaled = scaled * jnp.exp(largest - new) + jnp.exp(log_weights - new[None]).sum(0)
            return (new, scaled, total + log_weights.sum(0)), None

        zero = jnp.zeros(x.shape[0])
        (largest, scaled, total), _ = jax.lax.scan(
            add, (jnp.full(x.shape[0], -jnp.inf), zero, zero), jnp.arange(num_samples // chunk)
        )
        mean = total / num_samples
        return mean, mean if density.kind == "bound" else largest + jnp.log(scaled / num_samples)

    return estimate


def draws(density: Density, num_samples: int) -> int:
    """Return how many draws are worth their cost where so many importance samples would be taken.

    An exact density needs one. A bound has no weights that more draws would tighten: a few make its mean.

    Example:
        >>> draws(Density(lambda params, key, x: x, "bound"), 50)
        4
    """
    return {"exact": 1, "importance": num_samples, "bound": min(num_samples, BOUND_DRAWS)}[density.kind]


def label(density: Density, num_samples: int) -> str:
    """Return what the second number of `bounds` is called.

    Example:
        >>> label(Density(lambda params, key, x: x, "importance"), 50)
        'IWAE-50'
    """
    return LABELS[density.kind].format(num=num_samples)
