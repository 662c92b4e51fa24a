"""Pinned tasks, measured candidates and the sampler between them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import flat, quadratic_model, tiny_images

import metagen_jax as mg
from metagen_jax.strategies.candidates import Rule, Statistics, chosen, measured, pinned, projected
from metagen_jax.strategies.drawing import normalised

RATE = 0.3


def _centres(way=2):
    """Tasks of points around the centres of their classes: [6, 3] numbers are the data."""

    def describe(data, key):
        return jax.random.permutation(key, data.shape[0])[:way].astype(jnp.int32)

    def make(data, key, spec):
        noise = 0.1 * jax.random.normal(key, (2, way, 3))
        label = jnp.arange(way, dtype=jnp.int32)
        sets = [mg.Examples(data[spec] + part, label, jnp.ones(way)) for part in noise]
        return mg.Task(*sets)

    data = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
    return mg.TaskFamily(data, describe, make)


def _learner():
    return mg.maml(quadratic_model(jnp.diag(jnp.array([1.0, 2.0, 0.5]))), mg.fixed(optax.sgd(RATE)), 1)


def _made(family, seed, key):
    def both(data, describe_key, make_key):
        spec = family.describe(data, describe_key)
        return spec, family.make(data, make_key, spec)

    return jax.jit(both)(family.data, jax.random.key(seed), jax.random.key(key))


def test_a_pinned_description_determines_its_task_whatever_key_makes_it():
    family = pinned(mg.episodes(tiny_images(), (1, 3), 3, way=2))
    (spec, task), (_, again), (_, other) = (_made(family, *seeds) for seeds in ((0, 1), (0, 2), (1, 1)))
    assert set(spec) == {"task", "seed"}
    np.testing.assert_array_equal(flat(task), flat(again))
    assert np.abs(flat(task) - flat(other)).max() == 1


def test_a_pinned_task_is_the_family_s_task_of_its_seed():
    family = _centres()
    spec, task = _made(pinned(family), 0, 1)
    expected = family.make(family.data, jax.random.wrap_key_data(spec["seed"]), spec["task"])
    np.testing.assert_allclose(flat(task), flat(expected), rtol=1e-6)


def test_the_statistics_of_a_quadratic_are_its_loss_and_gradient_after_adapting():
    learner, family = _learner(), _centres()
    _, task = _made(family, 0, 1)
    meta = {"model": jnp.array([0.3, -1.0, 2.0])}
    measure = measured(
        quadratic_model(jnp.diag(jnp.array([1.0, 2.0, 0.5]))).game,
        learner.adapt,
        players=("model",),
        embed=lambda meta, task: task.support.x.mean(0),
    )
    found = jax.jit(measure)(meta, jax.random.key(0), task)
    curvature, support, query = np.diag([1.0, 2.0, 0.5]), task.support.x.mean(0), task.query.x.mean(0)
    contraction = np.eye(3) - RATE * curvature
    adapted = contraction @ np.asarray(meta["model"]) + RATE * curvature @ support
    np.testing.assert_allclose(found.loss, 0.5 * (adapted - query) @ curvature @ (adapted - query), rtol=1e-5)
    np.testing.assert_allclose(found.sketch, contraction @ curvature @ (adapted - query), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.embedding, support, rtol=1e-6)


def test_without_players_there_is_no_sketch_and_the_loss_is_the_same():
    learner, game = _learner(), quadratic_model(jnp.eye(3)).game
    _, task = _made(_centres(), 0, 1)
    meta = {"model": jnp.ones(3)}
    plain = jax.jit(measured(game, learner.adapt))(meta, jax.random.key(0), task)
    with_sketch = jax.jit(measured(game, learner.adapt, players=("model",), sketch=2))(meta, jax.random.key(0), task)
    assert (plain.sketch.shape, plain.embedding.shape, with_sketch.sketch.shape) == ((0,), (0,), (2,))
    np.testing.assert_allclose(plain.loss, with_sketch.loss, rtol=1e-6)


def test_the_loss_of_rivals_is_the_sum_and_each_is_sketched_by_its_own():
    def game(params, key, batch):
        x, y = params["x"], params["y"]
        return {"x": x**2 + y, "y": 3 * x * y}, {}

    meta = {"x": jnp.array(2.0), "y": jnp.array(5.0)}
    _, task = _made(_centres(), 0, 1)
    measure = measured(game, lambda meta, key, support: (meta, {}), players=("x", "y"))
    found = measure(meta, jax.random.key(0), task)
    np.testing.assert_allclose(found.loss, 4 + 5 + 30)
    np.testing.assert_allclose(found.sketch, [4.0, 6.0])


def test_the_projection_is_linear_and_has_one_sign_in_each_column():
    matrix = np.asarray(jax.jit(jax.vmap(lambda row: projected(row, 4)))(jnp.eye(10))).T  # [4, 10]
    np.testing.assert_array_equal(np.abs(matrix).sum(0), 1.0)
    assert set(np.abs(matrix).sum(1)) <= {1.0, 2.0, 3.0}
    x = np.random.default_rng(0).normal(size=10).astype("f4")
    np.testing.assert_allclose(projected(jnp.asarray(x), 4), matrix @ x, rtol=1e-5, atol=1e-6)


def test_the_projection_keeps_inner_products():
    rng = np.random.default_rng(0)
    common = rng.normal(size=(1, 2000))
    vectors = (common + rng.normal(size=(8, 2000))).astype("f4")
    sketches = np.asarray(jax.jit(jax.vmap(lambda row: projected(row, 500)))(vectors))
    exact, found = vectors @ vectors.T, sketches @ sketches.T
    assert np.abs(found - exact).max() < 0.2 * exact.max()  # three deviations of 1 / sqrt(500)
    assert np.abs(found - exact).mean() < 0.06 * exact.max()


def _first():
    """A rule that takes the candidates of largest loss and remembers the scores that came back."""

    def choose(state, key, statistics, num_tasks):
        loss, indices = jax.lax.top_k(statistics.loss, num_tasks)
        return indices, normalised(loss)

    return Rule(lambda key: (jnp.zeros(2), jnp.zeros(2)), choose, lambda state, found, scores: (found.loss, scores))


def test_what_was_measured_is_what_is_learned_from():
    """The rule's statistics of the chosen come back with the scores, and are the same numbers."""
    learner, family = _learner(), pinned(_centres())
    game = quadratic_model(jnp.diag(jnp.array([1.0, 2.0, 0.5]))).game
    sampler = chosen(family, 2, 6, measured(game, learner.adapt), _first(), chunk=3)
    optimizer = optax.sgd(0.1)
    state = mg.init_state(learner, sampler, optimizer, jax.random.key(0))
    state, metrics = jax.jit(mg.make_step(learner, family, sampler, optimizer))(state, family.data)
    measured_losses, scores = state.sampler
    assert scores.min() > 0.01
    np.testing.assert_allclose(measured_losses, scores, rtol=1e-5)
    weights = scores / scores.sum()
    np.testing.assert_allclose(metrics["loss"], weights @ scores, rtol=1e-5)
    np.testing.assert_allclose(metrics["effective_tasks"], 1 / np.square(weights).sum(), rtol=1e-5)


def _by_class(bad):
    """A sampler over tasks of one class, whose measured loss is its class, not finite for those in `bad`."""

    def measure(meta, key, task):
        which = jnp.rint(task.support.x[0, 0]).astype(int)
        loss = jnp.where(jnp.isin(which, jnp.asarray(bad, int)), jnp.nan, which + 1.0)
        return Statistics(loss, jnp.ones(1), jnp.zeros(0))

    plain = _centres(way=1)
    family = pinned(plain._replace(data=jnp.arange(6.0)[:, None] * jnp.ones((1, 3))))
    sampler = chosen(family, 2, 40, measure, _first())
    return jax.jit(lambda key: sampler.propose((), family.data, key, {}))(jax.random.key(0))


def test_candidates_that_are_not_finite_are_never_chosen():
    specs, _ = _by_class([5, 4])
    np.testing.assert_array_equal(specs["task"][:, 0], [3, 3])
    specs, weights = _by_class(range(6))  # no rule sees what is not finite, even where nothing else is there
    np.testing.assert_array_equal(specs["statistics"].loss, 0.0)
    np.testing.assert_allclose(weights, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 0}, "1 <= tasks"),
        ({"num_tasks": 5, "num_candidates": 4}, "1 <= tasks"),
        ({"chunk": 0}, "chunk"),
        ({"chunk": 3}, "divide the 4 candidates"),
        ({"family": _centres()}, "pinned"),
    ],
)
def test_arguments_of_the_sampler_are_checked(options, message):
    arguments = {"family": pinned(_centres()), "num_tasks": 2, "num_candidates": 4, "measure": None, "rule": _first()}
    with pytest.raises(ValueError, match=message):
        chosen(**{**arguments, **options})


@pytest.mark.parametrize("options", [{"sketch": -1}, {"sketch": 3}, {"players": "model"}])
def test_arguments_of_the_measure_are_checked(options):
    with pytest.raises(ValueError, match="expected players"):
        measured(None, None, **options)
