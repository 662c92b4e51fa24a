"""More classes from the same ones: a symmetry of the square, and a shift, makes a character into another character.

The whole task is turned the same way, support and query, so its class stays one class. For training only.
"""

from typing import Any

import jax
import jax.numpy as jnp

from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.types import Array, Examples, Key, Task


def with_symmetries(family: TaskFamily, *, shift: int = 1) -> TaskFamily:
    """Return the family whose tasks are turned, mirrored and shifted as a whole, all symmetries equally likely.

    Args:
        family: of tasks whose examples are square images [N, H, H, C].
        shift: largest shift in pixels, down and across; what leaves the image comes back on the other side.

    Raises:
        ValueError: a negative shift; when called, images that are not square.
    """
    if shift < 0:
        raise ValueError(f"the largest shift must be at least 0 pixels, got {shift}")

    def make(data: Any, key: Key, spec: Spec) -> Task:
        make_key, turn_key = jax.random.split(key)
        task = family.make(data, make_key, spec)
        draw = jax.random.randint(turn_key, (5,), 0, jnp.array([2, 2, 2, 2 * shift + 1, 2 * shift + 1]))

        def turned(examples: Examples) -> Examples:
            return examples._replace(x=_turn(examples.x, draw, shift))

        return Task(turned(task.support), turned(task.query))

    return family._replace(make=make)


def _turn(x: Array, draw: Array, shift: int) -> Array:
    if x.ndim != 4 or x.shape[1] != x.shape[2]:
        raise ValueError(f"symmetries of the square need images [N, H, H, C], got {list(x.shape)}")
    x = jnp.where(draw[0], x.transpose(0, 2, 1, 3), x)
    x = jnp.where(draw[1], x[:, ::-1], x)
    x = jnp.where(draw[2], x[:, :, ::-1], x)
    return jnp.roll(jnp.roll(x, draw[3] - shift, 1), draw[4] - shift, 2)
