"""Games, and the fields that learning follows down.

A game scores every player on a batch; its field is each player's loss differentiated in that player's own parameters,

    F_p(params) = d L_p(params) / d params_p.

A model with one loss is a game of one player, or a cooperative game of several (body and head, weights and context).
Inner and outer loops see fields only, so nothing behind this module knows whether it trains one network or two rivals.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.types import Array, Examples, Field, Game, Key, Losses, Metrics, Params


@dataclasses.dataclass(frozen=True, eq=False)
class GradientField:
    """A field that knows its game: the same value by two routes of differentiation.

    Calling it is calling `reverse`. Both routes return directions that can be differentiated again, and metrics that
    carry no gradient.
    """

    game: Game
    players: tuple[str, ...] | None  # that move; None for all that the game scores
    groups_of: Callable[[Params, Key, Any], list[list[str]]]  # the moving players, those that share a loss together
    scores: Callable[[Params, Key, Any], tuple[list[list[str]], list[Array], Metrics]]  # those, their losses, metrics
    reverse: Field  # differentiated again in reverse mode (or forward mode)
    forward_over_reverse: Field  # differentiated again by one forward pass over the gradient: stores far less

    def __call__(self, params: Params, key: Key, batch: Any, /) -> tuple[Params, Metrics]:
        """Return `reverse(params, key, batch)`."""
        return self.reverse(params, key, batch)


def cooperative(loss: Callable[[Params, Key, Any], tuple[Array, Metrics]], players: Sequence[str] = ("model",)) -> Game:
    """Return the game in which all players share one loss.

    Args:
        loss: (params, key, batch) -> (loss [], metrics).
        players: names of the parts of `params` that may move.

    Raises:
        ValueError: no player, or one named twice.

    Example:
        >>> game = cooperative(lambda params, key, batch: (params["a"] * params["b"], {}), ("a", "b"))
        >>> game({"a": 2.0, "b": 3.0}, None, None)[0]
        {'a': 6.0, 'b': 6.0}
    """
    names = _checked(players)

    def game(params: Params, key: Key, batch: Any) -> tuple[Losses, Metrics]:
        value, metrics = loss(params, key, batch)
        return dict.fromkeys(names, value), metrics

    return game


def vector_field(game: Game, players: Sequence[str] | None = None) -> GradientField:
    """Differentiate each player's loss in that player's own parameters.

    Players that share a loss (the same array) share one backward pass, and the forward pass is shared by all.

    Args:
        game: (params, key, batch) -> ({player: loss []}, metrics).
        players: those that move; None for every player that the game scores. The others stay where they are, and
            the field has no entry for them.

    Returns:
        A field: (params, key, batch) -> ({player: tree like params[player]}, metrics). The metrics are the game's and
        the losses of those that move: `loss` in a game of one loss, otherwise `loss/<player>` for each.

    Raises:
        ValueError: a name given twice; when called, a player that the game does not score or that has no parameters.

    Example:
        >>> field = vector_field(cooperative(lambda params, key, batch: (params["x"] ** 2, {}), ("x",)))
        >>> float(field({"x": jnp.array(3.0)}, None, None)[0]["x"])
        6.0
    """
    chosen = None if players is None else _checked(players)

    def movers(params: Params, losses: Losses) -> tuple[str, ...]:
        names = tuple(name for name in losses if name in params) if chosen is None else chosen
        missing = [name for name in names if name not in losses or name not in params]
        if missing or not names:
            raise ValueError(
                f"the field should move {list(names) or 'some player'}, but the game scores {sorted(losses)} and the "
                f"parameters have {sorted(params)}; choose among those that occur in both"
            )
        return names

    def grouped(params: Params, losses: Losses) -> list[list[str]]:
        groups: dict[int, list[str]] = {}
        for name in movers(params, losses):
            groups.setdefault(id(losses[name]), []).append(name)
        return list(groups.values())

    def groups_of(params: Params, key: Key, batch: Any) -> list[list[str]]:
        groups: list[list[str]] = []

        def record(*arguments: Any) -> None:
            groups[:] = grouped(params, game(*arguments)[0])

        jax.eval_shape(record, params, key, batch)
        return groups

    def scores(params: Params, key: Key, batch: Any) -> tuple[list[list[str]], list[Array], Metrics]:
        losses, metrics = game(params, key, batch)
        groups = grouped(params, losses)
        values = [losses[group[0]] for group in groups]
        alone = len({id(loss) for loss in losses.values()}) == 1
        names = ["loss" if alone else f"loss/{group[0]}" for group in groups]
        return groups, values, {**metrics, **dict(zip(names, values, strict=True))}

    def reverse(params: Params, key: Key, batch: Any) -> tuple[Params, Metrics]:
        groups: list[list[str]] = []

        def values(candidates: Params) -> tuple[list[Array], Metrics]:
            groups[:], losses, metrics = scores({**params, **candidates}, key, batch)
            return losses, metrics

        candidates = params if chosen is None else {name: params[name] for name in chosen if name in params}
        losses, pull_back, metrics = jax.vjp(values, candidates, has_aux=True)
        directions: Params = {}
        for group, gradient in zip(groups, one_by_one(pull_back, losses), strict=True):
            directions |= {name: gradient[name] for name in group}
        return directions, jax.lax.stop_gradient(metrics)

    def forward(params: Params, key: Key, batch: Any) -> tuple[tuple[Params, Metrics], tuple[Params, Key, Any]]:
        return reverse(params, key, batch), (params, key, batch)

    def backward(saved: tuple[Params, Key, Any], cotangents: tuple[Params, Metrics]) -> tuple[Any, Any, Any]:
        # v^T dF/dx = sum over losses of d/dx <v_p, dL/dparams_p>, which by the symmetry of second derivatives is the
        # derivative of dL/dx along v_p. Here x is every float that the field was given, not only what moves: without
        # the mixed term, gradients of whatever else the loss depends on would be silently wrong.
        params, key, batch = saved = _cloned(saved)  # the same noise once more, on purpose
        along, _ = cotangents
        floats, rebuild = _floats(saved)
        total = [jnp.zeros_like(leaf) for leaf in floats]
        for group in groups_of(*saved):

            def gradient(leaves: list[Array], name: str = group[0]) -> list[Array]:
                return jax.grad(lambda leaves: game(*rebuild(leaves))[0][name])(leaves)

            replaced, _ = _floats(({**params, **{name: along[name] for name in group}}, key, batch))
            direction = [jnp.zeros_like(a) if a is b else b for a, b in zip(floats, replaced, strict=True)]
            _, change = jax.jvp(gradient, (floats,), (direction,))
            total = [a + b for a, b in zip(total, change, strict=True)]
        return _cotangent(saved, total)

    mixed = jax.custom_vjp(reverse)
    mixed.defvjp(forward, backward)
    return GradientField(game, chosen, groups_of, scores, reverse, mixed)


def one_by_one(pull_back: Callable[[list[Array]], tuple[Any]], losses: list[Array]) -> list[Any]:
    """Return the gradient of each loss, given the function that pulls cotangents of all of them back."""
    one_hot = [[jnp.full_like(loss, float(a == b)) for b, loss in enumerate(losses)] for a in range(len(losses))]
    return [pull_back(cotangents)[0] for cotangents in one_hot]


def union(support: Examples, query: Examples) -> Examples:
    """Return one set that holds both, [N_support + N_query] rows."""
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), support, query)


def _checked(players: Sequence[str]) -> tuple[str, ...]:
    names = tuple(players)
    if isinstance(players, str) or not names or len(set(names)) != len(names):
        raise ValueError(f"expected a sequence of different player names, got {players!r}; write ('name',) for one")
    return names


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jax.dtypes.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype, jnp.inexact)


def _cloned(tree: Any) -> Any:
    """Mark the keys in a tree as meant to be used once more."""

    def clone(leaf: Any) -> Any:
        is_key = hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.clone(leaf) if is_key else leaf

    return jax.tree.map(clone, tree)


def _floats(tree: Any) -> tuple[list[Array], Callable[[list[Array]], Any]]:
    """Return the float leaves, and the function that puts others in their place."""
    leaves, structure = jax.tree.flatten(tree)

    def rebuild(floats: list[Array]) -> Any:
        replacement = iter(floats)
        return jax.tree.unflatten(structure, [next(replacement) if _is_float(leaf) else leaf for leaf in leaves])

    return [leaf for leaf in leaves if _is_float(leaf)], rebuild


def _cotangent(tree: Any, floats: list[Array]) -> Any:
    """Return a cotangent of `tree`: these for its float leaves, the empty type for integers and keys."""
    leaves, structure = jax.tree.flatten(tree)
    given = iter(floats)
    return jax.tree.unflatten(
        structure, [next(given) if _is_float(leaf) else np.zeros(jnp.shape(leaf), jax.dtypes.float0) for leaf in leaves]
    )
