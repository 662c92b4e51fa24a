"""Learned rules against rules that they contain, equations by hand, finite differences, and what must not matter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import bilinear, finite_difference, flat, noisy_net, points

import metagen_jax as mg
from metagen_jax.adapt.learned_rules import FLOOR, coordinate_lstm, coordinate_mlp
from metagen_jax.adapt.twins import following, rule_players, twins

RULES = {"mlp": coordinate_mlp((4, 3), rate=0.05), "lstm": coordinate_lstm(3, num_layers=2, rate=0.05)}
EACH = pytest.mark.parametrize("name", RULES)
PARAMS = {"a": jnp.array([[0.3, -0.2, 0.5], [1.0, 0.1, -0.7]]), "b": {"c": jnp.array([0.2, -0.4]), "d": jnp.array(0.6)}}


def random_psi(rule, seed=0, size=0.3):
    """Return parameters all of which matter, unlike those that a rule begins with."""
    leaves, structure = jax.tree.flatten(rule.init(jax.random.key(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [leaf + size * rng.normal(size=leaf.shape) for leaf in leaves])


def gradients(seed, like=PARAMS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), like)


def follow(rule, path, params=PARAMS):
    """Return the updates along a path of gradients, without a scan."""

    def along(path, params):
        state, found = rule.init(params), []
        for gradient in path:
            updates, state = rule.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            found.append(jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(updates)]))
        return jnp.stack(found)

    return np.asarray(jax.jit(along)(path, params))


def test_the_mlp_begins_as_adam_with_a_floor_relative_to_the_tensor():
    path = [gradients(seed) for seed in range(4)]
    found = follow(coordinate_mlp(rate=0.05).rule(coordinate_mlp(rate=0.05).init(jax.random.key(3))), path)
    averages, squares = np.zeros(9), np.zeros(9)
    for step, gradient in enumerate(map(flat, path), 1):
        averages, squares = 0.9 * averages + 0.1 * gradient, 0.999 * squares + 0.001 * gradient**2
        m, v = averages / (1 - 0.9**step), squares / (1 - 0.999**step)
        typical = np.concatenate([np.full(6, v[:6].mean()), np.full(2, v[6:8].mean()), v[8:]])
        np.testing.assert_allclose(found[step - 1], -0.05 * m / np.sqrt(v + FLOOR * typical), rtol=1e-4)


def test_a_hand_set_mlp_is_descent_normalised_by_tensor():
    rule = coordinate_mlp((4,))
    psi = rule.init(jax.random.key(0))
    psi["direct"] = jnp.zeros_like(psi["direct"]).at[0].set(1.0)
    psi["log_rate"] = jnp.log(0.2)
    gradient = gradients(1)
    norms = jax.tree.map(lambda leaf: jnp.sqrt(jnp.square(leaf).mean()), gradient)
    expected = flat(jax.tree.map(lambda leaf, norm: -0.2 * leaf / norm, gradient, norms))
    np.testing.assert_allclose(follow(rule.rule(psi), [gradient])[0], expected, rtol=1e-5)


def test_the_mlp_does_not_notice_the_scale_of_the_loss():
    rule = coordinate_mlp().rule(random_psi(coordinate_mlp()))
    path = [gradients(seed) for seed in range(3)]
    found = follow(rule, path)
    for scale in (1e-6, 1e6):
        scaled = [jax.tree.map(lambda leaf, scale=scale: scale * leaf, gradient) for gradient in path]
        np.testing.assert_allclose(follow(rule, scaled), found, rtol=2e-3, atol=1e-6)


def test_the_magnitude_multiplies_the_rate_within_its_bound():
    rule = coordinate_mlp((2,), rate=0.05)
    psi = rule.init(jax.random.key(0))
    path = [gradients(0)]
    plain = follow(rule.rule(psi), path)
    for bias, factor in ((1.0, np.exp(3 * np.tanh(1 / 3))), (1e6, np.exp(3.0))):
        psi["layers"][-1]["bias"] = jnp.array([bias, 0.0])
        np.testing.assert_allclose(follow(rule.rule(psi), path), factor * plain, rtol=1e-5)


def test_the_lstm_is_the_cell_of_flax_on_the_logarithms_of_gradients():
    hidden, rule = 3, coordinate_lstm(3, num_layers=1)
    psi = random_psi(rule)
    gradient = np.array([2.0, -1e-3, 1e-5, 0.0, -np.exp(-10) / 2], np.float32)
    x = [[np.log(2) / 10, 1], [np.log(1e-3) / 10, -1], [-1, np.exp(10) * 1e-5], [-1, 0], [-1, -0.5]]
    kernel, bias = psi["cells"][0]["kernel"], np.array(psi["cells"][0]["bias"])
    bias[hidden : 2 * hidden] += 1  # the gate that keeps begins open
    names = ("i", "f", "g", "o")
    gates = {name: slice(hidden * at, hidden * (at + 1)) for at, name in enumerate(names)}
    params = {f"i{name}": {"kernel": kernel[rows, :2].T} for name, rows in gates.items()}
    params |= {f"h{name}": {"kernel": kernel[rows, 2:].T, "bias": bias[rows]} for name, rows in gates.items()}
    carry, cell = (jnp.zeros((5, hidden)),) * 2, nn.OptimizedLSTMCell(hidden)
    expected = []
    for _ in range(3):
        carry, output = cell.apply({"params": params}, carry, jnp.asarray(x, jnp.float32))
        expected.append(np.exp(psi["log_rate"]) * (output @ psi["output"] - jnp.asarray(x) @ psi["direct"]))
    params = {"p": jnp.zeros(5)}
    np.testing.assert_allclose(follow(rule.rule(psi), [{"p": jnp.asarray(gradient)}] * 3, params), expected, rtol=2e-5)


def test_the_lstm_begins_as_descent_by_signs():
    rule = coordinate_lstm(rate=0.05)
    gradient = gradients(0)
    found = follow(rule.rule(rule.init(jax.random.key(0))), [gradient] * 2)
    np.testing.assert_allclose(found, np.stack([-0.05 * np.sign(flat(gradient))] * 2), atol=2e-3)


@EACH
def test_what_a_rule_does_follows_its_coordinates_wherever_they_are(name):
    """Permuted within a tensor, or in a tensor of another shape, a coordinate moves as it did."""
    rule = RULES[name].rule(random_psi(RULES[name]))
    order = np.random.default_rng(0).permutation(12)
    params = {"p": gradients(9, {"p": jnp.zeros(12)})["p"]}
    path = [gradients(seed, params) for seed in range(3)]
    found = follow(rule, path, params)
    assert np.abs(found - found[:, :1]).max() > 1e-3

    def permuted(tree):
        return {"p": tree["p"][order].reshape(3, 4)}

    other = follow(rule, [permuted(gradient) for gradient in path], permuted(params))
    np.testing.assert_allclose(other, found[:, order], rtol=1e-4, atol=1e-6)


@EACH
def test_zero_entries_and_tensors_without_any_gradient_have_finite_second_derivatives(name):
    rule = RULES[name]

    def moved(psi, curvature):
        params, transform = {"still": jnp.zeros(2), "moves": jnp.array([1.0, 0.0])}, rule.rule(psi)
        state = transform.init(params)
        for _ in range(3):
            gradient = {"still": curvature * params["still"] ** 2, "moves": curvature * params["moves"]}
            updates, state = transform.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.square(params["moves"]).sum() + params["still"].sum()

    of_psi, of_curvature = jax.jit(jax.grad(moved, (0, 1)))(random_psi(rule), 0.5)
    assert np.isfinite(of_curvature)
    assert np.isfinite(flat(of_psi)).all()
    assert np.abs(flat(of_psi)).max() > 1e-3


@EACH
def test_the_meta_gradient_of_psi_equals_finite_differences_and_a_loop_without_a_scan(x64, name):
    model, rule = noisy_net(), RULES[name]
    start = following(rule, jax.random.key(1))
    adapt = mg.unroll(mg.vector_field(model.game), start, 2)
    task = points(np.random.default_rng(0).normal(size=(3, 6)))
    meta = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(jax.random.key(0)))
    psi = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), random_psi(rule))

    @jax.jit
    def scanned(psi):
        params, _ = adapt({**meta, "rule": psi}, jax.random.key(2), task)
        return model.game(params, jax.random.key(3), task)[0]["head"]

    def looped(psi):
        params, transform = meta, rule.rule(psi)
        state = transform.init(params)
        for index in range(2):
            key = jax.random.fold_in(jax.random.key(2), index)
            gradient = jax.grad(lambda p, key=key: model.game(p, key, task)[0]["head"])(params)
            updates, state = transform.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return model.game(params, jax.random.key(3), task)[0]["head"]

    gradient = jax.jit(jax.grad(scanned))(psi)
    np.testing.assert_allclose(flat(jax.jit(jax.grad(looped))(psi)), flat(gradient), rtol=1e-8, atol=1e-12)
    along = jax.tree.map(jnp.asarray, gradients(1, psi))
    for part in psi:  # each on its own, so that a small part cannot hide behind a large one
        only = {name: jax.tree.map(lambda leaf, on=name == part: on * leaf, tree) for name, tree in along.items()}
        slope = flat(gradient) @ flat(only)
        assert abs(slope) > 1e-4
        np.testing.assert_allclose(slope, finite_difference(scanned, psi, only), rtol=1e-5)


@EACH
def test_each_task_begins_with_a_memory_of_its_own(name):
    """A task is adapted to as if it were alone, whatever is beside it or was before it."""
    model, rule = noisy_net(), RULES[name]
    meta = {**model.init(jax.random.key(0)), "rule": random_psi(rule, size=0.1)}
    adapt = mg.unroll(mg.vector_field(model.game), following(rule, jax.random.key(1)), 3)
    tasks = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[points(np.random.default_rng(s).normal(size=(3, 6))) for s in (0, 1)]
    )
    keys = jax.random.split(jax.random.key(2), 2)
    together, _ = jax.jit(jax.vmap(adapt, in_axes=(None, 0, 0)))(meta, keys, tasks)
    _, in_turn = jax.lax.scan(
        lambda nothing, task: (nothing, adapt(meta, *task)[0]), None, (jax.random.clone(keys), tasks)
    )
    np.testing.assert_allclose(flat(in_turn), flat(together), rtol=1e-5, atol=1e-6)
    first, second = (np.asarray(together["body"][index]) for index in (0, 1))
    assert np.abs(first - second).max() > 1e-3


SIDES = {"x": ("x",), "y": ("y",)}
PAIR = twins({"x": coordinate_mlp((2,), rate=0.1), "y": coordinate_lstm(2, num_layers=1, rate=0.2)}, SIDES)
GAME = {
    "simultaneous": lambda: mg.vector_field(bilinear(0.2)),
    "alternating": lambda: mg.alternating(["y", "x"])(bilinear(0.2), None),
}


def _bilinear_meta():
    begin = {"x": jnp.array(0.7), "y": jnp.array(-1.3)}
    return {**begin, **{f"{side}/rule": random_psi(PAIR.rules[side], seed=3, size=0.1) for side in SIDES}}


@pytest.mark.parametrize("dynamics", GAME)
def test_each_twin_moves_its_own_side_as_it_would_alone(dynamics):
    meta, support = _bilinear_meta(), points([[0.3]])
    fields = GAME[dynamics]()
    adapt = jax.jit(mg.unroll(fields, following(PAIR, jax.random.key(0)), 3))
    found, _ = adapt(meta, jax.random.key(1), support)

    @jax.jit
    def alone(meta):
        params = {side: meta[side] for side in SIDES}
        rules = {side: PAIR.rules[side].rule(meta[f"{side}/rule"]) for side in SIDES}
        states = {side: rules[side].init({side: params[side]}) for side in SIDES}
        for _ in range(3):
            for turn in (("x", "y"),) if dynamics == "simultaneous" else (("y",), ("x",)):
                slopes = {s: jax.grad(lambda p, s=s: bilinear(0.2)(p, None, support)[0][s])(params)[s] for s in turn}
                for side in turn:
                    here = {side: params[side]}
                    updates, states[side] = rules[side].update({side: slopes[side]}, states[side], here)
                    params = {**params, **optax.apply_updates(here, updates)}
        return params

    np.testing.assert_allclose(flat(found), flat(alone(meta)), rtol=1e-5)


def test_the_first_move_of_a_side_depends_on_its_own_twin_only():
    meta, support = _bilinear_meta(), points([[0.3]])
    adapt = jax.jit(mg.unroll(mg.vector_field(bilinear(0.2)), following(PAIR, jax.random.key(0)), 1))
    before, _ = adapt(meta, jax.random.key(1), support)
    other = {**meta, "x/rule": jax.tree.map(lambda leaf: leaf + 0.1, meta["x/rule"])}
    after, _ = adapt(other, jax.random.key(1), support)
    assert after["y"] == before["y"]
    assert abs(after["x"] - before["x"]) > 1e-3


def test_twins_of_one_kind_begin_with_parameters_of_their_own():
    pair = twins(dict.fromkeys("xy", coordinate_lstm(2)), SIDES)
    meta = following(pair, jax.random.key(0)).extend({})
    assert tuple(meta) == rule_players(pair) == ("x/rule", "y/rule")
    assert np.abs(flat(meta["x/rule"]) - flat(meta["y/rule"])).max() > 0.1


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="hidden layer"):
        coordinate_mlp((0,))
    with pytest.raises(ValueError, match=r"decays in \[0, 1\)"):
        coordinate_mlp(decays=(1.0,))
    with pytest.raises(ValueError, match="positive finite"):
        coordinate_lstm(rate=0.0)
    with pytest.raises(ValueError, match="one layer"):
        coordinate_lstm(num_layers=0)
    with pytest.raises(ValueError, match="no player on two sides"):
        twins(dict.fromkeys("xy", coordinate_mlp()), {"x": ("a",), "y": ("a",)})
    with pytest.raises(ValueError, match="meta has"):
        following(PAIR, jax.random.key(0))({"x": jnp.zeros(())})
    with pytest.raises(ValueError, match="on no side"):
        following(PAIR, jax.random.key(0))(_bilinear_meta())[1].init({"z": jnp.zeros(2)})
    rule = coordinate_mlp().rule(coordinate_mlp().init(jax.random.key(0)))
    with pytest.raises(ValueError, match="sees parameters"):
        rule.update(PARAMS, rule.init(PARAMS))
