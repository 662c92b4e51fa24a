"""Strategies for choosing tasks: when does it pay to look at tasks before learning from them?

Claim: on clean tasks of many classes no strategy is far from uniform draws; what tasks teach differs where half of them
have wrong labels, and where training classes are few. Competitive strategies (the hardest tasks) and cooperative ones
(tasks that agree) are rules of one interface, so that they can be compared at all.

Published, no table of it: Kumar, Deleu & Bengio, The Effect of Diversity in Meta-Learning, 2023, and Wang et al.,
Towards Task Sampler Learning for Meta-Learning, 2024, find no sampler that wins everywhere; Yao et al., Meta-learning
with an Adaptive Task Scheduler, 2021, report gains of up to 13 % relative where tasks are noisy.

Here: 28x28 binary Omniglot (the binarisation of `omniglot_gmn`), 1200 / 100 / 323 characters at random, alphabets
mixed, no rotations; prototypes on 4 stride-2 convolutions with 32 channels; training tasks are 20-way with 1 to 5
shots, drawn for each task, and 5 queries; Adam with warm-up and cosine decay, averaged parameters; test tasks have 15
queries of each class. All strategies take the same number of meta-steps on the same number of tasks; what they cost
beside is reported as CPU time (on an accelerator, as time). `clean` has all training characters; `noisy` draws half of
the labels of half of the tasks at random, support and query; `few` has 50 training characters. Test tasks are clean,
and the same for all.

| strategy      | kind        | looks at                                                   |
|---------------|-------------|------------------------------------------------------------|
| uniform       |             | nothing                                                    |
| score_softmax | competitive | losses of the candidates                                   |
| hard_buffer   | competitive | losses of tasks that were learned from                     |
| class_pairs   | competitive | losses of tasks that were learned from                     |
| agreement     | cooperative | directions of gains and biases of the body                 |
| greedy_set    | cooperative | the same, and mean features                                |
| information   | cooperative | mean features                                              |
| curriculum    |             | losses of the candidates, the easiest first                |

"One vote each": of directions only the way they point counts, so that long ones do not decide what is agreed on.

Accuracy is a mean over seeds (initial values, tasks and, in `few`, characters), with the 95 % interval of Student's t.

    taskset -c 0 python experiments/task_strategies.py --data-dir DIR --out runs/strategies  # about 4 h, 90 cells
    taskset -c 0 python experiments/task_strategies.py --data-dir DIR --out runs/quick --quick  # about 3 min

A run that was stopped goes on where it was.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import metagen_jax as mg
from metagen_jax import build
from metagen_jax.budget import clock
from metagen_jax.build.data import take
from metagen_jax.config import DataConfig
from metagen_jax.evaluate_labels import accuracy_curve
from metagen_jax.metrics.interval import over_seeds
from metagen_jax.models.networks import conv_features, num_features_of
from metagen_jax.report import table
from metagen_jax.strategies.candidates import Rule, chosen, measured, pinned
from metagen_jax.strategies.competitive import class_pairs, hard_buffer, score_softmax
from metagen_jax.strategies.cooperative import agreement, greedy_set, information
from metagen_jax.strategies.curriculum import self_paced
from metagen_jax.tasks.noisy import with_wrong_labels
from metagen_jax.tasks.splits import by_count
from metagen_jax.types import Metrics

STRATEGIES = (
    "uniform",
    "score_softmax",
    "hard_buffer",
    "class_pairs",
    "agreement",
    "agreement, one vote each",
    "greedy_set",
    "greedy_set, one vote each",
    "information",
    "curriculum",
)
CONDITIONS = ("clean", "noisy", "few")
SETTINGS = ((20, 1), (5, 1))  # ways, shots of the test
WAY = 20
TEST = 100  # what the key of the test is folded for


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained and measured."""

    channels: tuple[int, ...] = (32, 32, 32, 32)
    steps: int = 300
    tasks: int = 4  # of a meta-step
    candidates: int = 8  # that are measured for them
    rate: float = 2e-3
    warmup: int = 20
    share: float = 0.5  # of the tasks that are noisy, in `noisy`
    fraction: float = 0.5  # of their labels that are drawn at random
    few: int = 50  # training characters, in `few`
    test_tasks: int = 1000


def load(data_dir: str) -> build.Parts:
    """Return the data with the split of the protocol."""
    data = build.parts(DataConfig("omniglot_gmn", data_dir))
    return data._replace(split=by_count(data.images, 0, validation=100, test=323))


def training_tasks(config: Config, condition: str, data: build.Parts, seed: int) -> tuple[mg.TaskFamily, int]:
    """Return the training tasks of a condition, and how many characters they have."""
    images = take(data, "train")
    if condition == "few":
        images = images.take(np.sort(np.random.default_rng(seed).permutation(images.num_classes)[: config.few]))
    family = mg.episodes(images, (1, 5), 5, way=WAY)
    if condition == "noisy":
        family = with_wrong_labels(family, config.share, config.fraction)
    return family, images.num_classes


def strategy(
    config: Config, name: str, family: mg.TaskFamily, num_classes: int, built: mg.Classifier, learner: mg.MetaLearner
) -> tuple[mg.TaskFamily, mg.Sampler]:
    """Return the strategy of a row, and the family that it and the meta-step make tasks with."""
    if name == "uniform":
        return family, mg.uniform(family, config.tasks)
    if name == "hard_buffer":
        family = pinned(family)
        return family, hard_buffer(family, config.tasks, warmup=min(32, config.steps // 4))
    if name == "class_pairs":
        return family, class_pairs(family, config.tasks, num_classes)

    def embed(meta: mg.Params, task: mg.Task) -> jax.Array:
        return built.features(meta, task.support.x).T @ (task.support.weight / task.support.weight.sum())

    rules: dict[str, tuple[Rule, dict[str, Any]]] = {
        "score_softmax": (score_softmax(), {}),
        "agreement": (agreement(), {"players": ("modulation",)}),
        "agreement, one vote each": (agreement(unit=True), {"players": ("modulation",)}),
        "greedy_set": (greedy_set(), {"players": ("modulation",), "embed": embed}),
        "greedy_set, one vote each": (greedy_set(unit=True), {"players": ("modulation",), "embed": embed}),
        "information": (information(built.num_features), {"embed": embed}),
        "curriculum": (self_paced(0.3, config.steps // 2), {}),
    }
    rule, looks_at = rules[name]
    family = pinned(family)
    measure = measured(built.model.game, learner.adapt, **looks_at)
    return family, chosen(family, config.tasks, config.candidates, measure, rule)


def classifier(config: Config, data: build.Parts, way: int) -> tuple[mg.Classifier, mg.MetaLearner]:
    """Return prototypes on convolutions, and their learner; no weight depends on the number of ways."""
    body = conv_features(data.event, config.channels)
    built = mg.classifier(body, num_features_of(body, data.event), way, mg.prototypes())
    return built, mg.amortised(built.model, built.embed)


def train(config: Config, condition: str, name: str, seed: int, data: build.Parts) -> tuple[mg.Params, dict]:
    """Return averaged meta-parameters, and what it took."""
    built, learner = classifier(config, data, WAY)
    family, num_classes = training_tasks(config, condition, data, seed)
    family, sampler = strategy(config, name, family, num_classes, built, learner)
    optimizer = mg.outer_optimizer(config.rate, config.steps, warmup=config.warmup, clip=10.0)
    state = mg.init_state(learner, sampler, optimizer, jax.random.key(seed))
    times, effective = [clock()], []

    def on_chunk(state: mg.TrainState, metrics: Metrics) -> None:
        times.append(clock())
        effective.extend(metrics["effective_tasks"])

    size = min(100, config.steps // 5)
    step = mg.make_step(learner, family, sampler, optimizer)
    state = mg.train(step, state, family.data, config.steps, chunk=size, on_chunk=on_chunk)
    took = {
        "seconds_per_step": float(np.median(np.diff(times)[1:])) / size,  # the first dispatch compiles
        "effective_tasks": float(np.mean(effective)),
    }
    return state.average, took


def make_test(config: Config, data: build.Parts) -> Any:
    """Return the function from meta-parameters to accuracy in % for each setting; it compiles once."""
    measures = {}
    for way, shots in SETTINGS:
        built, learner = classifier(config, data, way)
        family = build.family(data, "test", shots, 15, model="classifier", way=way)
        measures[f"{way}-way {shots}-shot"] = accuracy_curve(
            learner.path, built.model, family, steps=(0,), task_chunk=10
        )
    key = jax.random.fold_in(jax.random.key(0), TEST)

    def test(meta: mg.Params) -> dict[str, float]:
        return {name: 100 * float(of(meta, key, config.test_tasks).mean[0]) for name, of in measures.items()}

    return test


def interval(values: list[float]) -> str:
    """Return the mean of several seeds and half the width of its 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    mean, half = over_seeds(values)
    return f"{mean:.1f} ± {half:.1f}"


def markdown(results: dict) -> str:
    """Return a table for each condition; in brackets the mean difference to uniform draws with the same seeds."""
    names, text = [f"{way}-way {shots}-shot" for way, shots in SETTINGS], []
    for condition in CONDITIONS:
        whole = {tuple(key.split("/")): value for key, value in results["cells"].items()}
        cells = {key[1:]: value for key, value in whole.items() if key[0] == condition}
        lines = []
        for row in STRATEGIES:
            found = {seed: cell for (name, seed), cell in cells.items() if name == row}
            if not found:
                continue
            line = [row]
            for name in names:
                text_of = interval([cell[name] for cell in found.values()])
                both = [cell[name] - cells["uniform", s][name] for s, cell in found.items() if ("uniform", s) in cells]
                line.append(text_of + (f" ({interval(both)})" if both and row != "uniform" else ""))
            seconds = np.mean([cell["seconds_per_step"] for cell in found.values()])
            effective = np.mean([cell["effective_tasks"] for cell in found.values()])
            lines.append([*line, f"{1000 * seconds:.0f}", f"{effective:.2f}", str(len(found))])
        if lines:
            header = ["strategy", *names, "ms per meta-step", "effective tasks", "seeds"]
            text.append(f"{condition}\n\n{table(header, lines)}\n")
    return "\n".join(text)


def main() -> None:
    """Train and test every cell, keeping what is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=Config.steps)
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--conditions", nargs="*", default=list(CONDITIONS), choices=CONDITIONS)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    config = Config(steps=arguments.steps)
    if arguments.quick:
        config = dataclasses.replace(config, channels=(8, 8, 8, 8), steps=20, warmup=2, test_tasks=20)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.json"
    settings = json.loads(json.dumps(dataclasses.asdict(config)))  # as a file has them
    results = json.loads(path.read_text()) if path.exists() else {"config": settings, "cells": {}}
    if results["config"] != settings:
        parser.error(f"{path} is of another configuration, {results['config']}; choose another --out")
    data = load(arguments.data_dir)
    test = make_test(config, data)
    seeds, conditions = arguments.seeds, arguments.conditions
    if arguments.quick:
        seeds, conditions = seeds[:1], conditions[:1]
    cells = [(s, c, n) for s in seeds for c in conditions for n in arguments.strategies]
    left = [(s, c, n) for s, c, n in cells if f"{c}/{n}/{s}" not in results["cells"]]
    began = time.time()
    for done, (seed, condition, name) in enumerate(left, 1):
        meta, took = train(config, condition, name, seed, data)
        results["cells"][f"{condition}/{name}/{seed}"] = {**test(meta), **took}
        path.write_text(json.dumps(results, indent=1))
        (arguments.out / "table.md").write_text(markdown(results))
        minutes = (time.time() - began) / 60
        print(
            f"{done} of {len(left)}: {condition}/{name}/{seed} {results['cells'][f'{condition}/{name}/{seed}']}; "
            f"{minutes:.1f} min, about {minutes / done * (len(left) - done):.0f} min left",
            flush=True,
        )
    print(markdown(results), flush=True)


if __name__ == "__main__":
    main()
