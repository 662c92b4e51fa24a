"""Few-shot GANs, measured: the setting in which Reptile on a Wasserstein GAN was published as pictures.

Claim: a generator and a discriminator that were meta-trained adapt to a class that they have never seen from four
images, and make images that are nearer to that class than before adapting, without copying; reading the support and
then taking gradient steps also beats pre-training and fine-tuning at as many steps. MAML through the game, first or
second order, adapts where Reptile hardly does within as few meta-steps.
Published: Clouatre & Demers, FIGR, 2019: Wasserstein GAN with gradient penalty, 4 images, 10 inner steps of one
discriminator and one generator step by SGD at 1e-3, Reptile with Adam at 1e-4, one task a meta-step, a million of them;
no number. The code of Liang, Liu & Liu, DAWSON, 2020, has a first-order MAML on GANs, and no table either.
Protocol: Omniglot, canonical split (867 / 97 / 659 classes), published binarisation, support without replacement, the
other 16 images of a class held out; 16 samples a class and step; distances in the features of two critics trained on
the training classes only; intervals over classes, differences paired by class. MNIST: digits 0 to 8 train, 9 is held
out, so there is one class, intervals are over episodes, and what compares classes is left out.
Departures from the published setting: convolutional networks of 28x28, layer normalisation in the generator, norm of
the gradient penalty over all pixels, several tasks a meta-step, all rows begin from one jointly trained GAN, and few
meta-steps: what two CPU cores do in the minutes of the table. The GAN that is fine-tuned is trained on for as long as
the longest of the meta-trained rows; its rule is the best of 13 on other classes, for each number of steps.

    python experiments/few_shot_gan.py --data omniglot_gmn --data-dir DIR --out runs/few_shot_gan

takes an hour or more on two CPU cores (`--quick` some ten minutes; `--data mnist --data-dir DIR` about twenty). What is
done is kept in the folder, so that a run that was stopped goes on.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metagen_jax as mg
from metagen_jax import baselines, build, critics, evaluate_samples, report
from metagen_jax.config import AdversarialConfig, InnerConfig, ModelConfig, OuterConfig, TrainConfig, check
from metagen_jax.metrics.interval import over_classes
from metagen_jax.parameters import load_meta, save_meta
from metagen_jax.tasks.augment import with_symmetries
from metagen_jax.tasks.sources import load
from metagen_jax.tasks.splits import canonical

SHOTS, QUERY, HELD_OUT, SAMPLES = 4, 10, 16, 16
EPISODES = 64  # of the one held-out class of MNIST
LONGER = "joint, trained on"
SHOWN = ("kid", "kid_contrastive", "recognisability", "diversity", "memorisation", "copies", "discrimination")


@dataclasses.dataclass(frozen=True)
class Config:
    """How long each row is trained, and how it is tested."""

    joint_steps: int = 5000
    maml_steps: int = 600
    shaping_steps: int = 100
    reptile_steps: int = 120  # everything moves, so a meta-step costs several times as much
    amortised_steps: int = 2400
    read_then_maml_steps: int = 600
    longer_steps: int = 2400  # that the fine-tuned rows' GAN is trained on for: no row has more
    classes: int | None = 220  # test classes, evenly spread; None for all
    judges: critics.CriticConfig = dataclasses.field(default_factory=critics.CriticConfig)
    seed: int = 0


class Data:
    """The images of a source: training classes, classes to choose rates on, test classes."""

    def __init__(self, name: str, data_dir: str | None, config: Config):
        images = load(name, data_dir=data_dir)
        self.name = name
        if name == "mnist":
            self.train, self.test = images.take(np.arange(9)), images.take(np.array([9]))
            self.choice, self.symmetries = self.train, False
            self.specs = jnp.zeros((config.classes or EPISODES, 1), jnp.int32)
            self.choice_specs = jnp.arange(9, dtype=jnp.int32)[:, None]
        else:
            split = canonical(images)
            self.train, self.choice, self.test = (
                images.take(part) for part in (split.train, split.validation, split.test)
            )
            self.symmetries = True
            count = self.test.num_classes if config.classes is None else min(config.classes, self.test.num_classes)
            self.specs = jnp.asarray(np.linspace(0, self.test.num_classes - 1, count).round().astype(int)[:, None])
            self.choice_specs = jnp.arange(0, 97, 6)[:, None]

    def tasks(self) -> mg.TaskFamily:
        """Return the training tasks."""
        family = mg.episodes(self.train, SHOTS, QUERY)
        return with_symmetries(family) if self.symmetries else family


def rows(config: Config) -> dict[str, TrainConfig]:
    """Return the rows of the table: what moves inside, how, and for how long it is meta-trained."""
    base = check(
        TrainConfig(
            model="gan",
            network=ModelConfig(network="conv", hidden=(16, 32), latents=32, context=64),
            inner=InnerConfig(steps=5, fast_rate=0.02),
            outer=OuterConfig(steps=config.maml_steps, tasks=8, rate_of_rates=1e-2, warmup=20),
            adversarial=AdversarialConfig(discriminator=(32, 64)),
            shots=(SHOTS, SHOTS),
            query=QUERY,
            seed=config.seed,
        )
    )

    def row(
        learner: str, steps: int, *, inner: Any = None, rate: float = 3e-4, tasks: int = 8, **game: Any
    ) -> TrainConfig:
        return check(
            dataclasses.replace(
                base,
                learner=learner,
                inner=inner or base.inner,
                outer=dataclasses.replace(base.outer, steps=steps, rate=rate, tasks=tasks),
                adversarial=dataclasses.replace(base.adversarial, **game),
            )
        )

    published = InnerConfig(steps=10, moves=("all",), rates="fixed", rate=1e-3, fast_rate=1e-3)
    no_steps = dataclasses.replace(base.inner, steps=0)
    return {
        "joint": row("joint", config.joint_steps, rate=6e-4, tasks=16),
        LONGER: row("joint", config.longer_steps, rate=3e-4, tasks=16),
        "Reptile, all weights (published setting)": row("reptile", config.reptile_steps, inner=published, rate=1e-4),
        "MAML, contexts, no shaping": row("maml", config.maml_steps),
        "MAML, contexts, exact": row("maml", config.shaping_steps, shaping=True),
        "FOMAML, contexts": row("fomaml", config.maml_steps),
        "amortised": row("amortised", config.amortised_steps, inner=no_steps, rate=5e-4, tasks=16),
        "amortised, then MAML": row("amortised", config.read_then_maml_steps),
    }


def train_row(run: TrainConfig, data: Data, start: mg.Params) -> tuple[mg.Params, dict[str, Any]]:
    """Meta-train one row from what is learned already; return averaged meta-parameters and what it took."""
    family = data.tasks()
    built = build.model(run, data.train.event, True)
    learner = build.learner(run, built)
    optimizer, sampler = build.outer(run), mg.uniform(family, run.outer.tasks)
    meta = learner.init(jax.random.key(run.seed + 1))
    meta = jax.tree.map(jnp.copy, {**meta, **{name: tree for name, tree in start.items() if name in meta}})
    state = mg.init_state(learner, sampler, optimizer, jax.random.key(run.seed + 2), meta=meta)
    step = mg.make_step(learner, family, sampler, optimizer, average_decay=run.outer.average_decay)
    begin, trace = time.perf_counter(), []

    def on_chunk(state: Any, metrics: Any) -> None:
        names = ("loss/generator", "loss/discriminator", "spread_ratio", "support/spread_ratio", "num_nonfinite")
        record = {name: np.asarray(metrics[name]).mean(0).tolist() for name in names if name in metrics}
        trace.append({"step": int(state.step), "seconds": round(time.perf_counter() - begin, 1), **record})
        if int(state.step) % 100 < 25:
            print(trace[-1], flush=True)

    state = mg.train(step, state, family.data, run.outer.steps, chunk=25, on_chunk=on_chunk)
    return state.average, {"seconds": time.perf_counter() - begin, "trace": trace[:: max(1, len(trace) // 20)]}


def draw(learner: mg.MetaLearner, run: TrainConfig, data: Data, judges: Any, meta: mg.Params) -> Any:
    """Return what is measured of a row at every inner step from 0 to 10."""
    family = mg.episodes(data.test, SHOTS, HELD_OUT)
    sample = build.model(run, data.train.event, True).model.sample
    drawer = evaluate_samples.drawer(learner.path, sample, family, steps=range(11), num_samples=SAMPLES, task_chunk=8)
    return drawer(meta, judges, data.specs, jax.random.key(7), lambda done: None)


def tuned(run: TrainConfig, data: Data, judges: Any, begin: mg.Params, rules: Any, steps: int) -> tuple[Any, Any, str]:
    """Return learner and meta-parameters of ordinary gradient steps at the best of the rules, and which that is."""
    built = build.model(run, data.train.event, True)
    learner = baselines.stepper(run, built, steps)
    family = mg.episodes(data.choice, SHOTS, HELD_OUT)
    score = evaluate_samples.kernel_score(built.model.sample, judges)
    choose = baselines.chooser(learner, family, data.choice_specs, jax.random.key(11), score)
    rule = choose(begin, rules)
    return learner, baselines.with_rule(begin, rule), str(rule)


def entry(drawn: Any, kept: dict[str, np.ndarray], **more: Any) -> dict[str, Any]:
    """Return a row of the results: intervals of every measure at every step, pooled measures, and what it took."""
    intervals = {name: [_interval(column) for column in values.T] for name, values in kept.items()}
    pooled = {name: values.tolist() for name, values in evaluate_samples.measure_pooled(drawn).items()}
    return {"steps": drawn.steps.tolist(), "within": intervals, "pooled": pooled, **more}


def gains(run: dict[str, np.ndarray], at: int, others: dict[str, tuple[dict[str, np.ndarray], int]]) -> dict[str, Any]:
    """Return by how much the run's kernel distances are smaller than the others', paired by class."""
    return {
        name: {m: _interval(values[m][:, step] - run[m][:, at]) for m in ("kid", "kid_contrastive")}
        for name, (values, step) in others.items()
    }


def markdown(results: dict[str, Any]) -> str:
    """Return the tables: every row before and after adapting, and what adapting and meta-learning gain."""
    left_out = ("recognisability", "discrimination") if results["data"] == "mnist" else ()  # they compare classes
    lines = [
        "| | step | kid | recognisability | diversity | memorisation | copies | discrimination | fid |",
        "|" + "---|" * 9,
    ]
    for name, row in results["rows"].items():
        for step in row["shown"]:
            at = row["steps"].index(step)
            cells = ["-" if m in left_out else _cell(row["within"][m][at]) for m in SHOWN if m != "kid_contrastive"]
            label = name if step == row["shown"][0] else ""
            fid, low, high = row["pooled"]["fid"][at]
            lines.append(f"| {label} | {step} | {' | '.join(cells)} | {fid:.1f} ± {(high - low) / 2:.1f} |")
    lines += [
        "",
        "| kid is smaller after adapting | than its own step 0 | than fine-tuned (5 steps; Reptile: 10) | minutes |",
        "|---|---|---|---|",
    ]
    for name, row in results["rows"].items():
        if "gains" in row:
            cells = [_cell(row["gains"][other]["kid"]) for other in ("step 0", "fine-tuned")]
            lines.append(f"| {name} | {' | '.join(cells)} | {row['seconds'] / 60:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train and measure every row, keeping what is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("omniglot_gmn", "mnist"), default="omniglot_gmn")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    config = Config()
    if arguments.data == "mnist":
        config = Config(
            joint_steps=800,
            maml_steps=150,
            shaping_steps=40,
            reptile_steps=30,
            amortised_steps=300,
            read_then_maml_steps=60,
            longer_steps=300,
            classes=EPISODES,
            judges=critics.CriticConfig(classifier_steps=800, contrastive_steps=300),
        )
    if arguments.quick:
        few = critics.CriticConfig(classifier_steps=300, contrastive_steps=100)
        config = Config(60, 20, 10, 5, 40, 10, 20, 24, few)
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    data = Data(arguments.data, arguments.data_dir, config)
    path = out / "results.json"
    asked = json.loads(json.dumps({"data": data.name, "config": dataclasses.asdict(config)}))
    results = json.loads(path.read_text()) if path.exists() else {**asked, "rows": {}}
    if {name: results.get(name) for name in asked} != asked:
        raise SystemExit(f"{out} has rows of another configuration; choose another --out")

    judges_path = out / "critics.npz"
    if not judges_path.exists():
        critics.save(critics.train_critics(data.train, config.judges), judges_path)
    judges = critics.load(judges_path, data.train)
    results["critics"] = judges.header["weights_sha256"]

    plan, measured, strips = rows(config), dict[str, Any](), dict[str, Any]()
    params: dict[str, mg.Params] = {}
    for name, run in plan.items():
        start = {} if name == "joint" else params["amortised" if "then" in name else "joint"]
        params[name], took = _kept(
            out / f"{_slug(name)}.npz", run, data, lambda run=run, start=start: train_row(run, data, start)
        )
        results["rows"].setdefault(name, {}).update({"meta_steps": run.outer.steps, **took})
        path.write_text(json.dumps(results, indent=1))

    joint = plan["joint"]
    fresh = build.model(joint, data.train.event, True).model.init(jax.random.key(5))
    candidates = baselines.game_candidates(joint, build.roles(joint, build.model(joint, data.train.event, True)))
    references: dict[int, Any] = {}
    for steps in (5, 10):
        learner, meta, rule = tuned(joint, data, judges, params[LONGER], candidates.fine_tuning, steps)
        drawn = draw(learner, joint, data, judges, meta)
        references[steps] = evaluate_samples.measure(drawn)
        name = f"joint, fine-tuned for {steps} steps"
        results["rows"][name] = entry(drawn, references[steps], rule=rule, shown=[0, steps])
        strips.setdefault("joint, fine-tuned", (learner, meta, 10))
    rules = (*candidates.scratch_sgd, *candidates.scratch_adam)
    learner, meta, rule = tuned(joint, data, judges, fresh, rules, 10)
    drawn = draw(learner, joint, data, judges, meta)
    results["rows"]["from scratch"] = entry(drawn, evaluate_samples.measure(drawn), rule=rule, shown=[0, 10])
    for name, run in plan.items():
        if name in ("joint", LONGER):
            continue
        learner = build.learner(run, build.model(run, data.train.event, True))
        drawn = draw(learner, run, data, judges, params[name])
        kept = measured[name] = evaluate_samples.measure(drawn)
        trained = run.inner.steps
        others = {"step 0": (kept, 0), "fine-tuned": (references[10 if trained > 5 else 5], trained or 5)}
        row = entry(drawn, kept, shown=sorted({0, trained}), gains=gains(kept, trained, others))
        results["rows"][name] |= row
        strips[name] = (learner, params[name], trained)
        path.write_text(json.dumps(results, indent=1))
        print(name, json.dumps(row["gains"]), flush=True)
    for name, made in (
        ("copy of the support", evaluate_samples.copying),
        ("real, half against half", evaluate_samples.real_halves),
    ):
        results["rows"][name] = entry(made(drawn), evaluate_samples.measure(made(drawn)), shown=[0])
    results["rows"] = {name: row for name, row in results["rows"].items() if "shown" in row} | {}
    path.write_text(json.dumps(results, indent=1))
    (out / "table.md").write_text(markdown(results))
    print(markdown(results))
    _pictures(out, data, plan, strips)


def _pictures(out: Path, data: Data, plan: dict[str, TrainConfig], strips: dict[str, Any]) -> None:
    """Save a strip for each row: the support, samples before and after adapting, held-out real images."""
    family = mg.episodes(data.test, SHOTS, HELD_OUT)
    model = build.model(plan["joint"], data.train.event, True).model
    count = len(data.specs)
    chosen = data.specs[np.linspace(0, count - 1, 8).round().astype(int)]
    for name, (learner, meta, trained) in strips.items():
        steps = sorted({0, 1, trained})

        def one(meta: Any, bank: Any, key: Any, spec: Any, learner: Any = learner, steps: Any = steps) -> Any:
            task = family.make(bank, key, spec)
            path, _ = learner.path(meta, jax.random.key(1), task.support, steps[-1])
            at = jax.tree.map(lambda leaf: leaf[jnp.asarray(steps)], path)
            made = jax.lax.map(lambda params: model.sample(params, jax.random.key(2), 6), at)
            return task.support.x, made, task.query.x[:4]

        keys = jax.random.split(jax.random.key(3), 8)
        drawn = jax.jit(jax.vmap(one, in_axes=(None, None, 0, 0)))(meta, family.data, keys, chosen)
        support, made, real = (np.asarray(images) for images in drawn)
        columns = [report.Column(f"{SHOTS} given", support)]
        columns += [report.Column(f"step {step}", made[:, at]) for at, step in enumerate(steps)]
        figure = report.adaptation_strip([*columns, report.Column("real, never seen", real)])
        report.save(figure, out / f"strip-{_slug(name)}.png")


def _interval(values: np.ndarray) -> list[float]:
    """Return mean, low and high over the classes that stayed finite, and how many did not."""
    finite = np.isfinite(values)
    return (
        [*over_classes(values[finite]), int((~finite).sum())]
        if finite.sum() > 1
        else [float("nan")] * 3 + [len(values)]
    )


def _cell(interval: list[float]) -> str:
    mean, low, high, lost = interval
    digits = 2 if abs(mean) < 10 else 1
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]" + (f" ({lost:.0f} diverged)" if lost else "")


def _slug(name: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())


def _kept(path: Path, run: TrainConfig, data: Data, make: Callable[[], Any]) -> tuple[mg.Params, dict[str, Any]]:
    """Return what `make` returned when it was first called, from the file if there is one."""
    target = jax.eval_shape(build.learner(run, build.model(run, data.train.event, True)).init, jax.random.key(0))
    if path.exists():
        params, header = load_meta(path, target)
        return params, header["took"]
    print(f"training {path.stem}", flush=True)
    params, took = make()
    save_meta(path, params, took=took)
    return params, took


if __name__ == "__main__":
    main()
