"""Checks that an inner rule can be differentiated, made before anything is traced."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax


def check_rate(rate: float, name: str) -> float:
    """Return the rate, or raise `ValueError` when it is not a positive finite number."""
    if not np.isfinite(rate) or rate <= 0:
        raise ValueError(f"the inner rate of {name} must be a positive finite number, got {rate}")
    return float(rate)


def check_differentiable(rule: optax.GradientTransformation, players: Sequence[str] = ("probe",)) -> bool:
    """Refuse a rule whose update has no finite derivative where one entry of the gradient is exactly zero.

    Such entries are ordinary (a border pixel that is never inked), and one is enough to make the whole meta-gradient
    NaN. The rule is tried on a gradient of two entries for each player, one of them zero, for two steps.

    Args:
        rule: any optax transformation.
        players: whose parameters it is tried on; a rule that treats players differently knows only its own.

    Returns:
        Whether the rule could be tried on these players.

    Raises:
        ValueError: it was tried and is not safe, with the reason and the remedy.

    Example:
        >>> check_differentiable(optax.sgd(0.1))
        True
        >>> check_differentiable(optax.adam(0.1, eps_root=1e-8))
        True
    """
    params = {player: jnp.array([0.5, -0.5]) for player in players}
    try:
        rule.init(params)
    except (KeyError, TypeError, ValueError):
        return False

    def moved(gradient: jax.Array) -> dict[str, jax.Array]:
        state, point = rule.init(params), params
        for _ in range(2):
            updates, state = rule.update(dict.fromkeys(params, gradient), state, point)
            point = optax.apply_updates(point, updates)
        return point

    derivative = jax.jacrev(moved)(jnp.array([0.0, 1.0]))
    if not all(np.isfinite(leaf).all() for leaf in derivative.values()):
        raise ValueError(
            "this inner rule cannot be differentiated where an entry of the gradient is exactly zero: the "
            "meta-gradient would be NaN in every parameter. Adam does this with eps_root=0 (the square root of a zero "
            "second moment): give it eps_root=1e-8, or use optax.sgd, or a first-order learner (first_order=True)"
        )
    return True
