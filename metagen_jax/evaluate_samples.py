"""Evaluation of few-shot generation by its samples, as a function of the inner step: for models without a likelihood.

Each class of a split is adapted to; after 0, 1, 2, ... inner steps new images are drawn and compared with real images
of the class that the adaptation never saw, in the feature spaces of two frozen critics, which were trained on training
classes only (`metagen_jax.critics`):

| measure         | of      | better | what                                                                     |
|-----------------|---------|--------|--------------------------------------------------------------------------|
| kid             | a class | small  | kernel distance of its samples to its real images, classifier features   |
| kid_contrastive | a class | small  | the same in contrastive features                                         |
| recognisability | a class | large  | the nearest of 20 classes' exemplars (real, not given) is the own one    |
| diversity       | a class | real's | standard deviation of contrastive features within the class              |
| memorisation    | a class | 1      | distance to the support over that of real images to it; 0 for copies     |
| copies          | a class | 0.01   | share of samples nearer to the support than 99 % of real images          |
| discrimination  | a class | ln 2   | cross-entropy of a real/generated discriminator that never saw the class |
| fid, ...        | all     | small  | Frechet distance of all samples to all real images, either space         |
| precision, ...  | all     | large  | precision, recall, density, coverage, 5 neighbours, classifier features  |
| inception_score | all     | large  | exp(E KL(p(y given x), p(y))) over training classes                      |

A pooled distance does not ask whether a sample is of the right class, so a model that ignores its support can do well
in it. The distance within each class, averaged over classes, asks just that, and is unbiased with as few images as
there are.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.critics import Critics, class_log_probabilities, classifier_features, contrastive_features
from metagen_jax.evaluate import Path, map_tasks
from metagen_jax.metrics.discrimination import discrimination
from metagen_jax.metrics.frechet import frechet_distance
from metagen_jax.metrics.interval import over_classes
from metagen_jax.metrics.kernel import kernel_distances
from metagen_jax.metrics.memorisation import memorisation
from metagen_jax.metrics.prdc import prdc_rows
from metagen_jax.metrics.recognition import diversity, inception_score, recognisability
from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.types import Array, Key, Params, Task

SPACES = ("classifier", "contrastive")
PER_CLASS = (
    "kid",
    "kid_contrastive",
    "recognisability",
    "diversity",
    "memorisation",
    "copies",
    "discrimination",
)
POOLED = ("fid", "fid_contrastive", "precision", "recall", "density", "coverage", "inception_score")
WAY = 20  # of recognisability, or as many classes as there are
JUDGED = 4  # samples of a class whose class probabilities are kept for the inception-style score


class Drawn(NamedTuple):
    """Features of everything that is measured; C classes, S inner steps, M samples, Q real images, N support images."""

    steps: np.ndarray  # [S] inner steps
    made: dict[str, np.ndarray]  # space -> [C, S, M, D]
    real: dict[str, np.ndarray]  # space -> [C, Q, D], of images outside the support
    support: dict[str, np.ndarray]  # space -> [C, N, D]
    log_probabilities: np.ndarray  # [C, S, JUDGED, K] of training classes, for the first samples
    real_log_probabilities: np.ndarray  # [C, JUDGED, K] for the first real images (fewer if there are)
    support_log_probabilities: np.ndarray  # [C, JUDGED, K] for the first support images (fewer if there are)


Draw = Callable[[Params, Critics, Spec, Key, Callable[[int], None]], Drawn]
"""(meta, critics, specs [C, way], key, on_chunk) -> Drawn; on_chunk is called with the number of tasks done."""


def drawer(
    path: Path,
    sample: Callable[[Params, Key, int], Array],
    family: TaskFamily,
    *,
    steps: Sequence[int],
    num_samples: int = 16,
    task_chunk: int = 16,
) -> Draw:
    """Return the function that adapts to each class, draws from it after each of `steps` inner steps, and looks at all.

    The same latent noise is used at every step, and every system meets the same episodes.

    Args:
        path: of a learner: the adapter step by step.
        sample: of a model, (params, key, num) -> [num, H, W, C] in [0, 1].
        family: makes the tasks; its query is what the samples are compared with, and must have no padding.
        steps: inner steps to report, in any range from 0.
        num_samples: M, of each class at each step.
        task_chunk: tasks at a time.

    Raises:
        ValueError: no step, a negative one, or fewer than two samples.
    """
    chosen = np.asarray(sorted(set(steps)), np.int32)
    if not len(chosen) or chosen[0] < 0 or num_samples < 2:
        raise ValueError(f"expected inner steps of at least 0 and 2 samples, got {list(steps)} and {num_samples}")

    def one(both: Params, data: Any, key: Key, spec: Spec) -> tuple[Array, ...]:
        make_key, adapt_key, sample_key = jax.random.split(key, 3)
        task = family.make(data, make_key, spec)
        params, _ = path(both["meta"], adapt_key, task.support, int(chosen[-1]))
        params = jax.tree.map(lambda leaf: leaf[chosen], params)

        def look(x: Array) -> tuple[Array, Array]:
            return classifier_features(both["classifier"], x), contrastive_features(both["contrastive"], x)

        def at_step(params: Params) -> tuple[Array, ...]:
            images = sample(params, jax.random.clone(sample_key), num_samples)
            return *look(images), class_log_probabilities(both["classifier"], images[:JUDGED])

        judged = (class_log_probabilities(both["classifier"], each.x[:JUDGED]) for each in (task.query, task.support))
        return *jax.lax.map(at_step, params), *look(task.query.x), *look(task.support.x), *judged

    many = jax.jit(jax.vmap(one, in_axes=(None, None, 0, 0)))

    def draw(
        meta: Params, critics: Critics, specs: Spec, key: Key, on_chunk: Callable[[int], None] = lambda done: None
    ) -> Drawn:
        both = {"meta": meta, "classifier": critics.classifier, "contrastive": critics.contrastive}
        values = map_tasks(many, both, family.data, specs, key, 1, task_chunk, on_chunk)
        made, real, support = (dict(zip(SPACES, values[first : first + 2], strict=True)) for first in (0, 3, 5))
        return Drawn(chosen, made, real, support, values[2], *values[7:])

    return draw


def kernel_score(
    sample: Callable[[Params, Key, int], Array], critics: Critics, num_samples: int = 16
) -> Callable[[Params, Key, Task], Array]:
    """Return the function (adapted parameters, key, task) -> minus the kernel distance, to choose settings by."""

    def mean_kernel(x: Array, y: Array, same: bool) -> Array:
        kernel = (x @ y.T / x.shape[1] + 1) ** 3
        count = x.shape[0] * (y.shape[0] - same)
        return (kernel.sum() - same * jnp.trace(kernel)) / count

    def score(params: Params, key: Key, task: Task) -> Array:
        made = classifier_features(critics.classifier, sample(params, key, num_samples))
        real = classifier_features(critics.classifier, task.query.x)
        return 2 * mean_kernel(real, made, False) - mean_kernel(real, real, True) - mean_kernel(made, made, True)

    return score


def measure(drawn: Drawn) -> dict[str, np.ndarray]:
    """Return each measure of PER_CLASS, [C, S]; NaN for a class whose samples are not finite at that step."""
    number, S = len(drawn.real["classifier"]), len(drawn.steps)
    found = {name: np.full((number, S), np.nan) for name in PER_CLASS}
    for index in range(S):
        made = {space: drawn.made[space][:, index] for space in SPACES}
        kept = np.logical_and.reduce([np.isfinite(made[space]).all((1, 2)) for space in SPACES])
        if kept.sum() < 2:
            continue
        values = _of_classes(
            *({space: features[space][kept] for space in SPACES} for features in (made, drawn.real, drawn.support))
        )
        for name, value in values.items():
            found[name][kept, index] = value
    return found


def measure_pooled(drawn: Drawn, *, num_resamples: int = 20, seed: int = 0) -> dict[str, np.ndarray]:
    """Return each measure of POOLED with its 95 % interval over classes, [S, 3]: value, low, high.

    All classes whose samples are finite at a step are pooled. Precision, recall, density and coverage are means over
    images, so their intervals are those of class means, given where the real and the made images lie. Distances and
    scores are not; theirs are 1.96 standard deviations of `num_resamples` bootstrap resamples of the classes.
    """
    found = {name: np.full((len(drawn.steps), 3), np.nan) for name in POOLED}
    rng = np.random.default_rng(seed)
    for index in range(len(drawn.steps)):
        made = {space: drawn.made[space][:, index] for space in SPACES}
        kept = np.flatnonzero(np.logical_and.reduce([np.isfinite(made[space]).all((1, 2)) for space in SPACES]))
        if len(kept) < 2:
            continue
        resamples = [kept, *(rng.choice(kept, len(kept)) for _ in range(num_resamples))]
        log_p = drawn.log_probabilities[:, index]
        values = {
            "fid": [_frechet(drawn.real["classifier"], made["classifier"], classes) for classes in resamples],
            "fid_contrastive": [_frechet(drawn.real["contrastive"], made["contrastive"], c) for c in resamples],
            "inception_score": [inception_score(_rows(log_p[classes])) for classes in resamples],
        }
        for name, (value, *others) in values.items():
            half = 1.96 * np.std(others, ddof=1)
            found[name][index] = value, value - half, value + half
        rows = prdc_rows(_rows(drawn.real["classifier"][kept]), _rows(made["classifier"][kept]))
        for name, of_images in rows._asdict().items():
            found[name][index] = over_classes(of_images.reshape(len(kept), -1).mean(1))
    return found


def copying(drawn: Drawn) -> Drawn:
    """Return what a model that repeats its support would have drawn: the copy baseline."""
    count = drawn.made["classifier"].shape[2]

    def repeat(support: np.ndarray) -> np.ndarray:
        return support[:, None, np.arange(count) % support.shape[1]]

    made = {space: repeat(drawn.support[space]) for space in SPACES}
    return drawn._replace(steps=np.array([0]), made=made, log_probabilities=drawn.support_log_probabilities[:, None])


def real_halves(drawn: Drawn) -> Drawn:
    """Return real images in the place of samples, half of those of each class against the other half: the floor.

    Pooled distances depend on how many images there are, and here there are half as many; those within a class do not.
    """
    half = drawn.real["classifier"].shape[1] // 2
    return drawn._replace(
        steps=np.array([0]),
        made={space: drawn.real[space][:, None, :half] for space in SPACES},
        real={space: drawn.real[space][:, half:] for space in SPACES},
        log_probabilities=drawn.real_log_probabilities[:, None],
    )


def _of_classes(made: Any, real: Any, support: Any) -> dict[str, np.ndarray]:
    exemplars = real["classifier"][:, 0]
    memory = memorisation(support["contrastive"], made["contrastive"], real["contrastive"])
    return {
        "kid": kernel_distances(real["classifier"], made["classifier"]),
        "kid_contrastive": kernel_distances(real["contrastive"], made["contrastive"]),
        "recognisability": recognisability(exemplars, made["classifier"], way=min(WAY, len(exemplars))),
        "diversity": diversity(made["contrastive"]),
        "memorisation": memory.ratio,
        "copies": memory.copies,
        "discrimination": discrimination(real["classifier"], made["classifier"]),
    }


def _frechet(real: np.ndarray, made: np.ndarray, classes: np.ndarray) -> float:
    return frechet_distance(_rows(real[classes]), _rows(made[classes]))


def _rows(features: np.ndarray) -> np.ndarray:
    return features.reshape(-1, features.shape[-1])
