"""Heads of classifiers: the last stage, moved by gradient steps or read off the support in closed form.

    features f_n of the support, targets t_n [C] (one-hot times weight; zero for padding and unlabelled examples),
    unlabelled u_n (the weight of an example without a label; zero for padding and labelled examples)

None of these looks at the unlabelled examples; those of `metagen_jax.models.refined_heads` do.

| head       | what is read off the support                  | logits of a feature f                      |
|------------|-----------------------------------------------|--------------------------------------------|
| linear     | nothing (gradient steps move it)              | f W + b                                    |
| prototypes | class means c_k                               | -s |f - c_k|^2 + s |f|^2, which is linear  |
| ridge      | W = argmin sum_n |f_n W - t_n|^2 + l |W|^2    | s f W + b                                  |
| matching   | the support itself                            | log sum_n softmax_n(s a(f, f_n)) t_n       |
| relation   | class means c_k                               | s sigmoid(g([c_k, f])), g a network        |

A task's head is another tree than what is learned of it (scales, networks); `score` takes the task's.

Sources: Snell, Swersky & Zemel, Prototypical Networks, 2017, equation 8; Bertinetto et al., Meta-Learning with
Differentiable Closed-Form Solvers, 2019; Vinyals et al., Matching Networks, 2016; Sung et al., Learning to Compare,
2018.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from metagen_jax.models.networks import Network
from metagen_jax.types import Array, ArrayTree, Key

Similarity = Literal["cosine", "l2"]
_TINY = 1e-8
_ABSENT = -1e9  # the logit of what is not there: finite, so that losses and gradients are


class Head(NamedTuple):
    """The last stage of a classifier."""

    init: Callable[[Key, int, int], ArrayTree]  # (key, F features, C classes) -> what meta-training learns of it
    # (learned, features [N, F], targets [N, C], unlabelled [N]) -> a task's head
    read: Callable[[ArrayTree, Array, Array, Array], ArrayTree]
    score: Callable[[ArrayTree, Array], Array]  # (a task's head, features [N, F]) -> logits [N, C]
    reads: bool = True  # whether it has to be read off a support set before it can score


def linear(scale: float = 0.0) -> Head:
    """Return the linear head f W + b, which nothing is read into: gradient steps move it.

    Args:
        scale: of the initial logits. The labels of a task are exchangeable, so the best beginning knows none of them,
            and zero learns fastest; where only the body moves inside (BOIL), zero would give it no gradient: use 1.
    """

    def init(key: Key, num_features: int, num_classes: int) -> ArrayTree:
        kernel = scale / num_features**0.5 * jax.random.normal(key, (num_features, num_classes))
        return {"kernel": kernel, "bias": jnp.zeros(num_classes)}

    return Head(init, lambda head, features, targets, unlabelled: head, linear_score, reads=False)


def prototypes(scale: float = 1.0) -> Head:
    """Return the head of class means: logits -s |f - c_k|^2, up to what is common to all classes.

    It is linear, W = 2 s c^T and b = -s |c|^2, so it can also be where gradient steps begin. A class without examples
    has the mean zero.

    Args:
        scale: initial value of s, whose logarithm is learned.

    Source: Snell, Swersky & Zemel, 2017, equations 1 and 8; departure: s is learned, there it is 1.

    Example:
        >>> head = prototypes()
        >>> learned = head.init(jax.random.key(0), 1, 2)
        >>> features, targets = jnp.array([[0.0], [2.0], [5.0]]), jnp.array([[1.0, 0], [1, 0], [0, 1]])
        >>> task = head.read(learned, features, targets, jnp.zeros(3))
        >>> jax.nn.log_softmax(head.score(task, jnp.array([[1.0], [5.0]]))).argmax(1).tolist()
        [0, 1]
    """

    def read(head: ArrayTree, features: Array, targets: Array, unlabelled: Array) -> ArrayTree:
        del unlabelled
        return nearest(class_means(features, targets), jnp.exp(head["log_scale"]))

    return Head(_log_scale(scale), read, linear_score)


def ridge(strength: float = 1.0, scale: float = 1.0) -> Head:
    """Return the head of ridge regression onto the targets, solved in closed form.

        W = X^T (X X^T + l I)^-1 Y,   logits s f W + b,   X = [f_1 ... f_N], Y the targets

    by the system of N equations or that of F, whichever is smaller (the same W, by Woodbury's identity). Rows of X
    without a target are zero, so that padding changes nothing.

    Args:
        strength: initial value of l, whose logarithm is learned.
        scale: initial value of s, whose logarithm is learned, as b is.

    Source: Bertinetto, Henriques, Torr & Vedaldi, 2019, equations 3 to 6 (R2-D2).
    """

    def init(key: Key, num_features: int, num_classes: int) -> ArrayTree:
        del key, num_features, num_classes
        return {"log_strength": jnp.log(strength), "log_scale": jnp.log(scale), "bias": jnp.zeros(())}

    def read(head: ArrayTree, features: Array, targets: Array, unlabelled: Array) -> ArrayTree:
        del unlabelled
        weight = jnp.sqrt(targets.sum(1, keepdims=True))
        x, y = weight * features, targets / jnp.where(weight > 0, weight, 1.0)
        rows, columns = x.shape
        damping = jnp.exp(head["log_strength"])
        if rows <= columns:
            solution = x.T @ jnp.linalg.solve(x @ x.T + damping * jnp.eye(rows), y)
        else:
            solution = jnp.linalg.solve(x.T @ x + damping * jnp.eye(columns), x.T @ y)
        kernel = jnp.exp(head["log_scale"]) * solution
        return {"kernel": kernel, "bias": jnp.broadcast_to(head["bias"], kernel.shape[1:])}

    return Head(init, read, linear_score)


def matching(similarity: Similarity = "l2", scale: float = 1.0) -> Head:
    """Return the head that attends to the support: p(k | f) = sum_n softmax_n(s a(f, f_n)) t_nk.

    a is the cosine of f and f_n or minus their squared distance; the logits are log p. With one example of each class
    and the squared distance, this is `prototypes`.

    Args:
        similarity: "cosine" (the article's) or "l2".
        scale: initial value of s, whose logarithm is learned; cosines want about 10.

    Raises:
        ValueError: an unknown similarity.

    Source: Vinyals et al., 2016, equation 1, without full context embeddings; departure: s is learned, there it is 1.
    """
    if similarity not in get_args(Similarity):
        raise ValueError(f"similarity must be one of {get_args(Similarity)}, got {similarity!r}")

    def read(head: ArrayTree, features: Array, targets: Array, unlabelled: Array) -> ArrayTree:
        del unlabelled
        return {**head, "features": features, "targets": targets}

    def score(head: ArrayTree, features: Array) -> Array:
        kept, targets = read_leaf(head, "features"), head["targets"]
        if similarity == "cosine":
            alike = unit(features) @ unit(kept).T
        else:
            alike = 2 * features @ kept.T - jnp.square(kept).sum(1)[None]  # |f|^2 is common to all
        weight = targets.sum(1)
        labelled = weight > 0
        weight = jnp.where(labelled, weight, 1.0)
        alike = jnp.where(labelled[None], jnp.exp(head["log_scale"]) * alike, _ABSENT)
        log_attention = jax.nn.log_softmax(alike + jnp.log(weight)[None], axis=1)
        share = targets / weight[:, None]
        log_share = jnp.where(share > 0, jnp.log(jnp.where(share > 0, share, 1.0)), -jnp.inf)
        # summed as logarithms, so that far classes keep a finite logit and a gradient
        of_class, present = log_attention[:, :, None] + log_share[None], (share > 0).any(0)
        log_p = jax.scipy.special.logsumexp(jnp.where(present[None, None], of_class, 0.0), axis=1)
        return jnp.where(present[None], log_p, _ABSENT)

    return Head(_log_scale(scale), read, score)


def relation(network: Network, scale: float = 10.0) -> Head:
    """Return the head that judges pairs of a class mean and a feature by a network: logits s sigmoid(g([c_k, f])).

    Args:
        network: [M, 2 F] -> [M, 1].
        scale: initial value of s, whose logarithm is learned.

    Source: Sung et al., 2018, equation 1. Departure: relation scores become logits of a cross-entropy; the article
    regresses them onto zero and one by squared error.
    """

    def init(key: Key, num_features: int, num_classes: int) -> ArrayTree:
        del num_features, num_classes
        return {"log_scale": jnp.log(scale), "network": network.init(key)}

    def read(head: ArrayTree, features: Array, targets: Array, unlabelled: Array) -> ArrayTree:
        del unlabelled
        return {**head, "means": class_means(features, targets)}

    def score(head: ArrayTree, features: Array) -> Array:
        means = read_leaf(head, "means")
        shape = (features.shape[0], means.shape[0], means.shape[1])
        pairs = jnp.concatenate(
            [jnp.broadcast_to(means[None], shape), jnp.broadcast_to(features[:, None], shape)], axis=2
        )
        related = network.apply(head["network"], pairs.reshape(-1, pairs.shape[2])).reshape(shape[:2])
        return jnp.exp(head["log_scale"]) * jax.nn.sigmoid(related)

    return Head(init, read, score)


def class_means(features: Array, targets: Array) -> Array:
    """Return the mean feature of each class [C, F], zero for a class without examples."""
    count = targets.sum(0)
    return targets.T @ features / jnp.where(count > 0, count, 1.0)[:, None]


def nearest(means: Array, scale: Array) -> ArrayTree:
    """Return the linear head of means [C, F]: logits -s |f - c_k|^2 + s |f|^2."""
    return {"kernel": 2 * scale * means.T, "bias": -scale * jnp.square(means).sum(1)}


def linear_score(head: ArrayTree, features: Array) -> Array:
    """Return the logits [N, C] of a task's linear head."""
    return features @ read_leaf(head, "kernel") + head["bias"][None]


def read_leaf(head: ArrayTree, name: str) -> Array:
    """Return a leaf of a task's head, or raise `ValueError` if it was never read off a support set."""
    if name not in head:
        raise ValueError(
            f"this head has {sorted(head)}, but no {name!r}: it has to be read off a support set before it can score; "
            "adapt first, by amortised(model, classifier.embed)"
        )
    return head[name]


def unit(features: Array) -> Array:
    """Return features [N, F] over their length; zero for a feature that is zero."""
    return features * jax.lax.rsqrt(jnp.square(features).sum(-1, keepdims=True) + _TINY)


def _log_scale(scale: float) -> Callable[[Key, int, int], ArrayTree]:
    return lambda key, num_features, num_classes: {"log_scale": jnp.log(scale)}
