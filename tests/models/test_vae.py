"""The VAE against exact Gaussians, by hand, and against finite differences; the conformance test of all models."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_gaussian import NOISE, linear_vae, prior_covariance, random_params, random_prior, with_best_encoder
from problems import EVENT, finite_difference, flat, image_task, tiny_vae
from scipy import stats

import metagen_jax as mg
from metagen_jax.models.networks import conv_decoder, conv_encoder, mlp
from metagen_jax.models.vae import PLAYERS, WITH_CONTEXT, prior_kl, prior_log_density, prior_sample
from metagen_jax.models.weighted import weighted_mean


def _conv_vae(likelihood, context=2):
    return mg.vae(conv_encoder(EVENT, (2,), 4), conv_decoder(2, (2,), EVENT), likelihood, 2, context=context)


def _mlp_vae(likelihood, context=0):
    return mg.vae(mlp(EVENT, (5,), (4,)), mlp((2,), (5,), EVENT), likelihood, 2, context=context)


def _params(model, dtype=np.float32, scale=0.3):
    """Return random parameters of the model's form."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), dtype), shapes)


# The prior


@pytest.fixture
def prior(x64):
    return random_prior(3)


def test_the_prior_density_is_that_of_the_gaussian_it_stands_for(prior):
    z = np.random.default_rng(1).normal(size=(6, 3))
    expected = stats.multivariate_normal(prior["mean"], prior_covariance(prior)).logpdf(z)
    np.testing.assert_allclose(prior_log_density(prior, jnp.asarray(z)), expected, rtol=1e-12)


def test_the_kl_to_the_prior_is_that_of_two_gaussians(prior):
    rng = np.random.default_rng(1)
    mean, log_scale = rng.normal(size=(6, 3)), 0.5 * rng.normal(size=(6, 3))
    precision = np.linalg.inv(prior_covariance(prior))
    expected = [
        0.5
        * (
            np.trace(precision @ np.diag(np.exp(2 * s)))
            + (m - prior["mean"]) @ precision @ (m - prior["mean"])
            - 3
            - np.linalg.slogdet(precision)[1]
            - 2 * s.sum()
        )
        for m, s in zip(mean, log_scale, strict=True)
    ]
    np.testing.assert_allclose(prior_kl(prior, jnp.asarray(mean), jnp.asarray(log_scale)), expected, rtol=1e-12)


def test_the_kl_is_zero_where_the_code_is_distributed_as_the_prior(prior):
    diagonal = prior | {"coupling": jnp.zeros((3, 3))}
    kl = prior_kl(diagonal, diagonal["mean"][None], diagonal["log_scale"][None])
    np.testing.assert_allclose(kl, 0.0, atol=1e-14)


def test_samples_of_the_prior_have_its_mean_and_exactly_its_covariance(prior):
    at_zero = np.asarray(prior_sample(prior, jnp.zeros((1, 3))))
    np.testing.assert_allclose(at_zero[0], prior["mean"])
    linear = (np.asarray(prior_sample(prior, jnp.eye(3))) - at_zero).T  # z = mean + linear @ noise
    np.testing.assert_allclose(linear @ linear.T, prior_covariance(prior), rtol=1e-12)


def test_only_the_strictly_lower_triangle_of_the_coupling_counts(prior):
    other = prior | {"coupling": prior["coupling"] + 7 * jnp.triu(jnp.ones((3, 3)))}
    z = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)))
    np.testing.assert_array_equal(prior_log_density(other, z), prior_log_density(prior, z))
    np.testing.assert_array_equal(prior_sample(other, z), prior_sample(prior, z))


# The loss


def _points(num, num_features, seed=3):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(num, num_features)))
    return mg.Examples(x, jnp.zeros(num, jnp.int32), jnp.ones(num))


def test_the_elbo_of_a_linear_gaussian_model_is_the_closed_form(x64):
    model, latent, _ = linear_vae(4, 2)
    params, batch = random_params(4, 2), _points(5, 4)
    layer = params["head"]["output"]["output"]
    mean, log_scale = latent.encode(params, batch.x)
    residual = np.asarray(batch.x - mean @ layer["kernel"] - layer["bias"][None])
    spread = np.exp(2 * np.asarray(log_scale)) @ np.square(np.asarray(layer["kernel"])).sum(1)
    at_mean = np.asarray(latent.log_likelihood(params, batch.x, mean))
    np.testing.assert_allclose(at_mean, stats.norm.logpdf(residual, 0, NOISE).sum(-1), rtol=1e-12)
    expected = (at_mean - 0.5 * spread / NOISE**2 - np.asarray(prior_kl(params["prior"], mean, log_scale))).mean()

    elbo = jax.jit(jax.vmap(lambda key: model.game(params, key, batch)[1]["elbo"]))
    values = np.asarray(elbo(jax.random.split(jax.random.key(0), 4000)))
    error = values.std() / len(values) ** 0.5
    assert error < 0.05
    assert abs(values.mean() - expected) < 4 * error


def test_beta_weighs_the_kl_in_the_loss_and_nothing_else(x64):
    params, batch = random_params(4, 2), _points(5, 4)
    values = {}
    for beta in (0.0, 1.0, 2.5):
        losses, metrics = linear_vae(4, 2, beta=beta)[0].game(params, jax.random.key(0), batch)
        assert set(losses) == set(PLAYERS)
        assert len({id(loss) for loss in losses.values()}) == 1
        np.testing.assert_allclose(losses["prior"], beta * metrics["kl"] - metrics["log_likelihood"], rtol=1e-12)
        np.testing.assert_allclose(metrics["elbo"], metrics["log_likelihood"] - metrics["kl"], rtol=1e-12)
        values[beta] = flat(metrics)
    np.testing.assert_array_equal(values[0.0], values[1.0])
    np.testing.assert_array_equal(values[2.5], values[1.0])


def test_examples_of_zero_weight_leave_the_loss_as_it_is(x64):
    model, *_ = linear_vae(4, 2)
    params, batch = random_params(4, 2), _points(5, 4)
    loss, metrics = model.game(params, jax.random.key(0), batch)
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, 9 + leaf[:2]]), batch)
    padded = padded._replace(weight=padded.weight.at[5:].set(0.0))
    again, ignoring = model.game(params, jax.random.key(0), padded)
    np.testing.assert_allclose(flat(ignoring), flat(metrics), rtol=1e-12)
    np.testing.assert_allclose(again["head"], loss["head"], rtol=1e-12)


def test_an_empty_support_teaches_nothing():
    model, *_ = tiny_vae()
    params = _params(model)
    empty = image_task().support._replace(weight=jnp.zeros(3))
    direction, metrics = jax.jit(mg.vector_field(model.game))(params, jax.random.key(0), empty)
    assert float(metrics["loss"]) == 0.0
    np.testing.assert_array_equal(flat(direction), 0.0)
    np.testing.assert_allclose(weighted_mean(jnp.array([1.0, 4.0]), jnp.array([1.0, 0.5])), 2.0)


def test_with_the_exact_posterior_the_elbo_is_the_exact_log_likelihood(x64):
    weight = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 2)))[0].T * np.array([[1.5], [0.7]])
    prior = random_prior(2) | {"coupling": jnp.zeros((2, 2))}  # so that the posterior is diagonal
    params = with_best_encoder(weight, np.array([0.1, -0.2, 0.3, 0.4]), prior)
    model, *_ = linear_vae(4, 2)
    batch = _points(3, 4)
    covariance = weight.T @ prior_covariance(prior) @ weight + NOISE**2 * np.eye(4)
    mean = np.asarray(prior["mean"]) @ weight + np.array([0.1, -0.2, 0.3, 0.4])
    expected = stats.multivariate_normal(mean, covariance).logpdf(np.asarray(batch.x)).mean()
    elbo = jax.jit(jax.vmap(lambda key: model.game(params, key, batch)[1]["elbo"]))
    values = np.asarray(elbo(jax.random.split(jax.random.key(0), 4000)))
    np.testing.assert_allclose(values.mean(), expected, atol=4 * values.std() / len(values) ** 0.5)


# The context


def _uses(built, params, x, z):
    """Return everything that a VAE computes."""
    latent, model = built.latent, built.model
    batch = mg.Examples(x, jnp.zeros(len(x), jnp.int32), jnp.ones(len(x)))
    return flat(
        [
            latent.encode(params, x),
            latent.decode(params, z),
            latent.log_prior(params, z),
            latent.log_likelihood(params, x, z),
            model.sample(params, jax.random.key(1), 3),
            model.game(params, jax.random.key(2), batch)[0]["prior"],
        ]
    )


@pytest.fixture
def with_context(x64):
    built = _conv_vae(mg.gaussian())
    task = image_task()
    return built, _params(built.model, np.float64), task.support.x, jnp.asarray([[0.3, -1.0], [0.5, 0.2], [1.0, 2.0]])


def test_a_context_of_zero_changes_nothing_whatever_the_maps(with_context):
    built, params, x, z = with_context
    params = params | {"context": jnp.zeros(2)}
    plain = {name: params[name] for name in PLAYERS}
    np.testing.assert_allclose(
        _uses(built, params, x, z), _uses(_conv_vae(mg.gaussian(), 0), plain, x, z), rtol=1e-12, atol=1e-12
    )


def test_moving_the_context_is_moving_gains_biases_and_prior_by_hand(with_context):
    built, params, x, z = with_context
    context = np.array([0.7, -0.4])
    maps = params["maps"]

    def add(target, of_context):
        return jax.tree.map(lambda leaf, a: leaf + sum(c * a[i] for i, c in enumerate(context)), target, of_context)

    head = params["head"]
    by_hand = {name: params[name] for name in PLAYERS} | {
        "modulation": add(params["modulation"], maps["modulation"]),
        "prior": params["prior"] | {name: add(params["prior"][name], maps["prior"][name]) for name in maps["prior"]},
        "head": head
        | {
            "output": {
                "output": {
                    "kernel": head["output"]["output"]["kernel"],
                    "bias": add(head["output"]["output"]["bias"], maps["bias"]["output"]["bias"]),
                }
            }
        },
    }
    assert set(maps["prior"]) == {"mean", "log_scale"}
    moved = params | {"context": jnp.asarray(context)}
    np.testing.assert_allclose(
        _uses(built, moved, x, z), _uses(_conv_vae(mg.gaussian(), 0), by_hand, x, z), rtol=1e-10, atol=1e-12
    )
    still = _uses(built, params | {"context": jnp.zeros(2)}, x, z)
    assert np.abs(_uses(built, moved, x, z) - still).max() > 0.1


def test_a_unit_context_moves_what_it_maps_to_by_about_three_tenths():
    model = tiny_vae(context=8)[0]
    maps = flat(jax.jit(lambda key: model.init(key)["maps"])(jax.random.key(0)))
    np.testing.assert_allclose(maps.std() * 8**0.5, 0.3, rtol=0.1)


@pytest.mark.parametrize(("latents", "options"), [(0, {}), (2, {"beta": -0.1}), (2, {"context": -1})])
def test_sizes_and_weights_out_of_range_are_refused(latents, options):
    with pytest.raises(ValueError, match="at least one latent, beta >= 0 and context >= 0, got num_latents="):
        mg.vae(mlp(EVENT, (), (4,)), mlp((2,), (), EVENT), mg.bernoulli(), latents, **options)


# Meta-learning


def test_the_meta_gradient_of_a_convolutional_vae_equals_finite_differences(x64):
    model, *_ = _conv_vae(mg.bernoulli())
    players = ("prior", "context", "head")
    start = mg.per_step(2, 0.01, players)
    learner = mg.maml(model, start, 2, players=players)
    meta = start.extend(_params(model, np.float64))
    task = image_task()

    @jax.jit
    def query_loss(meta):
        adapt_key, query_key = jax.random.split(jax.random.key(2))
        params, _ = learner.adapt(meta, adapt_key, task.support)
        return model.game(params, query_key, task.query)[0]["prior"]

    gradient, _ = jax.jit(learner.field)(meta, jax.random.key(2), task)
    rng = np.random.default_rng(0)
    for player in meta:
        direction = {
            name: jax.tree.map(lambda leaf, on=name == player: on * jnp.asarray(rng.normal(size=leaf.shape)), tree)
            for name, tree in meta.items()
        }
        slope = flat(gradient[player]) @ flat(direction[player])
        assert abs(slope) > 1e-4
        np.testing.assert_allclose(slope, finite_difference(query_loss, meta, direction), rtol=1e-5, atol=1e-8)


def test_the_meta_gradient_of_a_convolutional_vae_over_tasks_has_no_convolution():
    model, *_ = _conv_vae(mg.bernoulli())
    learner = mg.maml(model, mg.fixed(optax.sgd(1e-3)), 1)
    tasks = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), image_task())
    many = jax.jit(jax.vmap(learner.field, in_axes=(None, 0, 0)))
    lowered = many.lower(_params(model), jax.random.split(jax.random.key(0), 2), tasks).as_text()
    assert "stablehlo.convolution" not in lowered
    assert "stablehlo.dot_general" in lowered


MODELS = {
    "vae": lambda: _mlp_vae(mg.bernoulli()),
    "vae_gaussian": lambda: _mlp_vae(mg.gaussian()),
    "vae_context": lambda: _mlp_vae(mg.bernoulli(), context=2),
    "vae_conv": lambda: _conv_vae(mg.bernoulli(), context=0),
    "vae_conv_gaussian_context": lambda: _conv_vae(mg.gaussian()),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_conforms(name):
    """Fresh parameters are scored, every player learns, one loss is reported, samples are images in [0, 1]."""
    built = MODELS[name]()
    model = built.model
    params = jax.jit(model.init)(jax.random.key(0))
    assert set(params) == set(WITH_CONTEXT if "context" in name else PLAYERS)
    if "context" in params:
        np.testing.assert_array_equal(params["context"], 0.0)
        params = params | {"context": params["context"] + 0.5}
    batch = image_task().support
    field = jax.jit(chex.assert_max_traces(mg.vector_field(model.game).reverse, n=1))
    direction, metrics = field(params, jax.random.key(1), batch)
    again, _ = field(params, jax.random.key(2), batch)
    assert set(direction) == set(params)
    assert set(metrics) == {"loss", "elbo", "kl", "log_likelihood"}
    assert np.isfinite(flat(direction)).all()
    for player in params:
        assert np.abs(flat(direction[player])).max() > 1e-5, player
    assert np.abs(flat(direction) - flat(again)).max() > 1e-5  # the codes are drawn with the key
    sample = jax.jit(model.sample, static_argnums=2)
    images = np.asarray(sample(params, jax.random.key(3), 4))
    assert images.shape == (4, *EVENT)
    assert images.min() >= 0
    assert images.max() <= 1
    assert np.abs(images[0] - images[1]).max() > 1e-4
    follow = jax.tree.map(lambda leaf, d: leaf - 1e-4 * d, params, direction)
    assert field(follow, jax.random.key(1), batch)[1]["loss"] < metrics["loss"]
