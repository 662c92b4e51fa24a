"""Networks as pairs of pure functions; the only module that knows flax.

Every hidden layer is `activation(gain * normalise(kernel x) + bias)`: the kernels hold what all tasks share, gains and
biases (feature-wise modulations) are a small part of the parameters that a task can move cheaply, so they can be split
off with `split_modulation`. Nothing here has state: no running averages, no dropout.

Convolutions are slices and one matrix product. Under vmap over per-task kernels, `lax.conv` becomes one grouped
convolution whose gradients run many times slower; a matrix product becomes a batched matrix product.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from metagen_jax.types import Array, ArrayTree, Key

Activation = Callable[[Array], Array]
Normalisation = Literal["none", "layer"]
MODULATION = ("gain", "bias")
OUTPUT = "output"


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
) -> Network:
    """Return a multi-layer perceptron [N, *event] -> [N, *output], with one normalisation for all layers or for each.

    Raises:
        ValueError: another number of normalisations than of hidden layers.
    """
    each = (normalisation,) * len(hidden) if isinstance(normalisation, str) else tuple(normalisation)
    if len(each) != len(hidden):
        raise ValueError(f"expected one normalisation for all or for each of {len(hidden)} hidden layers, got {each}")
    module = _Mlp(tuple(hidden), tuple(output), activation, each)
    return from_flax(module, jnp.zeros((1, *event)))


def conv_encoder(
    event: Sequence[int],
    channels: Sequence[int],
    num_outputs: int,
    *,
    activation: Activation = nn.gelu,
    normalisation: Normalisation = "none",
    window: int = 4,
) -> Network:
    """Return convolutions of this window and stride 2, and a dense layer: [N, H, W, C] -> [N, num_outputs]."""
    module = _ConvEncoder(tuple(channels), num_outputs, activation, normalisation, window)
    return from_flax(module, jnp.zeros((1, *event)))


def conv_decoder(
    num_inputs: int,
    channels: Sequence[int],
    event: Sequence[int],
    *,
    activation: Activation = nn.gelu,
    normalisation: Normalisation = "none",
    dense: Sequence[int] = (),
) -> Network:
    """Return the mirror of `conv_encoder`, [N, num_inputs] -> [N, H, W, C], by sub-pixel upsampling.

    Each stage is a 3x3 convolution to four times the channels, whose groups of four become 2x2 pixels. `dense` layers
    come before the first stage.
    """
    module = _ConvDecoder(tuple(channels), tuple(event), activation, normalisation, tuple(dense))
    return from_flax(module, jnp.zeros((1, num_inputs)))


def split_modulation(tree: ArrayTree) -> tuple[ArrayTree, ArrayTree, ArrayTree]:
    """Split a network's parameters into (kernels, modulation, output): output is the last layer, whole.

    `join` puts them together again.
    """
    parts: tuple[dict, dict, dict] = ({}, {}, {})
    for path, leaf in flatten_dict(tree).items():
        parts[2 if path[0] == OUTPUT else 1 if path[-1] in MODULATION else 0][path] = leaf
    return tuple(unflatten_dict(part) for part in parts)


def join(*parts: ArrayTree) -> ArrayTree:
    """Return one tree of parameters from disjoint parts."""
    return unflatten_dict({path: leaf for part in parts for path, leaf in flatten_dict(part).items()})


def convolve(x: Array, kernel: Array, stride: int) -> Array:
    """Convolve [N, H, W, C] with [h, w, C, F], padded so that the output is [N, ceil(H/stride), ceil(W/stride), F].

    Equals `lax.conv_general_dilated` with padding "SAME". Where the stride divides the kernel, space-to-depth first
    makes the slices contiguous; the product is one matrix product either way.
    """
    height, width, channels, features = kernel.shape
    num, rows, columns, _ = x.shape
    out = (math.ceil(rows / stride), math.ceil(columns / stride))
    needed = [(n - 1) * stride + k - size for n, k, size in zip(out, (height, width), (rows, columns), strict=True)]
    before = [max(n, 0) // 2 for n in needed]
    padding = [(0, 0), *((b, max(n, 0) - b) for b, n in zip(before, needed, strict=True)), (0, 0)]
    x = jnp.pad(x, padding)
    if height % stride == 0 and width % stride == 0 and stride > 1:
        x = x[:, : (out[0] - 1) * stride + height, : (out[1] - 1) * stride + width]
        x = _space_to_depth(x, stride)
        kernel = kernel.reshape(height // stride, stride, width // stride, stride, channels, features)
        kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(
            height // stride, width // stride, stride * stride * channels, features
        )
        height, width, channels, stride = height // stride, width // stride, channels * stride * stride, 1
    slices = [
        x[:, i : i + (out[0] - 1) * stride + 1 : stride, j : j + (out[1] - 1) * stride + 1 : stride]
        for i in range(height)
        for j in range(width)
    ]
    patches = jnp.concatenate(slices, axis=-1).reshape(num * out[0] * out[1], height * width * channels)
    return (patches @ kernel.reshape(-1, features)).reshape(num, *out, features)


def depth_to_space(x: Array, block: int) -> Array:
    """Turn [N, H, W, block * block * C] into [N, block * H, block * W, C]."""
    num, rows, columns, channels = x.shape
    x = x.reshape(num, rows, columns, block, block, channels // block**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(num, rows * block, columns * block, channels // block**2)


def _space_to_depth(x: Array, block: int) -> Array:
    num, rows, columns, channels = x.shape
    x = x.reshape(num, rows // block, block, columns // block, block, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(num, rows // block, columns // block, block * block * channels)


_KERNEL_INIT = nn.initializers.lecun_normal()


class _Hidden(nn.Module):
    """A dense layer [N, D] -> [N, features], or with `window` a convolution of that size and stride."""

    features: int
    activation: Activation
    normalisation: Normalisation
    window: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1],) if self.window is None else (self.window[0], self.window[0], x.shape[-1])
        kernel = self.param("kernel", _KERNEL_INIT, (*shape, self.features))
        gain = self.param("gain", nn.initializers.ones, (self.features,))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x = x @ kernel if self.window is None else convolve(x, kernel, self.window[1])
        if self.normalisation == "layer":
            axes = tuple(range(1, x.ndim))
            mean = x.mean(axes, keepdims=True)
            variance = jnp.square(x - mean).mean(axes, keepdims=True)
            x = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
        spread = (1,) * (x.ndim - 1) + (self.features,)
        return self.activation(gain.reshape(spread) * x + bias.reshape(spread))


class _Output(nn.Module):
    """The last dense layer, without activation: [N, D] -> [N, *output]."""

    output: tuple[int, ...]
    window: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        if self.window is None:
            features = math.prod(self.output)
            kernel = self.param("kernel", _KERNEL_INIT, (x.shape[-1], features))
            bias = self.param("bias", nn.initializers.zeros, (features,))
            return (x @ kernel + bias[None]).reshape(x.shape[0], *self.output)
        size, stride = self.window
        kernel = self.param("kernel", _KERNEL_INIT, (size, size, x.shape[-1], self.output[-1]))
        bias = self.param("bias", nn.initializers.zeros, (self.output[-1],))
        return convolve(x, kernel, stride) + bias.reshape(1, 1, 1, -1)


class _Mlp(nn.Module):
    hidden: tuple[int, ...]
    output: tuple[int, ...]
    activation: Activation
    normalisation: tuple[Normalisation, ...]  # of each hidden layer

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        for index, (features, normalisation) in enumerate(zip(self.hidden, self.normalisation, strict=True)):
            x = _Hidden(features, self.activation, normalisation, name=f"hidden_{index}")(x)
        return _Output(self.output, name=OUTPUT)(x)


class _ConvEncoder(nn.Module):
    channels: tuple[int, ...]
    num_outputs: int
    activation: Activation
    normalisation: Normalisation
    window: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for index, features in enumerate(self.channels):
            x = _Hidden(features, self.activation, self.normalisation, (self.window, 2), name=f"hidden_{index}")(x)
        return _Output((self.num_outputs,), name=OUTPUT)(x.reshape(x.shape[0], -1))


class _ConvDecoder(nn.Module):
    channels: tuple[int, ...]  # as of the encoder: the first one is nearest the image
    event: tuple[int, ...]
    activation: Activation
    normalisation: Normalisation
    dense: tuple[int, ...]

    @nn.compact
    def __call__(self, z: Array) -> Array:
        for index, width in enumerate(self.dense):
            z = _Hidden(width, self.activation, self.normalisation, name=f"dense_{index}")(z)
        rows, columns, image_channels = self.event
        sizes = [(rows, columns)]
        for _ in self.channels:
            sizes.append((math.ceil(sizes[-1][0] / 2), math.ceil(sizes[-1][1] / 2)))
        small, first = sizes[-1], self.channels[-1]
        x = _Hidden(small[0] * small[1] * first, self.activation, self.normalisation, name="hidden_0")(z)
        x = x.reshape(z.shape[0], *small, first)
        stages = [*reversed(self.channels[:-1]), None]
        for index, (features, size) in enumerate(zip(stages, reversed(sizes[:-1]), strict=True)):
            if features is None:
                x = _Output((*size, 4 * image_channels), (3, 1), name=OUTPUT)(x)
            else:
                x = _Hidden(4 * features, self.activation, self.normalisation, (3, 1), name=f"hidden_{index + 1}")(x)
            x = depth_to_space(x, 2)[:, : size[0], : size[1]]
        return x
