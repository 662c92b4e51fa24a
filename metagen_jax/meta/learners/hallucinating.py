"""Any learner with a support that a generator extends."""

from collections.abc import Callable

import jax

from metagen_jax.adapt.hallucinated import Generate, extender, hallucinated
from metagen_jax.adapt.unroll import Path
from metagen_jax.games import GradientField, vector_field
from metagen_jax.meta.annealed import Annealed
from metagen_jax.meta.learners.record import MetaLearner
from metagen_jax.meta.outer import TaskGame
from metagen_jax.types import Examples, Field, Key, Losses, Metrics, Params, Task


def hallucinating(learner: MetaLearner, generate: Generate, num: int, *, weight: float = 1.0) -> MetaLearner:
    """Return the learner that adapts to the support and `num` generated examples for each of its own.

    The generator learns with the rest: its direction is the gradient of the loss on the query, which is not extended,
    through the learner's own adaptation.

    Args:
        learner: of a model that has the generator among its players: `with_hallucinator(model, network, Z).model`.
        generate: (meta, key, x [M, *event]) -> [M, *event], of the same record, or any other generator.
        num: generated examples for each one of the support; zero returns the learner itself.
        weight: of a generated example, times that of the one that it was made from.

    Raises:
        ValueError: a number or weight out of range, or a learner whose direction is not the gradient of a game over
            tasks (Reptile's, evolution strategies), which says nothing about a generator.

    Source: Wang, Girshick, Hebert & Hariharan, Low-Shot Learning from Imaginary Data, 2018.
    """
    if not num:
        return learner
    extend = extender(generate, num, weight=weight)
    return MetaLearner(
        learner.init,
        hallucinated(generate, num, learner.adapt, weight=weight),
        _through(learner.field, generate, num, weight),
        _path(learner.path, extend),
    )


def _through(field: Field, generate: Generate, num: int, weight: float) -> Field:
    if isinstance(field, Annealed):
        return Annealed(
            lambda step: _through(field.at(step), generate, num, weight), _through(field.final, generate, num, weight)
        )
    if not isinstance(field, GradientField) or not isinstance(field.game, TaskGame):
        raise ValueError(
            "a generator learns from the gradient of the query loss, and this learner follows another direction; use "
            "maml, anil, boil, cavia, maml_plus_plus, imaml, amortised or the like"
        )
    inner, extend = field.game, extender(generate, num, weight=weight)

    def play(meta: Params, key: Key, task: Task) -> tuple[Losses, Metrics]:
        generate_key, game_key = jax.random.split(key)
        return inner.play(meta, game_key, task._replace(support=extend(meta, generate_key, task.support)))

    return vector_field(TaskGame(play, hallucinated(generate, num, inner.adapt, weight=weight)), field.players)


def _path(path: Path, extend: Callable[[Params, Key, Examples], Examples]) -> Path:
    def extended(meta: Params, key: Key, support: Examples, num_steps: int) -> tuple[Params, Metrics]:
        generate_key, path_key = jax.random.split(key)
        return path(meta, path_key, extend(meta, generate_key, support), num_steps)

    return extended
