"""How well clusters agree with classes: purity, normalised mutual information, adjusted Rand index.

With n_kc the number of images of class c in cluster k, n_k and n_c its sums and n their number,

    purity = sum_k max_c n_kc / n
    NMI    = I(cluster; class) / ((H(cluster) + H(class)) / 2)
    ARI    = (S - E) / (M - E),   S = sum_kc C(n_kc, 2),   E = sum_k C(n_k, 2) sum_c C(n_c, 2) / C(n, 2),
                                  M = (sum_k C(n_k, 2) + sum_c C(n_c, 2)) / 2

None depends on how clusters or classes are numbered. Purity and NMI rise with the number of clusters whatever they are
(1 where each image is a cluster), so they mean something beside clusters of the same sizes with shuffled members only;
ARI is 0 in expectation for those.

Sources: Manning, Raghavan & Schutze, Introduction to Information Retrieval, 2008, section 16.3; Vinh, Epps & Bailey,
Information Theoretic Measures for Clusterings Comparison, 2010; Hubert & Arabie, Comparing Partitions, 1985.
"""

from typing import NamedTuple

import numpy as np


class Agreement(NamedTuple):
    """Three numbers, all 1 where clusters are the classes."""

    purity: float  # (0, 1]
    nmi: float  # [0, 1], arithmetic normalisation
    ari: float  # [-1/2, 1], 0 for chance


def agreement(classes: np.ndarray, clusters: np.ndarray) -> Agreement:
    """Return purity, NMI and ARI of clusters, given the true classes.

    Args:
        classes: [N] int, in any numbering.
        clusters: [N] int.

    Raises:
        ValueError: no image, other shapes, or labels that are not integers.

    Example:
        >>> agreement(np.array([0, 0, 1, 1]), np.array([7, 7, 3, 3]))
        Agreement(purity=1.0, nmi=1.0, ari=1.0)
    """
    classes, clusters = np.asarray(classes), np.asarray(clusters)
    if classes.ndim != 1 or classes.shape != clusters.shape or not len(classes):
        raise ValueError(f"expected a class and a cluster for each image, got {classes.shape} and {clusters.shape}")
    if classes.dtype.kind not in "iu" or clusters.dtype.kind not in "iu":
        raise ValueError(f"expected integer labels, got {classes.dtype} and {clusters.dtype}")
    count, cluster_of, class_of = _counts(clusters, classes)
    of_cluster, of_class = np.bincount(cluster_of, count), np.bincount(class_of, count)
    best = np.zeros(len(of_cluster))
    np.maximum.at(best, cluster_of, count)
    return Agreement(
        float(best.sum() / count.sum()),
        _nmi(count, of_cluster, of_class, of_cluster[cluster_of] * of_class[class_of]),
        _ari(count, of_cluster, of_class),
    )


def chance(classes: np.ndarray, clusters: np.ndarray, *, repeats: int = 10, seed: int = 0) -> Agreement:
    """Return the mean agreement of clusters of the same sizes whose members are shuffled."""
    rng = np.random.default_rng(seed)
    drawn = [agreement(classes, rng.permutation(clusters)) for _ in range(repeats)]
    return Agreement(*(float(mean) for mean in np.mean(drawn, axis=0)))


def _counts(clusters: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs that occur: how often, of which cluster and of which class, counted from 0."""
    _, cluster = np.unique(clusters, return_inverse=True)
    _, of_class = np.unique(classes, return_inverse=True)
    num_classes = int(of_class.max()) + 1
    pairs, count = np.unique(cluster.astype(np.int64) * num_classes + of_class, return_counts=True)
    return count.astype(np.float64), pairs // num_classes, pairs % num_classes


def _nmi(count: np.ndarray, of_cluster: np.ndarray, of_class: np.ndarray, product: np.ndarray) -> float:
    total = count.sum()
    information = (count / total * np.log(count * total / product)).sum()
    mean_entropy = (_entropy(of_cluster / total) + _entropy(of_class / total)) / 2
    return float(np.clip(information / mean_entropy, 0.0, 1.0)) if mean_entropy > 0 else 1.0


def _ari(count: np.ndarray, of_cluster: np.ndarray, of_class: np.ndarray) -> float:
    together, pairs = _pairs(count).sum(), _pairs(count.sum())
    in_cluster, in_class = _pairs(of_cluster).sum(), _pairs(of_class).sum()
    expected = in_cluster * in_class / pairs if pairs else 0.0
    largest = (in_cluster + in_class) / 2
    return float((together - expected) / (largest - expected)) if largest != expected else 1.0


def _entropy(share: np.ndarray) -> float:
    return float(-(share * np.log(share)).sum())


def _pairs(count: np.ndarray) -> np.ndarray:
    return count * (count - 1) / 2
