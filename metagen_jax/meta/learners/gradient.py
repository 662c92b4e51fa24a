"""Learners whose inner loop is gradient steps and whose outer field goes through them, or is their displacement."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metagen_jax.adapt.starts import Start, per_parameter, reset
from metagen_jax.adapt.unroll import trajectory, unroll
from metagen_jax.dynamics import Dynamics
from metagen_jax.games import vector_field
from metagen_jax.meta.learners.record import MetaLearner, extended_init, query_field
from metagen_jax.meta.outer import displacement
from metagen_jax.types import Model
from metagen_jax.types import Start as AnyStart


def maml(
    model: Model,
    start: AnyStart,
    num_steps: int,
    *,
    players: Sequence[str] | None = None,
    dynamics: Dynamics = vector_field,
    shaping: bool = True,
    **options: Any,
) -> MetaLearner:
    """Model-agnostic meta-learning, second order unless `first_order=True`.

        meta <- meta - b mean_t d L(phi_K(meta, S_t), Q_t) / d meta

    Args:
        model: init, game and sample.
        start: where the inner loop begins and its rule: `fixed(optax.sgd(0.1))`, `per_step(...)`, `per_parameter(...)`.
        num_steps: K.
        players: those that move inside; None for all.
        dynamics: how they move in a step: at once (`vector_field`), in turns (`alternating`), or any function
            (game, players) -> field or fields.
        shaping: of a game with rivals, take player p's meta-gradient d L_p(phi_K(meta), Q) / d meta_p whole, through
            what its rivals have adapted to; False leaves that path out (`without_shaping`), in which a discriminator
            is rewarded for teaching the generator badly. A model of one loss does not notice.
        **options: of `unroll` (first_order, inner_grad, remat, form, loop).

    Source: Finn, Abbeel & Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, 2017.
    """
    field = dynamics(model.game, players)
    adapt = unroll(field, start, num_steps, **options)
    return MetaLearner(extended_init(model, start), adapt, query_field(model, adapt, shaping), trajectory(field, start))


def fomaml(
    model: Model,
    start: AnyStart,
    num_steps: int,
    *,
    players: Sequence[str] | None = None,
    dynamics: Dynamics = vector_field,
    **options: Any,
) -> MetaLearner:
    """First-order MAML: the meta-gradient with d phi_K / d meta taken as the identity.

    Source: Finn, Abbeel & Levine, 2017, section 5.2; Nichol, Achiam & Schulman, 2018.
    """
    return maml(model, start, num_steps, players=players, dynamics=dynamics, first_order=True, **options)


def reptile(
    model: Model, start: AnyStart, num_steps: int, *, dynamics: Dynamics = vector_field, **options: Any
) -> MetaLearner:
    """Reptile: meta <- meta + b mean_t (phi_K(meta, S_t) - meta). Everything moves, and learned rates would not learn.

    Raises:
        ValueError: a start with learned parameters, which the displacement cannot teach.

    Source: Nichol, Achiam & Schulman, On First-Order Meta-Learning Algorithms, 2018, algorithm 1.
    """
    if isinstance(start, Start) and start.learns:
        raise ValueError("Reptile's displacement cannot teach a start with learned parameters; use fixed(...)")
    field = dynamics(model.game, None)
    adapt = unroll(field, start, num_steps, first_order=True, **options)
    return MetaLearner(extended_init(model, start), adapt, displacement(adapt), trajectory(field, start))


def anil(model: Model, start: AnyStart, num_steps: int, *, head: Sequence[str], **options: Any) -> MetaLearner:
    """Almost no inner loop: MAML in which only the head's players move inside.

    Source: Raghu, Raghu, Bengio & Vinyals, Rapid Learning or Feature Reuse?, 2020.
    """
    return maml(model, start, num_steps, players=head, **options)


def boil(model: Model, start: AnyStart, num_steps: int, *, body: Sequence[str], **options: Any) -> MetaLearner:
    """Body only in the inner loop: MAML in which everything but the head moves inside.

    Source: Oh, Yoo, Kim & Yun, BOIL: Towards Representation Change for Few-Shot Learning, 2021.
    """
    return maml(model, start, num_steps, players=body, **options)


def cavia(
    model: Model,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    contexts: Sequence[str] = ("context",),
    **options: Any,
) -> MetaLearner:
    """Fast context adaptation: only context vectors move inside, from zero for every task.

        c_0 = 0,   c_{k+1} = c_k - a d L(theta, c_k; S) / d c,   theta <- theta - b mean_t d L(theta, c_K; Q) / d theta

    Args:
        model: with a context (`vae(..., context=E)`, `gan(..., context=E)`, `classifier(..., context=E)`).
        optimizer: of the inner loop; the method tolerates rates over some orders of magnitude.
        num_steps: K.
        contexts: the players that begin at zero and move; they are no meta-parameters.
        **options: of `maml`.

    Raises:
        ValueError: a context that the model does not have.

    Source: Zintgraf, Shiarlis, Kurin, Hofmann & Whiteson, Fast Context Adaptation via Meta-Learning, 2019.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    if missing := [name for name in contexts if name not in shapes]:
        raise ValueError(
            f"cavia moves the contexts {missing}, but the model's players are {sorted(shapes)}; make the model with "
            "context > 0"
        )
    zeros = {name: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[name]) for name in contexts}
    return maml(model, reset(zeros, optimizer), num_steps, players=contexts, **options)


def meta_sgd(
    model: Model, rate: float | dict[str, float], num_steps: int, *, players: Sequence[str], **options: Any
) -> MetaLearner:
    """MAML with one learned rate for each parameter of the moving players.

    Source: Li, Zhou, Chen & Li, Meta-SGD, 2017. Departure: the logarithm of the rate is learned, so none is negative.
    """
    return maml(model, per_parameter(rate, players), num_steps, players=players, **options)
