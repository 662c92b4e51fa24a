"""Evaluation of few-shot generation as a function of the inner step, class by class, without leaks.

Each class of a split is one task or more: the support is drawn without replacement, the adaptation never sees the
query, and the likelihood of the query is estimated with the adapted parameters after 0, 1, 2, ... inner steps.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.metrics.exemplar import Exemplars, exemplar_log_likelihood
from metagen_jax.metrics.likelihood import bounds
from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.types import Array, Density, Examples, Key, Metrics, Params

Path = Callable[[Params, Key, Examples, int], tuple[Params, Metrics]]


class Curve(NamedTuple):
    """Likelihood per class and inner step, nats per image (larger is better)."""

    steps: np.ndarray  # [S] inner steps
    elbo: np.ndarray  # [C, S] means over the queries of a class
    iwae: np.ndarray  # [C, S]
    num_samples: int  # importance samples of iwae


Measure = Callable[[Params, Spec, Key, Callable[[int], None]], Curve]
"""(meta, specs [C, way], key, on_chunk) -> Curve; on_chunk is called with the number of tasks done."""


def adaptation_curves(
    path: Path,
    density: Density,
    family: TaskFamily,
    *,
    steps: Sequence[int],
    num_samples: int = 50,
    episodes: int = 1,
    task_chunk: int = 16,
) -> Measure:
    """Return the function that `adaptation_curve` describes; called again, it does not compile again.

    Raises:
        ValueError: no step, or a negative one.
    """
    chosen = np.asarray(sorted(set(steps)), np.int32)
    if not len(chosen) or chosen[0] < 0:
        raise ValueError(f"expected inner steps of at least 0, got {list(steps)}")
    estimate = bounds(density, num_samples, chunk=min(50, num_samples))

    def one(meta: Params, data: Any, key: Key, spec: Spec) -> tuple[Array, Array]:
        make_key, adapt_key, query_key = jax.random.split(key, 3)
        task = family.make(data, make_key, spec)
        params, _ = path(meta, adapt_key, task.support, int(chosen[-1]))
        params = jax.tree.map(lambda leaf: leaf[chosen], params)

        def at_step(params: Params) -> tuple[Array, Array]:
            elbo, iwae = estimate(params, jax.random.clone(query_key), task.query.x)
            weight = task.query.weight / task.query.weight.sum()
            return (weight * elbo).sum(), (weight * iwae).sum()

        return jax.lax.map(at_step, params)

    many = jax.jit(jax.vmap(one, in_axes=(None, None, 0, 0)))

    def measure(meta: Params, specs: Spec, key: Key, on_chunk: Callable[[int], None] = lambda done: None) -> Curve:
        elbo, iwae = map_tasks(many, meta, family.data, specs, key, episodes, task_chunk, on_chunk)
        return Curve(chosen, elbo, iwae, num_samples)

    return measure


def adaptation_curve(
    path: Path, density: Density, family: TaskFamily, meta: Params, specs: Spec, key: Key, **options: Any
) -> Curve:
    """Estimate the likelihood of held-out query images after each of `steps` inner steps.

    Args:
        path: of a learner: the adapter step by step.
        density: of the model.
        family: makes the tasks; its support and query sizes are the protocol's.
        meta: meta-parameters.
        specs: [C, way] int32, one description per class (or group of classes).
        key: task c and episode e have a key folded from their numbers, so two systems meet the same episodes.
        **options: of `adaptation_curves`: `steps`, the inner steps to report, in any range from 0; `num_samples`,
            importance samples per image, 1,000 for figures that are reported; `episodes` per class; `task_chunk`,
            tasks at a time.

    Returns:
        Per-class means over queries and episodes. A class whose adaptation diverged has NaN from there on.
    """
    return adaptation_curves(path, density, family, **options)(meta, specs, key, lambda done: None)


def exemplar_scores(
    exemplars: Exemplars, family: TaskFamily, specs: Spec, key: Key, *, episodes: int = 1, task_chunk: int = 64
) -> np.ndarray:
    """Return the copy baseline's log-likelihood per class [C] on the episodes that `adaptation_curve` would draw."""
    score = exemplar_log_likelihood(exemplars)

    def one(meta: Params, data: Any, key: Key, spec: Spec) -> Array:
        task = family.make(data, jax.random.split(key, 3)[0], spec)
        return (score(task.support, task.query.x) * task.query.weight).sum() / task.query.weight.sum()

    many = jax.jit(jax.vmap(lambda *a: (one(*a),), in_axes=(None, None, 0, 0)))
    return map_tasks(many, {}, family.data, specs, key, episodes, task_chunk, lambda done: None)[0]


def map_tasks(
    many: Callable[..., tuple[Array, ...]],
    meta: Params,
    data: Any,
    specs: Spec,
    key: Key,
    episodes: int,
    task_chunk: int,
    on_chunk: Callable[[int], None],
) -> list[np.ndarray]:
    """Map over classes x episodes, padded to whole chunks; return means over episodes, each [C, ...].

    Task c of episode e has the key folded from e * C + c, so every system meets the same episodes.
    """
    if episodes < 1 or task_chunk < 1:
        raise ValueError(f"expected at least one episode and one task a chunk, got {episodes}, {task_chunk}")
    num_classes = specs.shape[0]
    total = num_classes * episodes
    task_chunk = min(task_chunk, total)
    rows = np.arange(-(-total // task_chunk) * task_chunk) % total
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.asarray(rows))
    pieces = []
    for begin in range(0, len(rows), task_chunk):
        span = slice(begin, begin + task_chunk)
        pieces.append(jax.device_get(many(meta, data, keys[span], jnp.asarray(specs)[rows[span] % num_classes])))
        on_chunk(min(begin + task_chunk, total))
    stacked = [np.concatenate(parts)[:total] for parts in zip(*pieces, strict=True)]
    return [values.reshape(episodes, num_classes, *values.shape[1:]).mean(0) for values in stacked]
