"""Starts: where an inner loop begins and the rule that it follows, as functions of the meta-parameters.

A start reads whatever it needs from the meta-parameters (learned rates, the parameters of a learned rule), and hands
on the rest as the point where the inner loop begins. What it needs, `extend` adds when meta-training begins.
Rates are stored as logarithms, so that learning cannot make one negative and a change of one size means the same
factor for all of them. (The sources learn the rate itself.)
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metagen_jax.adapt.safety import check_rate
from metagen_jax.types import Array, ArrayTree, Params

LOG_RATE = "log_rate"


@dataclasses.dataclass(frozen=True, eq=False)
class Start:
    """A start with what meta-training needs to know about it. Calling it is calling `begin`."""

    begin: Callable[[Params], tuple[Params, optax.GradientTransformation]]  # meta -> (params, rule)
    extend: Callable[[Params], Params]  # fresh model parameters -> meta-parameters
    rules: tuple[optax.GradientTransformation, ...]  # the fixed rules in it, each checked before it is differentiated
    learns: bool = False  # whether it adds players of its own to the meta-parameters
    typical: bool = False  # whether the rule at the initial meta-parameters is of the same kind as at any others

    def __call__(self, meta: Params, /) -> tuple[Params, optax.GradientTransformation]:
        """Return `begin(meta)`."""
        return self.begin(meta)


def fixed(optimizer: optax.GradientTransformation) -> Start:
    """Begin at the meta-parameters and follow one optax rule.

    Example:
        >>> params, rule = fixed(optax.sgd(0.1))({"model": jnp.ones(2)})
        >>> sorted(params)
        ['model']
    """
    return Start(lambda meta: (meta, optimizer), lambda params: params, (optimizer,), typical=True)


def per_parameter(
    rate: float | dict[str, float], players: Sequence[str], *, direction: optax.GradientTransformation | None = None
) -> Start:
    """Learn one rate for each parameter of the moving players.

        phi <- phi - exp(a) * direction(gradient),   a of the shape of phi

    Args:
        rate: the initial rate, or one for each player.
        players: those that move; `"<player>/log_rate"` joins the meta-parameters for each.
        direction: an optax rule before the rate (momentum, say); the gradient itself when left out.

    Raises:
        ValueError: a rate that is not positive and finite.

    Source: Li, Zhou, Chen & Li, Meta-SGD: Learning to Learn Quickly for Few-Shot Learning, 2017.
    """
    return _learned_rates(rate, players, direction, jnp.full_like, lambda log_rate, count: log_rate)


def per_step(
    num_steps: int,
    rate: float | dict[str, float],
    players: Sequence[str],
    *,
    direction: optax.GradientTransformation | None = None,
    elementwise: bool = False,
) -> Start:
    """Learn one rate for each parameter tensor ("layer") and inner step; later steps follow the last rate.

        phi_{k+1} = phi_k - exp(a_k) * direction(gradient_k),   a of shape [num_steps] for each tensor

    Args:
        num_steps: K, how many steps get a rate of their own.
        rate: the initial rate, or one for each player.
        players: those that move; `"<player>/log_rate"` joins the meta-parameters for each.
        direction: an optax rule before the rate; the gradient itself when left out.
        elementwise: one rate for each element of a tensor instead, a of shape [num_steps, *tensor].

    Raises:
        ValueError: num_steps below one, or a rate that is not positive and finite.

    Source: Antoniou, Edwards & Storkey, How to Train Your MAML, 2019, section 4.
    """
    if num_steps < 1:
        raise ValueError(f"rates per step need at least one step, got num_steps={num_steps}")
    return _learned_rates(
        rate,
        players,
        direction,
        lambda leaf, value: jnp.full((num_steps, *(leaf.shape if elementwise else ())), value, leaf.dtype),
        lambda log_rate, count: log_rate[jnp.minimum(count, num_steps - 1)],
    )


def reset(values: Params, optimizer: optax.GradientTransformation) -> Start:
    """Begin with some players at fixed values for every task (a context vector at zero, as in CAVIA).

    They need not be among the meta-parameters: nothing about where they begin is learned.

    Args:
        values: player -> where it begins, {"context": jnp.zeros(8)}.
        optimizer: the rule.

    Source: Zintgraf, Shiarlis, Kurin, Hofmann & Whiteson, Fast Context Adaptation via Meta-Learning, 2019.
    """

    def extend(params: Params) -> Params:
        return {name: tree for name, tree in params.items() if name not in values}

    return Start(lambda meta: ({**meta, **values}, optimizer), extend, (optimizer,), typical=True)


def learned(
    rule: Callable[[ArrayTree], optax.GradientTransformation], initial: ArrayTree = (), *, player: str = "rule"
) -> Start:
    """Follow a rule with parameters of its own, one more player of the outer game.

    Args:
        rule: parameters -> optax rule.
        initial: the parameters that meta-training begins with.
        player: the name under which the meta-parameters hold them.
    """

    def begin(meta: Params) -> tuple[Params, optax.GradientTransformation]:
        if player not in meta:
            raise ValueError(f"the learned rule reads its parameters from player {player!r}, but meta has {list(meta)}")
        return {name: tree for name, tree in meta.items() if name != player}, rule(meta[player])

    return Start(begin, lambda params: {**params, player: initial}, (), learns=True)


def _learned_rates(
    rate: float | dict[str, float],
    players: Sequence[str],
    direction: optax.GradientTransformation | None,
    fill: Callable[[Array, Any], Array],
    at: Callable[[Array, Array], Array],
) -> Start:
    owners = {f"{player}/{LOG_RATE}": player for player in players}
    rates = {player: check_rate(rate[player] if isinstance(rate, dict) else rate, player) for player in players}

    def extend(params: Params) -> Params:
        missing = [player for player in players if player not in params]
        if missing:
            raise ValueError(f"rates were asked for {missing}, but the model's players are {sorted(params)}")
        logs = {
            name: jax.tree.map(lambda leaf, log=jnp.log(rates[player]): fill(leaf, log), params[player])
            for name, player in owners.items()
        }
        return {**params, **logs}

    def begin(meta: Params) -> tuple[Params, optax.GradientTransformation]:
        missing = [name for name in owners if name not in meta]
        if missing:
            raise ValueError(f"expected learned rates {missing} in the meta-parameters, got {sorted(meta)}; use extend")
        log_rates = {player: meta[name] for name, player in owners.items()}
        params = {name: tree for name, tree in meta.items() if name not in owners}
        return params, optax.chain(direction or optax.identity(), _descend(log_rates, at))

    return Start(begin, extend, () if direction is None else (direction,), learns=True, typical=True)


def _descend(log_rates: Params, at: Callable[[Array, Array], Array]) -> optax.GradientTransformation:
    def init(params: Params) -> Array:
        del params
        return jnp.zeros((), jnp.int32)

    def update(updates: Params, count: Array, params: Params | None = None) -> tuple[Params, Array]:
        del params
        chosen = {player: log_rates[player] for player in updates}
        return jax.tree.map(lambda u, a: -jnp.exp(at(a, count)) * u, updates, chosen), count + 1

    return optax.GradientTransformation(init, update)
