import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_gaussian import exact, linear_vae, random_params
from scipy import special, stats

from metagen_jax import LatentVariable
from metagen_jax.metrics.likelihood import bounds, label
from metagen_jax.models.densities import exact as exact_density
from metagen_jax.models.densities import of_latent
from metagen_jax.types import Density

PARAMS_SEED = 1


@pytest.fixture
def problem(x64):
    """A linear-Gaussian model with an encoder that is a little off, images of it, and their exact log-likelihood."""
    params = random_params(4, 2, PARAMS_SEED)
    mean, covariance = exact(params)
    distribution = stats.multivariate_normal(mean, covariance)
    x = distribution.rvs(8, random_state=np.random.default_rng(0))
    return linear_vae(4, 2).latent, params, jnp.asarray(x), distribution.logpdf(x)


def test_chunks_accumulate_the_same_samples_to_the_same_bounds(problem):
    latent, params, x, _ = problem
    elbo, iwae = bounds(of_latent(latent), 6, chunk=3)(params, jax.random.key(7), x)
    mean, log_scale = latent.encode(params, x)
    log_weights = []
    for index in range(2):
        for key in jax.random.split(jax.random.fold_in(jax.random.key(7), index), 3):
            z = mean + jnp.exp(log_scale) * jax.random.normal(key, mean.shape)
            log_q = stats.norm.logpdf(z, mean, np.exp(log_scale)).sum(-1)
            log_p = latent.log_likelihood(params, x, z) + latent.log_prior(params, z)
            log_weights.append(np.asarray(log_p) - log_q)
    np.testing.assert_allclose(elbo, np.mean(log_weights, 0), rtol=1e-10)
    np.testing.assert_allclose(iwae, special.logsumexp(log_weights, 0) - np.log(6), rtol=1e-10)


def test_one_sample_of_the_iwae_is_the_elbo(problem):
    latent, params, x, _ = problem
    elbo, iwae = bounds(of_latent(latent), 1)(params, jax.random.key(0), x)
    np.testing.assert_allclose(elbo, iwae, rtol=1e-12)


def test_elbo_is_below_iwae_is_below_the_exact_log_likelihood_which_it_approaches(problem):
    latent, params, x, expected = problem
    keys = jax.random.split(jax.random.key(0), 64)

    def means(num_samples):
        estimate = bounds(of_latent(latent), num_samples, chunk=min(num_samples, 50))
        many = jax.jit(jax.vmap(lambda key: estimate(params, key, x)))
        return [np.asarray(value).mean() for value in many(jax.random.clone(keys))]

    elbo, iwae_5 = means(5)
    _, iwae_50 = means(50)
    _, iwae_1000 = means(1000)
    assert elbo + 0.02 < iwae_5 < iwae_50 < expected.mean() + 0.005
    assert iwae_5 + 0.01 < iwae_50
    np.testing.assert_allclose(iwae_1000, expected.mean(), atol=0.01)


def test_weights_far_below_the_smallest_float_do_not_underflow():
    constant = LatentVariable(
        encode=lambda params, x: (jnp.zeros((2, 1)), jnp.zeros((2, 1))),
        decode=lambda params, z: z,
        log_prior=lambda params, z: -0.5 * (jnp.square(z) + jnp.log(2 * jnp.pi)).sum(-1),
        log_likelihood=lambda params, x, z: x[:, 0],
    )
    x = jnp.array([[-1e4], [500.0]])
    for value in bounds(of_latent(constant), 20, chunk=5)({}, jax.random.key(0), x):
        np.testing.assert_allclose(value, x[:, 0], rtol=1e-5)


@pytest.mark.parametrize(("num_samples", "chunk"), [(0, 50), (75, 50), (-1, 1)])
def test_a_number_of_samples_that_cannot_be_cut_into_chunks_is_refused(num_samples, chunk):
    with pytest.raises(ValueError, match="positive multiple of chunk"):
        bounds(linear_vae(4, 2).density, num_samples, chunk=chunk)


def test_an_exact_density_is_evaluated_once_and_both_numbers_are_the_log_likelihood():
    calls = []

    def log_prob(params, x):
        calls.append(x.shape)
        return params["rate"] * x[:, 0]

    density = exact_density(log_prob)
    elbo, iwae = bounds(density, 200)({"rate": 2.0}, jax.random.key(0), jnp.array([[1.0], [3.0]]))
    np.testing.assert_allclose(elbo, [2, 6])
    np.testing.assert_allclose(iwae, [2, 6])
    assert calls == [(2, 1)]
    assert label(density, 200) == "exact"


def test_of_a_bound_the_mean_counts_and_not_the_log_of_the_mean():
    density = Density(lambda params, key, x: jax.random.normal(key, x.shape[:1]), "bound")
    elbo, best = bounds(density, 100, chunk=25)({}, jax.random.key(0), jnp.zeros((3, 1)))
    keys = [k for i in range(4) for k in jax.random.split(jax.random.fold_in(jax.random.key(0), i), 25)]
    np.testing.assert_allclose(elbo, np.mean([jax.random.normal(key, (3,)) for key in keys], 0), atol=1e-6)
    np.testing.assert_array_equal(elbo, best)
    assert label(density, 100) == "bound, 100 draws"
