"""Three workloads of second-order meta-learning: a user's own models, synthetic data, and noise.

| name | model | loss | players |
|---|---|---|---|
| w1 | MLP-VAE 784-400-(20,20), 20-400-784, ReLU | -ELBO / 784, Bernoulli | model |
| w2 | conv-VAE, 4x4 convolutions of stride 2, 32-64-64, latent 32, mirrored decoder, ReLU | as w1 | model |
| w3 | MLP-GAN 100-128-256-512-1024-784 (tanh), 784-512-256-1, leaky ReLU | non-saturating | generator, discriminator |

5 examples to adapt to, 15 to be judged on, 5 steps of SGD at rate 0.01 in which all players move at once. A game draws
its noise from the key that it is given; `noise` returns those draws as arrays, so that what another framework computes
can be compared number by number.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import metagen_jax as mg
from metagen_jax.models.networks import convolve, convolve_transposed

PIXELS = 784
Tree = Any


class Noise(NamedTuple):
    """The normal draws of a game: in each inner step, and on the query."""

    support: Any  # [T, K, N, Z]
    query: Any  # [T, N, Z]


class Workload(NamedTuple):
    """A model, how its tasks are adapted to, and what they are made of."""

    name: str
    model: mg.Model
    rate: float  # of the inner SGD
    num_steps: int
    support: int  # examples of a task to adapt to
    query: int  # examples of a task to be judged on
    num_latents: int

    def tasks(self, key: mg.Key, num_tasks: int) -> mg.Task:
        """Return a batch of tasks, each of binary images [N, 28, 28, 1] that vary about a shape of its own."""
        shape_key, example_key = jax.random.split(key)
        num = self.support + self.query
        shape = jax.random.normal(shape_key, (num_tasks, 1, 7, 7), jnp.float32)
        change = jax.random.normal(example_key, (num_tasks, num, 7, 7), jnp.float32)
        smooth = jax.image.resize(shape + 0.5 * change, (num_tasks, num, 28, 28), "cubic")
        x = (smooth > 0.6)[..., None].astype(float)
        return mg.Task(_examples(x[:, : self.support]), _examples(x[:, self.support :]))

    def noise(self, keys: mg.Key, order: str = "maml") -> Noise:
        """Return what the game draws when tasks with these keys [T] are learned from; Reptile splits no key."""
        adapt_keys, query_keys = (keys, keys) if order == "reptile" else jax.vmap(jax.random.split, out_axes=1)(keys)
        steps = jnp.arange(self.num_steps)
        step_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(adapt_keys, steps)
        draw = lambda key, num: jax.random.normal(key, (num, self.num_latents))  # noqa: E731
        support = jax.vmap(jax.vmap(lambda key: draw(key, self.support)))(step_keys)
        return Noise(support, jax.vmap(lambda key: draw(key, self.query))(query_keys))


def w1(*, num_steps: int = 5, support: int = 5, query: int = 15, width: int = 400) -> Workload:
    """Return the MLP-VAE with `width` hidden units on either side."""
    num_latents = 20

    def init(key: mg.Key) -> mg.Params:
        encoder_key, decoder_key = jax.random.split(key)
        encoder = _init_mlp(encoder_key, (PIXELS, width, 2 * num_latents))
        return {"model": {"encoder": encoder, "decoder": _init_mlp(decoder_key, (num_latents, width, PIXELS))}}

    def encode(tree: Tree, x: mg.types.Array) -> mg.types.Array:
        return _mlp(tree, x.reshape(-1, PIXELS), jax.nn.relu)

    model = _vae(init, encode, lambda tree, z: _mlp(tree, z, jax.nn.relu), num_latents)
    return Workload("w1", model, 0.01, num_steps, support, query, num_latents)


def w2(*, num_steps: int = 5, support: int = 5, query: int = 15, width: int = 32) -> Workload:
    """Return the convolutional VAE with `width`, 2 `width` and 2 `width` channels."""
    num_latents, wide = 32, 2 * width

    def init(key: mg.Key) -> mg.Params:
        keys = jax.random.split(key, 8)
        encoder = {
            "conv_0": _init_layer(keys[0], (4, 4, 1, width)),
            "conv_1": _init_layer(keys[1], (4, 4, width, wide)),
            "conv_2": _init_layer(keys[2], (4, 4, wide, wide)),
            "dense_0": _init_layer(keys[3], (16 * wide, 2 * num_latents)),
        }
        decoder = {
            "dense_0": _init_layer(keys[4], (num_latents, 16 * wide)),
            "deconv_0": _init_layer(keys[5], (4, 4, wide, wide)),
            "deconv_1": _init_layer(keys[6], (4, 4, wide, width)),
            "deconv_2": _init_layer(keys[7], (4, 4, width, 1)),
        }
        return {"model": {"encoder": encoder, "decoder": decoder}}

    def encode(tree: Tree, x: mg.types.Array) -> mg.types.Array:
        for name in ("conv_0", "conv_1", "conv_2"):  # 28 -> 14 -> 7 -> 4
            x = jax.nn.relu(convolve(x, tree[name]["w"], 2) + tree[name]["b"])
        return _dense(tree["dense_0"], x.reshape(-1, 16 * wide))

    def decode(tree: Tree, z: mg.types.Array) -> mg.types.Array:
        x = jax.nn.relu(_dense(tree["dense_0"], z)).reshape(-1, 4, 4, wide)
        for name in ("deconv_0", "deconv_1"):  # 4 -> 8, cropped to 7 -> 14
            x = jax.nn.relu(convolve_transposed(x, tree[name]["w"], 2) + tree[name]["b"])
            x = x[:, :7, :7] if name == "deconv_0" else x
        return convolve_transposed(x, tree["deconv_2"]["w"], 2) + tree["deconv_2"]["b"]

    model = _vae(init, encode, decode, num_latents)
    return Workload("w2", model, 0.01, num_steps, support, query, num_latents)


def w3(*, num_steps: int = 5, support: int = 5, query: int = 15, width: int = 128) -> Workload:
    """Return the MLP-GAN; its hidden layers are 1, 2, 4, 8 and 4, 2 times `width`. As many are made as are real."""
    num_latents = 100

    def init(key: mg.Key) -> mg.Params:
        made_key, judged_key = jax.random.split(key)
        generator = _init_mlp(made_key, (num_latents, width, 2 * width, 4 * width, 8 * width, PIXELS))
        return {"generator": generator, "discriminator": _init_mlp(judged_key, (PIXELS, 4 * width, 2 * width, 1))}

    def generate(params: mg.Params, z: mg.types.Array) -> mg.types.Array:
        return jnp.tanh(_mlp(params["generator"], z, _leaky_relu))

    def game(params: mg.Params, key: mg.Key, batch: mg.Examples) -> tuple[mg.types.Losses, mg.Metrics]:
        x = 2 * batch.x.reshape(-1, PIXELS) - 1
        made = generate(params, jax.random.normal(key, (x.shape[0], num_latents)))
        of_real, of_made = (_mlp(params["discriminator"], each, _leaky_relu) for each in (x, made))
        discriminator = jax.nn.softplus(-of_real).mean() + jax.nn.softplus(of_made).mean()
        return {"generator": jax.nn.softplus(-of_made).mean(), "discriminator": discriminator}, {}

    def sample(params: mg.Params, key: mg.Key, num: int) -> mg.types.Array:
        return (generate(params, jax.random.normal(key, (num, num_latents))).reshape(num, 28, 28, 1) + 1) / 2

    return Workload("w3", mg.Model(init, game, sample), 0.01, num_steps, support, query, num_latents)


WORKLOADS: dict[str, Callable[..., Workload]] = {"w1": w1, "w2": w2, "w3": w3}


def _vae(init: Callable, encode: Callable, decode: Callable, num_latents: int) -> mg.Model:
    """Return the VAE whose encoder gives mean and log-variance in one row, with a standard normal prior."""

    def loss(params: mg.Params, key: mg.Key, batch: mg.Examples) -> tuple[mg.types.Array, mg.Metrics]:
        tree = params["model"]
        mean, log_variance = jnp.split(encode(tree["encoder"], batch.x), 2, axis=-1)
        z = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
        logits = decode(tree["decoder"], z).reshape(-1, PIXELS)
        misfit = jnp.sum(jax.nn.softplus(logits) - batch.x.reshape(-1, PIXELS) * logits, axis=-1)
        divergence = jnp.sum(jnp.exp(log_variance) + mean**2 - 1 - log_variance, axis=-1) / 2
        return jnp.mean(misfit + divergence) / PIXELS, {}

    def sample(params: mg.Params, key: mg.Key, num: int) -> mg.types.Array:
        logits = decode(params["model"]["decoder"], jax.random.normal(key, (num, num_latents)))
        return jax.nn.sigmoid(logits.reshape(num, 28, 28, 1))

    return mg.Model(init, mg.cooperative(loss), sample)


def _init_layer(key: mg.Key, shape: Sequence[int]) -> Tree:
    weight = jax.random.normal(key, shape) / math.sqrt(math.prod(shape[:-1]))
    return {"w": weight, "b": jnp.zeros(shape[-1])}


def _init_mlp(key: mg.Key, sizes: Sequence[int]) -> Tree:
    shapes = list(itertools.pairwise(sizes))
    keys = jax.random.split(key, len(shapes))
    return {f"dense_{i}": _init_layer(k, shape) for i, (k, shape) in enumerate(zip(keys, shapes, strict=True))}


def _dense(layer: Tree, x: mg.types.Array) -> mg.types.Array:
    return x @ layer["w"] + layer["b"]


def _mlp(tree: Tree, x: mg.types.Array, activation: Callable) -> mg.types.Array:
    for index in range(len(tree) - 1):
        x = activation(_dense(tree[f"dense_{index}"], x))
    return _dense(tree[f"dense_{len(tree) - 1}"], x)


def _leaky_relu(x: mg.types.Array) -> mg.types.Array:
    return jax.nn.leaky_relu(x, 0.2)


def _examples(x: mg.types.Array) -> mg.Examples:
    return mg.Examples(x, jnp.zeros(x.shape[:2], jnp.int32), jnp.ones(x.shape[:2]))
