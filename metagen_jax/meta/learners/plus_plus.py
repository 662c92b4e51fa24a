"""MAML++: the loss after every inner step, annealed to that of the last, and derivative orders annealed in phases."""

from collections.abc import Sequence
from typing import Any

import jax

from metagen_jax.adapt.unroll import every_step, trajectory, unroll
from metagen_jax.dynamics import Dynamics, without_shaping
from metagen_jax.games import GradientField, vector_field
from metagen_jax.meta.annealed import Annealed, over_steps, step_weights
from metagen_jax.meta.learners.record import MetaLearner, extended_init
from metagen_jax.meta.outer import through
from metagen_jax.types import Model
from metagen_jax.types import Start as AnyStart


def maml_plus_plus(
    model: Model,
    start: AnyStart,
    num_steps: int,
    *,
    multi_step_until: int,
    players: Sequence[str] | None = None,
    dynamics: Dynamics = vector_field,
    shaping: bool = True,
    **options: Any,
) -> MetaLearner:
    """MAML with the query loss after every inner step, annealed to that of the last.

        meta <- meta - b mean_t d (sum_k w_k L(phi_k(meta, S_t), Q_t)) / d meta

    with the weights of `step_weights`; after `multi_step_until` meta-steps its field is that of `maml`. The rates per
    layer and step of MAML++ are the start `per_step`.

    Derivative-order annealing is training in two phases, of the first order and then of the second. Learners of one
    model and start have meta-parameters of one form, so the state of one goes on as that of the other, with optimiser
    and number of meta-steps:

        first, then = (maml_plus_plus(..., first_order=order) for order in (True, False))
        state = train(make_step(first, ...), state, data, 1000)
        state = train(make_step(then, ...), state, data, 5000)

    Args:
        model: init, game and sample.
        start: where the inner loop begins and its rule, as in `maml`.
        num_steps: K, one at least.
        multi_step_until: the meta-steps that the annealing takes. The K losses on the query are evaluated after that
            too, all but one at weight zero: a long run is cheaper with `maml` as another phase.
        players: those that move inside; None for all.
        dynamics: as in `maml`.
        shaping: as in `maml`.
        **options: of `unroll` (first_order, inner_grad, remat, loop, form). The form is that of the last step's adapter
            alone: the losses after every step are those of the plain form. What moves is kept after every step, so
            memory grows with K, and remat saves what is between the steps only.

    Raises:
        ValueError: no inner step, or no meta-step to anneal in.

    Source: Antoniou, Edwards & Storkey, How to Train Your MAML, 2019, section 4. Departure: nothing is normalised over
    a batch, so its statistics per step have nothing to hold.
    """
    if num_steps < 1 or multi_step_until < 1:
        raise ValueError(
            f"expected num_steps >= 1 and multi_step_until >= 1, got {num_steps} and {multi_step_until}; the loss of "
            "the last step alone is that of maml"
        )
    field = dynamics(model.game, players)
    adapt = unroll(field, start, num_steps, **options)
    plain = {name: value for name, value in options.items() if name != "form"}
    moves = every_step(field, start, **{"first_order": False, **plain})
    game = model.game if shaping else without_shaping(model.game)

    def at(step: jax.Array) -> GradientField:
        return vector_field(over_steps(game, moves, adapt, num_steps, step_weights(num_steps, step / multi_step_until)))

    return MetaLearner(extended_init(model, start), adapt, Annealed(at, through(game, adapt)), trajectory(field, start))
