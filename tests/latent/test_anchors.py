import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.latent import anchors as module
from metagen_jax.latent.anchors import LatentBank, closest, extrapolated, from_images, from_prior, midpoints, separation

NONE = LatentBank({}, jnp.zeros((0, 4)), jnp.zeros((0, 2, 2, 1), jnp.uint8))


def bank(num, latents=4):
    codes = jax.random.normal(jax.random.key(9), (num, latents))
    return LatentBank({}, codes, jnp.zeros((num, 2, 2, 1), jnp.uint8))


def distances(codes):
    codes = np.asarray(codes, np.float64)
    return np.square(codes[:, None] - codes[None]).sum(-1)[np.triu_indices(len(codes), 1)]


def test_closest_is_the_smallest_pairwise_squared_distance():
    codes = jax.random.normal(jax.random.key(0), (6, 5))
    np.testing.assert_allclose(closest(codes), distances(codes).min(), rtol=1e-4)


def test_separation_is_that_of_squared_distances_of_the_prior():
    codes = np.random.default_rng(0).normal(size=(400, 30))
    found = distances(codes)
    assert abs(found.mean() - separation(30, 0.0)) < 0.5
    assert abs((separation(30, 0.0) - separation(30, 1.0)) - found.std()) < 0.5


def test_the_first_candidate_that_is_wide_enough_is_taken_else_the_widest():
    sets = jnp.array([[[0.0], [1.0]], [[0.0], [3.0]], [[0.0], [5.0]]])
    assert int(module.widest(sets, 4.0)) == 1
    assert int(module.widest(sets, 0.5)) == 0
    assert int(module.widest(sets, 100.0)) == 2


def test_asking_for_distance_brings_it():
    keys = jax.random.split(jax.random.key(1), 100)

    def smallest(draw):
        return jax.vmap(lambda key: closest(draw(NONE, key, 3).codes))(jax.random.clone(keys))

    assert float((smallest(from_prior(4, apart=4.0)) > 4.0).mean()) > 0.8
    assert float((smallest(from_prior(4)) > 4.0).mean()) < 0.5


def test_images_are_different_rows_all_equally_likely_and_their_codes_are_theirs():
    images = bank(7)
    drawn = jax.vmap(lambda key: from_images()(images, key, 5))(jax.random.split(jax.random.key(2), 2000))
    assert all(len(set(rows)) == 5 for rows in drawn.rows.tolist())
    np.testing.assert_array_equal(drawn.codes, images.codes[drawn.rows])
    np.testing.assert_allclose(np.bincount(drawn.rows.ravel(), minlength=7) / 2000, 5 / 7, atol=0.04)


def test_all_rows_can_be_taken():
    drawn = from_images(apart=1.0)(bank(4), jax.random.key(0), 4)
    assert sorted(drawn.rows.tolist()) == [0, 1, 2, 3]


def test_extrapolation_goes_beyond_and_stays_where_the_prior_is():
    base = from_prior(4)
    key = jax.random.key(3)
    codes = base(NONE, key, 3).codes
    beyond = extrapolated(base, 0.5)(NONE, jax.random.clone(key), 3)
    expected = np.asarray(codes) + 0.5 * (np.asarray(codes) - np.roll(codes, -1, 0))
    lengths = np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(beyond.codes, expected * np.minimum(1, 5.0 / lengths), rtol=1e-5)
    far = extrapolated(lambda bank, key, num: base(bank, key, num)._replace(codes=10 * jnp.eye(3, 4)), 1.0)
    lengths = jnp.linalg.norm(far(NONE, jax.random.clone(key), 3).codes, axis=1)
    np.testing.assert_allclose(lengths, 5.0, rtol=1e-5)
    assert (beyond.rows == -1).all()


def test_midpoints_lie_between_classes_that_are_not_used_twice():
    base = from_prior(4, apart=2.0)
    key = jax.random.key(4)
    ends = base(NONE, key, 6).codes
    made = midpoints(base)(NONE, jax.random.clone(key), 3).codes
    np.testing.assert_allclose(made, (ends[:3] + ends[3:]) / 2, rtol=1e-6)
    both = np.square(np.asarray(made - ends[:3])).sum(1)
    assert (both >= float(closest(ends)) / 4 - 1e-5).all()


def test_rules_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="at least 0"):
        from_prior(4, apart=-1.0)
    with pytest.raises(ValueError, match="latent"):
        from_prior(0)
    with pytest.raises(ValueError, match="bank has 3"):
        from_images()(bank(3), jax.random.key(0), 4)
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        extrapolated(from_prior(4), 0.0)
    with pytest.raises(ValueError, match="at least 2"):
        extrapolated(from_prior(4))(NONE, jax.random.key(0), 1)
