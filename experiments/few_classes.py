"""Few training characters of Omniglot: what deformations, generated tasks and interpolated tasks add to 50 to 1200.

Question: meta-learning overfits to few classes, so that data made by a generator which saw the same few classes should
matter most where there are fewest. Does it, beside deformations, which cost nothing?
Published: nothing on this protocol; Yao, Zhang & Finn, Meta-Learning with Fewer Tasks through Task Interpolation, 2022,
report gains of some points on other data where classes are few.

Protocol: 28x28 binary Omniglot (the binarisation of `omniglot_gmn`), 1200 / 100 / 323 characters at random, alphabets
mixed, no rotations; the first 50, 100, 200 or all of the training characters, with labels, 20 images each; the VAE of a
row saw the images of those characters only. Learner: prototypes on 4 stride-2 convolutions of 32 channels, 20-way, 1
support and 2 query images. "Generated" tasks (half of the tasks) are made around training images; their other images
are all decoded, or, where images are deformed, half of them; "interpolated" ones blend two real tasks (share 0.5).
Every training has the same CPU time on one core, without compiling, or the same `--meta-steps`; 1,000 test tasks of 15
queries a class from the 323; non-transductive.

    taskset -c 0 python experiments/few_classes.py --data-dir DIR --out runs/few_classes --seeds 0 1 2  # 35 min each
    taskset -c 0 python experiments/few_classes.py --data-dir DIR --out runs/quick --quick              # 3 min

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
from metagen_jax.baselines import train_joint
from metagen_jax.budget import train_for
from metagen_jax.config import DataConfig, ModelConfig, OuterConfig, TrainConfig, check
from metagen_jax.evaluate_labels import accuracy_curve
from metagen_jax.latent.anchors import from_images
from metagen_jax.latent.generator import of_vae
from metagen_jax.latent.latent_tasks import latent_bank, latent_tasks
from metagen_jax.latent.variations import others
from metagen_jax.metrics.interval import over_seeds
from metagen_jax.report import table
from metagen_jax.tasks.deformations import affine
from metagen_jax.tasks.family import TaskFamily
from metagen_jax.tasks.image_set import ImageSet
from metagen_jax.tasks.mixing import interpolated, mixed, with_variants
from metagen_jax.tasks.splits import by_count
from metagen_jax.types import Params

SETTINGS = ((5, 1), (20, 1))  # ways, shots
LATENTS = 32
TEST = 100  # what the seed's key is folded for
ROWS = ("real", "deformed", "generated", "interpolated", "deformed, generated", "deformed, interpolated")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained and measured."""

    channels: tuple[int, ...] = (32, 32, 32, 32)
    classes: tuple[int, ...] = (50, 100, 200, 1200)
    seconds: float = 50.0  # of a training
    meta_steps: int | None = None  # instead
    chunk: int = 25  # meta-steps per dispatch
    tasks: int = 4  # of a meta-step
    way: int = 20
    query: int = 2
    vae_steps: int = 2000
    share: float = 0.5  # of generated or interpolated tasks, and of decoded images in a generated one
    strength: float = 0.3  # towards another class
    test_tasks: int = 1000


def load(data_dir: str) -> build.Parts:
    """Return the data with the split of the protocol."""
    data = build.parts(DataConfig("omniglot_gmn", data_dir))
    assert data.images is not None
    return data._replace(split=by_count(data.images, 0, validation=100, test=323))


def only(data: build.Parts, classes: int, seed: int) -> build.Parts:
    """Return the data with some of the training characters, others for each seed."""
    assert data.split is not None
    order = np.random.default_rng(seed).permutation(data.split.train)
    return data._replace(split=data.split._replace(train=np.sort(order[:classes])))


def generated(config: Config, data: build.Parts, images: ImageSet, seed: int) -> dict[bool, TaskFamily]:
    """Return tasks out of the latent space of a VAE of these images, trained without labels; to be deformed, or not."""
    settings = check(
        TrainConfig(
            "joint",
            "vae",
            network=ModelConfig(hidden=(400, 400), latents=LATENTS, context=0),
            outer=OuterConfig(config.vae_steps, warm_start=0, warm_start_rate=2e-3, warmup=20),
            shots=(5, 5),
            query=5,
        )
    )
    built = build.model(settings, data.event, data.binary)
    assert isinstance(built, mg.Vae)
    params = train_joint(settings, mg.episodes(images, 5, 5), built, config.vae_steps, jax.random.key(seed))
    generator = of_vae(built, LATENTS)
    bank = latent_bank(generator, params, images.images)

    def tasks(share: float) -> TaskFamily:
        vary = others(config.strength)
        return latent_tasks(generator, bank, from_images(), vary, 1, config.query, way=config.way, share=share)

    return {True: tasks(config.share), False: tasks(1.0)}


def family_of(config: Config, row: str, real: TaskFamily, latent: dict[bool, TaskFamily] | None) -> TaskFamily:
    """Return the training tasks of a row."""
    family = real
    if "generated" in row and latent is not None:
        family = mixed(real, latent["deformed" in row], config.share)
    if "interpolated" in row:
        family = mixed(real, interpolated(real, way=config.way), config.share)
    if "deformed" in row:
        deform = affine()  # grey: a threshold would undo a blend
        family = with_variants(family, lambda params, key, x: deform(key, x), (), 1.0, which=("support", "query"))
    return family


def learner_of(config: Config, way: int) -> tuple[mg.Classifier, mg.MetaLearner]:
    """Return the classifier and its learner; what it learns does not depend on the ways."""
    settings = check(
        TrainConfig("prototypes", "classifier", network=ModelConfig("conv", config.channels), way=way, shots=(1, 1))
    )
    built = build.model(settings, (28, 28, 1), True)
    assert isinstance(built, mg.Classifier)
    return built, build.learner(settings, built)


def train(config: Config, family: TaskFamily, seed: int) -> tuple[Params, dict[str, float]]:
    """Train for the budget that there is; return averaged meta-parameters and what it took."""
    learner, sampler = learner_of(config, config.way)[1], mg.uniform(family, config.tasks)

    def rule(num_steps: int) -> Any:
        return mg.outer_optimizer(2e-3, num_steps, warmup=min(20, num_steps - 1), clip=10.0)

    options: dict[str, Any] = {"chunk": config.chunk, "meta_steps": config.meta_steps}
    spent = train_for(learner, family, sampler, rule, config.seconds, jax.random.key(seed), **options)
    return spent.meta, {"meta_steps": spent.meta_steps, "seconds": spent.seconds}


def markdown(results: dict[str, Any]) -> str:
    """Return the table: means over seeds with their 95 % intervals (of Student's t); gains are paired with `real`."""
    header = ["characters", "tasks", *(f"{way}-way {shots}-shot" for way, shots in SETTINGS), "above real, 5-way"]
    lines = []
    for classes, rows in results["rows"].items():
        for row in ROWS:
            seeds = rows.get(row, {})
            if not seeds:
                continue
            names = [f"{way}-way {shots}-shot" for way, shots in SETTINGS]
            cells = [_cell([found["accuracy"][name] for found in seeds.values()]) for name in names]
            both = [seed for seed in seeds if seed in rows.get("real", {})]
            gains = [seeds[s]["accuracy"][names[0]] - rows["real"][s]["accuracy"][names[0]] for s in both]
            lines.append([classes, row, *cells, _cell(gains) if row != "real" and gains else ""])
    return table(header, lines) + "\n"


def _cell(values: list[float]) -> str:
    mean, half = over_seeds(values) if values else (np.nan, np.nan)
    return "-" if not values else f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {half:.1f}"


def main() -> None:
    """Train and test every row of every seed, keeping what is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--classes", nargs="*", type=int, default=list(Config.classes), help="training characters")
    parser.add_argument("--seconds", type=float, default=Config.seconds)
    parser.add_argument("--meta-steps", type=int, help="of every training, instead of a budget of time")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    config = Config(classes=tuple(arguments.classes), seconds=arguments.seconds, meta_steps=arguments.meta_steps)
    if arguments.quick:
        config = dataclasses.replace(config, seconds=3.0, vae_steps=150, test_tasks=20, classes=(50, 1200))
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    path, asked = out / "results.json", json.loads(json.dumps(dataclasses.asdict(config)))
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"config": asked, "rows": {}}
    default = json.loads(json.dumps(dataclasses.asdict(Config())))  # of settings that a file from before lacks
    if {**default, **results["config"]} != asked:
        parser.error(f"{path} is of another configuration, {results['config']}; choose another --out")
    data = load(arguments.data_dir)
    for seed in arguments.seeds:
        for classes in config.classes:
            part = only(data, classes, seed)
            images = build.take(part, "train")
            real, latent = mg.episodes(images, 1, config.query, way=config.way), None
            for row in ROWS:
                found = results["rows"].setdefault(str(classes), {}).setdefault(row, {})
                if str(seed) in found:
                    continue
                if "generated" in row and latent is None:
                    latent = generated(config, part, images, seed)
                meta, took = train(config, family_of(config, row, real, latent), seed)
                entry: dict[str, Any] = {**took, "accuracy": {}}
                for way, shots in SETTINGS:
                    built, learner = learner_of(config, way)
                    family = build.family(data, "test", shots, 15, model="classifier", way=way)
                    measure = accuracy_curve(learner.path, built.model, family, steps=(0,), task_chunk=10)
                    key = jax.random.fold_in(jax.random.key(seed), TEST)
                    accuracy = measure(meta, key, config.test_tasks).mean[0]
                    entry["accuracy"][f"{way}-way {shots}-shot"] = 100 * float(accuracy)
                found[str(seed)] = entry
                path.write_text(json.dumps(results, indent=1))
                (out / "table.md").write_text(markdown(results))
                print(markdown(results), flush=True)


if __name__ == "__main__":
    main()
