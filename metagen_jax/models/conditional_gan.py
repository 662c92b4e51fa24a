"""A GAN conditioned on labels: each class has a context on either side, looked up by the label of an example.

    x = G(z, c_G[y]),   s(x, y) = (w + c_D[y] M) . f(x) + b

The contexts act as in `metagen_jax.models.parts`, so the discriminator is a projection discriminator. For classes that
have no row, the unseen ones of a few-shot task, use the context of `gan`, moved by gradients or read off the support.

Sources: Mirza & Osindero, Conditional Generative Adversarial Nets, 2014; Miyato & Koyama, cGANs with Projection
Discriminator, 2018.
"""

import jax
import jax.numpy as jnp

from metagen_jax.models.adversarial import AdversarialLoss
from metagen_jax.models.gan import Gan, Terms, adversarial_game, check_terms, to_image
from metagen_jax.models.networks import Network
from metagen_jax.models.parts import parts
from metagen_jax.types import Array, Examples, Key, Model, Params


def conditional_gan(
    generator: Network,
    discriminator: Network,
    loss: AdversarialLoss,
    num_latents: int,
    num_classes: int,
    context: int,
    *,
    terms: Terms = Terms(),
) -> Gan:
    """Return the GAN whose players `generator_context` and `discriminator_context` are tables [num_classes, context].

    Args:
        generator: [M, num_latents] -> [M, *event], before the tanh.
        discriminator: [N, *event] -> [N, 1], a logit.
        loss: of `metagen_jax.models.adversarial`.
        num_latents: Z.
        num_classes: rows of the tables. Labels are looked up in them, so they must name the class itself (those of
            `episodes` number the classes within a task); a label outside the tables gives NaN, which is seen.
        context: length of a row.
        terms: penalty, mode-seeking term, number of examples made.

    Returns:
        Model, sides and functions; `sample`, `generate` and `score` take example n for one of class n mod num_classes.

    Raises:
        ValueError: no latent dimension, class or context, no example made, a negative weight.
    """
    check_terms(num_latents, terms)
    if num_classes < 1 or context < 1:
        raise ValueError(f"expected at least one class and a context, got num_classes={num_classes}, context={context}")
    made_by = parts(generator, "generator", context=context)
    judged_by = parts(discriminator, "discriminator", context=context, shifts=("bias", "kernel"))

    def init(key: Key) -> Params:
        generator_key, discriminator_key, tables_key = jax.random.split(key, 3)
        tables = jax.random.normal(tables_key, (2, num_classes, context))
        params = {**made_by.init(generator_key), **judged_by.init(discriminator_key)}
        return params | {"generator_context": tables[0], "discriminator_context": tables[1]}

    def of_class(params: Params, side: str, label: Array) -> Params:
        table = params[f"{side}_context"]
        row = jnp.where(label < 0, num_classes, label)  # a label that has no row gives NaN, and not another class
        return params | {f"{side}_context": table.at[row].get(mode="fill", fill_value=jnp.nan)}

    def generate(params: Params, z: Array, label: Array) -> Array:
        def one(code: Array, label: Array) -> Array:
            return made_by.apply(of_class(params, "generator", label), code[None])[0]

        return to_image(jax.vmap(one)(z, label))

    def score(params: Params, x: Array, label: Array) -> Array:
        def one(image: Array, label: Array) -> Array:
            return judged_by.apply(of_class(params, "discriminator", label), image[None])[0, 0]

        return jax.vmap(one)(2 * x - 1, label)

    def embed(params: Params, support: Examples) -> Params:
        raise ValueError("a label-conditional GAN looks its classes up and reads no support; use gan(..., encoder=...)")

    def cycled(num: int) -> Array:
        return jnp.arange(num) % num_classes

    def sample(params: Params, key: Key, num: int) -> Array:
        return generate(params, jax.random.normal(key, (num, num_latents)), cycled(num))

    sides = (made_by.players, judged_by.players)
    game = adversarial_game(generate, score, loss, num_latents, terms, *sides)
    return Gan(
        Model(init, game, sample),
        *sides,
        lambda params, z: generate(params, z, cycled(z.shape[0])),
        lambda params, x: score(params, x, cycled(x.shape[0])),
        embed,
    )
