"""Generators of images like those of a set, trained by squared error: x_hat = G(z, e(S)), z ~ N(0, I), no likelihood.

    loss = sum_n w_n min_{j <= m} |x_n - G(z_nj, e(S))|^2 / sum_n w_n          squared error, summed over pixels

Nothing pairs an image with its z, so what the number m of tries is decides what is learned. With m = 1, the small form
known from older articles, the expected loss is E|x - E[x | S]|^2 + E|E[x | S] - G(z, e)|^2: its minimum is the
conditional mean E[x | S], the same image for every z, and z is not used. With m > 1 each image is compared with the
nearest of m samples (implicit maximum likelihood), so that samples have to be near every image and z is used; m of
about the number of images is where this begins to work. `spread_ratio` tells which of the two a generator does.

| player               | what                                                                 | size  |
|----------------------|----------------------------------------------------------------------|-------|
| generator            | kernels of the hidden layers                                         | large |
| generator_head       | the last layer                                                       | large |
| generator_modulation | gain and bias of every hidden unit (or channel)                      | small |
| context              | e(S) [E]; zeros, what an empty support says, at first                | small |
| encoder              | of e, which the game does not score: gradient steps leave it         | large |

The adversarial form, whose samples vary because a discriminator sees them, is `metagen_jax.models.gan` with an encoder;
the one with a likelihood is `metagen_jax.models.statistician`.

Sources: Li & Malik, Implicit Maximum Likelihood Estimation, 2018 (m > 1; departure: every image has m tries of its own,
as in its conditional form); Bartunov & Vetrov, Few-shot Generative Modelling with Generative Matching Networks, 2018
(generation given a set).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.games import cooperative
from metagen_jax.models.monitors import spread_ratio
from metagen_jax.models.networks import Network, mlp
from metagen_jax.models.parts import parts
from metagen_jax.models.set_encoders import SetEncoder, mean_pooled
from metagen_jax.models.weighted import weighted_mean
from metagen_jax.types import Array, Examples, Key, Metrics, Model, Params

ENCODER = "encoder"


class MetaGenerator(NamedTuple):
    """A set-conditioned generator: a model, what it makes of a code, and what it reads off a set."""

    model: Model
    generate: Callable[[Params, Array], Array]  # (params, z [M, Z]) -> images [M, *event] in [0, 1]
    embed: Callable[[Params, Examples], Params]  # (params, support) -> {"context": e(S) [E]}


def meta_generator(
    event: Sequence[int],
    num_latents: int,
    *,
    hidden: int = 128,
    encoder: SetEncoder | None = None,
    best_of: int = 1,
) -> MetaGenerator:
    """Return the small form: two dense layers on [z, e(S)].

    Args:
        event: (H, W, C).
        num_latents: Z.
        hidden: units of the first layer.
        encoder: e, [N, *event], [N] -> [E]; None for the mean of the support images themselves.
        best_of: m, tries for each image.

    Raises:
        ValueError: as in `set_conditioned`.

    Example:
        >>> built = meta_generator((2, 2, 1), 3)
        >>> params = built.model.init(jax.random.key(0))
        >>> support = Examples(jnp.ones((5, 2, 2, 1)), jnp.zeros(5, int), jnp.ones(5))
        >>> built.embed(params, support)["context"]
        Array([1., 1., 1., 1.], dtype=float32)
    """
    chosen = mean_image(event) if encoder is None else encoder
    size = num_latents + num_numbers(chosen, event)
    return set_conditioned(mlp((size,), (hidden,), event), chosen, event, num_latents, best_of=best_of)


def set_conditioned(
    generator: Network,
    encoder: SetEncoder,
    event: Sequence[int],
    num_latents: int,
    *,
    best_of: int = 1,
    to_image: Callable[[Array], Array] = jax.nn.sigmoid,
) -> MetaGenerator:
    """Return the form of any two networks.

    Args:
        generator: [M, num_latents + E] -> [M, *event], before `to_image`.
        encoder: e, [N, *event], [N] -> [E].
        event: (H, W, C).
        num_latents: Z; zero for the mean itself.
        best_of: m, tries for each image.
        to_image: from the generator's output to [0, 1].

    Returns:
        The record. The game's metrics are `squared_error`, the loss, and `spread_ratio` of
        `metagen_jax.models.monitors` between what was made and the images, near zero if z is not used.

    Raises:
        ValueError: a negative number of latents, no try, or several where there is no z to try.
    """
    if num_latents < 0 or best_of < 1 or (best_of > 1 and not num_latents):
        raise ValueError(
            f"expected num_latents >= 0, at least one try and a latent where there are several, got "
            f"num_latents={num_latents}, best_of={best_of}"
        )
    made_by, num_context = parts(generator, "generator"), num_numbers(encoder, event)

    def init(key: Key) -> Params:
        generator_key, encoder_key = jax.random.split(key)
        own = {"context": jnp.zeros(num_context), ENCODER: encoder.init(encoder_key)}
        return made_by.init(generator_key) | own

    def generate(params: Params, z: Array) -> Array:
        context = jnp.broadcast_to(params["context"], (z.shape[0], num_context))
        return to_image(made_by.apply(params, jnp.concatenate([z, context], axis=1)))

    def embed(params: Params, support: Examples) -> Params:
        return {"context": encoder.apply(params[ENCODER], support.x, support.weight)}

    def loss(params: Params, key: Key, batch: Examples) -> tuple[Array, Metrics]:
        count = batch.x.shape[0]
        tries = jax.random.normal(key, (best_of, count, num_latents))
        first = made = generate(params, tries[0])
        if best_of > 1:
            # Which try is the nearest is a choice of one index, and no gradient goes through it: only the nearest
            # samples are made once more, to be differentiated.
            frozen = jax.lax.stop_gradient(params)
            errors = jax.lax.map(lambda z: _squared(generate(frozen, z), batch.x), tries)  # [m, N]
            made = generate(params, tries[errors.argmin(0), jnp.arange(count)])
        error = weighted_mean(_squared(made, batch.x), batch.weight)
        spread = spread_ratio(jax.lax.stop_gradient(first), batch.weight, batch.x, batch.weight)
        return error, {"squared_error": error, "spread_ratio": spread}

    def sample(params: Params, key: Key, num: int) -> Array:
        return generate(params, jax.random.normal(key, (num, num_latents)))

    return MetaGenerator(Model(init, cooperative(loss, (*made_by.players, "context")), sample), generate, embed)


def mean_image(event: Sequence[int]) -> SetEncoder:
    """Return the set encoder that has nothing to learn: the mean of the images, flattened."""
    return mean_pooled(Network(lambda key: {}, lambda params, x: x.reshape(x.shape[0], math.prod(event))))


def num_numbers(encoder: SetEncoder, event: Sequence[int]) -> int:
    """Return E of a set encoder."""
    shape = jax.eval_shape(
        lambda key: encoder.apply(encoder.init(key), jnp.zeros((1, *event)), jnp.zeros(1)), jax.random.key(0)
    ).shape
    return shape[0]


def _squared(made: Array, x: Array) -> Array:
    """Return the squared error of each image [N]."""
    return jnp.square(made - x).reshape(x.shape[0], -1).sum(-1)
