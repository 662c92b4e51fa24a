"""Resizing by separable weight matrices, exact and in NumPy, so that prepared pixels are the same on every machine.

out = R @ image @ C.T with R [H', H] and C [W', W]; each row of a weight matrix is non-negative and sums to one.

Shape letters: N images, H W of the source, H' W' of the result.
"""

import functools
from collections.abc import Callable

import numpy as np

INK = 0.25


def area_weights(source: int, target: int) -> np.ndarray:
    """Return the box filter [target, source]: the share of each target cell that each source pixel covers.

    Example:
        >>> area_weights(3, 2).round(3).tolist()
        [[0.667, 0.333, 0.0], [0.0, 0.333, 0.667]]
    """
    _check_sizes(source, target)
    edges = np.arange(target + 1) * (source / target)
    pixel = np.arange(source)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return np.clip(overlap, 0.0, None) * (target / source)


def linear_weights(source: int, target: int) -> np.ndarray:
    """Return linear interpolation [target, source] between pixel centres, constant beyond the outermost ones."""
    _check_sizes(source, target)
    centre = np.clip((np.arange(target) + 0.5) * (source / target) - 0.5, 0, source - 1)
    return np.clip(1.0 - np.abs(centre[:, None] - np.arange(source)), 0.0, None)


def resize(
    images: np.ndarray, size: tuple[int, int], weights: Callable[[int, int], np.ndarray] = area_weights
) -> np.ndarray:
    """Resize grey images.

    Args:
        images: [..., H, W] any real type.
        size: (H', W').
        weights: `area_weights` to shrink, `linear_weights` to enlarge smoothly.

    Returns:
        [..., H', W'] float32 in the range of the input.

    Raises:
        ValueError: an axis without pixels.
    """
    if weights is area_weights and not images.shape[-2] % max(size[0], 1) and not images.shape[-1] % max(size[1], 1):
        return _block_means(np.asarray(images, np.float32), size)
    rows = weights(images.shape[-2], size[0]).astype(np.float32)
    columns = weights(images.shape[-1], size[1]).astype(np.float32)
    lead = images.shape[:-2]  # two large products: a stack of small ones is many times slower
    across = np.asarray(images, np.float32).reshape(-1, images.shape[-1]) @ columns.T
    across = across.reshape(-1, images.shape[-2], size[1]).swapaxes(1, 2)
    both = across.reshape(-1, images.shape[-2]) @ rows.T
    return both.reshape(-1, size[1], size[0]).swapaxes(1, 2).reshape(*lead, *size)


def binarise(coverage: np.ndarray, threshold: float = INK) -> np.ndarray:
    """Return uint8 255 where coverage (in [0, 1]) is at least the threshold and 0 elsewhere.

    A quarter is what keeps the thin pen lines of Omniglot in one piece at 28x28. The comparison allows for the
    rounding of float32 sums, so that a pixel covered by exactly a quarter is ink.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"the ink threshold is a share of a pixel: expected 0 < threshold <= 1, got {threshold}")
    return np.where(coverage >= threshold - 1e-5, np.uint8(255), np.uint8(0))


def grey(values: np.ndarray) -> np.ndarray:
    """Return values in [0, 1] as uint8, rounded to the nearest of 0 to 255."""
    return np.rint(np.clip(values, 0.0, 1.0) * 255).astype(np.uint8)


def _block_means(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return area averages where whole pixels make up each cell: the same numbers, without a matrix product."""
    _check_sizes(images.shape[-2], size[0])
    _check_sizes(images.shape[-1], size[1])
    height, width = images.shape[-2] // size[0], images.shape[-1] // size[1]
    rows = functools.reduce(np.add, [images[..., i::height, :] for i in range(height)])
    return functools.reduce(np.add, [rows[..., j::width] for j in range(width)]) / np.float32(height * width)


def _check_sizes(source: int, target: int) -> None:
    if source < 1 or target < 1:
        raise ValueError(f"cannot resize {source} pixels to {target}: both must be at least 1")
