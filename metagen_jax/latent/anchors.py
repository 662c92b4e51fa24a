"""Anchors: the codes that the classes of a generated task are made around.

Every rule draws `num` codes inside jit, with fixed shapes. Where two anchors lie close together their classes overlap,
so a rule can ask for a smallest squared distance: it draws a fixed number of candidate sets and takes the first one
whose smallest distance is above it, or else the widest,

    m_c = min_{i != j} |z_i - z_j|^2,   c* = first c with m_c > separation, else argmax_c m_c.

For z ~ N(0, I_d) a squared distance has mean 2 d and variance 8 d: `separation(d, a)` = 2 d - a sqrt(8 d).

Sources: Khodadadeh et al., Unsupervised Meta-Learning through Latent-Space Interpolation in Generative Models, 2021
(anchors with a distance, there by rejection); new classes by extrapolation and from midpoints are ours.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.types import Array, Key, Params

CANDIDATES = 8


class LatentBank(NamedTuple):
    """What generated tasks are made of, on the device; without real images, M is zero."""

    params: Params  # of the generator
    codes: Array  # [M, Z] of the real images
    images: Array  # [M, H, W, C] uint8


class Anchors(NamedTuple):
    """The codes of classes, and the real image each one came from."""

    codes: Array  # [num, Z]
    rows: Array  # [num] int32, row of the bank; -1 where the anchor has no image


Draw = Callable[[LatentBank, Key, int], Anchors]
"""(bank, key, num) -> anchors."""


def separation(num_latents: int, deviations: float = 0.3) -> float:
    """Return the squared distance that lies `deviations` standard deviations below that of two codes of the prior.

    Example:
        >>> round(separation(128), 1)  # LASIUM's threshold for 128 dimensions is 246.09
        246.4
    """
    return 2.0 * num_latents - deviations * (8.0 * num_latents) ** 0.5


def from_prior(num_latents: int, *, apart: float = 0.0, candidates: int = CANDIDATES) -> Draw:
    """Return the rule that draws anchors from the prior N(0, I).

    Args:
        num_latents: Z.
        apart: smallest squared distance of two anchors, `separation(Z)` for instance; 0 for none.
        candidates: sets that are drawn to find one.

    Raises:
        ValueError: no latent dimension, no candidate, a negative distance.
    """
    _check(apart, candidates)
    if num_latents < 1:
        raise ValueError(f"expected at least one latent dimension, got {num_latents}")

    def draw(bank: LatentBank, key: Key, num: int) -> Anchors:
        sets = jax.random.normal(key, (candidates if apart else 1, num, num_latents))
        return Anchors(sets[widest(sets, apart)], jnp.full(num, -1, jnp.int32))

    return draw


def from_images(*, apart: float = 0.0, candidates: int = CANDIDATES) -> Draw:
    """Return the rule that takes different real images as anchors, each to be a class of its own.

    Args:
        apart: smallest squared distance of their codes; 0 for none.
        candidates: sets that are drawn to find one.

    Raises:
        ValueError: no candidate, a negative distance; when called, a bank with fewer images than classes.
    """
    _check(apart, candidates)

    def draw(bank: LatentBank, key: Key, num: int) -> Anchors:
        total = bank.codes.shape[0]
        if total < num:
            raise ValueError(f"{num} classes need {num} real images to begin from, and the bank has {total}")
        rows = _different(key, candidates if apart else 1, num, total)
        sets = bank.codes[rows]
        chosen = widest(sets, apart)
        return Anchors(sets[chosen], rows[chosen])

    return draw


def extrapolated(base: Draw, amount: float = 0.5) -> Draw:
    """Return the rule that makes new classes beyond known ones: z_i + b (z_i - z_j), j the next anchor.

    A code longer than sqrt(Z) + 3, where the prior has next to nothing, is shortened to that.

    Raises:
        ValueError: an amount outside (0, 1]; when called, fewer than two classes.
    """
    if not 0 < amount <= 1:
        raise ValueError(f"expected an amount of extrapolation in (0, 1], got {amount}")

    def draw(bank: LatentBank, key: Key, num: int) -> Anchors:
        if num < 2:
            raise ValueError(f"extrapolation goes away from another class, so it needs at least 2, got {num}")
        codes = base(bank, key, num).codes
        beyond = codes + amount * (codes - jnp.roll(codes, -1, axis=0))
        length = jnp.sqrt(jnp.square(beyond).sum(-1, keepdims=True))
        longest = codes.shape[1] ** 0.5 + 3.0
        return Anchors(beyond * jnp.minimum(1.0, longest / jnp.maximum(length, longest)), jnp.full(num, -1, jnp.int32))

    return draw


def midpoints(base: Draw) -> Draw:
    """Return the rule that makes new classes between known ones: (z_i + z_j) / 2 of disjoint pairs.

    Of pairs that `base` keeps apart by a squared distance s, the midpoint is at least s / 4 away from both ends.
    """

    def draw(bank: LatentBank, key: Key, num: int) -> Anchors:
        codes = base(bank, key, 2 * num).codes
        return Anchors(0.5 * (codes[:num] + codes[num:]), jnp.full(num, -1, jnp.int32))

    return draw


def widest(sets: Array, apart: float) -> Array:
    """Return the index [] of the first of the sets [C, num, Z] that is wide enough, else of the widest."""
    if sets.shape[0] == 1 or sets.shape[1] < 2:
        return jnp.zeros((), jnp.int32)
    smallest = jax.vmap(closest)(sets)
    enough = smallest > apart
    return jnp.where(enough.any(), jnp.argmax(enough), jnp.argmax(smallest))


def closest(codes: Array) -> Array:
    """Return the smallest squared distance [] of two of the codes [num, Z]."""
    squares = jnp.square(codes).sum(-1)
    distances = squares[:, None] + squares[None] - 2 * codes @ codes.T
    return jnp.where(jnp.eye(codes.shape[0], dtype=bool), jnp.inf, distances).min()


def _different(key: Key, sets: int, num: int, total: int) -> Array:
    """Return `sets` sets of `num` different rows out of `total`, [sets, num].

    By drawing num rows and moving each that repeats an earlier one to the next free row, which costs num^2 instead of
    a permutation of a whole data set.
    """

    def one(key: Key) -> Array:
        # row i is uniform on total - num + 1 + i rows and shifted past those taken: Floyd's sampling without a set
        draws = jax.random.randint(key, (num,), 0, total - num + 1 + jnp.arange(num))

        def body(i: Array, taken: Array) -> Array:
            seen = (taken == draws[i]) & (jnp.arange(num) < i)
            return taken.at[i].set(jnp.where(seen.any(), total - num + i, draws[i]))

        return jax.lax.fori_loop(0, num, body, jnp.zeros(num, jnp.int32))

    return jax.vmap(one)(jax.random.split(key, sets))


def _check(apart: float, candidates: int) -> None:
    if not apart >= 0 or candidates < 1:
        raise ValueError(f"expected a distance of at least 0 and a candidate, got apart={apart}, {candidates=}")
