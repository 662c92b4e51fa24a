"""Mixtures against sums of probabilities in NumPy, and selection against trying everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_gaussian import exact, linear_vae, random_params
from problems import finite_difference
from scipy import stats

from metagen_jax.metrics.likelihood import bounds
from metagen_jax.population.ensemble import each, ensemble, greedy_selection, log_mixture


def _log_p(*shape, seed=0):
    return np.log(np.random.default_rng(seed).dirichlet(np.ones(shape[-1]), size=shape[:-1])).astype("f4")


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0]])
def test_a_mixture_is_the_weighted_mean_of_probabilities(weights):
    log_p = _log_p(3, 4, 5)
    share = np.ones(3) / 3 if weights is None else np.array(weights) / 4
    given = None if weights is None else jnp.array(weights)
    mixed = jax.jit(log_mixture)(log_p, given)
    np.testing.assert_allclose(np.exp(mixed), np.tensordot(share, np.exp(log_p), 1), rtol=1e-5)
    np.testing.assert_allclose(np.exp(mixed).sum(1), 1.0, rtol=1e-5)


def test_a_mixture_of_what_is_far_below_zero_is_exact():
    log_p = jnp.array([[-1000.0, -jnp.inf, -jnp.inf], [-1001.0, -2.0, -jnp.inf]])
    expected = [-1000.0 + np.log((1 + np.exp(-1)) / 2), -2.0 - np.log(2), -np.inf]
    np.testing.assert_allclose(jax.jit(log_mixture)(log_p), expected, rtol=1e-6)


def test_a_member_without_weight_may_be_anything():
    log_p = _log_p(3, 2, 4)
    broken = jnp.asarray(log_p).at[1].set(jnp.nan)
    weights = jnp.array([1.0, 0.0, 1.0])
    mixed = jax.jit(jax.value_and_grad(lambda log_p: log_mixture(log_p, weights).sum()))
    value, gradient = mixed(broken)
    np.testing.assert_allclose(value, mixed(log_p)[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, mixed(log_p)[1], rtol=1e-5)
    assert np.isnan(log_mixture(broken)).all()


def test_the_gradient_of_a_mixture_equals_finite_differences(x64):
    log_p, along = jnp.asarray(_log_p(3, 2, 4), float), jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 4)))
    function = jax.jit(lambda log_p: jnp.sin(log_mixture(log_p, jnp.array([1.0, 2.0, 0.5]))).sum())
    slope = float((jax.grad(function)(log_p) * along).sum())
    assert abs(slope) > 1e-2
    np.testing.assert_allclose(slope, finite_difference(function, log_p, along), rtol=1e-6)


def test_the_mixture_of_bounds_is_below_the_likelihood_of_the_mixture_of_models(x64):
    built = linear_vae(3, 2)
    members = [random_params(3, 2, seed) for seed in (0, 1)]
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 3)))
    estimate = jax.jit(bounds(built.density, 2000, chunk=2000))
    elbos = jnp.stack([estimate(params, jax.random.key(0), x)[0] for params in members])
    likelihoods = np.stack([stats.multivariate_normal(*exact(params)).logpdf(x) for params in members])
    mixed, truth = log_mixture(elbos), np.log(np.exp(likelihoods).mean(0))
    assert (np.asarray(mixed) <= truth + 0.02).all()
    assert (np.asarray(mixed) >= np.asarray(elbos).mean(0)).all()  # and no looser than the mean of the bounds


def test_an_ensemble_asks_each_member_with_its_own_traits_parameters_and_key():
    def answer(traits, meta, key, task):
        return traits["factor"] * meta["model"] * task + jax.random.normal(key, (2,))

    traits, metas = {"factor": jnp.array([1.0, 2.0, -1.0])}, {"model": jnp.array([0.5, 0.25, 2.0])}
    task = jnp.array([1.0, -3.0])
    noise = np.stack([jax.random.normal(key, (2,)) for key in jax.random.split(jax.random.key(0), 3)])
    expected = np.array([0.5, 0.5, -2.0])[:, None] * np.asarray(task)[None] + noise
    np.testing.assert_allclose(jax.jit(each(answer))(traits, metas, jax.random.key(0), task), expected, rtol=1e-5)
    mixed = jax.jit(ensemble(answer))(traits, metas, jax.random.key(0), task, jnp.array([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(mixed, np.log(np.exp(expected[:2]).mean(0)), rtol=1e-4, atol=1e-5)


def _selected(log_p, num_rounds):
    """Select by trying every member in every round, in NumPy."""
    counts = np.zeros(len(log_p))
    for _ in range(num_rounds):
        tried = [np.log((counts + np.eye(len(log_p))[p]) @ np.exp(log_p)).mean() for p in range(len(log_p))]
        counts[np.argmax(tried)] += 1
    return counts / num_rounds


def test_greedy_selection_adds_what_helps_most_in_each_round():
    log_p = np.random.default_rng(0).normal(-2.0, 1.5, size=(5, 12)).astype("f4")
    weights = jax.jit(greedy_selection, static_argnums=1)(log_p, 7)
    np.testing.assert_allclose(weights, _selected(log_p, 7), atol=1e-6)
    assert 2 <= (np.asarray(weights) > 0).sum() <= 4
    first = jax.jit(greedy_selection, static_argnums=1)(log_p, 1)
    assert np.argmax(first) == np.argmax(log_p.mean(1))
    mixed = [float(log_mixture(log_p, w).mean()) for w in (weights, first)]
    assert mixed[0] > mixed[1] + 0.05


def test_greedy_selection_leaves_out_what_is_no_number():
    log_p = jnp.asarray(_log_p(3, 6)).at[0, 2].set(jnp.nan)
    weights = jax.jit(greedy_selection, static_argnums=1)(log_p, 4)
    assert float(weights[0]) == 0.0
    np.testing.assert_allclose(weights[1:], _selected(np.asarray(log_p[1:]), 4), atol=1e-6)


@pytest.mark.parametrize(("shape", "rounds"), [((2, 3), 0), ((2,), 1), ((2, 3, 4), 1)])
def test_selection_wants_rounds_and_a_table(shape, rounds):
    with pytest.raises(ValueError, match=r"at least one round and likelihoods \[P, N\]"):
        greedy_selection(jnp.zeros(shape), rounds)
