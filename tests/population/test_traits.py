"""Traced rules against the rules that they choose, and the order of meta-gradients in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import flat, points, quadratic, quadratic_model, quadratic_task

import metagen_jax as mg
from metagen_jax.population.traits import following, mixture, of_order

CURVATURE = np.diag([1.0, 3.0])
RULES = (optax.sgd(1.0), optax.sgd(1.0, momentum=0.9), optax.adam(1.0, eps_root=1e-8))


def _adapted(start, num_steps=3):
    field = mg.vector_field(quadratic(jnp.asarray(CURVATURE, "f4")))
    adapt = mg.unroll(field, start, num_steps)
    return adapt({"model": jnp.array([1.0, -2.0])}, jax.random.key(0), points([[0.5, 0.25]]))[0]["model"]


def test_a_traced_rate_is_the_rate():
    rates = jnp.array([0.1, 0.25])
    moved = jax.jit(jax.vmap(lambda rate: _adapted(following(optax.sgd(rate)))))(rates)
    centre, begin = np.array([0.5, 0.25]), np.array([1.0, -2.0])
    for row, rate in zip(moved, [0.1, 0.25], strict=True):
        expected = centre + (1 - rate * np.diag(CURVATURE)) ** 3 * (begin - centre)
        np.testing.assert_allclose(row, expected, rtol=1e-5)


@pytest.mark.parametrize("which", range(len(RULES)))
def test_a_one_hot_mixture_is_the_rule_that_it_chooses(which):
    rates = (0.1, 0.05, 0.2)
    rules = (optax.sgd(0.1), optax.sgd(0.05, momentum=0.9), optax.adam(0.2, eps_root=1e-8))
    shares = jnp.eye(3)[which]
    mixed = jax.jit(lambda shares, rate: _adapted(following(mixture(RULES, shares, rate), RULES)))
    chosen = jax.jit(lambda: _adapted(mg.fixed(rules[which])))()
    np.testing.assert_allclose(mixed(shares, rates[which]), chosen, rtol=1e-5)
    assert np.abs(np.asarray(mixed(jnp.eye(3)[which - 1], rates[which])) - np.asarray(chosen)).max() > 1e-3


def test_a_mixture_adds_shares_of_updates():
    rule = mixture((optax.sgd(1.0), optax.sign_sgd(1.0)), jnp.array([0.25, 0.75]), 0.5)
    gradient = {"model": jnp.array([3.0, -0.2])}
    updates, _ = rule.update(gradient, rule.init(gradient))
    np.testing.assert_allclose(updates["model"], [-0.5 * (0.25 * 3 + 0.75), 0.5 * (0.25 * 0.2 + 0.75)], rtol=1e-6)


def test_rules_that_stand_for_a_traced_one_are_tried():
    with pytest.raises(ValueError, match="eps_root=1e-8"):
        jax.jit(lambda rate: _adapted(following(optax.adam(rate), (optax.adam(1.0),))))(0.1)


@pytest.mark.parametrize("rules", [(), RULES[:2]])
def test_a_mixture_wants_a_share_for_each_rule(rules):
    with pytest.raises(ValueError, match=f"at least one rule, got {len(rules)} and \\(3,\\)"):
        mixture(rules, jnp.ones(3), 0.1)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_meta_gradient_of_an_order_is_its_closed_form(share, x64):
    """d L(phi_K; Q) / d phi_0 = (I - r c A)^K A (phi_K - q)."""
    rate, steps, task = 0.2, 3, quadratic_task(np.random.default_rng(0), 2)
    model = quadratic_model(jnp.asarray(CURVATURE))

    def direction(share):
        learner = mg.maml(
            model,
            mg.fixed(optax.sgd(rate)),
            steps,
            dynamics=lambda game, players: of_order(mg.vector_field(game, players), share),
        )
        return learner.field({"model": jnp.array([1.0, -2.0])}, jax.random.key(0), task)[0]["model"]

    support, query = (np.asarray(part.x.mean(0)) for part in task)
    adapted = support + (1 - rate * np.diag(CURVATURE)) ** steps * (np.array([1.0, -2.0]) - support)
    expected = (1 - rate * share * np.diag(CURVATURE)) ** steps * (CURVATURE @ (adapted - query))
    np.testing.assert_allclose(jax.jit(direction)(share), expected, rtol=1e-10)


def test_order_zero_and_one_are_first_and_second_order():
    task, meta = quadratic_task(np.random.default_rng(1), 2), {"model": jnp.array([1.0, -2.0])}
    model = quadratic_model(jnp.asarray(CURVATURE, "f4"))
    start = mg.fixed(optax.sgd(0.2, momentum=0.5))

    def field(learner):
        return flat(jax.jit(learner.field)(meta, jax.random.key(0), task)[0])

    def dynamics(share):
        return lambda game, players: of_order(mg.vector_field(game, players), share)

    first = field(mg.fomaml(model, start, 2))
    second = field(mg.maml(model, start, 2))
    np.testing.assert_allclose(field(mg.maml(model, start, 2, dynamics=dynamics(0.0))), first, rtol=1e-5)
    np.testing.assert_allclose(field(mg.maml(model, start, 2, dynamics=dynamics(1.0))), second, rtol=1e-5)
    assert np.abs(first - second).max() > 0.1


def test_the_direction_itself_is_the_same_bit_for_bit():
    field = mg.vector_field(quadratic(jnp.asarray(CURVATURE, "f4")))
    given = {"model": jnp.array([0.1, -0.7])}, jax.random.key(0), points([[0.3, 0.2]])
    plain, partly = jax.jit(field)(*given), jax.jit(of_order(field, 0.3))(*given)
    np.testing.assert_array_equal(flat(plain[0]), flat(partly[0]))
