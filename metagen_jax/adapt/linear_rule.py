"""Whether a rule moves a kernel by fixed multiples of its gradients, tried out before it is relied on."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagen_jax.adapt.products import owners
from metagen_jax.adapt.starts import Start
from metagen_jax.types import Array, Params

SCALES = (1e-9, 1.0, 1e9, float("nan"))
"""Sizes of the gradients in the trials; those that are not finite have to stay so."""
TOLERANCE = 1e-4
FEW = 3
"""Moves of the trial in which the coordinates have a length of their own, at least."""
ENTRIES = 2 * 10**7
"""Of the gradients of a trial at the true shapes, at most; it has as many moves as that allows."""


def is_linear(
    start: Start, params: Params, kernels: Sequence[int], groups: Sequence[tuple[Sequence[str], int]]
) -> bool:
    """Try whether the rule of a start moves kernels by the same multiples of their gradients in every entry.

    The rule is followed twice from random parameters: once with random gradients G_j, and once with coordinates c and
    unit vectors e_j in place of the kernels and their gradients. It is linear if the kernels move by sum_i c_i G_i, and
    everything else moves alike, for gradients of very different sizes: at the true shapes for all moves (or as many as
    `ENTRIES` allows) and for a number of moves that is no dimension of them, and for all moves on stand-ins with two
    entries along each dimension.

    Args:
        start: whose rule is tried, at the values with which meta-training begins.
        params: the parameters that it moves, for their structure and shapes.
        kernels: positions of the kernels among the leaves of `params`.
        groups: for each group of players that moves together, its players and the number of its moves.

    Returns:
        Whether it is linear. A rule that cannot be followed in the trials is not, and neither is that of a start whose
        rule at the beginning does not say what it is later (`learned`).
    """
    if not start.typical:
        return False
    leaves = jax.tree.leaves(params)
    few = next(number for number in range(FEW, 10**6) if all(number not in jnp.shape(leaf) for leaf in leaves))
    small = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2,) * jnp.ndim(leaf), jnp.result_type(leaf)), params)
    affordable = max(1, ENTRIES // sum(max(1, math.prod(jnp.shape(leaf))) for leaf in leaves))
    trials = ((params, 1, affordable), (params, few, few), (small, 1, 10**6))
    draw = np.random.default_rng(0).standard_normal  # by jax, each shape would be a program to compile
    try:
        with jax.ensure_compile_time_eval(), jax.numpy_rank_promotion("allow"), jax.debug_nans(False):
            for shapes, least, most in trials:
                zeros = jax.tree.map(lambda leaf: np.zeros(jnp.shape(leaf), jnp.result_type(leaf)), shapes)
                begin, rule = start(start.extend(zeros))
                if str(jax.tree.structure(begin)) != str(jax.tree.structure(params)):
                    return False
                for players, moves in groups:
                    mine = {name: begin[name] for name in players}
                    chosen = [index in kernels for index, name in enumerate(owners(begin)) if name in players]
                    count = min(max(moves, least), most)
                    leaves = [_normal(draw, leaf) for leaf in jax.tree.leaves(mine)]
                    gradients = [_normal(draw, leaf, count) for leaf in leaves]
                    trial = jax.jit(functools.partial(_deviation, rule, jax.tree.structure(mine), chosen))
                    if not all(trial(leaves, gradients, scale) < TOLERANCE for scale in SCALES):
                        return False
            return True
    except Exception:  # whatever a rule of others raises on a stand-in, it cannot be relied on
        return False


def _normal(draw: Any, leaf: Any, *first: int) -> np.ndarray:
    """Return normal numbers [*first, *shape of the leaf] of its dtype."""
    return draw((*first, *jnp.shape(leaf)), np.float32).astype(jnp.result_type(leaf))


def _deviation(
    rule: optax.GradientTransformation,
    structure: Any,
    chosen: Sequence[bool],
    leaves: list[Array],
    normal: list[Array],
    scale: Array,
) -> Array:
    """Return the largest difference between the two runs, relative to the largest update of its leaf."""
    moves = len(normal[0])
    gradients = [(scale * g).astype(g.dtype) for g in normal]
    coordinates = [
        jnp.zeros(moves, leaf.dtype) if is_kernel else leaf for leaf, is_kernel in zip(leaves, chosen, strict=True)
    ]
    units = [jnp.eye(moves, dtype=g.dtype) if is_kernel else g for g, is_kernel in zip(gradients, chosen, strict=True)]

    def follow(point: list[Array], path: list[Array]) -> list[Array]:
        def move(carry: Any, gradient: list[Array]) -> tuple[Any, list[Array]]:
            point, state = carry
            updates, state = rule.update(jax.tree.unflatten(structure, gradient), state, point)
            return (optax.apply_updates(point, updates), state), jax.tree.leaves(updates)

        tree = jax.tree.unflatten(structure, point)
        return jax.lax.scan(move, (tree, rule.init(tree)), path)[1]

    deviations = []
    for i, (expected, given) in enumerate(zip(follow(leaves, gradients), follow(coordinates, units), strict=True)):
        found = jnp.tensordot(given, gradients[i], 1) if chosen[i] else given
        gap = jnp.abs(found - expected).max() / (jnp.abs(expected).max() + 1e-30)
        deviations.append(jnp.where(jnp.isnan(scale), jnp.where(jnp.isnan(expected).all(), 0.0, 1.0), gap))
    return jnp.stack(deviations).max()
