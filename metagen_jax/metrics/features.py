"""Features of images, as every measure of samples takes them."""

import numpy as np


def checked_pair(real: np.ndarray, generated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return features [N, D] of real and [M, D] of generated images in 64 bits.

    Raises:
        ValueError: another rank, different D, or a feature that is not finite.
    """
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"expected features [N, D] and [M, D] of one critic, got {list(real.shape)} and {list(generated.shape)}"
        )
    for kind, features in (("real", real), ("generated", generated)):
        if bad := int((~np.isfinite(features)).any(1).sum()):
            raise ValueError(f"{bad} of {len(features)} {kind} images have features that are not finite; find out why")
    return real, generated
