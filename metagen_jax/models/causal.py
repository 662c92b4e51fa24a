"""Networks that see, at each pixel, the pixels before it: all pixels at once, or one after the other with a cache.

Pixels come row by row. A layer reads some of the places before its own (its taps), each from so many rows above and so
many columns to the side,

    first layer   h_ij = [x at the taps] A + P_ij            a window above and to the left, without the pixel itself
    block l       h_ij <- h_ij + gain_l * ([gelu(h) at the taps of dilation d_l] K_l) + bias_l,   itself included

so that h_ij depends on x_kl for (k, l) before (i, j) only. Taps are put together and multiplied by one matrix, so no
product meets a masked zero, and kernels may differ by task (`models/convolutions.py`). Outside the image x is zero, and
a second input says what is outside; P are learned functions of the row and of the column.

A network is written once, in terms of `Look`: what is at the taps of a layer. `whole` looks by shifting images;
`step` by reading a cache of what the layers gave at earlier pixels, so a sample costs about as much as one evaluation.

Shape letters: N examples, H x W pixels, C channels, F features. Sources: van den Oord, Kalchbrenner & Kavukcuoglu,
Pixel Recurrent Neural Networks, 2016 (masked convolutions); van den Oord et al., WaveNet, 2016 (dilation, which also
reaches what plain masked windows never see); Ramachandran et al., Fast Generation for Convolutional Autoregressive
Models, 2017 (the cache).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.models.convolutions import Precision, known_choices, product
from metagen_jax.models.networks import gelu
from metagen_jax.types import Array, ArrayTree, Key

Taps = tuple[tuple[int, int], ...]
"""(rows above, columns to the right) of each place that is read."""
Look = Callable[[int, Array, Taps], Array]
"""(layer, what it is given [..., C], taps) -> [..., taps * C]."""
Extra = Callable[[int, Array], Array]
"""(block, h [..., F]) -> what is added to h after that block."""


class CausalNetwork(NamedTuple):
    """A causal network; its parameters are kernels, modulation (gains and biases of the blocks) and output."""

    init: Callable[[Key], tuple[ArrayTree, ArrayTree, ArrayTree]]
    whole: Callable[..., Array]  # (kernels, modulation, output, x [N, H, W, 1], extra) -> logits [N, H, W]
    features: Callable[..., Array]  # the same, before the last layer: [N, H, W, F]
    cache: Callable[[int], ArrayTree]  # num -> the cache before the first pixel
    step: Callable[..., tuple[Array, ArrayTree]]  # (..., cache, i, j, extra) -> logits [N], the cache with this pixel
    put: Callable[[ArrayTree, Array, Array, Array], ArrayTree]  # (cache, i, j, x [N]) -> the cache that knows x_ij


def nothing(block: int, h: Array) -> Array:
    """Add nothing: the `Extra` of a network that no support is read for."""
    del block
    return jnp.zeros_like(h)


def causal_network(
    event: Sequence[int],
    width: int,
    dilations: Sequence[int],
    *,
    reach: int = 3,
    precision: Precision = "float32",
) -> CausalNetwork:
    """Return the network of one first layer and a block for each dilation.

    Args:
        event: (H, W, 1).
        width: F, features of a pixel.
        dilations: of the blocks; each sees its own place, the one to the left and three above at this distance.
        reach: of the first layer, which sees so many rows above, and so many columns to each side.
        precision: of products with kernels.

    Raises:
        ValueError: images of several channels, or sizes that are not positive.
    """
    known_choices(precision=precision)
    if len(event) != 3 or event[2] != 1:
        raise ValueError(f"causal networks are for images (height, width, 1) so far, got {tuple(event)}")
    if width < 1 or reach < 1 or not dilations or min(dilations) < 1:
        raise ValueError(
            f"expected a positive width and reach, and dilations of at least 1, got width={width}, reach={reach}, "
            f"dilations={tuple(dilations)}"
        )
    height, columns = event[:2]
    above = tuple((row, column) for row in range(reach, 0, -1) for column in range(-reach, reach + 1))
    first: Taps = (*above, *((0, column) for column in range(-reach, 0)))
    later: list[Taps] = [((d, -d), (d, 0), (d, d), (0, -d), (0, 0)) for d in dilations]
    names = [f"block_{index}" for index in range(len(later))]

    def init(key: Key) -> tuple[ArrayTree, ArrayTree, ArrayTree]:
        first_key, row_key, column_key, *keys = jax.random.split(key, 3 + len(names))
        kernels = {
            "first": jax.random.normal(first_key, (2 * len(first), width)) / (2 * len(first)) ** 0.5,
            "row": 0.1 * jax.random.normal(row_key, (height, width)),
            "column": 0.1 * jax.random.normal(column_key, (columns, width)),
        }
        for name, taps, block_key in zip(names, later, keys, strict=True):
            shape = (len(taps) * width, width)
            kernels[name] = jax.random.normal(block_key, shape) / shape[0] ** 0.5
        modulation = {name: {"gain": jnp.ones(width), "bias": jnp.zeros(width)} for name in names}
        return kernels, modulation, {"kernel": jnp.zeros((width, 1)), "bias": jnp.zeros(1)}

    def run(kernels: ArrayTree, modulation: ArrayTree, x: Array, place: Array, look: Look, extra: Extra) -> Array:
        """Return the features [..., F] at places, whose x [..., 2] nothing looks at but through `look`."""
        h = product(look(0, x, first), kernels["first"], precision) + place
        for index, (name, taps) in enumerate(zip(names, later, strict=True)):
            seen = product(look(index + 1, gelu(h), taps), kernels[name], precision)
            own = modulation[name]
            h = h + _along(own["gain"], h) * seen + _along(own["bias"], h)
            h = h + extra(index, h)
        return h

    def features(kernels: ArrayTree, modulation: ArrayTree, x: Array, extra: Extra = nothing) -> Array:
        place = (kernels["row"][:, None] + kernels["column"][None])[None]
        return run(kernels, modulation, _with_inside(x), place, lambda _, h, taps: _shifted(h, taps), extra)

    def whole(kernels: ArrayTree, modulation: ArrayTree, output: ArrayTree, x: Array, extra: Extra = nothing) -> Array:
        return _last(output, features(kernels, modulation, x, extra))

    def cache(num: int) -> ArrayTree:
        inside = _padded(_with_inside(jnp.zeros((num, height, columns, 1))), reach)
        return [inside, *(jnp.zeros((num, height + d, columns + 2 * d, width)) for d in dilations)]

    def step(
        kernels: ArrayTree, modulation: ArrayTree, output: ArrayTree, cache: ArrayTree, i: Array, j: Array, extra: Extra
    ) -> tuple[Array, ArrayTree]:
        cache = list(cache)

        def look(layer: int, h: Array, taps: Taps) -> Array:
            reached = max(row for row, _ in taps)
            if layer:  # the image's own pixel is not known yet, and no tap reads it
                cache[layer] = _write(cache[layer], i + reached, j + reached, h)
            stored = cache[layer]
            window = (stored.shape[0], reached + 1, 2 * reached + 1, stored.shape[3])
            here = jax.lax.dynamic_slice(stored, (0, i, j, 0), window)
            return jnp.concatenate([here[:, reached - row, reached + column] for row, column in taps], axis=-1)

        place = (kernels["row"][i] + kernels["column"][j])[None]
        h = run(kernels, modulation, cache[0][:, 0, 0], place, look, extra)
        return _last(output, h), cache

    def put(cache: ArrayTree, i: Array, j: Array, x: Array) -> ArrayTree:
        pixel = jnp.stack([x, jnp.ones_like(x)], axis=-1)
        return [_write(cache[0], i + reach, j + reach, pixel), *cache[1:]]

    return CausalNetwork(init, whole, features, cache, step, put)


def _last(output: ArrayTree, h: Array) -> Array:
    return (gelu(h) @ output["kernel"])[..., 0] + output["bias"][0]


def _along(vector: Array, h: Array) -> Array:
    return vector.reshape((1,) * (h.ndim - 1) + vector.shape)


def _with_inside(x: Array) -> Array:
    """Return [N, H, W, 2]: the image, and ones, which padding turns to zero outside."""
    return jnp.concatenate([x, jnp.ones_like(x)], axis=-1)


def _padded(h: Array, reach: int) -> Array:
    return jnp.pad(h, ((0, 0), (reach, 0), (reach, reach), (0, 0)))


def _shifted(h: Array, taps: Taps) -> Array:
    """Return what is at the taps of every place: [N, H, W, C] -> [N, H, W, taps * C]."""
    reach = max(row for row, _ in taps)
    rows, columns = h.shape[1:3]
    wide = _padded(h, reach)
    pieces = [wide[:, reach - r : reach - r + rows, reach + c : reach + c + columns] for r, c in taps]
    return jnp.concatenate(pieces, axis=-1)


def _write(stored: Array, i: Array, j: Array, value: Array) -> Array:
    return jax.lax.dynamic_update_slice(stored, value[:, None, None].astype(stored.dtype), (0, i, j, 0))
