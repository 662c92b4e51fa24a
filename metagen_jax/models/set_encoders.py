"""What a set of examples says, as one vector: permutation-invariant encoders.

| encoder            | e(S) of features f_n = f(x_n) and weights w_n                                                |
|--------------------|----------------------------------------------------------------------------------------------|
| `mean_pooled`      | sum_n w_n f_n / sum_n w_n                                                                    |
| `attention_pooled` | of each query q and head: sum_n a_n V f_n,  a_n = w_n exp(q . K f_n / sqrt(d)) / (their sum) |

either of them, if asked for, joined by n / (n + 1) for n = sum_n w_n, since a mean does not tell how many examples it
is of, and passed through a second network. The order of the examples does not matter, those of zero weight have no
influence, and an empty set (n = 0, or no row at all) is encoded by zeros exactly, whatever the networks' biases.

Shape letters: N examples, F features, Q queries, E numbers of the encoding.

Sources: Zaheer et al., Deep Sets, 2017 (mean, and a network after it); Lee et al., Set Transformer, 2019, section 3.2
(pooling by attention); Giannone & Winther, SCHA-VAE: Hierarchical Context Aggregation for Few-Shot Generation, 2022
(the same for generation, "learnable aggregation").
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.models.networks import Network
from metagen_jax.types import Array, ArrayTree, Key


class SetEncoder(NamedTuple):
    """A function with parameters, of a set of examples."""

    init: Callable[[Key], ArrayTree]
    apply: Callable[
        [ArrayTree, Array, Array], Array
    ]  # (params, x [N, *event], weight [N]) -> [E], zeros for no example


def mean_pooled(network: Network, *, then: Network | None = None, counted: bool = False) -> SetEncoder:
    """Return the weighted mean of a network's outputs.

    Args:
        network: f, [N, *event] -> [N, F].
        then: [1, F] -> [1, E], or [1, F + 1] -> [1, E] if counted; None for the mean itself.
        counted: whether n / (n + 1) is joined to the mean, as its last number.

    Example:
        >>> identity = Network(lambda key: {}, lambda params, x: x)
        >>> encoder = mean_pooled(identity, counted=True)
        >>> encoder.apply(encoder.init(jax.random.key(0)), jnp.array([[2.0], [4.0], [9.0]]), jnp.array([1.0, 1.0, 0.0]))
        Array([3.       , 0.6666667], dtype=float32)
    """

    def init(key: Key) -> ArrayTree:
        network_key, then_key = jax.random.split(key)
        return {"network": network.init(network_key)} | ({} if then is None else {"then": then.init(then_key)})

    def apply(params: ArrayTree, x: Array, weight: Array) -> Array:
        x, weight = _some_row(x, weight)
        total = weight.sum()
        mean = weight @ network.apply(params["network"], x) / jnp.where(total > 0, total, 1.0)
        return _finished(mean, total, counted, then, params)

    return SetEncoder(init, apply)


def attention_pooled(
    network: Network,
    width: int,
    *,
    queries: int = 1,
    heads: int = 1,
    then: Network | None = None,
    counted: bool = False,
) -> SetEncoder:
    """Return what learned queries find among the examples' features.

    Args:
        network: f, [N, *event] -> [N, width].
        width: of features, and of queries, keys and values of all heads together.
        queries: Q.
        heads: each has width / heads numbers of a query, key and value.
        then: [1, Q * width (+ 1)] -> [1, E]; None for what is found itself, query after query.
        counted: whether n / (n + 1) is joined to it, as its last number.

    Raises:
        ValueError: no query or head, or a width that the heads do not divide.

    Source: Lee et al., 2019, equations 4 to 6 and 11. Departures: what is found is not added to the query and not
    normalised, so that nothing found is zero; the feed-forward layers are `network` and `then`.

    Example:
        >>> encoder = attention_pooled(Network(lambda key: {}, lambda params, x: x), 4, queries=2, heads=2)
        >>> encoder.apply(encoder.init(jax.random.key(0)), jnp.ones((3, 4)), jnp.ones(3)).shape
        (8,)
    """
    if queries < 1 or heads < 1 or width < 1 or width % heads:
        raise ValueError(
            f"expected at least one query and a width that is a multiple of the heads, got queries={queries}, "
            f"width={width}, heads={heads}"
        )
    size = width // heads

    def init(key: Key) -> ArrayTree:
        network_key, then_key, query_key, key_key, value_key = jax.random.split(key, 5)
        params = {
            "network": network.init(network_key),
            "query": jax.random.normal(query_key, (queries, heads, size)),
            "key": jax.random.normal(key_key, (width, heads, size)) / width**0.5,
            "value": jax.random.normal(value_key, (width, heads, size)) / width**0.5,
        }
        return params | ({} if then is None else {"then": then.init(then_key)})

    def apply(params: ArrayTree, x: Array, weight: Array) -> Array:
        x, weight = _some_row(x, weight)
        features = network.apply(params["network"], x)
        keys, values = (jnp.tensordot(features, params[name], 1) for name in ("key", "value"))  # [N, heads, size]
        score = jnp.einsum("qhd,nhd->qhn", params["query"], keys) / size**0.5
        found = jnp.einsum("qhn,nhd->qhd", masked_softmax(score, weight), values)
        return _finished(found.reshape(queries * width), weight.sum(), counted, then, params)

    return SetEncoder(init, apply)


def masked_softmax(score: Array, weight: Array) -> Array:
    """Return w_n exp(score_n) / sum_m w_m exp(score_m) over the last axis, and zeros where all weights are zero.

    Gradients of every order are finite: the largest score that counts is subtracted, and of no other is an exponential
    taken.
    """
    counts = jnp.broadcast_to(weight > 0, score.shape)
    largest = jnp.where(counts, score, -jnp.inf).max(-1, keepdims=True, initial=-jnp.inf)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))  # cancels in the ratio
    share = jnp.where(counts, weight, 0.0) * jnp.exp(jnp.where(counts, score - largest, 0.0))
    total = share.sum(-1, keepdims=True)
    return share / jnp.where(total > 0, total, 1.0)


def _some_row(x: Array, weight: Array) -> tuple[Array, Array]:
    """Return a set without rows as one row of padding, which networks can take."""
    if x.shape[0]:
        return x, weight
    return jnp.zeros((1, *x.shape[1:]), x.dtype), jnp.zeros(1, weight.dtype)


def _finished(found: Array, total: Array, counted: bool, then: Network | None, params: ArrayTree) -> Array:
    if counted:
        found = jnp.concatenate([found, (total / (1 + total))[None].astype(found.dtype)])
    if then is not None:
        found = then.apply(params["then"], found[None])[0]
    return jnp.where(total > 0, found, 0.0)
