import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import tiny_images, tiny_vae

import metagen_jax as mg
from metagen_jax.budget import train_for


def problem():
    built, family = tiny_vae(), mg.episodes(tiny_images(), 2, 3)
    learner = mg.maml(built.model, mg.fixed(optax.sgd(1e-2)), 1, players=("prior",))
    return learner, family, mg.uniform(family, 2)


def ticking(seconds):
    """Return a clock that goes on by so much whenever it is read."""
    readings = itertools.count(0.0, seconds)
    return lambda: next(readings)


def rule(asked):
    def make(num_steps):
        asked.append(num_steps)
        return optax.adam(1e-3)

    return make


def test_as_many_meta_steps_are_taken_as_fit_into_the_time():
    learner, family, sampler = problem()
    asked = []
    # a dispatch takes 2 seconds by this clock: 5 timed steps do, so a step takes 0.4, and 8 seconds have 20 of them
    spent = train_for(learner, family, sampler, rule(asked), 8.0, jax.random.key(0), chunk=5, clock=ticking(2.0))
    assert asked == [10, 20]
    assert spent.meta_steps == 20
    np.testing.assert_allclose(spent.seconds, 8.0)
    assert spent.nonfinite_tasks == 0


def test_fewer_steps_than_a_dispatch_has_keep_to_the_time_too():
    learner, family, sampler = problem()
    asked = []
    spent = train_for(learner, family, sampler, rule(asked), 1.3, jax.random.key(0), chunk=25, clock=ticking(2.0))
    assert asked == [10, 3]  # a step takes 0.4 by this clock
    assert spent.meta_steps == 3
    np.testing.assert_allclose(spent.seconds, 1.2)


def test_what_is_learned_is_what_train_learns_in_as_many_steps():
    learner, family, sampler = problem()
    key = jax.random.key(1)
    spent = train_for(learner, family, sampler, rule([]), 2.0, key, chunk=5, clock=ticking(2.0))
    init_key, state_key = jax.random.split(jax.random.clone(key))
    optimizer = optax.adam(1e-3)
    step = mg.make_step(learner, family, sampler, optimizer, average_decay=0.99)
    state = mg.init_state(learner, sampler, optimizer, state_key, meta=learner.init(init_key))
    expected = mg.train(step, state, family.data, 5, chunk=5).average
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), spent.meta, expected)


def test_players_that_are_given_are_where_it_begins_and_others_are_new():
    learner, family, sampler = problem()
    begin = {"prior": jax.tree.map(lambda leaf: leaf + 3.0, learner.init(jax.random.key(0))["prior"]), "other": 1.0}
    still = lambda num_steps: optax.set_to_zero()  # noqa: E731
    spent = train_for(learner, family, sampler, still, 2.0, jax.random.key(0), begin=begin, chunk=5, clock=ticking(2.0))
    np.testing.assert_allclose(spent.meta["prior"]["mean"], 3.0, rtol=1e-6)
    assert "other" not in spent.meta
    assert float(jnp.abs(jax.tree.leaves(spent.meta["encoder"])[0]).max()) > 0


def test_no_time_is_refused():
    with pytest.raises(ValueError, match="positive number of seconds, got 0"):
        train_for(*problem(), rule([]), 0, jax.random.key(0))


@pytest.mark.parametrize(("chunk", "runs"), [(3, [6]), (25, [10, 6])])  # one dispatch has no later one to be timed
def test_a_given_number_of_meta_steps_is_taken_whatever_time_that_is(chunk, runs):
    asked, options = [], {"chunk": chunk, "clock": ticking(2.0), "meta_steps": 6}
    spent = train_for(*problem(), rule(asked), 1e-3, jax.random.key(0), **options)
    assert asked == runs
    assert spent.meta_steps == 6
    np.testing.assert_allclose(spent.seconds, 4.0 if chunk == 3 else 6 * 0.4)


def test_a_single_meta_step_is_refused():
    with pytest.raises(ValueError, match="at least two meta-steps, got 1"):
        train_for(*problem(), rule([]), 1.0, jax.random.key(0), meta_steps=1)
