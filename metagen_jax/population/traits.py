"""What members of a population can differ in, as traced numbers: rates, update rules, the order of the meta-gradient.

    rule     u = r sum_i s_i u_i(g),   s a share of each rule, one-hot to choose one
    order    d phi_{k+1} / d phi_k = I - r (c H),   c = 0 first order, c = 1 second order, between them a mixture

Factories that check numbers cannot take traced ones; those here can. Nothing of it costs a choice: all rules are
computed (their states are kept, one gradient is shared), and second derivatives are made also where c is zero. Widths
are in `metagen_jax.population.widths`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metagen_jax.adapt.starts import Start
from metagen_jax.types import Array, Field, Key, Metrics, Params


def following(rule: optax.GradientTransformation, rules: Sequence[optax.GradientTransformation] = ()) -> Start:
    """Begin at the meta-parameters and follow a rule whose numbers are traced: `fixed`, without trying it.

    Args:
        rule: `optax.sgd(traits["rate"])`, or one of `mixture`. It is never taken in the dual form.
        rules: rules of plain numbers that stand for it, tried as `fixed` tries its own before they are differentiated.

    Example:
        >>> def moved(rate):
        ...     params, rule = following(optax.sgd(rate))({"model": jnp.ones(())})
        ...     return rule.update({"model": jnp.array(2.0)}, rule.init(params))[0]["model"]
        >>> jax.vmap(moved)(jnp.array([0.5, 0.25])).tolist()
        [-1.0, -0.5]
    """
    return Start(lambda meta: (meta, rule), lambda params: params, tuple(rules))


def mixture(
    rules: Sequence[optax.GradientTransformation], shares: Array, rate: Array | float
) -> optax.GradientTransformation:
    """Return the rule that takes `rate` times the shares of several rules' updates.

    Args:
        rules: of plain numbers, at rate one: `optax.sgd(1.0)`, `optax.sgd(1.0, momentum=0.9)`,
            `optax.adam(1.0, eps_root=1e-8)`. All of them are computed, and their states kept.
        shares: [R], traced or not; one-hot chooses a rule. A rule of share zero still has to be finite, also its
            derivative.
        rate: [], traced or not.

    Raises:
        ValueError: no rule, or another number of shares.

    Example:
        >>> rule = mixture((optax.sgd(1.0), optax.sign_sgd(1.0)), jnp.array([0.0, 1.0]), 0.5)
        >>> rule.update({"model": jnp.array(-3.0)}, rule.init({"model": jnp.array(0.0)}))[0]["model"].tolist()
        0.5
    """
    if not rules or jnp.shape(shares) != (len(rules),):
        raise ValueError(f"expected a share for each of at least one rule, got {len(rules)} and {jnp.shape(shares)}")

    def init(params: Params) -> Any:
        return tuple(rule.init(params) for rule in rules)

    def update(updates: Params, states: Any, params: Params | None = None) -> tuple[Params, Any]:
        made, after = zip(
            *(rule.update(updates, state, params) for rule, state in zip(rules, states, strict=True)), strict=True
        )
        factors = [rate * shares[index] for index in range(len(rules))]
        moved = jax.tree.map(lambda *leaves: sum(f * leaf for f, leaf in zip(factors, leaves, strict=True)), *made)
        return moved, after

    return optax.GradientTransformation(init, update)


def of_order(field: Field, share: Array | float) -> Field:
    """Return the field with a share of its derivatives: the same direction F, d F replaced by share d F.

        F' = stop_gradient(F) + share (F - stop_gradient(F))

    Args:
        field: of an inner loop, `vector_field(game, players)`.
        share: [] in [0, 1], traced or not. Zero is first order, as `unroll(first_order=True)`; one is second order.

    Returns:
        A field, for the `dynamics` of a learner: `maml(..., dynamics=lambda game, players: of_order(vector_field(game,
        players), traits["order"]))`. It no longer knows its game, so there is no dual form and no mixed mode.
    """

    def directed(params: Params, key: Key, batch: Any) -> tuple[Params, Metrics]:
        direction, metrics = field(params, key, batch)
        constant = jax.lax.stop_gradient(direction)
        return jax.tree.map(lambda c, d: c + share * (d - c), constant, direction), metrics

    return directed
