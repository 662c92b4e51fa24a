import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import image_task, tiny_vae

import metagen_jax as mg
from metagen_jax.models.latent_prototypes import latent_prototypes


def _params(built):
    return built.model.init(jax.random.key(0))


def test_the_prior_is_the_shrunk_mean_and_variance_of_the_codes(x64):
    built, task = tiny_vae(), image_task()
    params = _params(built)
    support = task.support._replace(weight=jnp.array([1.0, 1.0, 0.0]))
    mean, log_scale = (np.asarray(part)[:2] for part in built.latent.encode(params, support.x))
    found = latent_prototypes(built, 0.5)(params, support)["prior"]
    centre = mean.sum(0) / 2.5  # the common prior is N(0, 1)
    variance = (0.5 + ((mean - centre) ** 2 + np.exp(2 * log_scale)).sum(0)) / 2.5
    np.testing.assert_allclose(found["mean"], centre, rtol=1e-12)
    np.testing.assert_allclose(np.exp(2 * found["log_scale"]), variance, rtol=1e-12)


def test_the_prior_that_samples_come_from_is_the_fitted_one_whatever_context_and_coupling_say(x64):
    built, task = tiny_vae(), image_task()
    params = _params(built)
    plain = latent_prototypes(built)({**params, "context": jnp.zeros(3)}, task.support)["prior"]
    moved = {**params, "context": jnp.array([1.0, -2.0, 0.5])}
    moved["prior"] = {**params["prior"], "coupling": jnp.ones((2, 2))}
    adapted = {**moved, **latent_prototypes(built, 1e-9)(moved, task.support)}
    mean, log_scale = built.latent.encode(moved, task.support.x)
    variance = jnp.square(mean - mean.mean(0)[None]).mean(0) + jnp.exp(2 * log_scale).mean(0)
    z = mean.mean(0)[None]
    density = -0.5 * (np.log(2 * np.pi) + jnp.log(variance)).sum()
    np.testing.assert_allclose(built.latent.log_prior(adapted, z), density, rtol=1e-6)
    assert set(plain) == {"mean", "log_scale", "coupling"}


def test_no_example_leaves_the_common_prior_and_many_outweigh_it(x64):
    built, task = tiny_vae(), image_task()
    params = _params(built)
    params["prior"]["mean"] = jnp.full(2, 3.0)
    read = latent_prototypes(built)
    none = read(params, task.support._replace(weight=jnp.zeros(3)))["prior"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), none, params["prior"])
    many = read(params, task.support._replace(weight=jnp.full(3, 1e6)))["prior"]
    np.testing.assert_allclose(many["mean"], built.latent.encode(params, task.support.x)[0].mean(0), atol=1e-4)


def test_the_meta_gradient_reaches_the_encoder_and_agrees_with_finite_differences(x64):
    built, task = tiny_vae(), image_task()
    learner = mg.amortised(built.model, latent_prototypes(built))
    meta, key = learner.init(jax.random.key(1)), jax.random.key(2)
    rng = np.random.default_rng(0)
    along = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), meta)
    direction, _ = learner.field(meta, jax.random.clone(key), task)

    def loss(step):
        moved = jax.tree.map(lambda leaf, d: leaf + step * d, meta, along)
        return learner.field(moved, jax.random.clone(key), task)[1]["loss"]

    slope = sum(float((a * b).sum()) for a, b in zip(*map(jax.tree.leaves, (direction, along)), strict=True))
    np.testing.assert_allclose(slope, (loss(1e-6) - loss(-1e-6)) / 2e-6, rtol=1e-6)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(direction["encoder"])) > 1e-6


def test_a_strength_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="positive, got 0"):
        latent_prototypes(tiny_vae(), 0)
