"""How the players of a game move: at once, in turns, with foresight, or with regard for each other.

With F the field of a game (each player's loss differentiated in its own parameters), a the rate and w a weight:

| dynamics      | one step                                                                                   |
|---------------|--------------------------------------------------------------------------------------------|
| simultaneous  | x <- x - a F(x): `vector_field` itself                                                     |
| alternating   | each group of players in its turn, at what those before it have moved to                   |
| extragradient | x <- x - a F(x - b F(x)): the field where the players would be                             |
| consensus     | x <- x - a (F(x) + w d/dx |F(x)|^2 / 2): the field, and a pull towards where it vanishes   |
| unrolled      | a player's loss is judged against rivals that have taken k steps of their own              |

On the bilinear game L_x = x y, L_y = -x y, simultaneous steps grow by sqrt(1 + a^2) a step and alternating ones stay
bounded; extragradient shrinks if b > a / 2 (for small rates), and so does consensus if w > a / 2.

A *dynamics* is a function (game, players) -> field, or -> a tuple of fields that take turns in each inner step; every
learner takes one. `in_turns` is the alternation for any optax loop, the outer one for instance.

Sources: Korpelevich, The extragradient method, 1976; Gidel et al., A Variational Inequality Perspective on GANs, 2019;
Mescheder, Nowozin & Geiger, The Numerics of GANs, 2017 (consensus); Metz et al., Unrolled Generative Adversarial
Networks, 2017; Goodfellow et al., Generative Adversarial Nets, 2014, algorithm 1 (turns).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metagen_jax.games import vector_field
from metagen_jax.types import Array, Field, Game, Key, Losses, Metrics, Params

Dynamics = Callable[[Game, Sequence[str] | None], Field | tuple[Field, ...]]
"""(game, moving players or None for all) -> field, or the fields of an inner step's turns. `vector_field` is one."""
Rate = float | Mapping[str, float]


def alternating(turns: Sequence[str | Sequence[str]]) -> Dynamics:
    """Return the dynamics in which the players move in turns, all turns being one inner step.

    Only the losses of those whose turn it is are differentiated. A turn of players that do not move is left out.

    Args:
        turns: who moves in each, one player or several at once: `["critic"] * 5 + ["generator"]`.

    Raises:
        ValueError: no turn, or an empty one; when called, no player that moves in any turn, or one that never does.

    Example:
        >>> from metagen_jax import vector_field
        >>> game = lambda params, key, batch: ({"x": params["x"] * params["y"], "y": -params["x"] * params["y"]}, {})
        >>> first, second = alternating(["x", "y"])(game, None)
        >>> {name: float(d) for name, d in second({"x": 2.0, "y": 3.0}, None, None)[0].items()}
        {'y': -2.0}
    """
    groups = _groups(turns)

    def dynamics(game: Game, players: Sequence[str] | None = None) -> tuple[Field, ...]:
        moving = groups if players is None else [tuple(p for p in group if p in players) for group in groups]
        moving = [group for group in moving if group]
        idle = [] if players is None else [p for p in players if not any(p in group for group in groups)]
        if not moving or idle:
            raise ValueError(f"the turns {groups} leave no move to {idle or players}; give every player that moves one")
        fields = {group: vector_field(game, group) for group in moving}
        return tuple(fields[group] for group in moving)

    return dynamics


def extragradient(field: Field, rate: Rate) -> Field:
    """Return the field where its players would be after a step of their own: F(x - rate F(x)).

    The two evaluations have independent noise. The metrics are those of the place that the step begins at.

    Args:
        field: (params, key, batch) -> (directions, metrics).
        rate: of the step ahead, one for all or one for each player.

    Raises:
        ValueError: a rate that is not positive.
    """
    _check_rate(rate)

    def ahead(params: Params, key: Key, batch: Any) -> tuple[Params, Metrics]:
        first, second = jax.random.split(key)
        directions, metrics = field(params, first, batch)
        there = {**params, **_step(params, directions, rate)}
        return field(there, second, batch)[0], metrics

    return ahead


def consensus(field: Field, weight: float) -> Field:
    """Return the field plus `weight` times the gradient of |F|^2 / 2, summed over all players.

    Args:
        field: differentiable, (params, key, batch) -> (directions, metrics).
        weight: of the regulariser; zero gives the field back.

    Raises:
        ValueError: a negative weight.
    """
    if not weight >= 0:
        raise ValueError(f"the weight of the consensus term must be at least 0, got {weight}")

    def regularised(params: Params, key: Key, batch: Any) -> tuple[Params, Metrics]:
        names = tuple(jax.eval_shape(lambda *arguments: field(*arguments)[0], params, jax.random.clone(key), batch))

        def half_squared_norm(moving: Params) -> tuple[Array, tuple[Params, Metrics]]:
            directions, metrics = field({**params, **moving}, key, batch)
            squares = [jnp.square(leaf).sum() for leaf in jax.tree.leaves(directions)]
            return 0.5 * jnp.stack(squares).sum(), (directions, metrics)

        slope, (directions, metrics) = jax.grad(half_squared_norm, has_aux=True)({n: params[n] for n in names})
        return jax.tree.map(lambda d, s: d + weight * s, directions, slope), metrics

    return regularised


def unrolled(game: Game, players: Sequence[str], rivals: Sequence[str], num_steps: int, rate: Rate) -> Game:
    """Return the game in which `players` are judged against rivals that have taken some steps first.

    Their losses are L(params with rivals_k), rivals_{i+1} = rivals_i - rate * F(rivals_i), and are differentiated
    through those steps. The rivals' own losses stay as they are.

    Args:
        game: (params, key, batch) -> (losses, metrics).
        players: with foresight, the generator's parts.
        rivals: those whose steps are foreseen, the discriminator's parts.
        num_steps: of the rivals; zero gives the same losses as the game.
        rate: of their gradient descent, one for all or one for each player.

    Raises:
        ValueError: a negative number of steps, a rate that is not positive, players on both sides.
    """
    _check_rate(rate)
    if num_steps < 0 or set(players) & set(rivals):
        raise ValueError(
            f"expected num_steps >= 0 and rivals that are not among the players, got num_steps={num_steps}, "
            f"players={list(players)}, rivals={list(rivals)}"
        )
    field = vector_field(game, rivals)

    def foreseen(params: Params, key: Key, batch: Any) -> tuple[Losses, Metrics]:
        now_key, then_key, steps_key = jax.random.split(key, 3)
        losses, metrics = game(params, now_key, batch)

        def step(moving: Params, key: Key) -> tuple[Params, None]:
            here = {**params, **moving}
            return _step(here, field(here, key, batch)[0], rate), None

        moved, _ = jax.lax.scan(step, {name: params[name] for name in rivals}, jax.random.split(steps_key, num_steps))
        then, _ = game({**params, **moved}, then_key, batch)
        return {name: then[name] if name in players else loss for name, loss in losses.items()}, metrics

    return foreseen


def without_shaping(game: Game) -> Game:
    """Return the game in which a loss carries no gradient to any player but those that have it.

    The field of the game stays what it is. What changes is a meta-gradient through it: a player's query loss depends on
    its meta-parameters through its own adapted parameters, and through those of its rivals, which have adapted to it.
    Descending the second path is to shape one's opponents: a discriminator whose loss falls when the generator adapts
    badly is rewarded for teaching it badly. `over_tasks(without_shaping(game), adapt)` leaves that path out.

    Source: of the term, Foerster et al., Learning with Opponent-Learning Awareness, 2018.
    """

    def apart(params: Params, key: Key, batch: Any) -> tuple[Losses, Metrics]:
        losses, metrics = game(params, key, batch)
        sides: dict[int, list[str]] = {}
        for name, loss in losses.items():
            sides.setdefault(id(loss), []).append(name)
        if len(sides) == 1:
            return losses, metrics
        found: Losses = {}
        for side in sides.values():
            own = {name: tree if name in side else jax.lax.stop_gradient(tree) for name, tree in params.items()}
            alone, _ = game(own, jax.random.clone(key), batch)
            found |= {name: alone[name] for name in side}
        return {name: found[name] for name in losses}, metrics

    return apart


def in_turns(
    rule: optax.GradientTransformation, turns: Sequence[str | Sequence[str]]
) -> optax.GradientTransformationExtraArgs:
    """Return the rule under which one group of players moves at each update, while the others and their states wait.

    A meta-player `"player/what"` moves with its owner, and whatever no turn names moves in every turn. Each group is a
    tree of its own to the rule (so its state counts its own moves only). All directions are computed and those of who
    waits are thrown away; inside `unroll`, `alternating` computes only what moves.

    Args:
        rule: any optax rule.
        turns: who moves at update 0, 1, ...; after the last it begins again.

    Raises:
        ValueError: no turn, or an empty one, or a player in two different ones; when called, a name that is not among
            the parameters.
    """
    groups = _groups(turns)
    distinct = list(dict.fromkeys(groups))
    named = [name for group in distinct for name in group]
    if len(set(named)) != len(named):
        raise ValueError(f"a player may be in one group of players only, got the turns {groups}")
    rule = optax.with_extra_args_support(rule)

    def split(tree: Params) -> list[Params]:
        missing = sorted(set(named) - set(tree))
        if missing:
            raise ValueError(f"the turns name {missing}, but the players are {sorted(tree)}")
        owner = {name: name if name in named else name.rsplit("/", 1)[0] for name in tree}
        parts = [{name: tree[name] for name in tree if owner[name] in group} for group in distinct]
        return [*parts, {name: tree[name] for name in tree if owner[name] not in named}]

    def init(params: Params) -> tuple[Array, list[Any]]:
        return jnp.zeros((), jnp.int32), [rule.init(part) for part in split(params)]

    def update(
        updates: Params, state: tuple[Array, list[Any]], params: Params | None = None, **extra: Any
    ) -> tuple[Params, tuple[Array, list[Any]]]:
        count, states = state
        given = [None] * len(states) if params is None else split(params)
        turn = jnp.array([distinct.index(group) for group in groups])[count % len(groups)]
        found: Params = {}
        following: list[Any] = []
        for index, (part, before, values) in enumerate(zip(split(updates), states, given, strict=True)):
            moved, after = rule.update(part, before, values, **extra)
            plays = (turn == index) | (index == len(distinct))
            found |= jax.tree.map(lambda leaf, plays=plays: jnp.where(plays, leaf, jnp.zeros_like(leaf)), moved)
            following.append(jax.tree.map(lambda a, b, plays=plays: jnp.where(plays, a, b), after, before))
        return {name: found[name] for name in updates}, (count + 1, following)

    return optax.GradientTransformationExtraArgs(init, update)


def _groups(turns: Sequence[str | Sequence[str]]) -> list[tuple[str, ...]]:
    groups = [(turn,) if isinstance(turn, str) else tuple(turn) for turn in turns]
    if isinstance(turns, str) or not groups or not all(groups):
        raise ValueError(f"expected at least one turn, each of at least one player, got {turns!r}")
    return groups


def _step(params: Params, directions: Params, rate: Rate) -> Params:
    def of(name: str) -> float:
        if not isinstance(rate, Mapping):
            return rate
        owner = name if name in rate else name.rsplit("/", 1)[0]
        if owner not in rate:
            raise ValueError(f"the steps ahead have no rate for {name!r}, only for {sorted(rate)}; give it one")
        return rate[owner]

    return {
        name: jax.tree.map(lambda leaf, d, a=of(name): leaf - a * d, params[name], tree)
        for name, tree in directions.items()
    }


def _check_rate(rate: Rate) -> None:
    rates = rate.values() if isinstance(rate, Mapping) else (rate,)
    if not all(value > 0 for value in rates):
        raise ValueError(f"the rate of the steps ahead must be positive, got {rate}")
