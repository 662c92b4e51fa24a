"""Cooperative rules on directions that are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.strategies.candidates import Statistics
from metagen_jax.strategies.cooperative import agreement, greedy_set, information

TOY = np.array([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.5], [2.0, -0.5]], "f4")


def _statistics(sketch=None, embedding=None):
    some = sketch if sketch is not None else embedding
    empty = jnp.zeros((len(some), 0))
    return Statistics(
        jnp.zeros(len(some)),
        empty if sketch is None else jnp.asarray(sketch),
        empty if embedding is None else jnp.asarray(embedding),
    )


def _choose(rule, statistics, num_tasks, state=None):
    state = rule.init(jax.random.key(0)) if state is None else state
    choose = jax.jit(rule.choose, static_argnums=3)
    indices, weights = choose(state, jax.random.key(1), statistics, num_tasks)
    return np.asarray(indices), np.asarray(weights)


def test_agreement_weighs_by_the_inner_product_with_the_mean():
    agrees = TOY @ TOY.mean(0)
    assert (agrees < 0).sum() == 1
    indices, weights = _choose(agreement(), _statistics(TOY), 4)
    kept = np.maximum(agrees, 0)
    np.testing.assert_allclose(weights[np.argsort(indices)], kept / kept.sum(), rtol=1e-6)
    indices, weights = _choose(agreement(drop=False), _statistics(TOY), 4)
    np.testing.assert_allclose(weights[np.argsort(indices)], agrees / np.abs(agrees).sum(), rtol=1e-6)


def test_agreement_takes_the_tasks_that_agree_most():
    indices, weights = _choose(agreement(), _statistics(TOY), 2)
    agrees = TOY @ TOY.mean(0)
    np.testing.assert_array_equal(indices, np.argsort(-agrees)[:2])
    np.testing.assert_allclose(weights, agrees[indices] / agrees[indices].sum(), rtol=1e-6)


def test_a_task_has_one_vote_where_only_the_way_of_its_direction_counts():
    """Two long directions one way, three short ones the other: the mean points with the long ones, the votes do not."""
    sketch = np.array([[9.0, 1.0], [8.0, -1.0], [-1.0, 0.1], [-1.0, 0.0], [-0.5, 0.1]], "f4")
    rows = sketch / np.linalg.norm(sketch, axis=1, keepdims=True)
    votes = rows @ rows.mean(0)
    indices, weights = _choose(agreement(unit=True), _statistics(sketch), 3)
    assert sorted(indices.tolist()) == [2, 3, 4]
    np.testing.assert_allclose(weights, votes[indices] / votes[indices].sum(), rtol=1e-5)
    assert set(_choose(agreement(), _statistics(sketch), 2)[0].tolist()) == {0, 1}
    assert _choose(greedy_set(0.0), _statistics(sketch), 2)[0].tolist() == [0, 1]
    first, second = _choose(greedy_set(0.0, unit=True), _statistics(sketch), 2)[0]
    assert first == np.argmax(votes)
    assert second in {2, 3, 4}


def test_directions_that_all_agree_alike_have_equal_weights_and_so_do_zeros():
    for sketch in (np.eye(4), np.zeros((4, 3))):
        _, weights = _choose(agreement(), _statistics(sketch.astype("f4")), 3)
        np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


def _greedy(sketch, embedding, num, beta, sign):
    """The same set in loops."""
    cos = lambda x, i, j: x[i] @ x[j] / np.linalg.norm(x[i]) / np.linalg.norm(x[j])  # noqa: E731
    chosen = [int(np.argmax(sign * sketch @ sketch.mean(0)))]
    while len(chosen) < num:
        worth = {
            j: sign * np.mean([cos(sketch, i, j) for i in chosen]) - beta * max(cos(embedding, i, j) for i in chosen)
            for j in range(len(sketch))
            if j not in chosen
        }
        chosen.append(max(worth, key=worth.get))
    return chosen


@pytest.mark.parametrize(("beta", "sign"), [(0.0, 1), (0.7, 1), (0.7, -1)])
def test_the_greedy_set_is_that_of_plain_loops(beta, sign):
    rng = np.random.default_rng(0)
    sketch, embedding = rng.normal(size=(7, 3)).astype("f4"), rng.normal(size=(7, 2)).astype("f4")
    indices, weights = _choose(greedy_set(beta, sign=sign), _statistics(sketch, embedding), 4)
    assert indices.tolist() == _greedy(sketch, embedding, 4, beta, sign)
    np.testing.assert_allclose(weights, 0.25)
    indices, _ = _choose(greedy_set(beta, sign=sign), _statistics(sketch), 4)
    assert indices.tolist() == _greedy(sketch, sketch, 4, beta, sign)


def test_likeness_keeps_copies_of_one_task_out():
    sketch = np.array([[1.0, 0.2], [1.0, 0.2], [1.0, 0.2], [0.9, -0.6]], "f4")
    embedding = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], "f4")
    without, _ = _choose(greedy_set(0.0), _statistics(sketch, embedding), 2)
    with_cost, _ = _choose(greedy_set(1.0), _statistics(sketch, embedding), 2)
    assert 3 not in without
    assert 3 in with_cost


def _points(count=6, features=2, seed=0):
    return np.random.default_rng(seed).normal(size=(count, features)).astype("f4")


def test_information_is_the_largest_minus_log_density_of_what_was_used():
    rule, used, candidates = information(2, memory=8, width=0.7), _points(3, seed=1), _points(6)
    state = rule.update(rule.init(jax.random.key(0)), _statistics(embedding=used), jnp.zeros(3))
    pairs = [np.square(a - b).sum() for a, b in itertools.permutations(candidates.astype(float), 2)]
    variance = 0.49 * np.mean(pairs)

    def utility(phi, used):
        return -np.log(np.mean([np.exp(-0.5 * np.square(phi - other).sum() / variance) for other in used]))

    expected, seen = [], list(used)
    for _ in range(3):
        left = [index for index in range(6) if index not in expected]
        expected.append(max(left, key=lambda index: utility(candidates[index], seen)))
        seen.append(candidates[expected[-1]])
    indices, weights = _choose(rule, _statistics(embedding=candidates), 3, state)
    assert indices.tolist() == expected
    np.testing.assert_allclose(weights, 1 / 3)


def test_information_does_not_depend_on_the_unit_of_the_embeddings():
    rule, results = information(2, memory=4), []
    for unit in (1.0, 1000.0):
        state = rule.update(
            rule.init(jax.random.key(0)), _statistics(embedding=unit * _points(3, seed=1)), jnp.zeros(3)
        )
        results.append(_choose(rule, _statistics(embedding=unit * _points()), 4, state)[0].tolist())
    assert results[0] == results[1]


def test_what_was_used_lately_is_remembered_in_a_ring():
    rule = information(1, memory=3)
    state = rule.init(jax.random.key(0))
    for begin in (0, 2):  # 0 1, then 2 3: the place of 0 is taken by 3
        numbers = np.arange(begin, begin + 2, dtype="f4")[:, None]
        state = rule.update(state, _statistics(embedding=numbers), jnp.zeros(2))
    assert (state.embedding[:, 0].tolist(), int(state.seen)) == ([3.0, 1.0, 2.0], 4)
    state = rule.update(state, _statistics(embedding=np.arange(10.0, 15.0, dtype="f4")[:, None]), jnp.zeros(5))
    assert (sorted(state.embedding[:, 0].tolist()), int(state.seen)) == ([12.0, 13.0, 14.0], 9)


def test_nothing_used_yet_leaves_every_choice_open_but_no_task_is_taken_twice():
    indices, _ = _choose(information(2), _statistics(embedding=_points()), 6)
    assert sorted(indices.tolist()) == list(range(6))


@pytest.mark.parametrize("name", ["agreement", "greedy_set", "information"])
def test_the_order_of_the_candidates_does_not_matter(name):
    rule = {"agreement": agreement, "greedy_set": greedy_set, "information": lambda: information(2)}[name]()
    state = rule.init(jax.random.key(0))
    if name == "information":
        state = rule.update(state, _statistics(embedding=_points(3, seed=1)), jnp.zeros(3))
    sketch, embedding, order = _points(6, 3, seed=2), _points(), np.array([3, 0, 5, 1, 4, 2])
    plain = _choose(rule, _statistics(sketch, embedding), 3, state)
    turned = _choose(rule, _statistics(sketch[order], embedding[order]), 3, state)
    np.testing.assert_array_equal(order[turned[0]], plain[0])
    np.testing.assert_allclose(turned[1], plain[1], rtol=1e-5)


def test_rules_say_what_they_miss():
    for rule in (agreement(), greedy_set()):
        with pytest.raises(ValueError, match="players"):
            _choose(rule, _statistics(embedding=_points()), 2)
    with pytest.raises(ValueError, match="3 features, but the embeddings have 2"):
        _choose(information(3), _statistics(embedding=_points()), 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: greedy_set(-1.0),
        lambda: greedy_set(sign=0),
        lambda: information(0),
        lambda: information(2, memory=0),
        lambda: information(2, width=0.0),
    ],
)
def test_arguments_are_checked(make):
    with pytest.raises(ValueError, match="expected"):
        make()
