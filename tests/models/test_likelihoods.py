import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from metagen_jax import bernoulli, gaussian

EVENT = (3, 2, 1)


def _batch(binary):
    rng = np.random.default_rng(0)
    output, x = 3 * rng.normal(size=(4, *EVENT)), rng.random((4, *EVENT))
    return output, (x < 0.5).astype(float) if binary else x


def test_bernoulli_sums_the_log_probabilities_of_scipy(x64):
    likelihood = bernoulli()
    output, x = _batch(binary=True)
    expected = stats.bernoulli.logpmf(x, special.expit(output)).sum((1, 2, 3))
    np.testing.assert_allclose(likelihood.log_prob({}, jnp.asarray(output), jnp.asarray(x)), expected, rtol=1e-12)
    np.testing.assert_allclose(likelihood.mean({}, jnp.asarray(output)), special.expit(output), rtol=1e-12)
    assert likelihood.binary


def test_bernoulli_and_its_gradient_are_finite_for_outputs_that_saturate():
    output, x = jnp.array([[200.0, -200.0, 200.0]]), jnp.array([[1.0, 0.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda output: bernoulli().log_prob({}, output, x).sum())(output)
    np.testing.assert_allclose(value, -200.0)
    np.testing.assert_allclose(gradient, [[0.0, 0.0, -1.0]])


@pytest.mark.parametrize("scale", [0.05, 0.3, 2.0])
def test_gaussian_sums_the_log_densities_of_scipy(x64, scale):
    likelihood = gaussian(scale)
    output, x = _batch(binary=False)
    params = {"log_scale": jnp.log(jnp.asarray(scale))}
    np.testing.assert_allclose(likelihood.init["log_scale"], np.log(scale), rtol=1e-6)
    expected = stats.norm.logpdf(x, special.expit(output), scale).sum((1, 2, 3))
    np.testing.assert_allclose(likelihood.log_prob(params, jnp.asarray(output), jnp.asarray(x)), expected, rtol=1e-12)
    np.testing.assert_allclose(likelihood.mean(params, jnp.asarray(output)), special.expit(output), rtol=1e-12)
    assert not likelihood.binary


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(scale):
    with pytest.raises(ValueError, match="must be positive"):
        gaussian(scale)
