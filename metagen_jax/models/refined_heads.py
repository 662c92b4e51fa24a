"""Prototypes that the unlabelled examples of the support refine: soft k-means.

    p_c <- (sum_n t_nc f_n + sum_n u_n z_nc f_n) / (sum_n t_nc + sum_n u_n z_nc)

    features f_n, targets t_n [C] (zero for padding and unlabelled examples), unlabelled u_n (zero for all others)

from the means of the labelled examples, z_nc being how much of an unlabelled example class c takes, at distances
d_nc = |f_n - p_c|^2,

| distractors | z_nc                                            | for unlabelled examples of          |
|-------------|-------------------------------------------------|-------------------------------------|
| none        | softmax_c(-s d_nc)                              | the classes of the task             |
| cluster     | softmax_c over one cluster more, see `cluster`  | other classes, which lie apart      |
| masked      | softmax_c(-s d_nc) sigmoid(g_c (b_c - d~_nc))   | other classes, wherever they lie    |

The result scores as `prototypes` do, by -s |f - p_c|^2, and is `prototypes` where nothing is unlabelled. One code path
serves three kinds of task: supervised (no unlabelled examples), semi-supervised, and unsupervised (labels that were
made, of generated examples or of clusters).

With `mixing`, z_nc ~ pi_c exp(-s d_nc) with pi_c the share of class c in all examples: the EM algorithm of a mixture of
Gaussians N(p_c, I / 2 s), labelled examples being of a known component.

Sources: Ren et al., Meta-Learning for Semi-Supervised Few-Shot Classification, 2018, equations 3 to 9; Lee et al.,
Meta-GMVAE, 2021 (EM, there in the latent space of a VAE and over the query).
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from metagen_jax.models.heads import Head, class_means, linear_score, nearest
from metagen_jax.types import Array, ArrayTree, Key

Distractors = Literal["none", "cluster", "masked"]
_HIDDEN = 20  # units of the network that makes thresholds
_STATISTICS = 5
_ABSENT = -1e9


def soft_kmeans(
    steps: int = 1,
    distractors: Distractors = "none",
    scale: float = 1.0,
    *,
    radius: float = 100.0,
    mixing: bool = False,
) -> Head:
    """Return the head of class means that `steps` steps of soft k-means refine with the unlabelled examples.

    "cluster" has a cluster more for examples of no class, at the origin before the first step and of length scale r,

        z_nc = softmax_c(-s d_nc / r_c^2 - log r_c),   r_c = 1 but for the last, which is learned,

    and "masked" a soft threshold for each class, on distances over their mean d~_nc = d_nc / mean_n d_nc,

        log b_c, log g_c = MLP(min, max, variance, skewness, excess kurtosis of d~_nc over the unlabelled examples n),

    with a hidden layer of 20 tanh units, the same for all classes, that begins at b = g = 1.

    Args:
        steps: of soft k-means; zero for `prototypes`.
        distractors: "none", "cluster" or "masked".
        scale: initial value of s, whose logarithm is learned.
        radius: initial value of the last r_c, whose logarithm is learned ("cluster" alone). At a large one, the cluster
            takes what is further than log r from every class (s d_nc > log r); 100 is that of the authors' code. It
            wants to lie between the distances of a class's own examples and of others, so look at those.
        mixing: weigh the clusters by their shares of the examples.

    Returns:
        A head that becomes linear when read. A class without labelled examples begins at zero. Meta-parameters of
        `prototypes` are those of "none", so that what was learned without unlabelled examples can be tested with them.

    Raises:
        ValueError: an unknown kind, negative steps, a scale or radius that is not positive, shares of a cluster that
            has no labelled example.

    Source: Ren et al., 2018, equations 4 (none), 5 and 6 (cluster), 7 to 9 (masked). Departures: distances are scaled
    by a learned s; b and g are exponentials of what the network makes, as in the authors' code but made again in every
    step, and gradients pass through its statistics; queries are scored against the classes alone.

    Example:
        >>> head = soft_kmeans()
        >>> features, targets = jnp.array([[0.0], [4.0], [1.0], [6.0]]), jnp.eye(4, 2)
        >>> task = head.read(head.init(jax.random.key(0), 1, 2), features, targets, jnp.array([0.0, 0, 1, 1]))
        >>> (task["kernel"] / 2).round(2).tolist()
        [[0.5, 5.0]]
    """
    if distractors not in get_args(Distractors):
        raise ValueError(f"distractors must be one of {get_args(Distractors)}, got {distractors!r}")
    if steps < 0 or scale <= 0 or radius <= 0:
        raise ValueError(
            f"expected steps >= 0, a positive scale and a positive radius, got steps={steps}, scale={scale}, "
            f"radius={radius}"
        )
    if mixing and distractors == "cluster":
        raise ValueError(
            "mixing=True weighs clusters by the examples that they have, and that of the distractors begins with none; "
            "use mixing=False, where its radius says how much it takes"
        )

    def init(key: Key, num_features: int, num_classes: int) -> ArrayTree:
        del num_features, num_classes
        learned: dict[str, ArrayTree] = {"log_scale": jnp.log(scale)}
        if distractors == "cluster":
            learned["log_radius"] = jnp.log(radius)
        if distractors == "masked":
            learned["thresholds"] = _init_thresholds(key)
        return learned

    def read(head: ArrayTree, features: Array, targets: Array, unlabelled: Array) -> ArrayTree:
        s, num_classes = jnp.exp(head["log_scale"]), targets.shape[1]
        if distractors == "cluster":
            targets = jnp.pad(targets, ((0, 0), (0, 1)))

        def shares(means: Array, count: Array) -> Array:
            """Return how much of each example each cluster takes, [N, clusters], zero for those with a label."""
            distances = squared_distances(features, means)
            logits = -s * distances
            if distractors == "cluster":
                log_radius = jnp.pad(head["log_radius"][None], (num_classes, 0))[None]
                logits = logits * jnp.exp(-2 * log_radius) - log_radius
            if mixing:
                logits += jnp.where(count > 0, jnp.log(jnp.where(count > 0, count, 1.0)), _ABSENT)[None]
            taken = unlabelled[:, None] * jax.nn.softmax(logits)
            return taken * mask(head["thresholds"], distances, unlabelled) if distractors == "masked" else taken

        def step(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            weight = targets + shares(*state)
            return (class_means(features, weight), weight.sum(0)), None

        begin = class_means(features, targets), targets.sum(0)
        (means, _), _ = jax.lax.scan(step, begin, length=steps)
        return nearest(means[:num_classes], s)

    return Head(init, read, linear_score)


def mask(thresholds: ArrayTree, distances: Array, weight: Array) -> Array:
    """Return how much of each example [N] is let through to each class [C], in (0, 1).

    Args:
        thresholds: of the network that makes them.
        distances: d_nc [N, C].
        weight: [N] of the unlabelled examples, over which means are taken; zero for all others.
    """
    total = weight.sum()
    mean = weight @ distances / jnp.where(total > 0, total, 1.0)
    relative = distances / jnp.where(mean > 0, mean, 1.0)[None]
    hidden = jnp.tanh(statistics(relative, weight) @ thresholds["hidden"] + thresholds["shift"][None])
    log_threshold, log_slope = (hidden @ thresholds["kernel"] + thresholds["bias"][None]).T
    return jax.nn.sigmoid(jnp.exp(log_slope)[None] * (jnp.exp(log_threshold)[None] - relative))


def statistics(values: Array, weight: Array) -> Array:
    """Return minimum, maximum, variance, skewness and excess kurtosis of each column [C, 5].

    Rows of zero weight do not count; skewness and kurtosis of values that do not vary are zero, as all are of none.
    """
    present, total = (weight > 0)[:, None], weight.sum()
    share = weight / jnp.where(total > 0, total, 1.0)
    centred = values - (share @ values)[None]
    variance = share @ centred**2
    varies = variance > 0
    safe = jnp.where(varies, variance, 1.0)
    skewness = jnp.where(varies, share @ centred**3 / safe**1.5, 0.0)
    kurtosis = jnp.where(varies, share @ centred**4 / safe**2 - 3, 0.0)
    smallest = jnp.where(present, values, jnp.inf).min(0)
    largest = jnp.where(present, values, -jnp.inf).max(0)
    ends = (jnp.where(total > 0, end, 0.0) for end in (smallest, largest))
    return jnp.stack([*ends, variance, skewness, kurtosis], axis=1)


def squared_distances(features: Array, means: Array) -> Array:
    """Return |f_n - p_c|^2 [N, C]."""
    cross = features @ means.T
    return jnp.maximum(jnp.square(features).sum(1)[:, None] - 2 * cross + jnp.square(means).sum(1)[None], 0.0)


def _init_thresholds(key: Key) -> ArrayTree:
    return {
        "hidden": jax.random.normal(key, (_STATISTICS, _HIDDEN)) / _STATISTICS**0.5,
        "shift": jnp.zeros(_HIDDEN),
        "kernel": jnp.zeros((_HIDDEN, 2)),
        "bias": jnp.zeros(2),
    }
