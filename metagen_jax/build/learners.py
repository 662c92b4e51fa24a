"""From a configuration to a learner and the outer rule."""

from collections.abc import Callable, Sequence
from typing import Any

import optax

from metagen_jax.adapt.amortised import Embed
from metagen_jax.adapt.starts import Start, fixed, per_parameter, per_step
from metagen_jax.build.conditional import Conditional
from metagen_jax.build.learned import initialised, learned_rule, with_initialiser, with_loss
from metagen_jax.build.models import Built, Roles, roles
from metagen_jax.config import CONDITIONAL, HEADS, AdversarialConfig, TrainConfig, given
from metagen_jax.dynamics import Dynamics, alternating, consensus, extragradient, unrolled
from metagen_jax.games import vector_field
from metagen_jax.meta.learners import (
    MetaLearner,
    amortised,
    anil,
    boil,
    cavia,
    fomaml,
    imaml,
    joint,
    learned_loss,
    learned_optimizer,
    maml,
    maml_plus_plus,
    meta_sgd,
    regressed,
    reptile,
)
from metagen_jax.models.classifier import Classifier
from metagen_jax.models.gan import Gan
from metagen_jax.models.latent_gaussian import latent_gaussian
from metagen_jax.models.latent_prototypes import latent_prototypes
from metagen_jax.models.vae import Vae
from metagen_jax.train import outer_optimizer
from metagen_jax.types import Field, Game

FIXED_RATES = ("joint", "reptile", "cavia", "imaml", "regressed", "learned_optimizer")
"""Learners whose inner rates are settings, not learned."""
STILL = "still"
FIXED_MODELS = ("classifier",)
"""Models whose inner rates are settings unless others are asked for."""


def learner(config: TrainConfig, built: Built, *, first_order: bool = False) -> MetaLearner:
    """Return the meta-learner; at first order, for the meta-steps before `inner.first_order_until`, if that is set.

    Raises:
        ValueError: rates, moving players or a model that the learner cannot have.
    """
    inner, name, role, steps = config.inner, config.learner, roles(config, built), given(config.inner.steps)
    if name in FIXED_RATES and inner.rates not in ("auto", "fixed"):
        raise ValueError(f"{name} has fixed inner rates, got inner.rates={inner.rates}; leave it at auto")
    players, play = moving(config, role), dynamics(config.adversarial, role)
    rates = {player: given(inner.fast_rate) if player in role.fast else given(inner.rate) for player in players}
    rule = sgd(rates)
    plain, start = fixed(rule), _start(config, rates)
    after_reading = start if steps else None  # what was read stays, also past the trained number of steps, none
    first: dict[str, Any] = {"dynamics": play, "form": inner.form, "loop": inner.loop}
    second: dict[str, Any] = {"inner_grad": inner.inner_grad, "remat": inner.remat}
    second |= {"shaping": config.adversarial.shaping, **first}
    if first_order:
        second["first_order"] = True
    model, begun = built.model, initialised(built, role)
    moves: dict[str, Any] = {"players": players}
    if name in HEADS:
        return _reader(config, built, after_reading, players, second)
    makers: dict[str, Callable[[], MetaLearner]] = {
        "maml": lambda: maml(model, start, steps, players=players, **second),
        "fomaml": lambda: fomaml(model, start, steps, players=players, **first),
        "reptile": lambda: reptile(model, plain, steps, **first),
        "anil": lambda: anil(model, start, steps, head=players, **second),
        "boil": lambda: boil(model, start, steps, body=players, **second),
        "meta_sgd": lambda: meta_sgd(model, rates, steps, players=players, **second),
        "cavia": lambda: cavia(model, rule, steps, contexts=players, **second),
        "maml_plus_plus": lambda: maml_plus_plus(
            model,
            start,
            steps,
            multi_step_until=max(1, round(inner.multi_step_until * config.outer.steps)),
            **moves,
            **second,
        ),
        "imaml": lambda: imaml(
            model, rule, steps, strength=inner.strength, **moves, shaping=config.adversarial.shaping
        ),
        "learned_loss": lambda: learned_loss(model, with_loss(config, built), start, steps, **moves, **second),
        "learned_optimizer": lambda: _learned_optimizer(config, built, role, players, second),
        "initialiser": lambda: _from_initialiser(built, begun, after_reading, steps, **moves, **second),
        "regressed": lambda: _regressed(config, built, role, begun, players, first),
        "amortised": lambda: amortised(model, _embed(config, built), after_reading, steps, **moves, **second),
        "joint": lambda: joint(model, plain, steps, players=players, learns=role.joint, dynamics=play),
    }
    return makers[name]()


def _from_initialiser(
    built: Built, begun: tuple[str, ...], start: Start | None, steps: int, **options: Any
) -> MetaLearner:
    made = with_initialiser(built, begun)
    return amortised(made.model, made.embed, start, steps, **options)


def _learned_optimizer(
    config: TrainConfig, built: Built, role: Roles, players: tuple[str, ...], options: dict[str, Any]
) -> MetaLearner:
    """Return the learner of a rule and of where it begins; an LSTM learns without second derivatives.

    The slope of the LSTM's logarithms of gradients makes exact meta-gradients too large to learn from. Steps are
    recomputed: what a rule makes of every coordinate is much larger than the parameters.
    """
    how = {**options, "remat": "step" if config.inner.remat == "none" else config.inner.remat}
    if config.inner.rule == "lstm":
        how["first_order"] = True
    rule = learned_rule(config, built, role, players)
    return learned_optimizer(built.model, rule, given(config.inner.steps), learns=None, players=players, **how)


def _regressed(
    config: TrainConfig,
    built: Built,
    role: Roles,
    begun: tuple[str, ...],
    players: tuple[str, ...],
    options: dict[str, Any],
) -> MetaLearner:
    """Return the learner whose teachers and gradient steps move what is chosen and what is written."""
    inner, made = config.inner, with_initialiser(built, begun)
    moves = tuple(dict.fromkeys((*players, *begun)))
    rates = {player: given(inner.fast_rate) if player in role.fast else given(inner.rate) for player in moves}
    return regressed(
        made.model,
        made.embed,
        fixed(sgd(rates)),
        given(inner.steps),
        teacher_steps=inner.teacher_steps,
        players=begun,
        learns=made.names,
        moves=moves,
        **options,
    )


def _embed(config: TrainConfig, built: Built) -> Embed:
    if not isinstance(built, Gan | Conditional):
        readers = ", ".join(("gan", *CONDITIONAL))
        raise ValueError(f"amortised needs a model that reads its support, {readers}; got {config.model}")
    return built.embed


def _reader(
    config: TrainConfig, built: Built, start: Start | None, players: tuple[str, ...], options: dict[str, Any]
) -> MetaLearner:
    """Return the learner that reads the support in closed form, and may go on by gradient steps.

    Of a classifier it reads the head, of a VAE (prototypes only) the prior.
    """
    steps = given(config.inner.steps)
    if isinstance(built, Vae) and config.learner == "prototypes":
        return amortised(built.model, latent_prototypes(built), start, steps, players=players, **options)
    if isinstance(built, Vae) and config.learner == "latent_gaussian":
        made = latent_gaussian(built)
        return amortised(made.model, made.embed, start, steps, players=players, **options)
    if not isinstance(built, Classifier) or config.learner == "latent_gaussian":
        raise ValueError(
            f"{config.learner} reads the head of a classifier (prototypes and latent_gaussian the prior of a vae) off "
            f"the support, got {config.model}"
        )
    if steps and config.learner not in ("prototypes", "ridge"):
        raise ValueError(f"gradient steps go on from prototypes or ridge, whose heads are linear; got {config.learner}")
    return amortised(built.model, built.embed, start, steps, players=players, **options)


def moving(config: TrainConfig, role: Roles) -> tuple[str, ...]:
    """Return the players that move inside.

    Raises:
        ValueError: a name that is no player of the model.
    """
    chosen = config.inner.moves
    if config.learner == "cavia":
        contexts = tuple(player for player in role.fast if player.endswith("context"))
        if not contexts:
            raise ValueError(f"cavia needs a model with a context, and network.context > 0; got {config.model}")
        return contexts
    if "all" in chosen or config.learner == "reptile":
        return role.players
    if chosen == ("auto",):
        if config.learner == "boil":
            return tuple(player for player in role.joint if player not in role.head)
        return role.head if config.learner == "anil" else role.moves or role.fast or role.players
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
    """Return gradient descent with one fixed rate for each player; others stay."""
    rules = {player: optax.sgd(rate) for player, rate in rates.items()}
    return optax.partition(
        {**rules, STILL: optax.set_to_zero()},
        lambda params: {name: name if name in rates else STILL for name in params},
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


def _start(config: TrainConfig, rates: dict[str, float]) -> Start:
    inner, steps = config.inner, given(config.inner.steps)
    if inner.rates == "fixed" or steps == 0 or (inner.rates == "auto" and config.model in FIXED_MODELS):
        return fixed(sgd(rates))
    if inner.rates == "per_parameter":
        return per_parameter(rates, tuple(rates))
    return per_step(steps, rates, tuple(rates), elementwise=inner.rates != "per_step")
