"""Kernels as a shared matrix and a few outer products, and games played with them.

    W = B + L^T diag(s) R,   x W = x B + ((x L^T) diag(s)) R,   B [in, out], L [R, in], s [R], R [R, out]

Gradient descent on a dense layer makes such a kernel: every step adds the outer products of the layer's inputs and of
the loss gradients at its outputs. Over a batch of tasks B is shared, so x B is one matrix product for all of them, and
neither W nor its gradient is ever formed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from metagen_jax.adapt.products import Dot, Use, run, trace
from metagen_jax.types import Adapt, Array, ArrayTree, Examples, Game, Key, Losses, Metrics, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """The matrix base + left^T diag(scale) right, [in, out]; without a base, the second term alone."""

    base: Array | None  # [in, out]
    left: Array  # [R, in]
    scale: Array  # [R]
    right: Array  # [R, out]

    def dense(self) -> Array:
        """Return the matrix itself."""
        change = jnp.matmul((self.left * self.scale[:, None]).T, self.right, precision="highest")
        return change if self.base is None else (self.base + change).astype(self.base.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that can leave kernels factored: `compact` does, calling it returns all of them as arrays."""

    compact: Adapt
    first_order: bool = False  # whether no gradient passes through its steps

    def __call__(self, meta: Params, key: Key, support: Examples, /) -> tuple[Params, Metrics]:
        """Return (params, trace) with every kernel an array."""
        params, trace = self.compact(meta, key, support)
        return dense(params), trace


def compact(adapt: Adapt) -> Adapt:
    """Return the adapter that may leave kernels factored, or the same one if it never does."""
    return adapt.compact if isinstance(adapt, Adapter) else adapt


def is_factored(leaf: Any) -> bool:
    """Whether a leaf of a tree is a factored kernel."""
    return isinstance(leaf, Factored)


def dense(tree: ArrayTree) -> ArrayTree:
    """Return the tree with every kernel an array."""
    return jax.tree.map(lambda leaf: leaf.dense() if is_factored(leaf) else leaf, tree, is_leaf=is_factored)


def multiply(kernel: Array | Factored, use: Use, x: Array, dot: Dot, shared: Array | None = None) -> Array:
    """Return x W, or x W^T where the use is transposed, for a matrix of rows x; `shared` is that of the base alone."""
    kernel = jax.lax.stop_gradient(kernel) if use.stopped else kernel
    base = kernel.base if isinstance(kernel, Factored) else kernel
    if shared is None and base is not None:
        shared = dot(x, base.T if use.transposed else base)
    if not isinstance(kernel, Factored):
        assert shared is not None  # only a factored kernel may lack a base
        return shared
    first, second = (kernel.right, kernel.left) if use.transposed else (kernel.left, kernel.right)
    change = dot(dot(x, first.T) * kernel.scale[None], second)
    return change if shared is None else shared + change


def play(game: Game, params: Params, key: Key, batch: Any) -> tuple[Losses, Metrics]:
    """Return game(params, key, batch) for parameters some of which are factored kernels.

    Losses that are one array in the game are one array in the result.
    """
    leaves, structure = jax.tree.flatten((params, key, batch), is_leaf=is_factored)
    factors = tuple(index for index, leaf in enumerate(leaves) if is_factored(leaf))
    if not factors:
        return game(params, key, batch)
    shared: dict[str, int] = {}

    def played(*plain: Any) -> tuple[list[Array], Metrics]:
        losses, metrics = game(*jax.tree.unflatten(structure, plain))
        distinct = list({id(loss): loss for loss in losses.values()}.values())
        positions = {id(loss): position for position, loss in enumerate(distinct)}
        shared.update({name: positions[id(loss)] for name, loss in losses.items()})
        return distinct, metrics

    program = trace(played, *[leaf.base if is_factored(leaf) else leaf for leaf in leaves])
    losses, metrics = run(
        program,
        leaves,
        factors,
        lambda use, x, dot: multiply(leaves[use.kernel], use, x, dot),
        lambda index: leaves[index].dense(),
    )
    return {name: losses[position] for name, position in shared.items()}, metrics
