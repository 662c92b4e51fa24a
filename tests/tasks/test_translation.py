"""Domain translation: styles by hand, what a task is made of, and what is held out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import tiny_images

from metagen_jax import image_set, uniform
from metagen_jax.tasks.sources import glyphs
from metagen_jax.tasks.translation import (
    SLANTS,
    Style,
    apply_style,
    group_names,
    paired_queries,
    split_styles,
    styles,
    translation,
)

PLAIN = 0


def _id(slant=0.0, pen="plain", mirrored=False, inverted=False):
    return styles().index(Style(slant, pen, mirrored, inverted))


def _grouped(sizes=(2, 3, 1), per_class=8):
    """Three groups of so many classes; the pixels of an image say which image it is, whatever its style.

    Their classes are mixed up, so that a group's images do not lie together.
    """
    num = sum(sizes)
    groups = [name for name, size in zip("abc", sizes, strict=True) for _ in range(size)]
    groups = [groups[index] for index in np.random.default_rng(0).permutation(num)]
    labels = np.repeat(np.arange(num), per_class)
    pixels = np.zeros((num * per_class, 6, 6, 1), np.uint8)
    pixels[:, 0, :2, 0] = np.stack([labels, np.tile(np.arange(per_class), num)], 1)
    return image_set("marked", pixels, labels, [f"class {c}" for c in range(num)], groups=groups, note="marked")


def _which(x, inverted):
    """Return (class, drawing) of marked images in style 0 or in the inverted style."""
    x = np.where(np.asarray(inverted)[..., None, None, None], 1 - np.asarray(x), np.asarray(x))
    return np.rint(x[..., 0, :2, 0] * 255).astype(int)


def _tasks(family, num, seed=0):
    """Return specs [num, 4], the keys that the tasks are made from, and the tasks."""
    spec_keys, keys = (jax.random.split(key, num) for key in jax.random.split(jax.random.key(seed)))
    specs = jax.jit(jax.vmap(family.describe, in_axes=(None, 0)))(family.data, spec_keys)
    return np.asarray(specs), keys, jax.jit(jax.vmap(family.make, in_axes=(None, 0, 0)))(family.data, keys, specs)


MARKED = (PLAIN, _id(inverted=True))


# Styles


@pytest.fixture(scope="module")
def styled():
    return jax.jit(apply_style)


def _picture(text):
    return jnp.asarray([[float(pixel == "#") for pixel in row] for row in text.split()])[None, :, :, None]


BEFORE = _picture("..#.. ..#.. ..#.. ..##. .....")


@pytest.mark.parametrize(
    ("style", "after"),
    [
        ({}, "..#.. ..#.. ..#.. ..##. ....."),
        ({"slant": 0.4}, "...#. ..#.. ..#.. ..##. ....."),  # rows move by round(0.4 * (2, 1, 0, -1, -2)) = 1 0 0 0 -1
        ({"slant": -0.4}, ".#... ..#.. ..#.. ..##. ....."),
        ({"pen": "bold"}, ".###. .###. .###. .#### ..##."),
        ({"pen": "outline"}, ".#.#. .#.#. .#.#. .#..# ..##."),
        ({"mirrored": True}, "..#.. ..#.. ..#.. .##.. ....."),
        ({"inverted": True}, "##.## ##.## ##.## ##..# #####"),
        ({"slant": 0.4, "pen": "bold", "mirrored": True, "inverted": True}, "...## #...# #...# ....# #..##"),
    ],
)
def test_a_style_does_to_a_small_image_what_it_says(styled, style, after):
    expected = np.asarray(_picture(after))[0, :, :, 0]
    np.testing.assert_array_equal(np.asarray(styled(BEFORE, _id(**style)))[0, :, :, 0], expected)


def test_what_leans_out_of_the_image_is_lost_and_background_enters(styled):
    full = jnp.ones((1, 9, 4, 1))
    leaning = np.asarray(styled(full, _id(slant=0.4)))[0, :, :, 0]
    shift = [2, 1, 1, 0, 0, 0, -1, -1, -2]  # round(0.4 * (4, 3, ... -4))
    for row, moved in zip(leaning, shift, strict=True):
        expected = np.ones(4)
        expected[: max(moved, 0)] = 0
        expected[4 + min(moved, 0) :] = 0
        np.testing.assert_array_equal(row, expected)


def test_the_grid_has_every_combination_once_and_style_zero_changes_nothing(styled):
    assert len(set(styles())) == len(styles()) == len(SLANTS) * 3 * 2 * 2
    x = jnp.asarray(np.random.default_rng(0).random((3, 7, 6, 2)), jnp.float32)
    np.testing.assert_array_equal(styled(x, PLAIN), x)
    np.testing.assert_allclose(styled(styled(x, _id(inverted=True)), _id(inverted=True)), x, atol=1e-7)
    np.testing.assert_array_equal(styled(styled(x, _id(mirrored=True)), _id(mirrored=True)), x)


def test_styles_of_real_characters_are_binary_legible_and_all_different():
    letters = glyphs(scripts=["HEBREW"], num_drawings=1)
    x = jnp.asarray(letters.images / 255.0, jnp.float32)
    every = jnp.arange(len(styles()))
    drawn = np.asarray(jax.jit(jax.vmap(apply_style, in_axes=(None, 0)))(x, every))
    assert set(np.unique(drawn)) == {0.0, 1.0}
    for index, style in enumerate(styles()):
        ink = (1 - drawn[index] if style.inverted else drawn[index]).sum((1, 2, 3))
        kept = ink / np.asarray(x).sum((1, 2, 3))
        # Little is lost at the borders and no line vanishes; the outline of a thick stroke is thinner than the stroke.
        assert kept.min() > (0.4 if style.pen == "outline" else 0.95), style
        assert kept.max() < 5, style
        letters_seen = drawn[index].reshape(len(x), -1)
        assert len(np.unique(letters_seen, axis=0)) == len(x)
    assert len(np.unique(drawn.reshape(len(every), -1), axis=0)) == len(every)


# Tasks


@pytest.mark.parametrize("pairs", ["styles", "scripts", "both"])
def test_no_image_is_in_two_places_of_a_task_and_all_are_of_the_described_groups(pairs):
    images = _grouped()
    family, names = translation(images, 3, 2, pairs=pairs, styles=MARKED), group_names(images, 3, 2, pairs)
    specs, _, tasks = _tasks(family, 50)
    group = np.array([names.index(name) if name in names else -1 for name in images.groups])
    assert tasks.support.x.shape == (50, 6, 6, 6, 1)
    assert tasks.query.x.shape == (50, 4, 6, 6, 1)
    assert tasks.support.label[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert tasks.query.label[0].tolist() == [0, 0, 1, 1]
    assert (np.asarray(tasks.support.weight) == 1).all()
    assert (np.asarray(tasks.query.weight) == 1).all()
    inverted = specs[:, [1, 3]] == MARKED[1]
    for spec, marks, *sets in zip(specs, inverted, tasks.support.x, tasks.query.x, strict=True):
        seen = []
        for x in sets:
            half = len(x) // 2
            for domain, part in ((0, x[:half]), (1, x[half:])):
                drawn = _which(part, np.full(half, marks[domain]))
                assert (group[drawn[:, 0]] == spec[2 * domain]).all()
                seen += [tuple(image) for image in drawn]
        assert len(set(seen)) == 10


@pytest.mark.parametrize(
    ("pairs", "same_group", "same_style"), [("styles", True, False), ("scripts", False, True), ("both", False, False)]
)
def test_the_domains_of_a_task_differ_in_what_is_asked_and_everything_is_equally_likely(pairs, same_group, same_style):
    family = translation(_grouped((2, 2, 2)), 3, 2, pairs=pairs, styles=range(4))
    keys = jax.random.split(jax.random.key(0), 4000)
    specs = np.asarray(jax.jit(jax.vmap(family.describe, in_axes=(None, 0)))(family.data, keys))
    assert specs.dtype == np.int32
    assert ((specs[:, 0] == specs[:, 2]) == same_group).all()
    assert ((specs[:, 1] == specs[:, 3]) == same_style).all()
    possible = (3 if same_group else 6) * (4 if same_style else 12)
    kinds, count = np.unique(specs, axis=0, return_counts=True)
    assert len(kinds) == possible
    np.testing.assert_allclose(count / 4000, 1 / possible, atol=5 * (1 / possible / 4000) ** 0.5)


def test_every_drawing_of_a_group_is_equally_likely_in_either_domain():
    family = translation(_grouped((1, 1, 1)), 2, 1, styles=MARKED)
    specs, _, tasks = _tasks(family, 3000)
    for domain in (0, 1):
        drawn = _which(tasks.query.x[:, domain : domain + 1], specs[:, None, 2 * domain + 1] == MARKED[1])
        share = np.bincount(drawn[:, 0, 1], minlength=8) / 3000
        np.testing.assert_allclose(share, 1 / 8, atol=0.03)


@pytest.mark.parametrize("pairs", ["styles", "both"])
def test_no_pair_of_styles_that_is_held_out_occurs_in_training(pairs):
    split, images = split_styles(10, seed=3), _grouped()

    def seen(ids):
        family = translation(images, 1, 1, pairs=pairs, styles=ids)
        keys = jax.random.split(jax.random.key(0), 8000)
        specs = jax.jit(jax.vmap(family.describe, in_axes=(None, 0)))(family.data, keys)
        return {tuple(pair) for pair in np.asarray(specs)[:, [1, 3]].tolist()}

    train, test = seen(split.train), seen(split.test)
    assert test == {(a, b) for a in split.test for b in split.test if a != b}
    assert len(train) > 600  # of 26 * 25
    assert {style for pair in train for style in pair} == set(split.train)
    assert not set(split.train) & set(split.test)


@pytest.mark.parametrize("num_test", [2, 12, 24])
def test_a_held_out_style_is_a_new_combination_of_traits_that_are_trained(num_test):
    for seed in range(20):
        split = split_styles(num_test, seed=seed)
        assert len(split.test) == num_test
        assert sorted(split.train + split.test) == list(range(len(styles())))
        for values in zip(*(styles()[index] for index in split.train), strict=True):
            assert len(set(values)) in (2, 3)
        pens, slants = ({styles()[index][trait] for index in split.train} for trait in (1, 0))
        assert (len(pens), len(slants)) == (3, 3)
    assert split_styles(num_test, seed=1) == split_styles(num_test, seed=1) != split_styles(num_test, seed=2)


def test_a_range_of_shots_pads_both_domains_alike():
    family = translation(_grouped(), (1, 3), 2, styles=(PLAIN, 7))
    _, _, tasks = _tasks(family, 300)
    weight = np.asarray(tasks.support.weight).reshape(300, 2, 3)
    np.testing.assert_array_equal(weight[:, 0], weight[:, 1])
    shots = weight[:, 0].sum(1).astype(int)
    assert np.abs(np.bincount(shots, minlength=4)[1:] / 300 - 1 / 3).max() < 0.1
    assert not np.asarray(tasks.support.x).reshape(300, 2, 3, -1)[weight == 0].any()
    assert (np.asarray(tasks.query.weight) == 1).all()


# The true translation


@pytest.mark.parametrize("shot", [3, (1, 3)])
def test_paired_queries_are_the_query_drawings_in_both_styles(shot):
    rng = np.random.default_rng(0)
    images = _grouped()
    images = images._replace(images=rng.integers(0, 256, images.images.shape).astype(np.uint8))
    family, pairs = translation(images, shot, 2), paired_queries(shot, 2)
    specs, keys, tasks = _tasks(family, 20)
    x_a, x_b = jax.jit(jax.vmap(pairs, in_axes=(None, 0, 0)))(family.data, jax.random.clone(keys), specs)
    assert x_a.shape == x_b.shape == (20, 4, 6, 6, 1)
    np.testing.assert_array_equal(x_a[:, :2], tasks.query.x[:, :2])
    np.testing.assert_array_equal(x_b[:, 2:], tasks.query.x[:, 2:])
    every = jnp.asarray(images.images / 255.0, jnp.float32)
    in_style = np.asarray(jax.jit(jax.vmap(apply_style, in_axes=(None, 0)))(every, jnp.arange(len(styles()))))

    def which(style, image):
        (found,) = np.flatnonzero(np.abs(in_style[style] - image).max((1, 2, 3)) < 1e-6)  # exactly one
        return found

    for index, (_, style_a, _, style_b) in enumerate(specs):
        drawn = [which(style_a, image) for image in np.asarray(x_a[index])]
        assert drawn == [which(style_b, image) for image in np.asarray(x_b[index])]
        support = np.asarray(tasks.support.x[index])[np.asarray(tasks.support.weight[index]) > 0]
        shown = [which(style_a if n < len(support) / 2 else style_b, image) for n, image in enumerate(support)]
        assert len({*drawn, *shown}) == 4 + len(support)


# In programs


def test_tasks_are_made_inside_jit_in_one_trace_from_data_that_is_an_argument():
    family = translation(tiny_images(), 2, 3, styles=(PLAIN, _id(mirrored=True)))
    sampler = uniform(family, 8)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def batch(data, key):
        propose_key, make_key = jax.random.split(key)
        specs, _ = sampler.propose(sampler.init(None), data, propose_key, {})
        return jax.vmap(family.make, in_axes=(None, 0, 0))(data, jax.random.split(make_key, 8), specs)

    tasks = batch(family.data, jax.random.key(0))
    others = batch(family.data._replace(images=255 - family.data.images), jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(tasks.query.x), 1 - np.asarray(others.query.x))
    again = batch(family.data, jax.random.key(1))
    assert np.abs(np.asarray(tasks.query.x) - np.asarray(again.query.x)).max() == 1


# Errors


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((5, 8), {}, r"need a group of at least 26 images; of 3 groups 0 have so many, the largest being 'b' \(24\)"),
        ((5, 8), {"pairs": "scripts"}, r"need two groups of at least 13 images; of 2 groups 1 have so many"),
        ((1, 1), {"styles": [3]}, r"tasks between styles need at least 2 style ids, got styles=\[3\]"),
        ((1, 1), {"styles": [3], "pairs": "both"}, "tasks between both need at least 2 style ids"),
        ((1, 1), {"styles": [], "pairs": "scripts"}, "tasks between scripts need at least 1 style ids"),
        ((1, 1), {"styles": [0, 36]}, "expected different style ids from 0 to 35, got"),
        ((1, 1), {"styles": [2, 2]}, "expected different style ids"),
        ((1, 1), {"pairs": "alphabets"}, "pairs must be one of"),
        ((1, 0), {}, "at least one query image, got query=0"),
        ((-1, 1), {}, "at least 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, options, message):
    images = _grouped()
    if "2 groups" in message:
        images = images.take(np.flatnonzero(np.array(images.groups) != "a"))
    with pytest.raises(ValueError, match=message):
        translation(images, *arguments, **options)


def test_groups_that_are_too_small_are_left_out_and_one_script_is_enough_for_styles_only():
    images = _grouped()
    present = dict.fromkeys(images.groups)  # in the order of their classes
    assert group_names(images, 2, 2, "styles") == tuple(present)
    assert set(group_names(images, 5, 4, "scripts")) == {"a", "b"}
    assert translation(images, 5, 4, pairs="scripts").data.rows.shape == (2, 24)
    one = translation(tiny_images(), 1, 1, pairs="styles")
    assert one.data.rows.shape == (1, 48)
    with pytest.raises(ValueError, match="need two groups"):
        translation(tiny_images(), 1, 1, pairs="both")


def test_splits_without_two_styles_on_a_side_or_without_a_trait_are_refused():
    for num_test in (1, 35):
        with pytest.raises(ValueError, match=f"expected 2 <= num_test <= 34 of 36 styles, got num_test={num_test}"):
            split_styles(num_test)
    with pytest.raises(ValueError, match="leaves some trait untrained"):
        split_styles(34)  # two styles cannot have three pens
    with pytest.raises(ValueError, match="at least one query"):
        paired_queries(1, 0)
