"""`metagen evaluate RUN`: classes never seen, over inner steps, beside every baseline, with intervals over classes.

What is measured depends on the model: its likelihood where it has one, its samples where it has none, the error of its
translations where it translates, and its accuracy where it classifies.
"""

from typing import Any

from metagen_jax import build
from metagen_jax.cli.labels import evaluate_labels
from metagen_jax.cli.likelihood import evaluate_likelihood
from metagen_jax.cli.protocol import Evaluate, check_options
from metagen_jax.cli.runs import Finished, load
from metagen_jax.cli.samples import evaluate_samples
from metagen_jax.cli.translation import evaluate_translation
from metagen_jax.models.classifier import Classifier
from metagen_jax.models.cycle import CycleGan

__all__ = ["Evaluate", "evaluate_run", "run"]


def run(arguments: Evaluate) -> None:
    """Carry out the command."""
    finished = load(arguments.run)
    result = evaluate_run(finished, arguments)
    print((finished.run.path / "evaluation.md").read_text(encoding="utf-8"))
    systems, classes = len(result["systems"]), result["protocol"]["classes"]
    print(f"{systems} systems, {classes} classes; figures in {finished.run.figures}")


def evaluate_run(finished: Finished, options: Evaluate) -> dict[str, Any]:
    """Evaluate, write evaluation.json, evaluation.md and the figures, and return what is in the first."""
    check_options(options, finished.config.model)
    if isinstance(finished.built, build.WithDensity):
        return evaluate_likelihood(finished, finished.built.density, options)
    if isinstance(finished.built, CycleGan):
        return evaluate_translation(finished, finished.built, options)
    if isinstance(finished.built, Classifier):
        return evaluate_labels(finished, finished.built, options)
    return evaluate_samples(finished, options)
