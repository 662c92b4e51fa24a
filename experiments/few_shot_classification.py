"""Few-shot classification of Omniglot: every family of adapters on one body, one protocol, equal compute.

Claim: one classifier and one sampler carry metric-, memory-, closed-form and optimisation-based learners, and their
order at equal compute can be read off one table, which published numbers, each of its own protocol, do not allow.

Published, on 4 x 64 channels with max-pooling and batch normalisation, to convergence (tens of thousands of meta-steps
or more; rotations as classes in training and test, most of them transductive), see PUBLISHED below.

Here: 28x28 binary Omniglot (the binarisation of `omniglot_gmn`), 1200 / 100 / 323 characters at random, alphabets
mixed; training characters turned by 90 degrees are classes of their own (4800), test characters are upright; 15 queries
of each class; non-transductive (normalisation of each example by itself); body of 4 stride-2 convolutions with 32
channels; one seed. Gradient learners are trained for each number of ways, with 1 to 5 shots drawn for each task; heads
that do not depend on the number of ways are trained with 20. Every training has the same CPU time, on one core, without
compiling: some hundreds to thousands of meta-steps, where the articles take 50,000 (MAML++) or 100,000 (Reptile).

    taskset -c 0 python experiments/few_shot_classification.py --data-dir DIR --out runs/classification  # about 1.7 h
    taskset -c 0 python experiments/few_shot_classification.py --data-dir DIR --out runs/quick --quick   # about 10 min

A run that was stopped goes on where it was. `--seconds` trains longer, to the end where there is a GPU.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax

import metagen_jax as mg
from metagen_jax import build
from metagen_jax.config import HEADS, DataConfig, InnerConfig, ModelConfig, OuterConfig, TrainConfig, check, given
from metagen_jax.evaluate_labels import accuracy_curve
from metagen_jax.report import table
from metagen_jax.tasks.splits import by_count
from metagen_jax.train import TrainState
from metagen_jax.types import Metrics

SETTINGS = ((5, 1), (5, 5), (20, 1), (20, 5))  # ways, shots
LONGER = 10  # inner steps at test, beside the trained number
TEST = 100  # what the seed's key is folded for
ANY_WAY = ("prototypes", "matching", "relation", "ridge")

PUBLISHED = {
    "prototypes": "98.8 / 99.7 / 96.0 / 98.9 (re-run 98.2 / 99.4 / 95.8 / 98.6)",
    "matching": "98.1 / 98.9 / 93.8 / 98.5 (re-run, l2, 98.3 / 99.8 / 92.8 / 97.8)",
    "relation": "",
    "ridge": "",
    "memory": "82.8 / 94.9 / - / - (no convolutions)",
    "attention": "",
    "maml": "98.7 / 99.9 / 95.8 / 98.9 (re-run 98.1 / 99.8 / 91.6 / 95.9)",
    "fomaml": "98.3 / 99.2 / 89.4 / 97.9 (re-run 95.5 / 99.5 / 92.2 / 97.7)",
    "anil": "- / - / 96.2 / 98.0",
    "boil": "",
    "reptile": "95.4 / 98.9 / 88.1 / 96.7 (transductive 97.7 / 99.5 / 89.4 / 97.1)",
    "meta_sgd": "",
    "maml_plus_plus": "",
    "imaml": "",
    "cavia": "",
}
"""5-way 1- and 5-shot, 20-way 1- and 5-shot, %: the original articles, and independent re-runs."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained and measured."""

    channels: tuple[int, ...] = (32, 32, 32, 32)
    seconds: float = 150.0  # CPU time of one training
    tasks: int = 4  # of a meta-step
    test_tasks: int = 600
    seed: int = 0


ROWS: dict[str, dict[str, Any]] = {
    "prototypes": {},
    "matching": {},
    "relation": {},
    "ridge": {},
    "memory": {},
    "attention": {},
    "maml": {"inner": InnerConfig(steps=3, rate=0.4)},
    "fomaml": {"inner": InnerConfig(steps=3, rate=0.4)},
    "anil": {"inner": InnerConfig(steps=3, rate=0.4)},
    "boil": {"inner": InnerConfig(steps=3, rate=0.4)},
    "reptile": {"inner": InnerConfig(steps=5, rate=0.1)},
    "meta_sgd": {"inner": InnerConfig(steps=3, rate=0.4)},
    "maml_plus_plus": {"inner": InnerConfig(steps=3, rate=0.4, rates="per_step")},
    "imaml": {"inner": InnerConfig(steps=8, rate=0.2, strength=0.5)},
    "cavia": {"inner": InnerConfig(steps=3, fast_rate=1.0), "context": 64},
}


def configured(config: Config, row: str, way: int, num_steps: int, data_dir: str) -> TrainConfig:
    """Return the configuration of one training: what `metagen train ROW classifier` would take."""
    settings = ROWS[row]
    return check(
        TrainConfig(
            row,
            "classifier",
            DataConfig("omniglot_gmn", data_dir, rotations=True),
            ModelConfig("conv", config.channels, context=settings.get("context", 0)),
            settings.get("inner", InnerConfig()),
            OuterConfig(
                steps=num_steps, tasks=config.tasks, warmup=min(20, num_steps - 1), clip=10.0, rate_of_rates=1e-2
            ),
            shots=(1, 5),
            query=5,
            way=way,
            seed=config.seed,
        )
    )


def load(data_dir: str) -> build.Parts:
    """Return the data with the split of the protocol."""
    data = build.parts(DataConfig("omniglot_gmn", data_dir))
    return data._replace(split=by_count(data.images, 0, validation=100, test=323))


def train(config: Config, row: str, way: int, data: build.Parts, data_dir: str) -> tuple[mg.Params, dict[str, float]]:
    """Train for the CPU time that there is; return averaged meta-parameters and what it took."""

    def run(num_steps: int, chunk: int) -> tuple[TrainState, list[float], float]:
        settings = configured(config, row, way, num_steps, data_dir)
        family = build.training_tasks(settings, data)
        learner = build.learner(settings, build.model(settings, data.event, data.binary))
        optimizer = build.outer(settings)
        sampler, step = build.meta_step(settings, learner, family, optimizer)
        state = mg.init_state(learner, sampler, optimizer, jax.random.key(config.seed))
        times, lost = [time.process_time()], []

        def on_chunk(state: TrainState, metrics: Metrics) -> None:
            times.append(time.process_time())
            lost.append(float(metrics["num_nonfinite"].sum()))

        state = mg.train(step, state, family.data, num_steps, chunk=chunk, on_chunk=on_chunk)
        return state, times, sum(lost)

    _, times, _ = run(20, 10)  # the first dispatch compiles
    num_steps = 25 * max(1, round(config.seconds * 10 / (times[2] - times[1]) / 25))
    state, times, lost = run(num_steps, 25)
    took = {"meta_steps": num_steps, "seconds": times[-1] - times[1], "nonfinite_tasks": lost}
    return state.average, took


def test(config: Config, row: str, way: int, shots: int, data: build.Parts, data_dir: str, meta: mg.Params) -> dict:
    """Return accuracy in % with half widths, after the trained number of inner steps and after more."""
    settings = configured(config, row, way, 1000, data_dir)
    built = build.model(settings, data.event, data.binary)
    learner = build.learner(settings, built)
    trained = given(settings.inner.steps)
    steps = (trained,) if row in HEADS else (0, trained, LONGER)
    family = build.family(data, "test", shots, 15, model="classifier", way=way)
    measure = accuracy_curve(learner.path, built.model, family, steps=steps, task_chunk=10)
    num_tasks = config.test_tasks if way == 5 else config.test_tasks // 2
    found = measure(meta, jax.random.fold_in(jax.random.key(config.seed), TEST), num_tasks)
    return {
        str(step): [100 * float(mean), 100 * float(half)]
        for step, mean, half in zip(found.steps, found.mean, found.half_width, strict=True)
    }


def markdown(results: dict) -> str:
    """Return the table."""

    def cell(entry: dict[str, list[float]], row: str) -> str:
        trained = str(given(check(TrainConfig(row, "classifier", **_inner(row))).inner.steps))
        text = "{:.1f} ± {:.1f}".format(*entry[trained])
        return text if row in HEADS else f"{text} ({entry[str(LONGER)][0]:.1f})"

    lines = []
    for row, entry in results["rows"].items():
        names = [f"{way}-way {shots}-shot" for way, shots in SETTINGS]
        cells = [cell(entry["table"][name], row) if name in entry["table"] else "-" for name in names]
        lines.append([row, *cells, entry["meta_steps"], PUBLISHED[row]])
    header = ["learner", *(f"{way}-way {shots}-shot" for way, shots in SETTINGS), "meta-steps", "published"]
    return table(header, lines) + "\n"


def _inner(row: str) -> dict[str, Any]:
    return {"inner": ROWS[row].get("inner", InnerConfig()), "network": ModelConfig(context=ROWS[row].get("context", 0))}


def main() -> None:
    """Train and test every row, keeping what is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=Config.seconds)
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--ways", nargs="*", type=int, default=[5, 20])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    config = Config(seconds=arguments.seconds)
    if arguments.quick:
        config = dataclasses.replace(config, seconds=8.0, test_tasks=40)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.json"
    data = load(arguments.data_dir)
    asked = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples as the lists that JSON makes of them
    results = json.loads(path.read_text()) if path.exists() else {"config": asked, "rows": {}}
    if results["config"] != asked:
        parser.error(f"{path} is of another configuration, {results['config']}; choose another --out")
    for row in arguments.rows:
        entry: dict[str, Any] = results["rows"].get(row, {"table": {}, "trainings": {}})
        left = [way for way in ((20,) if row in ANY_WAY else arguments.ways) if str(way) not in entry["trainings"]]
        for way in left:
            meta, took = train(config, row, way, data, arguments.data_dir)
            entry["trainings"][str(way)] = took
            for ways, shots in SETTINGS:
                if row in ANY_WAY or ways == way:
                    found = test(config, row, ways, shots, data, arguments.data_dir, meta)
                    entry["table"][f"{ways}-way {shots}-shot"] = found
        if not left:
            continue
        entry["meta_steps"] = " / ".join(str(took["meta_steps"]) for took in entry["trainings"].values())
        results["rows"][row] = entry
        results["rows"] = {name: results["rows"][name] for name in ROWS if name in results["rows"]}
        path.write_text(json.dumps(results, indent=1))
        (arguments.out / "table.md").write_text(markdown(results))
        print(markdown(results), flush=True)


if __name__ == "__main__":
    main()
