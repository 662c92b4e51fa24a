"""The learned initialiser against MAML, the best linear map, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import finite_difference, flat

import metagen_jax as mg
from metagen_jax.models.heads import linear
from metagen_jax.models.initialiser import encoded, initialiser
from metagen_jax.models.networks import Network, mlp, mlp_features

EVENT, WAY = (3,), 2
CHOSEN = ("head", "modulation", "body")
START = mg.fixed(optax.sgd(0.2))


def _classifier():
    return mg.classifier(mlp_features(EVENT, (4,), activation=jnp.tanh), 4, WAY, linear(1.0)).model


def _initialised(rank=None, players=CHOSEN):
    encoder = mlp((EVENT[0] + WAY,), (4,), (3,), activation=jnp.tanh)
    return initialiser(encoder, 3, players=players, num_classes=WAY, rank=rank)(_classifier())


def _random(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(float), tree)


def _examples(labels, seed=0):
    x = np.random.default_rng(seed).normal(size=(len(labels), *EVENT))
    return mg.Examples(jnp.asarray(x, float), jnp.asarray(labels, jnp.int32), jnp.ones(len(labels)))


@pytest.fixture
def task(x64):
    return mg.Task(_examples([0, 1, 1]), _examples([1, 0, 0], seed=1))


@pytest.mark.parametrize("rank", [None, 2])
def test_it_begins_as_maml_with_a_gradient_of_its_own(task, rank):
    model, embed = _initialised(rank)
    meta = jax.jit(model.init)(jax.random.key(0))
    known = {name: tree for name, tree in meta.items() if name != "initialiser"}
    ours, _ = jax.jit(mg.amortised(model, embed, START, 2).field)(meta, jax.random.key(1), task)
    theirs, _ = jax.jit(mg.maml(_classifier(), START, 2).field)(known, jax.random.key(1), task)
    assert set(ours) == {*theirs, "initialiser"}
    np.testing.assert_allclose(flat({name: ours[name] for name in theirs}), flat(theirs), rtol=1e-5, atol=1e-7)
    assert np.abs(flat(ours["initialiser"]["maps"])).max() > 1e-4


@pytest.mark.parametrize("rank", [None, 2])
def test_the_meta_gradient_through_what_is_read_and_gradient_steps_equals_finite_differences(task, rank):
    model, embed = _initialised(rank)
    learner = mg.amortised(model, embed, START, 2)
    meta = _random(jax.eval_shape(learner.init, jax.random.key(0)))

    @jax.jit
    def loss(meta):
        adapted, _ = learner.adapt(meta, jax.random.key(2), task.support)
        return model.game(adapted, jax.random.key(2), task.query)[0]["head"]

    gradient, _ = jax.jit(learner.field)(meta, jax.random.key(2), task)
    along = _random(meta, seed=1)
    parts = {name: {name: along[name]} for name in CHOSEN}
    parts |= {name: {"initialiser": {name: along["initialiser"][name]}} for name in ("encoder", "maps")}
    for part in parts.values():
        only = jax.tree.map(np.zeros_like, along)
        for name, tree in part.items():
            only[name] = {**only[name], **tree}
        slope = flat(gradient) @ flat(only)
        assert abs(slope) > 1e-5
        np.testing.assert_allclose(slope, finite_difference(loss, meta, only), rtol=1e-6)


def test_a_low_rank_map_is_a_product_of_its_factors(task):
    model, embed = _initialised(rank=2)
    meta = _random(jax.eval_shape(model.init, jax.random.key(0)))
    code = encoded(mlp((5,), (4,), (3,), activation=jnp.tanh), meta["initialiser"]["encoder"], task.support, WAY)
    read, maps = jax.jit(embed)(meta, task.support), meta["initialiser"]["maps"]["head"]
    change = maps["kernel"]["left"] @ np.diag(code @ maps["kernel"]["code"]) @ maps["kernel"]["right"].T
    np.testing.assert_allclose(read["head"]["kernel"], meta["head"]["kernel"] + change, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(read["head"]["bias"], meta["head"]["bias"] + code @ maps["bias"]["full"], rtol=1e-6)
    assert set(read) == set(CHOSEN)


def test_the_order_of_the_examples_and_padding_change_nothing_but_labels_and_examples_do(task):
    model, embed = _initialised()
    meta, read = _random(jax.eval_shape(model.init, jax.random.key(0))), jax.jit(embed)
    support = _examples([0, 1, 1, 0, 1])._replace(weight=jnp.array([1.0, 1.0, 1.0, 0.0, 0.0]))
    before = flat(read(meta, support))
    order = np.array([3, 2, 0, 4, 1])
    np.testing.assert_allclose(flat(read(meta, jax.tree.map(lambda leaf: leaf[order], support))), before, rtol=1e-9)
    padding = support._replace(x=support.x.at[3:].set(7.0), label=support.label.at[3:].set(0))
    np.testing.assert_array_equal(flat(read(meta, padding)), before)
    assert np.abs(flat(read(meta, support._replace(label=1 - support.label))) - before).max() > 1e-3
    assert np.abs(flat(read(meta, support._replace(x=support.x.at[0].add(1.0)))) - before).max() > 1e-3
    empty = flat(read(meta, support._replace(weight=jnp.zeros(5))))
    np.testing.assert_allclose(empty, flat({name: meta[name] for name in CHOSEN}))


def test_the_best_map_of_linear_regression_tasks_is_found(x64):
    """Tasks w ~ N(m, t^2 I), y = u w + noise, an orthonormal design and e = mean of u y: the posterior mean of w is

    r e + (1 - r) m,   r = t^2 / (t^2 + s^2 / N),

    which the least-squares solution over the drawn tasks comes near, and descent arrives at exactly.
    """
    rng, tasks, rows, spread, noise = np.random.default_rng(0), 400, 4, 1.0, 1.5
    mean = np.array([1.0, -2.0])
    design = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    w = mean + spread * rng.normal(size=(tasks, 2))
    support = np.einsum("nd,td->tn", design, w) + noise * rng.normal(size=(tasks, rows))
    points = rng.normal(size=(tasks, 6, 2))
    query = np.einsum("tnd,td->tn", points, w)

    def batch(u, y):
        x = np.concatenate([np.broadcast_to(u, (tasks, *u.shape[-2:])), y[:, :, None]], axis=2)
        return mg.Examples(jnp.asarray(x), jnp.zeros(x.shape[:2], int), jnp.ones(x.shape[:2]))

    def loss(params, key, batch):
        return 0.5 * jnp.square(batch.x[:, :2] @ params["w"] - batch.x[:, 2]).mean(), {}

    linear_model = mg.Model(lambda key: {"w": jnp.zeros(2)}, mg.cooperative(loss, ("w",)), lambda *arguments: None)
    products = Network(lambda key: {}, lambda params, x: x[:, :2] * x[:, 2:])
    learner = mg.amortised(*initialiser(products, 2, players=("w",))(linear_model))
    task, keys = mg.Task(batch(design, support), batch(points, query)), jax.random.split(jax.random.key(0), tasks)

    @jax.jit
    def descended(meta):
        def step(meta, _):
            directions, _ = jax.vmap(learner.field, in_axes=(None, 0, 0))(meta, jax.random.clone(keys), task)
            return jax.tree.map(lambda leaf, change: leaf - 0.2 * change.mean(0), meta, directions), None

        return jax.lax.scan(step, meta, None, 800)[0]

    found = descended(learner.init(jax.random.key(1)))
    means = support @ design / rows
    columns = np.concatenate([points, np.einsum("tnd,te->tned", points, means).reshape(tasks, 6, 4)], axis=2)
    best = np.linalg.lstsq(columns.reshape(-1, 6), query.ravel(), rcond=None)[0]
    np.testing.assert_allclose(found["w"], best[:2], rtol=1e-4)
    np.testing.assert_allclose(found["initialiser"]["maps"]["w"]["full"], best[2:].reshape(2, 2), rtol=1e-4, atol=1e-5)
    ratio = spread**2 / (spread**2 + noise**2 / rows)
    np.testing.assert_allclose(best[2:].reshape(2, 2), ratio * np.eye(2), atol=0.06)
    np.testing.assert_allclose(best[:2], (1 - ratio) * mean, atol=0.12)


def test_what_cannot_be_initialised_is_refused():
    encoder = mlp(EVENT, (), (2,))
    with pytest.raises(ValueError, match="players='head'"):
        initialiser(encoder, 2, players="head")
    with pytest.raises(ValueError, match="rank=0"):
        initialiser(encoder, 2, players=("head",), rank=0)
    with pytest.raises(ValueError, match=r"initialise \['tail'\]"):
        jax.eval_shape(initialiser(encoder, 2, players=("tail",))(_classifier()).model.init, jax.random.key(0))
    with pytest.raises(ValueError, match="another name"):
        jax.eval_shape(
            initialiser(encoder, 2, players=("head",), name="body")(_classifier()).model.init, jax.random.key(0)
        )
    model, embed = initialiser(encoder, 3, players=("head",))(_classifier())
    with pytest.raises(ValueError, match="makes 3 features, got 2"):
        jax.eval_shape(lambda key: embed(model.init(key), _examples([0, 1])), jax.random.key(0))
