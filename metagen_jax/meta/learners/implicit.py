"""The learner whose inner loop is a proximal problem, solved and differentiated as a solution."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import optax

from metagen_jax.adapt.implicit import LOG_STRENGTH, Solver, implicit, proximal_path
from metagen_jax.games import vector_field
from metagen_jax.meta.learners.record import MetaLearner, query_field
from metagen_jax.types import Key, Model, Params


def imaml(
    model: Model,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    strength: float = 1.0,
    players: Sequence[str] | None = None,
    learn_strength: bool = False,
    solver: Solver = "auto",
    iterations: int = 20,
    tolerance: float = 1e-6,
    shaping: bool = True,
) -> MetaLearner:
    """Implicit MAML: adapt by solving F(phi, S) + strength (phi - theta) = 0, with no gradient through the steps.

        d L(phi, Q) / d theta = strength (H + strength I)^-1 grad L(phi, Q),   H the Hessian of L(phi, S)

    The path for evaluation is the descent on the proximal problem, of as many steps as asked for.

    Args:
        model: init, game and sample.
        optimizer: the rule of the inner loop, any optax rule: `optax.sgd(0.1, momentum=0.9)`.
        num_steps: K, enough of them to converge; watch `support/residual` among the metrics.
        strength: of the proximal term, or what a learned one begins with.
        players: those that move inside; None for all.
        learn_strength: learn its logarithm, the meta-player `"log_strength"`, which follows the sum of the losses.
        solver: as in `implicit`, and so are `iterations` and `tolerance`.
        iterations: of the solver.
        tolerance: of the solver.
        shaping: as in `maml`.

    Raises:
        ValueError: as `implicit`.

    Source: Rajeswaran, Finn, Kakade & Levine, Meta-Learning with Implicit Gradients, 2019, algorithms 1 and 2.
    """
    field = vector_field(model.game, players)
    adapt = implicit(
        field,
        optimizer,
        num_steps,
        strength=strength,
        learn_strength=learn_strength,
        solver=solver,
        iterations=iterations,
        tolerance=tolerance,
    )

    def init(key: Key) -> Params:
        params = model.init(key)
        return {**params, LOG_STRENGTH: jnp.asarray(np.log(strength), float)} if learn_strength else params

    path = proximal_path(field, optimizer, strength=strength, learn_strength=learn_strength)
    return MetaLearner(init, adapt, query_field(model, adapt, shaping), path)
