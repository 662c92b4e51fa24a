"""The evaluation of models with a likelihood: ELBO and IWAE over inner steps, beside every baseline."""

from typing import Any

import jax
import numpy as np

from metagen_jax import baselines, build, report
from metagen_jax.build import Parts
from metagen_jax.cli.protocol import (
    COPY,
    STRIP,
    TEST,
    Evaluate,
    System,
    adaptation_strip,
    baseline_systems,
    header,
    num_steps,
    tasks_of,
    write,
)
from metagen_jax.cli.runs import Finished, load_data
from metagen_jax.cli.summary import FINE_TUNED, NOT_ADAPTED, above, advantages, interval, intervals, lines, markdown
from metagen_jax.evaluate import Curve, Measure, adaptation_curves, exemplar_scores
from metagen_jax.metrics.exemplar import fit_exemplars
from metagen_jax.metrics.likelihood import draws, label
from metagen_jax.progress import Progress
from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.types import Density, Key

CURVE_SAMPLES = 50  # importance samples at most, where every inner step is evaluated
COPY_EPISODES = 64  # by which the copy baseline is fitted
COPY_SHOTS = 5  # of the episodes that the copy baseline's two constants are fitted on


def evaluate_likelihood(finished: Finished, density: Density, options: Evaluate) -> dict[str, Any]:
    """Evaluate, write evaluation.json, evaluation.md and the figures, and return what is in the first."""
    if options.num_samples < 1 or (options.num_samples > CURVE_SAMPLES and options.num_samples % CURVE_SAMPLES):
        raise ValueError(f"--num-samples must be at most {CURVE_SAMPLES}, or a multiple, got {options.num_samples}")
    config, data = finished.config, load_data(finished)
    family = tasks_of(finished, data, options)
    specs = build.specs(data, options.part, options.classes)
    key = jax.random.key(config.seed)
    name = f"{config.learner} ({config.model})"
    systems, notes = [System(name, finished.learner, finished.meta, 16)], dict[str, str]()
    if options.baselines:
        score = baselines.elbo_score(density)
        candidates = baselines.likelihood_candidates(config, build.roles(config, finished.built))
        others, notes = baseline_systems(finished, data, options, candidates, score)
        systems += others
    curves, tables, programs = {}, {}, dict[Any, Measure]()
    for system in systems:
        test_key = jax.random.fold_in(key, TEST)
        curves[system.name], tables[system.name] = _measure(
            system, density, family, specs, test_key, num_steps(config), options, programs
        )
    copy = _copy(data, finished, family, specs, key) if options.baselines else None
    result: dict[str, Any] = {
        "protocol": header(
            finished,
            options,
            int(specs.shape[0]),
            "nats per image, larger is better; mean and 95 % bootstrap interval over classes",
            num_samples=draws(density, options.num_samples),
            curve_samples=min(draws(density, options.num_samples), CURVE_SAMPLES),
            likelihood=label(density, draws(density, options.num_samples)),
        ),
        "systems": {name: {"curve": intervals(curves[name]), "table": intervals(tables[name])} for name in curves},
        "reference": NOT_ADAPTED if FINE_TUNED in curves else f"{name} at step 0",
        "above": {other: above(curve, curves.get(FINE_TUNED, curves[name])) for other, curve in curves.items()},
        "advantages": advantages(name, tables, num_steps(config)),
        "copy": None if copy is None else interval(copy),
        "notes": notes,
    }
    result = write(finished, result, markdown)
    report.save(
        report.adaptation_curve(*lines(result), num_steps(config), reference=result["reference"]),
        finished.run.figures / "adaptation_curve.png",
    )
    strip = adaptation_strip(finished, family, data, options.part, jax.random.fold_in(key, STRIP))
    report.save(strip, finished.run.figures / "adaptation_strip.png")
    return result


def _measure(
    system: System,
    density: Density,
    family: TaskFamily,
    specs: Spec,
    key: Key,
    trained: int,
    options: Evaluate,
    programs: dict[Any, Measure],
) -> tuple[Curve, Curve]:
    """Return the curve at every step to twice the trained number, and the one at 0, once and twice that number."""
    most = draws(density, options.num_samples)
    few = min(most, CURVE_SAMPLES)

    def curve(steps: tuple[int, ...], num_samples: int) -> Curve:
        which = (id(system.learner), steps, num_samples)  # systems that share a learner share a compiled program
        programs[which] = measure = programs.get(which) or adaptation_curves(
            system.learner.path,
            density,
            family,
            steps=steps,
            num_samples=num_samples,
            task_chunk=system.task_chunk,
        )
        with Progress(system.name, specs.shape[0], unit="task") as progress:
            return measure(system.meta, specs, jax.random.clone(key), progress.update)

    everywhere = curve(tuple(range(2 * trained + 1)), few)
    if most == few:
        at = np.array(sorted({0, trained, 2 * trained}))
        return everywhere, Curve(at, everywhere.elbo[:, at], everywhere.iwae[:, at], few)
    return everywhere, curve((0, trained, 2 * trained), most)


def _copy(data: Parts, finished: Finished, family: TaskFamily, specs: Spec, key: Key) -> np.ndarray | None:
    """Return the copy baseline's log-likelihood per class, None for images with greys, for which it is not defined."""
    if not data.binary:
        return None
    train = build.family(data, "train", COPY_SHOTS, finished.config.query)
    keys = jax.random.split(jax.random.fold_in(key, COPY), COPY_EPISODES)

    def draw(bank: Any, key: Key) -> Any:
        spec_key, make_key = jax.random.split(key)
        return train.make(bank, make_key, train.describe(bank, spec_key))

    tasks = jax.jit(jax.vmap(draw, in_axes=(None, 0)))(train.data, keys)
    if data.images is None:
        images = np.asarray(tasks.query.x * 255, np.uint8).reshape(-1, *data.event)
    else:
        images = build.take(data, "train").images
    exemplars = fit_exemplars(images, tasks.support, tasks.query)
    return exemplar_scores(exemplars, family, specs, jax.random.fold_in(key, TEST))
