"""k-means against scikit-learn from the same beginning, its invariant, and its seeding against the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.latent import kmeans as module
from metagen_jax.latent.kmeans import kmeans, lloyd, nearest, plus_plus


def _codes(num=90, size=3, seed=0):
    return np.random.default_rng(seed).normal(size=(num, size)).astype("f4")


def test_lloyd_s_steps_are_those_of_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    codes = _codes()
    expected = cluster.KMeans(6, init=codes[:6], n_init=1, max_iter=40, tol=0, algorithm="lloyd").fit(codes)
    found = jax.jit(lloyd, static_argnums=2)(codes, codes[:6], 40)
    np.testing.assert_allclose(found.centres, expected.cluster_centers_, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.labels, expected.labels_)
    np.testing.assert_allclose(found.inertia, expected.inertia_, rtol=1e-5)


def test_inertia_never_rises_and_a_fixed_point_is_one(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 32)  # chunks that do not divide the rows
    codes, step = _codes(70), jax.jit(lloyd, static_argnums=2)
    centres, inertias = jnp.asarray(codes[:5]), []
    for _ in range(25):
        centres, labels, inertia = step(codes, centres, 1)
        np.testing.assert_allclose(inertia, np.square(codes - np.asarray(centres)[labels]).sum(), rtol=1e-5)
        inertias.append(float(inertia))
    assert inertias[0] > inertias[-1] + 1
    assert (np.diff(inertias) <= 1e-4).all()
    np.testing.assert_allclose(step(codes, centres, 1).centres, centres, atol=1e-6)
    np.testing.assert_allclose(centres[2], codes[np.asarray(labels) == 2].mean(0), atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_give_what_all_rows_at_once_give(chunk, monkeypatch):
    codes, centres = _codes(23), _codes(4, seed=1)
    expected = np.square(codes[:, None] - centres[None]).sum(2).argmin(1)
    monkeypatch.setattr(module, "CHUNK", chunk)
    np.testing.assert_array_equal(nearest(jnp.asarray(codes), jnp.asarray(centres)), expected)
    means = np.stack([codes[expected == label].mean(0) for label in range(4)])
    np.testing.assert_allclose(lloyd(jnp.asarray(codes), jnp.asarray(centres), 1).centres, means, atol=1e-6)


def test_an_empty_cluster_keeps_its_centre():
    far = jnp.array([[100.0, 100.0]])
    found = lloyd(jnp.array([[0.0, 0.0], [2.0, 0.0]]), jnp.concatenate([jnp.zeros((1, 2)), far]), 3)
    np.testing.assert_array_equal(found.centres, [[1, 0], [100, 100]])
    np.testing.assert_array_equal(found.labels, [0, 0])


def test_no_step_assigns_and_moves_nothing():
    codes, centres = _codes(9), _codes(2, seed=1)
    found = lloyd(jnp.asarray(codes), jnp.asarray(centres), 0)
    np.testing.assert_array_equal(found.centres, centres)
    assert set(np.asarray(found.labels).tolist()) == {0, 1}


def test_the_second_seed_is_drawn_by_its_squared_distance_to_the_first():
    codes = np.array([[0.0], [1.0], [3.0], [7.0]], "f4")
    keys = jax.random.split(jax.random.key(0), 6000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: plus_plus(key, jnp.asarray(codes), 2)))(keys))[..., 0]
    squares = np.square(codes - codes.T)
    expected = squares / squares.sum(1, keepdims=True) / 4
    found = [[((drawn[:, 0] == a) & (drawn[:, 1] == b)).mean() for b in codes[:, 0]] for a in codes[:, 0]]
    np.testing.assert_allclose(found, expected, atol=0.02)  # 3 standard errors of a share of 1/4 are 0.017


def test_seeds_are_codes_and_repeat_only_where_codes_do():
    codes = jnp.array([[1.0], [1.0], [2.0], [2.0]])
    seeds = np.asarray(plus_plus(jax.random.key(0), codes, 3))[:, 0]
    assert set(seeds.tolist()) == {1.0, 2.0}


def test_well_separated_groups_are_found_far_from_the_origin():
    """Far from the origin |z|^2 - 2 z c + |c|^2 would lose the digits that tell the groups apart."""
    truth = np.repeat(np.arange(4), 10)
    codes = 1000 + 3 * np.eye(4, dtype="f4")[truth] + 0.2 * _codes(40, 4)
    found = jax.jit(kmeans(4, num_steps=10, restarts=3))(jax.random.key(1), codes)
    same = np.asarray(found.labels)[:, None] == np.asarray(found.labels)[None]
    np.testing.assert_array_equal(same, truth[:, None] == truth[None])
    np.testing.assert_allclose(found.inertia, np.square(codes - found.centres[found.labels]).sum(), rtol=1e-3)


def test_the_best_of_several_restarts_is_kept():
    codes, keys = jnp.asarray(_codes(60)), jax.random.split(jax.random.key(3), 4)

    @jax.jit
    def alone(keys):
        centred = codes - codes.mean(0)[None]
        return jax.lax.map(lambda key: lloyd(centred, plus_plus(key, centred, 8), 12).inertia, keys)

    inertias = np.asarray(alone(keys))
    assert inertias.max() > 1.001 * inertias.min()
    found = jax.jit(kmeans(8, num_steps=12, restarts=4))(jax.random.key(3), codes)
    np.testing.assert_allclose(found.inertia, inertias.min(), rtol=1e-5)


def test_settings_and_codes_that_make_no_clusters_are_refused():
    with pytest.raises(ValueError, match="num_clusters=0"):
        kmeans(0)
    with pytest.raises(ValueError, match="restarts=0"):
        kmeans(2, restarts=0)
    with pytest.raises(ValueError, match=r"at least 5 images for 5 clusters, got \[4, 2\]"):
        kmeans(5)(jax.random.key(0), jnp.zeros((4, 2)))
