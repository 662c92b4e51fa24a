"""The learner whose rule is learned: equal to what it contains, to finite differences, and to itself by other means."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import agree_with_finite_differences, bilinear, flat, noisy_net, points, quadratic_model, quadratic_task

import metagen_jax as mg
from metagen_jax.adapt.learned_rules import LearnedRule, coordinate_lstm, coordinate_mlp
from metagen_jax.adapt.twins import twins
from metagen_jax.meta.common_reward import duality_gap
from metagen_jax.meta.learners.learned_optimizer import learned_optimizer

CURVATURE = np.array([[2.0, 0.3], [0.3, 0.5]])
DESCENT = LearnedRule(lambda key: jnp.log(0.2), lambda psi: optax.sgd(jnp.exp(psi)))
MODEL = quadratic_model(jnp.asarray(CURVATURE, jnp.float32))
MOMENTUM = LearnedRule(
    lambda key: {"rate": jnp.array(0.05), "decay": jnp.array(0.5)},
    lambda psi: optax.chain(optax.trace(psi["decay"]), optax.scale(-psi["rate"])),
)
"""Cheap to compile, and with a memory."""


def _task(seed=0):
    rng = np.random.default_rng(seed)
    return mg.Task(points(rng.normal(size=(3, 6))), points(rng.normal(size=(4, 6))))


def _shaken(rule, key=0, size=0.2):
    psi = rule.init(jax.random.key(0))
    rng = np.random.default_rng(key)
    return jax.tree.map(lambda leaf: leaf + size * rng.normal(size=leaf.shape).astype(leaf.dtype), psi)


def test_a_rule_set_to_descent_is_maml_with_a_closed_form_for_its_rate():
    task = quadratic_task(np.random.default_rng(0), 2)
    learner = learned_optimizer(MODEL, DESCENT, 3, learns=None)
    meta = {**learner.init(jax.random.key(0)), "model": jnp.array([0.5, 2.0])}
    direction, _ = learner.field(meta, jax.random.key(0), task)
    plain = mg.maml(MODEL, mg.fixed(optax.sgd(0.2)), 3)
    expected, _ = plain.field({"model": meta["model"]}, jax.random.key(0), task)
    np.testing.assert_allclose(direction["model"], expected["model"], rtol=1e-5)
    # d phi_3 / d rate = -3 A (I - rate A)^2 (phi_0 - s)
    support, query = (np.asarray(half.x).mean(0) for half in task)
    shrink, away = np.eye(2) - 0.2 * CURVATURE, np.array([0.5, 2.0]) - support
    adapted = support + np.linalg.matrix_power(shrink, 3) @ away
    slope = -3 * CURVATURE @ np.linalg.matrix_power(shrink, 2) @ away
    np.testing.assert_allclose(direction["rule"], 0.2 * slope @ CURVATURE @ (adapted - query), rtol=1e-4)


def test_the_field_of_a_rule_and_a_beginning_equals_finite_differences(x64):
    model = noisy_net()
    learner = learned_optimizer(model, MOMENTUM, 2, learns=None)
    meta = learner.init(jax.random.key(1))
    meta = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), meta)
    task = _task()
    field = jax.jit(lambda meta: learner.field(meta, jax.random.key(2), task))

    def reported(meta):
        direction, metrics = field(meta)
        return direction, {**metrics, **{f"loss/{name}": metrics["loss"] for name in meta}}

    agree_with_finite_differences(reported, meta, 1e-5, partners=())


def test_what_is_not_learned_has_no_entry_in_the_field_and_stays_in_training():
    model, family = noisy_net(), _family()
    learner = learned_optimizer(model, MOMENTUM, 2)
    state = mg.init_state(learner, mg.uniform(family, 2), optax.adam(0.01), jax.random.key(0))
    direction, _ = jax.eval_shape(learner.field, state.meta, jax.random.key(0), _task())
    assert set(direction) == {"rule"}
    before = jax.tree.map(np.asarray, state.meta)
    step = mg.make_step(learner, family, mg.uniform(family, 2), optax.adam(0.01))
    state = mg.train(step, state, None, 3)
    np.testing.assert_array_equal(state.meta["body"], before["body"])
    assert np.abs(flat(state.meta["rule"]) - flat(before["rule"])).max() > 1e-3
    some = learned_optimizer(model, MOMENTUM, 2, learns=("head",))
    direction, _ = jax.eval_shape(some.field, some.init(jax.random.key(0)), jax.random.key(0), _task())
    assert set(direction) == {"head", "rule"}


def _family():
    def make(data, key, spec):
        del data, spec
        x = jax.random.normal(key, (7, 6))
        both = mg.Examples(x, jnp.zeros(7, jnp.int32), jnp.ones(7))
        return mg.Task(jax.tree.map(lambda leaf: leaf[:3], both), jax.tree.map(lambda leaf: leaf[3:], both))

    return mg.TaskFamily(None, lambda data, key: jnp.zeros(1, jnp.int32), make)


def test_meta_training_a_rule_makes_it_better_on_new_tasks():
    """From a rate that is far too small, on quadratics that all have one curvature."""
    rule = coordinate_mlp((4,), rate=1e-3)
    learner = learned_optimizer(MODEL, rule, 5)

    def make(data, key, spec):
        del data, spec
        x = jnp.broadcast_to(jax.random.normal(key, (1, 2)), (4, 2))
        examples = mg.Examples(x, jnp.zeros(4, jnp.int32), jnp.ones(4))
        return mg.Task(examples, examples)

    family = mg.TaskFamily(None, lambda data, key: jnp.zeros(1, jnp.int32), make)
    sampler, optimizer = mg.uniform(family, 16), optax.adam(0.05)
    state = mg.init_state(learner, sampler, optimizer, jax.random.key(0))
    losses = []
    step = mg.make_step(learner, family, sampler, optimizer)
    mg.train(step, state, None, 100, chunk=100, on_chunk=lambda state, metrics: losses.extend(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.3 * np.mean(losses[:10])


def test_a_fresh_beginning_is_drawn_for_each_task_and_the_path_meets_the_adapter():
    model = noisy_net()
    learner = learned_optimizer(model, MOMENTUM, 2, fresh=True)
    meta = learner.init(jax.random.key(0))
    assert set(meta) == {"rule"}
    keys, support = jax.random.split(jax.random.key(1), 2), _task().support
    adapted, _ = jax.jit(jax.vmap(learner.adapt, in_axes=(None, 0, None)))(meta, keys, support)
    path, _ = jax.jit(jax.vmap(learner.path, in_axes=(None, 0, None, None)), static_argnums=3)(
        meta, jax.random.clone(keys), support, 2
    )
    np.testing.assert_allclose(flat(jax.tree.map(lambda leaf: leaf[:, 2], path)), flat(adapted), rtol=1e-5, atol=1e-6)
    begin = np.asarray(path["body"][:, 0])
    assert np.abs(begin[0] - begin[1]).max() > 0.1
    direction, metrics = jax.jit(learner.field)(meta, jax.random.key(2), _task())
    assert set(direction) == {"rule"}
    assert np.isfinite(metrics["loss"])


def test_evolution_and_through_agree_on_a_rule_within_the_standard_error():
    task = quadratic_task(np.random.default_rng(0), 2)
    # one step of descent: the loss is quadratic in the rate, so that smoothing it changes no gradient
    rule = LearnedRule(lambda key: jnp.array(0.2), lambda psi: optax.sgd(psi))
    learner = learned_optimizer(MODEL, rule, 1)
    meta = {**learner.init(jax.random.key(0)), "model": jnp.array([0.5, 2.0])}
    exact, _ = learner.field(meta, jax.random.key(0), task)
    field = learned_optimizer(MODEL, rule, 1, outer="evolution", sigma=0.1, num_pairs=1).field
    keys = jax.random.split(jax.random.key(1), 4000)
    directions, _ = jax.jit(jax.vmap(field, in_axes=(None, 0, None)))(meta, keys, task)
    assert set(directions) == {"rule"}
    samples = np.asarray(directions["rule"])
    error = samples.std(ddof=1) / np.sqrt(len(samples))
    assert 0 < error < 0.1 * abs(float(exact["rule"]))
    assert abs(samples.mean() - float(exact["rule"])) < 4.5 * error


GAME = bilinear(0.2)
TWO = mg.Model(lambda key: {"x": jnp.array(0.7), "y": jnp.array(-1.3)}, GAME, lambda *a: jnp.zeros(1))
SIDES = {"x": ("x",), "y": ("y",)}
PAIR = twins({"x": coordinate_mlp((2,), rate=0.1), "y": coordinate_lstm(2, num_layers=1, rate=0.2)}, SIDES)
TASK = mg.Task(points([[0.2]]), points([[0.6]]))


def _twins(**options):
    learner = learned_optimizer(TWO, PAIR, 3, **options)
    meta = learner.init(jax.random.key(0)) | {f"{side}/rule": _shaken(PAIR.rules[side]) for side in SIDES}
    return learner, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), meta)


@pytest.mark.parametrize("dynamics", ["simultaneous", "alternating"])
def test_twins_without_a_judge_each_follow_the_loss_of_their_side(x64, dynamics):
    play = mg.vector_field if dynamics == "simultaneous" else mg.alternating(["y", "x"])
    learner, meta = _twins(dynamics=play)
    rules = {name: meta[name] for name in ("x/rule", "y/rule")}
    field = jax.jit(lambda rules: learner.field({**meta, **rules}, jax.random.key(1), TASK))

    def reported(rules):
        direction, metrics = field(rules)
        return direction, {**metrics, **{f"loss/{name}": metrics[f"loss/{name[0]}/rule"] for name in rules}}

    agree_with_finite_differences(reported, rules, 1e-5, partners=())


def test_twins_with_a_common_reward_both_follow_it(x64):
    learner, meta = _twins(judge=duality_gap(GAME, SIDES, 1, 0.1))
    rules = {name: meta[name] for name in ("x/rule", "y/rule")}
    field = jax.jit(lambda rules: learner.field({**meta, **rules}, jax.random.key(1), TASK))
    _, metrics = field(rules)
    assert "loss" in metrics
    agree_with_finite_differences(
        lambda rules: (field(rules)[0], {f"loss/{name}": field(rules)[1]["loss"] for name in rules}), rules, 1e-5, ()
    )


def test_twins_that_share_a_reward_learn_to_find_the_equilibrium_where_descent_circles():
    """Of the game x y, -x y: descent at any rate moves away from it."""

    def game(params, key, batch):
        del key
        shift = batch.x.mean()
        cross = (params["x"] - shift) * (params["y"] + shift)
        return {"x": cross, "y": -cross}, {}

    two = mg.Model(lambda key: {"x": jnp.array(0.7), "y": jnp.array(-1.3)}, game, lambda *a: jnp.zeros(1))
    pair = twins(dict.fromkeys("xy", coordinate_mlp((4,), rate=0.1)), SIDES)
    learner = learned_optimizer(two, pair, 8, judge=duality_gap(game, SIDES, 1, 0.5))

    def make(data, key, spec):
        del data, spec
        examples = points([[0.0]])._replace(x=0.5 * jax.random.normal(key, (1, 1)))
        return mg.Task(examples, examples)

    family = mg.TaskFamily(None, lambda data, key: jnp.zeros(1, jnp.int32), make)
    sampler, optimizer = mg.uniform(family, 16), optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.02))
    state = mg.init_state(learner, sampler, optimizer, jax.random.key(0))
    gaps = []
    step = mg.make_step(learner, family, sampler, optimizer)
    mg.train(step, state, None, 200, chunk=200, on_chunk=lambda state, metrics: gaps.extend(metrics["loss"]))
    assert np.mean(gaps[-20:]) < 0.2 * np.mean(gaps[:5])


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="outer must be one of"):
        learned_optimizer(MODEL, DESCENT, 1, outer="sideways")
    with pytest.raises(ValueError, match="no beginning is learned"):
        learned_optimizer(MODEL, DESCENT, 1, fresh=True, learns=("model",))
    with pytest.raises(ValueError, match="sigma > 0"):
        learned_optimizer(MODEL, DESCENT, 1, outer="evolution", num_pairs=0)
    with pytest.raises(ValueError, match="through rivals"):
        learned_optimizer(MODEL, DESCENT, 1, outer="evolution", shaping=False)
    learner = learned_optimizer(MODEL, DESCENT, 1, learns=("head",))
    with pytest.raises(ValueError, match="should move"):
        learner.field(learner.init(jax.random.key(0)), jax.random.key(0), quadratic_task(np.random.default_rng(0), 2))
