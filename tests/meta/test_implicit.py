"""Implicit MAML as a learner: over batches of tasks, devices and training."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import bilinear, flat, image_task, noisy_net, points, quadratic_model, quadratic_task, tiny_images

import metagen_jax as mg
from metagen_jax.adapt.implicit import implicit
from metagen_jax.meta.batch import sum_over_tasks
from metagen_jax.meta.gathered import gathered
from metagen_jax.meta.learners import task_keys
from metagen_jax.meta.learners.implicit import imaml

CURVATURE = np.array([[2.0, 0.3], [0.3, 0.5]])
STRENGTH = 1.5
WEIGHTS = np.array([0.1, 0.0, 0.6, 0.3])


def _doubles(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), tree)


def _net():
    model = noisy_net()
    learner = imaml(model, optax.sgd(0.05), 20, strength=STRENGTH, players=("head",), learn_strength=True)
    tasks = [image_task(seed) for seed in range(len(WEIGHTS))]
    return learner, tasks


def _rivals():
    model = mg.Model(lambda key: {"x": jnp.array(0.7), "y": jnp.array(-1.3)}, bilinear(0.2), lambda *a: jnp.zeros(1))
    learner = imaml(model, optax.sgd(0.2), 20, strength=STRENGTH, learn_strength=True)
    return learner, [mg.Task(points([[0.1 * seed]]), points([[0.6]])) for seed in range(len(WEIGHTS))]


def test_the_field_matches_the_closed_form_on_a_quadratic(x64):
    task, theta = quadratic_task(np.random.default_rng(0), 2), np.array([0.5, 2.0])
    learner = imaml(quadratic_model(jnp.asarray(CURVATURE)), optax.sgd(0.3), 200, strength=STRENGTH, tolerance=1e-13)
    support, query = (np.asarray(examples.x).mean(0) for examples in task)
    regular = CURVATURE + STRENGTH * np.eye(2)
    solution = np.linalg.solve(regular, CURVATURE @ support + STRENGTH * theta)
    direction, metrics = learner.field({"model": jnp.asarray(theta)}, jax.random.key(0), task)
    expected = STRENGTH * np.linalg.solve(regular, CURVATURE @ (solution - query))
    np.testing.assert_allclose(direction["model"], expected, rtol=1e-10)
    assert metrics["support/residual"].shape == (200,)


@pytest.mark.parametrize("problem", [_net, _rivals])
def test_the_sum_over_tasks_on_one_device_or_two_is_the_weighted_sum_of_their_fields(x64, problem):
    """A task of weight zero adds nothing."""
    learner, tasks = problem()
    meta, keys = _doubles(learner.init(jax.random.key(0))), task_keys(jax.random.key(1), len(WEIGHTS))
    batch, weights = jax.tree.map(lambda *rows: jnp.stack(rows), *tasks), jnp.asarray(WEIGHTS)
    total, one = sum_over_tasks(learner.field), jax.jit(learner.field)
    mesh = jax.make_mesh((2,), ("task",), axis_types=(jax.sharding.AxisType.Auto,))

    def spread(meta, keys, tasks, weights):
        meta = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "task", to="varying"), meta)
        return jax.lax.psum(total(meta, keys, tasks, weights)[0], "task")

    shared, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("task")
    over_devices = jax.shard_map(spread, mesh=mesh, in_specs=(shared, split, split, split), out_specs=shared)
    direction, metrics = jax.jit(total)(meta, jax.random.clone(keys), batch, weights)
    spreading = jax.jit(over_devices)(meta, jax.random.clone(keys), batch, weights)
    singles = [one(meta, jax.random.clone(keys)[index], task) for index, task in enumerate(tasks)]
    assert set(direction) == set(meta)
    assert "log_strength" in meta
    for player in meta:
        expected = sum(weight * flat(single[0][player]) for weight, single in zip(WEIGHTS, singles, strict=True))
        assert np.abs(expected).max() > 1e-4
        for found in (direction, spreading):
            np.testing.assert_allclose(flat(found[player]), expected, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(metrics["support/residual"], [s[1]["support/residual"] for s in singles], rtol=1e-10)


def test_a_solution_survives_where_kernels_are_gathered(x64):
    """A kernel that makes the support and is met twice is gathered; the program with the solution in it is run anew."""
    rng = np.random.default_rng(0)
    params = {"reader": jnp.asarray(rng.normal(size=(2, 2))), "model": jnp.asarray([0.5, 2.0])}
    model = quadratic_model(jnp.asarray(CURVATURE))
    adapt = implicit(mg.vector_field(model.game), optax.sgd(0.3), 100, strength=STRENGTH, tolerance=1e-13)

    def game(params, key, x):
        read = jnp.tanh(x @ params["reader"]) @ params["reader"]
        phi, _ = adapt({"model": params["model"]}, key, points(jnp.zeros((3, 2)))._replace(x=read))
        return dict.fromkeys(params, jnp.sin(phi["model"]).sum()), {}

    field, x = mg.vector_field(game), jnp.asarray(rng.normal(size=(3, 2)))
    program = str(jax.make_jaxpr(lambda params: gathered(field)(params, jax.random.key(0), x)[0])(params))
    assert "concatenate" in program  # the rows of both products
    expected, _ = field(params, jax.random.key(0), x)
    found, _ = jax.jit(lambda params: gathered(field)(params, jax.random.key(0), x))(params)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-10)
    regular = CURVATURE + STRENGTH * np.eye(2)
    read = np.tanh(x @ params["reader"]) @ np.asarray(params["reader"])
    solution = np.linalg.solve(regular, CURVATURE @ read.mean(0) + STRENGTH * np.array([0.5, 2.0]))
    np.testing.assert_allclose(found["model"], STRENGTH * np.linalg.solve(regular, np.cos(solution)), rtol=1e-10)


def test_training_is_traced_once_and_learns_the_strength_too():
    model = noisy_net()
    learner = imaml(model, optax.sgd(0.05), 10, players=("head",), learn_strength=True)
    family = mg.episodes(tiny_images(), (1, 3), 3)
    sampler, optimizer = mg.uniform(family, 4), optax.adam(3e-2)
    state = mg.init_state(learner, sampler, optimizer, jax.random.key(0))
    step, losses = chex.assert_max_traces(mg.make_step(learner, family, sampler, optimizer), n=1), []
    state = mg.train(step, state, family.data, 30, chunk=15, on_chunk=lambda s, m: losses.extend(m["loss"]))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert abs(float(state.meta["log_strength"])) > 0.05


def test_the_path_is_what_the_adapter_returns_and_goes_past_it(x64):
    learner, (task, *_) = _rivals()
    meta = _doubles(learner.init(jax.random.key(0)))
    path, _ = learner.path(meta, jax.random.key(1), task.support, 40)
    adapted, _ = learner.adapt(meta, jax.random.key(1), task.support)
    np.testing.assert_allclose([path["x"][20], path["y"][20]], flat(adapted), rtol=1e-12)
    assert abs(path["x"][40] - path["x"][20]) > 1e-8
