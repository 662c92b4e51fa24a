"""Populations against their members, each trained by itself."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import flat

import metagen_jax as mg
from metagen_jax.population.members import Member, Members, num_members, population, stacked, take, train_members
from metagen_jax.population.traits import following

TRAITS = {"inner": [0.02, 0.1, 0.05], "outer": [0.3, 0.05, 0.1]}


def _loss(params, key, batch):
    noise = 0.1 * jax.random.normal(key, (3,))
    return 0.5 * jnp.square(params["model"] - batch.x.mean(0) - noise).sum(), {"seen": batch.x.sum()}


def _task(data, key, spec):
    x = data[spec[0]][None] + 0.1 * jax.random.normal(key, (4, 3))
    both = mg.Examples(x, jnp.zeros(4, jnp.int32), jnp.ones(4))
    return mg.Task(jax.tree.map(lambda leaf: leaf[:2], both), jax.tree.map(lambda leaf: leaf[2:], both))


FAMILY = mg.TaskFamily(3 * jnp.eye(3), lambda data, key: jax.random.randint(key, (1,), 0, 3), _task)
SAMPLER = mg.uniform(FAMILY, 2)
MODEL = mg.Model(
    lambda key: {"model": jax.random.normal(key, (3,))}, mg.cooperative(_loss), lambda params, key, num: jnp.zeros(num)
)


def _member(inner, outer):
    return Member(mg.maml(MODEL, inner, 1), optax.adam(outer))


def _make(traits):
    return _member(following(optax.sgd(traits["inner"])), traits["outer"])


SAME, OWN = population(_make, FAMILY, SAMPLER), population(_make, FAMILY, SAMPLER, same_tasks=False)


def _traits(**changed):
    return {name: jnp.array(values) for name, values in (TRAITS | changed).items()}


@functools.partial(jax.jit, static_argnums=0)
def _trained(make, state, traits):
    """Train one member by `make_step`."""
    member = make(traits)
    step = mg.make_step(member.learner, FAMILY, SAMPLER, member.optimizer)
    return jax.lax.scan(lambda state, _: step(state, FAMILY.data), state, length=3)


@pytest.mark.parametrize(
    "built",
    [
        SAME,
        OWN,
        population(_make, FAMILY, SAMPLER, member_chunk=1),
        population(_make, FAMILY, SAMPLER, member_chunk=2, same_tasks=False),
    ],
    ids=["same tasks", "tasks of their own", "one by one", "two at a time"],
)
def test_a_population_is_its_members_trained_by_themselves(built):
    members = built.init(jax.random.key(0), _traits())
    alone = [_trained(_make, *take(members, which)) for which in range(3)]
    together, metrics = built.run(members, FAMILY.data, 3)
    for which, (state, measured) in enumerate(alone):
        mine = take(together, which).state
        np.testing.assert_allclose(flat(mine.meta), flat(state.meta), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(flat(mine.average), flat(state.average), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(metrics["loss"][:, which], measured["loss"], rtol=1e-5)
        assert int(mine.step) == 3
    assert np.abs(flat(alone[0][0].meta) - flat(alone[1][0].meta)).max() > 0.1


def _plain(traits):
    return _member(mg.fixed(optax.sgd(0.05)), 0.1)


def test_a_population_of_one_is_plain_training_bit_for_bit():
    built = population(_make, FAMILY, SAMPLER)
    members = built.init(jax.random.key(0), stacked([{"inner": 0.05, "outer": 0.1}]))
    state, measured = _trained(_plain, take(members, 0).state, None)
    together, metrics = built.run(members, FAMILY.data, 3)
    np.testing.assert_array_equal(flat(together.state.meta), flat(state.meta))
    np.testing.assert_array_equal(metrics["loss"][:, 0], measured["loss"])


def test_a_member_that_diverges_stays_where_it_is_and_touches_no_other():
    healthy, _ = SAME.run(SAME.init(jax.random.key(0), _traits()), FAMILY.data, 3)
    members = SAME.init(jax.random.key(0), _traits(inner=[0.02, 1e30, 0.05]))
    begin = flat(take(members, 1).state.meta)
    after, metrics = SAME.run(members, FAMILY.data, 3)
    np.testing.assert_array_equal(metrics["finite_share"], [[1, 0, 1]] * 3)
    np.testing.assert_array_equal(flat(take(after, 1).state.meta), begin)
    for which in (0, 2):
        mine, expected = take(after, which).state, take(healthy, which).state
        np.testing.assert_allclose(flat(mine.meta), flat(expected.meta), rtol=1e-6)
        assert np.abs(flat(mine.meta) - begin).max() > 0.1


def test_members_are_one_trace():
    made = chex.assert_max_traces(_make, n=2)  # to begin, and to move
    built = population(made, FAMILY, SAMPLER)
    members, counted = built.init(jax.random.key(0), _traits()), []
    members = train_members(
        built, members, FAMILY.data, 6, chunk=4, on_chunk=lambda members, metrics: counted.append(metrics["loss"].shape)
    )
    assert counted == [(3, 3), (3, 3)]
    assert int(members.state.step) == 6


@pytest.mark.parametrize("built", [SAME, OWN], ids=["same", "own"])
def test_members_meet_the_same_tasks_or_tasks_of_their_own(built):
    _, metrics = built.run(built.init(jax.random.key(0), _traits()), FAMILY.data, 3)
    seen = np.asarray(metrics["seen"])
    assert len(np.unique(seen[:, 0])) == 3
    assert [len(np.unique(row)) for row in seen] == 3 * [1 if built is SAME else 3]


def test_training_goes_on_to_the_number_of_steps_and_no_further():
    whole, _ = OWN.run(OWN.init(jax.random.key(0), _traits()), FAMILY.data, 3)
    part = train_members(OWN, OWN.init(jax.random.key(0), _traits()), FAMILY.data, 1)
    resumed = train_members(OWN, part, FAMILY.data, 3, chunk=1)
    assert train_members(OWN, resumed, FAMILY.data, 3) is resumed
    np.testing.assert_allclose(flat(resumed.state.meta), flat(whole.state.meta), rtol=1e-6)
    np.testing.assert_array_equal(resumed.state.step, [3, 3, 3])


def test_traits_that_were_given_can_be_used_again():
    traits = _traits()
    first, _ = SAME.run(SAME.init(jax.random.key(0), traits), FAMILY.data, 3)
    again, _ = SAME.run(SAME.init(jax.random.key(0), traits), FAMILY.data, 3)
    np.testing.assert_array_equal(flat(first.state.meta), flat(again.state.meta))


@pytest.mark.parametrize("built", [SAME, OWN], ids=["same tasks", "own tasks"])
def test_members_that_are_taken_go_on_as_they_would_have(built):
    members = built.init(jax.random.key(0), _traits())
    fewer = take(members, jnp.array([2, 0, 0]))
    all_of_them, _ = built.run(members, FAMILY.data, 3)
    np.testing.assert_array_equal(fewer.traits["inner"], np.float32([0.05, 0.02, 0.02]))
    after, _ = built.run(fewer, FAMILY.data, 3)
    expected = take(all_of_them, jnp.array([2, 0, 0]))
    np.testing.assert_allclose(flat(after.state.meta), flat(expected.state.meta), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: population(_make, FAMILY, SAMPLER, member_chunk=0), "member_chunk must be at least 1"),
        (lambda: stacked([]), "at least one member"),
        (lambda: num_members({"a": jnp.ones(2), "b": jnp.ones(3)}), r"one leading axis.*stacked\(\["),
        (lambda: num_members({"a": jnp.ones(())}), "one leading axis"),
        (lambda: num_members({}), "one leading axis"),
        (lambda: train_members(None, Members(None, None), None, 1, chunk=0), "at least one meta-step"),
    ],
)
def test_what_makes_no_population_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
