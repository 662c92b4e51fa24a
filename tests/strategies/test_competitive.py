"""Competitive strategies against enumerations, plain loops and limits."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagen_jax as mg
from metagen_jax.strategies.candidates import Statistics, pinned
from metagen_jax.strategies.competitive import Hardest, Pairs, class_pairs, hard_buffer, score_softmax, worst_case

LOSS = np.array([0.5, 2.0, 1.0, 4.0, 3.0], "f4")


def _family(way=2, num_classes=4):
    """Descriptions only: the tests look at what is proposed."""

    def describe(data, key):
        return jax.random.permutation(key, num_classes)[:way].astype(jnp.int32)

    return mg.TaskFamily((), describe, lambda data, key, spec: None)


def _softmax_draws(rule, num_tasks, count=4000, loss=LOSS):
    statistics = Statistics(jnp.asarray(loss), jnp.zeros((len(loss), 0)), jnp.zeros((len(loss), 0)))
    draw = jax.jit(jax.vmap(lambda key: rule.choose((), key, statistics, num_tasks)))
    return [np.asarray(part) for part in draw(jax.random.split(jax.random.key(0), count))]


def _shares(indices, count=5):
    return np.bincount(indices.ravel(), minlength=count) / len(indices)


@pytest.mark.parametrize(
    ("temperature", "mix"), [(0.7, 0.0), (0.7, 0.3), (math.inf, 0.0), (1e-6, 1.0)], ids=["plain", "mixed", "inf", "all"]
)
def test_tasks_are_drawn_by_the_softmax_of_standardised_losses_mixed_with_uniform(temperature, mix):
    indices, weights = _softmax_draws(score_softmax(temperature, mix=mix), 1)
    scores = np.exp((LOSS - LOSS.mean()) / LOSS.std() / temperature) if temperature > 0.1 else np.ones(5)
    expected = (1 - mix) * scores / scores.sum() + mix / 5
    np.testing.assert_allclose(_shares(indices), expected, atol=4 * np.sqrt(0.25 / 4000))
    np.testing.assert_array_equal(weights, 1.0)


def test_without_temperature_the_hardest_are_taken_in_order():
    indices, _ = _softmax_draws(score_softmax(1e-6, mix=0.0), 3, 20)
    assert (indices == [3, 4, 1]).all()


def test_equal_losses_are_drawn_uniformly():
    indices, _ = _softmax_draws(score_softmax(0.1, mix=0.0), 2, loss=np.full(5, 3.0, "f4"))
    np.testing.assert_allclose(_shares(indices), 0.4, atol=0.03)


def test_reweighing_gives_back_the_mean_over_all_candidates():
    values = LOSS  # what is drawn by its own size: the worst case
    means = {}
    for reweigh in (False, True):
        indices, weights = _softmax_draws(score_softmax(1.0, mix=0.3, reweigh=reweigh), 3)
        np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-5)
        means[reweigh] = (weights * values[indices]).sum(1).mean()
    assert means[False] > values.mean() + 0.3
    # weights that are normalised have a bias of order 1 / T
    assert abs(means[True] - values.mean()) < 0.4 * (means[False] - values.mean())


def test_the_order_of_the_candidates_does_not_matter_to_who_is_drawn():
    order = np.array([4, 2, 0, 1, 3])
    plain, _ = _softmax_draws(score_softmax(0.5), 2)
    turned, _ = _softmax_draws(score_softmax(0.5), 2, loss=LOSS[order])
    np.testing.assert_allclose(_shares(order[turned]), _shares(plain), atol=0.04)


# The buffer


def _buffer_run(steps, capacity, seed=0):
    """Update with random specs and losses; return the state and, in plain Python, what the buffer should hold."""
    sampler = hard_buffer(_family(), 4, capacity=capacity, warmup=0)
    state, rng, best = sampler.init(jax.random.key(0)), np.random.default_rng(seed), {}
    update = jax.jit(sampler.update)
    for _ in range(steps):
        specs, scores = rng.integers(0, 4, (4, 2)).astype("i4"), rng.normal(size=4).astype("f4")
        scores[rng.random(4) < 0.1] = np.nan
        state = update(state, jnp.asarray(specs), jnp.asarray(scores))
        for spec in specs:
            best.pop(tuple(spec.tolist()), None)
        for spec, score in zip(specs, scores, strict=True):
            best.setdefault(tuple(spec.tolist()), float(score))
        best = {spec: score for spec, score in best.items() if np.isfinite(score)}
        best = dict(sorted(best.items(), key=lambda item: -item[1])[:capacity])
    return state, best


def test_the_buffer_keeps_the_hardest_with_their_latest_losses():
    state, best = _buffer_run(12, 5)
    held = {
        tuple(spec): loss
        for spec, loss in zip(np.asarray(state.specs).tolist(), np.asarray(state.loss).tolist(), strict=True)
        if np.isfinite(loss)
    }
    assert held == best
    assert len(held) == 5
    assert np.asarray(state.loss).tolist() == sorted(state.loss.tolist(), reverse=True)


def test_half_of_the_batch_comes_from_the_buffer_after_the_warm_up():
    sampler = hard_buffer(_family(way=2, num_classes=50), 4, capacity=3, warmup=2)
    propose = jax.jit(lambda state: sampler.propose(state, (), jax.random.key(0), {})[0])
    specs = jnp.array([[90, 91], [92, 93], [94, 95]], jnp.int32)
    full = Hardest(specs, jnp.array([3.0, 2.0, 1.0]), jnp.array(2))
    fresh = np.asarray(propose(full._replace(seen=jnp.array(1))))
    assert fresh.max() < 50
    mixed = np.asarray(propose(full))
    np.testing.assert_array_equal(mixed[:2], specs[:2])
    np.testing.assert_array_equal(mixed[2:], fresh[2:])
    one = np.asarray(propose(full._replace(loss=jnp.array([3.0, -jnp.inf, -jnp.inf]))))
    np.testing.assert_array_equal(one[0], specs[0])
    np.testing.assert_array_equal(one[1:], fresh[1:])


def test_a_pinned_task_is_known_by_its_seed():
    sampler = hard_buffer(pinned(_family()), 2, capacity=3, warmup=0)
    spec = {"task": jnp.array([[0, 1], [0, 1]]), "seed": jnp.array([[1, 2], [1, 3]], jnp.uint32)}
    update = jax.jit(sampler.update)
    state = update(sampler.init(jax.random.key(0)), spec, jnp.array([1.0, 2.0]))
    state = update(state, spec, jnp.array([5.0, 0.5]))
    np.testing.assert_array_equal(state.loss, [5.0, 0.5, -np.inf])
    np.testing.assert_array_equal(state.specs["seed"][:2], [[1, 2], [1, 3]])


# Class pairs


def test_classes_are_put_together_with_the_probabilities_of_the_greedy_rule():
    weight = np.exp(np.random.default_rng(0).normal(size=(4, 4)))
    weight = (weight + weight.T).astype("f4")
    sampler = class_pairs(_family(3), 8000, 4)
    state = Pairs(jnp.log(weight), jnp.zeros(()), jnp.zeros((), jnp.int32))
    specs = np.asarray(jax.jit(lambda state: sampler.propose(state, (), jax.random.key(0), {})[0])(state))
    off = weight * (1 - np.eye(4))
    for triple in itertools.combinations(range(4), 3):
        expected = 0.0
        for i, j, k in itertools.permutations(triple):
            others = [c for c in range(4) if c not in (i, j)]
            expected += off[i, j] / off.sum() * (off[i, k] * off[j, k] / sum(off[i, c] * off[j, c] for c in others))
        found = (np.sort(specs, 1) == triple).all(1).mean()
        assert abs(found - expected) < 4 * np.sqrt(expected / 8000)
    places = np.array([(specs[:, place] == 0).sum() for place in range(3)])  # no class has a place of its own
    assert np.ptp(places) < 0.1 * places.sum()


def test_pairs_follow_their_power_law_and_nobody_else_moves():
    sampler = class_pairs(_family(3, 5), 2, 5, rate=2.0, forget=0.5, mean=0.9)
    update, specs = jax.jit(sampler.update), jnp.array([[0, 1, 2], [1, 2, 3]], jnp.int32)
    state, usual, expected = sampler.init(jax.random.key(0)), None, np.ones((5, 5))
    for scores in ([0.2, 3.0], [1.0, 0.1]):
        state = update(state, specs, jnp.array(scores))
        wrong = 1 - np.exp(-np.array(scores))
        usual = wrong.mean() if usual is None else 0.9 * usual + 0.1 * wrong.mean()
        for spec, error in zip(np.asarray(specs), wrong, strict=True):
            for i, j in itertools.permutations(spec, 2):
                if i < j:
                    expected[i, j] = expected[j, i] = expected[i, j] ** 0.5 * np.exp(2.0 * (error - usual))
    off = ~np.eye(5, dtype=bool)
    np.testing.assert_allclose(np.exp(state.log_weight)[off], expected[off], rtol=1e-5)
    np.testing.assert_array_equal(state.log_weight[4], 0.0)
    np.testing.assert_allclose(state.log_weight, state.log_weight.T)


def test_a_score_that_is_not_finite_teaches_nothing_about_its_pairs():
    sampler = class_pairs(_family(2), 2, 4)
    update = jax.jit(sampler.update)
    state = update(sampler.init(jax.random.key(0)), jnp.array([[0, 1], [2, 3]]), jnp.array([jnp.nan, 1.0]))
    np.testing.assert_array_equal(state.log_weight, 0.0)  # the other one is the average
    np.testing.assert_allclose(state.usual, 1 - np.exp(-1), rtol=1e-6)
    after = update(state, jnp.array([[0, 1], [2, 3]]), jnp.array([jnp.inf, jnp.nan]))
    np.testing.assert_array_equal(after.log_weight, 0.0)
    np.testing.assert_allclose(after.usual, state.usual)


def test_hard_pairs_are_met_more_often_and_with_a_negative_rate_less():
    shares = {}
    for rate in (2.0, -2.0):
        sampler = class_pairs(_family(2), 6, 4, rate=rate)

        def run(state, key, sampler=sampler):
            def step(state, key):
                specs, _ = sampler.propose(state, (), key, {})
                hard = (jnp.sort(specs, 1) == jnp.array([[0, 1]])).all(1)
                return sampler.update(state, specs, jnp.where(hard, 3.0, 0.1)), hard.mean()

            return jax.lax.scan(step, state, jax.random.split(key, 200))[1]

        shares[rate] = float(jax.jit(run)(sampler.init(jax.random.key(0)), jax.random.key(1)).mean())
    assert shares[-2.0] < 0.1 < 1 / 6 < 0.3 < shares[2.0]


# The worst case


def test_weights_are_the_adversary_s_over_how_common_a_group_is():
    sampler = worst_case(_family(2), 3, [0, 0, 0, 1])
    state = jnp.array([0.4, 0.6])
    specs, weights = jax.jit(lambda state: sampler.propose(state, (), jax.random.key(3), {}))(state)
    ratio = np.array([0.4 / 0.75] * 3 + [0.6 / 0.25])
    expected = ratio[np.asarray(specs)].mean(1)
    assert np.ptp(expected) > 0
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-5)
    _, weights = sampler.propose(sampler.init(jax.random.key(0)), (), jax.random.key(3), {})
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


def test_the_adversary_climbs_an_unbiased_estimate_of_the_loss_of_each_group():
    sampler = worst_case(_family(2), 4000, [0, 0, 0, 1], rate=0.1)
    specs, _ = sampler.propose(sampler.init(jax.random.key(0)), (), jax.random.key(0), {})
    of_class = jnp.array([1.0, 2.0, 3.0, 10.0])
    state = jax.jit(sampler.update)(sampler.init(jax.random.key(0)), specs, jnp.ones(4000))
    np.testing.assert_allclose(state, [0.75, 0.25], atol=0.01)  # equal losses move nothing
    specs = jnp.repeat(jnp.arange(4, dtype=jnp.int32), 1000)[:, None]
    sampler = worst_case(_family(1), 4000, [0, 0, 0, 1], rate=0.1)
    state = jax.jit(sampler.update)(sampler.init(jax.random.key(0)), specs, of_class[specs[:, 0]])
    np.testing.assert_allclose(state, [0.75 + 0.2 - 0.6, 0.25 + 1.0 - 0.6], rtol=1e-5)  # losses 2 and 10, projected


def test_a_score_that_is_not_finite_does_not_move_the_adversary():
    sampler = worst_case(_family(2), 2, [0, 0, 1, 1], rate=0.1)
    specs, begin = jnp.array([[0, 1], [2, 3]]), sampler.init(jax.random.key(0))
    state = jax.jit(sampler.update)(begin, specs, jnp.array([jnp.nan, 1.0]))
    np.testing.assert_allclose(state, [0.4, 0.6], rtol=1e-5)  # climbs 0.1 * 1 / 0.5 for the second, less 0.1 for both
    np.testing.assert_allclose(jax.jit(sampler.update)(begin, specs, jnp.full(2, jnp.nan)), [0.5, 0.5])


@pytest.mark.parametrize(
    "make",
    [
        lambda: score_softmax(0.0),
        lambda: score_softmax(mix=1.5),
        lambda: hard_buffer(_family(), 1),
        lambda: hard_buffer(_family(), 8, capacity=3),
        lambda: hard_buffer(_family(), 8, warmup=-1),
        lambda: class_pairs(_family(1), 2, 4),
        lambda: class_pairs(_family(3), 2, 2),
        lambda: class_pairs(_family(), 2, 4, forget=1.0),
        lambda: class_pairs(_family(), 2, 4, rate=0.0),
        lambda: class_pairs(pinned(_family()), 2, 4),
        lambda: worst_case(_family(), 2, [0, 2]),
        lambda: worst_case(_family(), 2, []),
        lambda: worst_case(_family(), 2, [0, 1], rate=0.0),
        lambda: worst_case(_family(), 0, [0, 1]),
        lambda: worst_case(pinned(_family()), 2, [0, 1]),
    ],
)
def test_arguments_are_checked(make):
    with pytest.raises(ValueError, match="expected"):
        make()
