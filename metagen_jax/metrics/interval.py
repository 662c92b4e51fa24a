"""Confidence intervals over classes."""

from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def over_classes(values: np.ndarray, *, num_resamples: int = 2000, seed: int = 0) -> Interval:
    """Return the mean of one value per class [C], with the 95 % percentile interval of resampled classes.

    Classes are resampled, not episodes or images: those of one class are not independent.

    Raises:
        ValueError: fewer than two classes, or a value that is not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"an interval over classes needs one value for each of at least 2 classes, got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(
            f"{int((~np.isfinite(values)).sum())} of {len(values)} classes have a value that is not finite"
        )
    if np.ptp(values) == 0:
        return Interval(float(values[0]), float(values[0]), float(values[0]))
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=num_resamples, method="percentile", rng=np.random.default_rng(seed), batch=100
    )
    low, high = result.confidence_interval
    return Interval(float(values.mean()), float(low), float(high))
