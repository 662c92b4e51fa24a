"""`metagen evaluate RUN`: held-out likelihood over inner steps, beside every baseline, with intervals over classes."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from metagen_jax import baselines, build, report
from metagen_jax.build import Part, Parts
from metagen_jax.checkpoint import load_meta, save_meta
from metagen_jax.cli.runs import Finished, load, load_data
from metagen_jax.cli.summary import FINE_TUNED, NOT_ADAPTED, above, advantages, interval, intervals, lines, markdown
from metagen_jax.cli.train import held_out
from metagen_jax.evaluate import Curve, Measure, adaptation_curves, exemplar_scores
from metagen_jax.meta.learners import MetaLearner
from metagen_jax.metrics.exemplar import fit_exemplars
from metagen_jax.progress import Progress
from metagen_jax.report import Column
from metagen_jax.run_directory import jsonable
from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.types import Key, Metrics, Params

CURVE_SAMPLES = 50  # importance samples at most, where every inner step is evaluated
CHOICE_CLASSES = 16  # by which the baselines' rates are chosen
STRIP_TASKS, STRIP_IMAGES, STRIP_STEPS = 8, 4, (0, 1, 3, 5)
COPY_EPISODES = 64  # by which the copy baseline is fitted
COPY_SHOTS = 5  # of the episodes that the copy baseline's two constants are fitted on

TEST, CHOICE, JOINT, SCRATCH, COPY, STRIP = range(100, 106)  # what the seed's keys are folded for


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure a run on classes that it has never seen, beside its baselines, and draw the figures."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help="the run's folder, or runs/latest")]
    part: Literal["test", "validation", "train"] = "test"
    """classes of which part of the split"""
    shots: int = 5
    """support images"""
    num_samples: int = 50
    """importance samples of the table's IWAE; 1000 for figures that are reported"""
    classes: int | None = None
    """evaluate on so many classes only, evenly spread"""
    joint_steps: int | None = None
    """steps of the joint baseline, from the warm start; as many image gradients as meta-training if not given"""
    baselines: bool = True
    """also train and evaluate what meta-learning is compared with"""


class System(NamedTuple):
    """Something that is evaluated at every inner step."""

    name: str
    learner: MetaLearner
    meta: Params
    task_chunk: int  # tasks at a time: few where every task has weights of its own


def run(arguments: Evaluate) -> None:
    """Carry out the command."""
    finished = load(arguments.run)
    result = evaluate_run(finished, arguments)
    print((finished.run.path / "evaluation.md").read_text(encoding="utf-8"))
    print(
        f"{len(result['systems'])} systems, {result['protocol']['classes']} classes; figures in {finished.run.figures}"
    )


def evaluate_run(finished: Finished, options: Evaluate) -> dict[str, Any]:
    """Evaluate, write evaluation.json, evaluation.md and the figures, and return what is in the first."""
    if options.classes is not None and options.classes < 2:
        raise ValueError(f"intervals over classes need at least 2, got --classes {options.classes}")
    if options.num_samples < 1 or (options.num_samples > CURVE_SAMPLES and options.num_samples % CURVE_SAMPLES):
        raise ValueError(f"--num-samples must be at most {CURVE_SAMPLES}, or a multiple, got {options.num_samples}")
    config, data = finished.config, load_data(finished)
    family = build.family(data, options.part, options.shots, config.query)
    specs = build.specs(data, options.part, options.classes)
    key = jax.random.key(config.seed)
    name = f"{config.learner} ({config.model})"
    systems, notes = [System(name, finished.learner, finished.meta, 16)], dict[str, str]()
    if options.baselines:
        others, notes = _baselines(finished, data, options)
        systems += others
    curves, tables, programs = {}, {}, dict[Any, Measure]()
    for system in systems:
        test_key = jax.random.fold_in(key, TEST)
        curves[system.name], tables[system.name] = _measure(
            system, finished, family, specs, test_key, options, programs
        )
    copy = _copy(data, finished, family, specs, key) if options.baselines else None
    result = {
        "protocol": {
            "part": options.part,
            "data": config.data.source,
            "classes": int(specs.shape[0]),
            "shots": options.shots,
            "query": config.query,
            "trained_steps": config.inner.steps,
            "meta_steps": finished.step,
            "num_samples": options.num_samples,
            "curve_samples": min(options.num_samples, CURVE_SAMPLES),
            "unit": "nats per image, larger is better; mean and 95 % bootstrap interval over classes",
        },
        "systems": {name: {"curve": intervals(curves[name]), "table": intervals(tables[name])} for name in curves},
        "reference": NOT_ADAPTED if FINE_TUNED in curves else f"{name} at step 0",
        "above": {other: above(curve, curves.get(FINE_TUNED, curves[name])) for other, curve in curves.items()},
        "advantages": advantages(name, tables, config.inner.steps),
        "copy": None if copy is None else interval(copy),
        "notes": notes,
    }
    result = jsonable(result)
    (finished.run.path / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (finished.run.path / "evaluation.md").write_text(markdown(result), encoding="utf-8")
    report.save(
        report.adaptation_curve(*lines(result), config.inner.steps, reference=result["reference"]),
        finished.run.figures / "adaptation_curve.png",
    )
    strip = adaptation_strip(finished, family, data, options.part, jax.random.fold_in(key, STRIP))
    report.save(strip, finished.run.figures / "adaptation_strip.png")
    return result


def adaptation_strip(finished: Finished, family: TaskFamily, data: Parts, part: Part, key: Key) -> Any:
    """Return the figure of a few tasks: support, samples after some numbers of steps, held-out real images."""
    trained = finished.config.inner.steps
    steps = sorted({step for step in (*STRIP_STEPS, trained) if step <= trained})
    specs = build.specs(data, part, STRIP_TASKS)
    make_key, adapt_key, sample_key = jax.random.split(key, 3)

    def one(meta: Params, bank: Any, key: Key, spec: Spec) -> tuple[jax.Array, jax.Array, jax.Array]:
        task = family.make(bank, key, spec)
        params, _ = finished.learner.path(meta, jax.random.clone(adapt_key), task.support, steps[-1])
        chosen = jax.tree.map(lambda leaf: leaf[jnp.asarray(steps)], params)
        samples = jax.lax.map(  # the same latent noise at every step, so that what changes is the adaptation
            lambda params: finished.built.model.sample(params, jax.random.clone(sample_key), STRIP_IMAGES), chosen
        )
        return task.support.x, samples, task.query.x[:STRIP_IMAGES]

    keys = jax.random.split(make_key, specs.shape[0])
    drawn = jax.jit(jax.vmap(one, in_axes=(None, None, 0, 0)))(finished.meta, family.data, keys, specs)
    support, samples, real = (np.asarray(images) for images in drawn)
    titles = ["before adapting" if step == 0 else f"after {step} step{'s' * (step > 1)}" for step in steps]
    columns = [Column(title, samples[:, number]) for number, title in enumerate(titles)]
    given = [Column(f"{support.shape[1]} given", support)] if support.shape[1] else []
    return report.adaptation_strip([*given, *columns, Column("real, never seen", real)])


def _baselines(finished: Finished, data: Parts, options: Evaluate) -> tuple[list[System], dict[str, str]]:
    config, built = finished.config, finished.built
    key = jax.random.key(config.seed)
    joint, joint_note = _joint(finished, data, options.joint_steps)
    part, steps = held_out(data), config.inner.steps
    family = build.family(data, part, options.shots, config.query)
    specs = build.specs(data, part, CHOICE_CLASSES)
    random = built.model.init(jax.random.fold_in(key, SCRATCH))
    learner = baselines.stepper(built, steps)
    choose = baselines.chooser(built, family, specs, jax.random.fold_in(key, CHOICE), steps)
    systems, notes = [], {"joint": joint_note}
    for name, begin, candidates in (
        (FINE_TUNED, joint, baselines.FINE_TUNING),
        ("scratch (SGD)", random, baselines.SCRATCH_SGD),
        ("scratch (Adam)", random, baselines.SCRATCH_ADAM),
    ):
        rule = choose(begin, candidates)
        systems.append(System(name, learner, baselines.with_rule(begin, rule), 8))
        notes[name] = f"{rule}, the best of {len(candidates)} rules on {specs.shape[0]} {part} classes"
    return systems, notes


def _joint(finished: Finished, data: Parts, num_steps: int | None) -> tuple[Params, str]:
    """Return the joint baseline's parameters, from the run's folder if they were trained before."""
    run, config, built = finished.run, finished.config, finished.built
    if config.learner == "joint":
        return finished.meta, "the run itself"
    folder = run.path / "baselines"
    target = jax.eval_shape(built.model.init, jax.random.key(0))
    warm = load_meta(folder / "warm_start.npz", target)[0] if (folder / "warm_start.npz").exists() else None
    num_steps = baselines.joint_steps(config) if num_steps is None else num_steps
    note = f"{num_steps} further steps of ordinary training" + (
        f" after the {config.outer.warm_start} of the warm start" if warm is not None else ""
    )
    path = folder / f"joint-{num_steps}.npz"
    if path.exists():
        return load_meta(path, target)[0], note
    family = build.family(data, "train", config.shots, config.query, symmetries=config.data.symmetries)
    key = jax.random.fold_in(jax.random.key(config.seed), JOINT)
    with Progress("joint baseline", max(num_steps, 1), unit="step", tasks=config.outer.tasks) as progress:

        def on_chunk(state: Any, metrics: Metrics) -> None:
            progress.update(int(state.step), float(np.nanmean(metrics["loss"])))

        params = baselines.train_joint(config, family, built, num_steps, key, begin=warm, on_chunk=on_chunk)
    save_meta(path, params, step=num_steps)
    return params, note


def _measure(
    system: System,
    finished: Finished,
    family: TaskFamily,
    specs: Spec,
    key: Key,
    options: Evaluate,
    programs: dict[Any, Measure],
) -> tuple[Curve, Curve]:
    """Return the curve at every step to twice the trained number, and the one at 0, once and twice that number."""
    trained = finished.config.inner.steps
    few = min(options.num_samples, CURVE_SAMPLES)

    def curve(steps: tuple[int, ...], num_samples: int) -> Curve:
        which = (id(system.learner), steps, num_samples)  # systems that share a learner share a compiled program
        programs[which] = measure = programs.get(which) or adaptation_curves(
            system.learner.path,
            finished.built.latent,
            family,
            steps=steps,
            num_samples=num_samples,
            task_chunk=system.task_chunk,
        )
        with Progress(system.name, specs.shape[0], unit="task") as progress:
            return measure(system.meta, specs, jax.random.clone(key), progress.update)

    everywhere = curve(tuple(range(2 * trained + 1)), few)
    if options.num_samples == few:
        at = np.array(sorted({0, trained, 2 * trained}))
        return everywhere, Curve(at, everywhere.elbo[:, at], everywhere.iwae[:, at], few)
    return everywhere, curve((0, trained, 2 * trained), options.num_samples)


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
