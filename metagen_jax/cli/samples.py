"""The evaluation of models without a likelihood: their samples, over inner steps, beside every baseline."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from metagen_jax import baselines, build, report
from metagen_jax.cli.critics import critics_for
from metagen_jax.cli.protocol import (
    STRIP,
    TEST,
    Evaluate,
    adaptation_strip,
    baseline_systems,
    header,
    num_query,
    num_steps,
    tasks_of,
    write,
)
from metagen_jax.cli.runs import Finished, load_data
from metagen_jax.cli.summary import FINE_TUNED, cell, interval
from metagen_jax.evaluate_samples import (
    PER_CLASS,
    Draw,
    Drawn,
    copying,
    drawer,
    kernel_score,
    measure,
    measure_pooled,
    real_halves,
)
from metagen_jax.meta.learners import MetaLearner
from metagen_jax.progress import Progress
from metagen_jax.report import Line

COPY, REAL = "copy of the support", "real (half against half)"
SHOWN = ("kid", "recognisability", "diversity", "memorisation", "discrimination")
POOLED_SHOWN = ("fid", "precision", "recall", "density", "coverage", "inception_score")
PANELS = {
    "kid": "kernel distance within the class (lower is better)",
    "recognisability": "recognisability (higher is better)",
    "diversity": "diversity (as of real images)",
    "memorisation": "memorisation ratio (1: new images, 0: copies)",
    "discrimination": "cross-entropy of a discriminator (0.69: alike)",
}


def evaluate_samples(finished: Finished, options: Evaluate) -> dict[str, Any]:
    """Evaluate, write evaluation.json, evaluation.md and the figures, and return what is in the first."""
    config, data = finished.config, load_data(finished)
    if options.shots < 1:
        raise ValueError(
            f"samples are compared with the support too, which needs --shots of at least 1, got {options.shots}"
        )
    if options.num_images < 6:  # as many as five neighbours need
        raise ValueError(f"--num-images must be at least 6, got {options.num_images}")
    query = num_query(finished, options)
    if query < 4:  # two halves of real images are compared with each other
        raise ValueError(
            f"samples are compared with at least 4 held-out images of each class, got {query}; use --query"
        )
    family = tasks_of(finished, data, options)
    specs = build.specs(data, options.part, options.classes)
    if len(specs) < 2 or len(specs) * (query // 2) <= 5:
        raise ValueError(
            f"intervals over classes, and five neighbours among half of the real images, need more than {len(specs)} "
            f"{options.part} classes of {query} held-out images; use more --classes or a larger --query"
        )
    critics = critics_for(data, options.critics)
    key = jax.random.key(config.seed)
    name = f"{config.learner} ({config.model})"
    trained = num_steps(config)
    systems = [(name, finished.learner, finished.meta, 16)]
    notes: dict[str, str] = {}
    if options.baselines:
        score = kernel_score(finished.built.model.sample, critics)
        candidates = baselines.game_candidates(config, build.roles(config, finished.built))
        others, notes = baseline_systems(finished, data, options, candidates, score)
        systems += [tuple(system) for system in others]  # type: ignore[misc]
    programs: dict[int, Draw] = {}
    drawn: dict[str, Drawn] = {}
    for system, learner, meta, chunk in systems:
        draw = programs.setdefault(id(learner), _drawer(learner, finished, family, options, chunk))
        with Progress(system, specs.shape[0], unit="task") as progress:
            drawn[system] = draw(meta, critics, specs, jax.random.fold_in(key, TEST), progress.update)
    drawn |= {REAL: real_halves(drawn[name]), COPY: copying(drawn[name])}
    measured = {system: measure(seen) for system, seen in drawn.items()}
    summaries = {system: summary_of(drawn[system], measured[system]) for system in drawn}
    references = {system: summaries.pop(system) for system in (REAL, COPY)}
    result: dict[str, Any] = {
        "protocol": header(
            finished,
            options,
            int(specs.shape[0]),
            "means with 95 % intervals over classes",
            images=options.num_images,
            critics={name: critics.header[name] for name in ("weights_sha256", "config")},
        ),
        "systems": summaries,
        "references": references,
        "improvements": _improvements(name, {system: measured[system] for system in summaries}, trained),
        "notes": notes,
    }
    result = write(finished, result, markdown)
    figure = report.measure_curves(panels(result), trained)
    report.save(figure, finished.run.figures / "adaptation_curve.png")
    strip = adaptation_strip(finished, family, data, options.part, jax.random.fold_in(key, STRIP))
    report.save(strip, finished.run.figures / "adaptation_strip.png")
    return result


def summary_of(drawn: Drawn, per_class: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return every measure of a system at every step, with intervals over classes."""
    entry: dict[str, Any] = {"steps": drawn.steps}
    entry |= {name: [interval(column) for column in per_class[name].T] for name in PER_CLASS}
    lost = np.isnan(per_class["kid"]).sum(0).tolist()  # classes that no pooled measure has
    pooled = {
        name: [
            dict(zip(("mean", "low", "high"), row, strict=True)) | {"num_nonfinite": left_out}
            for row, left_out in zip(values.tolist(), lost, strict=True)
        ]
        for name, values in measure_pooled(drawn).items()
    }
    return entry | {"pooled": pooled}


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of an evaluation: step 0, the trained number, twice that, and copies and real images."""
    protocol = result["protocol"]
    trained = protocol["trained_steps"]
    pieces = [
        f"{protocol['classes']} {protocol['part']} classes of {protocol['data']}, {protocol['shots']} shots, "
        f"{protocol['images']} images made and {protocol['query']} real ones held out for each class, "
        f"{protocol['meta_steps']} meta-steps; {protocol['unit']}\n"
    ]
    rows = [
        (f"{name}, step {step}", entry, entry["steps"].index(step))
        for name, entry in result["systems"].items()
        for step in sorted({0, trained, 2 * trained})
        if step in entry["steps"]
    ]
    rows += [(name, entry, 0) for name, entry in result["references"].items()]
    of_classes = [[name, *(cell(entry[m][at], 3) for m in SHOWN)] for name, entry, at in rows]
    pooled = [[name, *(_short(entry["pooled"][m][at]) for m in POOLED_SHOWN)] for name, entry, at in rows]
    pieces.append(report.table(["within each class", *SHOWN], of_classes) + "\n")
    pieces.append(report.table(["all classes pooled", *POOLED_SHOWN], pooled) + "\n")
    better = [[other, *(cell(entry, 3) for entry in found.values())] for other, found in result["improvements"].items()]
    header = [f"after {trained} steps the run is smaller, paired, than", "kid", "kid_contrastive"]
    pieces.append(report.table(header, better) + "\n")
    pieces += [f"{name}: {note}  " for name, note in result["notes"].items()]
    return "\n".join(pieces) + "\n"


def panels(result: dict[str, Any]) -> dict[str, list[Line]]:
    """Return what each panel of the figure shows, the run first."""
    everything = {**result["systems"], **result["references"]}
    return {
        title: [
            Line(name, entry["steps"], *([at[field] for at in entry[measured]] for field in ("mean", "low", "high")))
            for name, entry in everything.items()
        ]
        for measured, title in PANELS.items()
    }


def _drawer(learner: MetaLearner, finished: Finished, family: Any, options: Evaluate, chunk: int) -> Any:
    steps = range(2 * num_steps(finished.config) + 1)
    sample = finished.built.model.sample
    return drawer(learner.path, sample, family, steps=steps, num_samples=options.num_images, task_chunk=chunk)


def _improvements(name: str, measured: dict[str, dict[str, np.ndarray]], trained: int) -> dict[str, Any]:
    """Return by how much the run's kernel distances are smaller, paired by class, after the trained number of steps."""
    run = measured[name]
    compared = {"its own step 0": (run, 0)}
    compared |= {other: (values, trained) for other, values in measured.items() if other != name}
    if FINE_TUNED in measured:
        compared["joint, not adapted"] = (measured[FINE_TUNED], 0)
    return {
        other: {m: interval(values[m][:, step] - run[m][:, trained]) for m in ("kid", "kid_contrastive")}
        for other, (values, step) in compared.items()
    }


def _short(entry: dict[str, Any]) -> str:
    """Return a pooled measure as text, with half its interval."""
    if entry["mean"] is None:
        return "-"
    left_out = f" (without {entry['num_nonfinite']} classes)" if entry["num_nonfinite"] else ""
    return f"{entry['mean']:.3g} ± {(entry['high'] - entry['low']) / 2:.1g}{left_out}"
