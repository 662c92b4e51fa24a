"""Races on a problem whose order of members is known, and scores against each member by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import flat

import metagen_jax as mg
from metagen_jax.population.members import Member, population, take, train_members
from metagen_jax.population.racing import (
    Rung,
    at_random,
    competitive,
    halving,
    member_steps,
    race,
    survivors,
    validation,
)

RATES = jnp.array([0.001, 0.2, 0.01, 0.05])  # so far from the target stays each after some steps: 0 > 2 > 3 > 1


def _task(data, key, spec):
    return data + 0.01 * jax.random.normal(key, (2,))


def _pull(meta, key, task):
    gap = meta["model"] - task
    return {"model": gap}, {"loss": 0.5 * jnp.square(gap).sum(), "noise": jax.random.normal(key, ())}


FAMILY = mg.TaskFamily(jnp.array([1.0, -1.0]), lambda data, key: jnp.zeros(1, jnp.int32), _task)
LEARNER = mg.MetaLearner(lambda key: {"model": jnp.zeros(2)}, lambda meta, key, support: (meta, {}), _pull)


def _make(traits):
    return Member(LEARNER, optax.sgd(traits["rate"]))


BUILT = population(_make, FAMILY, mg.uniform(FAMILY, 2), average_decay=0.0)
SCORE = validation(_make, FAMILY, 5, metric="loss", sign=-1.0, chunk=2)


def _begin():
    return BUILT.init(jax.random.key(0), {"rate": RATES})


def test_survivors_are_the_best_and_what_is_no_number_comes_last():
    scores = jnp.array([0.1, jnp.nan, 3.0, -jnp.inf, 0.1, jnp.inf])
    assert survivors(scores, 6).tolist() == [5, 2, 0, 4, 3, 1]
    assert competitive(None, scores, 2).tolist() == [5, 2]


def test_a_choice_at_random_keeps_each_member_as_often_whatever_it_scored():
    keys = jax.random.split(jax.random.key(0), 2000)
    scores = jnp.array([jnp.nan, 1.0, 2.0, 3.0])
    chosen = np.asarray(jax.jit(jax.vmap(lambda key: at_random(key, scores, 2)))(keys))
    assert (chosen[:, 0] != chosen[:, 1]).all()
    np.testing.assert_allclose(np.bincount(chosen.ravel(), minlength=4) / 2000, 0.5, atol=0.05)


@pytest.mark.parametrize(("num", "factor", "steps"), [(8, 2, 150), (9, 3, 130), (1, 2, 7)])
def test_rungs_take_the_same_member_steps_and_end_with_one_member_in_full(num, factor, steps):
    rungs = halving(num, steps, factor=factor)
    ends = [0, *(rung.num_steps for rung in rungs)]
    spent = [rung.num_members * (ends[index + 1] - ends[index]) for index, rung in enumerate(rungs)]
    assert len(set(spent)) == 1
    assert rungs[0].num_members == num
    assert rungs[-1] == Rung(1, steps)
    assert member_steps(rungs) == sum(spent) <= num * steps


def test_the_best_wins_a_race_and_is_what_it_would_be_had_it_been_alone():
    result = race(BUILT, _begin(), FAMILY.data, halving(4, 28), SCORE, jax.random.key(1))
    assert result.left.tolist() == [1]
    assert [standing.num_steps for standing in result.history] == [4, 12]
    assert [sorted(standing.members) for standing in result.history] == [[0, 1, 2, 3], [1, 3]]
    assert [np.argsort(-standing.scores).tolist() for standing in result.history] == [[1, 3, 2, 0], [0, 1]]
    whole = train_members(BUILT, _begin(), FAMILY.data, 28, chunk=4)
    np.testing.assert_allclose(flat(result.members.state.meta), flat(take(whole, 1).state.meta), rtol=1e-6)
    assert result.members.state.meta["model"].shape == (1, 2)
    assert int(result.members.state.step) == 28


def test_a_race_at_random_chooses_by_its_key_and_not_by_scores():
    rungs = [Rung(4, 0), Rung(1, 0)]
    winners = {
        int(race(BUILT, _begin(), FAMILY.data, rungs, SCORE, jax.random.key(seed), choose=at_random).left[0])
        for seed in range(12)
    }
    assert len(winners) >= 3


def test_a_member_that_is_not_finite_loses():
    members = _begin()
    broken = members.state.average["model"].at[1].set(jnp.nan)
    scores = SCORE(members._replace(state=members.state._replace(average={"model": broken})), jax.random.key(1))
    assert np.isnan(scores).tolist() == [False, True, False, False]
    assert 1 not in survivors(scores, 3).tolist()


def test_scores_are_the_means_of_each_member_on_the_same_tasks():
    members = train_members(BUILT, _begin(), FAMILY.data, 4)
    scores = SCORE(members, jax.random.key(3))
    gaps = []
    for index in range(5):
        _, make_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(3), index), 3)
        gaps.append(np.asarray(members.state.average["model"]) - np.asarray(_task(FAMILY.data, make_key, None)))
    np.testing.assert_allclose(scores, -np.mean([0.5 * np.square(gap).sum(1) for gap in gaps], 0), rtol=1e-5)
    noise = validation(_make, FAMILY, 3, metric="noise")(members, jax.random.key(4))
    assert np.ptp(noise) == 0.0
    assert float(noise[0]) != 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: halving(6, 100), "power of a factor of at least 2, got 6"),
        (lambda: halving(4, 100, factor=1), "factor=1"),
        (lambda: halving(8, 2), "at least 15 meta-steps"),
        (lambda: validation(_make, FAMILY, 0), "num_tasks=0"),
        (lambda: validation(_make, FAMILY, 2)(_begin(), jax.random.key(0)), "metric among .*'loss'.*got 'accuracy'"),
        (lambda: race(BUILT, _begin(), FAMILY.data, [Rung(2, 1)], SCORE, jax.random.key(0)), "begin with all 4"),
        (
            lambda: race(BUILT, _begin(), FAMILY.data, [Rung(4, 2), Rung(2, 1)], SCORE, jax.random.key(0)),
            "rising meta-steps",
        ),
        (
            lambda: race(BUILT, _begin(), FAMILY.data, [Rung(4, 1), Rung(4, 2)], SCORE, jax.random.key(0)),
            "falling numbers",
        ),
        (lambda: race(BUILT, _begin(), FAMILY.data, [], SCORE, jax.random.key(0)), r"got \[\]"),
    ],
)
def test_what_is_no_race_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
