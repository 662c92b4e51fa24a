"""Few-shot generation of Omniglot by every adapter, on a VAE and on a GAN, at equal compute: one table.

Claim: the families of meta-learning that are known from classification all adapt generative models through one
signature, so that what each is worth for generation can be measured beside the others; no public table does.
Published: nothing comparable for gradient-adapted generators (`experiments/omniglot_learners.py` and
`experiments/few_shot_gan.py` say what there is, and train some of these rows for longer).

Protocol: Omniglot in the published binarisation, canonical split; 5 support images without replacement, the other 15 of
a class held out; test classes evenly spread. VAE: likelihood of the held-out images, IWAE-50 in nats per image. GAN:
kernel distance within the class of 16 samples to the held-out images, in the features of critics trained on training
classes, lower is better. All rows of a model begin at one jointly trained model and then have the same CPU time of
meta-training on one core, without compiling; 5 inner steps; learned rates where a learner can have them; gains are
differences to its own step 0, paired by class, with 95 % intervals over classes. Rows that read their support
(prototypes, initialiser, regressed, amortised) have done so at step 0 already, so their gain is that of gradient steps
alone. Means leave out classes that diverged, and say how many.

    taskset -c 0 python experiments/few_shot_generation.py vae --data-dir DIR --out runs/generation  # about 40 min
    taskset -c 0 python experiments/few_shot_generation.py gan --data-dir DIR --out runs/gan --seconds 300  # 2 hours

A run that was stopped goes on where it was. `--seconds` trains longer: on the GAN 45 s are 50 to 75 meta-steps, and
teach nothing.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metagen_jax as mg
from metagen_jax import build, critics, evaluate_samples
from metagen_jax.config import AdversarialConfig, DataConfig, InnerConfig, ModelConfig, OuterConfig, TrainConfig, check
from metagen_jax.evaluate import adaptation_curves
from metagen_jax.metrics.interval import over_classes
from metagen_jax.parameters import load_meta, save_meta
from metagen_jax.report import table
from metagen_jax.train import Divergence, TrainState
from metagen_jax.types import Metrics, Params

SHOTS, HELD_OUT, STEPS = 5, 15, 5
EVALUATED = (0, STEPS, 2 * STEPS)

ROWS = {
    "vae": (
        *("joint", "maml", "fomaml", "reptile", "anil", "boil", "meta_sgd", "maml_plus_plus", "cavia", "imaml"),
        *("learned_loss", "learned_optimizer", "initialiser", "regressed", "prototypes"),
    ),
    "gan": (
        *("joint", "maml", "fomaml", "reptile", "anil", "boil", "meta_sgd", "maml_plus_plus", "cavia", "imaml"),
        *("learned_optimizer", "initialiser", "regressed", "amortised"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """How long each row is trained, and how it is tested."""

    seconds: float = 45.0  # CPU time of the meta-training of a row
    joint_steps: tuple[int, int] = (3000, 5000)  # of the common start: VAE, GAN
    classes: int = 110  # of the test
    num_samples: int = 50
    judges: critics.CriticConfig = dataclasses.field(default_factory=critics.CriticConfig)
    seed: int = 0


def configured(model: str, row: str, num_steps: int, data_dir: str, seed: int) -> TrainConfig:
    """Return the configuration of a row: what `metagen train ROW MODEL` would take."""
    is_vae = model == "vae"
    inner = InnerConfig(steps=STEPS, fast_rate=0.1 if is_vae else 0.02)
    if row == "reptile":
        inner = dataclasses.replace(inner, rate=1e-4 if is_vae else 1e-3, fast_rate=1e-2)
    elif row == "boil":
        inner = dataclasses.replace(inner, rate=1e-4 if is_vae else 1e-3, rates="per_step")
    elif row == "imaml":
        inner = dataclasses.replace(inner, strength=10.0 if is_vae else 1.0, fast_rate=0.02)
    elif row == "learned_optimizer" and is_vae:
        inner = dataclasses.replace(inner, fast_rate=0.2)
    elif row == "prototypes":
        inner = dataclasses.replace(inner, steps=0)
    elif row == "cavia":
        inner = dataclasses.replace(inner, fast_rate=0.1 if is_vae else 0.02)
    return check(
        TrainConfig(
            row,
            model,
            DataConfig("omniglot_gmn", data_dir, symmetries=True),
            ModelConfig(hidden=(400, 400), context=128)
            if is_vae
            else ModelConfig(network="conv", hidden=(16, 32), context=64),
            inner,
            OuterConfig(
                num_steps,
                tasks=16 if row == "joint" else 8,
                rate=2e-3 if row == "joint" and is_vae else 6e-4 if row == "joint" else 1e-3 if is_vae else 3e-4,
                rate_of_rates=1e-2,
                warmup=min(20, num_steps - 1),
                warm_start=0,
            ),
            AdversarialConfig() if is_vae else AdversarialConfig(discriminator=(32, 64)),
            shots=(SHOTS, SHOTS),
            query=10,
            seed=seed,
        )
    )


def train(settings: TrainConfig, data: build.Parts, begin: Params, chunk: int = 25) -> tuple[Params, dict[str, float]]:
    """Train as it says from what is learned already; return averaged meta-parameters and what it took."""
    family = build.training_tasks(settings, data)
    learner = build.learner(settings, build.model(settings, data.event, data.binary))
    optimizer = build.outer(settings)
    sampler, step = build.meta_step(settings, learner, family, optimizer)
    meta = learner.init(jax.random.key(settings.seed + 1))
    meta = jax.tree.map(jnp.copy, {**meta, **{name: tree for name, tree in begin.items() if name in meta}})
    state = mg.init_state(learner, sampler, optimizer, jax.random.key(settings.seed + 2), meta=meta)
    times, lost = [time.process_time()], [0.0]

    def on_chunk(state: TrainState, metrics: Metrics) -> None:
        times.append(time.process_time())
        lost.append(float(metrics["num_nonfinite"].sum()))

    state = mg.train(step, state, family.data, settings.outer.steps, chunk=chunk, on_chunk=on_chunk)
    took = {"meta_steps": settings.outer.steps, "seconds": times[-1] - times[1], "nonfinite_tasks": sum(lost)}
    return state.average, {**took, "seconds_a_step": (times[-1] - times[1]) / max(1, len(times) - 2) / chunk}


def measure(settings: TrainConfig, config: Config, data: build.Parts, judges: Any, meta: Params) -> dict[str, Any]:
    """Return the measures of a row at every evaluated step, with intervals over classes."""
    built = build.model(settings, data.event, data.binary)
    learner = build.learner(settings, built)
    family = build.family(data, "test", SHOTS, HELD_OUT)
    specs, key = build.specs(data, "test", config.classes), jax.random.key(7)
    if settings.model == "vae":
        curve = adaptation_curves(
            learner.path, built.density, family, steps=EVALUATED, num_samples=config.num_samples, task_chunk=10
        )(meta, specs, key)
        values = {"iwae": -curve.iwae, "elbo": -curve.elbo}
    else:
        drawer = evaluate_samples.drawer(
            learner.path, built.model.sample, family, steps=EVALUATED, num_samples=16, task_chunk=10
        )
        values = evaluate_samples.measure(drawer(meta, judges, specs, key, lambda done: None))
    found: dict[str, Any] = {name: [_interval(column) for column in of.T] for name, of in values.items()}
    first = next(iter(values))
    return {**found, "gain": [_interval(values[first][:, 0] - column) for column in values[first].T]}


def markdown(model: str, rows: dict[str, Any]) -> str:
    """Return the table of a model."""
    shown = ("iwae",) if model == "vae" else ("kid", "recognisability", "diversity", "memorisation")
    digits = 1 if model == "vae" else 2
    header = [model, *(f"{name}, step {step}" for name in shown[:1] for step in EVALUATED), f"gain at {STEPS}"]
    header += [f"{name} at {STEPS}" for name in shown[1:]] + ["meta-steps"]
    lines = [
        [
            name,
            *(_cell(entry, digits) for entry in row[shown[0]]),
            _cell(row["gain"][1], digits),
            *(_cell(row[measured][1], 2) for measured in shown[1:]),
            str(row["meta_steps"]),
        ]
        for name, row in rows.items()
    ]
    return table(header, lines) + "\n"


def main() -> None:
    """Train and measure every row, keeping what is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=tuple(ROWS))
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=Config.seconds)
    parser.add_argument("--rows", nargs="*")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    model, out, data_dir = arguments.model, arguments.out, arguments.data_dir
    config = Config(seconds=arguments.seconds)
    if arguments.quick:
        few = critics.CriticConfig(classifier_steps=200, contrastive_steps=100)
        config = Config(seconds=5, joint_steps=(200, 100), classes=20, num_samples=10, judges=few)
    out.mkdir(parents=True, exist_ok=True)
    data = build.parts(DataConfig("omniglot_gmn", data_dir))
    judges = None
    if model == "gan":
        images, path = build.take(data, "train"), out / "critics.npz"
        if not path.exists():
            critics.save(critics.train_critics(images, config.judges), path)
        judges = critics.load(path, images)

    joint = configured(model, "joint", config.joint_steps[model == "gan"], data_dir, config.seed)
    start_path = out / f"joint-{model}.npz"
    target = jax.eval_shape(build.model(joint, data.event, data.binary).model.init, jax.random.key(0))
    if not start_path.exists():
        save_meta(start_path, train(joint, data, {})[0], step=joint.outer.steps)
    learned = build.roles(joint, build.model(joint, data.event, data.binary)).joint
    start = {name: tree for name, tree in load_meta(start_path, target)[0].items() if name in learned}

    path = out / f"{model}.json"
    asked = json.loads(json.dumps(dataclasses.asdict(config)))
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"config": asked, "rows": {}}
    if results["config"] != asked:
        parser.error(f"{path} is of another configuration, {results['config']}; choose another --out")
    for row in arguments.rows or ROWS[model]:
        if row in results["rows"]:
            continue
        try:
            short = train(configured(model, row, 20, data_dir, config.seed), data, start, chunk=10)[1]
            num_steps = 25 * max(1, round(config.seconds / short["seconds_a_step"] / 25))
            settings = configured(model, row, num_steps, data_dir, config.seed)
            meta, took = train(settings, data, start)
        except Divergence as error:  # no row, and the others go on
            print(f"{row} diverged: {error}", flush=True)
            continue
        results["rows"][row] = {**took, **measure(settings, config, data, judges, meta)}
        results["rows"] = {name: results["rows"][name] for name in ROWS[model] if name in results["rows"]}
        path.write_text(json.dumps(results, indent=1))
        save_meta(out / f"{row}-{model}.npz", meta, step=num_steps)
        (out / f"{model}.md").write_text(markdown(model, results["rows"]))
        print(markdown(model, results["rows"]), flush=True)


def _interval(values: np.ndarray) -> list[float]:
    """Return mean, low and high over the classes that stayed finite, and how many did not."""
    finite = np.isfinite(values)
    if finite.sum() < 2:
        return [float("nan")] * 3 + [len(values)]
    return [*map(float, over_classes(values[finite])), int((~finite).sum())]


def _cell(entry: list[float], digits: int) -> str:
    mean, low, high, lost = entry
    return f"{mean:.{digits}f} ± {(high - low) / 2:.{digits}f}" + (f" ({lost:.0f} diverged)" if lost else "")


if __name__ == "__main__":
    main()
