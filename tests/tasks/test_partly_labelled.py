"""Partly labelled tasks: which images play which part, and that nothing is drawn twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import tiny_images

import metagen_jax as mg
from metagen_jax.tasks.partly_labelled import hidden_labels, joined, partly_labelled, split_labels, with_unlabelled


def _identified(**options):
    """Return images that say in their first two pixels of which class and which drawing they are."""
    images = tiny_images(**options)
    marked = np.zeros_like(images.images)
    marked[:, 0, 0, 0] = np.repeat(np.arange(images.num_classes), images.count)
    marked[:, 0, 1, 0] = np.concatenate([np.arange(count) for count in images.count])
    return images._replace(images=marked, binary=False)


def _which(x):
    return np.rint(np.asarray(x)[..., 0, :2, 0] * 255).astype(int)


def _tasks(family, num, seed=0):
    describe_keys, make_keys = jax.random.split(jax.random.key(seed), (2, num))

    @jax.jit
    def draw(data, describe_keys, make_keys):
        specs = jax.vmap(family.describe, in_axes=(None, 0))(data, describe_keys)
        return specs, jax.vmap(family.make, in_axes=(None, 0, 0))(data, make_keys, specs)

    return jax.tree.map(np.asarray, draw(family.data, describe_keys, make_keys))


WAY, SHOT, QUERY, MORE, OTHERS = 2, 1, 2, 3, 2


@pytest.mark.parametrize("made", ["partly", "hidden"])
def test_every_image_of_a_task_is_another_one_and_plays_its_part(made):
    images = _identified()
    if made == "partly":
        options = {"labelled_share": 0.4, "seed": 3}
        family = partly_labelled(images, SHOT, QUERY, way=WAY, unlabelled=MORE, distractors=OTHERS, **options)
    else:
        family = hidden_labels(images, SHOT, QUERY, way=WAY, unlabelled=MORE, distractors=OTHERS)
    specs, tasks = _tasks(family, 64)
    labels = [*np.repeat(np.arange(WAY), SHOT), *(WAY + OTHERS) * MORE * [-1]]
    np.testing.assert_array_equal(tasks.support.label, np.tile(labels, (64, 1)))
    np.testing.assert_array_equal(tasks.query.label, np.tile(np.repeat(np.arange(WAY), QUERY), (64, 1)))
    assert (tasks.support.weight == 1).all()
    seen_with, seen_without = set(), set()
    for spec, support, query in zip(specs, _which(tasks.support.x), _which(tasks.query.x), strict=True):
        assert len(set(spec.tolist())) == WAY + OTHERS
        drawn = [tuple(image) for image in np.concatenate([support, query])]
        assert len(set(drawn)) == len(drawn)
        assert support[:, 0].tolist() == [*np.repeat(spec[:WAY], SHOT), *np.repeat(spec, MORE)]
        assert query[:, 0].tolist() == np.repeat(spec[:WAY], QUERY).tolist()
        seen_with |= {tuple(image) for image in np.concatenate([support[: WAY * SHOT], query])}
        seen_without |= {tuple(image) for image in support[WAY * SHOT :]}
    if made == "partly":  # 0.4 of eight are three
        assert not seen_with & seen_without
        assert len(seen_with) == 6 * 3
        assert len(seen_without) == 6 * 5
    else:
        assert len(seen_with) == len(seen_without) == 6 * 8


def test_with_all_labels_and_nothing_unlabelled_it_is_an_episode():
    images = _identified()
    ours = _tasks(partly_labelled(images, (1, 2), 2, way=2, unlabelled=0, labelled_share=1.0), 1024)
    theirs = _tasks(mg.episodes(images, (1, 2), 2, way=2), 1024)
    np.testing.assert_array_equal(ours[0], theirs[0])
    for one, other in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
        assert one.shape == other.shape
    np.testing.assert_array_equal(ours[1].support.weight, theirs[1].support.weight)
    np.testing.assert_array_equal(_which(ours[1].query.x)[..., 0], _which(theirs[1].query.x)[..., 0])
    counts = [np.bincount(_which(tasks.query.x)[..., 1].ravel(), minlength=8) for _, tasks in (ours, theirs)]
    np.testing.assert_allclose(np.array(counts) / counts[0].sum(), 1 / 8, atol=0.015)
    hidden = _tasks(hidden_labels(images, (1, 2), 2, way=2, unlabelled=0), 1024)
    jax.tree.map(np.testing.assert_array_equal, hidden, theirs)


def test_labels_are_split_once_for_each_class_by_the_seed():
    images = _identified(num_classes=5, per_class=20)
    known, rest = split_labels(images, 0.1, seed=0)
    assert known.count.tolist() == 5 * [2]
    assert rest.count.tolist() == 5 * [18]
    both = np.concatenate([_which(known.images / 255), _which(rest.images / 255)])
    assert len({tuple(image) for image in both}) == 100
    assert known.class_names == rest.class_names == images.class_names
    np.testing.assert_array_equal(_which(known.images / 255)[:, 0], np.repeat(np.arange(5), 2))
    np.testing.assert_array_equal(split_labels(images, 0.1, seed=0)[0].images, known.images)
    others = _which(split_labels(images, 0.1, seed=1)[0].images / 255)
    assert (others != _which(known.images / 255)).any()
    assert len({drawing for _, drawing in _which(known.images / 255)}) > 4  # not the same drawings of every class


def test_generated_images_join_the_support_and_their_generator_is_an_argument():
    family = mg.episodes(tiny_images(), 1, 2, way=2)

    def more(scale, key, spec, task):
        noise = jax.random.uniform(key, task.support.x.shape)
        return scale * task.support.x + spec[0] + 1e-3 * noise

    extended = with_unlabelled(family, more, jnp.array(0.5))
    specs, tasks = _tasks(extended, 4)
    assert tasks.support.label.tolist() == 4 * [[0, 1, -1, -1]]
    expected = 0.5 * tasks.support.x[:, :2] + specs[:, :1, None, None, None]
    np.testing.assert_allclose(tasks.support.x[:, 2:], expected, atol=1e-3)
    doubled = _tasks(extended._replace(data=(family.data, jnp.array(1.0))), 4)[1]
    np.testing.assert_allclose(
        doubled.support.x[:, 2:] - tasks.support.x[:, 2:], 0.5 * tasks.support.x[:, :2], atol=1e-6
    )
    twice = _tasks(with_unlabelled(extended, lambda data, key, spec, task: task.query.x[:1]), 4)[1]
    assert twice.support.label.tolist() == 4 * [[0, 1, -1, -1, -1]]
    np.testing.assert_array_equal(twice.support.x[:, -1], twice.query.x[:, 0])


def test_joined_examples_keep_the_padding_of_what_they_join():
    support = mg.Examples(jnp.ones((2, 3)), jnp.array([1, 0]), jnp.array([1.0, 0.0]))
    both = joined(support, jnp.zeros((1, 3)))
    assert both.weight.tolist() == [1.0, 0.0, 1.0]
    assert both.label.tolist() == [1, 0, -1]


def test_too_few_images_or_classes_and_shares_out_of_range_are_refused():
    images = tiny_images()
    with pytest.raises(ValueError, match=r"tiny, labelled: 1 shots and 2 query images need 3 .* 6 of 6"):
        partly_labelled(images, 1, 2, way=2, unlabelled=1, labelled_share=0.25)
    with pytest.raises(ValueError, match=r"tiny, unlabelled: .* need 7 images in each class"):
        partly_labelled(images, 1, 1, way=2, unlabelled=7, labelled_share=0.25)
    with pytest.raises(ValueError, match="7-way tasks need 7 classes"):
        partly_labelled(images, 1, 1, way=2, unlabelled=1, distractors=5, labelled_share=0.25)
    with pytest.raises(ValueError, match=r"share of labelled images in \(0, 1\], got labelled_share=0"):
        partly_labelled(images, 1, 1, way=2, unlabelled=1, labelled_share=0)
    with pytest.raises(ValueError, match="unlabelled=0, distractors=2"):
        partly_labelled(images, 1, 1, way=2, unlabelled=0, distractors=2)
    with pytest.raises(ValueError, match="unlabelled=-1"):
        hidden_labels(images, 1, 1, way=2, unlabelled=-1)
    with pytest.raises(ValueError, match="1 shots and 8 query images need 9"):
        hidden_labels(images, 1, 2, way=2, unlabelled=6)
