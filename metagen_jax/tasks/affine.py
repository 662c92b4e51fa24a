"""Random affine maps of images: what augmentation does without a generator, and its control in every table.

    x'(p) = x(A^-1 (p - c - t) + c),   A = s R(angle) [[1, shear], [0, 1]],   c the centre, by bilinear interpolation

Outside of the image is zero. Each image has its own map.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metagen_jax.types import Array, Key


def affine(
    *, rotate: float = 15.0, scale: float = 0.15, shear: float = 0.2, shift: float = 2.0
) -> Callable[[Key, Array], Array]:
    """Return the function (key, x [N, H, W, C]) -> randomly moved images of the same shape.

    Args:
        rotate: largest angle in degrees, either way.
        scale: largest relative change of size: the logarithm of s is uniform up to log(1 + scale), either way.
        shear: largest shear, as a share of the height.
        shift: largest shift in pixels, down and across.

    Raises:
        ValueError: a negative limit; when called, anything but images [N, H, W, C].

    Example:
        >>> still = affine(rotate=0, scale=0, shear=0, shift=0)
        >>> x = jax.random.uniform(jax.random.key(0), (2, 5, 5, 1))
        >>> bool(jnp.allclose(still(jax.random.key(1), x), x, atol=1e-5))
        True
    """
    limits = {"rotate": rotate, "scale": scale, "shear": shear, "shift": shift}
    if negative := [name for name, limit in limits.items() if not limit >= 0]:
        raise ValueError(f"the limits of affine maps must be at least 0, got {negative[0]}={limits[negative[0]]}")
    largest = jnp.array([jnp.deg2rad(rotate), jnp.log1p(scale), shear, shift, shift])

    def move(key: Key, x: Array) -> Array:
        if x.ndim != 4:
            raise ValueError(f"affine maps need images [N, H, W, C], got {list(x.shape)}")
        draws = jax.random.uniform(key, (x.shape[0], 5), minval=-1.0, maxval=1.0) * largest[None]
        return jax.vmap(_moved)(x, draws)

    return move


def _moved(x: Array, draw: Array) -> Array:
    """Move one image [H, W, C] by angle, log scale, shear and shifts [5]."""
    angle, log_scale, shear, down, across = draw
    height, width, _ = x.shape
    cos, sin, inverse = jnp.cos(angle), jnp.sin(angle), jnp.exp(-log_scale)
    row = jnp.arange(height)[:, None] - (height - 1) / 2 - down
    column = jnp.arange(width)[None] - (width - 1) / 2 - across
    turned_row = inverse * (cos * row + sin * column)
    turned_column = inverse * (cos * column - sin * row) - shear * turned_row
    return _bilinear(x, turned_row + (height - 1) / 2, turned_column + (width - 1) / 2)


def _bilinear(x: Array, row: Array, column: Array) -> Array:
    """Read an image [H, W, C] at real positions [H, W], zero outside of it."""
    height, width, _ = x.shape
    padded = jnp.pad(x, ((1, 2), (1, 2), (0, 0)))
    row, column = jnp.clip(row, -1.0, height), jnp.clip(column, -1.0, width)
    top, left = jnp.floor(row), jnp.floor(column)
    down, across = (row - top)[..., None], (column - left)[..., None]
    i, j = top.astype(jnp.int32) + 1, left.astype(jnp.int32) + 1
    upper = (1 - across) * padded[i, j] + across * padded[i, j + 1]
    lower = (1 - across) * padded[i + 1, j] + across * padded[i + 1, j + 1]
    return (1 - down) * upper + down * lower
