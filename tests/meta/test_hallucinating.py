"""Learners with an extended support: finite differences, both forms of the inner loop, and what a generator learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import finite_difference, flat, points, quadratic_model

import metagen_jax as mg
from metagen_jax.adapt.hallucinated import hallucinated
from metagen_jax.meta.annealed import field_at
from metagen_jax.meta.learners.hallucinating import hallucinating
from metagen_jax.models.hallucinator import with_hallucinator
from metagen_jax.models.networks import mlp, mlp_features

EVENT, FEATURES, WAY, LATENTS = (3,), 4, 2, 2
START = mg.fixed(optax.sgd(0.3))
BODY = mlp_features(EVENT, (FEATURES,), activation=jnp.tanh)
NETWORK = mlp((EVENT[0] + LATENTS,), (4,), EVENT, activation=jnp.tanh)


def _learner(kind, num=2, steps=2, **options):
    built = mg.classifier(BODY, FEATURES, WAY, mg.prototypes() if kind == "prototypes" else mg.linear(1.0))
    model, generate = with_hallucinator(built.model, NETWORK, LATENTS)
    if kind == "prototypes":
        plain = mg.amortised(model, built.embed)
    elif kind == "maml_plus_plus":
        plain = mg.maml_plus_plus(model, START, 2, multi_step_until=5)
    else:
        plain = mg.maml(model, START, steps, **options)
    return plain, hallucinating(plain, generate, num, weight=0.7)


def _random(learner, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(learner.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape), shapes)


def _examples(labels, seed):
    x = np.random.default_rng(seed).normal(size=(len(labels), *EVENT))
    return mg.Examples(jnp.asarray(x), jnp.asarray(labels, jnp.int32), jnp.ones(len(labels)))


@pytest.fixture
def task(x64):
    return mg.Task(_examples([0, 1, 1], 1), _examples([1, 0, 0, 1], 2))


def _field(learner, task):
    return jax.jit(lambda meta: learner.field(meta, jax.random.key(2), task))


@pytest.mark.parametrize("kind", ["prototypes", "maml"])
def test_the_meta_gradient_of_every_player_equals_finite_differences(task, kind):
    _, learner = _learner(kind)
    meta, field = _random(learner), _field(learner, task)
    direction, _ = field(meta)
    assert set(direction) == {"body", "modulation", "head", "hallucinator"}
    along = _random(learner, seed=3)
    players = ("hallucinator", "body") if kind == "prototypes" else ("hallucinator", "head")
    for player in players:
        only = {name: jax.tree.map(lambda d, on=name == player: on * d, tree) for name, tree in along.items()}
        slope = flat(direction) @ flat(only)
        assert abs(slope) > 1e-5
        np.testing.assert_allclose(slope, finite_difference(lambda meta: field(meta)[1]["loss"], meta, only), rtol=1e-6)


def test_no_generated_example_is_the_learner_itself():
    plain, extended = _learner("maml", num=0)
    assert extended is plain


def test_kernels_that_are_left_factored_give_the_same_directions(task):
    _, dense = _learner("maml", num=1, steps=1, form="plain")
    _, dual = _learner("maml", num=1, steps=1, form="dual")
    meta = _random(dense)
    ours, theirs = _field(dual, task)(meta)[0], _field(dense, task)(meta)[0]
    np.testing.assert_allclose(flat(ours), flat(theirs), rtol=1e-9, atol=1e-12)


def test_the_loss_after_every_step_ends_as_that_after_the_last():
    _, annealed = _learner("maml_plus_plus")
    _, maml = _learner("maml")
    task = mg.Task(_examples([0, 1], 1), _examples([1, 0], 2))
    meta = jax.tree.map(lambda leaf: jnp.asarray(leaf, "f4"), _random(maml))
    key = jax.random.key(2)

    @jax.jit
    def directions(meta):
        late = field_at(annealed.field, 5)(meta, jax.random.clone(key), task)[0]
        early = field_at(annealed.field, 0)(meta, jax.random.clone(key), task)[0]
        return late, maml.field(meta, jax.random.clone(key), task)[0], early

    late, expected, early = (flat(direction["hallucinator"]) for direction in directions(meta))
    np.testing.assert_allclose(late, expected, rtol=1e-4, atol=1e-7)
    assert np.abs(early - expected).max() > 1e-4


def test_the_path_ends_where_the_adapter_does(task):
    _, learner = _learner("maml")
    meta, key = _random(learner), jax.random.key(2)
    adapted, _ = jax.jit(learner.adapt)(meta, jax.random.clone(key), task.support)
    path, _ = jax.jit(learner.path, static_argnums=3)(meta, jax.random.clone(key), task.support, 2)
    np.testing.assert_allclose(flat(jax.tree.map(lambda leaf: leaf[2], path["head"])), flat(adapted["head"]), rtol=1e-9)
    np.testing.assert_array_equal(flat(jax.tree.map(lambda leaf: leaf[0], path["head"])), flat(meta["head"]))


def test_the_generator_learns_what_the_query_needs(x64):
    """A support that is off by b: with 3 copies moved by c, the mean is off by b + 3/4 c, so that c = -4/3 b is best.

    Both routes agree: the learner's own game with another support, and the adapter with another support.
    """
    model, off = quadratic_model(jnp.eye(2)), np.array([1.0, -2.0])
    model = model._replace(init=lambda key: {"model": jnp.zeros(2), "shift": jnp.zeros(2)})
    plain = mg.amortised(model, lambda meta, support: {"model": support.weight @ support.x / support.weight.sum()})

    def generate(meta, key, x):
        return x + meta["shift"][None]

    learner = hallucinating(plain, generate, 3)
    other = mg.through(model.game, hallucinated(generate, 3, plain.adapt))
    rng = np.random.default_rng(0)
    centre = rng.normal(size=2)
    task = mg.Task(points([centre + off]), points([centre]))
    meta, key = model.init(None), jax.random.key(0)
    np.testing.assert_allclose(
        learner.field(meta, jax.random.clone(key), task)[0]["shift"],
        other(meta, jax.random.clone(key), task)[0]["shift"],
        rtol=1e-12,
    )

    @jax.jit
    def step(meta):
        direction, _ = learner.field(meta, jax.random.clone(key), task)
        return meta | {"shift": meta["shift"] - direction["shift"]}

    for _ in range(60):
        meta = step(meta)
    np.testing.assert_allclose(meta["shift"], -4 / 3 * off, rtol=1e-6)


def test_learners_of_another_direction_are_refused():
    model = quadratic_model(jnp.eye(2))
    for learner in (mg.reptile(model, START, 1), mg.joint(model, START, 1)):
        with pytest.raises(ValueError, match="follows another direction"):
            hallucinating(learner, lambda meta, key, x: x, 1)
