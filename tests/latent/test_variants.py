import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EVENT, tiny_gan, tiny_vae

from metagen_jax import fixed, maml
from metagen_jax.latent.generator import Generator, of_gan, of_vae
from metagen_jax.latent.variants import by_adapting, hard, perturbed, posterior, towards_outsider


def _key():
    return jax.random.key(7)


NUM, LATENTS, PIXELS = 4000, 2, 3
PARAMS = {
    "decode": jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]]),
    "encode": jnp.array([[0.5, 0.0], [0.0, 1.0], [0.0, 0.0]]),
    "scale": jnp.array([0.1, 0.3]),
}
LINEAR = Generator(
    lambda params, code: code @ params["decode"],
    lambda params, x, noise: x @ params["encode"] + noise * params["scale"][None],
    LATENTS,
)
X = np.random.default_rng(0).normal(size=(5, PIXELS)).astype("f4")
CODE = X @ np.asarray(PARAMS["encode"])


@pytest.mark.parametrize("make", [lambda: perturbed(LINEAR, 0.0), lambda: towards_outsider(LINEAR, 0.0)])
def test_strength_zero_is_the_reconstruction(make):
    np.testing.assert_allclose(make()(PARAMS, _key(), X), CODE @ np.asarray(PARAMS["decode"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "kept", "scale"),
    [
        (lambda: perturbed(LINEAR, 0.5), 1.0, [0.5, 0.5]),
        (lambda: posterior(LINEAR), 1.0, [0.1, 0.3]),
        (lambda: towards_outsider(LINEAR, 0.25), 0.75, [0.25, 0.25]),
        (lambda: towards_outsider(LINEAR, 1.0), 0.0, [1.0, 1.0]),
    ],
    ids=["perturbed", "posterior", "towards an outsider", "an outsider"],
)
def test_codes_of_variants_have_the_mean_and_the_spread_that_they_should(make, kept, scale):
    x = jnp.tile(X[:1], (NUM, 1))  # one image many times: each has noise of its own
    made = np.asarray(make()(PARAMS, _key(), x))
    decode = np.asarray(PARAMS["decode"])
    np.testing.assert_allclose(made[:, 2], 2 * made[:, 0] - made[:, 1], atol=1e-5)  # what this decoder can make
    np.testing.assert_allclose(made.mean(0), kept * CODE[0] @ decode, atol=0.1 * max(scale))
    np.testing.assert_allclose(
        np.cov(made.T), decode.T @ np.diag(np.square(scale)) @ decode, rtol=0.06, atol=0.06 * max(scale) ** 2
    )


def test_below_one_half_a_code_stays_nearer_to_its_image_than_to_the_outsider():
    noise = jax.random.normal(_key(), (5, LATENTS))
    identity = Generator(lambda params, code: code, lambda params, x, noise: x, LATENTS)
    code = jnp.asarray(X[:, :LATENTS])
    made = towards_outsider(identity, 0.4)(None, _key(), code)
    np.testing.assert_allclose(
        np.linalg.norm(made - code, axis=1) / np.linalg.norm(made - noise, axis=1), 0.4 / 0.6, rtol=1e-4
    )


def test_variants_of_a_vae_are_decoded_near_the_code_of_the_image():
    built = tiny_vae(context=0)
    params = jax.jit(built.model.init)(jax.random.key(0))
    prior = {"mean": jnp.array([1.0, -2.0]), "log_scale": jnp.array([0.5, -0.5]), "coupling": jnp.eye(2)[::-1]}
    params = params | {"prior": prior}
    x = (jax.random.uniform(jax.random.key(1), (4, *EVENT)) < 0.5).astype(float)
    mean, _ = jax.jit(built.latent.encode)(params, x)
    still = jax.jit(perturbed(of_vae(built, 2), 0.0))(params, jax.random.key(2), x)
    np.testing.assert_allclose(still, jax.jit(built.latent.decode)(params, mean), rtol=1e-4, atol=1e-5)
    many = jnp.repeat(x, 300, axis=0)
    draws = np.asarray(jax.jit(towards_outsider(of_vae(built, 2), 1.0))(params, jax.random.key(2), many))
    model = np.asarray(jax.jit(built.model.sample, static_argnums=2)(params, jax.random.key(3), 1200))
    np.testing.assert_allclose(draws.mean(0), model.mean(0), atol=0.02)  # an outsider is a draw of the learned prior
    np.testing.assert_allclose(draws.std(0), model.std(0), atol=0.02)


def test_by_adapting_samples_what_each_image_alone_adapts_to():
    def adapt(meta, key, support):
        assert support.x.shape == (1, PIXELS)
        shift = jax.random.uniform(key)
        return {"mean": (support.weight[:, None] * support.x).sum(0) * meta, "shift": shift}, {}

    def sample(params, key, num):
        noise = jax.random.uniform(key, (num,))
        return params["mean"][None] + 10 * params["shift"] + 100 * noise[:, None]

    made = np.asarray(by_adapting(adapt, sample)(jnp.float32(2.0), _key(), X))
    added = made - 2 * X
    np.testing.assert_allclose(added, np.tile(added[:, :1], (1, PIXELS)), atol=1e-3)
    assert len(np.unique(added[:, 0].round(2))) == len(X)  # keys of their own
    one, two = (jax.random.split(key) for key in jax.random.split(_key(), len(X))[:2])
    for row, (adapt_key, sample_key) in enumerate((one, two)):
        shift, noise = jax.random.uniform(adapt_key), jax.random.uniform(sample_key, (1,))[0]
        np.testing.assert_allclose(added[row, 0], 10 * shift + 100 * noise, rtol=1e-4)


def test_a_learner_for_generation_makes_a_variant_of_every_image_apart():
    built = tiny_vae()
    learner = maml(built.model, fixed(optax.sgd(0.5)), 1, players=("context", "prior"))
    params = jax.jit(learner.init)(jax.random.key(0))
    x = (jax.random.uniform(jax.random.key(1), (3, *EVENT)) < 0.5).astype(float)
    vary = jax.jit(by_adapting(learner.adapt, built.model.sample))
    together = vary(params, _key(), x)
    assert ((together > 0) & (together < 1)).all()
    other = vary(params, _key(), x.at[0].set(1 - x[0]))
    np.testing.assert_allclose(together[1:], other[1:], rtol=1e-4, atol=1e-6)  # nobody sees another one's image
    assert np.abs(np.asarray(together[0] - other[0])).max() > 1e-3


def test_hard_variants_are_binary_by_threshold_or_with_the_probability_of_the_mean():
    mean = jnp.tile(jnp.array([[0.0, 0.3, 0.7, 1.0]]), (NUM, 1))
    cut = hard(lambda params, key, x: x)(None, _key(), mean)
    np.testing.assert_array_equal(cut, np.tile([0, 0, 1, 1], (NUM, 1)))
    drawn = np.asarray(hard(lambda params, key, x: x, "sample")(None, _key(), mean))
    assert set(np.unique(drawn)) == {0, 1}
    np.testing.assert_allclose(drawn.mean(0), [0, 0.3, 0.7, 1], atol=0.03)
    np.testing.assert_allclose(np.corrcoef(drawn[:, 1:3].T)[0, 1], 0, atol=0.06)
    assert drawn.dtype == mean.dtype
    assert (drawn[:, 0] == 0).all()
    assert (drawn[:, 3] == 1).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        perturbed(LINEAR, -1.0)
    for strength in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            towards_outsider(LINEAR, strength)
    with pytest.raises(ValueError, match=r"threshold.*sample.*got 'soft'"):
        hard(posterior(LINEAR), "soft")
    blind = of_gan(tiny_gan(), 2)
    for vary in (perturbed(blind, 1.0), posterior(blind), towards_outsider(blind, 0.5)):
        with pytest.raises(ValueError, match="no encoder"):
            vary({}, _key(), jnp.zeros((1, *EVENT)))
