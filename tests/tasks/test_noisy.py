"""Tasks with wrong labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import tiny_images

from metagen_jax import Examples, Task, TaskFamily, episodes
from metagen_jax.tasks.noisy import with_wrong_labels

WAY, SHOT, QUERY = 4, 20, 30


def _plain():
    """Tasks whose x is their true label, with one example unlabelled and one without weight on either side."""

    def make(data, key, spec):
        def side(count):
            label = jnp.tile(jnp.arange(WAY, dtype=jnp.int32), count)
            x = label[:, None].astype(jnp.float32)
            return Examples(x, label.at[0].set(-1), jnp.ones(WAY * count).at[1].set(0.0))

        return Task(side(SHOT), side(QUERY))

    return TaskFamily(None, lambda data, key: jnp.zeros(1, jnp.int32), make)


def _tasks(share, fraction, count=400):
    family = with_wrong_labels(_plain(), share, fraction)
    make = jax.jit(jax.vmap(lambda key: family.make(None, key, jnp.zeros(1, jnp.int32))))
    return jax.tree.map(np.asarray, make(jax.random.split(jax.random.key(0), count)))


def _wrong(examples):
    """Return the share of wrong labels of each task, of the labelled examples."""
    return (examples.label != examples.x[..., 0])[:, 1:].mean(1)


def test_a_share_of_the_tasks_has_a_fraction_of_wrong_labels_on_both_sides():
    tasks = _tasks(0.3, 0.8)
    support, query = _wrong(tasks.support), _wrong(tasks.query)
    noisy = query > 0
    assert abs(noisy.mean() - 0.3) < 4 * np.sqrt(0.21 / 400)
    np.testing.assert_array_equal(support > 0, noisy)  # one decision for the task
    expected = 0.8 * (1 - 1 / WAY)  # one label in WAY is right by chance
    for side in (support, query):
        assert abs(side[noisy].mean() - expected) < 0.02


def test_wrong_labels_are_uniform_and_the_two_sides_are_independent():
    tasks = _tasks(1.0, 1.0)
    counts = np.bincount(tasks.query.label[:, 1:].ravel(), minlength=WAY)
    assert len(counts) == WAY
    np.testing.assert_allclose(counts / counts.sum(), 1 / WAY, atol=0.01)
    same = tasks.support.label[:, 1:] == tasks.query.label[:, 1 : WAY * SHOT]
    assert abs(same.mean() - 1 / WAY) < 0.01


def test_unlabelled_examples_images_and_weights_stay_as_they_are():
    tasks, plain = _tasks(1.0, 1.0, 3), _tasks(0.0, 1.0, 3)
    for noisy, clean in zip(tasks, plain, strict=True):
        np.testing.assert_array_equal(noisy.label[:, 0], -1)
        np.testing.assert_array_equal(noisy.x, clean.x)
        np.testing.assert_array_equal(noisy.weight, clean.weight)
        assert (noisy.label[:, 1:] != clean.label[:, 1:]).any()


def test_without_noise_the_family_is_the_one_given():
    family = episodes(tiny_images(), 1, 2, way=2)
    assert with_wrong_labels(family, 0.0, 0.5) is family
    assert with_wrong_labels(family, 0.5, 0.0) is family


def test_the_key_of_a_task_decides_and_its_images_are_episodes():
    family = with_wrong_labels(episodes(tiny_images(), 1, 2, way=3), 1.0, 1.0)
    make = jax.jit(lambda data, key: family.make(data, key, jnp.array([4, 0, 2])))
    first, again, other = (make(family.data, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.query.label, again.query.label)
    assert (first.query.label != other.query.label).any()
    assert first.query.label.dtype == jnp.int32
    assert int(first.query.label.max()) < 3


@pytest.mark.parametrize("arguments", [(-0.1, 0.5), (1.1, 0.5), (0.5, -0.1), (0.5, 1.1)])
def test_probabilities_are_checked(arguments):
    with pytest.raises(ValueError, match="share and fraction"):
        with_wrong_labels(_plain(), *arguments)
