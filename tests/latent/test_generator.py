import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.latent.generator import (
    of_adversarial_autoencoder,
    of_bidirectional,
    of_gan,
    of_vae,
    without_gradient,
)
from metagen_jax.models.adversarial import wasserstein
from metagen_jax.models.adversarial_autoencoder import adversarial_autoencoder
from metagen_jax.models.bidirectional import bidirectional_gan
from metagen_jax.models.gan import gan
from metagen_jax.models.likelihoods import bernoulli
from metagen_jax.models.networks import mlp
from metagen_jax.models.vae import prior_in_use, prior_sample, prior_whitened, vae

EVENT, LATENTS = (3, 3, 1), 2
X = jax.random.uniform(jax.random.key(5), (4, *EVENT))


def small_vae(context=0):
    built = vae(mlp(EVENT, (5,), (2 * LATENTS,)), mlp((LATENTS,), (5,), EVENT), bernoulli(), LATENTS, context=context)
    params = built.model.init(jax.random.key(0))
    prior = {
        "mean": jnp.array([0.3, -1.0]),
        "log_scale": jnp.array([0.5, -0.2]),
        "coupling": jnp.array([[0, 0], [0.7, 0]]),
    }
    params = params | {"prior": prior}
    return built, params | ({"context": jnp.arange(1.0, context + 1)} if context else {})


@pytest.mark.parametrize("context", [0, 3])
def test_white_codes_of_a_vae_have_the_density_of_its_prior(context):
    built, params = small_vae(context)
    code = jax.random.normal(jax.random.key(1), (3, LATENTS))
    z = built.latent.encode(params, X)[0]
    white = of_vae(built, LATENTS).encode(params, X, jnp.zeros((4, LATENTS)))
    log_scale = prior_in_use(params)["log_scale"].sum()
    expected = -0.5 * (jnp.square(white).sum(1) + LATENTS * jnp.log(2 * jnp.pi)) - log_scale
    np.testing.assert_allclose(built.latent.log_prior(params, z), expected, rtol=1e-5)
    assert code.shape == (3, LATENTS)


def test_whitening_undoes_sampling():
    _built, params = small_vae()
    code = jax.random.normal(jax.random.key(4), (5, LATENTS))
    prior = prior_in_use(params)
    np.testing.assert_allclose(prior_whitened(prior, prior_sample(prior, code)), code, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("context", [0, 3])
def test_decoding_a_code_is_decoding_what_it_is_of_the_prior(context):
    built, params = small_vae(context)
    generator = of_vae(built, LATENTS)
    zeros = jnp.zeros((4, LATENTS))
    again = generator.decode(params, generator.encode(params, X, zeros))
    np.testing.assert_allclose(again, built.latent.decode(params, built.latent.encode(params, X)[0]), atol=1e-5)


def test_noise_samples_the_posterior():
    built, params = small_vae()
    generator = of_vae(built, LATENTS)
    noise = jax.random.normal(jax.random.key(2), (4, LATENTS))
    mean, log_scale = built.latent.encode(params, X)
    z = mean + jnp.exp(log_scale) * noise
    np.testing.assert_allclose(
        generator.decode(params, generator.encode(params, X, noise)), built.latent.decode(params, z), atol=1e-5
    )


def test_samples_of_the_vae_are_decoded_normal_noise():
    built, params = small_vae(3)
    noise = jax.random.normal(jax.random.key(3), (6, LATENTS))
    np.testing.assert_allclose(
        built.model.sample(params, jax.random.key(3), 6), of_vae(built, LATENTS).decode(params, noise), atol=1e-6
    )


def test_a_gan_decodes_its_own_noise_and_has_no_codes_of_images():
    built = gan(mlp((LATENTS,), (4,), EVENT), mlp(EVENT, (4,), (1,)), wasserstein(), LATENTS)
    params = built.model.init(jax.random.key(0))
    generator = of_gan(built, LATENTS)
    noise = jax.random.normal(jax.random.key(3), (6, LATENTS))
    np.testing.assert_array_equal(generator.decode(params, noise), built.model.sample(params, jax.random.key(3), 6))
    with pytest.raises(ValueError, match="no encoder"):
        generator.encode(params, X, jnp.zeros((4, LATENTS)))


def test_autoencoders_with_rivals_encode_and_decode_as_they_do():
    networks = mlp(EVENT, (4,), (LATENTS,)), mlp((LATENTS,), (4,), EVENT)
    noise = jnp.ones((4, LATENTS))
    with_codes = adversarial_autoencoder(*networks, mlp((LATENTS,), (4,), (1,)), bernoulli(), LATENTS)
    params = with_codes.model.init(jax.random.key(0))
    made = of_adversarial_autoencoder(with_codes, LATENTS)
    code = made.encode(params, X, noise)
    np.testing.assert_array_equal(code, with_codes.encode(params, X))
    np.testing.assert_array_equal(made.decode(params, code), with_codes.decode(params, code))
    both = bidirectional_gan(*networks, mlp((9 + LATENTS,), (4,), (1,)), LATENTS)
    params = both.model.init(jax.random.key(0))
    made = of_bidirectional(both, LATENTS)
    code = made.encode(params, X, noise)
    np.testing.assert_array_equal(code, both.encode(params, X))
    np.testing.assert_array_equal(made.decode(params, code), both.generate(params, code))


def test_without_gradient_only_codes_have_one():
    built, params = small_vae()
    frozen = without_gradient(of_vae(built, LATENTS))
    code = jnp.ones((2, LATENTS))
    of_params, of_code = jax.grad(lambda p, c: frozen.decode(p, c).sum(), (0, 1))(params, code)
    assert all(not leaf.any() for leaf in jax.tree.leaves(of_params))
    assert float(jnp.abs(of_code).min()) > 0
    np.testing.assert_allclose(of_code, jax.grad(lambda c: of_vae(built, LATENTS).decode(params, c).sum())(code))
