"""Meta-gradients of shared kernels, one matrix product for each.

An inner loop of K steps meets a kernel that its tasks share in many products, x_i W and d_i W^T, in every step and on
the query. Differentiated one by one, each makes a gradient of the size of the kernel, and they are added up; gathered,

    dL/dW = sum_i x_i^T (dL/dy_i) + (dL/dz_i)^T d_i = [x_1; x_2; ...]^T [dL/dy_1; dL/dy_2; ...],

it is one product that contracts over all tasks and steps, and a kernel's worth of memory is written once. A kernel that
enters a loop (the scanned steps of the plain form) or is met otherwise is differentiated as usual.
"""

from typing import Any

import jax
import jax.numpy as jnp

from metagen_jax.adapt.products import Dot, Use, is_matrix, owners, run, taps, trace, uses_of
from metagen_jax.games import GradientField, one_by_one
from metagen_jax.types import Array, Field, Key, Metrics, Params


def gathered(field: GradientField) -> Field:
    """Return the field of the same game, in which kernels that are met in several matrix products are gathered."""

    def directions(params: Params, key: Key, batch: Any) -> tuple[Params, Metrics]:
        groups: list[list[str]] = []

        def scores(*arguments: Any) -> tuple[list[Array], Metrics]:
            groups[:], losses, metrics = field.scores(*arguments)
            return losses, metrics

        arguments = (params, key, batch)
        program, leaves = trace(scores, *arguments), jax.tree.leaves(arguments)
        own, structure = jax.tree.flatten(params)
        owner = owners(params)
        players = {name for group in groups for name in group}
        moving = [index for index, name in enumerate(owner) if name in players]
        candidates = [index for index in moving if is_matrix(own[index])]
        found, asked = uses_of(program, leaves, candidates)
        uses = {i: [use for use in found if use.kernel == i and not use.stopped] for i in candidates if i not in asked}
        uses = {index: several for index, several in uses.items() if len(several) > 1}
        if not uses:
            return field(params, key, batch)

        def values(given: tuple[dict[int, Array], dict[int, list[Array]]]) -> tuple[list[Array], Any]:
            free, zeros = given
            inputs: dict[int, list[Array]] = {index: [] for index in zeros}

            def product(use: Use, x: Array, dot: Dot) -> Array:
                kernel = jax.lax.stop_gradient(own[use.kernel]) if use.stopped else own[use.kernel]
                made = dot(x, kernel.T if use.transposed else kernel)
                if use.stopped:
                    return made
                inputs[use.kernel].append(x)
                return made + zeros[use.kernel][len(inputs[use.kernel]) - 1].astype(made.dtype)

            current = [free.get(index, leaf) for index, leaf in enumerate(leaves)]
            losses, metrics = run(program, current, tuple(uses), product, lambda index: own[index])
            return losses, (metrics, inputs)

        free = {index: own[index] for index in moving if index not in uses}
        zeros = {index: taps(several, own[index]) for index, several in uses.items()}
        losses, pull_back, (metrics, inputs) = jax.vjp(values, (free, zeros), has_aux=True)
        found_leaves: list[Any] = [None] * len(own)
        for group, (of_free, of_products) in zip(groups, one_by_one(pull_back, losses), strict=True):
            for index in moving:
                if owner[index] in group:
                    found_leaves[index] = (
                        _product(uses[index], inputs[index], of_products[index], own[index].dtype)
                        if index in uses
                        else of_free[index]
                    )
        tree = jax.tree.unflatten(structure, found_leaves)
        return {name: tree[name] for group in groups for name in group}, jax.lax.stop_gradient(metrics)

    return directions


def _product(uses: list[Use], given: list[Array], gradients: list[Array], dtype: Any) -> Array:
    """Return the gradient [in, out] of a kernel from what it was given and the gradients of what was made."""
    pairs = [(d, x) if use.transposed else (x, d) for use, x, d in zip(uses, given, gradients, strict=True)]
    left, right = (jnp.concatenate([pair[side].astype(dtype) for pair in pairs]) for side in (0, 1))
    return jnp.matmul(left.T, right, precision=uses[0].precision)
