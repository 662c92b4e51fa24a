"""The evaluation of few-shot classifiers: accuracy on random tasks of unseen classes, over inner steps."""

from typing import Any

import jax
import numpy as np

from metagen_jax import build, report
from metagen_jax.cli.protocol import SCRATCH, TEST, Evaluate, header, num_query, write
from metagen_jax.cli.runs import Finished, load_data
from metagen_jax.config import given
from metagen_jax.evaluate_labels import Accuracy, accuracy_curve
from metagen_jax.meta.learners import MetaLearner, amortised
from metagen_jax.models.classifier import Classifier, classifier
from metagen_jax.models.heads import prototypes
from metagen_jax.models.networks import Network
from metagen_jax.progress import Progress
from metagen_jax.report import Line
from metagen_jax.types import Params

UNTRAINED, PIXELS = "the same, untrained", "class means of pixels"


def evaluate_labels(finished: Finished, built: Classifier, options: Evaluate) -> dict[str, Any]:
    """Evaluate, write evaluation.json, evaluation.md and the figure, and return what is in the first."""
    config, data = finished.config, load_data(finished)
    way, trained = given(config.way), given(config.inner.steps)
    query = num_query(finished, options)
    family = build.family(data, options.part, options.shots, query, model=config.model, way=way)
    key = jax.random.fold_in(jax.random.key(config.seed), TEST)
    steps = tuple(range(2 * trained + 1))
    name = f"{config.learner} ({config.model})"
    systems: dict[str, tuple[MetaLearner, Classifier, Params]] = {name: (finished.learner, built, finished.meta)}
    if options.baselines:
        random = jax.jit(finished.learner.init)(jax.random.fold_in(jax.random.key(config.seed), SCRATCH))
        systems |= {UNTRAINED: (finished.learner, built, random), PIXELS: _pixels(data.event, way)}
    found: dict[str, Accuracy] = {}
    for system, (learner, model, meta) in systems.items():
        at = (0,) if system == PIXELS else steps
        measure = accuracy_curve(learner.path, model.model, family, steps=at)
        with Progress(system, options.tasks, unit="task") as progress:
            found[system] = measure(meta, jax.random.clone(key), options.tasks, progress.update)
    result: dict[str, Any] = {
        "protocol": header(
            finished,
            options,
            len(build.take(data, options.part).count),
            "accuracy in %; 95 % intervals, 1.96 standard errors over tasks",
            trained_steps=trained,
            way=way,
            tasks=options.tasks,
            rotations=config.data.rotations,
            transductive=False,
        ),
        "systems": {system: _curve(accuracy) for system, accuracy in found.items()},
        "gains": {
            other: _interval(found[name].per_task[:, trained] - accuracy.per_task[:, min(trained, accuracy.steps[-1])])
            for other, accuracy in found.items()
            if other != name
        },
    }
    result = write(finished, result, markdown)
    report.save(report.measure_curves(panels(result), trained), finished.run.figures / "adaptation_curve.png")
    return result


def markdown(result: dict[str, Any]) -> str:
    """Return the table of an evaluation."""
    protocol, trained = result["protocol"], result["protocol"]["trained_steps"]
    chosen = sorted({0, trained, 2 * trained})
    rows = []
    for system, curve in result["systems"].items():
        at = dict(zip(curve["steps"], curve["accuracy"], strict=True))
        gain = result["gains"].get(system)
        cells = [_text(at[step]) if step in at else "" for step in chosen]
        rows.append([system, *cells, _text(gain) if gain else ""])
    what = (
        f"{protocol['way']}-way {protocol['shots']}-shot, {protocol['tasks']} tasks of {protocol['query']} queries a "
        f"class from {protocol['classes']} {protocol['part']} classes of {protocol['data']}, upright"
        f"{' (training classes also turned)' if protocol['rotations'] else ''}; non-transductive; "
        f"{protocol['meta_steps']} meta-steps; {protocol['unit']}\n\n"
    )
    columns = ["accuracy", *(f"step {step}" for step in chosen), "run is above it by"]
    return what + report.table(columns, rows) + "\n"


def panels(result: dict[str, Any]) -> dict[str, list[Line]]:
    """Return what the figure shows."""

    def line(name: str, curve: dict[str, Any]) -> Line:
        return Line(name, curve["steps"], *([e[field] for e in curve["accuracy"]] for field in ("mean", "low", "high")))

    return {"accuracy on the queries, %": [line(name, curve) for name, curve in result["systems"].items()]}


def _curve(accuracy: Accuracy) -> dict[str, Any]:
    return {"steps": accuracy.steps, "accuracy": [_interval(column) for column in accuracy.per_task.T]}


def _interval(per_task: np.ndarray) -> dict[str, Any]:
    """Return mean, low and high in %, all None where a task is not finite."""
    one = Accuracy(np.zeros(1), 100 * per_task[:, None])
    mean, half = float(one.mean[0]), float(one.half_width[0])
    lost = int((~np.isfinite(per_task)).sum())
    if lost:
        return {"mean": None, "low": None, "high": None, "num_nonfinite": lost}
    return {"mean": mean, "low": mean - half, "high": mean + half, "num_nonfinite": 0}


def _text(entry: dict[str, Any]) -> str:
    if entry["mean"] is None:
        return f"diverged ({entry['num_nonfinite']} tasks)"
    return f"{entry['mean']:.1f} ± {entry['high'] - entry['mean']:.1f}"


def _pixels(event: tuple[int, int, int], way: int) -> tuple[MetaLearner, Classifier, Params]:
    """Return the classifier that learns nothing: squared distances of pixels to the class means."""
    height, width, channels = event
    flatten = Network(lambda key: {}, lambda params, x: x.reshape(x.shape[0], -1))
    built = classifier(flatten, height * width * channels, way, prototypes())
    return amortised(built.model, built.embed), built, built.model.init(jax.random.key(0))
