import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import quadratic_model, tiny_images

from metagen_jax import Examples, Task, TaskFamily, episodes, fixed, init_state, make_step, maml, run_chunk, uniform
from metagen_jax.tasks.augment import with_symmetries
from metagen_jax.tasks.mixing import (
    blended,
    interpolated,
    mixed,
    mixture,
    with_generated_support,
    with_variants,
)

NUM = 512


@functools.cache
def _family(mark=0.0, shot=1, query=2, way=2, low=None):
    """Tasks whose images [3] say from which family, class and draw they are; a range of shots pads."""

    def describe(data, key):
        return jax.random.randint(key, (way,), 0, 1000)

    def make(data, key, spec):
        per_class, draws = shot + query, jax.random.uniform(key, (way, shot + query))
        label = jnp.repeat(jnp.arange(way), per_class)
        x = jnp.stack([jnp.repeat(spec, per_class).astype(float), draws.ravel(), jnp.full(label.shape, data)], 1)
        weight = jnp.tile(jnp.arange(per_class) != (-1 if low is None else low), way).astype(float)
        both = Examples(x, label, weight)
        rows = jnp.arange(way * per_class).reshape(way, per_class)
        first, last = rows[:, :shot].ravel(), rows[:, shot:].ravel()
        return Task(jax.tree.map(lambda leaf: leaf[first], both), jax.tree.map(lambda leaf: leaf[last], both))

    return TaskFamily(jnp.float32(mark), describe, make)


@functools.cache
def _maker(describe, make):
    def batch(data, keys):
        specs = jax.vmap(describe, in_axes=(None, 0))(data, keys[0])
        return specs, jax.vmap(make, in_axes=(None, 0, 0))(data, keys[1], specs)

    return jax.jit(batch)


def _tasks(family, num=NUM, data=None):
    """Make tasks; families of one kind that draw with the same keys make the same ones."""
    keys = jax.random.split(jax.random.key(0), (2, num))
    made = _maker(family.describe, family.make)(family.data if data is None else data, keys)
    return jax.tree.map(np.asarray, made)


def _equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def plus(params, key, x):
    """Variants are `params` above the image, and say so by a whole number and a draw in [0, 1)."""
    return x + params + jax.random.uniform(key, x.shape)


# --- tasks --------------------------------------------------------------------------------------------------------


def test_share_zero_is_the_real_family_and_share_one_the_generated_one():
    real, generated = _family(1.0), _family(2.0)
    family = mixed(real, generated, 0.0)
    specs, tasks = _tasks(family)
    _equal((specs["real"], tasks), _tasks(real))
    specs, tasks = _tasks(family, data=family.data._replace(share=jnp.float32(1.0)))
    assert specs["is_generated"].all()
    assert (tasks.query.x[..., 2] == 2).all()
    np.testing.assert_array_equal(tasks.support.x[:, ::1, 0], specs["generated"])  # what was described was made
    assert (specs["generated"] != specs["real"]).mean() > 0.9  # the generated part has keys of its own


def test_tasks_are_generated_as_a_whole_and_as_often_as_the_share_says():
    specs, tasks = _tasks(mixed(_family(1.0), _family(2.0), 0.3))
    assert abs(specs["is_generated"].mean() - 0.3) < 0.07
    expected = np.where(specs["is_generated"], 2.0, 1.0)
    for examples in tasks:
        np.testing.assert_array_equal(examples.x[..., 2], np.broadcast_to(expected[:, None], examples.x.shape[:2]))


def test_layers_of_mixing_draw_independently():
    family = mixed(mixed(_family(1.0), _family(2.0), 0.5), _family(3.0), 0.5)
    marks = _tasks(family)[1].query.x[:, 0, 2]
    shares = [(marks == mark).mean() for mark in (1, 2, 3)]
    np.testing.assert_allclose(shares, [0.25, 0.25, 0.5], atol=0.08)
    twice = with_variants(with_variants(_family(), plus, jnp.float32(10.0), 0.5), plus, jnp.float32(100.0), 0.5)
    added = _tasks(twice)[1].query.x[..., 2] // 10 * 10
    shares = [(added == amount).mean() for amount in (0, 10, 100, 110)]
    np.testing.assert_allclose(shares, 0.25, atol=0.08)


def test_what_is_added_never_draws_with_a_key_that_the_family_may_split_off():
    # fold_in(key, i) is split(key, n)[i], which families draw with: see the module
    key = jax.random.key(5)
    own = jax.random.key_data(jax.random.split(key, 100))
    drawn = []
    spy = TaskFamily(jnp.zeros(()), lambda data, key: jnp.zeros(2, int), lambda data, key, spec: _spied(drawn, key))
    family = with_variants(mixed(spy, spy, 0.5), lambda params, key, x: drawn.append(key) or x, 0.0, 0.5)
    drawn.clear()
    family.make(family.data, key, family.describe(family.data, jax.random.key(6)))
    assert len(drawn) == 3
    used = [jax.random.key_data(one) for one in drawn if not isinstance(one, jax.core.Tracer)]
    assert len({tuple(one.tolist()) for one in used}) == 3
    assert sum((np.asarray(own) == np.asarray(one)).all(1).any() for one in used) == 0


def _spied(drawn, key):
    drawn.append(key)
    both = Examples(jnp.zeros((2, 3)), jnp.arange(2), jnp.ones(2))
    return Task(both, both)


def test_a_mixed_family_of_images_has_symmetries_around_it():
    real = episodes(tiny_images(), 2, 2)
    family = with_symmetries(mixed(real, episodes(tiny_images(seed=1), 2, 2), 0.0))
    _equal(_tasks(family, 16)[1], _tasks(with_symmetries(real), 16)[1])


@pytest.mark.parametrize(
    ("step", "of_generated"), [(0, 1.0), (5, 0.6), (10, 0.2), (1000, 0.2)], ids=["first", "half", "end", "after"]
)
def test_the_weight_of_generated_tasks_moves_linearly_and_weights_sum_to_one(step, of_generated):
    family = mixed(_family(1.0), _family(2.0), 0.4)
    sampler = mixture(family, 8, weight=(1.0, 0.2), over=10)
    specs, weights = sampler.propose(jnp.int32(step), family.data, jax.random.key(3), None)
    generated = np.asarray(specs["is_generated"])
    assert 0 < generated.sum() < 8
    expected = np.where(generated, of_generated, 1.0)
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)


def test_generated_tasks_alone_have_equal_weights_even_where_theirs_is_zero():
    family = mixed(_family(1.0), _family(2.0), 1.0)
    _, weights = mixture(family, 4, weight=(0.0, 0.0)).propose(jnp.int32(0), family.data, jax.random.key(0), None)
    np.testing.assert_array_equal(weights, 0.25)


def test_meta_training_on_a_mixture_with_share_zero_is_meta_training_on_the_real_family():
    real = _family(1.0)
    learner, optimizer = maml(quadratic_model(jnp.eye(3)), fixed(optax.sgd(0.1)), 1), optax.sgd(0.01)

    def trained(family, sampler):
        state = init_state(learner, sampler, optimizer, jax.random.key(1))
        step = make_step(learner, family, sampler, optimizer)
        return run_chunk(step, 3)(state, family.data)

    family = mixed(real, _family(2.0), 0.0)
    state, metrics = trained(family, mixture(family, 4, weight=(0.5, 0.0)))
    plain, plain_metrics = trained(real, uniform(real, 4))
    _equal((state.meta, metrics), (plain.meta, plain_metrics))
    assert int(state.sampler) == 3
    assert float(jnp.abs(plain.meta["model"]).sum()) > 0


# --- examples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [("query",), ("support",), ("support", "query")])
def test_variants_replace_images_as_often_as_the_share_says_and_nothing_else(which):
    plain = _tasks(_family(shot=2))[1]
    family = with_variants(_family(shot=2), plus, jnp.float32(10.0), 0.4, which=which)
    tasks = _tasks(family)[1]
    for name, before, after in zip(Task._fields, plain, tasks, strict=True):
        _equal(before._replace(x=0), after._replace(x=0))
        added = after.x - before.x
        replaced = (added != 0).all(-1)
        np.testing.assert_array_equal(added[~replaced], 0)  # whole images, or nothing of them
        assert abs(replaced.mean() - (0.4 if name in which else 0.0)) < 0.05
        assert (np.abs(added[replaced] - 10.5) < 0.501).all()
    _equal(_tasks(family, data=family.data._replace(share=jnp.float32(0.0)))[1], plain)
    moved = _tasks(family, data=family.data._replace(params=jnp.float32(20.0)))[1]  # parameters are an argument
    assert getattr(moved, which[0]).x.max() > 19


def test_padding_is_left_alone():
    plain = _tasks(_family(shot=3, low=2))[1]
    tasks = _tasks(with_variants(_family(shot=3, low=2), plus, jnp.float32(10.0), 1.0, which=("support",)))[1]
    padding = plain.support.weight == 0
    assert padding.any()
    np.testing.assert_array_equal(tasks.support.x[padding], plain.support.x[padding])
    assert (tasks.support.x[~padding] != plain.support.x[~padding]).all()
    joined = _tasks(with_generated_support(_family(shot=3, low=2), plus, jnp.float32(10.0), 2))[1]
    again = joined.support.weight == 0
    assert again.sum() == 3 * padding.sum()
    np.testing.assert_array_equal(joined.support.x[again], np.repeat(plain.support.x[padding], 3, axis=0))


@pytest.mark.parametrize("num", [0, 3])
def test_a_generated_support_keeps_its_images_and_adds_variants_of_the_same_label(num):
    plain = _tasks(_family(shot=2))[1]
    tasks = _tasks(with_generated_support(_family(shot=2), plus, jnp.float32(10.0), num, weight=0.25))[1]
    _equal(tasks.query, plain.query)
    x, label, weight = (leaf.reshape(NUM, 4, 1 + num, *leaf.shape[2:]) for leaf in tasks.support)
    _equal((x[:, :, 0], weight[:, :, 0]), (plain.support.x, plain.support.weight))
    np.testing.assert_array_equal(label, np.repeat(plain.support.label[..., None], 1 + num, axis=2))
    np.testing.assert_array_equal(weight[:, :, 1:], 0.25)
    added = x[:, :, 1:] - x[:, :, :1]
    assert (np.abs(added - 10.5) < 0.501).all()
    if num > 1:
        assert (np.abs(added[:, :, 0] - added[:, :, 1]).max(-1) > 0).all()  # every variant has noise of its own
    assert (np.diff(tasks.support.label, axis=1) >= 0).all()  # still ordered by class


# --- pairs --------------------------------------------------------------------------------------------------------


def test_a_blend_pairs_whole_classes_and_is_the_first_task_for_one():
    first, second = (jax.tree.map(lambda leaf, n=n: leaf[n], _tasks(_family(shot=2, way=3), 2)[1]) for n in range(2))
    pairing = np.array([2, 0, 1])
    out = blended(first, second, 0.3, jnp.asarray(pairing))
    for one, other, both in zip(first, second, out, strict=True):
        rows = [c * 2 + n for c in pairing for n in range(2)]
        np.testing.assert_allclose(both.x, 0.3 * one.x + 0.7 * other.x[rows], rtol=1e-5)
        np.testing.assert_array_equal(both.label, one.label)
    _equal(blended(first, second, 1.0, jnp.asarray(pairing)), first)
    unordered = blended(first, second, 0.0, jnp.arange(3))
    _equal((unordered.support.x, unordered.query.x), (second.support.x, second.query.x))


def test_interpolated_tasks_are_between_the_described_classes_with_one_share_and_one_pairing():
    way = 3
    family = interpolated(_family(way=way), 2.0)
    specs, tasks = _tasks(family)
    plain_specs, plain = _tasks(_family(way=way))
    np.testing.assert_array_equal(specs["first"], plain_specs)
    shares, pairings = [], []
    for n in range(64):
        first, second = specs["first"][n].astype(float), specs["second"][n].astype(float)
        fits = []
        for pairing in [(a, b, 3 - a - b) for a in range(3) for b in range(3) if a != b]:
            other = second[list(pairing)]
            x, away = tasks.support.x[n, :, 0], first - other
            share = (x - other) @ away / (away @ away)
            error = np.abs(x - share * first - (1 - share) * other).max()
            fits.append((error, share, pairing))
        error, share, pairing = min(fits)
        assert error < 0.05
        np.testing.assert_allclose(
            tasks.query.x[n, :, 0], np.repeat(share * first + (1 - share) * second[list(pairing)], 2), atol=0.05
        )
        shares.append(share)
        pairings.append(pairing)
    assert len(set(pairings)) == 6
    assert 0 < min(shares) < 0.25 and 0.75 < max(shares) < 1  # noqa: PT018
    assert abs(np.mean(shares) - 0.5) < 0.1
    assert abs(np.std(shares) - 0.05**0.5) < 0.06  # of Beta(2, 2)
    _equal(tasks.query.label, plain.query.label)
    specs, tasks = _tasks(family, data=family.data._replace(alpha=jnp.float32(1e4)))  # all meet in the middle
    middle = 0.5 * (specs["first"] + specs["second"]).sum(1)  # whatever the pairing, of sums over classes
    np.testing.assert_allclose(tasks.query.x[:, ::2, 0].sum(1), middle, rtol=0.1)


def test_padding_of_either_task_is_padding_of_the_blend():
    short, full = (jax.tree.map(lambda leaf: leaf[0], _tasks(_family(shot=3, low=low), 1)[1]) for low in (2, None))
    for first, second in ((short, full), (full, short), (short, short)):
        out = blended(first, second, 0.5, jnp.array([1, 0]))
        np.testing.assert_array_equal(out.support.weight, [1, 1, 0, 1, 1, 0])
        np.testing.assert_array_equal(out.query.weight, 1)


# --- errors -------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    family = _family()
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5"):
        mixed(family, family, 1.5)
    with pytest.raises(ValueError, match=r"same shapes.*float32\[2, 3\].*float32\[4, 3\].*ask both"):
        mixed(family, _family(shot=2), 0.5)
    with pytest.raises(ValueError, match=r"mixed\(\.\.\.\)"):
        mixture(family, 4)
    both = mixed(family, family, 0.5)
    for arguments in ((0, (1.0, 1.0), 10), (4, (1.0, -0.1), 10), (4, (1.0, 1.0), 0)):
        with pytest.raises(ValueError, match="at least one task"):
            mixture(both, arguments[0], weight=arguments[1], over=arguments[2])
    with pytest.raises(ValueError, match=r"in \[0, 1\], got -0.1"):
        with_variants(family, plus, 0.0, -0.1)
    for which in ("query", (), ("test",)):
        with pytest.raises(ValueError, match="sequence of 'support' and 'query'"):
            with_variants(family, plus, 0.0, 0.5, which=which)
    with pytest.raises(ValueError, match=r"float32\[4, 3\], got float32\[4\]"):
        with_variants(family, lambda params, key, x: x[:, 0], 0.0, 0.5)
    with pytest.raises(ValueError, match="num >= 0"):
        with_generated_support(family, plus, 0.0, -1)
    with pytest.raises(ValueError, match="weight >= 0"):
        with_generated_support(family, plus, 0.0, 1, weight=-1.0)
    with pytest.raises(ValueError, match="positive, got 0"):
        interpolated(family, 0.0)
    with pytest.raises(ValueError, match="way="):
        interpolated(both)
    with pytest.raises(ValueError, match=r"ordered by class.*of 4 classes.*support has the labels \[0, 1\]"):
        interpolated(family, way=4)
    assert interpolated(both, way=2).data.real is both.data
