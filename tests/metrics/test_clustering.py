"""Agreement of clusters with classes against scikit-learn, and where its value is known."""

import numpy as np
import pytest

from metagen_jax.metrics.clustering import agreement, chance


def _labels(seed, num=200, classes=7, clusters=5):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, num)
    return true, np.where(rng.random(num) < 0.5, true % clusters, rng.integers(0, clusters, num))


@pytest.mark.parametrize(
    ("classes", "clusters"),
    [
        _labels(0),
        _labels(1, num=40, classes=3, clusters=20),
        (np.zeros(5, int), np.arange(5)),
        (np.arange(5), np.arange(5)),
        (np.zeros(5, int), np.zeros(5, int)),
        (np.array([3]), np.array([8])),
        (np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])),
    ],
)
def test_the_three_numbers_are_those_of_scikit_learn(classes, clusters):
    metrics = pytest.importorskip("sklearn.metrics")
    found = agreement(classes, clusters)
    table = metrics.cluster.contingency_matrix(classes, clusters)
    np.testing.assert_allclose(found.purity, table.max(0).sum() / len(classes), rtol=1e-12)
    np.testing.assert_allclose(found.nmi, metrics.normalized_mutual_info_score(classes, clusters), atol=1e-12)
    np.testing.assert_allclose(found.ari, metrics.adjusted_rand_score(classes, clusters), atol=1e-12)


def test_a_table_by_hand():
    """Clusters {a a b} and {b b b}: H(class) and H(cluster) in nats, pairs by counting."""
    found = agreement(np.array([0, 0, 1, 1, 1, 1]), np.array([0, 0, 0, 1, 1, 1]))
    information = 2 / 6 * np.log(2 * 6 / (3 * 2)) + 1 / 6 * np.log(1 * 6 / (3 * 4)) + 3 / 6 * np.log(3 * 6 / (3 * 4))
    entropies = -(1 / 3 * np.log(1 / 3) + 2 / 3 * np.log(2 / 3)) + np.log(2)
    np.testing.assert_allclose(found.purity, 5 / 6)
    np.testing.assert_allclose(found.nmi, 2 * information / entropies)
    expected = (3 + 3) * (1 + 6) / 15
    np.testing.assert_allclose(found.ari, (1 + 3 - expected) / ((6 + 7) / 2 - expected))


def test_numbering_and_order_mean_nothing():
    classes, clusters = _labels(2)
    order = np.random.default_rng(0).permutation(len(classes))
    renumbered = np.array([90, 4, 7, 30, 12])[clusters], np.array([5, 3, 1, 0, 6, 2, 4])[classes]
    found = agreement(classes, clusters)
    assert 0.1 < found.ari < 0.9
    np.testing.assert_allclose(agreement(renumbered[1][order], renumbered[0][order]), found, rtol=1e-12)


def test_nmi_and_ari_do_not_change_when_clusters_and_classes_are_exchanged():
    classes, clusters = _labels(3)
    np.testing.assert_allclose(agreement(clusters, classes)[1:], agreement(classes, clusters)[1:], rtol=1e-12)


def test_chance_keeps_sizes_so_that_only_ari_is_zero():
    classes, clusters = np.repeat(np.arange(20), 5), np.repeat(np.arange(20), 5)
    by_chance = chance(classes, clusters, repeats=20)
    assert agreement(classes, clusters) == (1, 1, 1)
    assert by_chance.nmi > 0.4
    assert by_chance.purity > 0.2
    assert abs(by_chance.ari) < 0.02


@pytest.mark.parametrize(
    ("classes", "clusters", "message"),
    [
        (np.zeros(0, int), np.zeros(0, int), "a class and a cluster for each image"),
        (np.zeros(3, int), np.zeros(4, int), r"got \(3,\) and \(4,\)"),
        (np.zeros(3), np.zeros(3, int), "integer labels, got float64"),
    ],
)
def test_labels_that_do_not_fit_are_refused(classes, clusters, message):
    with pytest.raises(ValueError, match=message):
        agreement(classes, clusters)
