"""Evolution strategies against smoothed gradients in closed form, within what their own standard errors allow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import flat, points, quadratic_model, quadratic_task

import metagen_jax as mg
from metagen_jax.meta.common_reward import duality_gap
from metagen_jax.meta.evolution import evolution

CURVATURE = np.array([[2.0, 0.3], [0.3, 0.5]])
SIGMA = 0.3


def cubic(meta, key, task):
    """The smoothed gradient of x^3 is 3 x^2 + 3 s^2, so that smoothing shows."""
    del key, task
    return {"x": (meta["x"] ** 3).sum()}, {}


def rivals(meta, key, task):
    """Two losses that depend on both players, and one player that is not scored."""
    del key
    x, y, rule = meta["x"], meta["y"], meta["rule"]
    cross = x * y + rule * task
    return {"x": cross + x**2, "y": -cross + 2 * rule**2}, {"cross": cross}


def within_errors(samples, expected, bound=4.5):
    """Compare the mean of samples [S, ...] with what is expected, in standard errors."""
    error = samples.std(0, ddof=1) / np.sqrt(len(samples))
    assert (error > 0).all()
    np.testing.assert_array_less(np.abs(samples.mean(0) - expected), bound * error)
    return error


def samples_of(field, meta, batch, num):
    keys = jax.random.split(jax.random.key(0), num)
    directions, metrics = jax.jit(jax.vmap(field, in_axes=(None, 0, None)))(meta, keys, batch)
    return jax.tree.map(np.asarray, (directions, metrics))


def test_evolution_estimates_the_gradient_of_the_smoothed_loss_not_of_the_loss():
    meta = {"x": jnp.array([0.5, -0.2, 0.1])}
    directions, _ = samples_of(evolution(cubic, ("x",), SIGMA, 1), meta, None, 20000)
    plain = 3 * np.asarray(meta["x"]) ** 2
    error = within_errors(directions["x"], plain + 3 * SIGMA**2)
    assert (np.abs(directions["x"].mean(0) - plain) > 10 * error).all()


def test_more_pairs_have_less_variance_and_the_same_mean():
    meta = {"x": jnp.array([0.5, -0.2, 0.1])}
    few, _ = samples_of(evolution(cubic, ("x",), SIGMA, 1), meta, None, 4000)
    many, _ = samples_of(evolution(cubic, ("x",), SIGMA, 8), meta, None, 4000)
    np.testing.assert_allclose(few["x"].var(0) / many["x"].var(0), 8, rtol=0.25)
    within_errors(many["x"], 3 * np.asarray(meta["x"]) ** 2 + 3 * SIGMA**2)


def test_evolution_through_an_inner_loop_meets_the_gradient_through_it_on_a_quadratic():
    """A quadratic's smoothed gradient is its gradient."""
    model = quadratic_model(jnp.asarray(CURVATURE, jnp.float32))
    adapt = mg.unroll(mg.vector_field(model.game), mg.fixed(optax.sgd(0.2)), 3)
    game = mg.over_tasks(model.game, adapt)
    meta, task = {"model": jnp.array([0.5, 2.0])}, quadratic_task(np.random.default_rng(0), 2)
    exact, _ = mg.vector_field(game)(meta, jax.random.key(0), task)
    directions, metrics = samples_of(evolution(game, ("model",), SIGMA, 1), meta, task, 4000)
    within_errors(directions["model"], np.asarray(exact["model"]))
    assert set(metrics) == {"loss", "support/loss"}
    assert metrics["support/loss"].shape == (4000, 3)


def test_rivals_each_follow_their_own_loss_and_a_rule_the_sum():
    meta = {"x": jnp.array(0.7), "y": jnp.array(-1.3), "rule": jnp.array(0.4), "y/rule": jnp.array(0.0)}
    directions, metrics = samples_of(evolution(rivals, ("x", "y", "rule"), SIGMA, 1), meta, jnp.array(0.5), 20000)
    assert set(directions) == {"x", "y", "rule"}
    assert set(metrics) == {"cross", "loss/x", "loss/y", "loss/rule"}
    for name, expected in {"x": -1.3 + 2 * 0.7, "y": -0.7, "rule": 4 * 0.4}.items():
        within_errors(directions[name], expected)


def test_players_that_do_not_learn_are_not_perturbed():
    meta = {"x": jnp.array(0.7), "y": jnp.array(-1.3), "rule": jnp.array(0.4)}
    directions, metrics = samples_of(evolution(rivals, ("x",), SIGMA, 1), meta, jnp.array(0.5), 2000)
    assert set(directions) == {"x"}
    # pairs are symmetric in x, so what is left of the loss is its curvature alone
    np.testing.assert_allclose(metrics["cross"], 0.7 * -1.3 + 0.4 * 0.5, rtol=1e-5)


def test_the_duality_gap_of_one_step_is_the_closed_form_and_zero_at_the_equilibrium():
    def game(params, key, batch):
        del key, batch
        return {"x": params["x"] * params["y"], "y": -params["x"] * params["y"]}, {}

    gap = duality_gap(game, {"x": ("x",), "y": ("y",)}, 1, 0.3)
    params = {"x": jnp.array(0.7), "y": jnp.array(-1.3)}
    slope, metrics = mg.vector_field(gap, None)({**params, "gap": jnp.zeros(())}, jax.random.key(0), None)
    np.testing.assert_allclose(metrics["loss"], 0.3 * (0.7**2 + 1.3**2), rtol=1e-6)
    assert flat(slope) == 0
    exact = jax.grad(lambda params: gap(params, jax.random.key(0), None)[0]["gap"])(params)
    np.testing.assert_allclose(flat(exact), 2 * 0.3 * flat(params), rtol=1e-5)
    assert gap(jax.tree.map(jnp.zeros_like, params), jax.random.key(0), None)[0]["gap"] == 0


def test_what_is_wrong_is_said():
    for options in ((("x",), 0.0, 1), (("x",), 0.1, 0)):
        with pytest.raises(ValueError, match="sigma > 0 and at least one pair"):
            evolution(cubic, *options)
    with pytest.raises(ValueError, match="write"):
        evolution(cubic, "x", 0.1, 1)
    with pytest.raises(ValueError, match="should learn"):
        evolution(cubic, ("z",), 0.1, 1)({"x": jnp.zeros(1)}, jax.random.key(0), points([[0.0]]))
    with pytest.raises(ValueError, match="at least one step"):
        duality_gap(cubic, {"x": ("x",)}, 0, 0.1)
