"""Twins: a learned rule for each side of a game, with parameters of its own.

    phi_s <- phi_s + u_{psi_s}(gradient of side s),   s = generator, discriminator (or any other sides)

The parameters psi_s are the meta-player `"<side>/rule"`, and a side has any number of players. Whether the sides move
at once or in turns, each rule sees the gradients of its own players only and keeps its memory for them.

What should the rules be rewarded for? In the source, both for the same thing, and so it is meant here. Rules that
follow the losses of their own sides, as their names alone would have them do, play a second game, in which a
discriminator's rule is rewarded for a generator that learned badly; and where losses sum to zero, their sum says
nothing. So give the outer game a reward that both sides share, a game of one loss: `duality_gap` of
`metagen_jax.meta.common_reward`, or how far samples are from the query (`learned_optimizer(judge=...)`). Without one,
each rule follows its own side's loss.

Source: Shen, Chen, Heaton, Chen, Liu, Yin & Wang, Learning A Minimax Optimizer: A Pilot Study, 2021.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import optax

from metagen_jax.adapt.learned_rules import LearnedRule
from metagen_jax.adapt.starts import Start
from metagen_jax.types import ArrayTree, Key, Params

RULE = "rule"


class Twins(NamedTuple):
    """A learned rule for each side, and the players of each side."""

    rules: dict[str, LearnedRule]
    sides: dict[str, tuple[str, ...]]


def twins(rules: Mapping[str, LearnedRule], sides: Mapping[str, Sequence[str]]) -> Twins:
    """Return one rule for each side of a game.

    Args:
        rules: of each side; the same one twice still has parameters twice.
        sides: of each side, its players: `{"generator": gan.generator, "discriminator": gan.discriminator}`.

    Raises:
        ValueError: no side, rules and players of different sides, a player on two sides.

    Example:
        >>> from metagen_jax.adapt.learned_rules import coordinate_mlp
        >>> pair = twins(dict.fromkeys("xy", coordinate_mlp()), {"x": ("x",), "y": ("y",)})
        >>> sorted(rule_players(pair))
        ['x/rule', 'y/rule']
    """
    players = [player for side in sides.values() for player in side]
    spelled = [name for name, side in sides.items() if isinstance(side, str) or not side]
    if not sides or set(rules) != set(sides) or spelled or len(set(players)) != len(players):
        raise ValueError(
            f"expected a rule and at least one player for each side, no player on two sides; got rules for "
            f"{sorted(rules)} and the sides { ({name: tuple(side) for name, side in sides.items()}) }"
        )
    return Twins({side: rules[side] for side in sides}, {side: tuple(names) for side, names in sides.items()})


def rule_players(rule: LearnedRule | Twins, player: str = RULE) -> tuple[str, ...]:
    """Return the names of the meta-players that hold the parameters: `player`, or `"<side>/rule"` for each twin."""
    return tuple(f"{side}/{RULE}" for side in rule.rules) if isinstance(rule, Twins) else (player,)


def init_rules(rule: LearnedRule | Twins, key: Key, player: str = RULE) -> Params:
    """Return fresh parameters of a rule, or of each of the twins, by the name of the meta-player that holds them."""
    if not isinstance(rule, Twins):
        return {player: rule.init(key)}
    keys = jax.random.split(key, len(rule.rules))
    return {f"{side}/{RULE}": one.init(k) for (side, one), k in zip(rule.rules.items(), keys, strict=True)}


def following(rule: LearnedRule | Twins, key: Key, *, player: str = RULE) -> Start:
    """Return the start that begins at the meta-parameters and follows a learned rule, or twins.

    Args:
        rule: of `coordinate_mlp`, `coordinate_lstm`, `twins`, or any other with parameters.
        key: of the parameters that meta-training begins with.
        player: the meta-player that holds them; those of twins are always called `"<side>/rule"`.
    """
    names = rule_players(rule, player)

    def begin(meta: Params) -> tuple[Params, optax.GradientTransformation]:
        missing = [name for name in names if name not in meta]
        if missing:
            raise ValueError(f"the learned rule reads its parameters from players {missing}, but meta has {list(meta)}")
        params = {name: tree for name, tree in meta.items() if name not in names}
        if not isinstance(rule, Twins):
            return params, rule.rule(meta[player])
        rules = {side: one.rule(meta[f"{side}/{RULE}"]) for side, one in rule.rules.items()}
        return params, side_by_side(rules, rule.sides)

    return Start(begin, lambda params: {**params, **init_rules(rule, key, player)}, (), learns=True)


def side_by_side(
    rules: Mapping[str, optax.GradientTransformation], sides: Mapping[str, Sequence[str]]
) -> optax.GradientTransformation:
    """Return the rule that moves the players of each side by a rule of its own, with states apart.

    Raises:
        ValueError: when called, a player that is on no side.
    """

    def split(tree: Params) -> dict[str, Params]:
        strangers = [name for name in tree if not any(name in side for side in sides.values())]
        if strangers:
            raise ValueError(f"players {strangers} move but are on no side; the sides are {dict(sides)}")
        parts = {side: {name: tree[name] for name in tree if name in names} for side, names in sides.items()}
        return {side: part for side, part in parts.items() if part}

    def init(params: Params) -> dict[str, ArrayTree]:
        return {side: rules[side].init(part) for side, part in split(params).items()}

    def update(
        updates: Params, state: dict[str, ArrayTree], params: Params | None = None
    ) -> tuple[Params, dict[str, ArrayTree]]:
        here = {} if params is None else split(params)
        moved: Params = {}
        following: dict[str, ArrayTree] = {}
        for side, part in split(updates).items():
            change, following[side] = rules[side].update(part, state[side], here.get(side))
            moved |= change
        return {name: moved[name] for name in updates}, following

    return optax.GradientTransformation(init, update)
