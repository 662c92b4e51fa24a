"""A common reward for all sides of a game: how much each could still gain while the others stand still.

    gap(phi) = sum_s [ L_s(phi) - L_s(phi with side s after k descent steps on L_s) ]

At a local equilibrium no side can gain and the gap is zero; elsewhere it is positive (for rates that descend). Of a
game f of two sides whose losses sum to zero it is a lower bound of max f(x, .) - min f(., y), the duality gap. Rules
for rivals can both be trained on it, where the sum of the losses would say nothing.

Source: Grnarova et al., A domain agnostic measure for monitoring and evaluating GANs, 2019 (k steps from where the
players are); as a reward of learned rules it stands for the common reward of Shen et al., Learning A Minimax Optimizer:
A Pilot Study, 2021, equation 3, which counts what the rules' own steps gained, step by step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from metagen_jax.games import vector_field
from metagen_jax.types import Game, Key, Losses, Metrics, Params


def duality_gap(game: Game, sides: Mapping[str, Sequence[str]], num_steps: int, rate: float) -> Game:
    """Return the game of one loss, `gap`, that is zero where no side can gain.

    The steps are differentiated through. All losses are met with the same noise.

    Args:
        game: (params, key, batch) -> (losses, metrics).
        sides: of each side, its players.
        num_steps: k, descent steps that a side may take.
        rate: of those steps.

    Returns:
        A game whose only loss is `gap`; its metrics are the game's and `gap/<side>` for each.

    Raises:
        ValueError: no side, no step, or a rate that is not positive.

    Example:
        >>> game = lambda params, key, batch: ({"x": params["x"] * params["y"], "y": -params["x"] * params["y"]}, {})
        >>> gap = duality_gap(game, {"x": ("x",), "y": ("y",)}, 1, 0.5)
        >>> losses, _ = gap({"x": jnp.array(1.0), "y": jnp.array(2.0)}, jax.random.key(0), None)
        >>> float(losses["gap"])  # rate (x^2 + y^2)
        2.5
    """
    if not sides or num_steps < 1 or not rate > 0:
        raise ValueError(
            f"expected sides, at least one step and a positive rate, got {list(sides)}, num_steps={num_steps}, "
            f"rate={rate}"
        )
    fields = {side: vector_field(game, tuple(players)) for side, players in sides.items()}

    def judged(params: Params, key: Key, batch: Any) -> tuple[Losses, Metrics]:
        losses, metrics = game(params, key, batch)
        gains: Losses = {}
        for side, players in sides.items():

            def step(moving: Params, nothing: None, side: str = side) -> tuple[Params, None]:
                direction, _ = fields[side]({**params, **moving}, jax.random.clone(key), batch)
                return jax.tree.map(lambda leaf, d: leaf - rate * d, moving, direction), nothing

            moved, _ = jax.lax.scan(step, {name: params[name] for name in players}, length=num_steps)
            after, _ = game({**params, **moved}, jax.random.clone(key), batch)
            gains[side] = losses[players[0]] - after[players[0]]
        each = {f"gap/{side}": gain for side, gain in gains.items()}
        return {"gap": jnp.stack(list(gains.values())).sum()}, {**metrics, **each}

    return judged
