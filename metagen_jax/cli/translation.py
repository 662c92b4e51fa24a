"""The evaluation of translators: the error against the true translation of a drawing, over inner steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax import baselines, build, report
from metagen_jax.cli.protocol import (
    STRIP_TASKS,
    TEST,
    Evaluate,
    baseline_systems,
    header,
    num_query,
    num_steps,
    tasks_of,
    write,
)
from metagen_jax.cli.runs import Finished, load_data
from metagen_jax.cli.summary import FINE_TUNED, cell, interval
from metagen_jax.evaluate import map_tasks
from metagen_jax.models.cycle import CycleGan
from metagen_jax.progress import Progress
from metagen_jax.report import Column, Line
from metagen_jax.tasks.family import TaskFamily
from metagen_jax.tasks.translation import paired_queries
from metagen_jax.types import Array, Examples, Key, Params, Task

NUM_TASKS = 64  # pairs of held-out domains, where --classes does not say
UNTRANSLATED = "left as it is"


def evaluate_translation(finished: Finished, built: CycleGan, options: Evaluate) -> dict[str, Any]:
    """Evaluate, write evaluation.json, evaluation.md and the figures, and return what is in the first."""
    config, data = finished.config, load_data(finished)
    family = tasks_of(finished, data, options)
    query = num_query(finished, options)
    key = jax.random.key(config.seed)
    specs = build.pairs_of_domains(family, options.classes or NUM_TASKS, jax.random.fold_in(key, TEST))
    truth = paired_queries(options.shots, query)
    trained = num_steps(config)
    name = f"{config.learner} ({config.model})"
    systems, notes = [(name, finished.learner, finished.meta)], dict[str, str]()
    if options.baselines:
        candidates = baselines.game_candidates(config, build.roles(config, built))
        others, notes = baseline_systems(
            finished, data, options, candidates, _minus_error(built, query), lambda family: _with_truth(family, truth)
        )
        systems += [(other.name, other.learner, other.meta) for other in others]
    results: dict[str, Any] = {}
    untranslated: np.ndarray | None = None
    steps = np.arange(2 * trained + 1)

    def errors(learner: Any) -> Any:
        def one(meta: Params, bank: Any, key: Key, spec: Array) -> tuple[Array, Array]:
            make_key, adapt_key, _ = jax.random.split(key, 3)
            task = family.make(bank, make_key, spec)
            in_a, in_b = truth(bank, jax.random.clone(make_key), spec)
            path, _ = learner.path(meta, adapt_key, task.support, int(steps[-1]))

            def error(params: Params) -> Array:
                return _error(built, params, in_a, in_b, query)

            return jax.lax.map(error, path), jnp.abs(in_a - in_b).mean()

        return jax.jit(jax.vmap(one, in_axes=(None, None, 0, 0)))

    programs: dict[int, Any] = {}
    for system, learner, meta in systems:
        many = programs.setdefault(id(learner), errors(learner))
        with Progress(system, specs.shape[0], unit="task") as progress:
            test_key = jax.random.fold_in(key, TEST + 50)
            found, untranslated = map_tasks(many, meta, family.data, specs, test_key, 1, 8, progress.update)
        results[system] = {"steps": steps, "error": [interval(column) for column in found.T], "raw": found}
    assert untranslated is not None
    run = results[name]["raw"][:, trained]
    compared = {"its own step 0": results[name]["raw"][:, 0], UNTRANSLATED: untranslated}
    compared |= {other: entry["raw"][:, trained] for other, entry in results.items() if other != name}
    if FINE_TUNED in results:
        compared["joint, not adapted"] = results[FINE_TUNED]["raw"][:, 0]
    result: dict[str, Any] = {
        "protocol": header(
            finished,
            options,
            int(specs.shape[0]),
            "mean absolute error per pixel to the true translation; 95 % intervals over pairs of domains",
        ),
        "systems": {system: {k: v for k, v in entry.items() if k != "raw"} for system, entry in results.items()},
        "references": {UNTRANSLATED: {"steps": [0], "error": [interval(untranslated)]}},
        "improvements": {other: interval(values - run) for other, values in compared.items()},
        "notes": notes,
    }
    result = write(finished, result, markdown)
    lines = [
        Line(system, entry["steps"], *([at[field] for at in entry["error"]] for field in ("mean", "low", "high")))
        for system, entry in {**result["systems"], **result["references"]}.items()
    ]
    figure = report.measure_curves({"error of the translation (lower is better)": lines}, trained)
    report.save(figure, finished.run.figures / "adaptation_curve.png")
    report.save(_pairs(finished, built, family, truth, specs, key, query), finished.run.figures / "translations.png")
    return result


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of an evaluation."""
    protocol = result["protocol"]
    trained = protocol["trained_steps"]
    chosen = sorted({0, trained, 2 * trained})
    everything = {**result["systems"], **result["references"]}
    rows = [
        [name, *(cell(entry["error"][step], 4) if len(entry["steps"]) > step else "" for step in chosen)]
        for name, entry in everything.items()
    ]
    better = [[other, cell(entry, 4)] for other, entry in result["improvements"].items()]
    return "\n".join(
        [
            f"{protocol['classes']} pairs of {protocol['part']} domains of {protocol['data']}, {protocol['shots']} "
            f"images of each, {protocol['query']} to translate, {protocol['meta_steps']} meta-steps; "
            f"{protocol['unit']}\n",
            report.table(["error", *(f"step {step}" for step in chosen)], rows) + "\n",
            report.table([f"after {trained} steps the run is smaller, paired, than", "error"], better) + "\n",
            *(f"{name}: {note}  " for name, note in result["notes"].items()),
        ]
    )


def _with_truth(family: TaskFamily, truth: Any) -> TaskFamily:
    """Return the tasks with both sides of every query drawing for a query, which only the choice of a rule sees."""

    def make(bank: Any, key: Key, spec: Array) -> Task:
        task = family.make(bank, jax.random.clone(key), spec)
        both = jnp.concatenate(truth(bank, key, spec))
        return task._replace(query=Examples(both, jnp.zeros(len(both), jnp.int32), jnp.ones(len(both))))

    return family._replace(make=make)


def _minus_error(built: CycleGan, query: int) -> baselines.Score:
    """Return the function to choose rules by: minus the error on tasks made by `_with_truth`."""

    def score(params: Params, key: Key, task: Task) -> Array:
        in_a, in_b = jnp.split(task.query.x, 2)
        return -_error(built, params, in_a, in_b, query)

    return score


def _error(built: CycleGan, params: Params, in_a: Array, in_b: Array, query: int) -> Array:
    """Return the mean absolute error of translating the drawings of either domain; row n of both is one drawing."""
    there = jnp.abs(built.forward(params, in_a[:query]) - in_b[:query])
    back = jnp.abs(built.backward(params, in_b[query:]) - in_a[query:])
    return 0.5 * (there.mean() + back.mean())


def _pairs(finished: Finished, built: CycleGan, family: Any, truth: Any, specs: Any, key: Key, query: int) -> Any:
    """Return the figure of a few pairs of domains: images of both, a translation before and after, and the truth."""
    trained, few = num_steps(finished.config), min(3, query)

    def one(meta: Params, bank: Any, key: Key, spec: Array) -> tuple[Array, ...]:
        make_key, adapt_key = jax.random.split(key)
        task = family.make(bank, make_key, spec)
        in_a, in_b = truth(bank, jax.random.clone(make_key), spec)
        path, _ = finished.learner.path(meta, adapt_key, task.support, trained)
        before, after = (jax.tree.map(lambda leaf, at=at: leaf[at], path) for at in (0, trained))
        shots = task.support.x.shape[0] // 2
        source = in_a[:few]
        return (
            task.support.x[: min(3, shots)],
            task.support.x[shots : shots + min(3, shots)],
            source,
            built.forward(before, source),
            built.forward(after, source),
            in_b[:few],
        )

    count = min(STRIP_TASKS, specs.shape[0])
    keys = jax.random.split(jax.random.fold_in(key, TEST + 51), count)
    drawn = jax.jit(jax.vmap(one, in_axes=(None, None, 0, 0)))(finished.meta, family.data, keys, specs[:count])
    titles = ("domain A, given", "domain B, given", "to translate", "step 0", f"step {trained}", "true translation")
    columns = [Column(title, np.asarray(images)) for title, images in zip(titles, drawn, strict=True)]
    return report.adaptation_strip(columns)
