"""What holds for every strategy: T tasks, weights that sum to one, one trace, a run that learns."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import quadratic_model

import metagen_jax as mg
from metagen_jax.strategies import competitive, cooperative, curriculum
from metagen_jax.strategies.candidates import chosen, measured, pinned

TASKS, CLASSES, WAY = 4, 6, 2


def _centres():
    """Tasks of points around the centres [6, 3] of two classes."""

    def describe(data, key):
        return jax.random.permutation(key, CLASSES)[:WAY].astype(jnp.int32)

    def make(data, key, spec):
        noise, label = 0.1 * jax.random.normal(key, (2, WAY, 3)), jnp.arange(WAY, dtype=jnp.int32)
        return mg.Task(*(mg.Examples(data[spec] + part, label, jnp.ones(WAY)) for part in noise))

    return mg.TaskFamily(2 + jnp.sin(jnp.arange(18.0)).reshape(CLASSES, 3), describe, make)


FAMILY = _centres()
MODEL = quadratic_model(jnp.eye(3))
LEARNER = mg.maml(MODEL, mg.fixed(optax.sgd(0.1)), 1)


def _candidates(rule):
    def embed(meta, task):
        return task.support.x.mean(0)

    family = pinned(FAMILY)
    return family, chosen(
        family, TASKS, 6, measured(MODEL.game, LEARNER.adapt, players=("model",), sketch=2, embed=embed), rule
    )


STRATEGIES = {
    "uniform": lambda: (FAMILY, mg.uniform(FAMILY, TASKS)),
    "score_softmax": lambda: _candidates(competitive.score_softmax(reweigh=True)),
    "hard_buffer": lambda: (FAMILY, competitive.hard_buffer(FAMILY, TASKS, capacity=3, warmup=2)),
    "class_pairs": lambda: (FAMILY, competitive.class_pairs(FAMILY, TASKS, CLASSES)),
    "worst_case": lambda: (FAMILY, competitive.worst_case(FAMILY, TASKS, [0, 0, 0, 1, 1, 1])),
    "agreement": lambda: _candidates(cooperative.agreement()),
    "greedy_set": lambda: _candidates(cooperative.greedy_set()),
    "information": lambda: _candidates(cooperative.information(3, memory=5)),
    "self_paced": lambda: _candidates(curriculum.self_paced(0.5, 4)),
}


def test_every_public_strategy_is_here():
    public = {
        name
        for module in (competitive, cooperative, curriculum)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and function.__annotations__.get("return")
        in (
            competitive.Rule,
            competitive.Sampler,
        )
    }
    assert public == set(STRATEGIES) - {"uniform"}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_proposes_weights_that_sum_to_one_is_traced_once_and_learns(name):
    family, sampler = STRATEGIES[name]()
    proposed = []

    def recorded(state, data, key, meta):
        specs, weights = sampler.propose(state, data, key, meta)
        chex.assert_tree_shape_prefix((specs, weights), (TASKS,))
        jax.debug.callback(proposed.append, weights)
        return specs, weights

    optimizer = optax.sgd(0.3)
    step = mg.make_step(LEARNER, family, sampler._replace(propose=recorded), optimizer)
    state = mg.init_state(LEARNER, sampler, optimizer, jax.random.key(0))
    kind = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    run = mg.run_chunk(chex.assert_max_traces(step, n=1), 6)
    losses, effective = [], []
    for _ in range(2):
        state, metrics = run(state, family.data)
        losses.extend(np.asarray(metrics["loss"]))
        effective.extend(np.asarray(metrics["effective_tasks"]))
    jax.effects_barrier()
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == kind
    weights = np.stack(proposed)
    assert weights.shape == (12, TASKS)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(np.sort(effective), np.sort(1 / np.square(weights).sum(1)), rtol=1e-4)
    assert 1.0 <= min(effective) <= max(effective) <= TASKS + 1e-4
    assert np.mean(losses[-3:]) < 0.2 * losses[0]  # from the origin to the middle of the centres
    assert np.linalg.norm(state.meta["model"] - family.data.mean(0)) < 1.0


def test_tasks_that_a_strategy_chose_are_spread_over_devices():
    """Weights differ, and what a rule has written on a description goes along."""
    family, sampler = STRATEGIES["agreement"]()
    mesh = jax.make_mesh((2,), ("task",), axis_types=(jax.sharding.AxisType.Auto,))
    moved = []
    for options in ({}, {"mesh": mesh}):
        step = mg.make_step(LEARNER, family, sampler, optax.sgd(0.3), **options)
        state = mg.init_state(LEARNER, sampler, optax.sgd(0.3), jax.random.key(0))
        moved.append(np.asarray(jax.jit(step)(state, family.data)[0].meta["model"]))
    assert np.abs(moved[0]).max() > 0.1
    np.testing.assert_allclose(*moved, rtol=1e-5)
