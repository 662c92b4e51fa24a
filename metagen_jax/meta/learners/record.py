"""What a meta-learner is, and what all of them are made with."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.adapt.starts import Start
from metagen_jax.adapt.unroll import Path
from metagen_jax.dynamics import without_shaping
from metagen_jax.games import GradientField
from metagen_jax.meta.outer import through
from metagen_jax.types import Adapt, Examples, Field, Key, Metrics, Model, Params
from metagen_jax.types import Start as AnyStart


def _no_path(meta: Params, key: Key, support: Examples, num_steps: int) -> tuple[Params, Metrics]:
    raise ValueError("this learner was made without a path, so it has no parameters step by step; give it one")


class MetaLearner(NamedTuple):
    """What is learned, how a task is adapted to, and the direction that the meta-parameters follow."""

    init: Callable[[Key], Params]
    adapt: Adapt
    field: Field  # its batch is one Task
    path: Path = _no_path  # the adapter step by step and past its trained number, for evaluation


def query_field(model: Model, adapt: Adapt, shaping: bool) -> GradientField:
    """Return the field of the query loss through the adaptation; without shaping, not through what rivals adapt to."""
    return through(model.game if shaping else without_shaping(model.game), adapt)


def extended_init(model: Model, start: AnyStart) -> Callable[[Key], Params]:
    """Return the model's init, followed by what the start adds to be learned."""
    if isinstance(start, Start):
        return lambda key: start.extend(model.init(key))
    return model.init


def task_keys(key: Key, num_tasks: int) -> Key:
    """Return the keys [T] of a batch of tasks: task i has fold_in(key, i), however the batch is cut into pieces."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(num_tasks))
