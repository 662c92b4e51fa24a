import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.tasks.strokes import CLASSES, MAX_STROKES, character, draw, render, strokes, trajectory


@pytest.fixture(scope="module")
def programs():
    return jax.jit(jax.vmap(character))(jax.random.split(jax.random.key(0), 400))


@pytest.fixture(scope="module")
def drawn(programs):
    """Two drawings each of 400 characters, and their images [2, 400, 28, 28]."""
    keys = jax.random.split(jax.random.key(1), (2, 400))
    both = jax.jit(jax.vmap(jax.vmap(draw), in_axes=(None, 0)))(programs, keys)
    return both, np.asarray(jax.jit(jax.vmap(jax.vmap(render)))(both))[..., 0]


def tasks(family, num, seed=0):
    def one(data, key):
        describe_key, make_key = jax.random.split(key)
        spec = family.describe(data, describe_key)
        return spec, family.make(data, make_key, spec)

    return jax.jit(jax.vmap(one, in_axes=(None, 0)))(family.data, jax.random.split(jax.random.key(seed), num))


def test_characters_have_one_to_five_strokes_and_fill_the_box(programs):
    num = np.asarray(programs.used.sum(1))
    assert set(num) == {1, 2, 3, 4, 5}
    used = np.asarray(programs.used)
    assert (np.sort(used, axis=1)[:, ::-1] == used).all()  # a prefix
    points = np.asarray(jax.vmap(trajectory)(programs)).reshape(400, MAX_STROKES, -1, 3)[..., :2]
    low = np.where(used[..., None, None], points, np.inf).min((1, 2))
    high = np.where(used[..., None, None], points, -np.inf).max((1, 2))
    np.testing.assert_allclose((high - low).max(1), 0.68, atol=0.03)
    np.testing.assert_allclose((high + low) / 2, 0.5, atol=0.03)


def test_most_later_strokes_begin_on_an_earlier_one(programs):
    fine = np.asarray(jax.vmap(lambda program: trajectory(program, 60))(programs)).reshape(400, MAX_STROKES, 60, 3)
    joined = []
    for c in range(400):
        for s in range(1, int(programs.used[c].sum())):
            gap = np.linalg.norm(fine[c, :s, :, :2].reshape(-1, 2) - fine[c, s, 0, :2], axis=1).min()
            joined.append(gap < 0.02)
    assert 0.7 < np.mean(joined) < 0.95


def test_images_are_binary_with_the_ink_of_a_thin_pen(drawn):
    _, images = drawn
    assert set(np.unique(images)) == {0.0, 1.0}
    share = images.mean((2, 3))
    assert 0.06 < share.mean() < 0.13
    assert share.min() > 0.015


def test_image_and_trajectory_are_the_same_drawing(drawn):
    both, images = drawn
    for c in range(20):
        program = jax.tree.map(lambda leaf, c=c: leaf[0, c], both)
        path = np.asarray(trajectory(program)).reshape(MAX_STROKES, -1, 3)
        path = path[np.asarray(program.used)].reshape(-1, 3)
        rows, columns = np.nonzero(images[0, c])
        centres = (np.stack([columns, rows], axis=1) + 0.5) / 28
        inside = ((path[:, :2] > 0.02) & (path[:, :2] < 0.98)).all(1)
        to_ink = np.linalg.norm(path[inside, None, :2] - centres[None], axis=-1).min(1)
        assert to_ink.max() < 1.5 / 28
        fine = np.asarray(trajectory(program, 100)).reshape(MAX_STROKES, -1, 3)[np.asarray(program.used)]
        to_path = np.linalg.norm(centres[:, None] - fine.reshape(1, -1, 3)[..., :2], axis=-1).min(1)
        assert to_path.max() < program.width / 2 + 0.01


def test_the_pen_is_lifted_once_after_each_stroke_and_unused_strokes_draw_nothing(programs):
    path = np.asarray(jax.vmap(lambda program: trajectory(program, 7))(programs)).reshape(400, MAX_STROKES, 7, 3)
    used = np.asarray(programs.used)
    assert (path[used][:, :, 2] == [0, 0, 0, 0, 0, 0, 1]).all()
    assert (path[~used][:, :, 2] == 1).all()
    last = path[np.arange(400), used.sum(1) - 1, -1, :2]
    for c in range(400):
        unused = path[c, ~used[c], :, :2]
        np.testing.assert_array_equal(unused, np.broadcast_to(last[c], unused.shape))


def test_two_drawings_differ_but_less_than_two_characters(drawn):
    _, images = drawn
    within = np.abs(images[0] - images[1]).mean((1, 2))
    between = np.abs(images[0] - np.roll(images[1], 1, axis=0)).mean((1, 2))
    assert within.min() > 0
    assert 0.6 < within.mean() / between.mean() < 0.9


def test_a_class_id_is_always_the_same_character():
    family = strokes(2, 8)
    spec = jnp.array([12345], jnp.int32)
    make = jax.jit(family.make)
    first = np.asarray(make(family.data, jax.random.key(0), spec).query.x)
    np.testing.assert_array_equal(first, make(family.data, jax.random.key(0), spec).query.x)
    other_draws = np.asarray(make(family.data, jax.random.key(1), spec).query.x)
    other_class = np.asarray(make(family.data, jax.random.key(1), spec + 1).query.x)
    other_world = np.asarray(make(strokes(2, 8, seed=1).data, jax.random.key(1), spec).query.x)
    distance = [np.abs(x.mean(0) - first.mean(0)).mean() for x in (other_draws, other_class, other_world)]
    assert 0 < distance[0] < 0.7 * min(distance[1:])


def test_training_and_held_out_classes_are_disjoint():
    ids = {}
    for split in CLASSES:
        family = strokes(1, 1, way=3, split=split)
        keys = jax.random.split(jax.random.key(3), 2000)
        ids[split] = np.asarray(jax.vmap(family.describe, in_axes=(None, 0))(family.data, keys)).ravel()
        assert ids[split].dtype == np.int32
        first, end = CLASSES[split]
        assert first <= ids[split].min() < first + (end - first) * 0.01
        assert end - (end - first) * 0.01 < ids[split].max() < end
    assert ids["train"].max() < 2**30 <= ids["validation"].min()
    assert ids["validation"].max() < ids["test"].min()


def test_the_query_is_never_in_the_support():
    _, batch = tasks(strokes(5, 5), 100)
    support, query = np.asarray(batch.support.x), np.asarray(batch.query.x)
    same = (support[:, :, None] == query[:, None, :]).all((3, 4, 5))
    assert same.mean() < 1e-3  # only pixel-equal accidents between independent drawings of simple characters
    assert (batch.support.weight == 1).all()
    assert (batch.query.weight == 1).all()


def test_a_range_of_shots_is_uniform_and_padded_by_zero_weight():
    _, batch = tasks(strokes((1, 4), 2, way=2), 200)
    weight = np.asarray(batch.support.weight).reshape(200, 2, 4)
    num = weight.sum(2)
    assert (num[:, 0] == num[:, 1]).all()
    assert (np.bincount(num[:, 0].astype(int), minlength=5)[1:] > 25).all()
    assert set(num[:, 0]) == {1, 2, 3, 4}
    x = np.asarray(batch.support.x).reshape(200, 2, 4, -1)
    assert (x[weight == 0] == 0).all()
    assert (x[weight == 1].sum(-1) > 0).all()
    np.testing.assert_array_equal(batch.support.label, np.tile([0] * 4 + [1] * 4, (200, 1)))
    np.testing.assert_array_equal(batch.query.label, np.tile([0, 0, 1, 1], (200, 1)))


def test_one_trace_for_many_tasks():
    family = strokes(1, 1)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def task(data, key):
        describe_key, make_key = jax.random.split(key)
        return family.make(data, make_key, family.describe(data, describe_key))

    for n in range(3):
        task(family.data, jax.random.fold_in(jax.random.key(0), n))


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="unknown split 'dev'; expected one of train, validation, test"):
        strokes(1, 1, split="dev")
    with pytest.raises(ValueError, match="at least one query"):
        strokes(1, 0)
    with pytest.raises(ValueError, match="shots"):
        strokes((3, 2), 1)
    with pytest.raises(ValueError, match="at least 2 points"):
        trajectory(character(jax.random.key(0)), 1)
