"""What every evaluation of a run has in common: its options, the systems that are compared, the strip of pictures."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from metagen_jax import baselines, build, report
from metagen_jax.baselines import Candidates, Score
from metagen_jax.build import Part, Parts
from metagen_jax.cli.keeping import held_out
from metagen_jax.cli.runs import Finished
from metagen_jax.cli.summary import FINE_TUNED
from metagen_jax.config import TrainConfig, given
from metagen_jax.meta.learners import MetaLearner
from metagen_jax.parameters import load_meta, save_meta
from metagen_jax.progress import Progress
from metagen_jax.report import Column
from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.types import Key, Metrics, Params
from metagen_jax.writing import jsonable

CHOICE_CLASSES = 16  # by which the baselines' rates are chosen
STRIP_TASKS, STRIP_IMAGES, STRIP_STEPS = 8, 4, (0, 1, 3, 5)

TEST, CHOICE, JOINT, SCRATCH, COPY, STRIP = range(100, 106)  # what the seed's keys are folded for


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure a run on classes that it has never seen, beside its baselines, and draw the figures."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help="the run's folder, or runs/latest")]
    part: Literal["test", "validation", "train"] = "test"
    """classes of which part of the split"""
    shots: int = 5
    """support images"""
    query: int | None = None
    """real images of each class that are held out and compared with; as in training if not given"""
    num_samples: int = 50
    """importance samples of the table's IWAE; 1000 for figures that are reported (models with a likelihood)"""
    num_images: int = 16
    """images made for each class at each step, which are compared with real ones (models without a likelihood)"""
    critics: Path | None = None
    """critics to measure samples with, a file of `metagen critics --out`; those in the cache if not given"""
    classes: int | None = None
    """evaluate on so many classes only, evenly spread"""
    tasks: int = 600
    """random tasks of unseen classes that a classifier is evaluated on"""
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


def check_options(options: Evaluate, model: str) -> None:
    """Raise `ValueError` for options that no evaluation of the model can meet."""
    if model == "classifier":
        if options.shots < 1:
            raise ValueError(f"a classifier needs at least one support image of each class, got {options.shots} shots")
        if options.classes is not None:
            raise ValueError("a classifier is evaluated on random tasks of all classes; say how many with --tasks")
        if options.tasks < 2:
            raise ValueError(f"an interval over tasks needs at least 2, got --tasks {options.tasks}")
    if options.classes is not None and options.classes < 2:
        raise ValueError(f"intervals over classes need at least 2, got --classes {options.classes}")
    if options.query is not None and options.query < 1:
        raise ValueError(f"--query must be at least 1, got {options.query}")


def tasks_of(finished: Finished, data: Parts, options: Evaluate) -> TaskFamily:
    """Return the tasks of the part, the shots and the query that the options ask for."""
    query = num_query(finished, options)
    return build.family(data, options.part, options.shots, query, model=finished.config.model)


def header(finished: Finished, options: Evaluate, num_classes: int, unit: str, **more: Any) -> dict[str, Any]:
    """Return what every evaluation says about itself."""
    config = finished.config
    return {
        "part": options.part,
        "data": config.data.source,
        "classes": num_classes,
        "shots": options.shots,
        "query": num_query(finished, options),
        "trained_steps": num_steps(config),
        "meta_steps": finished.step,
        **more,
        "unit": unit,
    }


def num_query(finished: Finished, options: Evaluate) -> int:
    """Return the number of real images of each class that are held out."""
    return finished.config.query if options.query is None else options.query


def num_steps(config: TrainConfig) -> int:
    """Return the number of inner steps that systems are compared at: the trained one, five where the run takes none."""
    return given(config.inner.steps) or 5


def write(finished: Finished, result: dict[str, Any], markdown: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """Write evaluation.json and evaluation.md, and return what is in the first."""
    result = jsonable(result)
    (finished.run.path / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (finished.run.path / "evaluation.md").write_text(markdown(result), encoding="utf-8")
    return result


def adaptation_strip(finished: Finished, family: TaskFamily, data: Parts, part: Part, key: Key) -> Any:
    """Return the figure of a few tasks: support, samples after some numbers of steps, held-out real images."""
    trained = given(finished.config.inner.steps)
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
    shown = [Column(f"{support.shape[1]} given", support)] if support.shape[1] else []
    return report.adaptation_strip([*shown, *columns, Column("real, never seen", real)])


def baseline_systems(
    finished: Finished,
    data: Parts,
    options: Evaluate,
    candidates: Candidates,
    score: Score,
    prepare: Callable[[TaskFamily], TaskFamily] = lambda family: family,
) -> tuple[list[System], dict[str, str]]:
    """Return what the run is compared with, each at the best of its rules by `score` on held-out classes, and notes.

    `prepare` changes the tasks that rules are chosen on.
    """
    config, built = finished.config, finished.built
    key = jax.random.key(config.seed)
    joint, joint_note = _joint(finished, data, options.joint_steps)
    part, steps = held_out(data), num_steps(config)
    query = num_query(finished, options)
    family = build.family(data, part, options.shots, query, model=config.model)
    specs = _choice_specs(family, data, part, config.model, key)
    random = built.model.init(jax.random.fold_in(key, SCRATCH))
    learner = baselines.stepper(config, built, steps)
    choose = baselines.chooser(learner, prepare(family), specs, jax.random.fold_in(key, CHOICE), score)
    systems, notes = [], {"joint": joint_note}
    for name, begin, rules in (
        (FINE_TUNED, joint, candidates.fine_tuning),
        ("scratch (SGD)", random, candidates.scratch_sgd),
        ("scratch (Adam)", random, candidates.scratch_adam),
    ):
        rule = choose(begin, rules)
        systems.append(System(name, learner, baselines.with_rule(begin, rule), 8))
        notes[name] = f"{rule}, the best of {len(rules)} rules on {specs.shape[0]} {part} classes"
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
    family = build.training_tasks(config, data)
    key = jax.random.fold_in(jax.random.key(config.seed), JOINT)
    with Progress("joint baseline", max(num_steps, 1), unit="step", tasks=config.outer.tasks) as progress:

        def on_chunk(state: Any, metrics: Metrics) -> None:
            loss = next(
                metrics[name] for name in ("loss", *sorted(metrics)) if name.startswith("loss") and name in metrics
            )
            progress.update(int(state.step), float(np.nanmean(loss)))

        params = baselines.train_joint(config, family, built, num_steps, key, begin=warm, on_chunk=on_chunk)
    save_meta(path, params, step=num_steps)
    return params, note


def _choice_specs(family: TaskFamily, data: Parts, part: Part, model: str, key: Key) -> Spec:
    if model == build.TRANSLATION:
        return build.pairs_of_domains(family, CHOICE_CLASSES, jax.random.fold_in(key, CHOICE))
    return build.specs(data, part, CHOICE_CLASSES)
