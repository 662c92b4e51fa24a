"""Whether a rule moves a kernel by fixed multiples of its gradients, tried out before it is relied on."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagen_jax.adapt.starts import Start
from metagen_jax.types import Array, Params

SCALES = (1e-9, 1.0, 1e9)
TOLERANCE = 1e-4


def is_linear(
    start: Start, params: Params, kernels: Sequence[int], groups: Sequence[tuple[Sequence[str], int]]
) -> bool:
    """Try whether the rule of a start moves kernels by the same multiples of their gradients in every entry.

    The rule is followed twice, on small stand-ins for the parameters: once with random gradients G_j, and once with
    coordinates c and unit vectors e_j in place of the kernels and their gradients. It is linear if the kernels move by
    sum_i c_i G_i, and everything else moves alike, for gradients of very different sizes.

    Args:
        start: whose rule is tried, at the values with which meta-training begins.
        params: the parameters that it moves, for their structure.
        kernels: positions of the kernels among the leaves of `params`.
        groups: for each group of players that moves together, its players and the number of its moves.

    Returns:
        Whether it is linear. A rule that cannot be followed on the stand-ins is not, and neither is one with learned
        parameters whose effect is not known (`learned`).
    """
    if not start.typical:
        return False
    small = {
        name: jax.tree.map(lambda leaf: np.full((2,) * jnp.ndim(leaf), 0.5), tree) for name, tree in params.items()
    }
    try:
        with jax.ensure_compile_time_eval(), jax.numpy_rank_promotion("allow"):
            begin, rule = start(start.extend(jax.tree.map(jnp.asarray, small)))
            if str(jax.tree.structure(begin)) != str(jax.tree.structure(params)):
                return False
            for players, moves in groups:
                deviation = jax.jit(functools.partial(_deviation, rule, begin, kernels, players, moves))
                if not all(deviation(scale) < TOLERANCE for scale in SCALES):
                    return False
            return True
    except (TypeError, ValueError, KeyError):
        return False


def _deviation(
    rule: optax.GradientTransformation,
    begin: Params,
    kernels: Sequence[int],
    players: Sequence[str],
    moves: int,
    scale: Array,
) -> Array:
    """Return the largest difference between the two runs, relative to the largest update of its leaf."""
    owners = [name for name in sorted(begin) for _ in jax.tree.leaves(begin[name])]
    mine = [index for index, name in enumerate(owners) if name in players]
    position = {index: place for place, index in enumerate(mine)}
    here = {name: begin[name] for name in players}
    leaves, structure = jax.tree.flatten(here)
    chosen = {position[index] for index in kernels if index in position}
    rng = np.random.default_rng(0)
    gradients = [scale * jnp.asarray(rng.normal(size=(moves, *jnp.shape(leaf))), leaf.dtype) for leaf in leaves]
    units = [jnp.eye(moves, dtype=leaf.dtype) for leaf in leaves]
    coordinates = [jnp.zeros(moves, leaf.dtype) if i in chosen else leaf for i, leaf in enumerate(leaves)]

    def follow(point: list[Array], path: list[Array]) -> list[Array]:
        def move(carry: Any, gradient: list[Array]) -> tuple[Any, list[Array]]:
            point, state = carry
            updates, state = rule.update(jax.tree.unflatten(structure, gradient), state, point)
            return (optax.apply_updates(point, updates), state), jax.tree.leaves(updates)

        tree = jax.tree.unflatten(structure, point)
        return jax.lax.scan(move, (tree, rule.init(tree)), path)[1]

    whole = follow(leaves, gradients)
    reduced = follow(coordinates, [units[i] if i in chosen else g for i, g in enumerate(gradients)])
    deviations = []
    for i, (expected, given) in enumerate(zip(whole, reduced, strict=True)):
        found = jnp.tensordot(given, gradients[i], 1) if i in chosen else given
        deviations.append(jnp.abs(found - expected).max() / (jnp.abs(expected).max() + 1e-30))
    return jnp.stack(deviations).max()
