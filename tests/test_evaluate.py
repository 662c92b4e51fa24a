import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import tiny_images, tiny_vae

import metagen_jax as mg
from metagen_jax.evaluate import adaptation_curve, adaptation_curves, exemplar_scores
from metagen_jax.metrics.exemplar import Exemplars
from metagen_jax.metrics.likelihood import bounds

MOVES = ("prior", "context")


@pytest.fixture(scope="module")
def parts():
    model, _, density = tiny_vae()
    learner = mg.maml(model, mg.fixed(optax.sgd(1e-2)), 2, players=MOVES)
    family = mg.episodes(tiny_images(), 2, 3)
    return model, density, learner, family, learner.init(jax.random.key(0))


SPECS = jnp.arange(5, dtype=jnp.int32)[:, None]


def test_the_curve_is_the_bound_on_the_query_after_each_step(parts):
    model, density, learner, family, meta = parts
    curve = adaptation_curve(
        learner.path, density, family, meta, SPECS, jax.random.key(1), steps=(0, 3), num_samples=4, task_chunk=2
    )
    key = jax.random.fold_in(jax.random.key(1), 2)
    make_key, adapt_key, query_key = jax.random.split(key, 3)
    task = family.make(family.data, make_key, SPECS[2])
    field = mg.vector_field(model.game, MOVES)
    adapted, _ = mg.unroll(field, mg.fixed(optax.sgd(1e-2)), 3)(meta, adapt_key, task.support)
    for column, params in enumerate((meta, adapted)):
        elbo, iwae = bounds(density, 4)(params, jax.random.clone(query_key), task.query.x)
        np.testing.assert_allclose(curve.elbo[2, column], elbo.mean(), rtol=1e-4)
        np.testing.assert_allclose(curve.iwae[2, column], iwae.mean(), rtol=1e-4)
    assert curve.elbo.shape == (5, 2)
    assert curve.steps.tolist() == [0, 3]


def test_how_tasks_are_cut_into_chunks_changes_nothing(parts):
    _, density, learner, family, meta = parts
    curves = [
        adaptation_curve(
            learner.path, density, family, meta, SPECS, jax.random.key(1), steps=(0, 1), num_samples=2, task_chunk=size
        )
        for size in (1, 3, 16)
    ]
    for other in curves[1:]:
        np.testing.assert_allclose(other.iwae, curves[0].iwae, rtol=1e-5)


def test_two_systems_meet_the_same_episodes_and_the_query_is_not_seen(parts):
    _, density, learner, family, meta = parts
    measure = adaptation_curves(learner.path, density, family, steps=(0, 2), num_samples=2)
    one = measure(meta, SPECS, jax.random.key(1), lambda done: None)
    again = measure(meta, SPECS, jax.random.key(1), lambda done: None)
    np.testing.assert_array_equal(one.elbo, again.elbo)
    seen = []

    def spying_path(meta, key, support, num_steps):
        seen.append(support.x.shape)
        return learner.path(meta, key, support, num_steps)

    adaptation_curve(spying_path, density, family, meta, SPECS, jax.random.key(1), steps=(0,), num_samples=2)
    assert seen == [(2, 6, 6, 1)]


def test_several_episodes_of_a_class_are_averaged(parts):
    _, density, learner, family, meta = parts
    options = {"steps": (1,), "num_samples": 2}
    two = adaptation_curve(learner.path, density, family, meta, SPECS, jax.random.key(1), episodes=2, **options)
    rows = jnp.concatenate([SPECS, SPECS])
    apart = adaptation_curve(learner.path, density, family, meta, rows, jax.random.key(1), **options)
    np.testing.assert_allclose(two.elbo, (apart.elbo[:5] + apart.elbo[5:]) / 2, rtol=1e-5)


def test_a_diverged_class_is_nan_and_the_others_are_not(parts):
    model, density, _, family, meta = parts
    wild = mg.maml(model, mg.fixed(optax.sgd(1e30)), 2, players=("decoder",))
    curve = adaptation_curve(wild.path, density, family, meta, SPECS, jax.random.key(1), steps=(0, 2), num_samples=2)
    assert np.isfinite(curve.elbo[:, 0]).all()
    assert not np.isfinite(curve.elbo[:, 1]).any()


def test_the_copy_baseline_is_scored_on_the_episodes_of_the_curve(parts):
    _, _, _, family, _ = parts
    exemplars = Exemplars(jnp.full((6, 6, 1), 0.4), 1.5, 0.75)
    scores = exemplar_scores(exemplars, family, SPECS, jax.random.key(1))
    seen = exemplar_scores(exemplars, _leaky(family), SPECS, jax.random.key(1))
    assert scores.shape == (5,)
    assert (seen > scores + 5).all()


def _leaky(family):
    """Put the support into the query, as an episode drawn with replacement would."""

    def make(data, key, spec):
        task = family.make(data, key, spec)
        return task._replace(query=task.support)

    return family._replace(make=make)


@pytest.mark.parametrize("steps", [(), (-1, 2)])
def test_steps_are_checked(parts, steps):
    _, density, learner, family, meta = parts
    with pytest.raises(ValueError, match="inner steps of at least 0"):
        adaptation_curve(learner.path, density, family, meta, SPECS, jax.random.key(1), steps=steps)
