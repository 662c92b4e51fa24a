"""Networks of a noisy image and a time, for flow matching and diffusion.

    f(t) = (cos pi k t, sin pi k t), k = 1 .. F;   h(t) = gelu(gain (f(t) W) + bias)
    layer:  gelu((gain + h G) normalise(K x) + bias + h B)

Time reaches every hidden layer as a shift of its gains and biases. Kernels (K, W, G, B), gains and biases, and the
last layer, called `output`, are apart as in `metagen_jax.models.networks`, so `split_modulation` and `join` work here.
A context that shifts gains and biases shifts those of h too: shifting the bias of h by c M is the same as a context
that is joined to the time features, [f(t), c] [W; M].

The convolutional one halves height and width by each stage and comes back with sums instead of concatenations, which
halve the products of the way back.

Sources: Ronneberger, Fischer & Brox, U-Net, 2015; Perez et al., FiLM, 2018; Ho, Jain & Abbeel, Denoising Diffusion
Probabilistic Models, 2020 (time in every layer); Dhariwal & Nichol, Diffusion Models Beat GANs, 2021 (gains too).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.nn.initializers import variance_scaling

from metagen_jax.models.convolutions import Form, Precision, convolve, convolve_transposed, known_choices, product
from metagen_jax.models.networks import OUTPUT, Normalisation, gelu
from metagen_jax.types import Array, ArrayTree, Key

TIME = "time"
_FREQUENCIES = 8


class VelocityNetwork(NamedTuple):
    """A function with parameters, of noisy images and times."""

    init: Callable[[Key], ArrayTree]
    apply: Callable[[ArrayTree, Array, Array], Array]  # (params, x [N, *event], t [N] in [0, 1]) -> [N, *event]


def dense_velocity(
    event: Sequence[int],
    hidden: Sequence[int],
    *,
    time_units: int = 32,
    normalisation: Normalisation = "layer",
    precision: Precision = "float32",
) -> VelocityNetwork:
    """Return a multi-layer perceptron; a hidden layer as wide as the one before it is added to it.

    Raises:
        ValueError: no hidden layer, no unit of time, an unknown precision.
    """
    known_choices(precision=precision)
    _check(hidden, time_units)
    size = math.prod(event)
    widths = (size, *hidden)
    multiply = functools.partial(product, precision=precision)

    def init(key: Key) -> ArrayTree:
        time_key, output_key, *keys = jax.random.split(key, 2 + len(hidden))
        layers = {
            f"hidden_{i}": _layer(keys[i], widths[i : i + 2], widths[i + 1], time_units) for i in range(len(hidden))
        }
        return {TIME: _time(time_key, time_units), **layers, OUTPUT: _output(output_key, (hidden[-1], size), size)}

    def apply(params: ArrayTree, x: Array, t: Array) -> Array:
        time, y = _of_time(params[TIME], t), x.reshape(x.shape[0], size)
        for index in range(len(hidden)):
            out = _hidden(params[f"hidden_{index}"], y, time, multiply, normalisation)
            y = y + out if index and out.shape == y.shape else out
        return (product(y, params[OUTPUT]["kernel"], precision) + params[OUTPUT]["bias"][None]).reshape(x.shape)

    return VelocityNetwork(init, apply)


def conv_velocity(
    event: Sequence[int],
    channels: Sequence[int] = (16, 32, 64),
    *,
    time_units: int = 32,
    window: int = 4,
    normalisation: Normalisation = "layer",
    form: Form = "auto",
    precision: Precision = "float32",
) -> VelocityNetwork:
    """Return a small U-net: with three stages, 28 -> 14 -> 7 -> 14 -> 28.

    Stage 0 is at full size, one 3x3 convolution. Each further one begins with a convolution of stride 2, and has a 3x3
    convolution that is added to what it gets; on the way back, a transposed convolution of stride 2 is added to what
    the larger stage had, followed by a 3x3 convolution that is added (not at full size, where it would cost most).

    Args:
        event: (H, W, C).
        channels: of each stage, from full size down; at least one.
        time_units: length of h.
        window: of the convolutions of stride 2.
        normalisation: of every hidden layer; "layer" is over all pixels and channels of an image.
        form: of convolutions, see `metagen_jax.models.convolutions`.
        precision: of their factors.

    Raises:
        ValueError: an event that is not (H, W, C), no stage, no unit of time, an unknown form or precision.
    """
    known_choices(form=form, precision=precision)
    _check(channels, time_units)
    if len(event) != 3:
        raise ValueError(f"convolutions need images [H, W, C], got an event of shape {tuple(event)}")
    same = functools.partial(convolve, stride=1, form=form, precision=precision)
    half = functools.partial(convolve, stride=2, form=form, precision=precision)
    twice = functools.partial(convolve_transposed, stride=2, form=form, precision=precision)
    stages, image_channels = range(1, len(channels)), event[2]

    def init(key: Key) -> ArrayTree:
        def kernel(window: int, inputs: int, features: int) -> tuple[int, ...]:
            return window, window, inputs, features

        shapes = {"enter": kernel(3, image_channels, channels[0])}
        for stage in stages:
            larger, own = channels[stage - 1], channels[stage]
            shapes |= {f"down_{stage}": kernel(window, larger, own), f"down_{stage}_same": kernel(3, own, own)}
            shapes |= {f"up_{stage}": kernel(window, own, larger)}
            shapes |= {f"up_{stage}_same": kernel(3, larger, larger)} if stage > 1 else {}
        time_key, output_key, *keys = jax.random.split(key, 2 + len(shapes))
        layers = {
            name: _layer(k, shape, shape[-1], time_units, uses=4.0 if name in {f"up_{s}" for s in stages} else 1.0)
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        last = _output(output_key, kernel(3, channels[0], image_channels), image_channels)
        return {TIME: _time(time_key, time_units), **layers, OUTPUT: last}

    def apply(params: ArrayTree, x: Array, t: Array) -> Array:
        time = _of_time(params[TIME], t)

        def layer(name: str, y: Array, multiply: Callable[[Array, Array], Array]) -> Array:
            return _hidden(params[name], y, time, multiply, normalisation)

        kept = [layer("enter", x, same)]
        for stage in stages:
            y = layer(f"down_{stage}", kept[-1], half)
            kept.append(y + layer(f"down_{stage}_same", y, same))
        y = kept[-1]
        for stage in reversed(stages):
            skip = kept[stage - 1]
            y = skip + layer(f"up_{stage}", y, twice)[:, : skip.shape[1], : skip.shape[2]]
            y = y + layer(f"up_{stage}_same", y, same) if stage > 1 else y
        return same(y, params[OUTPUT]["kernel"]) + params[OUTPUT]["bias"][None, None, None]

    return VelocityNetwork(init, apply)


def time_features(t: Array) -> Array:
    """Return cosines and sines of pi k t, [N] -> [N, 2 F]: a half and whole turns over the path."""
    angle = jnp.pi * t[:, None] * jnp.arange(1, _FREQUENCIES + 1, dtype=t.dtype)[None]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _of_time(params: ArrayTree, t: Array) -> Array:
    """Return h(t), [N, time_units]."""
    features = product(time_features(t), params["kernel"])
    return gelu(params["gain"][None] * features + params["bias"][None])


def _hidden(
    params: ArrayTree,
    x: Array,
    time: Array,
    multiply: Callable[[Array, Array], Array],
    normalisation: Normalisation,
) -> Array:
    x = multiply(x, params["kernel"])
    if normalisation == "layer":
        axes = tuple(range(1, x.ndim))
        centred = x - x.mean(axes, keepdims=True)
        x = centred * jax.lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + 1e-5)
    gain, bias = (
        (params[name][None] + product(time, params[f"time_{name}"])).reshape(
            x.shape[0], *(1,) * (x.ndim - 2), x.shape[-1]
        )
        for name in ("gain", "bias")
    )
    return gelu(gain * x + bias)


def _layer(key: Key, shape: Sequence[int], features: int, time_units: int, uses: float = 1.0) -> ArrayTree:
    """Return a hidden layer's parameters, of kernels that keep the variance; `uses` as in `models.networks`."""
    kernel_key, gain_key, bias_key = jax.random.split(key, 3)
    of_time = variance_scaling(0.3, "fan_in", "normal")
    return {
        "kernel": variance_scaling(uses, "fan_in", "truncated_normal")(kernel_key, tuple(shape), float),
        "gain": jnp.ones(features),
        "bias": jnp.zeros(features),
        "time_gain": of_time(gain_key, (time_units, features), float),
        "time_bias": of_time(bias_key, (time_units, features), float),
    }


def _time(key: Key, units: int) -> ArrayTree:
    kernel = variance_scaling(2.0, "fan_in", "normal")(key, (2 * _FREQUENCIES, units), float)
    return {"kernel": kernel, "gain": jnp.ones(units), "bias": jnp.zeros(units)}


def _output(key: Key, shape: Sequence[int], features: int) -> ArrayTree:
    kernel = variance_scaling(0.1, "fan_in", "truncated_normal")(key, tuple(shape), float)
    return {"kernel": kernel, "bias": jnp.zeros(features)}


def _check(widths: Sequence[int], time_units: int) -> None:
    if not widths or min(widths) < 1 or time_units < 1:
        raise ValueError(f"expected layers of at least one unit and time_units >= 1, got {tuple(widths)}, {time_units}")
