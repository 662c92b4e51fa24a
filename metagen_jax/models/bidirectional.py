"""Bidirectional GANs: a discriminator of pairs (image, code) teaches a generator and the encoder that inverts it.

Encoder pairs e = (x, E(x)) have real images, generator pairs g = (G(z), z) have codes of the prior N(0, I). With
D = sigmoid of the discriminator's score of a pair, two forms of the game, every loss being minimised:

| form     | discriminator                       | encoder              | generator            |
|----------|-------------------------------------|----------------------|----------------------|
| standard | -E log D(e) - E log(1 - D(g))       | -E log(1 - D(e))     | -E log D(g)          |
| literal  |  E log D(e) + E log(1 - D(g))       | -E log D(e)          | -E log(1 - D(g))     |

In the standard form encoder and generator are partners and share one loss, the sum of theirs.

The literal form is that of older articles, taken at its word: three players, each of whom minimises what is written
for it. It is adversarial, with the roles of the pairs exchanged: minimising E log D(e) + E log(1 - D(g)),
the discriminator wants encoder pairs low and generator pairs high; the encoder wants its pairs high and the generator
its own low. The three losses sum to zero. Read as something that the discriminator *maximises*, it would not be
adversarial at all: discriminator and encoder would both raise D(e), and discriminator and generator both lower D(g).

Two warnings about the literal form. The discriminator's loss is unbounded below: once it is right, log D(e) falls
without end as the score does, and where the two kinds of pair agree, equal scores of zero are its worst point and not
its best. And it is the saturating form: where the discriminator is wrong, D(e) near 1, its gradient vanishes. Whoever
uses it needs few steps, a penalty on the discriminator's slope or small rates.

Sources: Donahue, Krähenbühl, Darrell, Adversarial Feature Learning, 2017, section 3; Dumoulin et al., Adversarially
Learned Inference, 2017, algorithm 1, whose losses for encoder and generator (non-saturating) the standard form has.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from metagen_jax.models.monitors import real_above_made, spread_ratio
from metagen_jax.models.networks import Network
from metagen_jax.models.weighted import weighted_mean
from metagen_jax.types import Array, Examples, Key, Losses, Metrics, Model, Params

PLAYERS = ("encoder", "generator", "discriminator")
Form = Literal["standard", "literal"]


class BidirectionalGan(NamedTuple):
    """A bidirectional GAN: a model, and its two directions."""

    model: Model
    encode: Callable[[Params, Array], Array]  # (params, x [N, *event] in [0, 1]) -> z [N, Z]
    generate: Callable[[Params, Array], Array]  # (params, z [N, Z]) -> [N, *event] in [0, 1]


def bidirectional_gan(
    encoder: Network, generator: Network, discriminator: Network, num_latents: int, *, form: Form = "standard"
) -> BidirectionalGan:
    """Return the bidirectional GAN of three networks.

    Args:
        encoder: [N, *event] in [-1, 1] -> [N, Z].
        generator: [N, Z] -> [N, *event], before tanh.
        discriminator: [N, pixels + Z] -> [N, 1], a logit; the input is a flattened image in [-1, 1], then a code.
        num_latents: Z.
        form: "standard", or "literal" (see the table above).

    Returns:
        Model and the functions `encode` and `generate`. `sample` generates from codes of N(0, I), in [0, 1]. Metrics,
        weighted means: the scores `encoder_score` and `generator_score` of the two kinds of pair; and the monitors of
        `models.monitors`.

    Raises:
        ValueError: no latent dimension or an unknown form; when called, a network whose output has another shape.

    Example:
        >>> from metagen_jax.models.networks import mlp
        >>> encoder, generator = mlp((8, 8, 1), (16,), (2,)), mlp((2,), (16,), (8, 8, 1))
        >>> model, encode, _ = bidirectional_gan(encoder, generator, mlp((66,), (16,), (1,)), 2)
        >>> encode(model.init(jax.random.key(0)), jnp.zeros((3, 8, 8, 1))).shape
        (3, 2)
    """
    if num_latents < 1:
        raise ValueError(f"expected at least one latent, got num_latents={num_latents}")
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {get_args(Form)}, got {form!r}")

    def init(key: Key) -> Params:
        keys = jax.random.split(key, len(PLAYERS))
        networks = (encoder, generator, discriminator)
        return {name: network.init(key) for name, network, key in zip(PLAYERS, networks, keys, strict=True)}

    def encoded(params: Params, x: Array) -> Array:
        """Encode images in [-1, 1]."""
        codes = encoder.apply(params["encoder"], x)
        if codes.shape != (x.shape[0], num_latents):
            raise ValueError(
                f"the encoder must give one code an image, [{x.shape[0]}, {num_latents}], got {list(codes.shape)}"
            )
        return codes

    def made(params: Params, z: Array) -> Array:
        """Generate images in [-1, 1]."""
        return jnp.tanh(generator.apply(params["generator"], z))

    def scores(params: Params, x: Array, z: Array) -> Array:
        pairs = jnp.concatenate([x.reshape(x.shape[0], -1), z], axis=1)
        score = discriminator.apply(params["discriminator"], pairs)
        if score.shape != (x.shape[0], 1):
            raise ValueError(
                f"the discriminator must give one score a pair, [{x.shape[0]}, 1], got {list(score.shape)}"
            )
        return score[:, 0]

    def game(params: Params, key: Key, batch: Examples) -> tuple[Losses, Metrics]:
        x = 2 * batch.x - 1
        z = jax.random.normal(key, (x.shape[0], num_latents))
        images = made(params, z)
        if images.shape != x.shape:
            raise ValueError(f"the generator makes {list(images.shape)} beside real images {list(x.shape)}")
        of_encoder, of_generator = scores(params, x, encoded(params, x)), scores(params, images, z)

        def surprise(signed_scores: Array) -> Array:
            """Return -E log sigmoid."""
            return weighted_mean(jax.nn.softplus(-signed_scores), batch.weight)

        metrics = {
            "encoder_score": weighted_mean(of_encoder, batch.weight),
            "generator_score": weighted_mean(of_generator, batch.weight),
            "real_above_made": real_above_made(of_encoder, of_generator, batch.weight, batch.weight),
            "spread_ratio": spread_ratio(images, batch.weight, x, batch.weight),
        }
        if form == "standard":
            shared = surprise(-of_encoder) + surprise(of_generator)
            own = surprise(of_encoder) + surprise(-of_generator)
            return {"encoder": shared, "generator": shared, "discriminator": own}, metrics
        of_e, of_g = surprise(of_encoder), surprise(-of_generator)
        return {"encoder": of_e, "generator": of_g, "discriminator": -of_e - of_g}, metrics

    def encode(params: Params, x: Array) -> Array:
        return encoded(params, 2 * x - 1)

    def generate(params: Params, z: Array) -> Array:
        return (made(params, z) + 1) / 2

    def sample(params: Params, key: Key, num: int) -> Array:
        return generate(params, jax.random.normal(key, (num, num_latents)))

    return BidirectionalGan(Model(init, game, sample), encode, generate)
