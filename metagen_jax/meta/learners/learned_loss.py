"""The learner whose inner loop follows another game than its outer one: a loss that is learned."""

from collections.abc import Sequence
from typing import Any

from metagen_jax.adapt.unroll import trajectory, unroll
from metagen_jax.dynamics import Dynamics
from metagen_jax.games import vector_field
from metagen_jax.meta.learners.record import MetaLearner, extended_init, query_field
from metagen_jax.types import Model
from metagen_jax.types import Start as AnyStart


def learned_loss(
    model: Model,
    inner: Model,
    start: AnyStart,
    num_steps: int,
    *,
    players: Sequence[str] | None = None,
    dynamics: Dynamics = vector_field,
    shaping: bool = True,
    **options: Any,
) -> MetaLearner:
    """MAML whose inner loop follows the game of `inner`, and whose outer loop that of the model.

        phi_{k+1} = phi_k - a d L_psi(phi_k, S) / d phi_k
        (theta, psi) <- (theta, psi) - b d L(phi_K, Q) / d (theta, psi)

    The inner game's own parameters, psi, are one more player of the outer game, which follows the sum of the losses.
    At first order psi learns nothing, for it is in the inner directions only.

    Args:
        model: whose game judges on the query.
        inner: whose game the inner loop plays, of the same players, and whose init gives the model's parameters and its
            own: `with_learned_loss(model, features, network)`.
        start: where the inner loop begins and its rule, as in `maml`.
        num_steps: K.
        players: those that move inside; None for all that the inner game scores.
        dynamics: as in `maml`.
        shaping: as in `maml`.
        **options: of `unroll`.

    Raises:
        ValueError: the first order.

    Source: Bechtle et al., Meta Learning via Learned Loss, 2021, algorithm 1; Reed et al., Few-shot Autoregressive
    Density Estimation, 2018. Departure: the beginning theta is learned with psi, as in MAML.
    """
    if options.get("first_order"):
        raise ValueError(
            "a learned loss is in the inner directions only, which the first order takes as constants: it would not "
            "learn; leave first_order out"
        )
    field = dynamics(inner.game, players)
    adapt = unroll(field, start, num_steps, **options)
    return MetaLearner(extended_init(inner, start), adapt, query_field(model, adapt, shaping), trajectory(field, start))
