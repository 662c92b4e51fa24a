"""Learners: a method is an adapter and an outer field.

| learner   | adapter             | rule                  | outer field  | moves inside   |
|-----------|---------------------|-----------------------|--------------|----------------|
| maml      | unroll              | any start             | through      | all, or chosen |
| fomaml    | unroll, first order | any start             | through      | all, or chosen |
| reptile   | unroll              | a fixed start         | displacement | all            |
| anil      | unroll              | any start             | through      | the head       |
| meta_sgd  | unroll              | learned rates         | through      | all, or chosen |
| amortised | read, then unroll   | any start             | through      | what is read   |
| joint     | unroll              | any start (test only) | the game's   | all, or chosen |

Rates per layer and step (MAML++) are `maml` with the start `per_step`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from metagen_jax.adapt.amortised import Embed, amortised_path
from metagen_jax.adapt.amortised import amortised as read_support
from metagen_jax.adapt.starts import Start, fixed, per_parameter
from metagen_jax.adapt.unroll import Path, trajectory, unroll
from metagen_jax.dynamics import Dynamics, without_shaping
from metagen_jax.games import union, vector_field
from metagen_jax.meta.outer import displacement, through
from metagen_jax.types import Adapt, Examples, Field, Key, Metrics, Model, Params, Task
from metagen_jax.types import Start as AnyStart


def _no_path(meta: Params, key: Key, support: Examples, num_steps: int) -> tuple[Params, Metrics]:
    raise ValueError("this learner was made without a path, so it has no parameters step by step; give it one")


class MetaLearner(NamedTuple):
    """What is learned, how a task is adapted to, and the direction that the meta-parameters follow."""

    init: Callable[[Key], Params]
    adapt: Adapt
    field: Field  # its batch is one Task
    path: Path = _no_path  # the adapter step by step and past its trained number, for evaluation


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
    return MetaLearner(_init(model, start), adapt, _through(model, adapt, shaping), trajectory(field, start))


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
    return MetaLearner(_init(model, start), adapt, displacement(adapt), trajectory(field, start))


def anil(model: Model, start: AnyStart, num_steps: int, *, head: Sequence[str], **options: Any) -> MetaLearner:
    """Almost no inner loop: MAML in which only the head's players move inside.

    Source: Raghu, Raghu, Bengio & Vinyals, Rapid Learning or Feature Reuse?, 2020.
    """
    return maml(model, start, num_steps, players=head, **options)


def meta_sgd(
    model: Model, rate: float | dict[str, float], num_steps: int, *, players: Sequence[str], **options: Any
) -> MetaLearner:
    """MAML with one learned rate for each parameter of the moving players.

    Source: Li, Zhou, Chen & Li, Meta-SGD, 2017. Departure: the logarithm of the rate is learned, so none is negative.
    """
    return maml(model, per_parameter(rate, players), num_steps, players=players, **options)


def joint(
    model: Model,
    start: AnyStart,
    num_steps: int,
    *,
    players: Sequence[str] | None = None,
    learns: Sequence[str] | None = None,
    dynamics: Dynamics = vector_field,
) -> MetaLearner:
    """Ordinary training on all classes at once: the baseline that learns nothing about learning.

    Trained on the support and the query of each task as one batch; `start` and `num_steps` say how it is fine-tuned
    when it is evaluated ("joint training, then fine-tuning"). `learns` names the players that are trained, `players`
    those that are fine-tuned; None for all; `dynamics` is that of fine-tuning.
    """
    inner = dynamics(model.game, players)
    outer = vector_field(model.game, learns)

    def field(meta: Params, key: Key, task: Task) -> tuple[Params, Metrics]:
        return outer(meta, key, union(task.support, task.query))

    adapt = unroll(inner, start, num_steps, first_order=True)
    return MetaLearner(model.init, adapt, field, trajectory(inner, start))


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
    return MetaLearner(_init(model, start), adapt, _through(model, adapt, shaping), path)


def _through(model: Model, adapt: Adapt, shaping: bool) -> Field:
    return through(model.game if shaping else without_shaping(model.game), adapt)


def _init(model: Model, start: AnyStart) -> Callable[[Key], Params]:
    if isinstance(start, Start):
        return lambda key: start.extend(model.init(key))
    return model.init


def task_keys(key: Key, num_tasks: int) -> Key:
    """Return the keys [T] of a batch of tasks: task i has fold_in(key, i), however the batch is cut into pieces."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jax.numpy.arange(num_tasks))
