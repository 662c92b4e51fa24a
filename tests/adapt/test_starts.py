import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import points, quadratic

from metagen_jax import cooperative, fixed, learned, per_parameter, per_step, reset, unroll, vector_field

SUPPORT = points([[1.0, -1.0], [3.0, 0.0]])
CURVATURE = np.array([[2.0, 0.3], [0.3, 0.5]])
CENTRE = np.array([2.0, -0.5])


def _adapt(start, meta, steps):
    return unroll(vector_field(quadratic(jnp.asarray(CURVATURE))), start, steps)(meta, jax.random.key(0), SUPPORT)[0]


def test_one_rate_per_parameter_scales_each_coordinate_of_the_gradient(x64):
    start = per_parameter(0.1, ("model",))
    meta = start.extend({"model": jnp.array([0.5, 2.0])})
    meta["model/log_rate"] = jnp.log(jnp.array([0.1, 0.3]))
    expected = np.array([0.5, 2.0])
    for _ in range(3):
        expected = expected - np.array([0.1, 0.3]) * (CURVATURE @ (expected - CENTRE))
    adapted = _adapt(start, meta, 3)
    np.testing.assert_allclose(adapted["model"], expected, rtol=1e-12)
    assert set(adapted) == {"model"}


def test_one_rate_per_step_is_used_in_turn_and_the_last_one_goes_on(x64):
    rates = [0.1, 0.4, 0.05]
    start = per_step(3, 0.1, ("model",))
    meta = start.extend({"model": jnp.array([0.5, 2.0])})
    assert meta["model/log_rate"].shape == (3,)
    meta["model/log_rate"] = jnp.log(jnp.array(rates))
    expected = np.array([0.5, 2.0])
    for rate in [*rates, 0.05, 0.05]:
        expected = expected - rate * CURVATURE @ (expected - CENTRE)
    np.testing.assert_allclose(_adapt(start, meta, 5)["model"], expected, rtol=1e-12)


def test_learned_rates_start_equal_to_plain_gradient_descent():
    begin = {"model": jnp.array([0.5, 2.0])}
    plain = _adapt(fixed(optax.sgd(0.1)), begin, 4)["model"]
    for start in (per_step(4, 0.1, ("model",)), per_parameter({"model": 0.1}, ("model",))):
        np.testing.assert_allclose(_adapt(start, start.extend(begin), 4)["model"], plain, rtol=1e-6)


def test_a_direction_goes_before_the_learned_rate():
    begin = {"model": jnp.array([0.5, 2.0])}
    start = per_step(4, 0.1, ("model",), direction=optax.trace(0.9))
    momentum = _adapt(fixed(optax.sgd(0.1, momentum=0.9)), begin, 4)["model"]
    np.testing.assert_allclose(_adapt(start, start.extend(begin), 4)["model"], momentum, rtol=1e-6)


def test_a_reset_player_begins_at_its_value_whatever_the_meta_parameters_say():
    game = cooperative(lambda p, key, batch: (jnp.square(p["weights"] + p["context"] - 3.0).sum(), {}), ("context",))
    start = reset({"context": jnp.zeros(1)}, optax.sgd(0.25))
    meta = start.extend({"weights": jnp.ones(1), "context": jnp.full(1, 50.0)})
    assert set(meta) == {"weights"}
    adapted, _ = unroll(vector_field(game), start, 1)(meta, jax.random.key(0), None)
    assert adapted["context"].tolist() == [1.0]
    assert adapted["weights"].tolist() == [1.0]


def test_a_learned_rule_reads_its_parameters_from_its_player_and_can_be_differentiated():
    start = learned(lambda psi: optax.sgd(jnp.exp(psi)), jnp.log(0.1))
    meta = start.extend({"model": jnp.array([0.5, 2.0])})
    plain = _adapt(fixed(optax.sgd(0.1)), {"model": jnp.array([0.5, 2.0])}, 3)
    adapted = _adapt(start, meta, 3)
    assert set(adapted) == {"model"}
    np.testing.assert_allclose(adapted["model"], plain["model"], rtol=1e-6)
    slope = jax.grad(lambda psi: _adapt(start, {**meta, "rule": psi}, 3)["model"].sum())(meta["rule"])
    assert abs(float(slope)) > 1e-3


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_not_positive_is_refused(rate):
    with pytest.raises(ValueError, match="positive finite"):
        per_step(2, rate, ("model",))


def test_missing_rates_and_unknown_players_are_named():
    with pytest.raises(ValueError, match=r"model/log_rate.*extend"):
        per_step(2, 0.1, ("model",))({"model": jnp.zeros(1)})
    with pytest.raises(ValueError, match=r"\['head'\].*\['model'\]"):
        per_parameter(0.1, ("head",)).extend({"model": jnp.zeros(1)})
    with pytest.raises(ValueError, match="at least one step"):
        per_step(0, 0.1, ("model",))
