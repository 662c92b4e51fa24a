"""Persistent evolution strategies: unbiased where truncated ones are not, and particles that go on and begin again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import bilinear, flat, noisy_net, points

import metagen_jax as mg
from metagen_jax.adapt.learned_rules import LearnedRule
from metagen_jax.adapt.twins import twins
from metagen_jax.meta.evolution import normal_like
from metagen_jax.meta.learners.learned_optimizer import learned_optimizer
from metagen_jax.meta.persistent import persistent_evolution
from metagen_jax.persistent import init_persistent_state, make_persistent_step
from metagen_jax.sharding import bits, everywhere, here, task_mesh
from metagen_jax.train import run_chunk

HORIZON, SIGNS = 8, np.array([1.0, -1.0, -1.0, -1.0], np.float32)
SHIFT = 0.5 * (np.eye(4) + np.eye(4, k=1)).astype(np.float32)
ONE = mg.Task(points([[0.0]]), points([[0.0]]))


def _influence(theta):
    """x <- A x + theta (1, -1, -1, -1): at first theta moves x_0 up, and in the long run down.

    Source: Vicol, Metz & Sohl-Dickstein, 2021, section 5.1 (influence balancing).
    """

    def update(updates, state, params=None):
        del updates
        return {"x": SHIFT @ params["x"] - params["x"] + theta * SIGNS}, state

    return optax.GradientTransformation(lambda params: (), update)


INFLUENCE = LearnedRule(lambda key: jnp.array(0.5), _influence)
BALANCE = mg.Model(
    lambda key: {"x": jnp.ones(4)},
    mg.cooperative(lambda params, key, batch: (0.5 * (params["x"][0] - 1) ** 2, {}), ("x",)),
    lambda params, key, num: jnp.zeros((num, 4)),
)


def _mean_loss(theta, truncation=HORIZON):
    """Return the mean loss of a whole inner loop, with gradients cut at the beginning of each truncation."""
    x, losses = jnp.ones(4), []
    for step in range(HORIZON):
        x = jax.lax.stop_gradient(x) if step % truncation == 0 else x
        x = SHIFT @ x + theta * SIGNS
        losses.append(0.5 * (x[0] - 1) ** 2)
    return jnp.stack(losses).mean()


@pytest.mark.parametrize("persistent", [True, False])
def test_persistent_evolution_is_unbiased_where_that_of_truncations_has_the_wrong_sign(persistent):
    """The losses are quadratic in theta, so that smoothing them changes no gradient."""
    number, truncation = 6000, 2
    method = persistent_evolution(BALANCE, INFLUENCE, truncation, HORIZON, sigma=0.1)
    meta = method.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), number)
    particles = jax.vmap(method.begin, in_axes=(None, 0, None))(meta, keys, ONE.support)
    advance = jax.jit(jax.vmap(method.advance, in_axes=(None, 0, 0, 0, None)))
    found = []
    for index in range(HORIZON // truncation):
        if not persistent:
            particles = particles._replace(accumulated=jax.tree.map(jnp.zeros_like, particles.accumulated))
        noise_keys = jax.random.split(jax.random.key(2 + index), number)
        directions, particles, _ = advance(meta, jax.random.clone(keys), noise_keys, particles, ONE)
        found.append(directions["rule"])
    samples = np.mean(found, 0)
    error = samples.std(ddof=1) / np.sqrt(number)
    whole, cut = (float(jax.grad(_mean_loss)(0.5, steps)) for steps in (HORIZON, truncation))
    assert whole * cut < 0
    assert error < 0.05 * abs(whole)
    assert abs(samples.mean() - (whole if persistent else cut)) < 4.5 * error


def _family():
    """Return tasks of random points; where the data says so, those of class 1 are not finite."""

    def make(data, key, spec):
        x = jax.random.normal(key, (7, 6))
        x = jnp.where(data & (spec[0] == 1), jnp.nan, x)
        both = mg.Examples(x, jnp.zeros(7, jnp.int32), jnp.ones(7))
        return mg.Task(jax.tree.map(lambda leaf: leaf[:3], both), jax.tree.map(lambda leaf: leaf[3:], both))

    return mg.TaskFamily(jnp.array(False), lambda data, key: jax.random.randint(key, (1,), 0, 3), make)


RULE = LearnedRule(
    lambda key: {"rate": jnp.array(0.05), "decay": jnp.array(0.5)},
    lambda psi: optax.chain(optax.trace(psi["decay"]), optax.scale(-psi["rate"])),
)
"""Momentum: cheap to compile, and with a memory."""


@functools.cache
def _setting():
    """Return three tasks of two pairs each, in the middle of inner loops of three truncations; compiled once."""
    family = _family()
    method = persistent_evolution(noisy_net(), RULE, 2, 6, num_pairs=2)
    sampler, optimizer = mg.uniform(family, 3), optax.sgd(1e-4)
    state = init_persistent_state(method, family, sampler, optimizer, jax.random.key(0))
    return method, state, jax.jit(make_persistent_step(method, family, sampler, optimizer))


def _copy(tree):
    return jax.tree.map(jnp.copy, tree)


def test_tasks_begin_staggered_and_begin_again_without_their_perturbations():
    method, state, step = _setting()
    particles = state.sampler.slots.particles
    np.testing.assert_array_equal(particles.age, [0, 2, 4])
    assert (flat(particles.accumulated) == 0).all()
    ages = [(2, 4, 0), (4, 0, 2), (0, 2, 4), (2, 4, 0)]
    for expected in ages:
        before = jax.device_get(state.sampler.slots)
        state, metrics = step(state, jnp.array(False))
        after = jax.device_get(state.sampler.slots)
        np.testing.assert_array_equal(after.particles.age, expected)
        assert int(metrics["num_restarted"]) == 1
        for index, age in enumerate(expected):
            noise = flat(jax.tree.map(lambda leaf, i=index: leaf[i], after.particles.accumulated))
            moving, states = jax.tree.map(lambda leaf, i=index: leaf[i], after.particles.inner)
            begun = age == 0
            assert (noise == 0).all() == begun
            assert (flat(states) == 0).all() == begun
            same = np.array_equal(moving["body"][0, 0], moving["body"][0, 1])
            assert same == begun == (not np.array_equal(after.bits[index], before.bits[index]))
            if begun:
                np.testing.assert_array_equal(moving["body"][0, 0], state.meta["body"])
    assert set(method.init(jax.random.key(0))) == {"body", "head", "rule"}


def test_perturbations_add_up_and_the_direction_is_held_against_their_sum():
    """The whole of two truncations, by a loop that knows nothing of particles."""
    model = noisy_net()
    method = persistent_evolution(model, RULE, 2, 6, fresh=True, sigma=0.02)
    meta, task = method.init(jax.random.key(0)), _family().make(False, jax.random.key(5), [0])
    assert set(meta) == {"rule"}
    keys = {sign: jax.random.split(jax.random.clone(jax.random.key(1)), 1)[0] for sign in (1, -1)}
    particles = jax.jit(method.begin)(meta, jax.random.key(1), task.support)
    advance = jax.jit(method.advance)
    total, moving, states = jax.tree.map(jnp.zeros_like, meta), {}, {}
    for sign, key in keys.items():
        init_key, _ = jax.random.split(jax.random.split(key)[0])
        moving[sign] = model.init(init_key)
        states[sign] = RULE.rule(meta["rule"]).init(moving[sign])
    field = jax.jit(mg.vector_field(model.game))
    play = jax.jit(model.game)
    update = jax.jit(lambda psi, *arguments: RULE.rule(psi).update(*arguments))
    for index in range(2):
        noise_key = jax.random.key(7 + index)
        directions, particles, metrics = advance(meta, jax.random.key(1), noise_key, particles, task)
        noise = normal_like(jax.random.split(jax.random.clone(noise_key), 1)[0], meta)
        total = jax.tree.map(jnp.add, total, noise)
        losses = {}
        for sign, key in keys.items():
            psi = jax.tree.map(lambda leaf, e, s=sign: leaf + s * 0.02 * e, meta, noise)["rule"]
            begin_key, judge_key = jax.random.split(jax.random.clone(key))
            loop_key = jax.random.split(begin_key)[1]
            found = []
            for at in (2 * index, 2 * index + 1):
                slope, _ = field(moving[sign], jax.random.fold_in(jax.random.clone(loop_key), at), task.support)
                updates, states[sign] = update(psi, slope, states[sign], moving[sign])
                moving[sign] = optax.apply_updates(moving[sign], updates)
                judged = play(moving[sign], jax.random.fold_in(jax.random.clone(judge_key), at), task.query)[0]
                found.append(judged["head"])
            losses[sign] = np.mean(found)
        np.testing.assert_allclose(metrics["loss"], np.mean(list(losses.values())), rtol=1e-5)
        expected = (losses[1] - losses[-1]) / 0.04 * flat(total)
        np.testing.assert_allclose(flat(directions), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
        np.testing.assert_allclose(flat(particles.accumulated), flat(total), rtol=1e-6)


def test_one_truncation_of_twins_is_the_evolution_of_each_sides_own_loss():
    game = bilinear(0.2)
    two = mg.Model(lambda key: {"x": jnp.array(0.7), "y": jnp.array(-1.3)}, game, lambda *a: jnp.zeros(1))
    pair = twins(dict.fromkeys("xy", RULE), {"x": ("x",), "y": ("y",)})
    dynamics = mg.alternating(["y", "x"])
    method = persistent_evolution(two, pair, 3, 3, dynamics=dynamics, sigma=0.1)
    learner = learned_optimizer(two, pair, 3, dynamics=dynamics)
    meta, task = method.init(jax.random.key(0)), mg.Task(points([[0.2]]), points([[0.6]]))
    particles = method.begin(meta, jax.random.key(1), task.support)
    found, _, metrics = jax.jit(method.advance)(meta, jax.random.key(1), jax.random.key(2), particles, task)
    rules = {name: meta[name] for name in ("x/rule", "y/rule")}
    noise = normal_like(jax.random.split(jax.random.clone(jax.random.key(2)), 1)[0], rules)

    @jax.jit
    def judged(sign):
        perturbed = jax.tree.map(lambda leaf, e: leaf + sign * 0.1 * e, rules, noise)
        path, _ = learner.path({**meta, **perturbed}, jax.random.key(0), task.support, 3)
        losses, _ = jax.vmap(lambda params: game(params, None, task.query))(path)
        return jax.tree.map(lambda loss: loss[1:].mean(), losses)

    plus, minus = judged(1.0), judged(-1.0)
    assert set(found) == set(rules)
    assert {"loss/x/rule", "loss/y/rule"} <= set(metrics)
    for name in rules:
        slope = (plus[name[0]] - minus[name[0]]) / 0.2
        np.testing.assert_allclose(flat(found[name]), slope * flat(noise[name]), rtol=1e-3, atol=1e-5)


def test_the_step_is_the_weighted_mean_over_the_tasks_and_several_pairs():
    method, before, step = _setting()
    after, metrics = step(before, jnp.array(False))
    slots, family = jax.device_get(before.sampler.slots), _family()
    noise_key, _ = jax.random.split(jax.random.fold_in(before.key, before.step))
    advance = jax.jit(method.advance)
    directions = []
    for index in range(3):
        spec, bits, particles = jax.tree.map(lambda leaf, i=index: leaf[i], (slots.specs, slots.bits, slots.particles))
        make_key, loop_key = jax.random.split(jax.random.wrap_key_data(bits))
        task = family.make(False, make_key, spec)
        key = jax.random.fold_in(jax.random.clone(noise_key), index)
        direction, _, _ = advance(before.meta, loop_key, key, particles, task)
        directions.append(flat(direction["rule"]))
    change = flat(before.meta["rule"]) - flat(after.meta["rule"])
    np.testing.assert_allclose(change / 1e-4, np.mean(directions, 0), rtol=5e-3)
    np.testing.assert_array_equal(after.meta["body"], before.meta["body"])
    assert metrics["finite_share"] == 1


def test_a_task_that_is_not_finite_is_left_out_and_begun_again():
    _, state, step = _setting()
    bad = np.asarray(state.sampler.slots.specs)[:, 0] == 1
    assert 0 < bad.sum() < 3
    before = np.asarray(state.sampler.slots.bits)
    state, metrics = step(state, jnp.array(True))
    assert int(metrics["num_nonfinite"]) == bad.sum()
    assert int(metrics["bad_task"]) == np.argmax(bad)
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(flat(state.meta)).all()
    assert (np.asarray(state.sampler.slots.bits)[bad] != before[bad]).any(1).all()


def test_tasks_spread_over_devices_learn_what_they_learn_on_one():
    method, state, step = _setting()
    family, mesh = _family(), task_mesh(3)
    spread = make_persistent_step(method, family, mg.uniform(family, 3), optax.sgd(1e-4), mesh=mesh)
    shared, data = everywhere((_copy(state), jnp.array(False)), mesh)
    spread = run_chunk(spread, 1, sharding=shared.step.sharding)
    for _ in range(4):
        state, metrics = step(state, jnp.array(False))
        shared, of_devices = spread(shared, data)
        assert shared.sampler.slots.particles.age.is_fully_replicated
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(bits(b), bits(a), rtol=1e-5, atol=1e-6), state, here(shared)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b[0], a, rtol=1e-5, atol=1e-6), metrics, of_devices)
    with pytest.raises(ValueError, match="axis 'task'"):
        make_persistent_step(
            method, family, mg.uniform(family, 3), optax.sgd(1e-4), mesh=jax.make_mesh((1,), ("devices",))
        )


def test_an_update_that_overflows_is_not_followed():
    method, state, _ = _setting()
    family = _family()
    overflowing = optax.chain(optax.sgd(1e-4), optax.scale(jnp.inf))
    step = make_persistent_step(method, family, mg.uniform(family, 3), overflowing)
    after, metrics = jax.jit(step)(state._replace(opt=overflowing.init(state.meta)), jnp.array(False))
    assert np.isfinite(metrics["grad_norm"])
    assert metrics["finite_share"] == 0
    for before, now in ((state.meta, after.meta), (state.average, after.average)):
        np.testing.assert_array_equal(flat(now), flat(before))


def test_a_run_of_train_goes_where_the_whole_inner_loop_says_and_is_the_same_in_pieces():
    """The sign of the gradient of two steps would take theta the other way."""
    family = mg.TaskFamily(None, lambda data, key: jnp.zeros(1, jnp.int32), lambda data, key, spec: ONE)
    method = persistent_evolution(BALANCE, INFLUENCE, 2, HORIZON, sigma=0.1)
    sampler, optimizer = mg.uniform(family, 64), optax.adam(0.02)
    state = init_persistent_state(method, family, sampler, optimizer, jax.random.key(0))
    step = make_persistent_step(method, family, sampler, optimizer)
    in_pieces = mg.train(step, mg.train(step, _copy(state), None, 10, chunk=10), None, 80, chunk=10)
    whole = mg.train(step, state, None, 80, chunk=10)
    np.testing.assert_array_equal(whole.meta["rule"], in_pieces.meta["rule"])
    thetas = np.linspace(-1, 1, 401)
    best = thetas[np.argmin([float(loss) for loss in jax.jit(jax.vmap(_mean_loss))(thetas)])]
    assert abs(float(whole.average["rule"]) - best) < abs(0.5 - best)
    assert abs(float(whole.meta["rule"]) - best) < 0.15


def test_what_is_wrong_is_said():
    for options in ({"truncation": 4, "horizon": 6}, {"truncation": 0, "horizon": 6}):
        with pytest.raises(ValueError, match="multiple of the truncation"):
            persistent_evolution(BALANCE, INFLUENCE, **options)
    with pytest.raises(ValueError, match="sigma > 0"):
        persistent_evolution(BALANCE, INFLUENCE, 1, 2, sigma=0.0)
    with pytest.raises(ValueError, match="judged_on"):
        persistent_evolution(BALANCE, INFLUENCE, 1, 2, judged_on="neither")
    method, family = persistent_evolution(BALANCE, INFLUENCE, 1, 2), _family()
    with pytest.raises(ValueError, match="average_decay"):
        make_persistent_step(method, family, mg.uniform(family, 1), optax.sgd(0.1), average_decay=1.0)
    with pytest.raises(ValueError, match="task_chunk"):
        make_persistent_step(method, family, mg.uniform(family, 1), optax.sgd(0.1), task_chunk=0)
