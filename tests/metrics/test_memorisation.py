"""Memorisation on points laid out by hand."""

import numpy as np
import pytest

from metagen_jax.metrics.memorisation import memorisation


def test_the_ratio_is_that_of_mean_distances_to_the_nearest_support_image():
    support = np.array([[[0.0, 0.0], [10.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    samples = np.array([[[3.0, 4.0], [10.0, 1.0]], [[1.0, 0.0], [0.0, 5.0]]])  # at 5 and 1, and at 1 and 5
    held_out = np.array([[[0.0, 2.0]], [[0.0, 12.0]]])
    np.testing.assert_allclose(memorisation(support, samples, held_out).ratio, [3 / 2, 3 / 12])


def test_copies_are_counted_and_new_images_are_not():
    rng = np.random.default_rng(0)
    support, held_out = rng.normal(size=(5, 4, 6)), rng.normal(size=(5, 20, 6))
    new = rng.normal(size=(5, 8, 6))
    repeated = np.concatenate([new[:, :6], support[:, :2] + 1e-6], axis=1)
    assert memorisation(support, new, held_out).copies.mean() <= 1 / 40
    np.testing.assert_array_equal(memorisation(support, repeated, held_out).copies >= 0.25, True)
    ratio, copies = memorisation(support, support, held_out)
    np.testing.assert_array_equal(ratio, np.zeros(5))
    np.testing.assert_array_equal(copies, np.ones(5))


def test_new_images_of_the_class_have_ratio_one_and_one_copy_in_a_hundred():
    rng = np.random.default_rng(1)
    support, samples, held_out = (rng.normal(size=(200, n, 4)) for n in (5, 40, 40))
    ratio, copies = memorisation(support, samples, held_out)
    assert abs(ratio.mean() - 1) < 0.02
    assert abs(copies.mean() - 0.01) < 0.005


def test_the_threshold_is_pooled_over_classes():
    """A class whose real images all lie near their support does not hide its neighbours' copies."""
    support = np.zeros((2, 1, 1))
    held_out = np.stack([np.linspace(100, 199, 100), np.linspace(1, 100, 100)])[..., None]
    near = np.percentile(held_out, 1.0)
    samples = np.array([[[near - 0.01]], [[near + 0.01]]])
    np.testing.assert_array_equal(memorisation(support, samples, held_out).copies, [1, 0])


def test_a_class_that_diverged_is_nan_in_both_and_the_others_are_not():
    rng = np.random.default_rng(2)
    support, samples, held_out = (rng.normal(size=(3, 4, 2)) for _ in range(3))
    expected = memorisation(support, samples, held_out)
    samples[1, 0, 0] = np.nan
    got = memorisation(support, samples, held_out)
    for value, before in zip(got, expected, strict=True):
        np.testing.assert_array_equal(value, [before[0], np.nan, before[2]])


def test_held_out_images_that_are_the_support_are_refused():
    support = np.random.default_rng(3).normal(size=(3, 4, 2))
    with pytest.raises(ValueError, match="held-out images of 3 of 3 classes all are in their support"):
        memorisation(support, support, support[:, :2])


@pytest.mark.parametrize(
    ("support", "held_out", "message"),
    [
        (np.zeros((3, 4, 2)), np.zeros((2, 4, 2)), r"got \[3, 4, 2\], \[3, 5, 2\], \[2, 4, 2\]"),
        (np.zeros((3, 0, 2)), np.zeros((3, 4, 2)), "at least one image of each"),
        (np.full((3, 4, 2), np.nan), np.zeros((3, 4, 2)), "3 of 3 classes have real images that are not finite"),
    ],
)
def test_real_images_that_cannot_be_compared_with_are_refused(support, held_out, message):
    with pytest.raises(ValueError, match=message):
        memorisation(support, np.zeros((3, 5, 2)), held_out)
