"""From a configuration to a learner and the outer rule."""

from collections.abc import Sequence
from typing import Any

import optax

from metagen_jax.adapt.starts import Start, fixed, per_parameter, per_step
from metagen_jax.build.models import Built, Roles, roles
from metagen_jax.config import AdversarialConfig, TrainConfig, given
from metagen_jax.dynamics import Dynamics, alternating, consensus, extragradient, unrolled
from metagen_jax.games import vector_field
from metagen_jax.meta.learners import MetaLearner, amortised, anil, fomaml, joint, maml, meta_sgd, reptile
from metagen_jax.models.gan import Gan
from metagen_jax.train import outer_optimizer
from metagen_jax.types import Field, Game


def learner(config: TrainConfig, built: Built) -> MetaLearner:
    """Return the meta-learner.

    Raises:
        ValueError: rates or moving players that the learner cannot have.
    """
    inner, name, role = config.inner, config.learner, roles(config, built)
    players = moving(config, role)
    rates = {player: given(inner.fast_rate) if player in role.fast else inner.rate for player in players}
    plain, play = fixed(sgd(rates)), dynamics(config.adversarial, role)
    how: dict[str, Any] = {"form": inner.form, "loop": inner.loop}
    if name in ("joint", "reptile") and inner.rates not in ("auto", "fixed"):
        raise ValueError(f"{name} has fixed inner rates, got inner.rates={inner.rates}; leave it at auto")
    if name == "joint":
        return joint(built.model, plain, inner.steps, players=players, learns=role.joint, dynamics=play)
    if name == "reptile":
        return reptile(built.model, plain, inner.steps, dynamics=play, **how)
    gradient: dict[str, Any] = {"inner_grad": inner.inner_grad, "remat": inner.remat, **how}
    gradient["shaping"] = config.adversarial.shaping
    if name == "meta_sgd":
        return meta_sgd(built.model, rates, inner.steps, players=players, dynamics=play, **gradient)
    start = _start(config, rates, plain)
    if name == "amortised":
        if not isinstance(built, Gan):
            raise ValueError(f"amortised needs a model that reads its support, so far gan; got {config.model}")
        return amortised(built.model, built.embed, start, inner.steps, players=players, dynamics=play, **gradient)
    if name == "fomaml":
        return fomaml(built.model, start, inner.steps, players=players, dynamics=play, **how)
    if name == "anil":
        return anil(built.model, start, inner.steps, head=players, dynamics=play, **gradient)
    return maml(built.model, start, inner.steps, players=players, dynamics=play, **gradient)


def moving(config: TrainConfig, role: Roles) -> tuple[str, ...]:
    """Return the players that move inside.

    Raises:
        ValueError: a name that is no player of the model.
    """
    chosen = config.inner.moves
    if "all" in chosen or config.learner == "reptile":
        return role.players
    if chosen == ("auto",):
        return role.head if config.learner == "anil" else role.fast or role.players
    unknown = [player for player in chosen if player not in role.players]
    if unknown:
        known = ", ".join(role.players)
        raise ValueError(f"inner.moves has {', '.join(unknown)}; this model's players are {known}, or all")
    return chosen


def dynamics(config: AdversarialConfig, role: Roles) -> Dynamics:
    """Return how the sides of the model's game move in an inner step; a model of one side has no choice."""
    if len(role.turns) == 1 or config.dynamics == "simultaneous":
        return vector_field
    rivals, makers = role.turns
    if config.dynamics == "alternating":
        return alternating([rivals] * config.critic_steps + [makers])

    def play(game: Game, players: Sequence[str] | None = None) -> Field:
        if config.dynamics == "extragradient":
            return extragradient(vector_field(game, players), config.ahead_rate)
        if config.dynamics == "consensus":
            return consensus(vector_field(game, players), config.consensus_weight)
        foreseen = [rival for rival in rivals if players is None or rival in players]
        if not foreseen:
            raise ValueError("unrolled dynamics foresee the discriminator's moves, so some player of it has to move")
        return vector_field(unrolled(game, makers, foreseen, config.unrolled_steps, config.ahead_rate), players)

    return play


def sgd(rates: dict[str, float]) -> optax.GradientTransformation:
    """Return gradient descent with one fixed rate for each player."""
    return optax.partition(
        {player: optax.sgd(rate) for player, rate in rates.items()}, lambda params: {name: name for name in params}
    )


def outer(config: TrainConfig) -> optax.GradientTransformation:
    """Return the outer rule."""
    o = config.outer
    return outer_optimizer(
        given(o.rate),
        o.steps,
        warmup=min(o.warmup, o.steps - 1),
        clip=o.clip,
        rate_of_rates=o.rate_of_rates,
        momentum=given(o.momentum),
    )


def _start(config: TrainConfig, rates: dict[str, float], plain: Start) -> Start:
    inner = config.inner
    if inner.rates == "fixed" or inner.steps == 0:
        return plain
    if inner.rates == "per_parameter":
        return per_parameter(rates, tuple(rates))
    return per_step(inner.steps, rates, tuple(rates), elementwise=inner.rates != "per_step")
