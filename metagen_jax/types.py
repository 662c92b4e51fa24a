"""The vocabulary: parameters, examples, tasks, games, fields, adapters and models.

Everything else in the package is a function between these types.

Shape letters, the same in every module: T tasks, N examples of one set, K inner steps, S importance samples,
D features, Z latent dimensions, C classes, H W images, and *event the shape of one example.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import optax

Array = jax.Array
Key = jax.Array
ArrayTree = Any
Params = dict[str, ArrayTree]
"""Player -> parameters. Meta-parameters are of the same form, with a further player for each thing learned about
learning: `"player/what"` belongs to `player` and follows its loss (`"generator/log_rate"`); any other name that the
game does not score (`"rule"`) follows the sum of the losses."""
Metrics = dict[str, Array]
Losses = dict[str, Array]


class Examples(NamedTuple):
    """A set of examples of one task, padded with zero-weight rows to a fixed size.

    N is way * shot, or that of the largest task.
    """

    x: Array  # [N, *event] images are float32 [N, H, W, C] in [0, 1]
    label: Array  # [N] int32, class within the task, -1 unlabelled
    weight: Array  # [N] float32, 0 marks padding


class Task(NamedTuple):
    """A support set to adapt to and a query set to be judged on; a batch of tasks has a leading [T] on every leaf."""

    support: Examples
    query: Examples


class Game(Protocol):
    """One scalar loss per player on one batch: `Examples` in the inner loop, a `Task` in the outer one."""

    def __call__(self, params: Params, key: Key, batch: Any, /) -> tuple[Losses, Metrics]:
        """Return the loss [] of every player and metrics worth recording."""
        ...


class Field(Protocol):
    """The direction that learning follows down: for each moving player, a tree like its parameters."""

    def __call__(self, params: Params, key: Key, batch: Any, /) -> tuple[Params, Metrics]:
        """Return the direction of every moving player and metrics worth recording."""
        ...


class Adapt(Protocol):
    """Turns a support set into task parameters, whatever the means."""

    def __call__(self, meta: Params, key: Key, support: Examples, /) -> tuple[Params, Metrics]:
        """Return the task's parameters and a trace of metrics, each [K]."""
        ...


Start = Callable[[Params], tuple[Params, optax.GradientTransformation]]
"""Meta-parameters -> where the inner loop begins, and the rule that it follows."""


class Model(NamedTuple):
    """A generative model as pure functions."""

    init: Callable[[Key], Params]
    game: Game
    sample: Callable[[Params, Key, int], Array]  # (params, key, num) -> [num, *event]


class LatentVariable(NamedTuple):
    """What a latent-variable model can do beyond sampling; z is [N, Z], every log density is in nats per example."""

    encode: Callable[[Params, Array], tuple[Array, Array]]  # x [N, *event] -> mean, log_scale of q(z | x), each [N, Z]
    decode: Callable[[Params, Array], Array]  # z [N, Z] -> mean of p(x | z), [N, *event]
    log_prior: Callable[[Params, Array], Array]  # z [N, Z] -> log p(z) [N]
    log_likelihood: Callable[[Params, Array, Array], Array]  # x [N, *event], z [N, Z] -> log p(x | z) [N]


class Density(NamedTuple):
    """How likely a model with these parameters finds an image, in nats per image."""

    log_weight: Callable[[Params, Key, Array], Array]  # (params, key, x [N, *event]) -> [N], one draw for each example
    kind: Literal["exact", "importance", "bound"]  # what a draw is: `metagen_jax.models.densities`


def player_of(name: str, losses: Mapping[str, Array]) -> Array:
    """Return the loss that the meta-player `name` follows: its own, its owner's, or the sum of all.

    A loss that several players share (the same array) counts once.

    Example:
        >>> player_of("model/log_rate", {"model": 2.0, "rule": 3.0})
        2.0
        >>> player_of("rule", {"generator": 2.0, "discriminator": 3.0})
        5.0
    """
    if name in losses:
        return losses[name]
    owner = name.rsplit("/", 1)[0]
    if owner in losses:
        return losses[owner]
    first, *others = {id(loss): loss for loss in losses.values()}.values()
    return sum(others, start=first)
