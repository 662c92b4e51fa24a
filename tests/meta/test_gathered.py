import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import flat, image_task, noisy_net

import metagen_jax as mg
from metagen_jax.adapt.factored import Factored, compact
from metagen_jax.meta.batch import MOVED, automatic_chunk, sum_over_tasks
from metagen_jax.meta.gathered import gathered
from metagen_jax.meta.learners import task_keys

SIZE = 6


def _game(params, key, batch):
    """Rivals that share kernels in every way there is: twice, transposed, stopped, tied, reshaped."""
    w, v = params["a"]["w"], params["a"]["v"]
    hidden = jnp.tanh(batch @ w)
    again = jnp.tanh(hidden @ w + (hidden @ v) @ v.T)
    stopped = batch @ jax.lax.stop_gradient(w)
    first = jnp.square(again - stopped).mean() + jnp.square(params["a"]["bias"]).sum()
    second = (jnp.sin(again @ params["b"]["u"]) @ params["b"]["u"].T).mean() + jnp.square(params["b"]["s"]).mean()
    return {"a": first, "b": second + 0.1 * params["b"]["s"].reshape(-1) @ params["b"]["s"].reshape(-1)}, {
        "hidden": again
    }


def _params():
    rng = np.random.default_rng(0)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape))  # noqa: E731
    a = {"w": make(SIZE, SIZE), "v": make(SIZE, 3), "bias": make(SIZE)}
    return {"b": {"u": make(SIZE, 4), "s": make(2, 2)}, "a": a}


def test_gathered_kernels_have_the_gradients_of_the_plain_field(x64):
    batch = jnp.asarray(np.random.default_rng(1).normal(size=(5, SIZE)))
    field = mg.vector_field(_game)
    expected = field(_params(), None, batch)
    found = jax.jit(lambda params: gathered(field)(params, None, batch))(_params())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_a_kernel_that_is_met_often_is_differentiated_by_one_product():
    batch, params = jnp.ones((5, SIZE)), _params()
    field = mg.vector_field(lambda params, key, batch: _game({**_params(), **params}, key, batch), ("a",))

    def products(take):
        text = str(jax.make_jaxpr(lambda params: take(params, None, batch)[0]["a"]["w"])(params))
        return text.count(f"[{SIZE},{SIZE}] = dot_general")

    assert products(field) == 2
    assert products(gathered(field)) == 1


def test_second_derivatives_through_gathered_kernels_are_those_of_the_plain_field(x64):
    batch, field = jnp.asarray(np.random.default_rng(1).normal(size=(5, SIZE))), mg.vector_field(_game)

    def slope(take):
        return jax.grad(lambda params: sum(jnp.sin(g).sum() for g in jax.tree.leaves(take(params, None, batch)[0])))

    found, expected = (jax.jit(slope(take))(_params()) for take in (gathered(field), field))
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-10, atol=1e-12)


def test_players_that_do_not_move_are_left_out():
    field = mg.vector_field(_game, ("b",))
    assert set(gathered(field)(_params(), None, jnp.ones((5, SIZE)))[0]) == {"b"}


def _batch(count):
    return jax.tree.map(lambda *rows: jnp.stack(rows), *[image_task(seed) for seed in range(count)])


def test_the_sum_of_factored_displacements_is_the_sum_of_the_matrices(x64):
    """Reptile's field over tasks in the dual form, against each task's own displacement."""
    model = noisy_net()
    learner = mg.reptile(model, mg.fixed(optax.sgd(0.1)), 2, form="dual")
    meta = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(jax.random.key(0)))
    keys, tasks, weights = task_keys(jax.random.key(1), 3), _batch(3), jnp.array([0.2, 0.0, 0.7])
    total, _ = jax.jit(sum_over_tasks(learner.field))(meta, jax.random.clone(keys), tasks, weights)
    for task in range(3):
        one = jax.tree.map(lambda leaf, task=task: leaf[task], (keys, tasks))
        alone, _ = learner.field(meta, *one)
        total = jax.tree.map(lambda a, b, w=weights[task]: a - w * b, total, alone)
    assert np.abs(flat(total)).max() < 1e-12


@pytest.mark.parametrize("chunk", [1, 2, "auto"])
@pytest.mark.parametrize("form", ["plain", "dual"])
def test_tasks_one_by_one_and_together_give_the_same(x64, chunk, form):
    model = noisy_net()
    learner = mg.maml(model, mg.fixed(optax.sgd(0.1)), 2, form=form)
    meta = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(jax.random.key(0)))
    keys, tasks, weights = task_keys(jax.random.key(1), 4), _batch(4), jnp.full(4, 0.25)
    whole = jax.jit(sum_over_tasks(learner.field))(meta, jax.random.clone(keys), tasks, weights)
    found = jax.jit(sum_over_tasks(learner.field, chunk=chunk))(meta, jax.random.clone(keys), tasks, weights)
    for a, b in zip(whole, found, strict=True):
        np.testing.assert_allclose(flat(a), flat(b), rtol=1e-11, atol=1e-13)


def _linear(width):
    def loss(params, key, batch):
        x = batch.x.reshape(batch.x.shape[0], -1)
        return jnp.square(x @ params["model"]["kernel"] + params["model"]["bias"][None]).sum(-1).mean(), {}

    def init(key):
        return {"model": {"kernel": jnp.zeros((36, width)), "bias": jnp.zeros(width)}}

    return mg.Model(init, mg.cooperative(loss), lambda params, key, num: jnp.zeros((num, 36)))


@pytest.mark.parametrize(
    ("form", "each"),
    [
        ("plain", 4 * (36 * 1024 + 1024)),
        ("dual", 4 * 1024),  # the bias; the kernel took up 3 rows
    ],
)
def test_a_cpu_takes_as_many_tasks_together_as_leave_little_moved(form, each):
    learner = mg.maml(_linear(1024), mg.fixed(optax.sgd(0.1)), 2, form=form)
    meta = jax.eval_shape(learner.init, jax.random.key(0))
    tasks, keys = _batch(1), task_keys(jax.random.key(1), 64)
    tasks = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (64, *leaf.shape[1:])), tasks)
    chosen = automatic_chunk(learner.field, meta, keys, tasks)
    assert 64 % chosen == 0
    assert chosen * each <= MOVED
    assert chosen == 64 or 2 * chosen * each > MOVED


def test_joint_training_takes_all_tasks_together():
    learner = mg.joint(_linear(1024), mg.fixed(optax.sgd(0.1)), 2)
    meta = jax.eval_shape(learner.init, jax.random.key(0))
    assert automatic_chunk(learner.field, meta, task_keys(jax.random.key(1), 4), _batch(4)) == 4


def test_a_factored_kernel_is_the_matrix_that_it_says():
    rng = np.random.default_rng(0)
    base, left, scale, right = (rng.normal(size=shape) for shape in ((3, 4), (5, 3), (5,), (5, 4)))
    kernel = Factored(*map(jnp.asarray, (base, left, scale, right)))
    np.testing.assert_allclose(kernel.dense(), base + left.T @ np.diag(scale) @ right, rtol=1e-5)


def test_a_plain_adapter_is_its_own_compact_form():
    adapt = lambda meta, key, support: (meta, {})  # noqa: E731
    assert compact(adapt) is adapt
