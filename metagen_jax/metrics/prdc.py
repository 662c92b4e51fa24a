"""Precision, recall, density and coverage: are generated images where real ones are, and the other way round?

With B(x) the closed ball around x that just reaches its k-th nearest neighbour in its own set,

    precision = share of generated images that lie in the ball of some real image
    recall    = share of real images that lie in the ball of some generated image
    density   = 1/k mean over generated images of the number of real images whose ball they lie in   (may exceed 1)
    coverage  = share of real images whose ball has some generated image in it

One outlier's ball can make precision and recall look good; density counts balls, and coverage needs no generated ones.

Sources: Kynkaanniemi, Karras, Laine, Lehtinen, Aila, Improved precision and recall metric for assessing generative
models, 2019, equations 1 and 2; Naeem, Oh, Uh, Choi, Yoo, Reliable fidelity and diversity metrics for generative
models, 2020, equations 4 and 5.
"""

from typing import NamedTuple

import numpy as np

from metagen_jax.metrics.features import checked_pair

CHUNK = 500  # rows of a distance matrix that are held at a time


class Prdc(NamedTuple):
    """Four numbers, all larger for better images."""

    precision: float  # [0, 1]
    recall: float  # [0, 1]
    density: float  # >= 0, about 1 for images like the real ones
    coverage: float  # [0, 1]


class PrdcRows(NamedTuple):
    """What each image contributes: the means are the four numbers."""

    precision: np.ndarray  # [M] bool, of generated images
    recall: np.ndarray  # [N] bool, of real images
    density: np.ndarray  # [M]
    coverage: np.ndarray  # [N] bool


def prdc(real: np.ndarray, generated: np.ndarray, *, neighbours: int = 5) -> Prdc:
    """Return precision, recall, density and coverage of generated images: the means of `prdc_rows`.

    Args:
        real: features of real images [N, D].
        generated: features of generated images [M, D].
        neighbours: k.

    Raises:
        ValueError: not more rows than neighbours, different D, or a feature that is not finite.

    Example:
        >>> real = np.arange(6.0)[:, None]
        >>> prdc(real, real + 0.5, neighbours=1)
        Prdc(precision=1.0, recall=1.0, density=1.8333333333333333, coverage=1.0)
    """
    return Prdc(*(float(values.mean()) for values in prdc_rows(real, generated, neighbours=neighbours)))


def prdc_rows(real: np.ndarray, generated: np.ndarray, *, neighbours: int = 5) -> PrdcRows:
    """Return what each image contributes to precision, recall, density and coverage.

    Args:
        real: features of real images [N, D].
        generated: features of generated images [M, D].
        neighbours: k.

    Raises:
        ValueError: as `prdc`.
    """
    real, generated = checked_pair(real, generated)
    if neighbours < 1 or min(len(real), len(generated)) <= neighbours:
        raise ValueError(
            f"{neighbours} neighbours (at least 1) need more than {neighbours} images of each kind, got {len(real)} "
            f"and {len(generated)}; ask for fewer neighbours or give more images"
        )
    centre = real.mean(0)  # distances do not change, and lose fewer digits
    real, generated = real - centre, generated - centre
    real_radius, generated_radius = _radii(real, neighbours), _radii(generated, neighbours)
    num_balls, recalled, covered = np.zeros(len(generated)), [], []
    for first in range(0, len(real), CHUNK):
        rows = slice(first, first + CHUNK)
        distance = _squared_distances(real[rows], generated)
        inside = distance <= real_radius[rows, None]
        num_balls += inside.sum(0)
        covered.append(inside.any(1))
        recalled.append((distance <= generated_radius[None]).any(1))
    return PrdcRows(num_balls > 0, np.concatenate(recalled), num_balls / neighbours, np.concatenate(covered))


def _radii(x: np.ndarray, neighbours: int) -> np.ndarray:
    """Return the squared distance of every row of x [N, D] to its k-th nearest other row, [N]."""
    radii = []
    for first in range(0, len(x), CHUNK):
        distance = _squared_distances(x[first : first + CHUNK], x)
        rows = np.arange(len(distance))
        distance[rows, first + rows] = np.inf
        radii.append(np.partition(distance, neighbours - 1, axis=1)[:, neighbours - 1])
    return np.concatenate(radii)


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return |x_i - y_j|^2 [N, M]; what rounding leaves below 0 is 0."""
    squared = np.square(x).sum(1)[:, None] - 2 * x @ y.T + np.square(y).sum(1)[None]
    return np.maximum(squared, 0.0, out=squared)
