"""Draws, weights and the simplex against NumPy and closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.strategies.drawing import cosines, normalised, onto_simplex, standardised, without_replacement

P = np.array([0.5, 0.3, 0.15, 0.05])


def _draws(num, count=20_000):
    draw = jax.jit(jax.vmap(lambda key: without_replacement(key, jnp.log(jnp.asarray(P, jnp.float32)), num)))
    return [np.asarray(part) for part in draw(jax.random.split(jax.random.key(0), count))]


def test_draws_without_replacement_have_the_probabilities_of_drawing_one_after_the_other():
    indices, _ = _draws(2)
    for first, second in itertools.permutations(range(4), 2):
        expected = P[first] * P[second] / (1 - P[first])
        found = ((indices[:, 0] == first) & (indices[:, 1] == second)).mean()
        assert abs(found - expected) < 4 * np.sqrt(expected / len(indices))


def test_inverse_inclusion_probabilities_estimate_a_sum_without_bias():
    indices, inclusion = _draws(2)
    values = np.array([1.0, -2.0, 3.0, 5.0])
    estimates = (values[indices] / inclusion).sum(1)
    error = estimates.std() / np.sqrt(len(estimates))
    assert error < 0.2
    assert abs(estimates.mean() - values.sum()) < 4 * error


def test_drawing_everything_is_a_permutation_with_certainty():
    indices, inclusion = _draws(4, 100)
    np.testing.assert_array_equal(np.sort(indices, 1), np.tile(np.arange(4), (100, 1)))
    np.testing.assert_array_equal(inclusion, 1.0)


def test_what_has_no_probability_is_drawn_last():
    log_p = jnp.array([-jnp.inf, 0.0, -jnp.inf, 0.0])
    draw = jax.jit(jax.vmap(lambda key: without_replacement(key, log_p, 3)[0]))
    found = np.asarray(draw(jax.random.split(jax.random.key(1), 50)))
    assert (np.sort(found[:, :2], 1) == [1, 3]).all()


def _bisected(x):
    """Return the projection by bisection of theta in sum max(x - theta, 0) = 1."""
    low, high = x.min() - 1.0, x.max()
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if np.maximum(x - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(x - low, 0)


def test_the_projection_onto_the_simplex_is_that_of_bisection():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5)).astype("f4") * rng.choice([0.1, 1.0, 10.0], (40, 1)).astype("f4")
    found = np.asarray(jax.jit(jax.vmap(onto_simplex))(x))
    np.testing.assert_allclose(found, [_bisected(row.astype(float)) for row in x], atol=3e-6)
    assert (found == 0).any()  # both sides of the constraint occur
    assert (found > 0).all(1).any()


@pytest.mark.parametrize("point", [[0.2, 0.3, 0.5], [0.0, 0.0, 1.0]])
def test_a_point_of_the_simplex_is_its_own_projection(point):
    np.testing.assert_allclose(onto_simplex(jnp.array(point)), point, atol=1e-7)


def test_weights_are_over_their_sum_and_equal_where_all_are_zero():
    np.testing.assert_allclose(normalised(jnp.array([1.0, 0.0, 3.0])), [0.25, 0, 0.75])
    np.testing.assert_allclose(normalised(jnp.zeros(4)), 0.25)


def test_standardised_values_have_mean_zero_and_deviation_one_and_equal_ones_are_zero():
    values = np.array([1.0, 2.0, 6.0], "f4")
    np.testing.assert_allclose(standardised(values), (values - 3) / values.std(), rtol=1e-6)
    np.testing.assert_array_equal(standardised(jnp.full(3, 7.0)), 0.0)


def test_cosines_are_those_of_numpy_and_zero_for_a_row_of_zeros():
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("f4")
    expected = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in x] for a in x]
    np.testing.assert_allclose(cosines(x), expected, atol=1e-6)
    np.testing.assert_array_equal(cosines(jnp.asarray(x).at[1].set(0.0))[1], 0.0)
