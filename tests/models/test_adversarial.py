"""Adversarial losses and penalties by hand, and in closed form for scores whose slopes are known."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.models import adversarial
from metagen_jax.models.adversarial import (
    EPSILON,
    LOSSES,
    AdversarialLoss,
    gradient_penalty,
    mode_seeking,
    r1_penalty,
)

REAL, MADE = np.array([0.3, -1.2, 2.0, 0.7]), np.array([-0.4, 1.5, 0.1])
REAL_WEIGHT, MADE_WEIGHT = np.array([1.0, 0.5, 1.0, 2.0]), np.array([1.0, 1.0, 0.25])
SCORES = (REAL, MADE, REAL_WEIGHT, MADE_WEIGHT)
EVENT = (3, 2, 2)  # more than one channel, so that a norm over channels alone would differ


def _probability(score):
    return 1 / (1 + np.exp(-score))


def _by_hand(name):
    """Return what discriminator and generator minimise, from the table, with probabilities and not with logits."""
    log, real, made = np.log, _probability(REAL), _probability(MADE)

    def over_real(values):
        return np.average(values, weights=REAL_WEIGHT)

    def over_made(values):
        return np.average(values, weights=MADE_WEIGHT)

    cross_entropy = -over_real(log(real)) - over_made(log(1 - made))
    if name == "saturating":
        return cross_entropy, over_made(log(1 - made))
    if name == "non_saturating":
        return cross_entropy, -over_made(log(made))
    if name == "least_squares":
        return over_real((REAL - 1) ** 2) / 2 + over_made(MADE**2) / 2, over_made((MADE - 1) ** 2) / 2
    if name == "hinge":
        return over_real(np.maximum(0, 1 - REAL)) + over_made(np.maximum(0, 1 + MADE)), -over_made(MADE)
    if name == "wasserstein":
        return over_made(MADE) - over_real(REAL), -over_made(MADE)
    real, made = _probability(REAL - over_made(MADE)), _probability(MADE - over_real(REAL))
    return -over_real(log(real)) - over_made(log(1 - made)), -over_made(log(made)) - over_real(log(1 - real))


def _values(loss, real, made, real_weight, made_weight):
    scores = [jnp.asarray(part) for part in (real, made, real_weight, made_weight)]
    return [float(loss.discriminator(*scores)), float(loss.generator(*scores))]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_that_of_the_table(x64, name):
    np.testing.assert_allclose(_values(LOSSES[name](), *SCORES), _by_hand(name), rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_scores_of_zero_weight_leave_every_loss_as_it_is(x64, name):
    more, nothing = np.array([50.0, -70.0]), np.zeros(2)
    padded = [np.concatenate(part) for part in zip(SCORES, (more, -more, nothing, nothing), strict=True)]
    np.testing.assert_allclose(_values(LOSSES[name](), *padded), _values(LOSSES[name](), *SCORES), rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_without_examples_every_loss_and_its_slope_are_zero(name):
    def total(real, made):
        loss = LOSSES[name]()
        arguments = (real, made, jnp.zeros(4), jnp.zeros(3))
        return loss.discriminator(*arguments) + loss.generator(*arguments)

    value, slopes = jax.value_and_grad(total, (0, 1))(jnp.asarray(REAL), jnp.asarray(MADE))
    assert float(value) == 0.0
    assert not any(slope.any() for slope in slopes)


@pytest.mark.parametrize("name", LOSSES)
def test_discriminators_want_real_scores_up_and_made_ones_down_and_generators_the_made_ones_up(name):
    loss = LOSSES[name]()
    inside = (jnp.array([0.2, 0.6]), jnp.array([0.3, 0.9, 0.5]), jnp.ones(2), jnp.ones(3))
    real, made = jax.grad(loss.discriminator, (0, 1))(*inside)
    assert (real < 0).all()
    assert (made > 0).all()
    assert (jax.grad(loss.generator, 1)(*inside) < 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_no_score_is_too_large_for_a_loss_or_its_slope(name):
    loss = LOSSES[name]()
    extreme = (jnp.array([-1e4, 1e4]), jnp.array([1e4, -1e4]), jnp.ones(2), jnp.ones(2))
    for side in loss:
        value, slopes = jax.value_and_grad(side, (0, 1))(*extreme)
        assert np.isfinite(value)
        assert all(np.isfinite(slope).all() for slope in slopes)


def test_the_saturating_generator_learns_nothing_where_the_discriminator_is_sure_and_the_other_one_does():
    sure = (jnp.array([20.0]), jnp.array([-20.0]), jnp.ones(1), jnp.ones(1))
    assert abs(float(jax.grad(LOSSES["saturating"]().generator, 1)(*sure)[0])) < 1e-8
    np.testing.assert_allclose(jax.grad(LOSSES["non_saturating"]().generator, 1)(*sure), -1.0, rtol=1e-6)


@pytest.mark.parametrize(("name", "invariant"), [("relativistic_average", True), ("non_saturating", False)])
def test_only_a_relativistic_loss_is_blind_to_a_constant_added_to_all_scores(x64, name, invariant):
    loss = LOSSES[name]()
    shifted = _values(loss, REAL + 3.7, MADE + 3.7, REAL_WEIGHT, MADE_WEIGHT)
    assert np.allclose(shifted, _values(loss, *SCORES), rtol=1e-10) == invariant


def test_every_loss_of_the_module_is_in_the_list_under_its_name():
    made = {
        name
        for name, thing in inspect.getmembers(adversarial, inspect.isfunction)
        if inspect.signature(thing).return_annotation is AdversarialLoss
    }
    assert set(LOSSES) == made
    assert all(LOSSES[name] is getattr(adversarial, name) for name in LOSSES)


# Penalties


@pytest.fixture
def images(x64):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(4, *EVENT))), jnp.asarray(rng.normal(size=(4, *EVENT)))


WEIGHT = np.array([1.0, 0.5, 1.0, 2.0])
SLOPE = np.random.default_rng(1).normal(size=EVENT)


def _linear(x):
    return jnp.tensordot(x, jnp.asarray(SLOPE), 3) + 0.7


def _quadratic(x):
    return 0.5 * jnp.square(x).sum((1, 2, 3))  # its slope is x


def test_the_gradient_penalty_of_a_linear_score_is_its_closed_form(images):
    value = gradient_penalty(3.0)(_linear, *images, jnp.asarray(WEIGHT), jax.random.key(0))
    np.testing.assert_allclose(value, 3 * (np.sqrt((SLOPE**2).sum() + EPSILON) - 1) ** 2, rtol=1e-12)
    np.testing.assert_allclose(value, 3 * (np.linalg.norm(SLOPE) - 1) ** 2, rtol=1e-4)


def test_the_gradient_penalty_is_taken_between_a_real_and_a_made_example(images):
    real, made = (np.asarray(x) for x in images)
    share = np.asarray(jax.random.uniform(jax.random.key(5), (4,), real.dtype))[:, None, None, None]
    assert share.std() > 0.1
    norm = np.sqrt(((share * real + (1 - share) * made) ** 2).sum((1, 2, 3)) + EPSILON)
    value = gradient_penalty()(_quadratic, *images, jnp.asarray(WEIGHT), jax.random.key(5))
    np.testing.assert_allclose(value, 10 * np.average((norm - 1) ** 2, weights=WEIGHT), rtol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_gradient_penalty_of_a_critic_that_is_zero_has_finite_derivatives(scale):
    """In 32 bits, for a network whose layers are all zero, or only the last one."""
    rng = np.random.default_rng(0)
    real, made, first, direction = (jnp.asarray(rng.normal(size=(4, 12)), jnp.float32) for _ in range(4))

    def value(layers):
        def score(x):
            return jnp.tanh(x @ layers["first"].T) @ layers["last"]

        return gradient_penalty()(score, real, made, jnp.ones(4), jax.random.key(0))

    @jax.jit
    def derivatives(layers):
        along = {"first": direction, "last": jnp.ones(4)}
        (at, gradient), (_, change) = jax.jvp(jax.value_and_grad(value), (layers,), (along,))
        return at, gradient, change

    at, gradient, change = derivatives({"first": scale * first, "last": jnp.zeros(4)})
    np.testing.assert_allclose(at, 10 * (EPSILON**0.5 - 1) ** 2, rtol=1e-5)
    np.testing.assert_array_equal(gradient["last"], 0.0)
    assert np.isfinite(change["first"]).all()
    assert np.isfinite(change["last"]).all()
    assert np.abs(change["last"]).max() > 0 or scale == 0
    assert np.abs(change["last"]).max() < 1e5  # bounded by the epsilon under the root


def test_the_r1_penalty_is_its_closed_form_for_linear_and_quadratic_scores(images):
    real, made = images
    arguments = (made, jnp.asarray(WEIGHT), jax.random.key(0))
    np.testing.assert_allclose(r1_penalty(3.0)(_linear, real, *arguments), 1.5 * (SLOPE**2).sum(), rtol=1e-12)
    squared = (np.asarray(real) ** 2).sum((1, 2, 3))
    expected = 5 * np.average(squared, weights=WEIGHT)
    np.testing.assert_allclose(r1_penalty()(_quadratic, real, *arguments), expected, rtol=1e-12)


@pytest.mark.parametrize("make", [gradient_penalty, r1_penalty])
def test_padding_leaves_a_penalty_as_it_is_and_without_examples_it_is_zero(images, make):
    real, made = images
    plain = make()(_quadratic, real, made, jnp.asarray(WEIGHT), jax.random.key(3))
    more = [jnp.concatenate([x, 5 + x[:2]]) for x in (real, made)]
    weight = jnp.concatenate([jnp.asarray(WEIGHT), jnp.zeros(2)])
    np.testing.assert_allclose(make()(_quadratic, *more, weight, jax.random.key(3)), plain, rtol=1e-12)
    assert float(make()(_quadratic, real, made, jnp.zeros(4), jax.random.key(3))) == 0.0


@pytest.mark.parametrize("make", [gradient_penalty, r1_penalty])
@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_a_penalty_of_negative_weight_is_refused(make, weight):
    with pytest.raises(ValueError, match="weight must be at least 0, got"):
        make(weight)


def test_mode_seeking_is_its_closed_form_and_falls_as_images_differ_more(images):
    first, second = images
    rng = np.random.default_rng(2)
    codes, others = rng.normal(size=(2, 4, 3))
    ratio = np.abs(np.asarray(first - second)).mean((1, 2, 3)) / np.abs(codes - others).mean(1)
    arguments = (jnp.asarray(codes), jnp.asarray(others))
    value = float(mode_seeking(first, second, *arguments, jnp.asarray(WEIGHT)))
    np.testing.assert_allclose(value, 1 / (np.average(ratio, weights=WEIGHT) + 0.01), rtol=1e-12)
    assert float(mode_seeking(2 * first, 2 * second, *arguments, jnp.asarray(WEIGHT))) < 0.52 * value
    padded = [jnp.concatenate([x, 3 + index + x[:2]]) for index, x in enumerate((first, second, *arguments))]
    weight = jnp.concatenate([jnp.asarray(WEIGHT), jnp.zeros(2)])
    np.testing.assert_allclose(mode_seeking(*padded, weight), value, rtol=1e-12)
    assert float(mode_seeking(first, second, *arguments, jnp.zeros(4))) == 0.0
    assert float(mode_seeking(first, first, *arguments, jnp.asarray(WEIGHT))) == 100.0  # collapsed
    twins = [jnp.concatenate([x, x[:1]]) for x in (first, second, arguments[0], arguments[0])]
    assert np.isfinite(mode_seeking(*twins, jnp.ones(5)))  # codes that are equal
