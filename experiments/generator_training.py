"""How good a generator has to be: accuracy of unsupervised few-shot learners against its epochs, for a VAE and a GAN.

Question: tasks out of latent space are only as good as what decodes them. How does the accuracy of a learner that saw
nothing else grow with the training of the generator, and does it saturate?
Published: LASIUM-N with MAML on Omniglot, 5-way 1-shot, read off the authors' plotting script: GAN epoch 0 51.95, 10
67.50, 30 77.34, 50 77.35, 100 78.14, 500 76.49 (+-0.6); nine tenths of the gain by epoch 30.

Protocol: 28x28 binary Omniglot (the binarisation of `omniglot_gmn`), 1200 / 100 / 323 characters at random, alphabets
mixed, no rotations; an epoch is 24,000 training images, without labels. Every image of a training task is decoded, none
is deformed: anchors are codes of the prior, apart, for both generators, other images are `others(0.3)` (spherical for
the GAN). Learner: prototypes on 4 stride-2 convolutions of 32 channels, 20-way, 1 support and 2 query images, the same
CPU time (or `--meta-steps`) for each point; 1,000 test tasks of 15 queries a class; non-transductive. VAE: dense
400-400, 32 dimensions; GAN: convolutional, Wasserstein with gradient penalty, 64 dimensions. Epoch 0 is the untrained
generator.

    taskset -c 0 python experiments/generator_training.py --data-dir DIR --out runs/generators --seeds 0 1 2
    taskset -c 0 python experiments/generator_training.py --data-dir DIR --out runs/quick --quick   # 3 min

A run that was stopped goes on where it was.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import metagen_jax as mg
from metagen_jax import build
from metagen_jax.budget import clock, train_for
from metagen_jax.config import AdversarialConfig, DataConfig, ModelConfig, OuterConfig, TrainConfig, check
from metagen_jax.evaluate_labels import accuracy_curve
from metagen_jax.latent.anchors import from_prior, separation
from metagen_jax.latent.latent_tasks import latent_bank, latent_tasks
from metagen_jax.latent.variations import others
from metagen_jax.metrics.interval import over_seeds
from metagen_jax.report import table
from metagen_jax.tasks.family import TaskFamily
from metagen_jax.tasks.splits import by_count
from metagen_jax.types import Params

SETTINGS = ((5, 1), (20, 1))  # ways, shots
TEST = 100  # what the seed's key is folded for
LATENTS = {"vae": 32, "gan": 64}
BATCH = 160  # images of a step of the generator


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained and measured."""

    channels: tuple[int, ...] = (32, 32, 32, 32)
    vae_epochs: tuple[int, ...] = (0, 1, 3, 10, 30, 50, 100)
    gan_epochs: tuple[int, ...] = (0, 1, 3, 10)
    images: int = 24_000  # of an epoch
    seconds: float = 40.0  # of a learner's training
    meta_steps: int | None = None  # of it, instead
    chunk: int = 25  # meta-steps per dispatch
    tasks: int = 4  # of a meta-step
    way: int = 20
    query: int = 2
    strength: float = 0.3
    test_tasks: int = 1000


def load(data_dir: str) -> build.Parts:
    """Return the data with the split of the protocol."""
    data = build.parts(DataConfig("omniglot_gmn", data_dir))
    assert data.images is not None
    return data._replace(split=by_count(data.images, 0, validation=100, test=323))


def configured(kind: str, num_steps: int, seed: int) -> TrainConfig:
    """Return the configuration of a generator's training."""
    is_vae = kind == "vae"
    return check(
        TrainConfig(
            "joint",
            kind,
            network=ModelConfig("mlp", (400, 400), LATENTS[kind], context=0)
            if is_vae
            else ModelConfig("conv", (16, 32), LATENTS[kind], context=0),
            outer=OuterConfig(num_steps, tasks=16, rate=2e-3 if is_vae else 6e-4, warm_start=0, warmup=20),
            adversarial=AdversarialConfig() if is_vae else AdversarialConfig(discriminator=(32, 64)),
            shots=(5, 5),
            query=5,
            seed=seed,
        )
    )


def generators(config: Config, kind: str, data: build.Parts, seed: int) -> Any:
    """Yield (epochs, the family of tasks it makes, seconds) as the generator is trained; rates decay over all of it."""
    epochs = config.vae_epochs if kind == "vae" else config.gan_epochs
    steps = [round(epoch * config.images / BATCH) for epoch in epochs]
    settings = configured(kind, max(steps), seed)
    built = build.model(settings, data.event, data.binary)
    learner, family = build.learner(settings, built), build.training_tasks(settings, data)
    optimizer = build.outer(settings)
    sampler, step = build.meta_step(settings, learner, family, optimizer)
    state = mg.init_state(learner, sampler, optimizer, jax.random.key(seed))
    generator, seconds = build.generator(built, LATENTS[kind]), 0.0
    draw = from_prior(LATENTS[kind], apart=separation(LATENTS[kind]))
    vary = others(config.strength, spherical=kind == "gan")
    for epoch, until in zip(epochs, steps, strict=True):
        began = clock()
        state = mg.train(step, state, family.data, until, chunk=50)
        seconds += clock() - began  # of the generator alone, compiling included
        bank = latent_bank(generator, jax.tree.map(np.asarray, state.average))  # the state itself is given away
        tasks = latent_tasks(generator, bank, draw, vary, 1, config.query, way=config.way)
        yield epoch, tasks, seconds


def learner_of(config: Config, way: int) -> tuple[mg.Classifier, mg.MetaLearner]:
    """Return the classifier and its learner; what it learns does not depend on the ways."""
    settings = check(
        TrainConfig("prototypes", "classifier", network=ModelConfig("conv", config.channels), way=way, shots=(1, 1))
    )
    built = build.model(settings, (28, 28, 1), True)
    assert isinstance(built, mg.Classifier)
    return built, build.learner(settings, built)


def train(config: Config, family: TaskFamily, seed: int) -> tuple[Params, int]:
    """Train a learner for its budget; return averaged meta-parameters and meta-steps."""
    learner, sampler = learner_of(config, config.way)[1], mg.uniform(family, config.tasks)

    def rule(num_steps: int) -> Any:
        return mg.outer_optimizer(2e-3, num_steps, warmup=min(20, num_steps - 1), clip=10.0)

    options: dict[str, Any] = {"chunk": config.chunk, "meta_steps": config.meta_steps}
    spent = train_for(learner, family, sampler, rule, config.seconds, jax.random.key(seed), **options)
    return spent.meta, spent.meta_steps


def markdown(results: dict[str, Any]) -> str:
    """Return the table: means over seeds with their 95 % intervals (of Student's t)."""
    names = [f"{way}-way {shots}-shot" for way, shots in SETTINGS]
    lines = []
    for kind, points in results["rows"].items():
        for epoch, seeds in points.items():
            cells = [_cell([found["accuracy"][name] for found in seeds.values()]) for name in names]
            seconds = np.mean([found["seconds"] for found in seeds.values()])
            lines.append([kind, epoch, f"{seconds:.0f}", *cells])
    return table(["generator", "epochs", "its seconds", *names], lines) + "\n"


def _cell(values: list[float]) -> str:
    mean, half = over_seeds(values) if values else (np.nan, np.nan)
    return "-" if not values else f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {half:.1f}"


def main() -> None:
    """Train and test at every epoch of every seed, keeping what is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--kinds", nargs="*", default=["vae", "gan"], choices=["vae", "gan"])
    parser.add_argument("--meta-steps", type=int, help="of every learner, instead of a budget of time")
    parser.add_argument("--gan-epochs", type=int, nargs="+", default=list(Config.gan_epochs), help="ascending")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    config = Config(gan_epochs=tuple(arguments.gan_epochs), meta_steps=arguments.meta_steps)
    if arguments.quick:
        config = Config(vae_epochs=(0, 2), gan_epochs=(0, 1), images=8000, seconds=3.0, test_tasks=20)
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    path, asked = out / "results.json", json.loads(json.dumps(dataclasses.asdict(config)))
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"config": asked, "rows": {}}
    default = json.loads(json.dumps(dataclasses.asdict(Config())))  # of settings that a file from before lacks
    if {**default, **results["config"]} != asked:
        parser.error(f"{path} is of another configuration, {results['config']}; choose another --out")
    data = load(arguments.data_dir)
    for seed in arguments.seeds:
        for kind in arguments.kinds:
            points = results["rows"].setdefault(kind, {})
            last = str((config.vae_epochs if kind == "vae" else config.gan_epochs)[-1])
            if str(seed) in points.get(last, {}):
                continue
            for epoch, family, seconds in generators(config, kind, data, seed):
                found = points.setdefault(str(epoch), {})
                if str(seed) in found:
                    continue
                meta, num_steps = train(config, family, seed)
                entry: dict[str, Any] = {"meta_steps": num_steps, "seconds": seconds, "accuracy": {}}
                for way, shots in SETTINGS:
                    built, learner = learner_of(config, way)
                    tests = build.family(data, "test", shots, 15, model="classifier", way=way)
                    measure = accuracy_curve(learner.path, built.model, tests, steps=(0,), task_chunk=10)
                    key = jax.random.fold_in(jax.random.key(seed), TEST)
                    accuracy = measure(meta, key, config.test_tasks).mean[0]
                    entry["accuracy"][f"{way}-way {shots}-shot"] = 100 * float(accuracy)
                found[str(seed)] = entry
                path.write_text(json.dumps(results, indent=1))
                (out / "table.md").write_text(markdown(results))
                print(markdown(results), flush=True)


if __name__ == "__main__":
    main()
