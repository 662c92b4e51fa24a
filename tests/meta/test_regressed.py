"""Regression onto teachers against descent and least squares in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import finite_difference, flat

import metagen_jax as mg
from metagen_jax.meta.learners.regressed import regressed
from metagen_jax.models.initialiser import initialiser
from metagen_jax.models.networks import Network, mlp

TASKS, RATE, STEPS = 30, 0.2, 5
PARTS = ("w", "b")


def _model():
    """Linear regression y = u w + b, two players of one loss."""

    def loss(params, key, batch):
        del key
        residual = batch.x[:, :2] @ params["w"] + params["b"] - batch.x[:, 2]
        return 0.5 * (batch.weight * jnp.square(residual)).sum() / batch.weight.sum(), {}

    def init(key):
        return {"w": jnp.array([0.5, -0.5]), "b": jnp.array(0.3)}

    return mg.Model(init, mg.cooperative(loss, PARTS), lambda params, key, num: jnp.zeros((num, 3)))


def _tasks(seed=0):
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(TASKS, 7, 2))
    y = np.einsum("tnd,td->tn", u, rng.normal(size=(TASKS, 2))) + rng.normal(size=(TASKS, 1))
    x = jnp.asarray(np.concatenate([u, y[..., None]], axis=2))
    both = mg.Examples(x, jnp.zeros((TASKS, 7), jnp.int32), jnp.ones((TASKS, 7)))
    return mg.Task(jax.tree.map(lambda leaf: leaf[:, :4], both), jax.tree.map(lambda leaf: leaf[:, 4:], both))


def _teacher(x, theta):
    """Gradient descent on all examples of a task, from theta [3]."""
    columns = np.concatenate([x[:, :2], np.ones((len(x), 1))], axis=1)
    for _ in range(STEPS):
        theta = theta - RATE * columns.T @ (columns @ theta - x[:, 2]) / len(x)
    return theta


PRODUCTS = Network(lambda key: {}, lambda params, x: jnp.concatenate([x[:, :2] * x[:, 2:], x[:, 2:]], axis=1))
THETA = np.array([0.5, -0.5, 0.3])


def _learner(encoder=PRODUCTS, num_steps=0, **options):
    model, embed = initialiser(encoder, 3, players=PARTS)(_model())
    options = {"teacher_steps": STEPS, "players": PARTS} | options
    return regressed(model, embed, mg.fixed(optax.sgd(RATE)), num_steps, **options), embed


def test_the_loss_is_the_weighted_mean_square_to_teachers_trained_on_support_and_query(x64):
    learner, _ = _learner(weights={"b": 3.0})
    meta, tasks = learner.init(jax.random.key(0)), _tasks()
    task = jax.tree.map(lambda leaf: leaf[0], tasks)
    direction, metrics = jax.jit(learner.field)(meta, jax.random.key(1), task)
    moved = _teacher(np.concatenate([task.support.x, task.query.x]), THETA) - THETA  # the map is zero, so e = theta
    np.testing.assert_allclose(metrics["distance/w"], np.square(moved[:2]).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["distance/b"], moved[2] ** 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], 0.5 * (np.square(moved[:2]).mean() + 3 * moved[2] ** 2), rtol=1e-6)
    code = np.concatenate([task.support.x[:, :2] * task.support.x[:, 2:], task.support.x[:, 2:]], axis=1).mean(0)
    maps = direction["initialiser"]["maps"]
    assert set(direction) == {"initialiser"}
    np.testing.assert_allclose(maps["w"]["full"], -np.outer(code, moved[:2]) / 2, rtol=1e-5)
    np.testing.assert_allclose(maps["b"]["full"], -3 * code * moved[2], rtol=1e-5)
    assert metrics["teacher/loss"].shape == (STEPS,)
    assert (np.diff(metrics["teacher/loss"]) < 0).all()


def test_learning_arrives_at_the_regression_of_teachers_on_codes_and_moves_nothing_else(x64):
    learner, embed = _learner()
    tasks, keys = _tasks(), jax.random.split(jax.random.key(0), TASKS)

    @jax.jit
    def descended(meta):
        def step(meta, _):
            direction, _ = jax.vmap(learner.field, in_axes=(None, 0, 0))(meta, jax.random.clone(keys), tasks)
            down = jax.tree.map(lambda leaf, d: leaf - 0.5 * d.mean(0), meta["initialiser"], direction["initialiser"])
            return {**meta, "initialiser": down}, None

        return jax.lax.scan(step, meta, None, 600)[0]

    found = descended(learner.init(jax.random.key(1)))
    whole = np.concatenate([tasks.support.x, tasks.query.x], axis=1)
    moved = np.stack([_teacher(x, THETA) for x in whole]) - THETA
    support = np.asarray(tasks.support.x)
    codes = np.concatenate([support[..., :2] * support[..., 2:], support[..., 2:]], axis=2).mean(1)
    best = np.linalg.lstsq(codes, moved, rcond=None)[0]
    maps = found["initialiser"]["maps"]
    np.testing.assert_allclose(maps["w"]["full"], best[:, :2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(maps["b"]["full"], best[:, 2], rtol=1e-4, atol=1e-5)
    read = jax.jit(embed)(found, jax.tree.map(lambda leaf: leaf[0], tasks.support))
    np.testing.assert_allclose(read["w"], (THETA + codes[0] @ best)[:2], rtol=1e-4)


def test_the_gradient_of_the_encoder_and_of_the_maps_equals_finite_differences(x64):
    learner, _ = _learner(mlp((3,), (4,), (3,), activation=jnp.tanh))
    rng, task = np.random.default_rng(1), jax.tree.map(lambda leaf: leaf[0], _tasks())
    shapes = jax.eval_shape(learner.init, jax.random.key(0))
    meta, along = (jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape), shapes) for _ in range(2))
    field = jax.jit(learner.field)
    gradient = field(meta, jax.random.key(1), task)[0]["initialiser"]
    for part in ("encoder", "maps"):
        only = jax.tree.map(np.zeros_like, along)
        only["initialiser"] = {**only["initialiser"], part: along["initialiser"][part]}
        slope = flat(gradient) @ flat(only["initialiser"])
        assert abs(slope) > 1e-4
        expected = finite_difference(lambda meta: field(meta, jax.random.key(1), task)[1]["loss"], meta, only)
        np.testing.assert_allclose(slope, expected, rtol=1e-6)


def test_adapting_reads_and_then_descends_the_support_and_the_path_begins_at_what_is_read(x64):
    learner, embed = _learner(num_steps=2)
    rng, task = np.random.default_rng(2), jax.tree.map(lambda leaf: leaf[0], _tasks())
    meta = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), learner.init(jax.random.key(0)))
    adapted, trace = jax.jit(learner.adapt)(meta, jax.random.key(1), task.support)
    path, _ = jax.jit(learner.path, static_argnums=3)(meta, jax.random.key(1), task.support, 2)
    x = np.asarray(task.support.x)
    columns = np.concatenate([x[:, :2], np.ones((4, 1))], axis=1)
    read = jax.jit(embed)(meta, task.support)
    phi = np.concatenate([read["w"], [read["b"]]])
    np.testing.assert_allclose(np.concatenate([path["w"][0], path["b"][:1]]), phi, rtol=1e-9)
    for _ in range(2):
        phi = phi - RATE * columns.T @ (columns @ phi - x[:, 2]) / 4
    np.testing.assert_allclose(np.concatenate([adapted["w"], [adapted["b"]]]), phi, rtol=1e-9)
    np.testing.assert_allclose(np.concatenate([path["w"][2], path["b"][2:]]), phi, rtol=1e-9)
    assert trace["loss"].shape == (2,)


def test_padding_and_the_order_of_the_support_change_nothing(x64):
    learner, _ = _learner()
    task, field = jax.tree.map(lambda leaf: leaf[0], _tasks()), jax.jit(learner.field)
    meta = learner.init(jax.random.key(0))
    padded = task._replace(support=task.support._replace(weight=jnp.array([1.0, 1.0, 1.0, 0.0])))
    before = flat(field(meta, jax.random.key(1), padded)[0])
    other = padded._replace(support=padded.support._replace(x=padded.support.x.at[3].set(5.0)))
    np.testing.assert_array_equal(flat(field(meta, jax.random.key(1), other)[0]), before)
    turned = padded._replace(support=jax.tree.map(lambda leaf: leaf[::-1], padded.support))
    np.testing.assert_allclose(flat(field(meta, jax.random.key(1), turned)[0]), before, rtol=1e-9)
    assert np.abs(flat(field(meta, jax.random.key(1), task)[0]) - before).max() > 1e-4


def test_what_cannot_be_regressed_is_refused():
    with pytest.raises(ValueError, match="teacher_steps=0"):
        _learner(teacher_steps=0)
    with pytest.raises(ValueError, match="weights of these only"):
        _learner(weights={"bias": 1.0})
    with pytest.raises(ValueError, match="learned parameters"):
        _learner(teacher=mg.per_step(2, 0.1, PARTS))
    task = jax.tree.map(lambda leaf: leaf[0], _tasks())
    model, _ = initialiser(PRODUCTS, 3, players=PARTS)(_model())
    learner = regressed(
        model, lambda meta, support: {"w": meta["w"]}, mg.fixed(optax.sgd(0.1)), 0, teacher_steps=1, players=PARTS
    )
    with pytest.raises(ValueError, match=r"\['b'\] cannot be regressed"):
        jax.eval_shape(learner.field, jax.eval_shape(model.init, jax.random.key(0)), jax.random.key(0), task)
