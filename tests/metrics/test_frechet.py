"""The Frechet distance against scipy's matrix root and against Gaussians whose moments are known."""

import numpy as np
import pytest
from scipy import linalg

from metagen_jax.metrics.frechet import frechet_distance


def _features(seed, num, size):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num, size)) @ rng.normal(size=(size, size)) + rng.normal(size=size)


def _with_moments(mean, root, num):
    """Return features whose sample mean and covariance are exactly `mean` and `root root^T`."""
    white = np.random.default_rng(0).normal(size=(num, len(mean)))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    return white @ np.asarray(root).T + mean


@pytest.mark.parametrize("num", [200, 5])
def test_the_distance_is_that_of_scipys_matrix_root_also_with_fewer_images_than_features(num):
    real, generated = _features(1, num, 8), _features(2, num + 3, 8)
    first, second = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
    root = linalg.sqrtm(first @ second + (0 if num > 8 else 1e-12) * np.eye(8))
    expected = np.square(real.mean(0) - generated.mean(0)).sum() + np.trace(first + second - 2 * np.real(root))
    np.testing.assert_allclose(frechet_distance(real, generated), expected, rtol=1e-9 if num > 8 else 1e-4)


def test_gaussians_of_known_moments_have_the_known_distance():
    """With commuting covariances it is |m - m'|^2 + sum of (s - s')^2 over the axes."""
    turn = linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
    real = _with_moments([1.0, 0.0, -2.0], turn @ np.diag([1.0, 2.0, 0.5]), 40)
    generated = _with_moments([0.0, 0.0, 1.0], turn @ np.diag([3.0, 2.0, 0.0]), 50)
    np.testing.assert_allclose(frechet_distance(real, generated), 1 + 9 + 4 + 0 + 0.25, rtol=1e-7)


def test_the_distance_of_a_set_to_itself_is_zero_and_the_order_does_not_matter():
    real, generated = _features(1, 50, 6), _features(2, 40, 6)
    assert abs(frechet_distance(real, real[::-1])) < 1e-9
    np.testing.assert_allclose(frechet_distance(real, generated), frechet_distance(generated, real), rtol=1e-10)


def test_single_precision_features_are_measured_in_double_precision():
    real, generated = (_features(seed, 60, 4).astype(np.float32) for seed in (1, 2))
    assert frechet_distance(real, generated) == frechet_distance(real.astype(float), generated.astype(float))


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "at least 2 images of each kind, got 1 and 5"),
        (np.zeros((4, 3)), np.zeros((4, 2)), r"of one critic, got \[4, 3\] and \[4, 2\]"),
        (np.zeros(4), np.zeros((4, 2)), r"got \[4\]"),
        (np.zeros((4, 3)), np.full((4, 3), np.nan), "4 of 4 generated images have features that are not finite"),
    ],
)
def test_sets_without_a_covariance_are_refused(real, generated, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(real, generated)
