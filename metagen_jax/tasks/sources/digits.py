"""`digits`: the 1,797 real handwritten digits inside scikit-learn, 8x8 pixels of 17 grey levels.

Source: E. Alpaydin, C. Kaynak, Optical recognition of handwritten digits, UCI Machine Learning Repository, 1998
(CC BY 4.0), as scikit-learn ships it.
"""

import numpy as np

from metagen_jax.tasks.image_set import ImageSet, image_set
from metagen_jax.tasks.resize import binarise, grey, linear_weights, resize

MARGIN = 1 / 7  # of an enlarged image, on each side: the originals touch their border


def digits(*, size: int = 28, threshold: float | None = 0.5) -> ImageSet:
    """Read the digits, by default enlarged to 28x28 and binary so that the models for characters run on them.

    Args:
        size: side of the images; 8 leaves them as they are, more interpolates linearly and leaves a margin.
        threshold: ink level that makes a pixel ink; None keeps the grey levels (as 0 to 255).

    Returns:
        Images [1797, size, size, 1], ten classes "0" to "9" of 174 to 183.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: a size below 8.
    """
    if size < 8:
        raise ValueError(f"the digits are 8x8 and are only ever enlarged: expected size >= 8, got {size}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the data set "digits" is in scikit-learn: pip install "metagen-jax[digits]"') from error
    data = load_digits()
    margin = 0 if size == 8 else round(MARGIN * size)
    inner = max(8, size - 2 * margin)
    before, after = (size - inner) // 2, size - inner - (size - inner) // 2
    ink = resize(data.images / 16.0, (inner, inner), linear_weights)
    ink = np.pad(ink, ((0, 0), (before, after), (before, after)))
    return image_set(
        f"digits-{size}-{'grey' if threshold is None else f'ink{threshold:g}'}",
        (grey(ink) if threshold is None else binarise(ink, threshold))[..., None],
        np.asarray(data.target),
        [str(digit) for digit in range(10)],
        groups=[""] * 10,
        note="Optical recognition of handwritten digits (Alpaydin, Kaynak, UCI, CC BY 4.0), from scikit-learn.",
    )
