"""Sizes as traits: networks of one shape of which each member uses the first so many units.

    h_c = m_c act(gain_c norm(z)_c + bias_c),   m_c = 1 for c < alive, 0 beyond; norm takes the mean of those alive

With the weights of a narrow network in the first rows and columns, that is the narrow network in function and in the
gradient, and the gradient of all that is beyond is zero. What it costs is the wide network, whatever is alive: masks
let sizes vary in one program and save nothing.

Source: masks in place of shapes as in Cai et al., Once-for-All, 2020, without sharing weights between sizes: each
member has its own.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from metagen_jax.models.convolutions import convolve
from metagen_jax.models.networks import OUTPUT, Activation, Network, Normalisation, conv_features
from metagen_jax.types import Array, ArrayTree, Key


def first_units(alive: Array | int, num_units: int) -> Array:
    """Return the mask [num_units] of the first `alive` units.

    Example:
        >>> first_units(2, 3).tolist()
        [1.0, 1.0, 0.0]
    """
    return (jnp.arange(num_units) < alive).astype(jnp.float32)


def masked(network: Network, masks: dict[str, Array]) -> Network:
    """Return a network of `metagen_jax.models.networks` without normalisation, in which hidden units are masked.

    Gains and biases are multiplied by the masks, so that a unit that is out is act(0), which has to be zero (relu,
    gelu, silu and tanh are so). The kernels of its layer keep the scale of the wide one.

    Args:
        network: `mlp(...)`, `conv_encoder(...)`, ... with `normalisation="none"`; under another the units that are out
            would still count in means (`masked_conv_features` is for those).
        masks: hidden layer -> [units], traced or not: {"hidden_0": first_units(traits["width"], 64)}.

    Raises:
        ValueError: a layer that the network does not have, or that is no hidden one; a mask of another length.
    """
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    for name, mask in masks.items():
        if name == OUTPUT or name not in shapes or shapes[name]["gain"].shape != jnp.shape(mask):
            hidden = {layer: tree["gain"].shape for layer, tree in shapes.items() if layer != OUTPUT}
            raise ValueError(f"expected masks of hidden layers, {hidden}, got {name!r} of shape {jnp.shape(mask)}")

    def apply(params: ArrayTree, x: Array) -> Array:
        cut = {
            name: {**params[name], "gain": params[name]["gain"] * mask, "bias": params[name]["bias"] * mask}
            for name, mask in masks.items()
        }
        return network.apply({**params, **cut}, x)

    return Network(network.init, apply)


def masked_conv_features(
    event: Sequence[int],
    channels: Sequence[int],
    alive: Sequence[Array | int],
    *,
    activation: Activation = jax.nn.relu,
    normalisation: Normalisation = "layer",
) -> Network:
    """Return `conv_features` of stride 2 of which the first `alive` channels of each stage are used, [N, F].

    F is that of the wide network; features that are out are zero, so that a head on them is the head of the narrow one
    (kernels of a linear head get no gradient there, distances of prototypes no term).

    Args:
        event: (H, W, C).
        channels: of each stage of the wide network.
        alive: [] of each stage, at least 1, traced or not. The means of a layer's normalisation are over those.
        activation: after each normalised convolution, of any value at zero.
        normalisation: "layer" for each example, or "none".

    Returns:
        The network; parameters as of `conv_features`. Kernels begin at the scale of the narrow network.

    Raises:
        ValueError: another number of stages.
    """
    if len(alive) != len(channels) or not channels:
        raise ValueError(f"expected channels that are alive for each of the stages {tuple(channels)}, got {len(alive)}")
    wide = conv_features(event, channels, activation=activation, normalisation=normalisation)
    masks = [first_units(count, units) for count, units in zip(alive, channels, strict=True)]
    inputs: list[tuple[int, Array | int]] = [(event[-1], event[-1]), *zip(channels, alive, strict=True)][:-1]

    def init(key: Key) -> ArrayTree:
        params = dict(wide.init(key))
        for index, (units, used) in enumerate(inputs):
            layer = params[f"hidden_{index}"]
            params[f"hidden_{index}"] = {**layer, "kernel": layer["kernel"] * jnp.sqrt(units / used)}
        return params

    def apply(params: ArrayTree, x: Array) -> Array:
        for index, mask in enumerate(masks):
            layer, mask = params[f"hidden_{index}"], mask.reshape(1, 1, 1, -1)
            z = convolve(x, layer["kernel"], 2)
            if normalisation == "layer":
                z = _normalised(z, mask)
            gain, bias = (layer[name].reshape(1, 1, 1, -1) for name in ("gain", "bias"))
            x = mask * activation(gain * z + bias)
        return x.reshape(x.shape[0], -1)

    return Network(init, apply)


def _normalised(z: Array, mask: Array) -> Array:
    """Return z [N, H, W, C] less its mean over its deviation, both of each example's channels that are alive."""
    count = mask.sum() * math.prod(z.shape[1:3])

    def mean(values: Array) -> Array:
        return (mask * values).sum((1, 2, 3), keepdims=True) / count

    centred = z - mean(z)
    return centred * jax.lax.rsqrt(mean(jnp.square(centred)) + 1e-5)
