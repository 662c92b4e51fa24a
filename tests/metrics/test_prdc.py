"""Precision, recall, density and coverage against loops over all pairs."""

import numpy as np
import pytest

from metagen_jax.metrics import prdc as module
from metagen_jax.metrics.prdc import Prdc, prdc


def _by_loops(real, generated, neighbours):
    def radii(x):
        return [sorted(np.linalg.norm(x - x[i], axis=1))[neighbours] for i in range(len(x))]

    real_radius, generated_radius = radii(real), radii(generated)
    inside = [[np.linalg.norm(x - y) <= r for x, r in zip(real, real_radius, strict=True)] for y in generated]
    back = [[np.linalg.norm(x - y) <= r for y, r in zip(generated, generated_radius, strict=True)] for x in real]
    return Prdc(
        np.mean([any(row) for row in inside]),
        np.mean([any(row) for row in back]),
        np.sum(inside) / (neighbours * len(generated)),
        np.mean(np.any(inside, axis=0)),
    )


@pytest.mark.parametrize("neighbours", [1, 3, 5])
def test_the_four_numbers_are_their_definitions_in_loops(neighbours, monkeypatch):
    rng = np.random.default_rng(neighbours)
    real, generated = rng.normal(size=(23, 4)) + 50, rng.normal(0.5, 0.8, size=(17, 4)) + 50
    expected = _by_loops(real, generated, neighbours)
    np.testing.assert_allclose(prdc(real, generated, neighbours=neighbours), expected, rtol=1e-12)
    monkeypatch.setattr(module, "CHUNK", 4)
    np.testing.assert_allclose(prdc(real, generated, neighbours=neighbours), expected, rtol=1e-12)


def test_new_images_of_the_same_distribution_have_density_and_coverage_of_the_closed_form():
    """E density = 1, and E coverage = 1 - C(N-1, k) / C(N-1+M, k) in any number of dimensions, by exchangeability."""
    rng = np.random.default_rng(0)
    values = [prdc(rng.normal(size=(60, 3)), rng.normal(size=(60, 3)), neighbours=5) for _ in range(80)]
    _, _, density, coverage = np.mean(values, axis=0)
    expected = 1 - np.prod([(60 - 1 - i) / (120 - 1 - i) for i in range(5)])
    np.testing.assert_allclose(coverage, expected, atol=0.01)
    np.testing.assert_allclose(density, 1.0, atol=0.05)


def test_images_elsewhere_have_zero_of_all_four():
    rng = np.random.default_rng(0)
    assert prdc(rng.normal(size=(20, 2)), rng.normal(size=(20, 2)) + 100) == (0, 0, 0, 0)


def test_a_dropped_mode_is_seen_by_recall_and_coverage_and_not_by_precision():
    rng = np.random.default_rng(0)
    modes = np.repeat([0.0, 100.0], 30)[:, None]
    real, generated = rng.normal(size=(60, 2)) + modes, rng.normal(size=(60, 2)) * 0.5
    precision, recall, _, coverage = prdc(real, generated)
    assert precision == 1
    assert recall <= 0.5
    assert coverage <= 0.5


def test_an_outlier_among_real_images_raises_precision_but_hardly_density():
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(100, 2)), rng.normal(size=(100, 2)) + 8
    with_outlier = np.concatenate([real, [[20.0, 20.0]]])
    assert prdc(real, generated).precision < 0.1
    assert prdc(with_outlier, generated).precision > 0.9
    assert prdc(with_outlier, generated).density < 0.3


@pytest.mark.parametrize(
    ("real", "generated", "options", "message"),
    [
        (np.zeros((5, 2)), np.zeros((9, 2)), {}, "need more than 5 images of each kind, got 5 and 9"),
        (np.zeros((5, 2)), np.zeros((9, 2)), {"neighbours": 0}, "at least 1"),
        (np.zeros((9, 2)), np.zeros((9, 3)), {}, r"of one critic, got \[9, 2\] and \[9, 3\]"),
        (np.zeros((9, 2)), np.full((9, 2), np.inf), {}, "9 of 9 generated images have features that are not finite"),
    ],
)
def test_sets_without_enough_neighbours_are_refused(real, generated, options, message):
    with pytest.raises(ValueError, match=message):
        prdc(real, generated, **options)
