"""Confidence intervals over classes, and over seeds."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special


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
    from scipy import stats  # here, since importing it takes as long as importing jax

    result = stats.bootstrap(
        (values,), np.mean, n_resamples=num_resamples, method="percentile", rng=np.random.default_rng(seed), batch=100
    )
    low, high = result.confidence_interval
    return Interval(float(values.mean()), float(low), float(high))


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of one value per seed, and half the width of its 95 % interval by Student's t.

        t(0.975, n - 1) s / sqrt(n)

    Three seeds have t = 4.30, where 1.96 would make the interval less than half as wide as it should be. One seed has
    no interval: nan.

    Raises:
        ValueError: no value, or one that is not finite.

    Example:
        >>> mean, half = over_seeds([80.0, 81.0, 82.0])
        >>> print(f"{mean:.1f} ± {half:.2f}")
        81.0 ± 2.48
    """
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise ValueError(f"expected a finite value for each of one or more seeds, got {list(values)}")
    if len(found) == 1:
        return float(found[0]), float("nan")
    half = special.stdtrit(len(found) - 1, 0.975) * found.std(ddof=1) / len(found) ** 0.5
    return float(found.mean()), float(half)
