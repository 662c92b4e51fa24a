"""The kernel distance (KID) between two sets of features: an unbiased squared maximum mean discrepancy.

    d = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),  k(x, y) = (x.y / D + 1)^3

Being unbiased at any number of images, it may be negative, and its mean over classes of a few images each says
something, which that of a Frechet distance does not.

Source: Binkowski, Sutherland, Arbel, Gretton, Demystifying MMD GANs, 2018, section 4. Departure: the features are not
those of Inception.
"""

import numpy as np

from metagen_jax.metrics.features import checked_pair

CHUNK = 1000  # rows of a kernel matrix that are held at a time


def kernel_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Return the kernel distance of two sets of features.

    Args:
        real: features of real images [N, D].
        generated: features of generated images [M, D].

    Returns:
        d, 0 on average for equal distributions.

    Raises:
        ValueError: fewer than two rows, different D, or a feature that is not finite.

    Example:
        >>> kernel_distance(np.array([[1.0], [1.0]]), np.array([[0.0], [0.0]]))
        7.0
    """
    real, generated = checked_pair(real, generated)
    if len(real) < 2 or len(generated) < 2:
        raise ValueError(f"pairs need at least 2 images of each kind, got {len(real)} and {len(generated)}")
    return _distance(real, generated)


def kernel_distances(real: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """Return the kernel distance of every class.

    Args:
        real: features of real images [C, N, D].
        generated: features of generated images [C, M, D].

    Returns:
        d [C]; NaN for a class with a feature that is not finite.

    Raises:
        ValueError: fewer than two images of each kind for a class, or different C or D.
    """
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    if real.ndim != 3 or generated.ndim != 3 or real.shape[::2] != generated.shape[::2]:
        raise ValueError(
            f"expected features [C, N, D] and [C, M, D] of one critic for the same classes, got {list(real.shape)} "
            f"and {list(generated.shape)}"
        )
    if real.shape[1] < 2 or generated.shape[1] < 2:
        raise ValueError(f"pairs need at least 2 images of each kind, got {real.shape[1]} and {generated.shape[1]}")
    finite = np.isfinite(real).all((1, 2)) & np.isfinite(generated).all((1, 2))
    values = [_distance(x, y) if ok else np.nan for x, y, ok in zip(real, generated, finite, strict=True)]
    return np.array(values)


def _distance(real: np.ndarray, generated: np.ndarray) -> float:
    cross = _sum(real, generated) / (len(real) * len(generated))
    return _mean_of_pairs(real) + _mean_of_pairs(generated) - 2 * cross


def _mean_of_pairs(x: np.ndarray) -> float:
    """Return the mean of k over pairs of different rows."""
    itself = ((np.square(x).sum(1) / x.shape[1] + 1) ** 3).sum()
    return (_sum(x, x) - float(itself)) / (len(x) * (len(x) - 1))


def _sum(x: np.ndarray, y: np.ndarray) -> float:
    """Return the sum of k over all pairs of rows of x and y."""
    total = 0.0
    for first in range(0, len(x), CHUNK):
        kernel = x[first : first + CHUNK] @ y.T / x.shape[1] + 1
        total += float((kernel * kernel * kernel).sum())
    return total
