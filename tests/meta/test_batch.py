import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import flat, image_task, points, quadratic_model, tiny_vae

import metagen_jax as mg
from metagen_jax.meta.batch import finite_sum, sum_over_tasks
from metagen_jax.meta.learners import task_keys


def _batch(num):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[image_task(seed) for seed in range(num)])


def _learners():
    model, *_ = tiny_vae()
    moves = ("prior", "context")
    return {
        "maml": mg.maml(model, mg.per_step(2, 0.05, moves), 2, players=moves),
        "reptile": mg.reptile(model, mg.fixed(optax.sgd(1e-2)), 2),
    }


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("name", ["maml", "reptile"])
def test_the_sum_over_tasks_is_the_weighted_sum_of_their_fields(name, chunk):
    learner = _learners()[name]
    meta, tasks = learner.init(jax.random.key(0)), _batch(4)
    weights = jnp.array([0.1, 0.4, 0.2, 0.3])
    keys = task_keys(jax.random.key(1), 4)
    direction, metrics = jax.jit(sum_over_tasks(learner.field, chunk=chunk))(meta, keys, tasks, weights)
    one = jax.jit(learner.field)
    singles = [
        one(meta, task_keys(jax.random.key(1), 4)[i], jax.tree.map(lambda leaf, i=i: leaf[i], tasks)) for i in range(4)
    ]
    expected = sum(float(w) * flat(single[0]) for w, single in zip(weights, singles, strict=True))
    np.testing.assert_allclose(flat(direction), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(metrics["support/loss"], [s[1]["support/loss"] for s in singles], rtol=1e-5)


def _fragile(broken_forward=(), broken_backward=()):
    """A quadratic whose loss, or only its gradient, is not finite for tasks whose query begins with such a number."""

    @jax.custom_vjp
    def brittle(x, flag):
        return x

    brittle.defvjp(lambda x, flag: (x, flag), lambda flag, g: (jnp.where(flag, jnp.nan, g), None))
    base = quadratic_model(jnp.eye(2)).game

    def game(params, key, batch):
        mark = batch.x[0, 0]
        flag = jnp.isin(mark, jnp.array([-1.0, *broken_backward]))
        losses, metrics = base({"model": brittle(params["model"], flag)}, key, batch)
        bad = jnp.isin(mark, jnp.array([-1.0, *broken_forward]))
        return {"model": jnp.where(bad, jnp.inf, losses["model"])}, metrics

    model = quadratic_model(jnp.eye(2))._replace(game=game)
    return mg.maml(model, mg.fixed(optax.sgd(0.1)), 1)


def _marked(num):
    support = points(jnp.zeros((num, 1, 2)))._replace(weight=jnp.ones((num, 1)), label=jnp.zeros((num, 1), jnp.int32))
    support = support._replace(x=support.x.at[:, 0, 0].set(100 + jnp.arange(num)))
    return mg.Task(support, support._replace(x=support.x.at[:, 0, 0].set(1 + jnp.arange(num))))


@pytest.mark.parametrize(
    ("forward", "backward", "kept"),
    [
        ((), (), [1, 1, 1, 1]),
        ((2.0,), (), [1, 0, 1, 1]),
        ((), (3.0,), [1, 1, 0, 1]),
        ((1.0,), (4.0,), [0, 1, 1, 0]),
        ((1.0, 2.0, 3.0, 4.0), (), [0, 0, 0, 0]),
        ((), (1.0, 2.0, 3.0, 4.0), [0, 0, 0, 0]),
    ],
)
def test_tasks_that_are_not_finite_are_left_out_of_the_sum_exactly(forward, backward, kept):
    meta, tasks, weights = {"model": jnp.array([0.5, -0.5])}, _marked(4), jnp.array([0.1, 0.2, 0.3, 0.4])
    total = sum_over_tasks(_fragile(forward, backward).field)
    keys = task_keys(jax.random.key(0), 4)
    direction, _, finite = jax.jit(lambda *a: finite_sum(total, *a))(meta, keys, tasks, weights)
    assert finite.tolist() == [bool(k) for k in kept]
    healthy = sum_over_tasks(_fragile().field)
    expected, _ = healthy(meta, task_keys(jax.random.key(0), 4), tasks, weights * jnp.array(kept, float))
    np.testing.assert_allclose(direction["model"], expected["model"], rtol=1e-6)


def test_a_chunk_must_divide_the_tasks():
    learner = _learners()["maml"]
    with pytest.raises(ValueError, match="does not divide the 4 tasks"):
        sum_over_tasks(learner.field, chunk=3)(
            learner.init(jax.random.key(0)), task_keys(jax.random.key(1), 4), _batch(4), jnp.ones(4)
        )
    with pytest.raises(ValueError, match="at least 1"):
        sum_over_tasks(learner.field, chunk=0)


def test_task_keys_do_not_depend_on_how_many_tasks_there_are():
    few, many = task_keys(jax.random.key(0), 2), task_keys(jax.random.key(0), 5)
    assert (jax.random.key_data(few) == jax.random.key_data(many)[:2]).all()
