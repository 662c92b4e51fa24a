"""Nats per image of characters never seen, given 0 to 19 examples, without the leak: every kind of model in one table.

Claim: an autoregressive model of a few ten thousand parameters that reads its support, or is adapted by gradient, is
below the published likelihoods at every number of shots; conditioning on the support and gradient adaptation can be
compared on one density, for autoregressive models and flows too, where nobody has.

Published (`omniglot_gmn`, 1,623 characters in 964 background and 659 evaluation classes): see PUBLISHED below. The
table of Bartunov & Vetrov, 2018, is of a sampler with replacement: at 19 shots the query is in the support in 62 of
100 cases. The only published curve without the leak is of 26x26 images (Variational Memory Addressing, 2017, as
re-implemented).

Protocol: 28x28 binary images of the published binarisation, canonical split (867 training, 97 validation, 659 test
classes), no turns or reflections anywhere. Training tasks have 0 to 10 support and 4 query images of one class, 8 tasks
a meta-step. A class is tested with the same query image at every number of shots, never among its support
(`evaluate_shots`); classes are evenly spread over the 659. Intervals are over classes. CPU time of one core, without
compiling, is 180 s for a row; one that another row goes on from has two thirds of it, and those that go on one third
more, by their own rule: the table has the seconds. Exact: log-likelihood; IWAE-n: n importance samples; bound: the
variational bound of a flow, whose end was chosen on validation classes. Networks: dense 400-400 and 32 codes (VAE and
what reads a support into one), six causal blocks of 32 features (autoregressive), a small U-net (flow).

    taskset -c 0 python experiments/likelihood.py --data-dir DIR --out runs/likelihood          # about 2 h, 19 rows
    taskset -c 0 python experiments/likelihood.py --data-dir DIR --out runs/likelihood --rows "flow" "flow, MAML"
    taskset -c 0 python experiments/likelihood.py --data-dir DIR --out runs/quick --quick       # about 10 min

A run that was stopped goes on where it was; another seed takes as many meta-steps as the first. With a GPU:
`--seconds 1800 --classes 659 --clock wall`.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import metagen_jax as mg
from metagen_jax import build
from metagen_jax.budget import train_for
from metagen_jax.config import (
    ConditionalConfig,
    DataConfig,
    InnerConfig,
    ModelConfig,
    OuterConfig,
    TrainConfig,
    check,
)
from metagen_jax.evaluate_shots import adapted_score, likelihood_accuracy, set_likelihood, shot_curve
from metagen_jax.metrics.exemplar import exemplar_log_likelihood, fit_exemplars
from metagen_jax.metrics.interval import over_classes, over_seeds
from metagen_jax.metrics.likelihood import label
from metagen_jax.models.flow_likelihood import FIRST_LOG_SNR, bound_density
from metagen_jax.models.gaussian_paths import linear
from metagen_jax.parameters import load_meta, save_meta
from metagen_jax.report import Column, adaptation_strip, save, table
from metagen_jax.types import Array, Examples, Key, Params

SHOTS = (0, 1, 2, 3, 4, 5, 10, 19)
SHOTS_BY_SIZE = ((0, 1, 2, 3, 4, 5), (10,), (19,))
WAYS = ((5, 1), (5, 5), (20, 1), (20, 5))
TEST, SETS, LABELS, DRAWS = range(100, 104)

PUBLISHED = {
    "published, leak-free: memory addressing, 26x26": "- / 85.2 / 79.8 / 77.5 / 76.2 / 75.3 / 73.2 / 71.8",
    "published, with replacement: matching network": "89.7 / 83.3 / 78.9 / 75.7 / 72.9 / 70.1 / 59.9 / 45.8",
    "published, with replacement: statistician": "- / 102 / 83.4 / 77.8 / 75.2 / 74.6 / 71.7 / 71.5",
}

DENSE = ModelConfig(hidden=(400, 400), latents=32, context=64)
ROWWISE = ModelConfig(hidden=(400, 400), latents=32)  # read their support row by row, without a context
PIXELS = ModelConfig(context=64)
U_NET = ModelConfig(network="conv", hidden=(16, 32, 64), context=64)


@dataclasses.dataclass(frozen=True)
class Row:
    """A learner of a model, and from which row's parameters it goes on."""

    learner: str
    model: str
    network: ModelConfig
    begin: str | None = None
    steps: int = 0
    conditional: ConditionalConfig = dataclasses.field(default_factory=ConditionalConfig)
    rate: float = 2e-3
    inner: InnerConfig = dataclasses.field(default_factory=InnerConfig)
    labels: bool = False  # whether it classifies by likelihood, too


def _pixels(learner: str, **options: Any) -> Row:
    return Row(learner, "autoregressive", PIXELS, rate=4e-3, **options)


def _flow(learner: str, **options: Any) -> Row:
    return Row(learner, "flow", U_NET, **options)


MEAN = ConditionalConfig(reader="mean")
ROWS = {
    "autoregressive": _pixels("joint"),
    "autoregressive, mean": _pixels("amortised", conditional=MEAN, labels=True),
    "autoregressive, attention": _pixels("amortised", conditional=ConditionalConfig(reader="attention"), labels=True),
    "autoregressive, aligned": _pixels("amortised", labels=True),
    "autoregressive, aligned, then 3 steps": _pixels(
        "amortised", begin="autoregressive, aligned", steps=3, labels=True
    ),
    "autoregressive, MAML": _pixels("maml", begin="autoregressive", steps=3, labels=True),
    "autoregressive, learned loss": _pixels("learned_loss", begin="autoregressive", steps=3),
    "VAE": Row("joint", "vae", DENSE),
    "VAE, MAML": Row("maml", "vae", DENSE, begin="VAE", steps=5, rate=1e-3, labels=True),
    "VAE, prototypes": Row("prototypes", "vae", DENSE, begin="VAE", rate=1e-3),
    "VAE, latent Gaussian": Row("latent_gaussian", "vae", DENSE, begin="VAE", rate=1e-3, labels=True),
    "statistician": Row("amortised", "statistician", DENSE, labels=True),
    "statistician, 2 layers": Row("amortised", "statistician", DENSE, conditional=ConditionalConfig(layers=2)),
    "matching network": Row("amortised", "matching_network", ROWWISE, labels=True),
    "addressed memory": Row("amortised", "addressed_memory", ROWWISE),
    "flow": _flow("joint"),
    "flow, mean": _flow("amortised"),
    "flow, MAML": _flow("maml", begin="flow", steps=3),
    "flow, FOMAML": _flow("fomaml", begin="flow", steps=3),
    "flow, Reptile": _flow("reptile", begin="flow", steps=3, inner=InnerConfig(rate=0.01, fast_rate=0.01)),
}
ENDS = (4.0, 8.0, 16.0)  # signal to noise of a flow's bound, chosen on validation classes


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained and measured."""

    seconds: float = 180.0  # of a row
    classes: int = 220  # of the test
    num_samples: int = 1000
    draws: int = 4  # of a flow's bound
    label_samples: int = 50
    label_tasks: int = 60
    shots: tuple[int, int] = (0, 10)
    tasks: int = 8
    query: int = 4


def settings(config: Config, row: Row, data_dir: str, num_steps: int, seed: int) -> TrainConfig:
    """Return the configuration of a row: what `metagen train LEARNER MODEL` would take."""
    plain = row.learner in ("joint", "prototypes", "latent_gaussian") or row.steps == 0
    inner = dataclasses.replace(row.inner, steps=0 if plain else row.steps)
    outer = OuterConfig(
        num_steps, config.tasks, row.rate, rate_of_rates=2e-2, warmup=min(20, num_steps - 1), warm_start=0
    )
    data = DataConfig("omniglot_gmn", data_dir)
    return check(
        TrainConfig(
            row.learner,
            row.model,
            data,
            row.network,
            inner,
            outer,
            conditional=row.conditional,
            shots=(0, 0) if row.learner == "joint" else config.shots,  # whose batch is the query alone
            query=config.query,
            seed=seed,
        )
    )


def train(
    config: Config, name: str, data: build.Parts, data_dir: str, out: Path, seed: int, clock: Any, rows: dict[str, Any]
) -> Any:
    """Return meta-parameters of a row, which are kept, and what they took.

    A seed takes as many meta-steps as the one before it did, of those in `rows`, whatever the machine does meanwhile.
    """
    row, path = ROWS[name], out / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}.npz"
    asked = settings(config, row, data_dir, 1000, seed)
    built = build.model(asked, data.event, data.binary)
    learner = build.learner(asked, built)
    if path.exists():
        meta, header = load_meta(path, jax.eval_shape(learner.init, jax.random.key(0)))
        return meta, header["took"], built, learner
    begin, before = None, 0.0
    if row.begin:
        begin, took, _, _ = train(config, row.begin, data, data_dir, out, seed, clock, rows)
        before = took["seconds"]
    share = 1 / 3 if row.begin else 2 / 3 if any(other.begin == name for other in ROWS.values()) else 1.0
    family = build.training_tasks(asked, data)
    spent = train_for(
        learner,
        family,
        mg.uniform(family, config.tasks),
        lambda num_steps: build.outer(settings(config, row, data_dir, num_steps, seed)),
        config.seconds * share,
        jax.random.fold_in(jax.random.key(seed), 1),
        meta_steps=next((found["meta_steps"] for found in rows.get(name, {}).values()), None),
        begin=begin,
        clock=clock,
    )
    size = sum(leaf.size for leaf in jax.tree.leaves(spent.meta))
    took = {
        "meta_steps": spent.meta_steps,
        "seconds": spent.seconds + before,
        "parameters": size,
        "nonfinite_tasks": spent.nonfinite_tasks,
    }
    save_meta(path, spent.meta, took=took)
    return spent.meta, took, built, learner


def measure(config: Config, name: str, data: build.Parts, made: Any, out: Path, seed: int) -> dict[str, Any]:
    """Return everything that is measured of a row."""
    meta, took, built, learner = made
    density, test = built.density, build.take(data, "test")
    specs, key = build.specs(data, "test", config.classes), jax.random.key(0)
    end = None
    if density.kind == "bound":
        end, density = best_end(config, built, learner, data, meta)
    num = {"exact": 1, "importance": config.num_samples, "bound": config.draws}[density.kind]
    score = adapted_score(learner.adapt, density, num)
    curves = [  # by size, since a support is padded to the largest; the queries are the same
        shot_curve(score, test, meta, specs, jax.random.fold_in(key, TEST), shots=shots, task_chunk=4)
        for shots in SHOTS_BY_SIZE
    ]
    best, elbo = (np.concatenate([getattr(c, part) for c in curves], axis=1) for part in ("best", "elbo"))
    _, sets = set_likelihood(score, test, meta, specs, jax.random.fold_in(key, SETS), task_chunk=4)
    found: dict[str, Any] = {
        **took,
        "kind": label(density, num),
        "end_snr": end,
        "nats": [_interval(-column) for column in best.T],
        "gain": [_interval(best[:, column] - best[:, 0]) for column in range(len(SHOTS))],
        "elbo": [_interval(-column) for column in elbo.T],
        "set": _interval(-sets),
    }
    if ROWS[name].labels:
        few = adapted_score(learner.adapt, density, min(num, config.label_samples))
        found["accuracy"] = {
            f"{way}-way {shots}-shot": _interval(
                100
                * likelihood_accuracy(
                    few,
                    test,
                    meta,
                    jax.random.fold_in(key, LABELS),
                    way=way,
                    shots=shots,
                    tasks=config.label_tasks if way < 20 else config.label_tasks // 3,
                )
            )
            for way, shots in WAYS
        }
    draw(learner, built, data, meta, out / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}.png")
    return found


def best_end(config: Config, built: Any, learner: Any, data: build.Parts, meta: Params) -> tuple[float, Any]:
    """Return the end of a flow's bound that is tightest on validation classes, and the density."""
    images, specs = build.take(data, "validation"), build.specs(data, "validation", 48)
    found = {}
    for end in ENDS:
        density = bound_density(built.velocity, linear(), log_snr=(FIRST_LOG_SNR, float(np.log(end))))
        score = adapted_score(learner.adapt, density, 1)
        curve = shot_curve(score, images, meta, specs, jax.random.key(5), shots=(5,), task_chunk=4)
        found[end] = (curve.best.mean(), density)
    end = max(found, key=lambda end: float(found[end][0]))
    return end, found[end][1]


def draw(learner: Any, built: Any, data: build.Parts, meta: Params, path: Path) -> None:
    """Draw 5 support images and 8 samples of each of 8 unseen classes, and 3 images that were held out."""
    family, specs = build.family(data, "test", 5, 3), build.specs(data, "test", 8)

    def one(meta: Params, bank: Any, key: Key, spec: Array) -> tuple[Array, Array, Array]:
        make_key, adapt_key, sample_key = jax.random.split(key, 3)
        task = family.make(bank, make_key, spec)
        params, _ = learner.adapt(meta, adapt_key, task.support)
        return task.support.x, built.model.sample(params, sample_key, 8), task.query.x

    keys = jax.random.split(jax.random.key(DRAWS), specs.shape[0])
    parts = jax.jit(jax.vmap(one, in_axes=(None, None, 0, 0)))(meta, family.data, keys, specs)
    support, samples, real = (np.asarray(part) for part in parts)
    save(adaptation_strip([Column("given", support), Column("made", samples), Column("real, never seen", real)]), path)


def exemplars(config: Config, data: build.Parts) -> dict[str, Any]:
    """Return the copy baseline on the same images."""
    train = build.take(data, "train")
    family = mg.episodes(train, 5, 4)

    def drawn(key: Key) -> Any:
        spec_key, make_key = jax.random.split(key)
        return family.make(family.data, make_key, family.describe(family.data, spec_key))

    tasks = jax.jit(jax.vmap(drawn))(jax.random.split(jax.random.key(1), 200))
    score = exemplar_log_likelihood(fit_exemplars(train.images, tasks.support, tasks.query))

    def both(meta: Params, key: Key, support: Examples, x: Array) -> tuple[Array, Array]:
        value = score(support, x)
        return value, value

    test, specs, key = build.take(data, "test"), build.specs(data, "test", config.classes), jax.random.key(0)
    curve = shot_curve(both, test, {}, specs, jax.random.fold_in(key, TEST), shots=SHOTS)
    _, sets = set_likelihood(both, test, {}, specs, jax.random.fold_in(key, SETS))
    return {
        "kind": "exact",
        "nats": [_interval(-column) for column in curve.best.T],
        "gain": [_interval(curve.best[:, column] - curve.best[:, 0]) for column in range(len(SHOTS))],
        "set": _interval(-sets),
        "seconds": 0.0,
        "meta_steps": 0,
        "parameters": 784,
    }


def markdown(results: dict[str, Any]) -> str:
    """Return the tables: means over seeds; intervals over classes, those of a mean over seeds being of the first."""
    lines, labels = [], []
    for name, seeds in results["rows"].items():
        row, found = next(iter(seeds.values())), list(seeds.values())
        size = f"{row['parameters'] / 1000:.0f}k"
        nats = [f"{value:.1f}" for value in np.mean(_all(found, "nats"), axis=0)[:, 0]]
        half = (row["nats"][0][2] - row["nats"][0][1]) / 2
        apart = f"{over_seeds([entry['nats'][5][0] for entry in found])[1]:.1f}" if len(found) > 1 else ""
        took = [size, f"{np.mean([entry['seconds'] for entry in found]):.0f}", str(row["meta_steps"])]
        took += [str(len(found)), apart]
        gain, joint = _cell(_all(_all(found, "gain"), 5)), _cell(_all(found, "set"))
        lines.append([name, row["kind"], *nats, f"{half:.1f}", gain, joint, *took])
        if "accuracy" in row:
            cells = [_all(_all(found, "accuracy"), f"{way}-way {shots}-shot") for way, shots in WAYS]
            labels.append([name, *map(_cell, cells)])
    lines += [[name, "", *text.split(" / "), *[""] * 8] for name, text in PUBLISHED.items()]
    header = ["model", "kind", *(str(shots) for shots in SHOTS), "±", "gain of 5", "sets of 5"]
    header += ["parameters", "CPU-s", "meta-steps", "seeds", "± over seeds, 5"]
    text = table(header, lines) + "\n"
    if labels:
        labels.append(["published, best of each", "90.8", "97.4", "77.0", "91.0"])
        text += "\n" + table(["by likelihood", *(f"{way}-way {shots}-shot" for way, shots in WAYS)], labels) + "\n"
    return text


def _all(entries: list[Any], part: Any) -> list[Any]:
    return [entry[part] for entry in entries]


def _interval(values: np.ndarray) -> list[float]:
    return [float(number) for number in over_classes(np.asarray(values))]


def _cell(entries: list[list[float]]) -> str:
    """Return the mean of several seeds' [mean, low, high], and half of the first one's interval."""
    mean = np.mean([entry[0] for entry in entries])
    return f"{mean:.1f} ± {(entries[0][2] - entries[0][1]) / 2:.1f}"


def main() -> None:
    """Train and measure every row, keeping what is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--seconds", type=float, default=Config.seconds)
    parser.add_argument("--classes", type=int, default=Config.classes)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    config = Config(seconds=arguments.seconds, classes=arguments.classes)
    if arguments.quick:
        config = Config(seconds=3.0, classes=8, num_samples=50, draws=1, label_samples=5, label_tasks=6)
    clock: Callable[[], float] = time.process_time if arguments.clock == "cpu" else time.perf_counter
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    path, asked = out / "results.json", json.loads(json.dumps(dataclasses.asdict(config)))
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"config": asked, "rows": {}}
    if results["config"] != asked:
        parser.error(f"{path} is of another configuration, {results['config']}; choose another --out")
    data = build.parts(DataConfig("omniglot_gmn", arguments.data_dir))
    if "exemplar mixture" not in results["rows"]:
        results["rows"]["exemplar mixture"] = {"0": exemplars(config, data)}
    for seed in arguments.seeds:
        for name in arguments.rows:
            found = results["rows"].setdefault(name, {})
            if str(seed) in found:
                continue
            try:
                made = train(config, name, data, arguments.data_dir, out, seed, clock, results["rows"])
                found[str(seed)] = measure(config, name, data, made, out, seed)
            except mg.Divergence as error:
                print(f"{name}, seed {seed}: {error}", flush=True)
                if not found:
                    del results["rows"][name]
                continue
            path.write_text(json.dumps(results, indent=1))
            (out / "table.md").write_text(markdown(results))
            print(markdown(results), flush=True)


if __name__ == "__main__":
    main()
