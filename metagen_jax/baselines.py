"""What meta-learning is compared with: the same network, the same episodes, the same number of gradient steps.

| baseline        | begins with                    | then, on the support                                      |
|-----------------|--------------------------------|-----------------------------------------------------------|
| joint           | ordinary training on all tasks | nothing                                                   |
| fine-tuned      | the same                       | K steps, at the best of many rules on classes held out    |
| scratch (SGD)   | random weights                 | K steps of SGD over all weights, at its best rate         |
| scratch (Adam)  | random weights                 | K steps of Adam over all weights, at its best rate        |

Joint training gets as many gradients of images as meta-training took, inner steps included: from the warm start where
there was one, a meta-step of K steps on N support and Q query images counting as (K N + Q) / (N + Q) joint steps
(`image_gradients` has the learners that take another number).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagen_jax import build
from metagen_jax.adapt.starts import learned
from metagen_jax.config import HEADS, TrainConfig, given
from metagen_jax.meta.learners import MetaLearner, joint
from metagen_jax.metrics.likelihood import bounds
from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.train import Step, TrainState, init_state, make_step, outer_optimizer, train
from metagen_jax.types import Array, Density, Key, Metrics, Params, Task

Optimizer = Literal["sgd", "adam"]
RULE = "rule"
NUM_SAMPLES = 5  # of the ELBO by which rates are chosen
Score = Callable[[Params, Key, Task], Array]
"""(adapted parameters, key, task) -> how good they are on its query [], larger is better."""


class Rule(NamedTuple):
    """A way to take gradient steps."""

    optimizer: Optimizer
    rate: float
    players: tuple[str, ...] | None = None  # those that move; None for all that fine-tuning may move

    def __str__(self) -> str:
        who = "all weights" if self.players is None else " and ".join(self.players)
        return f"{self.optimizer} on {who} at {self.rate:g}"


class Candidates(NamedTuple):
    """The rules that a baseline's own is chosen from."""

    fine_tuning: tuple[Rule, ...]
    scratch_sgd: tuple[Rule, ...]
    scratch_adam: tuple[Rule, ...]


LIKELIHOOD = Candidates(
    (
        *(Rule("sgd", rate) for rate in (3e-5, 1e-4, 3e-4, 1e-3)),
        *(Rule("adam", rate) for rate in (1e-4, 3e-4, 1e-3, 3e-3)),
        *(Rule("sgd", rate, ("prior",)) for rate in (1e-2, 3e-2, 1e-1)),
        *(Rule("adam", rate, ("modulation", "prior")) for rate in (3e-3, 1e-2, 3e-2)),
    ),
    tuple(Rule("sgd", rate) for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    tuple(Rule("adam", rate) for rate in (1e-3, 3e-3, 1e-2, 3e-2)),
)
"""For losses in nats summed over pixels."""


PER_PIXEL = 300.0  # times larger rates of descent for losses that are means over pixels


def likelihood_candidates(config: TrainConfig, role: build.Roles) -> Candidates:
    """Return the candidates for models with a likelihood: a VAE's, or the same fitted to the model's loss and parts.

    What is moved alone are the small parts that the model has; losses of flows are means over pixels, not sums.
    """
    if config.model == "vae":
        return LIKELIHOOD
    scale = PER_PIXEL if config.model == "flow" else 1.0

    def fitted(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        of_all = (rule for rule in rules if rule.players is None)
        return tuple(rule._replace(rate=scale * rule.rate) if rule.optimizer == "sgd" else rule for rule in of_all)

    small = tuple(player for player in role.moves if player in role.tuned)
    of_small = tuple(Rule("adam", rate, small) for rate in (3e-3, 1e-2, 3e-2)) if small else ()
    return Candidates(
        (*fitted(LIKELIHOOD.fine_tuning), *of_small), fitted(LIKELIHOOD.scratch_sgd), LIKELIHOOD.scratch_adam
    )


def game_candidates(config: TrainConfig, role: build.Roles) -> Candidates:
    """Return the candidates for games, whose losses are of the order of one but for an autoencoder's, in nats."""
    rates, of_sgd = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (0.1 if config.model == "aae" else 10)
    small = tuple(player for player in role.tuned if player.endswith(("_modulation", "_head")))
    of_small = (Rule("adam", rate, small) for rate in (3e-3, 1e-2, 3e-2)) if small else ()
    return Candidates(
        (*(Rule("sgd", of_sgd * rate) for rate in rates), *(Rule("adam", rate) for rate in rates), *of_small),
        tuple(Rule("sgd", of_sgd * rate) for rate in rates),
        tuple(Rule("adam", rate) for rate in rates[1:]),
    )


def joint_steps(config: TrainConfig) -> int:
    """Return how many joint steps take as many image gradients as the run's meta-steps did."""
    if config.learner == "joint":
        return config.outer.steps
    return math.ceil(config.outer.steps * image_gradients(config) / (config.shots[1] + config.query))


def image_gradients(config: TrainConfig) -> int:
    """Return the gradients of images that a meta-step takes, for each task and class, in first derivatives.

    K N + Q for K steps on N support and Q query images. A support that is read counts once; the query counts after
    every step in MAML++, not at all in Reptile; a teacher's steps are on both. Second derivatives, the products that
    an implicit gradient takes, and what a strategy measures to choose tasks are not counted.
    """
    steps, shots, query = given(config.inner.steps), config.shots[1], config.query
    if config.learner == "joint":
        return shots + query
    if config.learner == "reptile":
        return max(1, steps * shots)
    if config.learner == "regressed":
        return shots + config.inner.teacher_steps * (shots + query)
    if config.learner == "maml_plus_plus":
        return max(1, steps) * (shots + query)
    read = config.learner in HEADS or config.learner in ("amortised", "initialiser")
    return (steps + read) * shots + query


def train_joint(
    config: TrainConfig,
    family: TaskFamily,
    built: build.Built,
    num_steps: int,
    key: Key,
    *,
    begin: Params | None = None,
    on_chunk: Callable[[TrainState, Metrics], None] = lambda state, metrics: None,
) -> Params:
    """Train the model on the tasks' images as one batch and return its averaged parameters.

    Args:
        config: its outer section gives tasks, clipping, averaging, warm-up and `warm_start_rate`.
        family: the training tasks.
        built: the model.
        num_steps: of Adam; 0 returns what it would begin with.
        key: of the initial weights and of the run.
        begin: parameters to begin with; None for random ones.
        on_chunk: of `train`.

    Raises:
        Divergence: the loss lost finiteness.
    """
    if num_steps == 0:
        return first_joint(config, built, key) if begin is None else begin
    step, state = joint_run(config, family, built, num_steps, key, begin=begin)
    return train(step, state, family.data, num_steps, on_chunk=on_chunk).average


def first_joint(config: TrainConfig, built: build.Built, key: Key) -> Params:
    """Return the random parameters that joint training begins with."""
    return build.learner(joint_config(config), built).init(jax.random.split(key)[0])


def joint_run(
    config: TrainConfig,
    family: TaskFamily,
    built: build.Built,
    num_steps: int,
    key: Key,
    *,
    begin: Params | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Step, TrainState]:
    """Return the step and the first state of the run that `train_joint` takes to its end, with its arguments.

    The step's tasks are spread over the mesh, if there is one.
    """
    learner, state_key = build.learner(joint_config(config), built), jax.random.split(key)[1]
    begin = first_joint(config, built, jax.random.clone(key)) if begin is None else begin
    outer = config.outer
    optimizer = outer_optimizer(
        given(outer.warm_start_rate),
        num_steps,
        warmup=min(outer.warmup, num_steps - 1),
        clip=outer.clip,
        momentum=given(outer.momentum),
    )
    lasting = dataclasses.replace(config, outer=dataclasses.replace(outer, steps=num_steps))
    sampler = build.weighted(lasting, family)
    step = make_step(learner, family, sampler, optimizer, mesh=mesh, average_decay=outer.average_decay)
    return step, init_state(learner, sampler, optimizer, state_key, meta=jax.tree.map(jnp.copy, begin))


def joint_config(config: TrainConfig) -> TrainConfig:
    """Return the configuration of joint training of the same model on the same tasks."""
    return dataclasses.replace(config, learner="joint", inner=dataclasses.replace(config.inner, rates="fixed"))


def stepper(config: TrainConfig, built: build.Built, num_steps: int) -> MetaLearner:
    """Return ordinary gradient steps as a learner: its meta-parameters are those of the model and a `Rule` as a player.

    What only meta-training gives a meaning to (a context vector and its maps) stays still; the sides of a game move as
    they do in the run. The rates are arguments of one program, so that many of them are tried at the price of one
    compilation.
    """
    role = build.roles(config, built)
    play = build.dynamics(config.adversarial, role)
    return joint(built.model, learned(_rule, player=RULE), num_steps, players=role.tuned, dynamics=play)


def with_rule(params: Params, rule: Rule) -> Params:
    """Return meta-parameters for `stepper`."""
    moves = params if rule.players is None else rule.players
    moving = {player: jnp.float32(rule.rate if player in moves else 0.0) for player in params}
    still = dict.fromkeys(params, jnp.float32(0.0))
    return {**params, RULE: {name: moving if name == rule.optimizer else still for name in get_args(Optimizer)}}


def elbo_score(density: Density, num_samples: int = NUM_SAMPLES) -> Score:
    """Return the function (params, key, task) -> mean ELBO of the task's query, nats per image."""
    estimate = bounds(density, num_samples)

    def score(params: Params, key: Key, task: Task) -> Array:
        elbo, _ = estimate(params, key, task.query.x)
        return (task.query.weight * elbo).sum() / task.query.weight.sum()

    return score


def chooser(
    learner: MetaLearner, family: TaskFamily, specs: Spec, key: Key, score: Score
) -> Callable[[Params, Sequence[Rule]], Rule]:
    """Return the function (params, candidates) -> the rule whose adapted parameters have the best mean score.

    Args:
        learner: of `stepper`.
        family: makes the tasks to choose by, which are not the test's.
        specs: [C, way] of those tasks.
        key: of the tasks; every candidate meets the same ones.
        score: (adapted parameters, key, task) -> a number, larger is better.

    Returns:
        The function. It never returns a rule that loses finiteness on any task, and raises `ValueError` if all do.
    """
    keys = jax.random.split(key, specs.shape[0])

    def one(meta: Params, data: Any, key: Key, spec: Spec) -> Array:
        make_key, adapt_key, query_key = jax.random.split(key, 3)
        task = family.make(data, make_key, spec)
        adapted, _ = learner.adapt(meta, adapt_key, task.support)
        return score(adapted, query_key, task)

    @jax.jit
    def mean_score(meta: Params, data: Any, keys: Key, specs: Spec) -> Array:
        return jax.lax.map(lambda pair: one(meta, data, *pair), (keys, specs), batch_size=8).mean()

    def choose(params: Params, candidates: Sequence[Rule]) -> Rule:
        metas = (with_rule(params, rule) for rule in candidates)
        scores = np.array([mean_score(meta, family.data, jax.random.clone(keys), specs) for meta in metas])
        if not np.isfinite(scores).any():
            raise ValueError(f"none of the {len(candidates)} rules stays finite on every task; lower their rates")
        return candidates[int(np.argmax(np.where(np.isfinite(scores), scores, -np.inf)))]

    return choose


def _rule(rates: Any) -> optax.GradientTransformation:
    """Return SGD and Adam added up, each with a rate for each player."""
    adam = optax.scale_by_adam()

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        direction, state = adam.update(updates, state, params)
        return {
            player: jax.tree.map(
                lambda g, d, player=player: -rates["sgd"][player] * g - rates["adam"][player] * d,
                updates[player],
                direction[player],
            )
            for player in updates
        }, state

    return optax.GradientTransformation(adam.init, update)
