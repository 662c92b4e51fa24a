"""Persistent evolution strategies: meta-gradients of long inner loops from short pieces of them, without bias.

An inner loop of H steps is cut into truncations of K. Particles, pairs of inner loops in the middle of their way, are
carried from one truncation to the next; in each, psi is perturbed anew, and the loss of the truncation is held against
*all* perturbations since the particle began,

    F_p = (L_p(+) - L_p(-)) / (2 s) xi_p,   xi = e_1 + ... + e_t,   e_j ~ N(0, I),   psi of the pair: psi +- s e_t

L is the mean loss over the K steps. Evolution strategies on truncations alone, with e_t in the place of xi, leave out
what psi did to the state that the truncation began with, and favour rules that are greedy.

Source: Vicol, Metz & Sohl-Dickstein, Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent
Evolution Strategies, 2021, algorithm 2.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from metagen_jax.adapt.learned_rules import LearnedRule
from metagen_jax.adapt.twins import Twins, following, init_rules, rule_players
from metagen_jax.adapt.unroll import inner_loop
from metagen_jax.dynamics import Dynamics
from metagen_jax.games import vector_field
from metagen_jax.meta.evolution import followed_losses, moved, normal_like, scaled
from metagen_jax.types import Array, Examples, Game, Key, Metrics, Model, Params, Task

Judged = Literal["query", "support"]


class Particles(NamedTuple):
    """Pairs of inner loops on one task, all of one age; M pairs."""

    inner: Any  # [M, 2, ...] moving parameters, and the states of the rule, of psi + s e and psi - s e
    accumulated: Params  # [M, ...] xi: the perturbations since the pairs began, in units of s
    age: Array  # [] int32, inner steps taken


class Persistent(NamedTuple):
    """Persistent evolution strategies on one task; `metagen_jax.persistent` carries many from step to step."""

    init: Callable[[Key], Params]  # meta-parameters
    begin: Callable[[Params, Key, Examples], Particles]  # (meta, key, support) -> pairs of age 0
    advance: Callable[[Params, Key, Key, Particles, Task], tuple[Params, Particles, Metrics]]
    """(meta, key, noise_key, particles, task) -> (directions, particles, metrics); key is that of `begin`."""
    horizon: int  # H, inner steps after which a particle begins again
    truncation: int  # K, inner steps of one `advance`


def persistent_evolution(
    model: Model,
    rule: LearnedRule | Twins,
    truncation: int,
    horizon: int,
    *,
    players: Sequence[str] | None = None,
    dynamics: Dynamics = vector_field,
    fresh: bool = False,
    judge: Game | None = None,
    judged_on: Judged = "query",
    sigma: float = 0.01,
    num_pairs: int = 1,
) -> Persistent:
    """Return what meta-trains a rule by persistent evolution strategies.

    Both members of a pair meet the same noise and begin at the same parameters, different pairs differ in both. What
    learns is the rule alone, and its memory must begin the same whatever psi is.

    Args:
        model: init, game and sample.
        rule: of `coordinate_mlp`, `coordinate_lstm`, or `twins` of them.
        truncation: K, inner steps of a meta-step.
        horizon: H, inner steps of a whole inner loop, a multiple of K.
        players: those that move inside; None for all.
        dynamics: how they move, as in `maml`.
        fresh: begin at a new `model.init`, as in `learned_optimizer`; else at the meta-parameters, which stay.
        judge: what the steps are judged by, a game; None for the model's own.
        judged_on: the examples they are judged on after each step, of the "query" or the "support".
        sigma: s, the standard deviation of a perturbation.
        num_pairs: M, of particles on each task.

    Raises:
        ValueError: a horizon that is no multiple of the truncation, sigma not positive, no pair, unknown examples.
    """
    if truncation < 1 or horizon < truncation or horizon % truncation:
        raise ValueError(f"expected a horizon that is a multiple of the truncation, got {horizon} and {truncation}")
    if not sigma > 0 or num_pairs < 1:
        raise ValueError(f"expected sigma > 0 and at least one pair, got sigma={sigma}, num_pairs={num_pairs}")
    if judged_on not in get_args(Judged):
        raise ValueError(f"judged_on must be one of {get_args(Judged)}, got {judged_on!r}")
    names = rule_players(rule)
    start = following(rule, jax.random.key(0))
    fields = dynamics(model.game, players)
    turns = (fields,) if callable(fields) else tuple(fields)
    judged = model.game if judge is None else judge

    def init(key: Key) -> Params:
        model_key, rule_key = jax.random.split(key)
        return {**({} if fresh else model.init(model_key)), **init_rules(rule, rule_key)}

    def loop(meta: Params, key: Key, support: Examples) -> tuple[Params, Any, Any]:
        init_key, loop_key = jax.random.split(key)
        begin = {**meta, **model.init(init_key)} if fresh else meta
        return inner_loop(turns, turns, start, begin, loop_key, support, first_order=True)

    def begin(meta: Params, key: Key, support: Examples) -> Particles:
        def pair(key: Key) -> Any:
            loop_key, _ = jax.random.split(key)  # as in `advance`
            _, inner, _ = loop(meta, loop_key, support)
            return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), inner)

        zeros = {name: jax.tree.map(lambda leaf: jnp.zeros((num_pairs, *leaf.shape)), meta[name]) for name in names}
        return Particles(jax.vmap(pair)(jax.random.split(key, num_pairs)), zeros, jnp.zeros((), jnp.int32))

    def advance(
        meta: Params, key: Key, noise_key: Key, particles: Particles, task: Task
    ) -> tuple[Params, Particles, Metrics]:
        batch = task.query if judged_on == "query" else task.support

        def pair(key: Key, noise_key: Key, inner: Any, accumulated: Params) -> Any:
            loop_key, judge_key = jax.random.split(key)
            noise = normal_like(noise_key, {name: meta[name] for name in names})

            def one(sign: Array, inner: Any) -> Any:
                params, _, step = loop({**meta, **moved(meta, noise, sign * sigma)}, loop_key, task.support)

                def judged_step(inner: Any, index: Array) -> Any:
                    inner, _ = step(inner, index)
                    losses, metrics = judged({**params, **inner[0]}, jax.random.fold_in(judge_key, index), batch)
                    followed, named = followed_losses(losses, names)
                    return inner, (followed, {**metrics, **named})

                inner, told = jax.lax.scan(judged_step, inner, particles.age + jnp.arange(truncation))
                return inner, *jax.tree.map(lambda leaf: leaf.mean(0), told)

            inner, losses, metrics = jax.vmap(one)(jnp.array([1.0, -1.0]), inner)
            accumulated = jax.tree.map(jnp.add, accumulated, noise)
            slopes = {name: (loss[0] - loss[1]) / (2 * sigma) for name, loss in losses.items()}
            return scaled(accumulated, slopes), inner, accumulated, metrics

        keys, noise_keys = jax.random.split(key, num_pairs), jax.random.split(noise_key, num_pairs)
        directions, inner, accumulated, metrics = jax.vmap(pair)(
            keys, noise_keys, particles.inner, particles.accumulated
        )
        following_particles = Particles(inner, accumulated, particles.age + truncation)
        metrics = jax.tree.map(lambda leaf: leaf.mean((0, 1)), metrics)
        return jax.tree.map(lambda leaf: leaf.mean(0), directions), following_particles, metrics

    return Persistent(init, begin, advance, horizon, truncation)
