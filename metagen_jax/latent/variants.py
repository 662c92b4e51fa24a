"""Variants: another image of the class that an image is of, made by a generator.

A variant is made by `vary(params, key, x [N, *event]) -> x' [N, *event]`, each image apart and with noise of its own;
`metagen_jax.tasks.mixing` mixes variants with real data. For a generator with codes e(x), white as in
`metagen_jax.latent.generator`, and noise v ~ N(0, I),

| variant                     | code of the new image                                      | params are of            |
|-----------------------------|------------------------------------------------------------|--------------------------|
| `perturbed`                 | e(x) + s v                                                 | the generator            |
| `posterior`                 | a draw of q(e | x)                                         | the generator            |
| `towards_outsider`          | (1 - a) e(x) + a v                                         | the generator            |
| `by_adapting`               | a sample of what the image was adapted to as a support     | a learner for generation |

The first three know an image by its code alone, and what varies within a class only if the codes say so; the last asks
a learner that was taught, over many classes, what else a class of which this is an example contains.

Sources: Khodadadeh et al., Unsupervised Meta-Learning through Latent-Space Interpolation in Generative Models, 2021
(the codes of `perturbed` and `towards_outsider`); Antoniou, Storkey & Edwards, Data Augmentation Generative Adversarial
Networks, 2017 (a generator conditioned on the image, which `by_adapting` is with any adapter).
"""

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from metagen_jax.latent.generator import Generator
from metagen_jax.tasks.mixing import Vary
from metagen_jax.types import Adapt, Array, Examples, Key, Params

Hardening = Literal["threshold", "sample"]


def perturbed(generator: Generator, strength: float) -> Vary:
    """Return the variant decode(e(x) + s v): nearby in latent space.

    Args:
        generator: with an encoder.
        strength: s; codes of different images are about sqrt(2 Z) apart, noise has the length s sqrt(Z), so 1 is
            already of the size of the distance between classes. 0 is the reconstruction.

    Raises:
        ValueError: a negative strength; when called, a generator without an encoder.

    Example:
        >>> shifted = Generator(lambda params, code: code + params, lambda params, x, noise: x - params, 2)
        >>> perturbed(shifted, 0.0)(0.5, jax.random.key(0), jnp.array([[1.0, 2.0]])).tolist()
        [[1.0, 2.0]]
    """
    if not strength >= 0:
        raise ValueError(f"the strength of the noise must be at least 0, got {strength}")

    def vary(params: Params, key: Key, x: Array) -> Array:
        code, noise = _code_and_noise(generator, params, key, x)
        return generator.decode(params, code + strength * noise)

    return vary


def posterior(generator: Generator) -> Vary:
    """Return the variant decode(e), e ~ q(e | x): another code that may have made this very image.

    The encoder says how much; a deterministic one gives the reconstruction.
    """

    def vary(params: Params, key: Key, x: Array) -> Array:
        noise = jax.random.normal(key, (x.shape[0], generator.num_latents))
        return generator.decode(params, generator.encode(params, x, noise))

    return vary


def towards_outsider(generator: Generator, strength: float) -> Vary:
    """Return the variant decode((1 - a) e(x) + a v): some way towards what the prior makes.

    Args:
        generator: with an encoder.
        strength: a in [0, 1]; 0 is the reconstruction, 1 forgets the image. Below 1/2 the code stays nearer to its own
            image than to the outsider.

    Raises:
        ValueError: a strength outside [0, 1]; when called, a generator without an encoder.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"the share of the outsider must be in [0, 1], got {strength}")

    def vary(params: Params, key: Key, x: Array) -> Array:
        code, noise = _code_and_noise(generator, params, key, x)
        return generator.decode(params, (1 - strength) * code + strength * noise)

    return vary


def by_adapting(adapt: Adapt, sample: Callable[[Params, Key, int], Array]) -> Vary:
    """Return the variant of a learner for generation: a sample of the parameters that one image adapts it to.

        phi_n, _ = adapt(meta, key, {x_n}),   x'_n ~ sample(phi_n)

    Each image costs an adaptation. What the adapter moves is made for all images at once, so take an adapter that moves
    little (a context, a prior), or give few images at a time.

    Args:
        adapt: of a `MetaLearner` for one class, trained with one shot among others.
        sample: of its model, (params, key, num) -> [num, *event].
    """

    def vary(params: Params, key: Key, x: Array) -> Array:
        def one(key: Key, image: Array) -> Array:
            adapt_key, sample_key = jax.random.split(key)
            support = Examples(image[None], jnp.zeros(1, jnp.int32), jnp.ones(1))
            adapted, _ = adapt(params, adapt_key, support)
            return sample(adapted, sample_key, 1)[0]

        return jax.vmap(one)(jax.random.split(key, x.shape[0]), x)

    return vary


def hard(vary: Vary, how: Hardening = "threshold") -> Vary:
    """Return the variant with binary pixels, for generators whose images are means and data that is binary.

    Args:
        vary: whose images are means of pixels, in [0, 1].
        how: "threshold", 1 above one half, which keeps strokes whole; or "sample", 1 with the mean's probability,
            which is the model's own distribution and rough at edges.

    Raises:
        ValueError: another way.
    """
    if how not in get_args(Hardening):
        raise ValueError(f"how must be one of {get_args(Hardening)}, got {how!r}")

    def hardened(params: Params, key: Key, x: Array) -> Array:
        vary_key, pixel_key = jax.random.split(key)
        mean = vary(params, vary_key, x)
        level = jax.random.uniform(pixel_key, mean.shape) if how == "sample" else 0.5
        return (mean > level).astype(mean.dtype)

    return hardened


def _code_and_noise(generator: Generator, params: Params, key: Key, x: Array) -> tuple[Array, Array]:
    """Return the mean codes of the images and standard normal noise, both [N, Z]."""
    noise = jax.random.normal(key, (x.shape[0], generator.num_latents))
    return generator.encode(params, x, jnp.zeros_like(noise)), noise
