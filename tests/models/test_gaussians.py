import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.models.gaussians import Gaussian, at, draws, halves, kl, log_density

Q = np.array([0.3, -1.0, 0.2, -0.4])
P = np.array([0.0, 0.5, -0.3, 0.1])


def test_the_divergence_is_the_integral_of_the_log_ratio(x64):
    q, p = halves(jnp.asarray(Q)), halves(jnp.asarray(P))
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    noise = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    weight = np.outer(weights, weights).ravel() / (2 * np.pi)
    x = jax.vmap(at, (None, 0))(q, jnp.asarray(noise))
    many = jax.vmap(log_density, (0, None))
    np.testing.assert_allclose(weight @ np.asarray(many(x, q) - many(x, p)), kl(q, p), rtol=1e-10)


def test_log_density_is_the_formula_and_draws_have_its_moments(x64):
    of = Gaussian(jnp.array([1.0, -2.0]), jnp.array([-0.5, 0.3]))
    scale = np.exp([-0.5, 0.3])
    expected = -0.5 * (0.5 / scale[0]) ** 2 - np.log(2 * np.pi) - np.log(scale).sum()
    np.testing.assert_allclose(log_density(jnp.array([1.5, -2.0]), of), expected, rtol=1e-12)
    x = np.asarray(draws(jax.random.key(0), of, 20000))
    np.testing.assert_allclose(x.mean(0), of.mean, atol=0.05)
    np.testing.assert_allclose(x.std(0), scale, rtol=0.03)
