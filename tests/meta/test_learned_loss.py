"""A learned inner loss against MAML, a loop in Python, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import bilinear, finite_difference, flat, image_task, noisy_net, points, tiny_vae

import metagen_jax as mg
from metagen_jax.meta.batch import sum_over_tasks
from metagen_jax.meta.learners import task_keys
from metagen_jax.meta.learners.learned_loss import learned_loss
from metagen_jax.models.learned_losses import vae_features, with_learned_loss
from metagen_jax.models.networks import mlp

RATE, STEPS = 0.02, 2
START = mg.fixed(optax.sgd(RATE))


def _features(params, key, batch):
    x = batch.x.reshape(batch.x.shape[0], -1)[:, :6]
    hidden = jnp.tanh(x @ params["body"] + 0.3 * jax.random.normal(key, (x.shape[0], 4), x.dtype))
    return jnp.concatenate([hidden @ params["head"] - x, hidden], 1)


def _net(**options):
    model = noisy_net()
    return model, with_learned_loss(model, _features, mlp((10,), (3,), (1,)), **options)


def _rivals():
    model = mg.Model(lambda key: {"x": jnp.array(0.7), "y": jnp.array(-1.3)}, bilinear(0.2), lambda *a: jnp.zeros(1))

    def features(params, key, batch):
        return jnp.stack([jnp.sin(params["x"] * batch.x[:, 0]), params["y"] * batch.x[:, 0] ** 2], 1)

    return model, with_learned_loss(model, features, mlp((2,), (3,), (2,)), num_losses=2)


def _doubles(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), tree)


def _filled(meta):
    """Return meta-parameters whose learned loss is not that of the model."""
    rng = np.random.default_rng(0)
    psi = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=jnp.shape(leaf))), meta["inner_loss"])
    return {**_doubles(meta), "inner_loss": psi}


def _task(name):
    return image_task() if name == "net" else mg.Task(points([[0.2], [0.5]]), points([[0.6]]))


PROBLEMS = {"net": _net, "rivals": _rivals, "pure": lambda: _net(mixed=False)}


def test_in_the_beginning_it_is_maml_and_psi_already_learns(x64):
    model, inner = _net()
    learner, plain = learned_loss(model, inner, START, STEPS), mg.maml(model, START, STEPS)
    meta, task = _doubles(learner.init(jax.random.key(0))), image_task()
    found, metrics = jax.jit(learner.field)(meta, jax.random.key(1), task)
    own = {name: tree for name, tree in meta.items() if name != "inner_loss"}
    expected, expected_metrics = jax.jit(plain.field)(own, jax.random.key(1), task)
    assert set(found) == set(meta)
    for player in expected:
        np.testing.assert_allclose(flat(found[player]), flat(expected[player]), rtol=1e-12)
    np.testing.assert_allclose(metrics["support/own_loss"], expected_metrics["support/loss"], rtol=1e-12)
    psi = found["inner_loss"]
    assert np.abs(flat(psi["network"]["output"]["kernel"])).min() > 1e-8
    assert np.abs(flat(psi["log_scale"])).min() > 1e-4


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_field_equals_finite_differences_for_the_learned_loss(x64, name):
    """Of the sum of the query losses, which psi follows."""
    model, inner = PROBLEMS[name]()
    learner, task = learned_loss(model, inner, START, STEPS), _task("rivals" if name == "rivals" else "net")
    meta, field = _filled(learner.init(jax.random.key(0))), jax.jit(learner.field)
    direction, _ = field(meta, jax.random.key(1), task)
    rng = np.random.default_rng(1)
    leaves, structure = jax.tree.flatten(meta["inner_loss"])

    def query_loss(psi):
        _, metrics = field({**meta, "inner_loss": psi}, jax.random.key(1), task)
        return sum(value for key, value in metrics.items() if key in ("loss", "loss/x", "loss/y"))

    for at, leaf in enumerate(leaves):  # each on its own, so that a small one cannot hide behind a large one
        along = [jnp.zeros_like(other) for other in leaves]
        along[at] = jnp.asarray(rng.normal(size=leaf.shape))
        expected = finite_difference(query_loss, meta["inner_loss"], jax.tree.unflatten(structure, along), 1e-5)
        if name == "pure" and np.abs(expected) < 1e-12:
            continue  # a constant added to a loss moves nothing
        np.testing.assert_allclose(flat(direction["inner_loss"]) @ flat(along), expected, rtol=1e-5, atol=1e-9)


def test_a_loop_in_python_gives_the_same_as_the_dual_form(x64):
    model, inner = _net()
    learner, task = learned_loss(model, inner, START, STEPS, players=("head",), form="dual"), image_task()
    meta, network = _filled(learner.init(jax.random.key(0))), mlp((10,), (3,), (1,))
    adapt_key, query_key = jax.random.split(jax.random.key(1))

    def adapted(meta):
        psi, head = meta["inner_loss"], meta["head"]
        for index in range(STEPS):

            def loss(head, index=index):
                key, params = jax.random.fold_in(adapt_key, index), {**meta, "head": head}
                own = model.game(params, jax.random.clone(key), task.support)[0]["head"]
                judged = network.apply(psi["network"], _features(params, key, task.support))
                return jnp.exp(psi["log_scale"][0]) * own + judged.mean()

            head = head - RATE * jax.grad(loss)(head)
        return {**meta, "head": head}

    def query_loss(meta):
        params = adapted(meta)
        return model.game(params, jax.random.clone(query_key), task.query)[0]["head"], params

    expected, params = jax.jit(jax.grad(query_loss, has_aux=True))(meta)
    found, _ = jax.jit(learner.field)(meta, jax.random.key(1), task)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-9, atol=1e-12)
    path, _ = learner.path(meta, jax.random.clone(adapt_key), task.support, STEPS)
    np.testing.assert_allclose(path["head"][STEPS], params["head"], rtol=1e-12)


def test_padding_changes_nothing_for_a_vae():
    model, latent, _ = tiny_vae(hidden=(3,), context=0)
    inner = with_learned_loss(model, vae_features(latent), mlp((6,), (3,), (1,)))
    learner = learned_loss(model, inner, mg.fixed(optax.sgd(1e-2)), 1, players=("prior", "modulation"))
    meta, task = _filled(jax.jit(learner.init)(jax.random.key(0))), image_task(shots=4)
    support = task.support._replace(weight=jnp.array([1.0, 1, 1, 0]))
    field = jax.jit(lambda x: learner.field(meta, jax.random.key(1), task._replace(support=support._replace(x=x)))[0])
    direction = field(support.x)
    assert np.isfinite(flat(direction)).all()
    assert np.abs(flat(direction["inner_loss"]["network"]["output"])).max() > 1e-4
    np.testing.assert_array_equal(flat(field(support.x.at[3].set(1 - support.x[3]))), flat(direction))
    assert np.abs(flat(field(support.x.at[2].set(1 - support.x[2]))) - flat(direction)).max() > 1e-4


def test_the_sum_over_tasks_is_the_weighted_sum_of_their_fields(x64):
    model, inner = _net()
    learner = learned_loss(model, inner, START, STEPS, players=("head",))
    meta, keys = _filled(learner.init(jax.random.key(0))), task_keys(jax.random.key(1), 2)
    tasks, weights, field = [image_task(seed) for seed in range(2)], jnp.array([0.3, 0.7]), jax.jit(learner.field)
    singles = [field(meta, jax.random.clone(keys)[i], task)[0] for i, task in enumerate(tasks)]
    batch = jax.tree.map(lambda *rows: jnp.stack(rows), *tasks)
    together, _ = jax.jit(sum_over_tasks(learner.field))(meta, jax.random.clone(keys), batch, weights)
    np.testing.assert_allclose(flat(together), 0.3 * flat(singles[0]) + 0.7 * flat(singles[1]), rtol=1e-9, atol=1e-12)


def test_the_first_order_is_refused():
    model, inner = _net()
    with pytest.raises(ValueError, match="would not learn"):
        learned_loss(model, inner, START, STEPS, first_order=True)
