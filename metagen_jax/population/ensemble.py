"""Members that work together: the mixture of what they predict, and which of them it should have.

    p(y | x, S) = sum_p w_p p_p(y | x, S),   each member adapted to the support S by itself

In logarithms it is a log-sum-exp over members, which is the same formula for labels and for images. Where a member only
has a bound, log p_p >= elbo_p, the mixture has the bound log sum_p w_p exp(elbo_p), since every term is one.

It costs P adaptations a task. Sources: Lakshminarayanan, Pritzel & Blundell, Simple and Scalable Predictive Uncertainty
Estimation using Deep Ensembles, 2017 (means of probabilities); Caruana, Niculescu-Mizil, Crew & Ksikes, Ensemble
Selection from Libraries of Models, 2004 (selection). Shape letters: P members, N examples, C classes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metagen_jax.population.members import Traits, num_members
from metagen_jax.population.racing import survivors
from metagen_jax.types import Array, Key, Params, Task

Answer = Callable[[Traits, Params, Key, Task], Array]
"""(traits, meta, key, task) of one member, adapted -> log p [...]: [N, C] of the query's labels, or [N] of images."""


def log_mixture(log_p: Array, weights: Array | None = None) -> Array:
    """Return log sum_p w_p exp(log_p_p), [...].

    Args:
        log_p: [P, ...], in nats; those of a member with weight zero may be anything, NaN too.
        weights: [P], not negative; they are taken over their sum. None for equal ones.

    Example:
        >>> mixed = log_mixture(jnp.log(jnp.array([[0.2, 0.8], [0.6, 0.4]])))
        >>> [round(float(p), 3) for p in jnp.exp(mixed)]
        [0.4, 0.6]
    """
    weights = jnp.ones(log_p.shape[0], log_p.dtype) if weights is None else weights
    share = (weights / weights.sum()).reshape(-1, *(1,) * (log_p.ndim - 1))
    used = jnp.where(share > 0, log_p, -jnp.inf)
    largest = jax.lax.stop_gradient(used.max(0, keepdims=True))
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    total = jnp.where(share > 0, share * jnp.exp(jnp.where(share > 0, log_p, 0.0) - largest), 0.0).sum(0)
    return jnp.log(total) + largest[0]


def ensemble(answer: Answer) -> Callable[..., Array]:
    """Return the function (traits [P], metas [P], key, task, weights=None) -> log p [...] of the mixture.

    Args:
        answer: adapts one member to a task's support and gives log p of its query, for instance

            def answer(traits, meta, key, task):
                params, _ = make(traits).learner.adapt(meta, key, task.support)
                return jax.nn.log_softmax(built(traits).logits(params, task.query.x))

    Returns:
        The function; member p adapts with the key split(key, P)[p].
    """
    answers = each(answer)

    def mixed(traits: Traits, metas: Params, key: Key, task: Task, weights: Array | None = None) -> Array:
        return log_mixture(answers(traits, metas, key, task), weights)

    return mixed


def each(answer: Answer) -> Callable[[Traits, Params, Key, Task], Array]:
    """Return the function (traits [P], metas [P], key, task) -> log p [P, ...] of all members."""

    def answers(traits: Traits, metas: Params, key: Key, task: Task) -> Array:
        keys = jax.random.split(key, num_members(metas))
        return jax.vmap(answer, in_axes=(0, 0, 0, None))(traits, metas, keys, task)

    return answers


def greedy_selection(log_p: Array, num_rounds: int) -> Array:
    """Return weights [P] of an ensemble, chosen on validation data: each round adds the member that helps most.

        w <- w + e_p,   p = argmax_p mean_n log(sum_q (w + e_p)_q exp(log_p_qn))

    Members may be added again, and none is taken out; the first round takes the best.

    Args:
        log_p: [P, N], in nats: each member's log-likelihood of what was observed (of true labels, or of images).
        num_rounds: members that are added; the weights are multiples of 1 / num_rounds and sum to one.

    Returns:
        Weights. A member with a likelihood that is not a number gets none, unless none is without.

    Raises:
        ValueError: no round, or likelihoods of another shape than [P, N].

    Source: Caruana, Niculescu-Mizil, Crew & Ksikes, 2004, section 2 (selection with replacement). Departure:
    the measure is the log-likelihood; there any, and ensembles of random subsets are averaged.
    """
    if num_rounds < 1 or log_p.ndim != 2:
        raise ValueError(f"expected at least one round and likelihoods [P, N], got {num_rounds} and {log_p.shape}")

    def add(carry: tuple[Array, Array], _: Any) -> tuple[tuple[Array, Array], None]:
        total, counts = carry
        tried = jnp.logaddexp(jnp.broadcast_to(total[None], log_p.shape), log_p)
        best = survivors(tried.mean(1), 1)[0]
        return (tried[best], counts.at[best].add(1.0)), None

    begin = (jnp.full(log_p.shape[1], -jnp.inf, log_p.dtype), jnp.zeros(log_p.shape[0], log_p.dtype))
    (_, counts), _ = jax.lax.scan(add, begin, length=num_rounds)
    return counts / num_rounds
