"""EM for mixtures against scikit-learn, its invariant with and without labels, and two articles' closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.latent import mixtures as module
from metagen_jax.latent.mixtures import (
    Mixture,
    around,
    em,
    log_density,
    log_joint,
    maximised,
    responsibilities,
    value,
)

SIZE, COMPONENTS = 2, 3


def _codes(num=60, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.array([[0, 0], [3, 1], [-1, 4]], "f4")
    return (centres[np.arange(num) % 3] + rng.normal(size=(num, SIZE))).astype("f4")


def _start():
    return around(jnp.array([[0.5, 0.0], [2.0, 2.0], [-1.0, 2.0]]), jnp.array([1.0, 2.0]))


def _no_labels(num):
    return jnp.zeros((num, COMPONENTS)), jnp.ones(num)


def _fit(num_steps, **options):
    return jax.jit(em(num_steps, **options))


def test_steps_are_those_of_scikit_learn():
    mixture = pytest.importorskip("sklearn.mixture")
    codes, start = _codes(), _start()
    other = mixture.GaussianMixture(
        COMPONENTS,
        covariance_type="diag",
        tol=0,
        max_iter=15,
        reg_covar=0,
        weights_init=np.full(3, 1 / 3),
        means_init=np.asarray(start.mean),
        precisions_init=1 / np.asarray(start.variance),
    )
    with pytest.warns(Warning, match="did not converge"):
        other.fit(codes)
    found, values = _fit(15)(start, codes, *_no_labels(60))
    np.testing.assert_allclose(np.exp(found.log_share), other.weights_, rtol=1e-4)
    np.testing.assert_allclose(found.mean, other.means_, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.variance, other.covariances_, rtol=1e-3)
    np.testing.assert_allclose(log_density(found, codes), other.score_samples(codes), rtol=1e-4)
    np.testing.assert_allclose(
        responsibilities(found, codes, *_no_labels(60)), other.predict_proba(codes), rtol=1e-3, atol=1e-5
    )
    assert len(values) == 15


@pytest.mark.parametrize("labelled", [0, 9, 60])
@pytest.mark.parametrize("options", [{}, {"floor": 0.7}, {"moves": ("mean",)}, {"moves": ("variance", "log_share")}])
def test_what_em_raises_never_falls(labelled, options):
    codes = _codes()
    targets = np.zeros((60, COMPONENTS), "f4")
    targets[np.arange(labelled), np.arange(labelled) % 3] = 1
    found, values = em(12, **options)(_start(), codes, targets, jnp.ones(60))
    last = float(value(found, jnp.asarray(codes), jnp.asarray(targets), jnp.ones(60)))
    values = np.array([*values, last])
    assert values[-1] > values[0] + 0.1
    if options.get("floor"):  # from a start that the floor allows
        assert (np.asarray(found.variance) >= 0.7).all()
        assert (np.asarray(found.variance) < 0.7 + 1e-6).any()
    assert (np.diff(values) >= -2e-4).all(), np.diff(values)


def test_the_value_is_the_likelihood_of_codes_and_of_labels():
    codes, start = _codes(4), _start()
    targets = np.zeros((4, COMPONENTS), "f4")
    targets[1, 2] = 1
    densities = np.exp(-0.5 * np.square(codes[:, None] - np.asarray(start.mean)) / np.asarray(start.variance))
    densities = (densities / np.sqrt(2 * np.pi * np.asarray(start.variance))).prod(2) / 3
    expected = np.log([densities[0].sum(), densities[1, 2], densities[3].sum()]).sum()
    weight = jnp.array([1.0, 1.0, 0.0, 1.0])
    np.testing.assert_allclose(value(start, codes, targets, weight), expected, rtol=1e-5)


def test_components_a_few_at_a_time_are_all_at_once(monkeypatch):
    codes, start = _codes(20), _start()
    expected, _ = em(2)(start, codes, *_no_labels(20))
    monkeypatch.setattr(module, "BATCH", 2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        em(2)(start, codes, *_no_labels(20))[0],
        expected,
    )


def test_all_labelled_is_one_step_to_moments_of_the_classes():
    codes, labels = _codes(), np.arange(60) % 3
    found, _ = em(1)(_start(), codes, np.eye(COMPONENTS, dtype="f4")[labels], jnp.ones(60))
    for label in range(COMPONENTS):
        of_class = codes[labels == label]
        np.testing.assert_allclose(found.mean[label], of_class.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.variance[label], of_class.var(0), rtol=1e-4)
    np.testing.assert_allclose(found.log_share, np.log(1 / 3), rtol=1e-5)


def test_one_step_of_means_from_prototypes_is_semi_supervised_soft_k_means():
    """m_j = (sum_s y_sj z_s + sum_u r_uj z_u) / (sum y + sum r), r the posterior at unit variance and equal shares."""
    support, other = _codes(6), _codes(9, seed=1)
    targets = np.eye(COMPONENTS, dtype="f4")[np.arange(6) % 3]
    prototypes = targets.T @ support / 2
    similarity = np.exp(-0.5 * np.square(other[:, None] - prototypes[None]).sum(2))
    soft = similarity / similarity.sum(1, keepdims=True)
    expected = (targets.T @ support + soft.T @ other) / (targets.sum(0) + soft.sum(0))[:, None]
    found, _ = em(1, moves=("mean",))(
        around(jnp.asarray(prototypes), 1.0),
        np.concatenate([support, other]),
        np.concatenate([targets, np.zeros((9, COMPONENTS), "f4")]),
        jnp.ones(15),
    )
    np.testing.assert_allclose(found.mean, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.variance, np.ones((3, 2)))


def test_labels_decide_where_codes_cannot():
    """Two clusters, one label in each, named against the order in which the mixture begins."""
    codes = jnp.array([[0.0], [0.1], [5.0], [5.1]])
    targets = jnp.zeros((4, 2)).at[0, 1].set(1.0).at[2, 0].set(1.0)
    found, _ = em(5, moves=("mean",))(around(jnp.array([[2.0], [3.0]]), 1.0), codes, targets, jnp.ones(4))
    np.testing.assert_allclose(found.mean[:, 0], [5.05, 0.05], atol=1e-3)


def test_padding_changes_nothing_and_a_component_of_nobody_stays():
    codes = jnp.asarray(_codes(8))
    start = _start()._replace(mean=_start().mean.at[2].set(1e4))
    expected, _ = em(3)(start, codes, *_no_labels(8))
    padded = jnp.concatenate([codes, jnp.full((2, SIZE), 7.0)])
    found, _ = em(3)(start, padded, jnp.zeros((10, COMPONENTS)), jnp.ones(10).at[8:].set(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
    np.testing.assert_array_equal(found.mean[2], [1e4, 1e4])
    np.testing.assert_array_equal(found.variance[2], [1.0, 2.0])
    assert np.exp(found.log_share[2]) == 0
    nobody = maximised(start, codes, jnp.zeros((8, COMPONENTS)))
    assert all(np.isfinite(leaf).all() for leaf in nobody)
    np.testing.assert_array_equal(nobody.mean, start.mean)


def test_gradients_through_em_are_finite_differences(x64):
    codes, weights = jnp.asarray(_codes(7), float), jnp.asarray(_codes(3, seed=5), float)
    targets = jnp.zeros((7, COMPONENTS)).at[0, 0].set(1.0)
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), _start())

    @jax.jit
    def judged(codes):
        mixture, _ = em(3, floor=0.3)(start, codes, targets, jnp.ones(7))
        return (mixture.mean * weights).sum() + log_joint(mixture, codes)[2, 1]

    gradient = jax.jit(jax.grad(judged))(codes)
    direction = jnp.asarray(_codes(7, seed=9), float)
    step = 1e-5
    numeric = (judged(codes + step * direction) - judged(codes - step * direction)) / (2 * step)
    assert abs(numeric) > 0.1
    np.testing.assert_allclose((gradient * direction).sum(), numeric, rtol=1e-6)


def test_settings_and_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_steps=0"):
        em(0)
    with pytest.raises(ValueError, match="floor=0"):
        em(1, floor=0.0)
    with pytest.raises(ValueError, match=r"some of .*log_share.*got \('scale',\)"):
        em(1, moves=("scale",))
    with pytest.raises(ValueError, match=r"codes \[N, 2\] and targets \[N, 3\].*got \[4, 5\]"):
        em(1)(_start(), jnp.zeros((4, 5)), *_no_labels(4))
    with pytest.raises(ValueError, match="one weight for each of 4 codes"):
        em(1)(_start(), jnp.zeros((4, 2)), jnp.zeros((4, 3)), jnp.ones(3))
    assert isinstance(around(jnp.zeros((2, 2)), 1.0), Mixture)
