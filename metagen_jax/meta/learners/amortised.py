"""Learners that read the support set, and may go on by gradient steps."""

from collections.abc import Sequence
from typing import Any

import optax

from metagen_jax.adapt.amortised import Embed, amortised_path
from metagen_jax.adapt.amortised import amortised as read_support
from metagen_jax.adapt.starts import fixed
from metagen_jax.adapt.unroll import trajectory, unroll
from metagen_jax.dynamics import Dynamics
from metagen_jax.games import vector_field
from metagen_jax.meta.learners.record import MetaLearner, extended_init, query_field
from metagen_jax.types import Model
from metagen_jax.types import Start as AnyStart


def amortised(
    model: Model,
    embed: Embed,
    start: AnyStart | None = None,
    num_steps: int = 0,
    *,
    players: Sequence[str] | None = None,
    dynamics: Dynamics = vector_field,
    shaping: bool = True,
    **options: Any,
) -> MetaLearner:
    """Read the support set with a network that is meta-trained, then take `num_steps` gradient steps from there.

    Args:
        model: init, game and sample.
        embed: (meta, support) -> the players that the support determines, `Gan.embed` for instance.
        start: of the gradient steps, as in `maml`; None where there are none.
        num_steps: K; zero for no gradient step.
        players: those that the gradient steps move; None for all.
        dynamics: how they move, as in `maml`.
        shaping: as in `maml`.
        **options: of `unroll`.

    Raises:
        ValueError: gradient steps without a start.

    Source: Edwards & Storkey, Towards a Neural Statistician, 2017.
    """
    if start is None and num_steps:
        raise ValueError(f"{num_steps} gradient steps need a start: fixed(optax.sgd(0.1)), per_step(...) or the like")
    start = fixed(optax.set_to_zero()) if start is None else start
    field = dynamics(model.game, players)
    adapt = read_support(embed, unroll(field, start, num_steps, **options))
    path = amortised_path(embed, trajectory(field, start))
    return MetaLearner(extended_init(model, start), adapt, query_field(model, adapt, shaping), path)
