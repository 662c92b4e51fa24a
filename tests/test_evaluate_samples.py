"""Samples measured over inner steps, on a model whose adaptation is known: it repeats the mean of its support."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import tiny_images

import metagen_jax as mg
from metagen_jax.critics import CriticConfig, class_log_probabilities, classifier_features, train_critics
from metagen_jax.evaluate_samples import (
    PER_CLASS,
    POOLED,
    copying,
    drawer,
    kernel_score,
    measure,
    measure_pooled,
    real_halves,
)
from metagen_jax.metrics.frechet import frechet_distance
from metagen_jax.metrics.kernel import kernel_distances
from metagen_jax.metrics.prdc import prdc
from metagen_jax.metrics.recognition import inception_score

SPECS = jnp.arange(6)[:, None]
STEPS = (0, 1, 3)


def _path(meta, key, support, num_steps):
    """Return parameters that go from the meta-parameters to the support's mean in three steps."""
    del key
    share = jnp.minimum(jnp.arange(num_steps + 1) / 3, 1.0)[:, None, None, None]
    mean = (support.weight[:, None, None, None] * support.x).sum(0) / support.weight.sum()
    return {"image": (1 - share) * meta["image"][None] + share * mean[None]}, {}


def _sample(params, key, num):
    noise = jax.random.bernoulli(key, 0.05, (num, *params["image"].shape))
    return jnp.abs((params["image"] > 0.5)[None] - noise.astype(jnp.float32))


@pytest.fixture(scope="module")
def parts():
    images = tiny_images(num_classes=6, per_class=14)
    config = CriticConfig(
        classifier_steps=30, contrastive_steps=10, classifier_batch=6, contrastive_batch=8, channels=3, features=4
    )
    critics = train_critics(images, config)
    family = mg.episodes(images, 5, 8)
    draw = drawer(_path, _sample, family, steps=STEPS, num_samples=7, task_chunk=4)
    meta = {"image": jnp.zeros(images.event)}
    return critics, family, meta, draw(meta, critics, SPECS, jax.random.key(1), lambda done: None)


def test_what_is_drawn_has_a_row_for_every_class_step_and_image(parts):
    _, _, _, drawn = parts
    np.testing.assert_array_equal(drawn.steps, STEPS)
    for features in (drawn.made, drawn.real, drawn.support):
        assert set(features) == {"classifier", "contrastive"}
    assert drawn.made["classifier"].shape == (6, 3, 7, 4)
    assert drawn.real["contrastive"].shape == (6, 8, 4)
    assert drawn.support["classifier"].shape == (6, 5, 4)
    assert drawn.log_probabilities.shape == (6, 3, 4, 6)
    assert drawn.real_log_probabilities.shape == drawn.support_log_probabilities.shape == (6, 4, 6)


def test_features_are_those_of_the_samples_after_each_step_with_the_same_noise(parts):
    critics, family, meta, drawn = parts
    key = jax.random.fold_in(jax.random.key(1), 2)  # of class 2
    make_key, adapt_key, sample_key = jax.random.split(key, 3)
    task = family.make(family.data, make_key, SPECS[2])
    path, _ = _path(meta, adapt_key, task.support, 3)
    for index, step in enumerate(STEPS):
        images = _sample({"image": path["image"][step]}, jax.random.clone(sample_key), 7)
        expected = classifier_features(critics.classifier, images)
        np.testing.assert_allclose(drawn.made["classifier"][2, index], expected, rtol=1e-4, atol=1e-4)
        logs = class_log_probabilities(critics.classifier, images[:4])
        np.testing.assert_allclose(drawn.log_probabilities[2, index], logs, rtol=1e-3, atol=1e-3)
    expected = classifier_features(critics.classifier, task.query.x)
    np.testing.assert_allclose(drawn.real["classifier"][2], expected, rtol=1e-4, atol=1e-4)


def test_adapting_to_the_class_is_seen_in_every_measure_that_asks_for_it(parts):
    found = measure(parts[3])
    assert set(found) == set(PER_CLASS)
    assert all(values.shape == (6, 3) for values in found.values())
    before, after = ({name: values[:, index].mean() for name, values in found.items()} for index in (0, 2))
    assert after["kid"] < before["kid"] - 0.5
    assert after["kid_contrastive"] < before["kid_contrastive"]
    assert after["recognisability"] > before["recognisability"]
    assert after["memorisation"] < before["memorisation"]


def test_the_kernel_distance_within_a_class_is_that_of_its_own_samples_and_images(parts):
    drawn = parts[3]
    expected = kernel_distances(drawn.real["classifier"], drawn.made["classifier"][:, 1])
    np.testing.assert_allclose(measure(drawn)["kid"][:, 1], expected)


def test_pooled_measures_take_all_classes_together_with_intervals_over_classes(parts):
    drawn = parts[3]
    found = measure_pooled(drawn)
    assert set(found) == set(POOLED)
    rows = [features.reshape(-1, 4) for features in (drawn.real["classifier"], drawn.made["classifier"][:, 2])]
    np.testing.assert_allclose(found["fid"][2, 0], frechet_distance(*rows))
    expected = prdc(*rows)
    for name in ("precision", "recall", "density", "coverage"):
        np.testing.assert_allclose(found[name][2, 0], getattr(expected, name))
    for values in found.values():
        assert (values[:, 1] <= values[:, 0]).all()
        assert (values[:, 0] <= values[:, 2]).all()
    assert np.ptp(found["fid"][2]) > 1e-6


def test_copying_is_recognised_as_copying_and_real_images_as_real(parts):
    copies, real = (measure(make(parts[3])) for make in (copying, real_halves))
    np.testing.assert_allclose(copies["memorisation"], 0.0, atol=1e-5)
    np.testing.assert_allclose(copies["copies"], 1.0)
    assert copies["kid"].shape == real["kid"].shape == (6, 1)
    assert 0.6 < real["memorisation"].mean() < 1.5
    scores = [measure_pooled(make(parts[3]))["inception_score"][0, 0] for make in (copying, real_halves)]
    expected = [
        inception_score(logs.reshape(-1, 6))
        for logs in (parts[3].support_log_probabilities, parts[3].real_log_probabilities)
    ]
    np.testing.assert_allclose(scores, expected)
    assert real["copies"].mean() < 0.3


def test_a_class_that_diverged_is_nan_and_the_others_are_measured_without_it(parts):
    drawn = parts[3]
    made = {space: features.copy() for space, features in drawn.made.items()}
    made["classifier"][4, 1] = np.nan
    broken = measure(drawn._replace(made=made))
    for name, values in broken.items():
        assert np.isnan(values[4, 1]), name
        assert np.isfinite(np.delete(values.ravel(), 4 * 3 + 1)).all(), name
    np.testing.assert_allclose(broken["kid"][:4, 1], measure(drawn)["kid"][:4, 1])
    pooled = measure_pooled(drawn._replace(made=made))
    rows = [
        features[[0, 1, 2, 3, 5]].reshape(-1, 4) for features in (drawn.real["classifier"], made["classifier"][:, 1])
    ]
    np.testing.assert_allclose(pooled["fid"][1, 0], frechet_distance(*rows))


def test_the_score_that_settings_are_chosen_by_is_minus_the_kernel_distance(parts):
    critics, family, _, drawn = parts
    score = kernel_score(_sample, critics, 7)
    make_key, _, sample_key = jax.random.split(jax.random.fold_in(jax.random.key(1), 2), 3)
    task = family.make(family.data, make_key, SPECS[2])
    mean = {"image": task.support.x.mean(0)}
    expected = kernel_distances(drawn.real["classifier"], drawn.made["classifier"][:, 2])[2]
    np.testing.assert_allclose(-score(mean, jax.random.clone(sample_key), task), expected, rtol=1e-3)


@pytest.mark.parametrize("options", [{"steps": ()}, {"steps": (-1,)}, {"steps": (0,), "num_samples": 1}])
def test_steps_and_numbers_of_samples_are_checked(parts, options):
    with pytest.raises(ValueError, match="inner steps of at least 0 and 2 samples"):
        drawer(_path, _sample, parts[1], **options)
