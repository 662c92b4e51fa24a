"""A VAE that reads its support in closed form: the prior of a task is fitted to the codes of its examples.

    q(z | x_n) = N(mu_n, s_n^2):   m = (l m_0 + sum_n w_n mu_n) / (l + sum_n w_n)
                                   s^2 = (l s_0^2 + sum_n w_n ((mu_n - m)^2 + s_n^2)) / (l + sum_n w_n)

the class mean of metric-based learners, for generation: no gradient step, one pass of the encoder. The strength l of
the common prior counts as examples. Its meta-gradient, through the queries, teaches the encoder to put codes of a class
close to each other.

Sources: Snell, Swersky & Zemel, Prototypical Networks, 2017 (class means); the shrinkage is that of a conjugate prior
on mean and variance.

The prior that is fitted is the one that is used: a context's shift of it is taken into account, and its coupling, which
a handful of codes says nothing about, is zero.
"""

from collections.abc import Callable

import jax.numpy as jnp

from metagen_jax.models.parts import moved_by
from metagen_jax.models.vae import Vae
from metagen_jax.types import Examples, Params


def latent_prototypes(built: Vae, strength: float = 1.0) -> Callable[[Params, Examples], Params]:
    """Return the function (params, support) -> {"prior": the task's prior}, for `amortised`.

    Args:
        built: the VAE.
        strength: l, of the common prior in numbers of examples.

    Raises:
        ValueError: a strength that is not positive.
    """
    if not strength > 0:
        raise ValueError(f"the strength of the common prior must be positive, got {strength}")

    def embed(params: Params, support: Examples) -> Params:
        mean, log_scale = built.latent.encode(params, support.x)
        weight, common = support.weight[:, None], params["prior"]
        shift = {"mean": jnp.zeros(()), "log_scale": jnp.zeros(())}
        if "context" in params:  # which moves the prior wherever it is used
            shift = moved_by(params["context"], params["maps"])["prior"]
        begin, begin_scale = common["mean"] + shift["mean"], common["log_scale"] + shift["log_scale"]
        total = strength + weight.sum()
        centre = (strength * begin + (weight * mean).sum(0)) / total
        spread = jnp.square(mean - centre[None]) + jnp.exp(2 * log_scale)
        variance = (strength * jnp.exp(2 * begin_scale) + (weight * spread).sum(0)) / total
        fitted = {"mean": centre - shift["mean"], "log_scale": 0.5 * jnp.log(variance) - shift["log_scale"]}
        return {"prior": {**fitted, "coupling": jnp.zeros_like(common["coupling"])}}

    return embed
