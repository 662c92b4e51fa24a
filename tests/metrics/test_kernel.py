"""The kernel distance against a double loop, and its bias."""

import numpy as np
import pytest

from metagen_jax.metrics import kernel
from metagen_jax.metrics.kernel import kernel_distance, kernel_distances


def _by_loops(real, generated):
    def k(x, y):
        return (x @ y / len(x) + 1) ** 3

    def among(x):
        return np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])

    return among(real) + among(generated) - 2 * np.mean([k(x, y) for x in real for y in generated])


def test_the_distance_is_the_formula_summed_in_loops(monkeypatch):
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(7, 3)), rng.normal(1.0, 2.0, size=(5, 3))
    expected = _by_loops(real, generated)
    np.testing.assert_allclose(kernel_distance(real, generated), expected, rtol=1e-12)
    monkeypatch.setattr(kernel, "CHUNK", 3)
    np.testing.assert_allclose(kernel_distance(real, generated), expected, rtol=1e-12)


def test_the_distance_of_every_class_is_the_distance_of_its_images():
    rng = np.random.default_rng(1)
    real, generated = rng.normal(size=(4, 6, 3)), rng.normal(size=(4, 5, 3))
    expected = [kernel_distance(x, y) for x, y in zip(real, generated, strict=True)]
    np.testing.assert_array_equal(kernel_distances(real, generated), expected)


def test_images_of_one_distribution_have_distance_zero_on_average_and_may_be_below():
    rng = np.random.default_rng(2)
    values = kernel_distances(rng.normal(size=(3000, 4, 5)), rng.normal(size=(3000, 3, 5)))
    assert abs(values.mean()) < 3 * values.std() / 3000**0.5
    assert (values < 0).mean() > 0.2
    shifted = kernel_distances(rng.normal(size=(3000, 4, 5)), rng.normal(0.5, 1.0, size=(3000, 3, 5)))
    assert shifted.mean() > 10 * values.std() / 3000**0.5


def test_the_mean_over_small_sets_is_the_distance_of_large_ones():
    rng = np.random.default_rng(3)
    small = kernel_distances(rng.normal(size=(4000, 3, 2)), rng.normal(0.7, 1.0, size=(4000, 3, 2)))
    large = kernel_distance(rng.normal(size=(4000, 2)), rng.normal(0.7, 1.0, size=(4000, 2)))
    assert abs(small.mean() - large) < 3 * small.std() / 4000**0.5 + 0.1 * large


def test_a_class_that_diverged_is_nan_and_the_others_are_not():
    rng = np.random.default_rng(4)
    real, generated = rng.normal(size=(3, 4, 2)), rng.normal(size=(3, 4, 2))
    expected = kernel_distances(real, generated)
    generated[1, 2, 0] = np.inf
    np.testing.assert_array_equal(kernel_distances(real, generated), [expected[0], np.nan, expected[2]])


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "at least 2 images of each kind, got 1 and 5"),
        (np.zeros((4, 3)), np.zeros((4, 2)), r"of one critic, got \[4, 3\] and \[4, 2\]"),
        (np.full((4, 3), np.nan), np.zeros((4, 3)), "4 of 4 real images have features that are not finite"),
    ],
)
def test_sets_that_have_no_pooled_distance_are_refused(real, generated, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(real, generated)


@pytest.mark.parametrize("shape", [(3, 1, 2), (2, 4, 2), (3, 4, 5), (3, 2)])
def test_classes_that_do_not_fit_together_are_refused(shape):
    with pytest.raises(ValueError, match=r"same classes, got|at least 2 images of each kind"):
        kernel_distances(np.zeros((3, 4, 2)), np.zeros(shape))
