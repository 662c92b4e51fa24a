"""Mixing real and generated data, on three levels; each is a function from families to a family.

| level   | function                 | what is random                               | where nothing is added   |
|---------|--------------------------|----------------------------------------------|--------------------------|
| task    | `mixed`, `mixture`       | tasks are generated with probability rho     | rho = 0: the real family |
| example | `with_variants`          | images become variants, with probability r   | r = 0: the family        |
| example | `with_generated_support` | `num` variants join every support image      | num = 0: the family      |
| pair    | `interpolated`           | two tasks are blended, lam ~ Beta(a, a)      | lam = 1: the first task  |

A variant is what a function `vary(params, key, x [N, *event]) -> x' [N, *event]` makes of images, another one of the
same class: `metagen_jax.latent.variants`, or affine maps, `lambda params, key, x: affine()(key, x)`. Its parameters and
the shares are in the family's data, so that they can change during training without a new program.

What was there draws with the keys that it would have had alone; what is added has keys of its own. They are folded
with large constants: `fold_in(key, i)` for a small i is the same key as `split(key, n)[i]`, which a family may use.

Sources: Antoniou, Storkey & Edwards, Data Augmentation Generative Adversarial Networks, 2017 (variants); Wang,
Girshick, Hebert & Hariharan, Low-Shot Learning from Imaginary Data, 2018 (generated support); Yao, Zhang & Finn,
Meta-Learning with Fewer Tasks through Task Interpolation, 2022 (pairs).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.tasks.family import TaskFamily
from metagen_jax.tasks.samplers import Sampler
from metagen_jax.types import Array, Examples, Key, Params, Task

Vary = Callable[[Any, Key, Array], Array]
"""(params, key, x [N, *event]) -> other images of the same classes [N, *event]."""
_SALT = 0x6D697800  # of the keys of what is added


class Mixed(NamedTuple):
    """The data of `mixed`."""

    real: Any
    generated: Any
    share: Array  # [] in [0, 1], probability of a generated task


class Varied(NamedTuple):
    """The data of `with_variants` and `with_generated_support`."""

    real: Any
    params: Any  # of what makes variants
    share: Array  # [] probability that an image is replaced; of a generated support, the weight of a variant


class Interpolated(NamedTuple):
    """The data of `interpolated`."""

    real: Any
    alpha: Array  # [] of the beta distribution


def mixed(real: TaskFamily, generated: TaskFamily, share: float | Array) -> TaskFamily:
    """Return the family whose tasks are generated with probability `share`, and real otherwise.

    Both tasks are made and one is taken, as `vmap` would have it anyway. With share 0 tasks are those of `real` under
    the same keys, bit for bit; `family._replace(data=family.data._replace(share=...))` changes the share.

    Args:
        real: a family.
        generated: another one, whose tasks have the same shapes.
        share: rho in [0, 1].

    Returns:
        A family whose data is `Mixed` and whose descriptions are {"real": ..., "generated": ..., "is_generated": bool}.

    Raises:
        ValueError: a share outside [0, 1], or tasks of other shapes.
    """
    _check_share(share)
    of_real, of_generated = (
        [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(tasks)]
        for tasks in (_task_of(real), _task_of(generated))
    )
    if of_real != of_generated:
        raise ValueError(
            f"real and generated tasks must have the same shapes, got {of_real} and {of_generated} for images, labels "
            "and weights of support and query; ask both families for the same ways, shots, queries and size of image"
        )

    def describe(data: Mixed, key: Key) -> Any:
        generated_key, share_key = _added_keys(key, data, 2)
        return {
            "real": real.describe(data.real, key),
            "generated": generated.describe(data.generated, generated_key),
            "is_generated": jax.random.uniform(share_key) < data.share,
        }

    def make(data: Mixed, key: Key, spec: Any) -> Task:
        (generated_key,) = _added_keys(key, data, 1)
        made = generated.make(data.generated, generated_key, spec["generated"])
        drawn = real.make(data.real, key, spec["real"])
        return jax.tree.map(lambda a, b: jnp.where(spec["is_generated"], a, b), made, drawn)

    return TaskFamily(Mixed(real.data, generated.data, jnp.float32(share)), describe, make)


def mixture(
    family: TaskFamily, num_tasks: int, *, weight: tuple[float, float] = (1.0, 1.0), over: int = 1000
) -> Sampler:
    """Draw tasks independently from a `mixed` family, generated ones with a weight that changes linearly.

        L = ((1 - rho) L_real + rho w L_generated) / ((1 - rho) + rho w),   w from weight[0] to weight[1] over `over`

    in expectation over large batches: in each, tasks have the weights 1 and w, divided by their sum, so that they sum
    to one and a meta-step is equally long throughout. Where all are generated and w is zero, they have equal weights.

    Args:
        family: of `mixed`, or a function of one that keeps its descriptions.
        num_tasks: T of a meta-step.
        weight: w of a generated task beside 1 of a real one, at the first meta-step and from meta-step `over` on.
        over: meta-steps of the way.

    Raises:
        ValueError: no task, a negative weight, no meta-step, or a family whose tasks are not marked as generated.
    """
    if num_tasks < 1 or over < 1 or min(weight) < 0:
        raise ValueError(
            f"expected at least one task and one meta-step, and weights of at least 0, got num_tasks={num_tasks}, "
            f"over={over}, weight={weight}"
        )
    spec = jax.eval_shape(family.describe, family.data, jax.random.key(0))
    if not isinstance(spec, dict) or "is_generated" not in spec:
        raise ValueError(f"expected a family of mixed(...), whose descriptions say is_generated, got {spec}")

    def propose(state: Array, data: Any, key: Key, meta: Params) -> tuple[Any, Array]:
        del meta
        specs = jax.vmap(family.describe, in_axes=(None, 0))(data, jax.random.split(key, num_tasks))
        done = jnp.clip(state / over, 0.0, 1.0)
        of_generated = weight[0] + (weight[1] - weight[0]) * done
        weights = jnp.where(specs["is_generated"], of_generated, 1.0)
        total = weights.sum()
        return specs, jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 1.0 / num_tasks)

    return Sampler(lambda key: jnp.zeros((), jnp.int32), propose, lambda state, specs, scores: state + 1)


def with_variants(
    family: TaskFamily, vary: Vary, params: Any, share: float | Array, *, which: Sequence[str] = ("query",)
) -> TaskFamily:
    """Return the family in which each image is replaced by a variant of itself with probability `share`.

    Labels, weights and padding stay. To choose between a variant and an affine image instead of the image itself,
    apply it twice, first with affine maps and share 1. Costs one variant of every image of the sets chosen.

    Args:
        family: any.
        vary: makes variants.
        params: its parameters, kept in the family's data.
        share: r in [0, 1]; 0 gives the family's tasks bit for bit.
        which: sets whose images are replaced, of "support" and "query".

    Raises:
        ValueError: a share outside [0, 1], another set, or variants of another shape than the images.
    """
    _check_share(share)
    if isinstance(which, str) or not which or set(which) - {"support", "query"}:
        raise ValueError(f"expected a sequence of 'support' and 'query', got which={which!r}")
    for name in which:
        _check_variants(vary, params, getattr(_task_of(family), name).x)

    def replaced(data: Varied, key: Key, examples: Examples) -> Examples:
        vary_key, share_key = jax.random.split(key)
        chosen = jax.random.uniform(share_key, examples.weight.shape) < data.share
        chosen &= examples.weight > 0
        made = vary(data.params, vary_key, examples.x)
        return examples._replace(x=jnp.where(chosen.reshape(-1, *(1,) * (made.ndim - 1)), made, examples.x))

    def make(data: Varied, key: Key, spec: Any) -> Task:
        task = family.make(data.real, key, spec)
        keys = dict(zip(("support", "query"), _added_keys(key, data, 2), strict=True))
        return task._replace(**{name: replaced(data, keys[name], getattr(task, name)) for name in which})

    return TaskFamily(
        Varied(family.data, params, jnp.float32(share)), lambda data, key: family.describe(data.real, key), make
    )


def with_generated_support(
    family: TaskFamily, vary: Vary, params: Any, num: int, *, weight: float | Array = 1.0
) -> TaskFamily:
    """Return the family whose support has `num` variants beside every image, with its label and weight times `weight`.

    The variants of an image follow it, so that a support ordered by class remains so: [N, *event] becomes
    [N * (1 + num), *event]. A variant of padding is padding. num = 0 is the family.

    Raises:
        ValueError: a negative number or weight, or variants of another shape than the images.
    """
    if num < 0 or (isinstance(weight, (int, float)) and weight < 0):
        raise ValueError(f"expected num >= 0 variants and a weight >= 0, got num={num}, weight={weight}")
    _check_variants(vary, params, _task_of(family).support.x)

    def beside(first: Array, others: Array) -> Array:  # [N, ...] and [num, N, ...] -> [N (1 + num), ...]
        joined = jnp.concatenate([first[None], others]).swapaxes(0, 1)
        return joined.reshape(-1, *first.shape[1:])

    def make(data: Varied, key: Key, spec: Any) -> Task:
        task = family.make(data.real, key, spec)
        if not num:
            return task
        support, (vary_key,) = task.support, _added_keys(key, data, 1)
        used = (support.weight > 0).reshape(-1, *(1,) * (support.x.ndim - 1))
        made = vary(data.params, vary_key, jnp.concatenate([support.x] * num)).reshape(num, *support.x.shape)
        made = jnp.where(used[None], made, support.x[None])
        joined = Examples(
            beside(support.x, made),
            jnp.repeat(support.label, 1 + num),
            beside(support.weight, jnp.stack([support.weight * data.share] * num)),
        )
        return task._replace(support=joined)

    return TaskFamily(
        Varied(family.data, params, jnp.float32(weight)), lambda data, key: family.describe(data.real, key), make
    )


def interpolated(family: TaskFamily, alpha: float | Array = 2.0, *, way: int | None = None) -> TaskFamily:
    """Return the family of tasks between two tasks: new classes out of pairs of classes.

        x_n = lam x1_n[c] + (1 - lam) x2_n[pi(c)],   label c,   lam ~ Beta(alpha, alpha),   pi a random permutation

    for support and query alike: example n of class c meets example n of class pi(c). An example counts as the product
    of both weights, so that padding stays padding. The first task has the keys that it would have had alone.

    Args:
        family: whose tasks are ordered by class, with equally many examples of each, as `episodes` makes them.
        alpha: 2 for blends near the middle, less than 1 for tasks near either end.
        way: classes of a task; None for the length of the family's descriptions.

    Returns:
        A family whose descriptions are {"first": ..., "second": ...}.

    Raises:
        ValueError: an alpha that is not positive, a number of ways that is not known, or tasks not ordered by class.

    Source: Yao, Zhang & Finn, 2022, section 4, for tasks whose labels mean something within a task only. Departure:
    images are blended, where the article blends hidden features of a random layer; so it serves generation too.
    """
    if isinstance(alpha, (int, float)) and not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    spec = jax.eval_shape(family.describe, family.data, jax.random.key(0))
    if way is None and getattr(spec, "ndim", 0) != 1:
        raise ValueError(f"expected descriptions [way], got {spec}; say how many classes a task has, way=...")
    ways = spec.shape[0] if way is None else way
    _check_order(family, ways)

    def describe(data: Interpolated, key: Key) -> Any:
        (second_key,) = _added_keys(key, data, 1)
        return {"first": family.describe(data.real, key), "second": family.describe(data.real, second_key)}

    def make(data: Interpolated, key: Key, spec: Any) -> Task:
        second_key, share_key, pairing_key = _added_keys(key, data, 3)
        first = family.make(data.real, key, spec["first"])
        second = family.make(data.real, second_key, spec["second"])
        share = jax.random.beta(share_key, data.alpha, data.alpha)
        return blended(first, second, share, jax.random.permutation(pairing_key, ways))

    return TaskFamily(Interpolated(family.data, jnp.float32(alpha)), describe, make)


def blended(first: Task, second: Task, share: Array | float, pairing: Array) -> Task:
    """Return share * first + (1 - share) * second, class c of the first with class pairing[c] of the second.

    Example:
        >>> def task(values):
        ...     examples = Examples(jnp.array(values), jnp.arange(2), jnp.ones(2))
        ...     return Task(examples, examples)
        >>> blended(task([0.0, 1.0]), task([10.0, 20.0]), 0.5, jnp.array([1, 0])).query.x.tolist()
        [10.0, 5.5]
    """

    def paired(leaf: Array) -> Array:
        return leaf.reshape(pairing.shape[0], -1, *leaf.shape[1:])[pairing].reshape(leaf.shape)

    def of(one: Examples, other: Examples) -> Examples:
        x = share * one.x + (1 - share) * paired(other.x)
        return one._replace(x=x, weight=one.weight * paired(other.weight))

    return Task(of(first.support, second.support), of(first.query, second.query))


def _added_keys(key: Key, data: Any, num: int) -> Key:
    """Return `num` keys that neither the family inside nor another layer around it draws with."""
    depth, inside = 0, data
    while isinstance(inside, (Mixed, Varied, Interpolated)):
        depth, inside = depth + 1, inside.real
    return jax.random.split(jax.random.fold_in(key, _SALT + depth), num)


def _task_of(family: TaskFamily) -> Task:
    """Return the shapes of a family's tasks."""

    def one(data: Any, key: Key) -> Task:
        describe_key, make_key = jax.random.split(key)
        return family.make(data, make_key, family.describe(data, describe_key))

    return jax.eval_shape(one, family.data, jax.random.key(0))


def _check_share(share: float | Array) -> None:
    if isinstance(share, (int, float)) and not 0 <= share <= 1:
        raise ValueError(f"the share of generated data must be in [0, 1], got {share}")


def _check_variants(vary: Vary, params: Any, x: Array) -> None:
    made = jax.eval_shape(vary, params, jax.random.key(0), x)
    if (made.shape, made.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"variants must be of the images' shape and type, {x.dtype}{list(x.shape)}, got "
            f"{made.dtype}{list(made.shape)}"
        )


def _check_order(family: TaskFamily, way: int) -> None:
    """Refuse tasks that are not [class 0, ..., class 0, class 1, ...] with equal counts, by making one."""
    describe_key, make_key = jax.random.split(jax.random.key(0))
    task = family.make(family.data, make_key, family.describe(family.data, describe_key))
    for name, examples in zip(task._fields, task, strict=True):
        total = examples.label.shape[0]
        if total % way or examples.label.tolist() != [c for c in range(way) for _ in range(total // way)]:
            raise ValueError(
                f"interpolation needs tasks ordered by class with equally many examples of each of {way} classes, as "
                f"`episodes` makes them; this family's {name} has the labels {examples.label.tolist()}"
            )
