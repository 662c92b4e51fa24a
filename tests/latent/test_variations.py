import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.latent.variations import between, noise, others, outsiders

ANCHORS = jax.random.normal(jax.random.key(0), (5, 6))
RULES = {"noise": noise, "outsiders": outsiders, "others": others}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_without_strength_every_code_is_its_anchor(rule):
    codes = rule(0.0)(jax.random.key(1), ANCHORS, 3)
    np.testing.assert_allclose(codes, np.broadcast_to(ANCHORS[:, None], (5, 3, 6)), atol=1e-6)


def test_noise_has_the_strength_asked_for():
    codes = noise(0.7)(jax.random.key(2), ANCHORS, 4000) - ANCHORS[:, None]
    np.testing.assert_allclose(codes.std((1, 2)), 0.7, rtol=0.02)
    ranged = noise((0.0, 2.0))(jax.random.key(3), ANCHORS, 4000) - ANCHORS[:, None]
    np.testing.assert_allclose(jnp.square(ranged).mean((1, 2)), 4 / 3, rtol=0.05)  # E s^2 of s ~ U(0, 2)


def test_outsiders_go_that_share_of_the_way_to_the_prior():
    codes = outsiders(0.3)(jax.random.key(4), ANCHORS, 8000) - 0.7 * ANCHORS[:, None]
    np.testing.assert_allclose(codes.mean((0, 1)), 0.0, atol=0.01)
    np.testing.assert_allclose(codes.std((0, 1)), 0.3, rtol=0.03)


def test_others_go_to_another_class_of_the_task_all_equally_likely():
    codes = others(0.4)(jax.random.key(5), ANCHORS, 3000)
    target = (codes - 0.6 * ANCHORS[:, None]) / 0.4
    which = jnp.square(target[:, :, None] - ANCHORS[None, None]).sum(-1)
    assert float(which.min(-1).max()) < 1e-8
    counts = np.stack([np.bincount(row, minlength=5) for row in np.asarray(which.argmin(-1))]) / 3000
    np.testing.assert_allclose(counts, (1 - np.eye(5)) / 4, atol=0.04)


def test_below_one_half_an_image_of_others_stays_nearer_to_its_anchor_than_to_the_other():
    two = ANCHORS[:2]
    codes = others((0.0, 0.49))(jax.random.key(6), two, 500)
    own, other = (jnp.square(codes - anchor[:, None]).sum(-1) for anchor in (two, two[::-1]))
    assert bool((own < other).all())
    assert float((own / other).max()) > 0.8


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_on_the_sphere_the_angle_and_the_length_change_in_proportion(share):
    begin, end = 2.0 * jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[0.0, 4.0, 0.0]])
    made = np.asarray(between(begin, end, share, spherical=True))[0]
    angle = share * np.pi / 2
    np.testing.assert_allclose(made, (2 + 2 * share) * np.array([np.cos(angle), np.sin(angle), 0]), atol=1e-5)


def test_on_the_sphere_codes_of_one_length_keep_it():
    codes = ANCHORS / jnp.linalg.norm(ANCHORS, axis=1, keepdims=True)
    made = others(0.5, spherical=True)(jax.random.key(7), codes, 50)
    np.testing.assert_allclose(jnp.linalg.norm(made, axis=-1), 1.0, atol=1e-4)
    straight = others(0.5)(jax.random.key(7), codes, 50)
    assert float(jnp.linalg.norm(straight, axis=-1).max()) < 0.99


@pytest.mark.parametrize(("rule", "strength"), [(noise, -0.1), (outsiders, 1.1), (others, (0.4, 0.2))])
def test_strengths_out_of_range_are_refused(rule, strength):
    with pytest.raises(ValueError, match="strength"):
        rule(strength)


def test_others_need_another_class():
    with pytest.raises(ValueError, match="at least 2"):
        others()(jax.random.key(0), ANCHORS[:1], 2)
