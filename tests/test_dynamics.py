"""Dynamics against closed forms on the bilinear game L_x = x y, L_y = -x y, whose field is (y, -x)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import bilinear, finite_difference, flat, points, tiny_images

import metagen_jax as mg
from metagen_jax.dynamics import alternating, consensus, extragradient, in_turns, unrolled

BEGIN = np.array([0.7, -1.3])
RATE, STEPS = 0.2, 6


def game(params, key, batch):
    del key, batch
    return {"x": params["x"] * params["y"], "y": -params["x"] * params["y"]}, {}


def _params(values=BEGIN):
    return {"x": jnp.asarray(values[0]), "y": jnp.asarray(values[1])}


def _walk(field, num_steps=STEPS, rule=None, begin=BEGIN):
    """Return the players' place after some steps, through the inner loop."""
    adapt = mg.unroll(field, mg.fixed(rule or optax.sgd(RATE)), num_steps)
    params, trace = jax.jit(adapt)(_params(begin), jax.random.key(0), points([[0.0]]))
    return np.array([params["x"], params["y"]]), trace


def _power(matrix, num_steps=STEPS):
    return np.linalg.matrix_power(np.asarray(matrix), num_steps) @ BEGIN


@pytest.fixture(autouse=True)
def _precise(x64):
    """Closed forms are compared in 64-bit floats."""


def test_simultaneous_steps_grow_by_the_root_of_one_plus_the_squared_rate():
    place, _ = _walk(mg.vector_field(game))
    np.testing.assert_allclose(place, _power([[1, -RATE], [RATE, 1]]), rtol=1e-12)
    growth = (1 + RATE**2) ** (STEPS / 2)
    np.testing.assert_allclose(np.linalg.norm(place), growth * np.linalg.norm(BEGIN), rtol=1e-12)


def test_alternating_steps_match_their_matrix_and_stay_bounded():
    field = alternating(["x", "y"])(game, None)
    matrix = np.array([[1, -RATE], [RATE, 1 - RATE**2]])  # y moves at where x has moved to
    np.testing.assert_allclose(_walk(field)[0], _power(matrix), rtol=1e-12)
    np.testing.assert_allclose(np.linalg.det(matrix), 1.0)
    far, _ = _walk(field, 2000)
    assert np.linalg.norm(far) < 2 * np.linalg.norm(BEGIN)


def test_a_critic_takes_its_extra_moves_before_the_other_side():
    field = alternating(["y", "y", "y", "x"])(game, None)
    critic, other = np.array([[1, 0], [RATE, 1]]), np.array([[1, -RATE], [0, 1]])
    np.testing.assert_allclose(_walk(field)[0], _power(other @ critic @ critic @ critic), rtol=1e-12)


def test_extragradient_matches_its_matrix_and_shrinks():
    ahead = 0.3
    place, _ = _walk(extragradient(mg.vector_field(game), ahead))
    np.testing.assert_allclose(place, _power([[1 - RATE * ahead, -RATE], [RATE, 1 - RATE * ahead]]), rtol=1e-12)
    assert np.linalg.norm(place) < np.linalg.norm(BEGIN)
    each = extragradient(mg.vector_field(game), {"x": 0.1, "y": 0.5})(_params(), jax.random.key(0), None)[0]
    np.testing.assert_allclose(each["x"], BEGIN[1] + 0.5 * BEGIN[0], rtol=1e-12)  # at where y would be
    np.testing.assert_allclose(each["y"], -(BEGIN[0] - 0.1 * BEGIN[1]), rtol=1e-12)


def test_consensus_matches_its_matrix_and_shrinks():
    weight = 0.4
    place, _ = _walk(consensus(mg.vector_field(game), weight))
    np.testing.assert_allclose(place, _power([[1 - RATE * weight, -RATE], [RATE, 1 - RATE * weight]]), rtol=1e-12)
    assert np.linalg.norm(place) < np.linalg.norm(BEGIN)


def test_consensus_is_the_gradient_of_half_the_squared_field_on_a_game_that_is_not_bilinear():
    batch, params, key = points([[0.2]]), _params(), jax.random.key(0)
    field = mg.vector_field(bilinear(0.3))
    direction = {"x": jnp.array(0.6), "y": jnp.array(-0.8)}

    def half_norm(params):
        return 0.5 * sum(float(leaf) ** 2 for leaf in jax.tree.leaves(field(params, jax.random.clone(key), batch)[0]))

    plain, _ = field(params, jax.random.clone(key), batch)
    whole, metrics = consensus(field, 1.0)(params, jax.random.clone(key), batch)
    pull = flat(whole) - flat(plain)
    np.testing.assert_allclose(pull @ flat(direction), finite_difference(half_norm, params, direction), rtol=1e-6)
    assert "cross" in metrics


def test_a_player_with_foresight_is_judged_against_rivals_that_have_moved_and_differentiates_through_them():
    num_steps, ahead = 3, 0.25
    foreseen = unrolled(game, ["x"], ["y"], num_steps, ahead)
    losses, _ = foreseen(_params(), jax.random.key(0), None)
    x, y = BEGIN
    np.testing.assert_allclose(losses["x"], x * (y + num_steps * ahead * x), rtol=1e-12)  # y_k = y + k b x
    np.testing.assert_allclose(losses["y"], -x * y, rtol=1e-12)
    directions, _ = mg.vector_field(foreseen)(_params(), jax.random.key(0), None)
    np.testing.assert_allclose(directions["x"], y + 2 * num_steps * ahead * x, rtol=1e-12)
    np.testing.assert_allclose(directions["y"], -x, rtol=1e-12)
    blind, _ = unrolled(game, ["x"], ["y"], 0, ahead)(_params(), jax.random.key(0), None)
    np.testing.assert_allclose(blind["x"], x * y, rtol=1e-12)


def test_rules_keep_a_state_for_each_side_that_advances_in_its_own_turns_only():
    decay = 0.5
    place, _ = _walk(alternating(["y", "y", "x"])(game, None), 2, optax.sgd(RATE, momentum=decay))
    (x, y), velocity = BEGIN, {"x": 0.0, "y": 0.0}
    for _ in range(2):
        for _ in range(2):
            velocity["y"] = decay * velocity["y"] - x
            y = y - RATE * velocity["y"]
        velocity["x"] = decay * velocity["x"] + y
        x = x - RATE * velocity["x"]
    np.testing.assert_allclose(place, [x, y], rtol=1e-12)


def test_the_trace_of_turns_names_every_side_s_loss():
    _, trace = _walk(alternating(["y", "x"])(game, None), 2)
    assert set(trace) == {"loss/x", "loss/y"}
    moved = BEGIN[1] + RATE * BEGIN[0]
    np.testing.assert_allclose(trace["loss/y"][0], -BEGIN[0] * BEGIN[1], rtol=1e-12)
    np.testing.assert_allclose(trace["loss/x"][0], BEGIN[0] * moved, rtol=1e-12)


def test_only_those_who_move_take_part_in_the_turns():
    (field,) = alternating([["y", "z"], ["x"]])(game, ["y"])
    assert set(field(_params(), jax.random.key(0), None)[0]) == {"y"}
    place, _ = _walk(alternating([["y"], ["x"]])(game, ["y"]), 3)
    np.testing.assert_allclose(place, [BEGIN[0], BEGIN[1] + 3 * RATE * BEGIN[0]], rtol=1e-12)


def test_the_path_of_turns_meets_the_adapter_at_every_step():
    field = alternating(["y", "x"])(game, None)
    path = mg.trajectory(field, mg.fixed(optax.sgd(RATE)))
    after, _ = jax.jit(path, static_argnums=3)(_params(), jax.random.key(0), points([[0.0]]), 3)
    places = np.stack([after["x"], after["y"]], 1)
    np.testing.assert_allclose(places, [_walk(field, k)[0] for k in range(4)], rtol=1e-12)


DYNAMICS = {
    "simultaneous": mg.vector_field,
    "alternating": alternating(["y", "y", "x"]),
    "extragradient": lambda game, players=None: extragradient(mg.vector_field(game, players), 0.2),
    "consensus": lambda game, players=None: consensus(mg.vector_field(game, players), 0.1),
    "unrolled": lambda game, players=None: mg.vector_field(unrolled(game, ["x"], ["y"], 2, 0.1), players),
}


@pytest.mark.parametrize("name", DYNAMICS)
def test_the_meta_gradient_through_the_dynamics_equals_finite_differences_for_every_player(name):
    model = mg.Model(lambda key: _params(), bilinear(0.2), lambda params, key, num: jnp.zeros(num))
    start = mg.per_step(3, {"x": 0.1, "y": 0.2}, ("x", "y"))
    learner = mg.maml(model, start, 3, dynamics=DYNAMICS[name])
    meta, task = learner.init(jax.random.key(0)), mg.Task(points([[0.2]]), points([[0.6]]))
    gradient, _ = jax.jit(learner.field)(meta, jax.random.key(0), task)
    rng = np.random.default_rng(1)
    for player in meta:
        owner = player[0]

        @jax.jit
        def own_loss(meta, owner=owner):
            params, _ = learner.adapt(meta, jax.random.key(1), task.support)
            return model.game(params, jax.random.key(1), task.query)[0][owner]

        along = {other: jnp.asarray(rng.normal(size=tree.shape)) * (other == player) for other, tree in meta.items()}
        slope = flat(gradient[player]) @ flat(along[player])
        assert abs(slope) > 1e-5
        np.testing.assert_allclose(slope, finite_difference(own_loss, meta, along), rtol=1e-6)


def test_turns_have_equal_meta_gradients_by_both_routes_of_the_inner_gradient():
    model = mg.Model(lambda key: _params(), bilinear(0.2), lambda params, key, num: jnp.zeros(num))
    task, found = mg.Task(points([[0.2]]), points([[0.6]])), []
    for options in ({}, {"inner_grad": "forward_over_reverse", "remat": "nested"}):
        learner = mg.maml(model, mg.fixed(optax.sgd(0.1)), 4, dynamics=DYNAMICS["alternating"], **options)
        found.append(flat(learner.field(_params(), jax.random.key(0), task)[0]))
    np.testing.assert_allclose(*found, rtol=1e-12)


def test_without_shaping_the_path_through_what_the_rival_has_adapted_to_is_left_out():
    """One simultaneous step each: x' = x - a y, y' = y + a x; L_x = x' y' on the query."""
    model = mg.Model(lambda key: _params(), game, lambda params, key, num: jnp.zeros(num))
    task = mg.Task(points([[0.0]]), points([[0.0]]))
    x, y = BEGIN
    x_after, y_after = x - RATE * y, y + RATE * x
    whole, own = (
        mg.maml(model, mg.fixed(optax.sgd(RATE)), 1, shaping=shaping).field(_params(), jax.random.key(0), task)[0]
        for shaping in (True, False)
    )
    np.testing.assert_allclose(whole["x"], y_after + x_after * RATE, rtol=1e-12)  # d y' / d x = a
    np.testing.assert_allclose(whole["y"], -x_after + y_after * RATE, rtol=1e-12)  # d x' / d y = -a
    np.testing.assert_allclose(own["x"], y_after, rtol=1e-12)
    np.testing.assert_allclose(own["y"], -x_after, rtol=1e-12)


def test_without_shaping_losses_metrics_and_field_stay_and_partners_still_share_a_loss():
    plain, apart = bilinear(0.3), mg.without_shaping(bilinear(0.3))
    batch, key = points([[0.2]]), jax.random.key(0)
    for one, other in zip(plain(_params(), key, batch), apart(_params(), jax.random.clone(key), batch), strict=True):
        assert {name: float(value) for name, value in one.items()} == {name: float(v) for name, v in other.items()}
    fields = [mg.vector_field(each)(_params(), jax.random.clone(key), batch)[0] for each in (plain, apart)]
    np.testing.assert_allclose(flat(fields[0]), flat(fields[1]), rtol=1e-12)
    shared = mg.cooperative(lambda params, key, batch: (params["x"] * params["y"], {}), ("x", "y"))
    losses, _ = mg.without_shaping(shared)(_params(), key, batch)
    assert losses["x"] is losses["y"]


# In any optax loop


def _descend(rule, num_updates, begin=BEGIN):
    params, field = _params(begin), mg.vector_field(game)
    state = rule.init(params)
    for _ in range(num_updates):
        updates, state = rule.update(field(params, jax.random.key(0), None)[0], state, params)
        params = optax.apply_updates(params, updates)
    return np.array([params["x"], params["y"]]), state


def test_a_rule_in_turns_takes_the_same_steps_as_alternating():
    place, _ = _descend(in_turns(optax.sgd(RATE, momentum=0.5), ["y", "y", "x"]), 6)
    rule = optax.sgd(RATE, momentum=0.5)
    np.testing.assert_allclose(place, _walk(alternating(["y", "y", "x"])(game, None), 2, rule)[0], rtol=1e-12)


def test_in_turns_those_who_wait_keep_their_optimiser_state():
    _, (count, states) = _descend(in_turns(optax.adam(RATE), ["y", "y", "x"]), 5)
    assert int(count) == 5
    assert [int(state[0].count) for state in states] == [4, 1, 5]  # y, x, and those that no turn names


def test_in_turns_learned_rates_move_with_their_owner_and_the_rest_always():
    params = {"x": jnp.ones(2), "y": jnp.ones(2), "x/log_rate": jnp.ones(2), "rule": jnp.ones(2)}
    rule = in_turns(optax.sgd(1.0), ["y", "x"])
    state = rule.init(params)
    moved = []
    for _ in range(2):
        updates, state = rule.update(params, state, params)
        moved.append({name for name, update in updates.items() if flat(update).any()})
    assert moved == [{"y", "rule"}, {"x", "x/log_rate", "rule"}]


def test_a_rule_in_turns_is_an_outer_rule_of_meta_training():
    model = mg.Model(lambda key: _params(), bilinear(0.2), lambda params, key, num: jnp.zeros(num))
    learner = mg.maml(model, mg.fixed(optax.sgd(0.1)), 2)
    family = mg.episodes(tiny_images(), 2, 3)
    sampler, optimizer = mg.uniform(family, 2), in_turns(optax.sgd(0.1), ["y", "x"])
    step = jax.jit(mg.make_step(learner, family, sampler, optimizer))
    state = mg.init_state(learner, sampler, optimizer, jax.random.key(0))
    places = [flat(state.meta)]
    for _ in range(4):
        state, _ = step(state, family.data)
        places.append(flat(state.meta))
    moved = np.abs(np.diff(places, axis=0)) > 0
    np.testing.assert_array_equal(moved, [[False, True], [True, False]] * 2)


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: alternating([]), "at least one turn"),
        (lambda: alternating("xy"), "at least one turn"),
        (lambda: alternating([["x"], []]), "at least one turn"),
        (lambda: alternating(["y"])(game, ["x", "y"]), r"leave no move to \['x'\]"),
        (lambda: alternating(["y"])(game, ["x"]), "leave no move"),
        (lambda: extragradient(mg.vector_field(game), 0.0), "must be positive, got 0"),
        (lambda: extragradient(mg.vector_field(game), {"x": 0.1, "y": -1.0}), "must be positive"),
        (lambda: _walk(extragradient(mg.vector_field(game), {"x": 0.1}), 1), "no rate for 'y', only for"),
        (lambda: consensus(mg.vector_field(game), -0.1), "at least 0, got -0.1"),
        (lambda: unrolled(game, ["x"], ["x", "y"], 2, 0.1), "rivals that are not among the players"),
        (lambda: unrolled(game, ["x"], ["y"], -1, 0.1), "num_steps=-1"),
        (lambda: in_turns(optax.sgd(0.1), []), "at least one turn"),
        (lambda: in_turns(optax.sgd(0.1), [["x"], ["x", "y"]]), "one group of players only"),
        (lambda: in_turns(optax.sgd(0.1), ["x", "z"]).init(_params()), r"name \['z'\], but the players are"),
        (lambda: mg.unroll((), mg.fixed(optax.sgd(0.1)), 1), "at least one turn, got none"),
        (lambda: _walk(alternating([["x", "y"], ["x"]])(game, None), 1), "one company only"),
    ],
)
def test_dynamics_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
