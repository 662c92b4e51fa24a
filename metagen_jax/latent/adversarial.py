"""Learning on tasks of codes: the generator is one more player of the learner, which decodes them itself.

    losses'(meta, task of codes) = losses(meta, task of images),   x = decode(meta["task_generator"], z)

Because codes reach the learner undecoded, its loss has a gradient in them, and the query can be made as hard as a
radius allows,

    d <- P_{|d| <= r}(d + a sign(dL / dd)),   z' = z + d,   d_0 = 0,

the learner then descending the loss at z' as at any other (Danskin: no gradient goes through d). With no such step this
is training on the decoded tasks. The generator stays as it is, or learns with the learner.

Source: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, 2018 (the inner maximisation, there
in pixels); in the latent space of a task generator, ours.
"""

import jax
import jax.numpy as jnp

from metagen_jax.games import GradientField, vector_field
from metagen_jax.latent.generator import Generator, without_gradient
from metagen_jax.meta.learners import MetaLearner
from metagen_jax.meta.outer import TaskGame
from metagen_jax.types import Array, Examples, Key, Losses, Metrics, Params, Task, player_of

TASK_GENERATOR = "task_generator"
"""The player that decodes; it has no loss of its own and, where it learns, follows the sum of the losses."""


def on_codes(
    learner: MetaLearner,
    generator: Generator,
    params: Params,
    *,
    steps: int = 0,
    rate: float = 0.5,
    radius: float = 1.0,
    learns: bool = False,
) -> MetaLearner:
    """Return the learner whose training tasks are codes (`latent_tasks(..., as_codes=True)`).

    Args:
        learner: trained by a field of a game over tasks, as all are but Reptile and regressed. `adapt` and `path` stay
            those of images, so it is evaluated as before.
        generator: decodes.
        params: of the generator, where it begins.
        steps: sign-gradient steps by which the query's codes are moved against the learner; 0 for none.
        rate: a, of such a step.
        radius: r, largest Euclidean distance by which a code is moved; white codes differ by about sqrt(2 Z).
        learns: let the generator descend the learner's query loss, too.

    Raises:
        ValueError: a learner without such a field, a negative number of steps, or a rate or radius that is not
            positive where there are steps.
    """
    if not isinstance(learner.field, GradientField) or not isinstance(learner.field.game, TaskGame):
        raise ValueError("a learner on codes needs a field of a game over tasks; reptile and regressed have none")
    if steps < 0 or (steps and not (rate > 0 and radius > 0)):
        raise ValueError(f"expected steps >= 0 and a positive rate and radius, got {steps=}, {rate=}, {radius=}")
    game, made_by = learner.field.game, generator if learns else without_gradient(generator)

    def decoded(examples: Examples, weights: Params) -> Examples:
        return examples._replace(x=made_by.decode(weights, examples.x))

    def judged(meta: Params, key: Key, task: Task) -> tuple[Losses, Metrics]:
        weights = meta[TASK_GENERATOR]
        rest = {name: tree for name, tree in meta.items() if name != TASK_GENERATOR}
        return game(rest, key, Task(decoded(task.support, weights), decoded(task.query, weights)))

    def play(meta: Params, key: Key, task: Task) -> tuple[Losses, Metrics]:
        begin = task.query.x
        still = jax.lax.stop_gradient(meta)

        def loss(moved: Array) -> Array:
            losses, _ = judged(still, jax.random.clone(key), task._replace(query=task.query._replace(x=begin + moved)))
            return player_of("", losses)

        def harder(moved: Array, _: None) -> tuple[Array, None]:
            moved = moved + rate * jnp.sign(jax.grad(loss)(moved))
            length = jnp.sqrt(jnp.square(moved).sum(-1, keepdims=True))
            return moved * (radius / jnp.maximum(length, radius)), None

        moved = jnp.zeros_like(begin)
        if steps:
            moved = jax.lax.stop_gradient(jax.lax.scan(harder, moved, None, length=steps)[0])
        losses, metrics = judged(meta, key, task._replace(query=task.query._replace(x=begin + moved)))
        return ({**losses, TASK_GENERATOR: player_of(TASK_GENERATOR, losses)} if learns else losses), metrics

    def init(key: Key) -> Params:
        return {**learner.init(key), TASK_GENERATOR: jax.tree.map(jnp.asarray, params)}

    def adapt(meta: Params, key: Key, support: Examples) -> tuple[Params, Metrics]:
        return learner.adapt({name: tree for name, tree in meta.items() if name != TASK_GENERATOR}, key, support)

    def path(meta: Params, key: Key, support: Examples, num_steps: int) -> tuple[Params, Metrics]:
        rest = {name: tree for name, tree in meta.items() if name != TASK_GENERATOR}
        return learner.path(rest, key, support, num_steps)

    def adapt_to_codes(meta: Params, key: Key, support: Examples) -> tuple[Params, Metrics]:
        return adapt(meta, key, decoded(support, meta[TASK_GENERATOR]))

    players = learner.field.players
    moving = None if players is None else (*players, *((TASK_GENERATOR,) if learns else ()))
    return MetaLearner(init, adapt, vector_field(TaskGame(play, adapt_to_codes), moving), path)
