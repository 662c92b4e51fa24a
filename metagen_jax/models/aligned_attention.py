"""Attention of every pixel over the support images around its own place: what others drew here.

    f_m = features of support image m at every pixel,   k_m = unit(f_m K),   v_m = f_m V,   q = unit(h Q)
    read(h)_p = O sum_{m, o} a_{m, o} v_m[p + o],   a = softmax over images m, offsets o and nothing,
                logits s q_p . k_m[p + o] + b_o + log w_m

Drawings of one character lie in about the same place at about the same size, so a pixel looks at its own place in each
image, and at some offsets around it, instead of everywhere: fewer entries than patches of the whole image, which know
their place relative to the pixel (b_o) and not in the image. Outside an image keys and values are zero. `nothing` is as
in `metagen_jax.models.support_attention`, whose record this is.

Shape letters: M support images, O offsets, D width of keys, V of values. Source: Reed et al., Few-shot Autoregressive
Density Estimation, 2018 (attention to a support); Ramachandran et al., Stand-Alone Self-Attention in Vision Models,
2019 (local attention with relative places). The combination is this package's own.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from metagen_jax.models.networks import gelu
from metagen_jax.models.support_attention import (
    SupportAttention,
    Where,
    convolved,
    init_convolutions,
    kernel_of,
    log_weight,
    unit,
    with_nothing,
)
from metagen_jax.types import Array, ArrayTree, Examples, Key


def aligned_attention(
    event: Sequence[int],
    layers: int,
    *,
    hidden: Sequence[int] = (8, 16, 16),
    width: int = 16,
    offsets: Sequence[int] = (-3, 0, 3),
    scale: float = 4.0,
) -> SupportAttention:
    """Return the attention of `layers` layers of a network over support images around each pixel.

    Args:
        event: (H, W, C) of support images.
        layers: that look; each has keys, values and queries of its own.
        hidden: channels of the convolutions, of stride 1: the first of 5x5 pixels, the others of 3x3.
        width: D and V.
        offsets: of rows, and of columns; all pairs are looked at.
        scale: s at first.

    Raises:
        ValueError: sizes that are not positive, or no offset.
    """
    if layers < 1 or width < 1 or scale <= 0 or not hidden or min(hidden) < 1 or not offsets:
        raise ValueError(
            f"expected at least one layer and one offset, positive channels, width and scale, got layers={layers}, "
            f"offsets={tuple(offsets)}, hidden={tuple(hidden)}, width={width}, scale={scale}"
        )
    height, columns = event[:2]
    reach = max(abs(offset) for offset in offsets)
    pairs = [(row, column) for row in offsets for column in offsets]

    def init(key: Key, num_features: int) -> ArrayTree:
        reading_key, key = jax.random.split(key)
        params = init_convolutions(reading_key, event[2], hidden)
        for layer, own_key in enumerate(jax.random.split(key, layers)):
            key_key, value_key, query_key, output_key = jax.random.split(own_key, 4)
            params[f"layer_{layer}"] = {
                "key": kernel_of(key_key, hidden[-1], width),
                "value": kernel_of(value_key, hidden[-1], width),
                "query": kernel_of(query_key, num_features, width),
                "output": 0.1 * kernel_of(output_key, width, num_features),
                "log_scale": jnp.log(jnp.asarray(scale)),
                "offset": jnp.zeros(len(pairs)),
                "nothing": jnp.zeros(()),
            }
        return params

    def read(params: ArrayTree, support: Examples) -> ArrayTree:
        features = convolved(params, support.x, len(hidden), 1)
        memory: ArrayTree = {"weight": support.weight}
        for layer in range(layers):
            own = params[f"layer_{layer}"]
            memory[f"layer_{layer}"] = {
                "keys": _bordered(unit(features @ own["key"]), reach),
                "values": _bordered(features @ own["value"], reach),
            }
        return memory

    def attend(params: ArrayTree, memory: ArrayTree, layer: int, h: Array, where: Where = None) -> Array:
        own, stored = params[f"layer_{layer}"], memory[f"layer_{layer}"]
        query = unit(gelu(h) @ own["query"])
        keys, values = (_around(stored[name], where) for name in ("keys", "values"))  # [H, W, O * M, D] or [O * M, D]
        bias = (own["offset"][:, None] + log_weight(memory["weight"])[None]).ravel()
        if where is None:  # pixels first, so that the products are as many as there are pixels, and nothing large moves
            query = query.transpose(1, 2, 0, 3)
        logits = jnp.exp(own["log_scale"]) * (query @ jnp.swapaxes(keys, -1, -2))
        share = with_nothing(logits + bias.reshape((1,) * (logits.ndim - 1) + bias.shape), own["nothing"])
        found = (share @ values) @ own["output"]
        return found.transpose(2, 0, 1, 3) if where is None else found

    def _around(maps: Array, where: Where) -> Array:
        """Return what is at the offsets, for offsets before images, around every pixel or around one."""
        if where is None:
            pieces = [
                maps[reach + row : reach + row + height, reach + column : reach + column + columns]
                for row, column in pairs
            ]
        else:
            size = 2 * reach + 1
            window = jax.lax.dynamic_slice(maps, (*where, 0, 0), (size, size, *maps.shape[2:]))
            pieces = [window[reach + row, reach + column] for row, column in pairs]
        return jnp.concatenate(pieces, axis=-2)

    return SupportAttention(init, read, attend)


def _bordered(maps: Array, reach: int) -> Array:
    """Return [H + 2 reach, W + 2 reach, M, D] of [M, H, W, D], zero around the image."""
    return jnp.pad(maps.transpose(1, 2, 0, 3), ((reach, reach), (reach, reach), (0, 0), (0, 0)))
