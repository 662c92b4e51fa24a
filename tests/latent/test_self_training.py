"""The loop of learning and clustering, on a problem whose every round is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import tiny_images

from metagen_jax.latent.kmeans import kmeans
from metagen_jax.latent.self_training import self_training


def _run(embed, train, num_rounds=3, members=2, cluster=lambda key, codes: kmeans(2, restarts=2)(key, codes).labels):
    images = tiny_images(num_classes=4, per_class=2)
    pixels = np.zeros_like(images.images)
    pixels[:, 0, 0, 0] = [0, 0, 1, 1, 0, 0, 1, 1]  # what the second embedding sees
    pixels[:, 0, 1, 0] = [0, 1, 0, 1, 0, 1, 0, 1]  # what the first does
    images = images._replace(images=pixels)
    key = jax.random.key(0)
    return list(self_training(embed, cluster, train, images, 0, key, num_rounds=num_rounds, members=members))


def test_each_round_clusters_what_the_round_before_learned_to_see():
    seen = []

    def embed(state, pixels):
        return jnp.asarray(pixels[:, 0, 1 if state == 0 else 0, :], jnp.float32)

    def train(key, state, classes):
        seen.append((int(jax.random.randint(key, (), 0, 1000)), state, classes))
        return state + 1

    rounds = _run(embed, train)
    assert [one.state for one in rounds] == [1, 2, 3]
    assert [state for _, state, _ in seen] == [0, 1, 2]
    assert len({number for number, _, _ in seen}) == 3  # a key for each round
    first, second, third = (one.labels[:, None] == one.labels[None] for one in rounds)
    expected_first, expected = ([[a == b for b in row] for a in row] for row in ([0, 1] * 4, [0, 0, 1, 1] * 2))
    np.testing.assert_array_equal(first, expected_first)
    np.testing.assert_array_equal(second, expected)
    np.testing.assert_array_equal(third, expected)
    for one, (_, _, classes) in zip(rounds, seen, strict=True):
        assert one.images is classes
        assert classes.count.tolist() == [4, 4]
    column = seen[1][2].images[:, 0, 0, 0].reshape(2, 4)
    assert (column == column[:, :1]).all()


def test_small_clusters_are_left_out_of_the_round():
    rounds = _run(
        lambda state, pixels: jnp.zeros((8, 1)),
        lambda key, state, classes: classes.num_classes,
        num_rounds=1,
        members=3,
        cluster=lambda key, codes: np.array([0, 0, 0, 0, 0, 1, 2, 2]),
    )
    assert rounds[0].state == 1
    assert rounds[0].images.count.tolist() == [5]


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        (np.zeros((7, 2)), {}, r"round 0: expected a finite code for each of 8 images, got \[7, 2\]"),
        (np.full((8, 2), np.nan), {}, "not all finite: the learner diverged"),
        (np.zeros((8, 2)), {"num_rounds": 0}, "at least one round, got 0"),
        (np.zeros((8, 2)), {"members": 9}, "no cluster has 9 images"),
    ],
)
def test_what_cannot_go_on_is_said(codes, options, message):
    with pytest.raises(ValueError, match=message):
        _run(lambda state, pixels: codes, lambda key, state, classes: state, **options)
