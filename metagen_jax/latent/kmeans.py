"""k-means on codes: seeding that spreads the centres, then Lloyd's steps, the best of several beginnings.

    label_n = argmin_c |z_n - m_c|^2,   m_c = mean of the codes with label c,   inertia = sum_n |z_n - m_label_n|^2

in turns, neither of which raises the inertia. The seeding (k-means++) draws every next centre among the codes with a
probability in proportion to the squared distance to the nearest centre so far.

Distances are one matrix product, taken for a chunk of rows at a time, so 24,000 codes and 500 clusters need megabytes
beside the codes. The number of steps is fixed; steps after the last change change nothing.

Shape letters: N codes, Z latent dimensions, C clusters.

Sources: Lloyd, Least Squares Quantization in PCM, 1982; Arthur & Vassilvitskii, k-means++: The Advantages of Careful
Seeding, 2007 (one candidate a centre, no greedy trials).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.types import Array, Key

CHUNK = 4096  # rows of a distance matrix that are held at a time


class Clusters(NamedTuple):
    """A clustering of codes."""

    centres: Array  # [C, Z]
    labels: Array  # [N] int32, index of the nearest centre
    inertia: Array  # [] sum of squared distances to the nearest centre


def kmeans(num_clusters: int, *, num_steps: int = 50, restarts: int = 10) -> Callable[[Key, Array], Clusters]:
    """Return the function (key, codes [N, Z]) -> the clusters of the restart with the lowest inertia.

    Args:
        num_clusters: C.
        num_steps: Lloyd's steps of each restart.
        restarts: independent seedings, one after the other.

    Raises:
        ValueError: no cluster, step or restart; when called, codes that are not [N, Z] or fewer than clusters.

    Example:
        >>> codes = jnp.array([[0.0], [1.0], [10.0], [11.0]])
        >>> found = kmeans(2)(jax.random.key(0), codes)
        >>> sorted(found.centres[:, 0].tolist()), float(found.inertia)
        ([0.5, 10.5], 1.0)
    """
    if num_clusters < 1 or num_steps < 1 or restarts < 1:
        raise ValueError(
            f"expected at least one cluster, step and restart, got num_clusters={num_clusters}, "
            f"num_steps={num_steps}, restarts={restarts}"
        )

    def one(key: Key, codes: Array) -> Clusters:
        return lloyd(codes, plus_plus(key, codes, num_clusters), num_steps)

    def cluster(key: Key, codes: Array) -> Clusters:
        check_codes(codes, num_clusters)
        codes = jnp.asarray(codes)
        centre = codes.mean(0)  # distances do not change, and lose fewer digits
        found = jax.lax.map(lambda key: one(key, codes - centre[None]), jax.random.split(key, restarts))
        best = jax.tree.map(lambda leaf: leaf[jnp.argmin(found.inertia)], found)
        return best._replace(centres=best.centres + centre[None])

    return cluster


def plus_plus(key: Key, codes: Array, num_clusters: int) -> Array:
    """Return C of the codes [N, Z] as first centres [C, Z], spread by k-means++.

    Where there are fewer different codes than clusters, centres repeat.
    """
    first_key, later_key = jax.random.split(key)
    first = codes[jax.random.randint(first_key, (), 0, codes.shape[0])]
    centres = jnp.zeros((num_clusters, codes.shape[1]), codes.dtype).at[0].set(first)

    def add(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centres, distance = carry
        log_distance = jnp.log(jnp.where(distance > 0, distance, 1.0))
        log_distance = jnp.where(distance > 0, log_distance, -jnp.inf)
        chosen = codes[jax.random.categorical(jax.random.fold_in(later_key, number), log_distance)]
        return centres.at[number].set(chosen), jnp.minimum(distance, _squared(codes - chosen[None]))

    return jax.lax.fori_loop(1, num_clusters, add, (centres, _squared(codes - first[None])))[0]


def lloyd(codes: Array, centres: Array, num_steps: int) -> Clusters:
    """Return the clusters after so many of Lloyd's steps from these centres; an empty cluster keeps its centre.

    Args:
        codes: [N, Z].
        centres: [C, Z], where it begins.
        num_steps: 0 assigns and moves nothing.
    """

    def step(centres: Array, _: None) -> tuple[Array, None]:
        total, count = _sums(codes, nearest(codes, centres), centres.shape[0])
        return jnp.where(count[:, None] > 0, total / jnp.where(count > 0, count, 1.0)[:, None], centres), None

    centres, _ = jax.lax.scan(step, centres, length=num_steps)
    labels = nearest(codes, centres)
    return Clusters(centres, labels, _squared(codes - centres[labels]).sum())


def nearest(codes: Array, centres: Array) -> Array:
    """Return the index [N] int32 of the nearest of the centres [C, Z] to every code [N, Z], the first of equals."""
    half_lengths = 0.5 * _squared(centres)

    def of_chunk(rows: Array) -> Array:  # |z|^2 is the same for every centre
        score = jnp.matmul(rows, centres.T, precision="highest") - half_lengths[None]
        return jnp.argmax(score, axis=1).astype(jnp.int32)

    return jax.lax.map(of_chunk, _chunks(codes)).reshape(-1)[: codes.shape[0]]


def check_codes(codes: Array, least: int) -> None:
    """Raise `ValueError` unless codes are [N, Z] with at least so many rows."""
    if codes.ndim != 2 or codes.shape[0] < least:
        raise ValueError(
            f"expected codes [N, Z] of at least {least} images for {least} clusters, got {list(codes.shape)}; "
            "ask for fewer clusters or encode more images"
        )


def _sums(codes: Array, labels: Array, num_clusters: int) -> tuple[Array, Array]:
    """Return the sum [C, Z] and the number [C] of the codes of each cluster, by matrix products."""

    def add(carry: tuple[Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        rows, of_rows = chunk
        member = jax.nn.one_hot(of_rows, num_clusters, dtype=rows.dtype)  # a row of padding, -1, is nobody's
        total, count = carry
        return (total + jnp.matmul(member.T, rows, precision="highest"), count + member.sum(0)), None

    zero = jnp.zeros((num_clusters, codes.shape[1]), codes.dtype), jnp.zeros(num_clusters, codes.dtype)
    return jax.lax.scan(add, zero, (_chunks(codes), _chunks(labels, -1)))[0]


def _chunks(rows: Array, fill: int = 0) -> Array:
    """Return rows [N, ...] as [number of chunks, rows of a chunk, ...], the last one filled up."""
    size = min(CHUNK, rows.shape[0])
    missing = -rows.shape[0] % size
    padded = jnp.pad(rows, [(0, missing), *((0, 0) for _ in rows.shape[1:])], constant_values=fill)
    return padded.reshape(-1, size, *rows.shape[1:])


def _squared(difference: Array) -> Array:
    return jnp.square(difference).sum(-1)
