"""Likelihood of images given some of their class, as a function of the number of shots: conditional, and of whole sets.

The images of a class are put in a random order without replacement: the query, then x_1, x_2, ... At every number of
shots t the support is x_1..x_t and the query the same, whatever the largest number is, so the shots of one episode
differ in nothing else:

    conditional    log p(x_query | x_1..x_t),    x_query never among them
    of a set       1/K sum_{t < K} log p(x_{t+1} | x_1..x_t),    nats per image

The second is a joint likelihood of a set of K images for any model, by the chain rule, in the order drawn. It is the
one that a model with a set latent states itself only where the model's predictions are consistent; keep the two apart.

Every number is in nats per image, larger is better, and per class, so that intervals are over classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.evaluate import map_tasks
from metagen_jax.metrics.likelihood import bounds
from metagen_jax.tasks.episodes import episodes as episodes_of
from metagen_jax.tasks.family import Spec
from metagen_jax.tasks.image_set import ImageSet
from metagen_jax.types import Adapt, Array, Density, Examples, Key, Params


class ShotCurve(NamedTuple):
    """Likelihood per class and number of shots, nats per image (larger is better)."""

    shots: np.ndarray  # [S]
    elbo: np.ndarray  # [C, S] means over queries and episodes
    best: np.ndarray  # [C, S] the second number of `metrics.likelihood.bounds`


Score = Callable[[Params, Key, Examples, Array], tuple[Array, Array]]
"""(meta, key, support, x [Q, *event]) -> two likelihoods, each [Q]."""


def adapted_score(adapt: Adapt, density: Density, num_samples: int) -> Score:
    """Return the likelihood under the parameters that an adapter makes of the support."""
    estimate = bounds(density, num_samples, chunk=min(50, num_samples))

    def score(meta: Params, key: Key, support: Examples, x: Array) -> tuple[Array, Array]:
        adapt_key, density_key = jax.random.split(key)
        params, _ = adapt(meta, adapt_key, support)
        return estimate(params, density_key, x)

    return score


def shot_curve(
    score: Score,
    images: ImageSet,
    meta: Params,
    specs: Spec,
    key: Key,
    *,
    shots: Sequence[int],
    query: int = 1,
    episodes: int = 1,
    task_chunk: int = 16,
    on_chunk: Callable[[int], None] = lambda done: None,
) -> ShotCurve:
    """Estimate the likelihood of held-out images of each class after each number of shots.

    Args:
        score: `adapted_score` of a learner, or any other.
        images: a part of a source that the model has not seen.
        meta: meta-parameters.
        specs: [C, 1] int32, one class each.
        key: class c and episode e have a key folded from their numbers, so two systems meet the same images.
        shots: numbers of support images, 0 for none.
        query: images that are held out, the same at all shots.
        episodes: orders drawn of each class.
        task_chunk: classes at a time.
        on_chunk: called with the number of classes and episodes done.

    Raises:
        ValueError: no shots or negative ones, or more than a class has images.
    """
    asked = _checked(shots)
    if query < 1:
        raise ValueError(f"expected at least one query image, got query={query}")
    family = episodes_of(images, query, max(1, int(asked.max())))  # the first to be drawn are the query

    def one(meta: Params, data: Any, key: Key, spec: Spec) -> tuple[Array, Array]:
        make_key, score_key = jax.random.split(key)
        asked_of, known = family.make(data, make_key, spec)
        weight = asked_of.weight / asked_of.weight.sum()

        def at(count: Array) -> tuple[Array, Array]:
            values = score(meta, jax.random.fold_in(score_key, count), first(known, count), asked_of.x)
            return (weight * values[0]).sum(), (weight * values[1]).sum()

        return jax.lax.map(at, jnp.asarray(asked))

    many = jax.jit(jax.vmap(one, in_axes=(None, None, 0, 0)))
    elbo, best = map_tasks(many, meta, family.data, specs, key, episodes, task_chunk, on_chunk)
    return ShotCurve(asked, elbo, best)


def set_likelihood(
    score: Score,
    images: ImageSet,
    meta: Params,
    specs: Spec,
    key: Key,
    *,
    size: int = 5,
    episodes: int = 1,
    task_chunk: int = 16,
    on_chunk: Callable[[int], None] = lambda done: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate the joint likelihood of sets of `size` images by the chain rule, in nats per image, per class.

    Args:
        score: as in `shot_curve`.
        images: as there.
        meta: as there.
        specs: as there.
        key: as there.
        size: K, images of a set, all of one class.
        episodes: sets of each class.
        task_chunk: classes at a time.
        on_chunk: as there.

    Returns:
        Two likelihoods, each [C], as in `ShotCurve`.

    Raises:
        ValueError: a set without images.
    """
    if size < 1:
        raise ValueError(f"a set needs at least one image, got size={size}")
    family = episodes_of(images, 0, size)

    def one(meta: Params, data: Any, key: Key, spec: Spec) -> tuple[Array, Array]:
        make_key, score_key = jax.random.split(key)
        whole = family.make(data, make_key, spec).query

        def at(count: Array) -> tuple[Array, Array]:
            known = first(jax.tree.map(lambda leaf: leaf[: size - 1], whole), count)
            following = jax.lax.dynamic_slice_in_dim(whole.x, count, 1)
            elbo, best = score(meta, jax.random.fold_in(score_key, count), known, following)
            return elbo[0], best[0]

        elbo, best = jax.lax.map(at, jnp.arange(size))
        return elbo.mean(), best.mean()

    many = jax.jit(jax.vmap(one, in_axes=(None, None, 0, 0)))
    elbo, best = map_tasks(many, meta, family.data, specs, key, episodes, task_chunk, on_chunk)
    return elbo, best


def likelihood_accuracy(
    score: Score,
    images: ImageSet,
    meta: Params,
    key: Key,
    *,
    way: int,
    shots: int,
    query: int = 1,
    tasks: int = 100,
    task_chunk: int = 4,
    on_chunk: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Classify by likelihood: of `way` classes with `shots` images each, the one that finds the query likeliest.

        class(x) = argmax_c log p(x | S_c)

    Args:
        score: as in `shot_curve`; its second number decides. Each class is adapted to alone, with a key of its own.
        images: as there.
        meta: as there.
        key: of the tasks and of all draws.
        way: classes of a task.
        shots: support images of each class.
        query: query images of each class.
        tasks: random tasks.
        task_chunk: tasks at a time.
        on_chunk: called with the number of tasks done.

    Returns:
        The share of queries that were classified rightly [tasks].
    """
    family = episodes_of(images, shots, query, way=way)

    def one(meta: Params, data: Any, key: Key, spec: Spec) -> tuple[Array]:
        make_key, score_key = jax.random.split(key)
        task = family.make(data, make_key, spec)
        by_class = jax.tree.map(lambda leaf: leaf.reshape(way, shots, *leaf.shape[1:]), task.support)

        def of_class(pair: tuple[Array, Examples]) -> Array:
            return score(meta, jax.random.fold_in(score_key, pair[0]), pair[1], task.query.x)[1]

        said = jax.lax.map(of_class, (jnp.arange(way), by_class))
        return ((said.argmax(0) == task.query.label).mean(),)

    many = jax.jit(jax.vmap(one, in_axes=(None, None, 0, 0)))
    describe = jax.jit(jax.vmap(family.describe, in_axes=(None, 0)))
    describe_key, key = jax.random.split(key)
    specs = describe(family.data, jax.random.split(describe_key, tasks))
    return map_tasks(many, meta, family.data, specs, key, 1, task_chunk, on_chunk)[0]


def first(support: Examples, count: Array) -> Examples:
    """Return the support of which only the first `count` examples count; the others are zeros of weight zero."""
    known = (jnp.arange(support.x.shape[0]) < count).astype(support.weight.dtype)
    x = support.x * known.reshape(-1, *(1,) * (support.x.ndim - 1))
    return support._replace(x=x, weight=support.weight * known)


def _checked(shots: Sequence[int]) -> np.ndarray:
    asked = np.asarray(sorted(set(shots)), np.int32)
    if not len(asked) or asked[0] < 0:
        raise ValueError(f"expected numbers of shots of at least 0, got {list(shots)}")
    return asked
