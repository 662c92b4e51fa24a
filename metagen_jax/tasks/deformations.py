"""Random deformations of images: what augmentation does without a generator, and its control in every table.

    affine      x'(p) = x(A^-1 (p - c - t) + c),   A = s R(angle) [[1, shear], [0, 1]],   c the centre
    elastic     x'(p) = x(p + u(p)),   u smooth: normal on a coarse grid, cubic between
    thickness   x' = sigmoid((blurred x - level) / sharpness), level random: thinner or bolder strokes, nearly binary
    binary      x' = 1 where x > level, for data of zeros and ones that interpolation has made grey

Positions are read by bilinear interpolation, outside of the image is zero, and each image has its own deformation.

Source: Simard, Steinkraus & Platt, Best Practices for Convolutional Neural Networks, 2003 (affine and elastic);
departure: displacements on a grid in the place of a blurred field.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metagen_jax.types import Array, Key

Deform = Callable[[Key, Array], Array]
"""(key, x [N, H, W, C]) -> deformed images of the same shape."""


def affine(*, rotate: float = 10.0, scale: float = 0.3, shear: float = 0.3, shift: float = 6.0) -> Deform:
    """Return the function (key, x [N, H, W, C]) -> randomly moved images of the same shape.

    The defaults did best among a dozen on validation characters of Omniglot at 28x28 pixels, in unsupervised 5-way
    1-shot accuracy: half these scales, shears and a third of the shift cost nine points, turns of 30 degrees five.

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
        _check_images(x)
        draws = jax.random.uniform(key, (x.shape[0], 5), minval=-1.0, maxval=1.0) * largest[None]
        return jax.vmap(_moved)(x, draws)

    return move


def elastic(size: float = 1.0, *, grid: int = 4) -> Deform:
    """Return the function (key, x [N, H, W, C]) -> images bent by a smooth random displacement.

    Args:
        size: standard deviation of the displacement at the points of the grid, in pixels.
        grid: points in each direction; the fewer, the smoother.

    Raises:
        ValueError: a negative size, fewer than two points.

    Example:
        >>> x = jax.random.uniform(jax.random.key(0), (2, 5, 5, 1))
        >>> bool(jnp.allclose(elastic(0.0)(jax.random.key(1), x), x, atol=1e-6))
        True
    """
    if not size >= 0 or grid < 2:
        raise ValueError(f"expected a size of at least 0 pixels and 2 points of the grid, got {size} and {grid}")

    def bend(key: Key, x: Array) -> Array:
        _check_images(x)
        num, height, width, _ = x.shape
        coarse = size * jax.random.normal(key, (num, grid, grid, 2))
        shift = jax.image.resize(coarse, (num, height, width, 2), "cubic")
        rows, columns = jnp.arange(height)[None, :, None] + shift[..., 0], jnp.arange(width)[None, None] + shift[..., 1]
        return jax.vmap(_bilinear)(x, rows, columns)

    return bend


def thickness(*, lowest: float = 0.25, highest: float = 0.6, sharpness: float = 0.08) -> Deform:
    """Return the function (key, x [N, H, W, C]) -> images of strokes drawn thinner or bolder, and nearly binary.

    Args:
        lowest: level above which a blurred pixel is ink, where strokes are boldest.
        highest: the same, where they are thinnest.
        sharpness: width of the transition, in levels.

    Raises:
        ValueError: levels that are not ordered within (0, 1), or a width that is not positive.
    """
    if not 0 < lowest <= highest < 1 or not sharpness > 0:
        raise ValueError(
            f"expected 0 < lowest <= highest < 1 and a positive sharpness, got {lowest=}, {highest=}, {sharpness=}"
        )

    def draw(key: Key, x: Array) -> Array:
        _check_images(x)
        level = jax.random.uniform(key, (x.shape[0], 1, 1, 1), minval=lowest, maxval=highest)
        return jax.nn.sigmoid((_blurred(_blurred(x, 1), 2) - level) / sharpness)

    return draw


def in_turn(*deformations: Deform) -> Deform:
    """Return the deformations one after the other, each with a key of its own.

    Raises:
        ValueError: none given.
    """
    if not deformations:
        raise ValueError("expected at least one deformation, got none")

    def deform(key: Key, x: Array) -> Array:
        for one, with_key in zip(deformations, jax.random.split(key, len(deformations)), strict=True):
            x = one(with_key, x)
        return x

    return deform


def binary(level: float = 0.5) -> Deform:
    """Return the function (key, x) -> ones where x is above the level, zeros elsewhere; no key is used.

    Raises:
        ValueError: a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"the level must lie in (0, 1), got {level}")
    return lambda key, x: (x > level).astype(x.dtype)


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


def _blurred(x: Array, axis: int) -> Array:
    """Smooth along one axis with weights 1/4, 1/2, 1/4, zero outside of the image."""
    width = [(1, 1) if number == axis else (0, 0) for number in range(x.ndim)]
    before, here, after = (
        jax.lax.slice_in_dim(jnp.pad(x, width), begin, begin + x.shape[axis], axis=axis) for begin in range(3)
    )
    return 0.25 * before + 0.5 * here + 0.25 * after


def _check_images(x: Array) -> None:
    if x.ndim != 4:
        raise ValueError(f"deformations need images [N, H, W, C], got {list(x.shape)}")
