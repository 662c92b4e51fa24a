"""Linear systems whose matrix is known by its products only: conjugate gradients and GMRES on trees.

    A x = b,   x in span {b, A b, A^2 b, ...}

Conjugate gradients make the error smallest in the norm of A, with three trees in memory, and need A symmetric and
positive definite: of any other matrix what they return is not the solution, and nothing shows it. GMRES makes the
residual |b - A x| smallest for any A, with as many trees in memory as iterations. Both may be vmapped, and run on
devices that each have a system of their own (inside `jax.shard_map`).

Sources: Hestenes & Stiefel, Methods of Conjugate Gradients for Solving Linear Systems, 1952; Saad & Schultz, GMRES: A
Generalized Minimal Residual Algorithm for Solving Nonsymmetric Linear Systems, 1986.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import solve_triangular

from metagen_jax.sharding import differing_like
from metagen_jax.types import Array, ArrayTree

Multiply = Callable[[ArrayTree], ArrayTree]
"""x -> A x, trees of one form."""


def conjugate_gradients(multiply: Multiply, target: ArrayTree, iterations: int, tolerance: float = 0.0) -> ArrayTree:
    """Solve A x = b for a symmetric positive definite A.

    Args:
        multiply: x -> A x.
        target: b, a tree of floats.
        iterations: products at most.
        tolerance: stop where |b - A x| <= tolerance |b|.

    Example:
        >>> x = conjugate_gradients(lambda x: jnp.array([2.0, 4.0]) * x, jnp.array([2.0, 2.0]), 2)
        >>> [round(float(value), 5) for value in x]
        [1.0, 0.5]
    """
    largest = jnp.stack([jnp.abs(leaf).max(initial=0.0) for leaf in jax.tree.leaves(target)]).max()
    unit = jnp.where(largest == 0, 1.0, largest)  # no square overflows, and what is not finite comes out
    target = jax.tree.map(lambda leaf: leaf / unit, target)
    squared = optax.tree.vdot(target, target)

    def unsolved(carry: Any) -> Array:
        count, _, _, _, rest = carry
        return (count < iterations) & (rest > tolerance**2 * squared)

    def improve(carry: Any) -> Any:
        count, solution, residual, direction, rest = carry
        product = multiply(direction)
        length = rest / optax.tree.vdot(direction, product)
        solution = jax.tree.map(lambda x, p: x + length * p, solution, direction)
        residual = jax.tree.map(lambda r, product: r - length * product, residual, product)
        following = optax.tree.vdot(residual, residual)
        direction = jax.tree.map(lambda r, p: r + following / rest * p, residual, direction)
        return count + 1, solution, residual, direction, following

    begin = (0, jax.tree.map(jnp.zeros_like, target), target, target, squared)
    solution = jax.lax.while_loop(unsolved, improve, begin)[1]
    return jax.tree.map(lambda leaf: unit * leaf, solution)


def gmres(multiply: Multiply, target: ArrayTree, iterations: int) -> ArrayTree:
    """Solve A x = b for any regular A.

    Arnoldi's basis V of the Krylov space, orthogonalised twice, and A V = V' H; x = V argmin_y | |b| e_1 - H y |.

    Args:
        multiply: x -> A x.
        target: b, a tree of floats.
        iterations: products, no more than b has entries; they are all made.

    Example:
        >>> x = gmres(lambda x: jnp.array([x[1], -2.0 * x[0]]), jnp.array([1.0, 4.0]), 2)
        >>> [round(float(value), 5) for value in x]
        [-2.0, 1.0]
    """
    b, unravel = ravel_pytree(target)
    size = min(iterations, b.size)
    norm = jnp.linalg.norm(b)

    def arnoldi(basis: Array, index: Array) -> tuple[Array, Array]:
        product, _ = ravel_pytree(multiply(unravel(basis[index])))
        before = jnp.linalg.norm(product)
        column = jnp.zeros(size + 1, b.dtype)
        for _ in range(2):
            along = basis @ product
            product, column = product - along @ basis, column + along
        after = jnp.linalg.norm(product)
        alive = after > 10 * jnp.finfo(b.dtype).eps * before  # else the space is whole, and the solution in it
        basis = basis.at[index + 1].set(jnp.where(alive, product / jnp.where(alive, after, 1.0), 0.0))
        column = column.at[index + 1].set(jnp.where(alive, after, 0.0))
        # Past that point a column of the identity keeps the least-squares problem regular: its unknown is zero.
        return basis, jnp.where(before > 0, column, jnp.zeros_like(column).at[index].set(1.0))

    empty = differing_like(jnp.zeros((size + 1, b.size), b.dtype), b)
    begin = empty.at[0].set(b / jnp.where(norm > 0, norm, 1.0))
    basis, columns = jax.lax.scan(arnoldi, begin, jnp.arange(size))
    orthogonal, triangle = jnp.linalg.qr(columns.T)
    weights = solve_triangular(triangle, norm * orthogonal[0])
    return unravel(weights @ basis[:-1])
