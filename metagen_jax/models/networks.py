"""Networks as pairs of pure functions; the only module that knows flax.

Every hidden layer is `activation(gain * normalise(kernel x) + bias)`: the kernels hold what all tasks share, gains and
biases (feature-wise modulations) are a small part of the parameters that a task can move cheaply, so they can be split
off with `split_modulation`. Nothing here has state: no running averages, no dropout.

How the products with kernels are made, at which precision, and convolutions in which form: `models/convolutions.py`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from metagen_jax.models.convolutions import (
    Form,
    Precision,
    convolve,
    convolve_transposed,
    depth_to_space,
    known_choices,
    product,
)
from metagen_jax.types import Array, ArrayTree, Key

Activation = Callable[[Array], Array]
Normalisation = Literal["none", "layer"]
Pooling = Literal["stride", "max"]
MODULATION = ("gain", "bias")
OUTPUT = "output"
LAYER_GATE, WIDTH_GATE = "layer_gate", "width_gate"


gelu = nn.gelu


def leaky_relu(x: Array) -> Array:
    """Return x where it is positive, and a fifth of it elsewhere."""
    return nn.leaky_relu(x, 0.2)


class Network(NamedTuple):
    """A function with parameters, on a batch of examples."""

    init: Callable[[Key], ArrayTree]
    apply: Callable[[ArrayTree, Array], Array]  # (params, [N, *input]) -> [N, *output]


def from_flax(module: nn.Module, example: Array) -> Network:
    """Return the network of a flax module without state; `example` is one batch of inputs [N, *input].

    Raises:
        ValueError: the module has variables that are not parameters (running averages), which tasks would share.
    """
    kinds = set(jax.eval_shape(module.init, jax.random.key(0), example))
    if kinds - {"params"}:
        raise ValueError(
            f"{type(module).__name__} keeps {sorted(kinds - {'params'})} between calls, which would leak from task to "
            "task; normalise by layer or group instead of by running averages"
        )

    def apply(params: ArrayTree, x: Array) -> Array:
        return module.apply({"params": params}, x)  # type: ignore[return-value]

    return Network(lambda key: module.init(key, example)["params"], apply)


def mlp(
    event: Sequence[int],
    hidden: Sequence[int],
    output: Sequence[int],
    *,
    activation: Activation = nn.gelu,
    normalisation: Normalisation | Sequence[Normalisation] = "none",
    precision: Precision = "float32",
) -> Network:
    """Return a multi-layer perceptron [N, *event] -> [N, *output], with one normalisation for all layers or for each.

    Raises:
        ValueError: another number of normalisations than of hidden layers, or an unknown precision.
    """
    known_choices(precision=precision)
    each = (normalisation,) * len(hidden) if isinstance(normalisation, str) else tuple(normalisation)
    if len(each) != len(hidden):
        raise ValueError(f"expected one normalisation for all or for each of {len(hidden)} hidden layers, got {each}")
    module = _Mlp(tuple(hidden), tuple(output), activation, each, precision)
    return from_flax(module, jnp.zeros((1, *event)))


def conv_encoder(
    event: Sequence[int],
    channels: Sequence[int],
    num_outputs: int,
    *,
    activation: Activation = nn.gelu,
    normalisation: Normalisation = "none",
    window: int = 4,
    form: Form = "auto",
    precision: Precision = "float32",
) -> Network:
    """Return convolutions of this window and stride 2, and a dense layer: [N, H, W, C] -> [N, num_outputs].

    Raises:
        ValueError: an unknown form or precision.
    """
    known_choices(form=form, precision=precision)
    module = _ConvEncoder(tuple(channels), num_outputs, activation, normalisation, window, form, precision)
    return from_flax(module, jnp.zeros((1, *event)))


def conv_decoder(
    num_inputs: int,
    channels: Sequence[int],
    event: Sequence[int],
    *,
    activation: Activation = nn.gelu,
    normalisation: Normalisation = "none",
    dense: Sequence[int] = (),
    window: int = 3,
    form: Form = "auto",
    precision: Precision = "float32",
) -> Network:
    """Return the mirror of `conv_encoder`, [N, num_inputs] -> [N, H, W, C], that doubles height and width by stages.

    With window 3, a stage is a 3x3 convolution to four times the channels, whose groups of four become 2x2 pixels (36
    C F multiplications for each pixel of its input); with window 4 it is a 4x4 transposed convolution of stride 2 (16
    C F). `dense` layers come before the first stage.

    Raises:
        ValueError: a window other than 3 or 4, or an unknown form or precision.
    """
    known_choices(form=form, precision=precision)
    if window not in (3, 4):
        raise ValueError(f"the stages of a decoder have windows of 3 (sub-pixel) or 4 (transposed), got {window}")
    module = _ConvDecoder(
        tuple(channels), tuple(event), activation, normalisation, tuple(dense), window, form, precision
    )
    return from_flax(module, jnp.zeros((1, num_inputs)))


def conv_features(
    event: Sequence[int],
    channels: Sequence[int] = (64, 64, 64, 64),
    *,
    pooling: Pooling = "stride",
    activation: Activation = nn.relu,
    normalisation: Normalisation = "layer",
    form: Form = "auto",
    precision: Precision = "float32",
) -> Network:
    """Return 3x3 convolutions that halve height and width, flattened: [N, H, W, C] -> [N, F], as in "conv-4".

    Args:
        event: (H, W, C).
        channels: of each stage.
        pooling: "stride" halves by convolutions of stride 2, "max" by the largest of 2x2 outputs of stride 1 (about
            four times the operations).
        activation: after each normalised convolution.
        normalisation: "layer" for each example; the articles normalise over a batch, which mixes examples.
        form: of convolutions, see `metagen_jax.models.convolutions`.
        precision: of their factors.

    Raises:
        ValueError: an unknown pooling, form or precision.

    Source: Vinyals et al., 2016 (max, 64 channels); Finn, Abbeel & Levine, 2017 (stride, for Omniglot).
    """
    known_choices(form=form, precision=precision)
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling must be one of {get_args(Pooling)}, got {pooling!r}")
    module = _ConvFeatures(tuple(channels), activation, normalisation, pooling, form, precision)
    return from_flax(module, jnp.zeros((1, *event)))


def num_features_of(network: Network, event: Sequence[int]) -> int:
    """Return F of a network [N, *event] -> [N, F]."""
    shape = jax.eval_shape(
        lambda key: network.apply(network.init(key), jnp.zeros((1, *event))), jax.random.key(0)
    ).shape
    return shape[-1]


def mlp_features(
    event: Sequence[int],
    hidden: Sequence[int],
    *,
    activation: Activation = nn.relu,
    normalisation: Normalisation = "layer",
    precision: Precision = "float32",
) -> Network:
    """Return hidden layers without an output layer: [N, *event] -> [N, hidden[-1]].

    Raises:
        ValueError: an unknown precision, or no layer.
    """
    known_choices(precision=precision)
    if not hidden:
        raise ValueError("features need at least one hidden layer, got none")
    module = _MlpFeatures(tuple(hidden), activation, normalisation, precision)
    return from_flax(module, jnp.zeros((1, *event)))


def split_modulation(tree: ArrayTree) -> tuple[ArrayTree, ArrayTree, ArrayTree]:
    """Split a network's parameters into (kernels, modulation, output): output is the last layer, whole.

    `join` puts them together again.
    """
    parts: tuple[dict, dict, dict] = ({}, {}, {})
    for path, leaf in flatten_dict(tree).items():
        parts[2 if path[0] == OUTPUT else 1 if path[-1] in MODULATION else 0][path] = leaf
    return tuple(unflatten_dict(part) for part in parts)


def split_structure(tree: ArrayTree) -> tuple[ArrayTree, ArrayTree]:
    """Split a network's parameters into (all but its gates, its gates); a network without gates has {} of them."""
    parts: tuple[dict, dict] = ({}, {})
    for path, leaf in flatten_dict(tree).items():
        parts[1 if LAYER_GATE in path or WIDTH_GATE in path else 0][path] = leaf
    return unflatten_dict(parts[0]), unflatten_dict(parts[1])


def has_gates(network: Network) -> bool:
    """Whether a network's parameters have gates of structure (`metagen_jax.models.structure`)."""
    return bool(split_structure(jax.eval_shape(network.init, jax.random.key(0)))[1])


def join(*parts: ArrayTree) -> ArrayTree:
    """Return one tree of parameters from disjoint parts."""
    return unflatten_dict({path: leaf for part in parts for path, leaf in flatten_dict(part).items()})


class _Product(NamedTuple):
    """How a layer multiplies its input with its kernel."""

    multiply: Callable[[Array, Array], Array]  # (x, kernel) -> y
    window: int | None = None  # of a convolution, None if dense
    uses: float = 1.0  # h w C / uses numbers of the kernel add up to one output

    def init(self, key: Key, shape: Sequence[int], dtype: jnp.dtype = jnp.float32) -> Array:
        """Return a kernel that keeps the variance."""
        return nn.initializers.variance_scaling(self.uses, "fan_in", "truncated_normal")(key, shape, dtype)

    def shape(self, inputs: int, features: int) -> tuple[int, ...]:
        """Return the kernel's shape."""
        return (inputs, features) if self.window is None else (self.window, self.window, inputs, features)


class _Hidden(nn.Module):
    """A layer [N, *, C] -> [N, *, features]."""

    features: int
    activation: Activation
    normalisation: Normalisation
    product: _Product

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.product.init, self.product.shape(x.shape[-1], self.features))
        gain = self.param("gain", nn.initializers.ones, (self.features,))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = self.product.multiply(x, kernel)
        if self.normalisation == "layer":
            axes = tuple(range(1, x.ndim))
            mean = x.mean(axes, keepdims=True)
            variance = jnp.square(x - mean).mean(axes, keepdims=True)
            x = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
        spread = (1,) * (x.ndim - 1) + (self.features,)
        return self.activation(gain.reshape(spread) * x + bias.reshape(spread))


class _Output(nn.Module):
    """The last layer, without activation: [N, *, C] -> [N, *, features]."""

    features: int
    product: _Product

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.product.init, self.product.shape(x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = self.product.multiply(x, kernel)
        return x + bias.reshape((1,) * (x.ndim - 1) + (self.features,))


def _dense(precision: Precision) -> _Product:
    return _Product(functools.partial(product, precision=precision))


class _Mlp(nn.Module):
    hidden: tuple[int, ...]
    output: tuple[int, ...]
    activation: Activation
    normalisation: tuple[Normalisation, ...]  # of each hidden layer
    precision: Precision

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x, dense = x.reshape(x.shape[0], -1), _dense(self.precision)
        for index, (features, normalisation) in enumerate(zip(self.hidden, self.normalisation, strict=True)):
            x = _Hidden(features, self.activation, normalisation, dense, name=f"hidden_{index}")(x)
        return _Output(math.prod(self.output), dense, name=OUTPUT)(x).reshape(x.shape[0], *self.output)


class _MlpFeatures(nn.Module):
    hidden: tuple[int, ...]
    activation: Activation
    normalisation: Normalisation
    precision: Precision

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x, dense = x.reshape(x.shape[0], -1), _dense(self.precision)
        for index, features in enumerate(self.hidden):
            x = _Hidden(features, self.activation, self.normalisation, dense, name=f"hidden_{index}")(x)
        return x


class _ConvFeatures(nn.Module):
    channels: tuple[int, ...]
    activation: Activation
    normalisation: Normalisation
    pooling: Pooling
    form: Form
    precision: Precision

    @nn.compact
    def __call__(self, x: Array) -> Array:
        strided = self.pooling == "stride"
        multiply = functools.partial(convolve, stride=2 if strided else 1, form=self.form, precision=self.precision)
        for index, features in enumerate(self.channels):
            stage = _Product(multiply, 3)
            x = _Hidden(features, self.activation, self.normalisation, stage, name=f"hidden_{index}")(x)
            if not strided:
                x = nn.max_pool(x, (2, 2), (2, 2))
        return x.reshape(x.shape[0], -1)


class _ConvEncoder(nn.Module):
    channels: tuple[int, ...]
    num_outputs: int
    activation: Activation
    normalisation: Normalisation
    window: int
    form: Form
    precision: Precision

    @nn.compact
    def __call__(self, x: Array) -> Array:
        strided = functools.partial(convolve, stride=2, form=self.form, precision=self.precision)
        stage = _Product(strided, self.window)
        for index, features in enumerate(self.channels):
            x = _Hidden(features, self.activation, self.normalisation, stage, name=f"hidden_{index}")(x)
        return _Output(self.num_outputs, _dense(self.precision), name=OUTPUT)(x.reshape(x.shape[0], -1))


class _ConvDecoder(nn.Module):
    channels: tuple[int, ...]  # as of the encoder: the first one is nearest the image
    event: tuple[int, ...]
    activation: Activation
    normalisation: Normalisation
    dense: tuple[int, ...]
    window: int
    form: Form
    precision: Precision

    @nn.compact
    def __call__(self, z: Array) -> Array:
        dense = _dense(self.precision)
        for index, width in enumerate(self.dense):
            z = _Hidden(width, self.activation, self.normalisation, dense, name=f"dense_{index}")(z)
        rows, columns, image_channels = self.event
        sizes = [(rows, columns)]
        for _ in self.channels:
            sizes.append((math.ceil(sizes[-1][0] / 2), math.ceil(sizes[-1][1] / 2)))
        small, first = sizes[-1], self.channels[-1]
        x = _Hidden(small[0] * small[1] * first, self.activation, self.normalisation, dense, name="hidden_0")(z)
        x = x.reshape(z.shape[0], *small, first)
        sub_pixel = self.window == 3
        if sub_pixel:
            same = functools.partial(convolve, stride=1, form=self.form, precision=self.precision)
            stage, more = _Product(same, 3), 4
        else:
            twice = functools.partial(convolve_transposed, stride=2, form=self.form, precision=self.precision)
            stage, more = _Product(twice, 4, uses=4.0), 1
        stages = [*reversed(self.channels[:-1]), None]
        for index, (features, size) in enumerate(zip(stages, reversed(sizes[:-1]), strict=True)):
            if features is None:
                x = _Output(more * image_channels, stage, name=OUTPUT)(x)
            else:
                name = f"hidden_{index + 1}"
                x = _Hidden(more * features, self.activation, self.normalisation, stage, name=name)(x)
            x = (depth_to_space(x, 2) if sub_pixel else x)[:, : size[0], : size[1]]
        return x
