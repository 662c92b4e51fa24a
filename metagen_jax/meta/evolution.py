"""Evolution strategies: an outer field of losses alone, which are not differentiated.

    F_p(meta) = mean_i [ L_p(meta + s e_i) - L_p(meta - s e_i) ] / (2 s) e_{i,p},   e_i ~ N(0, I)

is unbiased for the gradient in player p of the smoothed loss E L_p(meta + s e). All players are perturbed at once, and
each follows its own loss along its own part of the perturbation. A loss through many inner steps can be so rugged that
its exact gradient is useless; the smoothed one is not, and an evaluation needs no memory for a backward pass.

Sources: Salimans et al., Evolution Strategies as a Scalable Alternative to Reinforcement Learning, 2017; Metz et al.,
Understanding and correcting pathologies in the training of learned optimizers, 2019.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from metagen_jax.types import Array, Field, Game, Key, Losses, Metrics, Params, Task, player_of


def evolution(game: Game, players: Sequence[str], sigma: float, num_pairs: int) -> Field:
    """Return the field of antithetic evolution strategies.

    Both members of a pair meet the same noise (the same key), different pairs different noise.

    Args:
        game: over tasks, `over_tasks(game, adapt)`; or any other.
        players: that are perturbed and learn. The field has no entry for others.
        sigma: s, the standard deviation of the perturbation of every parameter.
        num_pairs: of evaluations for each task; the error falls with the root of it.

    Returns:
        A field: (meta, key, task) -> (directions, metrics), the metrics means over all evaluations, and among them
        `loss`, or `loss/<player>` where the players follow several.

    Raises:
        ValueError: no player, one twice, sigma not positive, no pair; when called, a player without parameters.
    """
    names = tuple(players)
    if isinstance(players, str) or not names or len(set(names)) != len(names):
        raise ValueError(f"expected a sequence of different player names, got {players!r}; write ('name',) for one")
    if not sigma > 0 or num_pairs < 1:
        raise ValueError(f"expected sigma > 0 and at least one pair, got sigma={sigma}, num_pairs={num_pairs}")

    def field(meta: Params, key: Key, task: Task) -> tuple[Params, Metrics]:
        missing = [name for name in names if name not in meta]
        if missing:
            raise ValueError(f"the players {missing} should learn, but the meta-parameters have {sorted(meta)}")

        def pair(key: Key) -> tuple[Params, Metrics]:
            noise_key, game_key = jax.random.split(key)
            noise = normal_like(noise_key, {name: meta[name] for name in names})

            def evaluate(sign: Array) -> tuple[Losses, Metrics]:
                losses, metrics = game({**meta, **moved(meta, noise, sign * sigma)}, game_key, task)
                followed, named = followed_losses(losses, names)
                return followed, {**metrics, **named}

            losses, metrics = jax.vmap(evaluate)(jnp.array([1.0, -1.0]))
            slopes = {name: (loss[0] - loss[1]) / (2 * sigma) for name, loss in losses.items()}
            return scaled(noise, slopes), metrics

        directions, metrics = jax.vmap(pair)(jax.random.split(key, num_pairs))
        metrics = jax.tree.map(lambda leaf: leaf.mean((0, 1)), metrics)
        return jax.tree.map(lambda leaf: leaf.mean(0), directions), metrics

    return field


def normal_like(key: Key, tree: Params) -> Params:
    """Return standard normal noise of the shapes and types of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    noise = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noise)


def moved(meta: Params, noise: Params, size: Array) -> Params:
    """Return the players of `noise`, moved along it."""
    return {
        name: jax.tree.map(lambda leaf, e: leaf + (size * e).astype(leaf.dtype), meta[name], e)
        for name, e in noise.items()
    }


def scaled(noise: Params, slopes: Losses) -> Params:
    """Return the noise of each player times that player's number."""
    return {
        name: jax.tree.map(lambda e, slope=slopes[name]: (slope * e).astype(e.dtype), tree)
        for name, tree in noise.items()
    }


def followed_losses(losses: Losses, players: Sequence[str]) -> tuple[Losses, Metrics]:
    """Return the loss that each player follows, and those losses under the names that fields report them by."""
    followed = {name: player_of(name, losses) for name in players}
    distinct = {id(loss): name for name, loss in reversed(followed.items())}
    names = ["loss" if len(distinct) == 1 else f"loss/{name}" for name in distinct.values()]
    return followed, {named: followed[name] for named, name in zip(names, distinct.values(), strict=True)}
