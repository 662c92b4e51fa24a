"""One student that is meta-trained on what an ensemble of teachers predicts: distillation over tasks.

    L_p(meta; S, Q) = (1 - a) L_p(phi, Q) + a t^2 mean_n KL(q_n || softmax(z_n / t)),   phi = adapt(meta, S)

with z the student's logits after it has adapted to the support, and q_n the teachers' prediction for the same query,
softmax(log p_n / t), after each of them has adapted to the same support. The factor t^2 keeps the size of gradients.
Queries without a label are learned from too, if their weight is not zero.

Teachers ride among the meta-parameters as a player that nothing moves (the outer rule has to be `holding`), so that
they are arguments of the program. It costs, beside the student's step, an adaptation and a prediction of all teachers,
without a gradient.

Source: Hinton, Vinyals & Dean, Distilling the Knowledge in a Neural Network, 2015, section 2. Departure: here both
sides adapt to a task first, and what is distilled is how to learn.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metagen_jax.games import GradientField, vector_field
from metagen_jax.meta.learners import MetaLearner
from metagen_jax.meta.outer import TaskGame
from metagen_jax.models.weighted import weighted_mean
from metagen_jax.types import Array, ArrayTree, Examples, Key, Losses, Metrics, Model, Params, Task, player_of

TEACHERS = "teachers"


def distilled(
    student: MetaLearner,
    model: Model,
    logits: Callable[[Params, Array], Array],
    teacher: Callable[[ArrayTree, Key, Task], Array],
    *,
    share: float = 0.5,
    temperature: float = 1.0,
) -> MetaLearner:
    """Return the student as a learner that also follows its teachers.

    Args:
        student: a learner of `model` whose field is the query loss through its adaptation: `maml`, `anil`,
            `amortised`, ...
        model: whose game scores the student on labels.
        logits: (params, x [N, *event]) -> [N, C] of the student, `Classifier.logits`.
        teacher: (the player `teachers`, key, task) -> log p [N, C] of the query, an `ensemble` for instance:
            `lambda teachers, key, task: mixed(teachers["traits"], teachers["meta"], key, task)`.
        share: a in [0, 1]; zero is the student alone, one learns from the teachers only.
        temperature: t; above one, small probabilities count more.

    Returns:
        A learner whose field reports, beside the game's metrics, `distillation` (the mean of KL in nats, without t^2)
        and `agreement` (share of the queries for which both would choose the same class). Begin with
        `init_state(learner, ..., meta=with_teachers(learner.init(key), teachers))`; its `adapt` and `path` take
        meta-parameters with teachers and without.

    Raises:
        ValueError: a share outside [0, 1] or a temperature that is not positive; a student whose field is none of a
            game over tasks (Reptile, joint); when called, meta-parameters without teachers.
    """
    if not isinstance(student.field, GradientField) or not isinstance(student.field.game, TaskGame):
        raise ValueError("a student learns by a field of a game over tasks; reptile, joint and the like have none")
    if not 0 <= share <= 1 or not temperature > 0:
        raise ValueError(f"expected a share in [0, 1] and a positive temperature, got {share} and {temperature}")

    def adapt(meta: Params, key: Key, support: Examples) -> tuple[Params, Metrics]:
        return student.adapt(without_teachers(meta), key, support)

    def path(meta: Params, key: Key, support: Examples, num_steps: int) -> tuple[Params, Metrics]:
        return student.path(without_teachers(meta), key, support, num_steps)

    def play(meta: Params, key: Key, task: Task) -> tuple[Losses, Metrics]:
        if TEACHERS not in meta:
            raise ValueError(f"expected a player {TEACHERS!r}, got {sorted(meta)}; begin at with_teachers(meta, ...)")
        teacher_key = jax.random.fold_in(jax.random.clone(key), 2)  # the two that split gives are the student's
        adapt_key, query_key = jax.random.split(key)
        params, trace = adapt(meta, adapt_key, task.support)
        losses, metrics = model.game(params, query_key, task.query)
        log_q = jax.lax.stop_gradient(teacher(jax.lax.stop_gradient(meta[TEACHERS]), teacher_key, task))
        made = logits(params, task.query.x)
        divergence = weighted_mean(divergences(log_q, made, temperature), task.query.weight)
        same = (log_q.argmax(1) == made.argmax(1)).astype(made.dtype)
        added = share * temperature**2 * divergence
        shared = {id(loss): (1 - share) * loss + added for loss in losses.values()}  # one loss stays one
        losses = {name: shared[id(loss)] for name, loss in losses.items()}
        more = {"distillation": divergence, "agreement": weighted_mean(same, task.query.weight)}
        followed = {name: player_of(name, losses) for name in without_teachers(meta)}
        return followed, {**metrics, **more, **{f"support/{name}": value for name, value in trace.items()}}

    return MetaLearner(student.init, adapt, vector_field(TaskGame(play, adapt), student.field.players), path)


def divergences(log_q: Array, logits: Array, temperature: float) -> Array:
    """Return KL(softmax(log_q / t) || softmax(logits / t)) of each example [N], in nats.

    Example:
        >>> found = divergences(jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.9, 0.1]])), 1.0)
        >>> round(float(found[0]), 3)
        0.511
    """
    log_q = jax.nn.log_softmax(log_q / temperature)
    log_p = jax.nn.log_softmax(logits / temperature)
    q = jnp.exp(log_q)
    return jnp.where(q > 0, q * (jnp.where(q > 0, log_q, 0.0) - log_p), 0.0).sum(1)


def with_teachers(meta: Params, teachers: ArrayTree) -> Params:
    """Return meta-parameters with the player `teachers`.

    Args:
        meta: the student's.
        teachers: whatever the teacher reads, as floats: {"meta": metas [P], "traits": traits [P]}.

    Raises:
        ValueError: leaves that are no floats, of which the step could keep no average.
    """
    others = {str(jnp.result_type(leaf)) for leaf in jax.tree.leaves(teachers)}
    others = {kind for kind in others if not jnp.issubdtype(jnp.dtype(kind), jnp.floating)}
    if others:
        raise ValueError(f"expected teachers of floats only, got leaves of {sorted(others)}; store them as floats")
    return {**meta, TEACHERS: jax.tree.map(jnp.array, teachers)}  # a copy, since states are donated


def without_teachers(meta: Params) -> Params:
    """Return meta-parameters without the player `teachers`."""
    return {name: tree for name, tree in meta.items() if name != TEACHERS}


def holding(
    optimizer: optax.GradientTransformation, players: Sequence[str] = (TEACHERS,)
) -> optax.GradientTransformation:
    """Return the outer rule that leaves some players where they are and keeps no state for them.

    A zero direction alone would not do: weight decay would still move them, and Adam keep two copies.
    """

    def labels(params: Params) -> dict[str, Any]:
        return {name: "still" if name in players else "moves" for name in params}

    return optax.partition({"moves": optimizer, "still": optax.set_to_zero()}, labels)
