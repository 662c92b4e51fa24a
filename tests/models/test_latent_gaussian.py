import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_gaussian import prior_covariance
from problems import finite_difference, flat, image_task, tiny_vae

import metagen_jax as mg
from metagen_jax.models.latent_gaussian import latent_gaussian
from metagen_jax.models.vae import prior_in_use

Z = 3


def _covariance(rng, full):
    root = rng.normal(size=(Z, Z)) + np.eye(Z)
    return root @ root.T if full else np.diag(np.diag(root @ root.T))


def _written(between, within, mean, full):
    """Return the prior and the spread of a VAE for given covariances, by NumPy."""
    root = np.linalg.cholesky(between + within)
    inverse = np.linalg.inv(root)
    scale = 1 / np.diag(inverse)
    ratio = np.linalg.inv(inverse @ between @ inverse.T) - np.eye(Z)
    factor = np.linalg.cholesky(ratio)
    prior = {"mean": mean, "log_scale": np.log(scale), "coupling": np.tril(inverse * scale, -1)}
    spread = {"log_ratio": np.log(np.diag(factor)), **({"coupling": np.tril(factor, -1)} if full else {})}
    return jax.tree.map(jnp.asarray, (prior, spread))


def _problem(full, context=2, seed=0):
    """Return a VAE whose prior in use has the covariances B + W, its parameters, and B, W."""
    rng = np.random.default_rng(seed)
    built = latent_gaussian(tiny_vae(Z, (4,), context), full=full)
    shapes = jax.eval_shape(built.model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape)), shapes)
    between, within, mean = _covariance(rng, full), _covariance(rng, full), rng.normal(size=Z)
    used, params["spread"] = _written(between, within, mean, full)
    shift = jax.tree.map(jnp.subtract, prior_in_use(params), params["prior"])
    params["prior"] = jax.tree.map(jnp.subtract, used, shift)
    return built, params, between, within


@pytest.mark.parametrize("full", [False, True])
def test_the_task_prior_is_the_joint_gaussian_of_all_codes_conditioned_on_what_was_observed(x64, full):
    built, params, between, within = _problem(full)
    for found, expected in zip(built.covariances(params), (between, within), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    support = image_task(shots=4).support._replace(weight=jnp.array([1.0, 0.0, 1.0, 1.0]))
    read = {**params, **built.embed(params, support)}

    # codes of a new example and of three observed ones share their class mean; those are observed with noise
    shown = np.array([0, 2, 3])
    mean, log_scale = (np.asarray(part)[shown] for part in built.latent.encode(params, support.x))
    joint = np.kron(np.ones((4, 4)), between) + np.kron(np.eye(4), within)
    joint[Z:, Z:] += np.diag(np.exp(2 * log_scale).ravel())
    centre = np.asarray(prior_in_use(params)["mean"])
    gain = joint[:Z, Z:] @ np.linalg.inv(joint[Z:, Z:])
    expected = centre + gain @ (mean - centre).ravel()
    covariance = joint[:Z, :Z] - gain @ joint[Z:, :Z]
    used = prior_in_use(read)
    np.testing.assert_allclose(used["mean"], expected, rtol=1e-9)
    np.testing.assert_allclose(prior_covariance(used), covariance, rtol=1e-9, atol=1e-11)
    z = np.random.default_rng(1).normal(size=(3, Z))
    away = z - expected
    density = -0.5 * ((away @ np.linalg.inv(covariance)) * away).sum(1)
    density -= 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    np.testing.assert_allclose(built.latent.log_prior(read, jnp.asarray(z)), density, rtol=1e-9)


@pytest.mark.parametrize("full", [False, True])
def test_no_example_leaves_the_prior_and_many_leave_the_covariance_within_around_the_mean_of_the_codes(x64, full):
    built, params, _, within = _problem(full)
    if not full:  # a diagonal adaptation keeps whatever coupling the prior has
        params["prior"]["coupling"] = jnp.asarray(np.random.default_rng(2).normal(size=(Z, Z)))
    support = image_task().support
    embed = jax.jit(built.embed)
    none = embed(params, support._replace(weight=jnp.zeros(3), x=support.x.at[0].set(jnp.nan)))["prior"]
    for leaf in ("mean", "log_scale"):
        np.testing.assert_allclose(none[leaf], params["prior"][leaf], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(none["coupling"], np.tril(params["prior"]["coupling"], -1), rtol=1e-9, atol=1e-12)
    assert built.embed(params, jax.tree.map(lambda leaf: leaf[:0], support))["prior"] is params["prior"]

    params["prior"]["coupling"] *= full
    many = prior_in_use({**params, **embed(params, support._replace(weight=jnp.full(3, 1e10)))})
    mean, log_scale = (np.asarray(part) for part in built.latent.encode(params, support.x))
    precision = np.stack([np.linalg.inv(within + np.diag(np.exp(2 * row))) for row in log_scale])
    centre = np.linalg.solve(precision.sum(0), np.einsum("nij,nj->i", precision, mean))
    np.testing.assert_allclose(many["mean"], centre, rtol=1e-6)
    np.testing.assert_allclose(prior_covariance(many), within, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("full", [False, True])
def test_order_and_padding_change_nothing_and_a_weight_is_a_count(x64, full):
    built, params, _, _ = _problem(full, context=0)
    embed = jax.jit(built.embed)
    support = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1]]), image_task().support)
    counted = support._replace(weight=jnp.array([2.0, 1.0, 1.0, 0.0]), x=support.x.at[3].set(jnp.inf))
    turned = jax.tree.map(lambda leaf: leaf[::-1], support)
    pairs = zip(*(jax.tree.leaves(embed(params, one)) for one in (counted, turned)), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_full_covariances_that_are_diagonal_are_the_diagonal_ones(x64):
    diagonal, params, _, _ = _problem(False)
    full = latent_gaussian(tiny_vae(Z, (4,), 2), full=True)
    spread = {**params["spread"], "coupling": jnp.zeros((Z, Z))}
    support = image_task().support
    one, other = diagonal.embed(params, support), full.embed({**params, "spread": spread}, support)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), one, other)


@pytest.mark.parametrize("full", [False, True])
def test_the_meta_gradient_reaches_encoder_and_spread_and_agrees_with_finite_differences(x64, full):
    built, params, _, _ = _problem(full)
    learner = mg.amortised(built.model, built.embed, mg.fixed(optax.sgd(0.05)), 1, players=("modulation", "prior"))
    task, key = image_task(), jax.random.key(2)
    field = jax.jit(lambda meta: learner.field(meta, jax.random.clone(key), task))
    direction, _ = field(params)
    rng = np.random.default_rng(0)
    for player in params:
        along = {name: jax.tree.map(jnp.zeros_like, tree) for name, tree in params.items()}
        along[player] = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), along[player])
        slope = flat(direction) @ flat(along)
        expected = finite_difference(lambda meta: field(meta)[1]["loss"], params, along)
        np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-7)
        assert abs(slope) > 1e-5
    adapted = jax.jit(learner.adapt)(params, jax.random.key(3), task.support)[0]
    jax.tree.map(np.testing.assert_array_equal, adapted["spread"], params["spread"])


@pytest.mark.parametrize("full", [False, True])
def test_learning_begins_at_the_standard_prior_of_which_the_asked_share_is_between_classes(x64, full):
    built = latent_gaussian(tiny_vae(Z, (4,), 0), 0.2, full=full)
    params = built.model.init(jax.random.key(0))
    between, within = built.covariances(params)
    np.testing.assert_allclose(between, 0.2 * np.eye(Z), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(within, 0.8 * np.eye(Z), rtol=1e-6, atol=1e-9)
    plain = mg.maml(built.model, mg.fixed(optax.sgd(0.1)), 1)
    adapted = jax.jit(plain.adapt)(params, jax.random.key(1), image_task().support)[0]
    assert set(adapted) == set(params)


def test_what_does_not_fit_is_refused():
    built = tiny_vae()
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=f"in \\(0, 1\\), got {share}"):
            latent_gaussian(built, share)
    with pytest.raises(ValueError, match="already"):
        latent_gaussian(built, name="prior").model.init(jax.random.key(0))
