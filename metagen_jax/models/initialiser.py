"""A learned initialiser: where a task's inner loop begins is a function of its support.

    phi_0 = theta + h(e(S)),   e(S) = sum_n w_n g(x_n) / sum_n w_n   [E]

g is a network, e its mean over the examples, which their order does not change, and h is linear and zero at first, so
that learning begins at MAML. h is one map for each leaf of the chosen players,

    full:      h(e) = sum_i e_i M_i                  M [E, *leaf]
    low rank:  h(e) = U diag(e C) V^T                U [in, r], C [E, r], V [out, r]; for leaves of two or more axes

the last axis of a leaf being `out` and the others together `in`.

Sources: Rusu et al., Meta-Learning with Latent Embedding Optimization, 2019; Ha, Dai & Le, HyperNetworks, 2017;
Zaheer et al., Deep Sets, 2017 (e).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.models.networks import Network
from metagen_jax.types import Array, ArrayTree, Examples, Key, Model, Params

INITIALISER = "initialiser"


class Initialised(NamedTuple):
    """A model with an initialiser among its players, and what that reads off a support."""

    model: Model
    embed: Callable[[Params, Examples], Params]  # (meta, support) -> {player: phi_0 of the chosen players}


def initialiser(
    encoder: Network,
    num_features: int,
    *,
    players: Sequence[str],
    num_classes: int = 0,
    rank: int | None = None,
    name: str = INITIALISER,
) -> Callable[[Model], Initialised]:
    """Return the function that gives a model an initialiser: what `amortised(model, embed, start, num_steps)` takes.

    The new player is one that the game does not score: gradient steps leave it, and the outer loop moves it down the
    sum of the losses, or down that of its owner if its name is "owner/initialiser", as rivals want: one for each side.

    Args:
        encoder: g, [N, *event] -> [N, num_features]; with `num_classes` it sees [N, size of an event + num_classes].
        num_features: E.
        players: whose parameters are initialised.
        num_classes: C, to join the one-hot label to each flattened example; 0 for none. Examples without a label
            are joined by zeros.
        rank: r, of kernels; None for a full map, of E times the numbers of the players.
        name: of the new player. Its parameters are `encoder` and `maps`.

    Returns:
        model -> (model, embed). An empty support is as one of which e is zero.

    Raises:
        ValueError: sizes out of range, no player; for a model, players that it does not have, or the name taken.

    Source: Rusu et al., 2019, section 2.3; Ha, Dai & Le, 2017, section 3.1. Departures: the mean of an encoder
    instead of a relation network over pairs, no noise in the code and no penalty on it; the map moves a common theta
    instead of making the parameters whole, so that it can be zero at first.

    Example:
        >>> from metagen_jax import cooperative
        >>> game = cooperative(lambda params, key, batch: (((batch.x - params["mean"]) ** 2).mean(), {}), ("mean",))
        >>> model = Model(lambda key: {"mean": jnp.zeros(())}, game, lambda params, key, num: jnp.zeros(num))
        >>> identity = Network(lambda key: {}, lambda params, x: x)
        >>> made = initialiser(identity, 1, players=("mean",))(model)
        >>> sorted(made.model.init(jax.random.key(0)))
        ['initialiser', 'mean']
    """
    chosen = tuple(players)
    if isinstance(players, str) or not chosen or num_features < 1 or num_classes < 0 or (rank is not None and rank < 1):
        raise ValueError(
            "expected a sequence of players, at least one feature, num_classes >= 0 and a rank of at least one (or "
            f"None), got players={players!r}, num_features={num_features}, num_classes={num_classes}, rank={rank}"
        )

    def of_model(model: Model) -> Initialised:
        def init(key: Key) -> Params:
            model_key, encoder_key, maps_key = jax.random.split(key, 3)
            params = model.init(model_key)
            if missing := [player for player in chosen if player not in params]:
                raise ValueError(f"asked to initialise {missing}, but the model's players are {sorted(params)}")
            if name in params:
                raise ValueError(f"the model has a player {name!r} already; give the initialiser another name")
            leaves, structure = jax.tree.flatten({player: params[player] for player in chosen})
            keys = jax.random.split(maps_key, len(leaves))
            maps = [_init_map(one, leaf, num_features, rank) for one, leaf in zip(keys, leaves, strict=True)]
            return {
                **params,
                name: {"encoder": encoder.init(encoder_key), "maps": jax.tree.unflatten(structure, maps)},
            }

        def embed(meta: Params, support: Examples) -> Params:
            code = encoded(encoder, meta[name]["encoder"], support, num_classes)
            if code.shape != (num_features,):
                raise ValueError(f"expected an encoder that makes {num_features} features, got {code.shape[0]}")

            def moved(leaf: Array, leaf_map: ArrayTree) -> Array:
                return leaf + _apply_map(leaf_map, code, leaf.shape)

            return {player: jax.tree.map(moved, meta[player], meta[name]["maps"][player]) for player in chosen}

        return Initialised(model._replace(init=init), embed)

    return of_model


def encoded(encoder: Network, params: ArrayTree, support: Examples, num_classes: int = 0) -> Array:
    """Return the weighted mean e(S) [E] of the encoded examples, zero for an empty set.

    With `num_classes`, examples are flattened and their one-hot labels joined to them.
    """
    x = support.x
    if num_classes:
        label = jax.nn.one_hot(support.label, num_classes, dtype=x.dtype)
        x = jnp.concatenate([x.reshape(x.shape[0], -1), label], axis=1)
    made, total = encoder.apply(params, x), support.weight.sum()
    return support.weight @ made / jnp.where(total > 0, total, 1.0)


def _init_map(key: Key, leaf: Array, num_features: int, rank: int | None) -> ArrayTree:
    """Return a map that is zero; where there are factors, `code` alone is zero, so that it has a gradient."""
    if rank is None or leaf.ndim < 2:
        return {"full": jnp.zeros((num_features, *leaf.shape), leaf.dtype)}
    inputs, outputs = math.prod(leaf.shape[:-1]), leaf.shape[-1]
    noise = jax.random.normal(key, (inputs + outputs, rank), leaf.dtype)
    return {
        "code": jnp.zeros((num_features, rank), leaf.dtype),
        "left": noise[:inputs] / (inputs * rank) ** 0.5,
        "right": noise[inputs:],
    }


def _apply_map(leaf_map: ArrayTree, code: Array, shape: Sequence[int]) -> Array:
    if "full" in leaf_map:
        return jnp.tensordot(code, leaf_map["full"], 1)
    return ((leaf_map["left"] * (code @ leaf_map["code"])[None]) @ leaf_map["right"].T).reshape(shape)
