import numpy as np
import pytest

from metagen_jax.metrics.interval import over_classes, over_seeds


def test_the_interval_has_the_width_of_normal_theory_for_many_classes():
    values = np.random.default_rng(0).normal(100.0, 8.0, size=400)
    mean, low, high = over_classes(values)
    assert mean == values.mean()
    np.testing.assert_allclose(high - low, 2 * 1.96 * values.std() / 400**0.5, rtol=0.06)
    np.testing.assert_allclose((low + high) / 2, mean, atol=0.1)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    intervals = [over_classes(rng.exponential(size=40), num_resamples=300) for _ in range(200)]
    covered = np.mean([low <= 1.0 <= high for _, low, high in intervals])
    assert 0.87 < covered < 0.985  # 0.95 less a little for 40 skewed classes


def test_the_same_values_have_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(2).normal(size=30)
    assert over_classes(values) == over_classes(values)
    assert over_classes(values).low != over_classes(values, seed=1).low


def test_classes_that_all_agree_have_an_interval_of_no_width():
    assert over_classes(np.full(5, -91.5)) == (-91.5, -91.5, -91.5)


@pytest.mark.parametrize("values", [np.zeros(1), np.zeros(0), np.zeros((3, 2))])
def test_anything_but_one_value_for_each_of_several_classes_is_refused(values):
    with pytest.raises(ValueError, match="at least 2 classes"):
        over_classes(values)


def test_a_class_that_diverged_is_an_error_and_not_left_out():
    with pytest.raises(ValueError, match="2 of 4 classes have a value that is not finite"):
        over_classes(np.array([1.0, np.nan, 2.0, -np.inf]))


def test_the_interval_over_seeds_covers_the_true_mean_as_often_as_it_says():
    draws = np.random.default_rng(2).normal(3.0, 2.0, size=(4000, 3))
    covered = np.mean([abs(mean - 3.0) <= half for mean, half in map(over_seeds, draws)])
    assert abs(covered - 0.95) < 0.012


def test_one_seed_has_no_interval_and_none_is_refused():
    mean, half = over_seeds([4.0])
    assert mean == 4.0
    assert np.isnan(half)
    for wrong in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite value"):
            over_seeds(wrong)
