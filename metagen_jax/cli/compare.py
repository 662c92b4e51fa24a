"""`metagen compare LEARNER,LEARNER,... MODEL`: learners on one model and data set at equal compute; a table, a plot.

Equal is what `--equal` says:

- gradients: of images, in the inner and the outer loop, K N + Q a meta-step of K steps on N support and Q query images
  (`baselines.image_gradients`; second derivatives and the products of an implicit gradient are not counted);
- operations: counted in the program of a meta-step, everything included;
- time: minutes of meta-training of each, by the measured seconds of a meta-step, compiling left out.

All begin at the same joint training, where there is one, and meet the same tasks in training and in the test.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import tyro

from metagen_jax import build, plan, report
from metagen_jax.baselines import image_gradients
from metagen_jax.cli.evaluate import Evaluate, evaluate_run
from metagen_jax.cli.keeping import META
from metagen_jax.cli.protocol import check_options
from metagen_jax.cli.runs import load
from metagen_jax.cli.summary import cell
from metagen_jax.cli.train import RUNS, Train, checked, config_of, train_run
from metagen_jax.config import CONDITIONAL, LEARNERS, TrainConfig, for_learner, given, known
from metagen_jax.parameters import load_meta
from metagen_jax.progress import Progress
from metagen_jax.report import Line
from metagen_jax.run_directory import check_free, next_path, read_metrics
from metagen_jax.train import Divergence
from metagen_jax.types import Params
from metagen_jax.writing import jsonable

Equal = Literal["gradients", "operations", "time"]


class Measure(NamedTuple):
    """What learners of a model are compared by."""

    title: str
    digits: int
    larger: bool  # whether larger is better


LIKELIHOOD = Measure("log-likelihood (exact, IWAE or bound), nats per image (higher is better)", 2, True)
MEASURES = {
    "vae": Measure("IWAE, nats per image (higher is better)", 2, True),
    **{model: LIKELIHOOD for model in CONDITIONAL if model != "meta_generator"},
    "cycle": Measure("error of the translation (lower is better)", 4, False),
    "classifier": Measure("accuracy on the queries, % (higher is better)", 1, True),
}
SAMPLES = Measure("kernel distance within the class (lower is better)", 3, False)


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare learners at equal compute: metagen compare maml,reptile,anil vae --equal gradients."""

    train: Annotated[Train, tyro.conf.arg(name="")]
    equal: Equal = "gradients"
    """gradients and operations: as many as the first learner takes in --outer.steps; time: --minutes for each"""
    minutes: float = 2.0
    """of meta-training of each learner (time)"""
    test_shots: int = 5
    """support images of each class in the test"""
    classes: int | None = None
    """test on so many classes only, evenly spread"""
    tasks: int = 600
    """random tasks that classifiers are tested on"""
    num_samples: int = 50
    """importance samples of the IWAE (models with a likelihood)"""
    critics: Path | None = None
    """critics to measure samples with; those in the cache if not given"""


def run(arguments: Compare) -> None:
    """Carry out the command."""
    a = arguments
    names = a.train.learner.split(",")
    for name in names:
        known("learner", name, LEARNERS)
    if len(set(names)) < 2 or len(set(names)) != len(names):
        raise ValueError(f"compare wants two different learners or more, joined by commas; got {a.train.learner!r}")
    if a.minutes <= 0:
        raise ValueError(f"--minutes must be positive, got {a.minutes}")
    configs = {
        name: checked(for_learner(config_of(a.train), name), None, a.train.checkpoint_every, False) for name in names
    }
    for config in configs.values():
        check_options(_protocol(a, Path()), config.model)
    for config in configs.values():  # that a learner and the model do not go together is said before any of them trains
        build.training(config)
    out = a.train.out or next_path(RUNS, f"compare-{a.train.model}")
    check_free(out)
    result = compare(configs, out, a)
    print((out / "comparison.md").read_text(encoding="utf-8"))
    print(f"{len(result['learners'])} learners; {out / 'comparison.png'}")


def compare(configs: dict[str, TrainConfig], out: Path, options: Compare) -> dict[str, Any]:
    """Train and evaluate every configuration, write the table and the plot, and return what is in comparison.json."""
    steps, learners = dict[str, int](), dict[str, Any]()
    warm: Params | None = None
    for name, config in configs.items():
        steps[name] = num_meta_steps(config, next(iter(configs.values())), options)
        config = dataclasses.replace(config, outer=dataclasses.replace(config.outer, steps=steps[name]))
        try:
            begin = warm if given(config.outer.warm_start) else None
            directory = train_run(config, out / name, short_evaluation=False, warm_start=begin)
        except Divergence as error:
            print(f"{name} diverged and is left out of the table: {error}", flush=True)
            continue
        finished = load(directory.path)
        if warm is None and given(config.outer.warm_start):
            joint = build.roles(config, finished.built).joint
            shapes = jax.eval_shape(finished.built.model.init, jax.random.key(0))
            found, _ = load_meta(directory.path / "baselines" / "warm_start.npz", shapes)
            warm = {player: found[player] for player in joint}
        evaluation = evaluate_run(finished, _protocol(options, directory.path))
        last = [record for record in read_metrics(directory) if record["phase"] == "meta"][-1]
        learners[name] = {"meta_steps": steps[name], "seconds": last["seconds"], **_curve(evaluation)}
        protocol = {**evaluation["protocol"], "equal": options.equal}
        result = {"protocol": protocol, "learners": learners}
        (out / "comparison.json").write_text(json.dumps(jsonable(result), indent=1) + "\n", encoding="utf-8")
        (out / "comparison.md").write_text(markdown(result, config.model), encoding="utf-8")
        report.save(figure(result, config.model), out / "comparison.png")
    if not learners:
        raise Divergence("every learner diverged; lower --inner.rate, --inner.fast-rate or --outer.rate")
    return result


def _protocol(options: Compare, run: Path) -> Evaluate:
    return Evaluate(
        run,
        shots=options.test_shots,
        num_samples=options.num_samples,
        classes=options.classes,
        tasks=options.tasks,
        critics=options.critics,
        baselines=False,
    )


def num_meta_steps(config: TrainConfig, first: TrainConfig, options: Compare) -> int:
    """Return how many meta-steps of a learner are as much as those of the first one, or fill the minutes."""
    if options.equal == "gradients":
        return max(1, round(first.outer.steps * image_gradients(first) / image_gradients(config)))
    training = build.training(config)
    traced = plan.trace(config, training)
    if options.equal == "operations":
        of_first = plan.operations(plan.trace(first, build.training(first))).total
        return max(1, round(first.outer.steps * of_first / plan.operations(traced).total))
    with Progress(f"{config.learner}, timing a meta-step", 1, unit="program") as progress:
        compiled = traced.lower().compile()
        key = jax.random.fold_in(jax.random.key(config.seed), META)
        seconds = plan.measure(training, compiled, key).seconds
        progress.update(1)
    return max(1, round(60 * options.minutes / seconds))


def markdown(result: dict[str, Any], model: str) -> str:
    """Return the table, the best learner after its inner steps first."""
    measure = MEASURES.get(model, SAMPLES)

    def place(item: tuple[str, dict[str, Any]]) -> float:
        mean = _after(item[1])["mean"]
        return float("inf") if mean is None else -mean if measure.larger else mean

    rows = [
        [
            name,
            cell(entry["curve"][0], measure.digits),
            cell(_after(entry), measure.digits),
            cell(entry["curve"][-1], measure.digits),
            f"{entry['meta_steps']:,}",
            f"{entry['seconds']:.0f}",
        ]
        for name, entry in sorted(result["learners"].items(), key=place)
    ]
    protocol = result["protocol"]
    head = (
        f"{model} on {protocol['data']}, {protocol['classes']} {protocol['part']} classes, {protocol['shots']} shots; "
        f"equal {protocol['equal']}; {measure.title}; 95 % intervals\n\n"
    )
    columns = ["learner", "step 0", "trained steps", "twice that", "meta-steps", "seconds, with compiling"]
    return head + report.table(columns, rows) + "\n"


def figure(result: dict[str, Any], model: str) -> Any:
    """Return the plot: every learner's measure over inner steps."""
    lines = [
        Line(name, entry["steps"], *([at[field] for at in entry["curve"]] for field in ("mean", "low", "high")))
        for name, entry in result["learners"].items()
    ]
    trained = max(entry["trained_steps"] for entry in result["learners"].values())
    return report.measure_curves({MEASURES.get(model, SAMPLES).title: lines}, trained)


def _after(entry: dict[str, Any]) -> dict[str, Any]:
    return entry["curve"][list(entry["steps"]).index(min(entry["trained_steps"], entry["steps"][-1]))]


def _curve(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return steps, trained steps and the curve [S] of what the model is compared by."""
    system: dict[str, Any] = next(iter(evaluation["systems"].values()))
    found: Sequence[Any] = next(
        values
        for values in (system.get("curve", {}).get("iwae"), *(system.get(n) for n in ("kid", "error", "accuracy")))
        if values is not None
    )
    steps = system["curve"]["steps"] if "curve" in system else system["steps"]
    return {"steps": list(steps), "trained_steps": evaluation["protocol"]["trained_steps"], "curve": list(found)}
