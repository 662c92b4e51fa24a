"""A support as a memory that is read by similarity: one row for each example, and one row for having seen none.

    row m:  key k_m [D], value v_m [V], weight w_m
    r(q) = sum_m a_m v_m,   a_m = w_m exp(q . k_m / sqrt(D)) / sum_i w_i exp(q . k_i / sqrt(D))

The pseudo-input is a learned row of weight one beside those of the support. It gives a query that resembles nothing in
the support something else to look at, it lets one example count for less than all, and it is all there is to read where
there is no support. Without it, one example is read whatever the query is, and nothing at all is read as zero.

A weight says how often a row is there, and is data: no gradient passes through it, so that gradient steps that move a
memory move its keys and values, and never fill rows that are padding. The order of the rows is of no consequence.

Sources: Vinyals et al., Matching Networks for One Shot Learning, 2016 (reading by similarity); Bartunov & Vetrov,
Few-shot Generative Modelling with Generative Matching Networks, 2018 (the pseudo-input).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.models.set_encoders import masked_softmax
from metagen_jax.types import Array, ArrayTree, Examples


class Rows(NamedTuple):
    """All rows that can be read: the pseudo-input first, where there is one."""

    keys: Array  # [M, D]
    values: Array  # [M, V]
    weight: Array  # [M], 0 marks padding


def init_pseudo(num_keys: int, num_values: int) -> ArrayTree:
    """Return the pseudo-input as learning finds it, as alike to every query as to any other, and saying nothing."""
    return {"key": jnp.zeros(num_keys), "value": jnp.zeros(num_values)}


def remember(encode: Callable[[Array], Array], num_keys: int, support: Examples) -> ArrayTree:
    """Return the memory of a support, {"keys": [M, D], "values": [M, V], "weight": [M]}, or {} if M = 0.

    Args:
        encode: x [M, *event] -> key and value [M, D + V]. What stands in padded rows does not reach it.
        num_keys: D.
        support: M examples.
    """
    if not support.weight.shape[0]:
        return {}
    present = (support.weight > 0).reshape(-1, *[1] * (support.x.ndim - 1))
    made = encode(jnp.where(present, support.x, 0))
    return {"keys": made[:, :num_keys], "values": made[:, num_keys:], "weight": support.weight}


def rows(memory: ArrayTree, pseudo: ArrayTree | None, num_keys: int, num_values: int) -> Rows:
    """Return the rows of a memory, behind the pseudo-input if there is one; the memory {} has none."""
    if pseudo is None:
        found = Rows(jnp.zeros((0, num_keys)), jnp.zeros((0, num_values)), jnp.zeros(0))
    else:
        key, value = pseudo["key"], pseudo["value"]
        found = Rows(key[None], value[None], jnp.ones(1, value.dtype))
    if not memory:
        return found
    stored = Rows(memory["keys"], memory["values"], jax.lax.stop_gradient(memory["weight"]))
    return Rows(*(jnp.concatenate(pair) for pair in zip(found, stored, strict=True)))


def checked(made: Array, num_keys: int, num_values: int) -> Array:
    """Return what an encoder gave [N, D + V], or raise `ValueError` if it is of another size."""
    if made.shape[1:] != (num_keys + num_values,):
        raise ValueError(
            f"expected an encoder of num_keys + num_values = {num_keys + num_values} outputs, got "
            f"{list(made.shape[1:])} for each image"
        )
    return made


def similarity(queries: Array, keys: Array) -> Array:
    """Return q . k / sqrt(D) [N, M], for queries [N, D] and keys [M, D]."""
    return queries @ keys.T / keys.shape[1] ** 0.5


def read(stored: Rows, queries: Array) -> Array:
    """Return what queries [N, D] read, [N, V]: zero where there is no row at all.

    Example:
        >>> stored = Rows(jnp.zeros((2, 3)), jnp.array([[1.0], [9.0]]), jnp.array([1.0, 0.0]))
        >>> read(stored, jnp.ones((1, 3))).tolist()
        [[1.0]]
    """
    return masked_softmax(similarity(queries, stored.keys), stored.weight[None]) @ stored.values
