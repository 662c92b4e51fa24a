"""Networks of the sizes that the older articles on few-shot GANs use, so that their settings can be repeated.

Departure: where they normalise by batch, these normalise by example (layer normalisation), since statistics of a batch
would leak between the examples and the tasks, and a support set of five has no statistics worth the name.
"""

from collections.abc import Sequence
from typing import NamedTuple

from metagen_jax.models.convolutions import Form, Precision
from metagen_jax.models.networks import Network, Normalisation, conv_decoder, conv_encoder, leaky_relu, mlp

LATENTS = 100


class Pair(NamedTuple):
    """The two networks of a GAN."""

    generator: Network  # [M, Z] -> [M, H, W, C], before the tanh
    discriminator: Network  # [N, H, W, C] -> [N, 1]


def mlp_gan(
    event: Sequence[int] = (28, 28, 1),
    num_latents: int = LATENTS,
    *,
    generator: Sequence[int] = (128, 256, 512, 1024),
    discriminator: Sequence[int] = (512, 256),
    precision: Precision = "float32",
) -> Pair:
    """Return the dense pair: 100-128-256-512-1024-784 and 784-512-256-1, LeakyReLU 0.2.

    Every hidden layer of the generator but the first is normalised.
    """
    normalised: list[Normalisation] = ["layer" if index else "none" for index in range(len(generator))]
    return Pair(
        mlp((num_latents,), generator, event, activation=leaky_relu, normalisation=normalised, precision=precision),
        mlp(event, discriminator, (1,), activation=leaky_relu, precision=precision),
    )


def conv_gan(
    event: Sequence[int] = (28, 28, 1),
    num_latents: int = LATENTS,
    *,
    dense: Sequence[int] = (256, 512, 1024),
    generator: Sequence[int] = (128, 256),
    discriminator: Sequence[int] = (64, 128, 256),
    form: Form = "auto",
    precision: Precision = "float32",
) -> Pair:
    """Return the convolutional pair.

    The generator is dense 256-512-1024-(7x7x256), then 14x14x128 and 28x28; `generator` lists its channels from the
    image inwards. The discriminator has 3x3 convolutions of stride 2 and a dense layer.
    """
    return Pair(
        conv_decoder(
            num_latents,
            generator,
            event,
            activation=leaky_relu,
            normalisation="layer",
            dense=dense,
            form=form,
            precision=precision,
        ),
        conv_encoder(event, discriminator, 1, activation=leaky_relu, window=3, form=form, precision=precision),
    )
