"""Learning and clustering in turns: every round clusters the images as the learner of the round before sees them.

    codes = embed(state, images),   labels = cluster(key, codes),   state <- train(key, state, clusters as classes)

Labels are never looked at. A loop on the host over functions that are given: what is embedded, how it is clustered and
how it is learned from are the caller's, jitted or not.

Sources: Caron et al., Deep Clustering for Unsupervised Learning of Visual Features, 2018; Ji et al., Unsupervised
Few-Shot Feature Learning via Self-Supervised Training, 2019 (UFLST: with episodes, on Omniglot). Departure from both:
clusters by any method; a cluster that is too small for a task is left out of the round.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from metagen_jax.latent.pseudo_classes import pseudo_classes
from metagen_jax.tasks.image_set import ImageSet
from metagen_jax.types import Array, Key

Embed = Callable[[Any, np.ndarray], Array]  # (state, images [N, H, W, C] uint8) -> codes [N, Z]
Cluster = Callable[[Key, Array], Array]  # (key, codes [N, Z]) -> labels [N] int
Train = Callable[[Key, Any, ImageSet], Any]  # (key, state, clusters as classes) -> state


class Round(NamedTuple):
    """What one round found and learned."""

    labels: np.ndarray  # [N] int, the cluster of each image
    images: ImageSet  # the clusters that were learned from, as classes
    state: Any  # after learning from them


def self_training(
    embed: Embed,
    cluster: Cluster,
    train: Train,
    images: ImageSet,
    state: Any,
    key: Key,
    *,
    num_rounds: int,
    members: int,
) -> Iterator[Round]:
    """Yield the rounds, one by one, each from the state of the one before; round n has the key `fold_in(key, n)`.

    Args:
        embed: of all images at once; `state` is whatever `train` returns.
        cluster: of codes, for example `lambda key, codes: kmeans(500)(key, codes).labels`.
        train: on the clusters of this round.
        images: N images, whose classes are not looked at.
        state: the first one, which embeds the images of the first round.
        key: of all rounds.
        num_rounds: at least one.
        members: what a task needs of a class, shot + query; smaller clusters are left out.

    Raises:
        ValueError: no round; in a round: codes that are not finite or not one row an image, no cluster that is large
            enough.
    """
    if num_rounds < 1:
        raise ValueError(f"expected at least one round, got {num_rounds}")
    return _rounds(embed, cluster, train, images, state, key, num_rounds, members)


def _rounds(
    embed: Embed, cluster: Cluster, train: Train, images: ImageSet, state: Any, key: Key, num_rounds: int, members: int
) -> Iterator[Round]:
    for number in range(num_rounds):
        cluster_key, train_key = jax.random.split(jax.random.fold_in(key, number))
        codes = embed(state, images.images)
        finite = bool(np.isfinite(np.asarray(codes)).all())
        if len(codes) != len(images.images) or not finite:
            raise ValueError(
                f"round {number}: expected a finite code for each of {len(images.images)} images, got "
                f"{list(codes.shape)}{'' if finite else ', not all finite: the learner diverged in the round before'}"
            )
        labels = np.asarray(cluster(cluster_key, codes))
        (classes,) = pseudo_classes(images, labels[None], members)
        state = train(train_key, state, classes)
        yield Round(labels, classes, state)
