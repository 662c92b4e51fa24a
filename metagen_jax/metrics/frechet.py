"""The Frechet distance between two sets of features, as if both were Gaussian (smaller is better, 0 is the least).

    d = |m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2)

The trace of the last root is the sum of the singular values of S^1/2 S'^1/2, so that only roots of symmetric matrices
are taken. The estimate is biased upwards by a term that falls with the number of images: compare sets of equal size,
and give the distance between two halves of the real images beside it.

Source: Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, GANs trained by a two time-scale update rule converge to a
local Nash equilibrium, 2017, equation 6. Departure: the features are those of a network trained on the same kind of
images, not of Inception, so values compare only under the same critic.
"""

import numpy as np

from metagen_jax.metrics.features import checked_pair


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Return the Frechet distance of two sets of features.

    Args:
        real: features of real images [N, D].
        generated: features of generated images [M, D].

    Returns:
        d >= 0 (up to rounding), in squared units of the features.

    Raises:
        ValueError: fewer than two rows, different D, or a feature that is not finite.

    Example:
        >>> real = np.array([[0.0], [2.0]])
        >>> frechet_distance(real, real + 3.0)
        9.0
    """
    real, generated = checked_pair(real, generated)
    if len(real) < 2 or len(generated) < 2:
        raise ValueError(f"a covariance needs at least 2 images of each kind, got {len(real)} and {len(generated)}")
    covariances = [np.cov(features, rowvar=False).reshape(real.shape[1], -1) for features in (real, generated)]
    first, second = (_root(covariance) for covariance in covariances)
    between = np.square(real.mean(0) - generated.mean(0)).sum()
    within = sum(np.trace(covariance) for covariance in covariances)
    return float(between + within - 2 * np.linalg.svd(first @ second, compute_uv=False).sum())


def _root(covariance: np.ndarray) -> np.ndarray:
    """Return the symmetric root of a covariance [D, D]; eigenvalues below 0 are rounding and count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
