"""Textbook JAX without the library: jit(value_and_grad(vmap(scan))), convolutions as `lax` has them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Tree = Any
PIXELS = 784
LAYOUT = ("NHWC", "HWIO", "NHWC")


def meta_gradient(
    name: str,
    params: Any,
    tasks: Any,
    noise: Any,
    *,
    rate: float,
    num_steps: int,
    order: str = "maml",
    dtype: str = "float32",
) -> Callable[[], tuple[Tree, Tree]]:
    """Return the meta-gradient as a function of nothing, see `peers`."""
    del num_steps  # that of the noise
    to_device = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)  # noqa: E731
    meta = to_device(params)
    data = to_device((tasks.support.x, noise.support, tasks.query.x, noise.query))
    game = {"w1": _mlp_vae, "w2": _conv_vae, "w3": _gan}[name]

    def directions(phi: Tree, x: Array, z: Array) -> tuple[Tree, Tree]:
        losses, moves = {}, {}
        for player in phi:
            own = lambda mine, player=player: game({**phi, player: mine}, x, z)[player]  # noqa: E731
            losses[player], moves[player] = jax.value_and_grad(own)(phi[player])
        return losses, moves

    def adapt(phi: Tree, x: Array, z: Array) -> tuple[Tree, Tree]:
        def step(phi: Tree, z: Array) -> tuple[Tree, Tree]:
            losses, moves = directions(phi, x, z)
            moves = moves if order == "maml" else lax.stop_gradient(moves)
            return jax.tree.map(lambda a, b: a - rate * b, phi, moves), losses

        return lax.scan(step, phi, z)

    def judged(meta: Tree, *data: Array) -> Tree:
        def one(x: Array, z: Array, query: Array, query_z: Array) -> Tree:
            return game(adapt(meta, x, z)[0], query, query_z)

        return jax.tree.map(jnp.mean, jax.vmap(one)(*data))

    @jax.jit
    def through(meta: Tree, *data: Array) -> tuple[Tree, Tree]:
        losses, pull = jax.vjp(lambda meta: judged(meta, *data), meta)
        chosen = {player: {other: jnp.asarray(other == player, dtype) for other in meta} for player in meta}
        return losses, {player: pull(chosen[player])[0][player] for player in meta}

    @jax.jit
    def displaced(meta: Tree, x: Array, z: Array, *_: Array) -> tuple[Tree, Tree]:
        def one(x: Array, z: Array) -> tuple[Tree, Tree]:
            phi, losses = adapt(meta, x, z)
            return losses, jax.tree.map(lambda a, b: a - b, meta, phi)

        losses, moved = jax.vmap(one)(x, z)
        return jax.tree.map(jnp.mean, losses), jax.tree.map(lambda leaf: leaf.mean(0), moved)

    return lambda: (displaced if order == "reptile" else through)(meta, *data)


def _mlp_vae(params: Tree, x: Array, z: Array) -> Tree:
    tree, pixels = params["model"], x.reshape(-1, PIXELS)
    return _vae(_mlp(tree["encoder"], pixels, jax.nn.relu), lambda z: _mlp(tree["decoder"], z, jax.nn.relu), pixels, z)


def _conv_vae(params: Tree, x: Array, noise: Array) -> Tree:
    encoder, decoder = params["model"]["encoder"], params["model"]["decoder"]
    h = x
    for index in range(3):
        layer = encoder[f"conv_{index}"]
        h = jax.nn.relu(lax.conv_general_dilated(h, layer["w"], (2, 2), "SAME", dimension_numbers=LAYOUT) + layer["b"])

    def decode(z: Array) -> Array:
        h = jax.nn.relu(_dense(decoder["dense_0"], z)).reshape(z.shape[0], 4, 4, -1)
        for index, size in enumerate((7, 14, 28)):
            layer = decoder[f"deconv_{index}"]
            h = lax.conv_transpose(h, layer["w"], (2, 2), "SAME", dimension_numbers=LAYOUT)
            h = h[:, :size, :size] + layer["b"]
            h = jax.nn.relu(h) if size < 28 else h
        return h.reshape(-1, PIXELS)

    return _vae(_dense(encoder["dense_0"], h.reshape(h.shape[0], -1)), decode, x.reshape(-1, PIXELS), noise)


def _vae(statistics: Array, decode: Callable[[Array], Array], x: Array, noise: Array) -> Tree:
    mean, log_variance = jnp.split(statistics, 2, axis=-1)
    logits = decode(mean + jnp.exp(0.5 * log_variance) * noise)
    misfit = (jax.nn.softplus(logits) - x * logits).sum(-1)
    divergence = 0.5 * (jnp.exp(log_variance) + mean**2 - 1 - log_variance).sum(-1)
    return {"model": (misfit + divergence).mean() / PIXELS}


def _gan(params: Tree, x: Array, z: Array) -> Tree:
    leaky = lambda x: jax.nn.leaky_relu(x, 0.2)  # noqa: E731
    made = _mlp(params["discriminator"], jnp.tanh(_mlp(params["generator"], z, leaky)), leaky)
    real = _mlp(params["discriminator"], 2 * x.reshape(-1, PIXELS) - 1, leaky)
    discriminator = jax.nn.softplus(-real).mean() + jax.nn.softplus(made).mean()
    return {"generator": jax.nn.softplus(-made).mean(), "discriminator": discriminator}


def _dense(layer: Tree, x: Array) -> Array:
    return x @ layer["w"] + layer["b"]


def _mlp(tree: Tree, x: Array, activation: Callable[[Array], Array]) -> Array:
    for index in range(len(tree) - 1):
        x = activation(_dense(tree[f"dense_{index}"], x))
    return _dense(tree[f"dense_{len(tree) - 1}"], x)
