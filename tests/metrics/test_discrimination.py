"""The held-out discriminator: chance, certainty, closed forms, and that it never saw the class that it judges."""

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from metagen_jax.metrics.discrimination import discrimination

CHANCE = np.log(2)


def test_equal_distributions_are_told_apart_by_chance():
    rng = np.random.default_rng(0)
    values = discrimination(rng.normal(size=(100, 10, 4)), rng.normal(size=(100, 12, 4)))
    assert abs(values.mean() - CHANCE) < 0.01
    assert values.mean() > CHANCE - 3 * values.std() / 10  # held out: no better than chance, however flexible


def test_separable_kinds_are_told_apart_almost_surely():
    rng = np.random.default_rng(1)
    real, generated = rng.normal(size=(10, 10, 4)), rng.normal(size=(10, 10, 4)) + np.array([50.0, 0, 0, 0])
    assert discrimination(real, generated, ridge=1e-4).max() < 0.01


def test_two_gaussians_have_the_cross_entropy_of_the_best_discriminator():
    """Of N(0, 1) and N(1, 1) it is linear, f(x) = 1/2 - x, so the fit of many images is the best there is."""
    rng = np.random.default_rng(2)
    values = discrimination(rng.normal(size=(40, 500, 1)), rng.normal(1.0, 1.0, size=(40, 500, 1)), ridge=1e-9)
    best = integrate.quad(lambda x: stats.norm.pdf(x) * np.logaddexp(0, x - 0.5), -10, 10)[0]
    assert abs(values.mean() - best) < 3 * values.std() / 40**0.5


def test_each_half_of_the_classes_is_judged_by_the_regularised_minimum_on_the_other():
    rng = np.random.default_rng(3)
    real, generated = rng.normal(size=(4, 6, 3)), rng.normal(0.8, 2.0, size=(4, 9, 3)) + 5
    ridge, expected = 0.05, np.empty(4)
    for fitted, scored in (([0, 2], [1, 3]), ([1, 3], [0, 2])):
        one, two = real[fitted].reshape(-1, 3), generated[fitted].reshape(-1, 3)
        mean = (one.mean(0) + two.mean(0)) / 2
        scale = np.sqrt((np.square(one - mean).mean(0) + np.square(two - mean).mean(0)) / 2)

        def entropy(w, x, y, mean=mean, scale=scale):
            f, g = ((z - mean) / scale @ w[:-1] + w[-1] for z in (x, y))
            return (np.logaddexp(0, -f).mean() + np.logaddexp(0, g).mean()) / 2

        def loss(w, one=one, two=two, entropy=entropy):
            return entropy(w, one, two) + ridge / 2 * np.square(w[:-1]).sum()

        w = optimize.minimize(loss, np.zeros(4), tol=1e-12, options={"gtol": 1e-9}).x
        expected[scored] = [entropy(w, real[c], generated[c]) for c in scored]
    np.testing.assert_allclose(discrimination(real, generated, ridge=ridge), expected, rtol=1e-6)


def test_a_class_is_not_judged_by_a_discriminator_that_saw_it():
    """What is peculiar to one class of the even half changes the judgement of the odd half only."""
    rng = np.random.default_rng(4)
    real, generated = rng.normal(size=(6, 5, 3)), rng.normal(size=(6, 5, 3))
    before = discrimination(real, generated)
    generated[2] += 10.0
    changed = discrimination(real, generated) != before
    np.testing.assert_array_equal(changed, [False, True, True, True, False, True])  # 2 itself has other images


def test_constant_features_tell_nothing_and_scale_does_not_matter():
    rng = np.random.default_rng(5)
    real, generated = rng.normal(size=(6, 5, 3)), rng.normal(0.5, 1.0, size=(6, 5, 3))
    expected = discrimination(real, generated)
    wider = [np.concatenate([1e4 * x - 3e3, np.full((6, 5, 1), 0.1)], axis=-1) for x in (real, generated)]
    np.testing.assert_allclose(discrimination(*wider), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("real", "generated", "options", "message"),
    [
        (np.zeros((1, 4, 2)), np.zeros((1, 4, 2)), {}, "at least 2 classes"),
        (np.zeros((3, 4, 2)), np.zeros((3, 0, 2)), {}, r"images of both kinds .* got \[3, 4, 2\] and \[3, 0, 2\]"),
        (np.zeros((3, 4, 2)), np.zeros((2, 4, 2)), {}, r"same classes, got \[3, 4, 2\] and \[2, 4, 2\]"),
        (np.zeros((3, 4, 2)), np.zeros((3, 4, 2)), {"ridge": 0.0}, "ridge > 0"),
        (np.zeros((3, 4, 2)), np.full((3, 4, 2), np.nan), {}, "3 of 3 classes have features that are not finite"),
    ],
)
def test_what_cannot_be_fitted_is_refused(real, generated, options, message):
    with pytest.raises(ValueError, match=message):
        discrimination(real, generated, **options)
