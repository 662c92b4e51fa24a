"""Learners against closed forms on quadratic tasks, finite differences, and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import bilinear, finite_difference, flat, image_task, points, quadratic_model, quadratic_task, tiny_vae

import metagen_jax as mg
from metagen_jax.models.vae import WITH_CONTEXT as PLAYERS

CURVATURE = np.array([[2.0, 0.3], [0.3, 0.5]])
RATE, STEPS = 0.2, 3
SHRINK = np.linalg.matrix_power(np.eye(2) - RATE * CURVATURE, STEPS)
META = {"model": np.array([0.5, 2.0])}
START = mg.fixed(optax.sgd(RATE))


def _direction(learner, meta, task):
    return learner.field(jax.tree.map(jnp.asarray, meta), jax.random.key(0), task)[0]


def _adapted(task):
    centre = np.asarray(task.support.x).mean(0)
    return centre + SHRINK @ (META["model"] - centre)


@pytest.fixture
def task(x64):
    return quadratic_task(np.random.default_rng(0), 2)


def test_maml_matches_the_closed_form_on_a_quadratic(task):
    learner = mg.maml(quadratic_model(jnp.asarray(CURVATURE)), START, STEPS)
    residual = CURVATURE @ (_adapted(task) - np.asarray(task.query.x).mean(0))
    np.testing.assert_allclose(_direction(learner, META, task)["model"], SHRINK.T @ residual, rtol=1e-12)


def test_fomaml_matches_the_closed_form_on_a_quadratic(task):
    learner = mg.fomaml(quadratic_model(jnp.asarray(CURVATURE)), START, STEPS)
    residual = CURVATURE @ (_adapted(task) - np.asarray(task.query.x).mean(0))
    np.testing.assert_allclose(_direction(learner, META, task)["model"], residual, rtol=1e-12)


def test_reptile_matches_the_closed_form_on_a_quadratic(task):
    learner = mg.reptile(quadratic_model(jnp.asarray(CURVATURE)), START, STEPS)
    np.testing.assert_allclose(_direction(learner, META, task)["model"], META["model"] - _adapted(task), rtol=1e-12)


def test_reptile_with_one_step_is_the_gradient_times_the_rate(task):
    model = quadratic_model(jnp.asarray(CURVATURE))
    gradient, _ = mg.vector_field(model.game)(jax.tree.map(jnp.asarray, META), jax.random.key(0), task.support)
    direction = _direction(mg.reptile(model, START, 1), META, task)
    np.testing.assert_allclose(direction["model"], RATE * gradient["model"], rtol=1e-12)


def test_anil_matches_the_closed_form_when_only_one_coordinate_moves(task):
    learner = mg.anil(quadratic_model(jnp.asarray(CURVATURE), ("body", "head")), START, 1, head=("head",))
    meta = {"body": META["model"][:1], "head": META["model"][1:]}
    inner = np.eye(2) - RATE * np.array([[0, 0], CURVATURE[1]])
    moved = META["model"] - RATE * np.array([0, 1]) * (CURVATURE @ (META["model"] - np.asarray(task.support.x).mean(0)))
    expected = inner.T @ (CURVATURE @ (moved - np.asarray(task.query.x).mean(0)))
    np.testing.assert_allclose(flat(_direction(learner, meta, task)), expected, rtol=1e-12)


def test_meta_sgd_matches_the_closed_form_for_its_rates(task):
    learner = mg.meta_sgd(quadratic_model(jnp.asarray(CURVATURE)), RATE, 1, players=("model",))
    meta = learner.init(jax.random.key(0)) | META
    meta["model/log_rate"] = np.log([0.1, 0.3])
    slope = CURVATURE @ (META["model"] - np.asarray(task.support.x).mean(0))
    residual = CURVATURE @ (META["model"] - [0.1, 0.3] * slope - np.asarray(task.query.x).mean(0))
    expected = -np.array([0.1, 0.3]) * slope * residual  # d L_Q / d log rate
    np.testing.assert_allclose(_direction(learner, meta, task)["model/log_rate"], expected, rtol=1e-10)


def test_joint_training_follows_the_gradient_of_support_and_query_together(task):
    learner = mg.joint(quadratic_model(jnp.asarray(CURVATURE)), START, STEPS)
    centre = np.concatenate([task.support.x, task.query.x]).mean(0)
    np.testing.assert_allclose(_direction(learner, META, task)["model"], CURVATURE @ (META["model"] - centre))


def test_through_is_the_field_of_the_game_over_tasks(task):
    model = quadratic_model(jnp.asarray(CURVATURE))
    adapt = mg.unroll(mg.vector_field(model.game), START, STEPS)
    meta = jax.tree.map(jnp.asarray, META)
    one = mg.through(model.game, adapt)(meta, jax.random.key(0), task)[0]
    other = mg.vector_field(mg.over_tasks(model.game, adapt))(meta, jax.random.key(0), task)[0]
    np.testing.assert_array_equal(one["model"], other["model"])


RATES = {player: 0.05 if player == "prior" else 5e-3 for player in PLAYERS}


def test_a_learned_rule_follows_a_shared_loss_once_however_many_parts_share_it(task):
    start = mg.learned(lambda psi: optax.sgd(jnp.exp(psi)), jnp.log(RATE))

    def rule_direction(parts):
        model = quadratic_model(jnp.asarray(CURVATURE), parts)
        learner = mg.maml(model, start, STEPS)
        meta = learner.init(jax.random.key(0)) | dict(
            zip(parts, jnp.split(jnp.asarray(META["model"]), len(parts)), strict=True)
        )
        direction, metrics = learner.field(meta, jax.random.key(0), task)
        return float(direction["rule"]), set(metrics)

    whole, names = rule_direction(("model",))
    assert abs(whole) > 1e-3
    assert "loss" in names  # one loss, one backward pass
    split, names_of_parts = rule_direction(("body", "head"))
    np.testing.assert_allclose(split, whole, rtol=1e-12)
    assert names_of_parts == names


LEARNERS = {
    "maml": lambda model: mg.maml(model, mg.fixed(optax.sgd(1e-2)), 3),
    "maml_mixed": lambda model: mg.maml(
        model, mg.fixed(optax.sgd(1e-2)), 3, inner_grad="forward_over_reverse", remat="nested"
    ),
    "maml_momentum": lambda model: mg.maml(model, mg.fixed(optax.sgd(1e-2, momentum=0.9)), 3),
    "maml_adam": lambda model: mg.maml(model, mg.fixed(optax.adam(1e-2, eps_root=1e-4)), 3),
    "maml_plus_plus": lambda model: mg.maml(model, mg.per_step(3, RATES, PLAYERS), 3),
    "maml_fast": lambda model: mg.maml(model, mg.per_step(3, RATES, FAST, elementwise=True), 3, players=FAST),
    "fomaml": lambda model: mg.fomaml(model, mg.fixed(optax.sgd(1e-2)), 3),
    "reptile": lambda model: mg.reptile(model, mg.fixed(optax.sgd(1e-2)), 3),
    "anil": lambda model: mg.anil(model, mg.fixed(optax.sgd(1e-2)), 3, head=("head", "prior")),
    "meta_sgd": lambda model: mg.meta_sgd(model, RATES, 3, players=PLAYERS),
    "joint": lambda model: mg.joint(model, mg.fixed(optax.sgd(1e-2)), 3),
}
FAST = ("prior", "context")
SECOND_ORDER = ("maml", "maml_mixed", "maml_momentum", "maml_adam", "maml_plus_plus", "maml_fast", "anil", "meta_sgd")


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_the_meta_gradient_of_a_vae_equals_finite_differences(x64, name):
    model, *_ = tiny_vae()
    learner = LEARNERS[name](model)
    meta = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), learner.init(jax.random.key(1)))
    task = image_task()
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), meta)

    @jax.jit
    def query_loss(meta):
        adapt_key, query_key = jax.random.split(jax.random.key(2))
        params, _ = learner.adapt(meta, adapt_key, task.support)
        return model.game(params, query_key, task.query)[0]["prior"]

    gradient, metrics = jax.jit(learner.field)(meta, jax.random.key(2), task)
    assert set(gradient) == set(meta)
    np.testing.assert_allclose(metrics["loss"], query_loss(meta), rtol=1e-12)
    for player in meta:  # each on its own, so that a small part cannot hide behind a large one
        only = {name: jax.tree.map(lambda leaf, on=name == player: leaf * on, d) for name, d in direction.items()}
        slope = flat(gradient) @ flat(only)
        np.testing.assert_allclose(slope, finite_difference(query_loss, meta, only), rtol=2e-5, atol=1e-7)


def test_the_meta_gradient_of_a_two_player_game_equals_finite_differences_for_every_player(x64):
    start = mg.per_step(4, {"x": 0.1, "y": 0.2}, ("x", "y"))
    model = mg.Model(lambda key: {"x": jnp.array(0.7), "y": jnp.array(-1.3)}, bilinear(0.2), lambda *a: jnp.zeros(1))
    learner = mg.maml(model, start, 4)
    meta = learner.init(jax.random.key(0))
    task = mg.Task(points([[0.2]]), points([[0.6]]))
    gradient, _ = learner.field(meta, jax.random.key(0), task)
    assert set(gradient) == {"x", "y", "x/log_rate", "y/log_rate"}
    for name in meta:
        owner = name[0]

        def own_loss(meta, owner=owner):
            params, _ = learner.adapt(meta, jax.random.key(1), task.support)
            return model.game(params, jax.random.key(1), task.query)[0][owner]

        rng = np.random.default_rng(1)
        only = {other: jnp.asarray(rng.normal(size=tree.shape)) * (other == name) for other, tree in meta.items()}
        np.testing.assert_allclose(
            flat(gradient[name]) @ flat(only[name]), finite_difference(own_loss, meta, only), rtol=1e-6
        )


def _padded(task):
    """Add two rows of zero weight to the support."""
    support = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:2]]), task.support)
    return task._replace(support=support._replace(weight=support.weight.at[3:].set(0.0)))


def test_padding_a_set_does_not_change_what_is_adapted_to():
    model, *_ = tiny_vae()
    learner, task = LEARNERS["maml_fast"](model), image_task()
    meta = learner.init(jax.random.key(1))
    plain, _ = jax.jit(learner.adapt)(meta, jax.random.key(2), task.support)
    padded, _ = jax.jit(learner.adapt)(meta, jax.random.key(2), _padded(task).support)
    np.testing.assert_allclose(flat(padded), flat(plain), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_conforms(name):
    """Zero-weight padding and other tasks change nothing; the path meets the adapter; the field is finite and moves."""
    model, *_ = tiny_vae()
    learner = LEARNERS[name](model)
    meta = learner.init(jax.random.key(1))
    task = _padded(image_task())
    keys = jax.random.split(jax.random.key(3), 2)
    adapt = jax.jit(jax.vmap(learner.adapt, in_axes=(None, 0, 0)))
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[_padded(image_task(seed)).support for seed in (0, 5)])
    adapted, trace = adapt(meta, jax.random.clone(keys), both)
    assert trace["loss"].shape == (2, 3)

    other = both._replace(x=both.x.at[1, :3].set(1 - both.x[1, :3]))
    again, _ = adapt(meta, jax.random.clone(keys), other)
    assert (flat(jax.tree.map(lambda leaf: leaf[0], again)) == flat(jax.tree.map(lambda leaf: leaf[0], adapted))).all()
    changed = jax.tree.map(lambda a, b: a[1] - b[1], again, adapted)
    assert np.abs(flat(changed)).max() > 0

    other = both._replace(x=both.x.at[:, 3:].set(1 - both.x[:, 3:]))
    ignoring, _ = adapt(meta, jax.random.clone(keys), other)
    np.testing.assert_array_equal(flat(ignoring), flat(adapted))

    path, _ = jax.jit(learner.path, static_argnums=3)(meta, jax.random.clone(keys)[0], task.support, 3)
    last = jax.tree.map(lambda leaf: leaf[3], path)
    np.testing.assert_allclose(flat(last), flat(jax.tree.map(lambda leaf: leaf[0], adapted)), rtol=2e-4, atol=2e-5)
    begin = {player: jax.tree.map(lambda leaf: leaf[0], path[player]) for player in path}
    np.testing.assert_array_equal(flat(begin), flat({player: meta[player] for player in begin}))

    direction, _ = jax.jit(learner.field)(meta, jax.random.clone(keys)[1], task)
    assert np.isfinite(flat(direction)).all()
    assert np.abs(flat(direction)).max() > 1e-4


def test_reptile_refuses_a_start_that_it_cannot_teach():
    with pytest.raises(ValueError, match="displacement"):
        mg.reptile(quadratic_model(jnp.eye(2)), mg.per_step(2, 0.1, ("model",)), 2)


def test_a_learner_without_a_path_says_so():
    learner = mg.MetaLearner(lambda key: {}, lambda meta, key, support: (meta, {}), lambda meta, key, task: (meta, {}))
    with pytest.raises(ValueError, match="path"):
        learner.path({}, jax.random.key(0), points([[0.0]]), 1)
