"""Does the model repeat its support set?

    ratio  = mean over samples of min_j |s - x_j| / mean over held-out real images of min_j |h - x_j|
    copies = share of samples nearer to their support than 99 of 100 held-out real images are to theirs

x_j are the support images of the class. A ratio of 1 is that of new images of the class, 0 that of copies; above 1
the samples are farther from the support than real images of the class are.
"""

from typing import NamedTuple

import numpy as np

PERCENTILE = 1.0  # of the held-out distances; a sample nearer than this counts as a copy


class Memorisation(NamedTuple):
    """One value for every class."""

    ratio: np.ndarray  # [C], 1 for new images of the class, 0 for copies
    copies: np.ndarray  # [C] in [0, 1], 0.01 on average for real images


def memorisation(support: np.ndarray, samples: np.ndarray, held_out: np.ndarray) -> Memorisation:
    """Compare the samples' distances to their support with those of real images that the model has not seen.

    Args:
        support: pixels or features of the images that were adapted to [C, N, D].
        samples: of generated images [C, M, D].
        held_out: of real images of the class outside the support [C, Q, D].

    Returns:
        Ratio and copies; NaN for a class with a sample that is not finite.

    Raises:
        ValueError: different C or D, no image of some kind, real images that are not finite, or a class whose held-out
            images all are in its support.

    Example:
        >>> support, held_out = np.array([[[0.0]]]), np.array([[[1.0], [3.0]]])
        >>> memorisation(support, np.array([[[0.0], [4.0]]]), held_out)
        Memorisation(ratio=array([1.]), copies=array([0.5]))
    """
    kinds = [np.asarray(array, np.float64) for array in (support, samples, held_out)]
    shapes = [array.shape for array in kinds]
    if any(len(shape) != 3 or shape[1] < 1 or shape[::2] != shapes[0][::2] for shape in shapes):
        raise ValueError(
            "expected support [C, N, D], samples [C, M, D] and held-out [C, Q, D], at least one image of each, got "
            + ", ".join(str(list(shape)) for shape in shapes)
        )
    known, made, new = kinds
    bad = int((~(np.isfinite(known).all((1, 2)) & np.isfinite(new).all((1, 2)))).sum())
    if bad:
        raise ValueError(f"{bad} of {len(known)} classes have real images that are not finite")
    of_samples, of_held_out = _nearest(made, known), _nearest(new, known)
    if leaked := int((of_held_out.max(1) == 0).sum()):
        raise ValueError(
            f"the held-out images of {leaked} of {len(known)} classes all are in their support; hold out others"
        )
    near = np.percentile(of_held_out, PERCENTILE)
    copies = np.where(np.isfinite(of_samples), of_samples < near, np.nan)
    return Memorisation(of_samples.mean(1) / of_held_out.mean(1), copies.mean(1))


def _nearest(x: np.ndarray, support: np.ndarray) -> np.ndarray:
    """Return the distance [C, M] of every row of x [C, M, D] to the nearest one of support [C, N, D] of its class."""
    with np.errstate(invalid="ignore"):
        pairs = zip(x, support, strict=True)
        return np.stack([np.linalg.norm(a[:, None] - b[None], axis=-1).min(1) for a, b in pairs])
