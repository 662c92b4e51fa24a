"""Transfer against the posterior of classes that are known to be near centres, and SciPy's densities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from metagen_jax.latent.transfer import (
    Gaussians,
    calibrated,
    calibrated_logits,
    class_gaussians,
    nearest_centres,
    sampled,
    transferred_prototypes,
    weighted_centres,
)

KNOWN = Gaussians(
    jnp.array([[0.0, 0.0], [4.0, 0.0], [0.0, 9.0]]),
    jnp.array([[[2.0, 0.5], [0.5, 1.0]], [[1.0, 0.0], [0.0, 3.0]], [[5.0, 1.0], [1.0, 1.0]]]),
)


def _numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("f4")


def test_class_gaussians_are_means_and_covariances_of_the_members():
    features, labels = _numbers(12, 3), np.arange(12) % 3
    targets = np.concatenate([np.eye(3, dtype="f4")[labels], np.zeros((12, 1), "f4")], axis=1)
    found = class_gaussians(jnp.asarray(features), jnp.asarray(targets))
    for label in range(3):
        of_class = features[labels == label]
        np.testing.assert_allclose(found.mean[label], of_class.mean(0), atol=1e-6)
        np.testing.assert_allclose(found.covariance[label], np.cov(of_class.T, bias=True), atol=1e-5)
    np.testing.assert_array_equal(found.mean[3], np.zeros(3))
    np.testing.assert_array_equal(found.covariance[3], np.zeros((3, 3)))


@pytest.mark.parametrize("kappa", [0.0, 0.5, 2.0, 8.0])
def test_squared_error_of_prototypes_is_the_closed_form_and_least_at_the_ratio_of_variances(kappa):
    """Class means N(c, t) around known centres, examples N(mean, s): error (K s + kappa^2 t) / (K + kappa)^2."""
    shots, within, between, rng = 3, 1.0, 0.5, np.random.default_rng(0)
    centres = np.array([[-50.0, 0], [50.0, 0]], "f4")
    near = centres[rng.integers(0, 2, 20000)]
    means = near + np.sqrt(between) * rng.normal(size=near.shape)
    support = means + np.sqrt(within / shots) * rng.normal(size=near.shape)  # the mean of so many examples
    support = jnp.asarray(support, jnp.float32)
    found = transferred_prototypes(
        support, jnp.full(20000, shots), nearest_centres(support, jnp.asarray(centres)), kappa
    )
    error = np.square(np.asarray(found) - means).mean()
    expected = (shots * within + kappa**2 * between) / (shots + kappa) ** 2
    np.testing.assert_allclose(error, expected, rtol=0.03)
    best = (shots * within + (within / between) ** 2 * between) / (shots + within / between) ** 2
    assert expected == pytest.approx(best) if kappa == within / between else expected > 1.2 * best
    assert error < 0.9 * within / shots or kappa == 0


def test_prototypes_at_the_right_temperature_are_the_posterior_mean():
    """In one dimension, by a sum over a fine grid of class means."""
    centres, shots, within, between = np.array([-1.0, 0.5, 3.0]), 2, 0.8, 0.3
    grid = np.linspace(-12, 12, 20001)
    prior = np.exp(-np.square(grid[None] - centres[:, None]) / (2 * between)).sum(0)
    means = np.array([[-0.4], [1.5], [6.0]], "f4")
    posterior = prior[None] * np.exp(-shots * np.square(grid[None] - means) / (2 * within))
    expected = (posterior * grid[None]).sum(1) / posterior.sum(1)
    near = weighted_centres(jnp.asarray(means), jnp.asarray(centres[:, None], jnp.float32), between + within / shots)
    found = transferred_prototypes(jnp.asarray(means), jnp.full(3, shots), near, within / between)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_low_temperature_is_the_nearest_centre_and_a_high_one_the_mean_of_all():
    means, centres = jnp.asarray(_numbers(5, 2)), jnp.asarray(_numbers(4, 2, seed=1))
    cold, hot = weighted_centres(means, centres, 1e-4), weighted_centres(means, centres, 1e6)
    np.testing.assert_allclose(cold, nearest_centres(means, centres), atol=1e-5)
    np.testing.assert_allclose(hot, np.broadcast_to(np.asarray(centres).mean(0), (5, 2)), atol=1e-4)


def test_a_class_without_examples_is_its_centre_and_kappa_zero_the_plain_mean():
    means, near, count = jnp.array([[1.0], [0.0]]), jnp.array([[5.0], [7.0]]), jnp.array([2.0, 0.0])
    np.testing.assert_allclose(transferred_prototypes(means, count, near, 2.0), [[3.0], [7.0]])
    np.testing.assert_allclose(transferred_prototypes(means, count, near, 0.0), [[1.0], [7.0]])


def test_an_example_stands_for_a_gaussian_with_the_covariance_of_known_classes_near_it():
    features = jnp.array([[3.5, 0.0], [0.0, 8.0]])
    found = calibrated(features, KNOWN, spread=0.1)
    np.testing.assert_array_equal(found.mean, features)
    np.testing.assert_allclose(found.covariance, KNOWN.covariance[jnp.array([1, 2])] + 0.1 * jnp.eye(2)[None])
    two = calibrated(features[:1], KNOWN, kappa=2.0, num_nearest=2, spread=0.1)  # the article's: (x + m_0 + m_1) / 3
    np.testing.assert_allclose(two.mean[0], [7.5 / 3, 0.0], rtol=1e-6)
    np.testing.assert_allclose(two.covariance[0], np.asarray(KNOWN.covariance[:2]).mean(0) + 0.1 * np.eye(2), rtol=1e-6)


def test_draws_have_the_mean_and_the_covariance_they_stand_for():
    drawn = np.asarray(sampled(jax.random.key(0), KNOWN, 20000))
    np.testing.assert_allclose(drawn.mean(1), KNOWN.mean, atol=0.06)
    for number in range(3):
        np.testing.assert_allclose(np.cov(drawn[number].T), KNOWN.covariance[number], atol=0.15)


def test_logits_are_the_log_of_the_mean_density_of_each_class_and_padding_changes_nothing():
    queries, labels = _numbers(4, 2), [0, 1, 0]
    densities = np.stack([multivariate_normal(m, c).pdf(queries) for m, c in zip(*KNOWN, strict=True)], axis=1)
    expected = np.log(np.stack([densities[:, [0, 2]].mean(1), densities[:, 1]], axis=1))
    targets = np.eye(2, dtype="f4")[labels]
    classify = jax.jit(calibrated_logits)
    np.testing.assert_allclose(classify(queries, KNOWN, targets), expected, rtol=1e-4)
    padded = Gaussians(*(jnp.concatenate([leaf, leaf[:1]]) for leaf in KNOWN))
    found = classify(queries, padded, np.concatenate([targets, np.zeros((1, 2), "f4")]))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_class_without_examples_has_finite_loss_and_gradients():
    def loss(features):
        logits = calibrated_logits(features, calibrated(features, KNOWN), jnp.array([[1.0, 0.0], [0.0, 0.0]]))
        return -jax.nn.log_softmax(logits)[:, 1].sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.ones((2, 2)))
    assert value > 1e8
    assert np.isfinite(gradient).all()


def test_transferred_covariances_classify_better_than_distances_where_classes_share_them():
    """One shot of two classes that differ along a narrow direction: distances are swamped by the wide one."""
    rng, scale = np.random.default_rng(0), np.array([5.0, 0.5])
    truth = np.array([[0.0, -1.0], [0.0, 1.0]])
    known = Gaussians(jnp.array([[0.0, 0.0], [300.0, 0.0]]), jnp.stack([jnp.diag(jnp.array([25.0, 0.25])), jnp.eye(2)]))
    right = {"distances": [], "calibrated": []}
    classify = jax.jit(lambda support, queries: calibrated_logits(queries, calibrated(support, known), jnp.eye(2)))
    for _ in range(40):
        support = (truth + scale * rng.normal(size=(2, 2))).astype("f4")
        labels = rng.integers(0, 2, 20)
        queries = (truth[labels] + scale * rng.normal(size=(20, 2))).astype("f4")
        distances = -np.square(queries[:, None] - support[None]).sum(2)
        right["distances"] += list(distances.argmax(1) == labels)
        right["calibrated"] += list(np.asarray(classify(support, queries)).argmax(1) == labels)
    assert np.mean(right["distances"]) < 0.65
    assert np.mean(right["calibrated"]) > 0.85


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_nearest": 4}, "expected 1 to 3 nearest"),
        ({"kappa": -1.0}, "kappa=-1.0"),
        ({"spread": 0.0}, "spread=0.0"),
    ],
)
def test_settings_that_make_no_gaussian_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        calibrated(jnp.zeros((1, 2)), KNOWN, **options)


def test_gradients_of_calibrated_logits_are_finite_differences(x64):
    features, queries = jnp.asarray(_numbers(3, 2), float), jnp.asarray(_numbers(2, 2, seed=1), float)
    targets, known = jnp.eye(2)[jnp.array([0, 1, 0])], Gaussians(*(jnp.asarray(leaf, float) for leaf in KNOWN))

    @jax.jit
    def judged(features):
        logits = calibrated_logits(queries, calibrated(features, known, kappa=0.5), targets)
        return jax.nn.log_softmax(logits)[0, 1]

    direction, step = jnp.asarray(_numbers(3, 2, seed=2), float), 1e-5
    numeric = (judged(features + step * direction) - judged(features - step * direction)) / (2 * step)
    assert abs(numeric) > 1e-2
    np.testing.assert_allclose((jax.jit(jax.grad(judged))(features) * direction).sum(), numeric, rtol=1e-6)
