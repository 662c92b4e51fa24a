"""Clusters as classes: which images they have, and that tasks over partitions are those of episodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import tiny_images

from metagen_jax.latent.kmeans import kmeans
from metagen_jax.latent.pseudo_classes import over_partitions, partitions, pseudo_classes
from metagen_jax.tasks.episodes import episodes

NUM = 24
LABELS = np.stack([np.arange(NUM) % 4, np.arange(NUM) // 8, np.minimum(np.arange(NUM) // 3, 5)])
"""Clusters of 6 each, of 8 each, and of 3 each but for the last, which has 9."""


def _numbered():
    """Return images of which each can be told from its first pixel."""
    images = tiny_images(num_classes=6, per_class=4)
    pixels = np.zeros_like(images.images)
    pixels[:, 0, 0, 0] = np.arange(NUM)
    return images._replace(images=pixels)


def _numbers_of(x):
    return np.round(np.asarray(x)[..., 0, 0, 0] * 255).astype(int)


def test_partitions_are_clusterings_of_randomly_scaled_codes():
    codes = jnp.asarray(np.random.default_rng(0).normal(size=(30, 3)), jnp.float32)
    found = np.asarray(jax.jit(partitions(4, 3, num_steps=8))(jax.random.key(0), codes))
    assert found.shape == (3, 30)
    for key, labels in zip(jax.random.split(jax.random.key(0), 3), found, strict=True):
        scale_key, cluster_key = jax.random.split(key)
        scaled = codes * jax.random.uniform(scale_key, (3,))[None]
        np.testing.assert_array_equal(kmeans(4, num_steps=8, restarts=1)(cluster_key, scaled).labels, labels)
    together = [labels[:, None] == labels[None] for labels in found]
    assert (together[0] != together[1]).any()


def test_clusters_with_enough_members_become_classes_and_the_others_are_left_out():
    images = _numbered()
    of_four, of_three, last = pseudo_classes(images, LABELS, members=6)
    assert [part.num_classes for part in (of_four, of_three, last)] == [4, 3, 1]
    assert last.class_names == ("cluster 5",)
    assert last.images[:, 0, 0, 0].tolist() == list(range(15, 24))
    start = np.cumsum([0, *of_four.count])
    for number, name in enumerate(of_four.class_names):
        members = of_four.images[start[number] : start[number + 1], 0, 0, 0]
        assert members.tolist() == [row for row in range(NUM) if LABELS[0, row] == number], name
    assert set(of_four.groups) == {""}
    assert "without labels" in of_four.note


def test_one_partition_gives_the_tasks_of_its_episodes():
    images = _numbered()
    (classes,) = pseudo_classes(images, LABELS[1:2], members=5)
    expected = episodes(classes, (1, 2), 3, way=2)
    family = over_partitions(images, LABELS[1:2], (1, 2), 3, way=2)
    make, other = jax.jit(jax.vmap(family.make, (None, 0, 0))), jax.jit(jax.vmap(expected.make, (None, 0, 0)))
    specs, keys = jnp.array([[2, 0], [1, 2], [0, 1]]), jax.random.split(jax.random.key(4), 3)
    jax.tree.map(
        np.testing.assert_array_equal,
        make(family.data, keys, specs),
        other(expected.data, jax.random.clone(keys), specs),
    )


def test_every_task_is_of_one_partition_and_every_class_of_one_cluster():
    images = _numbered()
    family = over_partitions(images, LABELS[:2], 2, 3, way=3)
    assert family.data.images.shape[0] == NUM  # stored once

    @jax.jit
    def draw(data, key):
        spec_key, make_key = jax.random.split(key)
        spec = family.describe(data, spec_key)
        return spec, family.make(data, make_key, spec)

    specs, tasks = jax.vmap(draw, (None, 0))(family.data, jax.random.split(jax.random.key(0), 200))
    partition = np.asarray(specs) >= 4  # four clusters of the first, then three of the second
    assert (partition.all(1) | ~partition.any(1)).all()
    assert 60 < partition.all(1).sum() < 140
    assert np.bincount(np.asarray(specs).ravel(), minlength=7).min() > 30
    assert all(len(set(spec)) == 3 for spec in np.asarray(specs).tolist())
    support, query = _numbers_of(tasks.support.x), _numbers_of(tasks.query.x)
    for spec, given, asked in zip(np.asarray(specs), support, query, strict=True):
        for number, cluster in enumerate(spec):
            members = [*given[2 * number : 2 * number + 2], *asked[3 * number : 3 * number + 3]]
            assert len(set(members)) == 5
            labels = LABELS[int(cluster >= 4)][members]
            assert set(labels.tolist()) == {int(cluster) - 4 * int(cluster >= 4)}


def test_small_clusters_are_never_drawn():
    family = over_partitions(_numbered(), LABELS[[0, 2]], 3, 3)
    specs = jax.vmap(family.describe, (None, 0))(family.data, jax.random.split(jax.random.key(0), 60))
    assert set(np.asarray(specs).ravel().tolist()) == {0, 1, 2, 3, 4}  # of the last partition only its largest


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda i: partitions(4, 0), "at least one partition, got 0"),
        (lambda i: pseudo_classes(i, LABELS, 7), "no cluster has 7 images, the largest has 6"),
        (
            lambda i: pseudo_classes(i, LABELS[0], 2),
            r"\[P, 24\].*got \[24\] int64; one partition is labels\[None\]",
        ),
        (lambda i: pseudo_classes(i, LABELS[:, :5], 2), r"got \[3, 5\]"),
        (lambda i: pseudo_classes(i, LABELS + 0.5, 2), "float64"),
        (lambda i: pseudo_classes(i, LABELS - 1, 2), "count from 0, got -1"),
        (lambda i: over_partitions(i, LABELS, 3, 3, way=2), "2 clusters of at least 6 images, but partition 2 has 1"),
        (lambda i: over_partitions(i, LABELS, 3, 0), "query=0"),
    ],
)
def test_what_makes_no_tasks_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(_numbered())
