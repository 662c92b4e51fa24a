"""Distillation against the plain learner, NumPy, and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import finite_difference, flat

import metagen_jax as mg
from metagen_jax.models.networks import mlp_features
from metagen_jax.population.distillation import (
    TEACHERS,
    distilled,
    divergences,
    holding,
    with_teachers,
    without_teachers,
)
from metagen_jax.population.ensemble import ensemble

EVENT, FEATURES, WAY = (3,), 4, 3
BODY = mlp_features(EVENT, (FEATURES,), activation=jnp.tanh, normalisation="none")
BUILT = mg.classifier(BODY, FEATURES, WAY)
STUDENT = mg.anil(BUILT.model, mg.fixed(optax.sgd(0.3)), 1, head=("head",), form="plain")


def _answer(traits, meta, key, task):
    """Return log p of a teacher that moves its bias by the mean of the support."""
    shift = traits["rate"] * task.support.x.mean(0)
    head = {**meta["head"], "bias": meta["head"]["bias"] + shift}
    return jax.nn.log_softmax(BUILT.logits({**meta, "head": head}, task.query.x))


MIXED = ensemble(_answer)


def _teacher(teachers, key, task):
    return MIXED(teachers["traits"], teachers["meta"], key, task)


def _random(seed, lead=()):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(BUILT.model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.7 * rng.normal(size=(*lead, *leaf.shape)), float), shapes)


def _examples(labels, weights, seed):
    x = np.random.default_rng(seed).normal(size=(len(labels), *EVENT))
    return mg.Examples(jnp.asarray(x, float), jnp.asarray(labels, jnp.int32), jnp.asarray(weights, float))


def _task(query_labels=(1, 0, 2, -1, 1)):
    return mg.Task(_examples([0, 1, 2], [1.0] * 3, 0), _examples(query_labels, [1.0, 1.0, 0.5, 1.0, 0.0], 1))


def _meta():
    return with_teachers(_random(0), {"traits": {"rate": jnp.array([0.1, 0.5])}, "meta": _random(1, (2,))})


@functools.cache
def _field(share):
    learner = distilled(STUDENT, BUILT.model, BUILT.logits, _teacher, share=share, temperature=2.0)
    return jax.jit(learner.field)


def test_the_divergence_is_that_of_tempered_probabilities():
    rng = np.random.default_rng(0)
    log_q, logits = rng.normal(size=(2, 4, 3)).astype("f4")
    q, p = (np.exp(values / 2.5) / np.exp(values / 2.5).sum(1, keepdims=True) for values in (log_q, logits))
    np.testing.assert_allclose(divergences(log_q, logits, 2.5), (q * np.log(q / p)).sum(1), rtol=1e-4)
    np.testing.assert_allclose(divergences(logits, logits, 0.5), 0.0, atol=1e-6)


def test_a_teacher_that_is_certain_is_a_label():
    log_q, logits = jnp.array([[0.0, -jnp.inf]]), jnp.array([[0.3, 1.0]])
    value, gradient = jax.value_and_grad(lambda logits: divergences(log_q, logits, 1.0)[0])(logits)
    np.testing.assert_allclose(value, -jax.nn.log_softmax(logits)[0, 0], rtol=1e-6)
    np.testing.assert_allclose(gradient, jax.nn.softmax(logits) - jnp.array([[1.0, 0.0]]), rtol=1e-5)


def test_without_a_share_it_is_the_plain_learner(x64):
    direction, metrics = _field(0.0)(_meta(), jax.random.key(0), _task())
    expected, plain = jax.jit(STUDENT.field)(_random(0), jax.random.key(0), _task())
    assert set(direction) == set(expected)
    np.testing.assert_allclose(flat(direction), flat(expected), rtol=1e-12)
    np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=1e-12)
    assert float(metrics["distillation"]) > 0.01


def test_the_loss_is_that_of_labels_and_of_teachers_by_hand(x64):
    task, meta = _task(), _meta()
    _, metrics = _field(0.7)(meta, jax.random.key(0), task)
    params, _ = jax.jit(STUDENT.adapt)(_random(0), jax.random.key(5), task.support)
    log_q = np.asarray(jax.jit(_teacher)(meta[TEACHERS], jax.random.key(6), task))
    logits = np.asarray(BUILT.logits(params, task.query.x))
    t, weight = 2.0, np.asarray(task.query.weight)
    q, p = (np.exp(values / t) / np.exp(values / t).sum(1, keepdims=True) for values in (log_q, logits))
    soft = (weight * (q * np.log(q / p)).sum(1)).sum() / weight.sum()  # of all that have a weight, labelled or not
    np.testing.assert_allclose(metrics["distillation"], soft, rtol=1e-9)
    np.testing.assert_allclose(metrics["loss"], 0.3 * metrics["cross_entropy"] + 0.7 * t**2 * soft, rtol=1e-9)
    same = weight[log_q.argmax(1) == logits.argmax(1)].sum() / weight.sum()
    np.testing.assert_allclose(metrics["agreement"], same, rtol=1e-9)


def test_the_gradient_equals_finite_differences_and_teachers_have_none(x64):
    meta, task, field = _meta(), _task(), _field(0.7)
    direction, _ = field(meta, jax.random.key(0), task)
    assert TEACHERS not in direction
    along = _random(3)
    slope = flat(direction) @ flat(along)
    assert abs(slope) > 1e-2

    def loss(student):
        return field(with_teachers(student, meta[TEACHERS]), jax.random.key(0), task)[1]["loss"]

    np.testing.assert_allclose(slope, finite_difference(loss, without_teachers(meta), along), rtol=1e-6)


def test_queries_without_a_label_are_learned_from(x64):
    unlabelled = _task(query_labels=(-1,) * 5)
    with_labels, _ = _field(1.0)(_meta(), jax.random.key(0), _task())
    without, _ = _field(1.0)(_meta(), jax.random.key(0), unlabelled)
    np.testing.assert_allclose(flat(without), flat(with_labels), rtol=1e-12)
    assert np.abs(flat(without)).max() > 1e-2


def test_adaptation_and_path_do_not_see_the_teachers():
    learner = distilled(STUDENT, BUILT.model, BUILT.logits, _teacher)
    meta, support = _meta(), _task().support
    adapted, _ = jax.jit(learner.adapt)(meta, jax.random.key(0), support)
    path, _ = jax.jit(learner.path, static_argnums=3)(without_teachers(meta), jax.random.key(0), support, 1)
    assert TEACHERS not in adapted
    np.testing.assert_allclose(flat(adapted), flat(jax.tree.map(lambda leaf: leaf[1], path)), rtol=1e-5)


def test_teachers_have_noise_of_their_own():
    def adapt(meta, key, support):
        return {**meta, "adapting": jax.random.normal(key, ())}, {}

    def game(params, key, query):
        return {"x": params["x"]}, {"adapting": params["adapting"], "playing": jax.random.normal(key, ())}

    def certain(noise):  # log p of two classes, of one query
        return jnp.stack([noise, 0.0 * noise])[None]

    model = mg.Model(lambda key: {"x": jnp.ones(())}, game, None)
    student = mg.MetaLearner(model.init, adapt, mg.through(game, adapt))
    learner = distilled(
        student, model, lambda params, x: jnp.zeros((1, 2)), lambda teachers, key, task: certain(jax.random.normal(key))
    )
    query = mg.Examples(jnp.zeros((1, 3)), jnp.zeros(1, jnp.int32), jnp.ones(1))
    meta = with_teachers({"x": jnp.ones(())}, jnp.ones(()))
    _, metrics = jax.jit(learner.field)(meta, jax.random.key(0), mg.Task(query, query))
    seen = [float(metrics["distillation"])]
    seen += [float(divergences(certain(metrics[name]), jnp.zeros((1, 2)), 1.0)[0]) for name in ("adapting", "playing")]
    assert abs(np.subtract.outer(seen, seen))[np.triu_indices(3, 1)].min() > 1e-4


def test_a_meta_step_moves_the_student_and_leaves_the_teachers_without_state():
    learner = distilled(STUDENT, BUILT.model, BUILT.logits, _teacher)
    family = mg.TaskFamily(_task(), lambda data, key: jnp.zeros(1, jnp.int32), lambda data, key, spec: data)
    sampler, optimizer = mg.uniform(family, 1), holding(optax.adamw(0.01, weight_decay=0.1))
    teachers, before = _meta()[TEACHERS], _random(0)
    state = mg.init_state(learner, sampler, optimizer, jax.random.key(0), meta=with_teachers(_random(0), teachers))
    assert flat(state.opt).size < 2 * flat(before).size + 5
    after, _ = mg.run_chunk(mg.make_step(learner, family, sampler, optimizer), 1)(state, family.data)
    np.testing.assert_array_equal(flat(after.meta[TEACHERS]), flat(teachers))  # which were not donated
    for name in before:
        assert np.abs(flat(after.meta[name]) - flat(before[name])).max() > 1e-3


@pytest.mark.parametrize("options", [{"share": 1.5}, {"share": -0.1}, {"temperature": 0.0}])
def test_shares_and_temperatures_are_checked(options):
    with pytest.raises(ValueError, match=r"share in \[0, 1\] and a positive temperature"):
        distilled(STUDENT, BUILT.model, BUILT.logits, _teacher, **options)


def test_teachers_that_are_missing_or_no_floats_are_refused():
    with pytest.raises(ValueError, match=r"expected a player 'teachers'.*with_teachers"):
        _field(0.5)(_random(0), jax.random.key(0), _task())
    with pytest.raises(ValueError, match=r"floats only, got leaves of \['int32'\]"):
        with_teachers({}, {"width": jnp.array([1, 2])})
