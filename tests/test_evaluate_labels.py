import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EVENT, tiny_images

import metagen_jax as mg
from metagen_jax.evaluate_labels import Accuracy, accuracy_curve
from metagen_jax.models.networks import Network

WAY = 3
PIXELS = Network(lambda key: {}, lambda params, x: x.reshape(x.shape[0], -1))


def _family(images, shot=2, query=3):
    return mg.episodes(images, shot, query, way=WAY)


def test_accuracy_is_that_of_nearest_class_means_task_by_task():
    family = _family(tiny_images())
    built = mg.classifier(PIXELS, 36, WAY, mg.prototypes())
    learner, key = mg.amortised(built.model, built.embed), jax.random.key(3)
    meta = built.model.init(jax.random.key(0))
    found = accuracy_curve(learner.path, built.model, family, steps=(0,), task_chunk=4)(meta, key, 6)
    assert found.per_task.shape == (6, 1)
    for index in range(6):
        spec_key, make_key, *_ = jax.random.split(jax.random.fold_in(jax.random.key(3), index), 4)
        task = family.make(family.data, make_key, family.describe(family.data, spec_key))
        means = np.asarray(task.support.x).reshape(WAY, 2, -1).mean(1)
        queries = np.asarray(task.query.x).reshape(WAY * 3, 1, -1)
        nearest = np.square(queries - means).sum(-1).argmin(1)
        np.testing.assert_allclose(
            found.per_task[index, 0], (nearest == np.asarray(task.query.label)).mean(), rtol=1e-6
        )


def test_gradient_steps_raise_it_above_chance_and_step_zero_is_chance():
    family = _family(tiny_images(), shot=4)
    built = mg.classifier(PIXELS, 36, WAY)
    learner = mg.maml(built.model, mg.fixed(optax.sgd(0.3)), 3)
    meta = learner.init(jax.random.key(0))
    measure = accuracy_curve(learner.path, built.model, family, steps=(0, 6))
    found = measure(meta, jax.random.key(1), 25)
    assert found.steps.tolist() == [0, 6]
    np.testing.assert_allclose(found.mean[0], 1 / WAY, atol=1e-6)  # a head of zeros says the first class
    assert found.mean[1] > 0.8


def test_a_task_that_diverges_is_not_hidden():
    family = _family(tiny_images())
    built = mg.classifier(PIXELS, 36, WAY)

    def path(meta, key, support, num_steps):
        lost = jnp.where(jnp.arange(num_steps + 1) < 2, 1.0, jnp.nan)
        return jax.tree.map(lambda leaf: leaf[None] * lost.reshape(-1, *(1,) * leaf.ndim), meta), {}

    meta = built.model.init(jax.random.key(0))
    found = accuracy_curve(path, built.model, family, steps=(0, 1, 3))(meta, jax.random.key(1), 3)
    assert np.isfinite(found.per_task[:, :2]).all()
    assert np.isnan(found.mean[2])


def test_the_interval_is_that_of_the_mean_over_tasks():
    per_task = np.array([[0.2], [0.4], [0.9]])
    found = Accuracy(np.zeros(1), per_task)
    np.testing.assert_allclose(found.half_width, 1.96 * per_task.std(ddof=1) / np.sqrt(3))
    np.testing.assert_allclose(found.mean, 0.5)


def test_bad_requests_are_refused():
    family = _family(tiny_images())
    built = mg.classifier(PIXELS, 36, WAY, mg.prototypes())
    learner = mg.amortised(built.model, built.embed)
    with pytest.raises(ValueError, match="at least 0"):
        accuracy_curve(learner.path, built.model, family, steps=(-1,))
    with pytest.raises(ValueError, match="num_tasks=1"):
        accuracy_curve(learner.path, built.model, family, steps=(0,))({}, jax.random.key(0), 1)


def test_queries_do_not_see_each_other():
    built = mg.classifier(mg.models.networks.mlp_features(EVENT, (5,)), 5, WAY, mg.matching())
    params = built.model.init(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (6, *EVENT))
    support = mg.Examples(x[:3], jnp.arange(3), jnp.ones(3))
    adapted = {**params, **built.embed(params, support)}
    alone = built.logits(adapted, x[3:4])
    np.testing.assert_allclose(built.logits(adapted, x[3:])[:1], alone, rtol=1e-5, atol=1e-6)
