"""Are generated images recognised as what they should be, and how different are they from each other?

    recognisability = P(the own exemplar is nearer than those of way - 1 random other classes)
    diversity       = mean over features of the standard deviation over a class's images
    inception score = exp(E_x KL(p(y | x) || mean_x p(y | x)))

The first two are the axes on which one-shot generation is compared with people: an image copied from the support is
recognised always and is not diverse, noise is diverse and never recognised. Give both for held-out real images too.

Sources: Boutin, Singhal, Thomas, Serre, Diversity vs. recognizability: human-like generalization in one-shot
generative models, 2022, section 3; Salimans, Goodfellow, Zaremba, Cheung, Radford, Chen, Improved techniques for
training GANs, 2016, section 4. Departure: the expectation over sets of other classes is exact, not sampled.
"""

import numpy as np


def recognisability(exemplars: np.ndarray, queries: np.ndarray, *, way: int = 20) -> np.ndarray:
    """Return the one-shot accuracy of a nearest-exemplar classifier by cosine distance.

    If n of the C - 1 other exemplars are farther from a query than its own one, it is recognised among `way` classes
    with probability binom(n, way - 1) / binom(C - 1, way - 1). A tie is not recognised.

    Args:
        exemplars: features of one real image of every class [C, D].
        queries: features of images that should be of that class [C, M, D].
        way: classes to tell apart, the own one among them.

    Returns:
        Probabilities [C], means over the M queries; chance is 1 / way. NaN for a class with a query that has no
        direction: not finite, or all zeros.

    Raises:
        ValueError: different C or D, fewer classes than `way`, or an exemplar without a direction.

    Example:
        >>> recognisability(np.eye(3), np.array([[[2.0, 1.0, 0.0]], [[1.0, 0.5, 0.0]], [[0.0, 0.0, 1.0]]]), way=2)
        array([1. , 0.5, 1. ])
    """
    exemplars, queries = _directions(exemplars), _directions(queries)
    if exemplars.ndim != 2 or queries.ndim != 3 or exemplars.shape != queries.shape[::2]:
        raise ValueError(
            f"expected exemplars [C, D] and queries [C, M, D], got {list(exemplars.shape)} and {list(queries.shape)}"
        )
    num = len(exemplars)
    if not 2 <= way <= num:
        raise ValueError(f"{way}-way recognition (at least 2) needs {way} classes, got {num}; ask for fewer")
    if bad := int((~np.isfinite(exemplars)).any(1).sum()):
        raise ValueError(f"{bad} of {num} exemplars have features that are not finite or all zeros; find out why")
    drawn = np.arange(way - 1)
    known = np.prod(np.maximum(np.arange(num)[:, None] - drawn, 0) / (num - 1 - drawn), axis=1)  # of n, [C]
    values = []
    for own, of_class in enumerate(queries):
        similarity = of_class @ exemplars.T
        farther = (similarity < similarity[:, own, None]).sum(1)
        values.append(known[farther].mean() if np.isfinite(of_class).all() else np.nan)
    return np.array(values)


def diversity(features: np.ndarray) -> np.ndarray:
    """Return the mean over features of the standard deviation over a class's images, unbiased in its square.

    Args:
        features: of images of every class [C, M, D].

    Returns:
        Diversity [C] in units of the features; NaN for a class with a feature that is not finite.

    Raises:
        ValueError: another rank, or fewer than two images of a class.

    Example:
        >>> diversity(np.array([[[0.0], [2.0]], [[1.0], [1.0]]]))
        array([1.41421356, 0.        ])
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"expected features [C, M, D] of at least 2 images of a class, got {list(features.shape)}")
    with np.errstate(invalid="ignore"):
        return features.std(axis=1, ddof=1).mean(axis=-1)


def inception_score(log_probabilities: np.ndarray) -> float:
    """Return exp(E KL(p(y | x) || p(y))), with p(y) the mean over the images.

    Args:
        log_probabilities: log p(y | x) of a classifier on generated images [N, K], nats; -inf is allowed.

    Returns:
        The score: 1 if all images look alike to the classifier, K if it is sure of each and they fill all classes.

    Raises:
        ValueError: another rank, no image, or rows that are not log-probabilities.

    Example:
        >>> inception_score(np.log([[0.5, 0.5], [0.5, 0.5]]))
        1.0
    """
    log_p = np.asarray(log_probabilities, np.float64)
    if log_p.ndim != 2 or not len(log_p):
        raise ValueError(f"expected log-probabilities [N, K] of at least one image, got {list(log_p.shape)}")
    p = np.exp(log_p)
    wrong = ~(np.abs(p.sum(1) - 1) < 1e-3)
    if wrong.any():
        raise ValueError(f"{int(wrong.sum())} of {len(p)} rows are not log-probabilities that sum to one in exp")
    mean = p.mean(0)
    seen = p > 0  # p log p is 0 at 0
    ratio = np.where(seen, log_p - np.log(np.where(mean > 0, mean, 1.0))[None], 0.0)
    return float(np.exp((p * ratio).sum(1).mean()))


def _directions(features: np.ndarray) -> np.ndarray:
    """Return features [..., D] scaled to length one; NaN where there is no direction."""
    features = np.asarray(features, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return features / np.linalg.norm(features, axis=-1, keepdims=True)
