"""Competitive strategies: the tasks that the learner does worst at.

| strategy      | what it prefers                                     | cost beside uniform                        |
|---------------|-----------------------------------------------------|--------------------------------------------|
| score_softmax | candidates of large loss, a rule for `chosen`       | C adaptations and query losses a meta-step |
| hard_buffer   | tasks of large loss, again                          | none                                       |
| class_pairs   | classes that were hard together                     | a matrix [n, n]                            |
| worst_case    | groups of classes of large loss, by weights         | none                                       |

The last three are samplers of their own and learn from the scores of the tasks, so they cost no pass over candidates.
Where hard tasks are hard because their labels are wrong, all of them prefer what teaches nothing: mix with uniform
draws. Shape letters: C candidates, T tasks, n classes, G groups, B places of a buffer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.strategies.candidates import Rule, Statistics
from metagen_jax.strategies.drawing import normalised, onto_simplex, standardised, without_replacement
from metagen_jax.tasks.family import TaskFamily
from metagen_jax.tasks.samplers import Sampler, uniform
from metagen_jax.types import Array, Key, Params


def score_softmax(temperature: float = 1.0, *, mix: float = 0.2, reweigh: bool = False) -> Rule:
    """Return the rule that draws tasks, without replacement, by the softmax of their losses.

        p_i = (1 - mix) softmax_i((loss_i - mean) / (deviation * temperature)) + mix / C

    Args:
        temperature: in deviations of the candidates' losses; infinite for uniform draws, towards 0 for the T hardest.
        mix: share of uniform draws, in [0, 1].
        reweigh: weights in inverse proportion to how likely a task was drawn, in the place of equal weights, so that
            the direction is that of uniform draws in the limit of many tasks; of T tasks, dividing by the sum of the
            weights leaves a bias of order 1/T towards hard ones, and of one task nothing is corrected.

    Raises:
        ValueError: a temperature that is not positive, a share outside [0, 1].

    Source: Loshchilov & Hutter, Online Batch Selection for Faster Training of Neural Networks, 2016, for draws by loss;
    the weights are those of `without_replacement`, normalised.
    """
    if not temperature > 0 or not 0 <= mix <= 1:
        raise ValueError(f"expected a positive temperature and mix in [0, 1], got {temperature} and {mix}")

    def choose(state: Any, key: Key, statistics: Statistics, num_tasks: int) -> tuple[Array, Array]:
        del state
        log_p = jax.nn.log_softmax(standardised(statistics.loss) / temperature)
        equal = jnp.full_like(log_p, -np.log(log_p.shape[0]))
        with np.errstate(divide="ignore"):  # all of one kind: a share of zero
            log_p = jnp.logaddexp(float(np.log1p(-mix)) + log_p, float(np.log(mix)) + equal)
        indices, inclusion = without_replacement(key, log_p, num_tasks)
        return indices, normalised(1 / inclusion) if reweigh else jnp.full(num_tasks, 1 / num_tasks)

    return Rule(lambda key: (), choose)


class Hardest(NamedTuple):
    """The tasks of largest loss so far, the hardest first."""

    specs: Any  # [B, ...]
    loss: Array  # [B], -inf where there is none yet
    seen: Array  # [] int32, meta-steps taken


def hard_buffer(family: TaskFamily, num_tasks: int, *, capacity: int = 50, warmup: int = 32) -> Sampler:
    """Return the sampler that takes half of each batch from the hardest tasks so far, the rest as it comes.

    A task that is taken again has its loss renewed, so it leaves the buffer once it is learned. A task is known by its
    description: with `pinned` the same examples come again, otherwise the same classes with other examples.

    Args:
        family: whose descriptions are any tree of arrays.
        num_tasks: T.
        capacity: B, at least T // 2.
        warmup: meta-steps of uniform draws at the beginning, in which the buffer fills.

    Raises:
        ValueError: fewer than two tasks, too small a buffer, a negative warm-up.

    Source: the online hard-task sampler among those of Kumar, Deleu & Bengio, The Effect of Diversity in
    Meta-Learning, 2023.
    """
    half = num_tasks // 2
    if half < 1 or capacity < half or warmup < 0:
        raise ValueError(f"expected two tasks or more, capacity >= {half}, warmup >= 0: {num_tasks=}, {capacity=}")
    every = uniform(family, num_tasks)

    def init(key: Key) -> Hardest:
        spec = jax.eval_shape(family.describe, family.data, key)
        empty = jax.tree.map(lambda leaf: jnp.zeros((capacity, *leaf.shape), leaf.dtype), spec)
        return Hardest(empty, jnp.full(capacity, -jnp.inf, float), jnp.zeros((), jnp.int32))

    def propose(state: Hardest, data: Any, key: Key, meta: Params) -> tuple[Any, Array]:
        fresh, weights = every.propose((), data, key, meta)
        again = (state.seen >= warmup) & (state.loss[:half] > -jnp.inf)
        again = jnp.pad(again, (0, num_tasks - half))

        def mixed(old: Array, new: Array) -> Array:
            kept = jnp.concatenate([old[:half], new[half:]])
            return jnp.where(again.reshape(-1, *(1,) * (new.ndim - 1)), kept, new)

        return jax.tree.map(mixed, state.specs, fresh), weights

    def update(state: Hardest, specs: Any, scores: Array) -> Hardest:
        scores = jnp.where(jnp.isfinite(scores), scores, -jnp.inf)
        twice = jnp.tril(_equal(specs, specs), -1).any(1)
        old = jnp.where(_equal(state.specs, specs).any(1), -jnp.inf, state.loss)
        loss, order = jax.lax.top_k(jnp.concatenate([old, jnp.where(twice, -jnp.inf, scores)]), capacity)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[order], state.specs, specs)
        return Hardest(both, loss, state.seen + 1)

    return Sampler(init, propose, update)


class Pairs(NamedTuple):
    """How hard classes are together."""

    log_weight: Array  # [n, n] symmetric
    usual: Array  # [] what a task of average difficulty scores, in [0, 1]
    seen: Array  # [] int32, meta-steps taken


def class_pairs(
    family: TaskFamily, num_tasks: int, num_classes: int, *, rate: float = 1.0, forget: float = 0.5, mean: float = 0.9
) -> Sampler:
    """Return the sampler that puts classes together by weights W of pairs, learned from the scores of tasks.

        first two classes   p(i, j) ~ W_ij,   each next   p(k) ~ prod_{j chosen} W_jk
        after a task        W_ij <- W_ij^forget exp(rate (e - usual)) for all its pairs,   e = 1 - exp(-loss)

    1 - e is the geometric mean of the probability that the queries' own classes get, and `usual` the running mean of e,
    so that an average task leaves pairs as those never met. The classes of a task come in random order.

    Args:
        family: whose descriptions are [way] class ids from 0 to n - 1, all different.
        num_tasks: T.
        num_classes: n.
        rate: how much one task changes; negative for easy pairs (the cooperative counterpart).
        forget: power of the old weight, in [0, 1): the smaller, the sooner it is forgotten.
        mean: decay of the running mean, in [0, 1).

    Raises:
        ValueError: descriptions that are not class ids, fewer classes than ways, a number out of range.

    Source: Liu, Wang, Sahoo, Fang, Zhang & Hoi, Adaptive Task Sampling for Meta-Learning, 2020 (greedy class-pair
    sampling). Departures: a task's loss is attributed to all its pairs alike, in the place of its confusion matrix,
    and is compared with the running mean.
    """
    way = _num_classes_of(family)
    if not 2 <= way <= num_classes or num_tasks < 1:
        raise ValueError(f"expected 2 <= way <= classes and a task, got {way=}, {num_classes=}, {num_tasks=}")
    if not (0 <= forget < 1 and 0 <= mean < 1) or rate == 0:
        raise ValueError(f"expected forget and mean in [0, 1) and a rate that is not zero: {forget=}, {mean=}, {rate=}")

    def init(key: Key) -> Pairs:
        return Pairs(jnp.zeros((num_classes, num_classes)), jnp.zeros(()), jnp.zeros((), jnp.int32))

    def propose(state: Pairs, data: Any, key: Key, meta: Params) -> tuple[Array, Array]:
        del data, meta
        different = ~jnp.eye(num_classes, dtype=bool)
        of_first = jax.scipy.special.logsumexp(state.log_weight, axis=1, where=different)

        def one(key: Key) -> Array:
            first_key, others_key, order_key = jax.random.split(key, 3)
            first = jax.random.categorical(first_key, of_first)

            def add(carry: tuple[Array, Array], noise: Array) -> tuple[tuple[Array, Array], Array]:
                product, taken = carry
                nxt = jnp.argmax(jnp.where(taken, -jnp.inf, product + noise))
                return (product + state.log_weight[nxt], taken.at[nxt].set(True)), nxt

            begin = (state.log_weight[first], jnp.zeros(num_classes, bool).at[first].set(True))
            _, others = jax.lax.scan(add, begin, jax.random.gumbel(others_key, (way - 1, num_classes)))
            return jax.random.permutation(order_key, jnp.append(first, others)).astype(jnp.int32)

        return jax.vmap(one)(jax.random.split(key, num_tasks)), jnp.full(num_tasks, 1 / num_tasks)

    def update(state: Pairs, specs: Array, scores: Array) -> Pairs:
        finite = jnp.isfinite(scores)
        wrong = jnp.where(finite, -jnp.expm1(-jnp.where(finite, scores, 0.0)), 0.0)
        average = wrong.sum() / jnp.maximum(finite.sum(), 1)
        decay = jnp.where(finite.any(), jnp.where(state.seen == 0, 0.0, mean), 1.0)
        usual = decay * state.usual + (1 - decay) * average

        def learn(log_weight: Array, task: tuple[Array, Array, Array]) -> tuple[Array, None]:
            spec, wrong, finite = task
            rows, columns = spec[:, None], spec[None]
            new = forget * log_weight[rows, columns] + rate * (wrong - usual)
            return jnp.where(finite, log_weight.at[rows, columns].set(new), log_weight), None

        log_weight, _ = jax.lax.scan(learn, state.log_weight, (specs, wrong, finite))
        return Pairs(log_weight, usual, state.seen + finite.any())

    return Sampler(init, propose, update)


def worst_case(family: TaskFamily, num_tasks: int, group_of_class: Sequence[int], *, rate: float = 0.01) -> Sampler:
    """Return the sampler that weighs tasks towards the groups of classes that do worst.

        min over theta, max over p in the simplex of sum_g p_g loss_g:
        w_t ~ sum_g r_tg p_g / q_g,   p <- P(p + rate (1/T) sum_t r_tg loss_t / q_g),   P onto the simplex

    r_tg is the share of the classes of task t that belong to group g, q_g that of all classes, which is where p begins;
    tasks are drawn as the family describes them. Losses of the size of one and the default rate move p by a
    hundredth a meta-step.

    Args:
        family: whose descriptions are [way] class ids.
        num_tasks: T.
        group_of_class: [n] ids of groups, from 0 to G - 1, each of them the group of some class.
        rate: of the ascent in p.

    Raises:
        ValueError: descriptions that are not class ids, groups that are not numbered from 0, a rate not positive.

    Source: Collins, Mokhtari & Shakkottai, Task-Robust Model-Agnostic Meta-Learning, 2020, algorithm 1. Departures: a
    task that mixes groups counts for each by its share; weights of a batch sum to one.
    """
    groups = np.asarray(group_of_class)
    _num_classes_of(family)
    if groups.ndim != 1 or not np.array_equal(np.unique(groups), np.arange(groups.max(initial=-1) + 1)):
        raise ValueError(f"expected the group of each class [n], numbered from 0 without a gap, got {group_of_class}")
    if not len(groups) or not rate > 0:
        raise ValueError(f"expected the groups of one class or more, and a positive rate, got {len(groups)}, {rate}")
    share = np.bincount(groups) / len(groups)
    every = uniform(family, num_tasks)

    def shares(specs: Array) -> Array:
        return jax.nn.one_hot(jnp.asarray(groups)[specs], len(share)).mean(1) / jnp.asarray(share, jnp.float32)[None]

    def propose(state: Array, data: Any, key: Key, meta: Params) -> tuple[Array, Array]:
        specs, _ = every.propose((), data, key, meta)
        return specs, normalised(shares(specs) @ state)

    def update(state: Array, specs: Array, scores: Array) -> Array:
        finite = jnp.isfinite(scores)
        climb = jnp.where(finite, scores, 0.0) @ shares(specs) / jnp.maximum(finite.sum(), 1)
        return onto_simplex(state + rate * climb)

    return Sampler(lambda key: jnp.asarray(share, jnp.float32), propose, update)


def _equal(a: Any, b: Any) -> Array:
    """Return which descriptions of a [A, ...] and b [B, ...] agree in everything [A, B]."""

    def leaf(a: Array, b: Array) -> Array:
        return (a.reshape(a.shape[0], 1, -1) == b.reshape(1, b.shape[0], -1)).all(2)

    return jnp.stack(jax.tree.leaves(jax.tree.map(leaf, a, b))).all(0)


def _num_classes_of(family: TaskFamily) -> int:
    """Return the ways of a family whose descriptions are class ids."""
    spec = jax.eval_shape(family.describe, family.data, jax.random.key(0))
    if not hasattr(spec, "shape") or spec.ndim != 1 or not jnp.issubdtype(spec.dtype, jnp.integer):
        raise ValueError(f"expected a family whose descriptions are class ids [way], got {spec}")
    return spec.shape[0]
