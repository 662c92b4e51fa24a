"""Few-shot classifiers of Omniglot learned without a label: tasks from latent space, from clusters, from augmentation.

Claim: tasks made by a generator that saw nothing but unlabelled training images teach a few-shot learner as much as the
published methods of this kind and more, at 20 ways too, where interpolation in latent space has no published number;
and the table says how much of it the generator does, and how much the affine maps that go with it.

Published, Omniglot 5-way 1- and 5-shot, 20-way 1- and 5-shot, %, see PUBLISHED below; the articles' splits differ
(LASIUM and UMTRA: 1200 / 100 / 323 characters and no rotations, as here; CACTUs: 1100 / 100 / 423), and so do networks
and numbers of inner steps.

Protocol: 28x28 binary Omniglot (the binarisation of `omniglot_gmn`), 1200 / 100 / 323 characters at random, alphabets
mixed, no rotations; generators and learners see the images of the 1200 characters without labels; the ways of training
and the limits of the affine maps were chosen on labelled validation characters, nothing else was; 1,000 test tasks of
15 queries a class; non-transductive (normalisation of each example by itself). Learner: prototypes on 4 stride-2
convolutions of 32 channels, trained 60-way with 1 support and 2 query images; MAML rows with a linear head, 5- and
20-way, 3 inner steps (10 at test). Every training has the same CPU time on one core, without compiling and without
clustering, or the same number of meta-steps (`--meta-steps`, for an accelerator); MAML has one for each number of ways.
Decoded images are grey means unless they are deformed, which makes them binary again. Generator: dense VAE with 32
latent dimensions, trained once a seed.

    taskset -c 0 python experiments/unsupervised.py --data-dir DIR --out runs/unsupervised --seeds 0 1 2  # 45 min each
    taskset -c 0 python experiments/unsupervised.py --data-dir DIR --out runs/quick --quick               # 3 min

A run that was stopped goes on where it was.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import metagen_jax as mg
from metagen_jax import build
from metagen_jax.baselines import train_joint
from metagen_jax.budget import train_for
from metagen_jax.config import DataConfig, InnerConfig, ModelConfig, OuterConfig, TrainConfig, check
from metagen_jax.evaluate_labels import accuracy_curve
from metagen_jax.latent.adversarial import on_codes
from metagen_jax.latent.anchors import LatentBank, extrapolated, from_images, from_prior, midpoints, separation
from metagen_jax.latent.generator import Generator, of_vae
from metagen_jax.latent.kmeans import kmeans
from metagen_jax.latent.latent_tasks import latent_bank, latent_tasks
from metagen_jax.latent.pseudo_classes import over_partitions, partitions
from metagen_jax.latent.self_training import self_training
from metagen_jax.latent.variations import noise, others, outsiders
from metagen_jax.meta.learners import MetaLearner
from metagen_jax.metrics.interval import over_seeds
from metagen_jax.parameters import load_meta, save_meta
from metagen_jax.report import table
from metagen_jax.tasks.deformations import affine, binary, in_turn
from metagen_jax.tasks.family import TaskFamily
from metagen_jax.tasks.mixing import with_variants
from metagen_jax.tasks.splits import by_count
from metagen_jax.types import Params

SETTINGS = ((5, 1), (5, 5), (20, 1), (20, 5))  # ways, shots
TEST = 100  # what the seed's key is folded for
LONGER = 10  # inner steps of MAML at test

PUBLISHED = {
    "LASIUM-MAML": "83.3 / 95.3 / - / -",
    "LASIUM-ProtoNets": "80.2 / 91.1 / - / -",
    "UMTRA (augmentation)": "83.8 / 95.4 / 74.3 / 92.1",
    "CACTUs-MAML (clusters)": "68.8 / 87.8 / 48.1 / 73.4",
    "CACTUs-ProtoNets": "68.1 / 83.6 / 47.8 / 66.3",
}

Tasks = Callable[["Material", int, int], TaskFamily]
"""(material, ways, queries) -> the training tasks of a row."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained and measured."""

    channels: tuple[int, ...] = (32, 32, 32, 32)
    seconds: float = 60.0  # of a training, all rounds of self-training together
    meta_steps: int | None = None  # instead
    chunk: int = 25  # meta-steps per dispatch
    tasks: int = 2  # of a meta-step; of MAML, twice as many
    way: int = 60  # of training; of MAML, those of the test
    query: int = 2
    vae_steps: int = 4000
    clusters: int = 500
    cluster_partitions: int = 5
    rounds: int = 2  # of self-training, after a third of the time on single images
    round_clusters: int = 1200
    test_tasks: int = 1000


@dataclasses.dataclass(frozen=True)
class Material:
    """What training tasks are made of."""

    data: build.Parts
    generator: Generator
    bank: LatentBank
    config: Config
    seed: int


def latent(anchors: Any, variation: Any, share: float, augment: bool) -> Tasks:
    """Return the tasks of a row out of latent space."""

    def tasks(material: Material, way: int, query: int) -> TaskFamily:
        move = in_turn(affine(), binary()) if augment else None
        decoder = material.generator if share else None
        return latent_tasks(decoder, material.bank, anchors, variation, 1, query, way=way, share=share, augment=move)

    return tasks


def labelled(augment: bool) -> Tasks:
    """Return real tasks, which know the labels: what all others are to be compared with."""

    def tasks(material: Material, way: int, query: int) -> TaskFamily:
        family = build.family(material.data, "train", 1, query, model="classifier", way=way)
        move = in_turn(affine(), binary())
        return with_variants(family, lambda params, key, x: move(key, x), (), 1.0) if augment else family

    return tasks


def clustered(augment: bool) -> Tasks:
    """Return the tasks whose classes are clusters of codes, several partitions of the training images."""

    def tasks(material: Material, way: int, query: int) -> TaskFamily:
        config, images = material.config, build.take(material.data, "train")
        key = jax.random.fold_in(jax.random.key(material.seed), 7)
        labels = jax.jit(partitions(config.clusters, config.cluster_partitions))(key, material.bank.codes)
        family = over_partitions(images, np.asarray(labels), 1, query, way=way)
        move = in_turn(affine(), binary())
        return with_variants(family, lambda params, key, x: move(key, x), (), 1.0) if augment else family

    return tasks


IMAGES, LATENTS = from_images(), 32
ROWS: dict[str, tuple[str, Tasks, dict[str, Any]]] = {
    "labels (not unsupervised)": ("prototypes", labelled(False), {}),
    "labels, affine": ("prototypes", labelled(True), {}),
    "affine only": ("prototypes", latent(IMAGES, noise(0.0), 0.0, True), {}),
    "noise": ("prototypes", latent(IMAGES, noise(0.5), 1.0, False), {}),
    "outsiders": ("prototypes", latent(IMAGES, outsiders(0.3), 1.0, False), {}),
    "others": ("prototypes", latent(IMAGES, others(0.3), 1.0, False), {}),
    "others, adversarial": ("prototypes", latent(IMAGES, others(0.3), 1.0, False), {"steps": 2, "radius": 1.0}),
    "noise, affine": ("prototypes", latent(IMAGES, noise(0.5), 0.5, True), {}),
    "others, affine": ("prototypes", latent(IMAGES, others(0.3), 0.5, True), {}),
    "prior, noise, affine": (
        "prototypes",
        latent(from_prior(LATENTS, apart=separation(LATENTS)), noise(0.5), 1.0, True),
        {},
    ),
    "beyond, noise, affine": ("prototypes", latent(extrapolated(IMAGES), noise(0.5), 1.0, True), {}),
    "between, noise, affine": ("prototypes", latent(midpoints(IMAGES), noise(0.5), 1.0, True), {}),
    "clusters": ("prototypes", clustered(False), {}),
    "clusters, affine": ("prototypes", clustered(True), {}),
    "self-training, affine": ("self", latent(IMAGES, noise(0.0), 0.0, True), {}),
    "MAML, affine only": ("maml", latent(IMAGES, noise(0.0), 0.0, True), {}),
    "MAML, noise, affine": ("maml", latent(IMAGES, noise(0.5), 0.5, True), {}),
}


def load(data_dir: str) -> build.Parts:
    """Return the data with the split of the protocol."""
    data = build.parts(DataConfig("omniglot_gmn", data_dir))
    assert data.images is not None
    return data._replace(split=by_count(data.images, 0, validation=100, test=323))


def material(config: Config, data: build.Parts, data_dir: str, path: Path, seed: int) -> Material:
    """Return the VAE of a seed, trained on the training images without labels, and the codes of those images."""
    settings = check(
        TrainConfig(
            "joint",
            "vae",
            DataConfig("omniglot_gmn", data_dir),
            ModelConfig(hidden=(400, 400), latents=LATENTS, context=0),
            outer=OuterConfig(config.vae_steps, warm_start=0, warm_start_rate=2e-3, warmup=20),
            shots=(5, 5),
            query=5,
            seed=seed,
        )
    )
    built = build.model(settings, data.event, data.binary)
    assert isinstance(built, mg.Vae)
    if not path.exists():
        family = build.training_tasks(settings, data)
        save_meta(
            path,
            train_joint(settings, family, built, config.vae_steps, jax.random.key(seed)),
            step=config.vae_steps,
        )
    params = load_meta(path, jax.eval_shape(built.model.init, jax.random.key(0)))[0]
    generator = of_vae(built, LATENTS)
    return Material(data, generator, latent_bank(generator, params, build.take(data, "train").images), config, seed)


def learner_of(config: Config, kind: str, way: int) -> tuple[mg.Classifier, MetaLearner]:
    """Return the classifier and its learner; what prototypes learn does not depend on the ways."""
    settings = check(
        TrainConfig(
            "maml" if kind == "maml" else "prototypes",
            "classifier",
            network=ModelConfig("conv", config.channels, context=0),
            inner=InnerConfig(steps=3, rate=0.4) if kind == "maml" else InnerConfig(),
            way=way,
            shots=(1, 1),
        )
    )
    built = build.model(settings, (28, 28, 1), True)
    assert isinstance(built, mg.Classifier)
    return built, build.learner(settings, built)


def train(config: Config, row: str, way: int, made: Material, seed: int) -> tuple[Params, dict[str, float]]:
    """Train a row for the CPU time that there is; return averaged meta-parameters and what it took."""
    kind, tasks, adversarial = ROWS[row]
    learner, family = learner_of(config, kind, way)[1], tasks(made, way, config.query)
    if adversarial:
        learner = on_codes(learner, made.generator, made.bank.params, **adversarial)
        codes = {"way": way, "as_codes": True}
        family = latent_tasks(made.generator, made.bank, IMAGES, others(0.3), 1, config.query, **codes)
    if kind == "self":
        return self_trained(config, learner, family, way, made, seed)
    return fit(config, learner, family, way, 1.0, jax.random.key(seed))


def self_trained(
    config: Config, learner: MetaLearner, family: TaskFamily, way: int, made: Material, seed: int
) -> tuple[Params, dict[str, float]]:
    """Train on single images, then in rounds on clusters of what was learned; clustering is not counted as training."""
    share = 1 / (config.rounds + 1)
    meta, took = fit(config, learner, family, way, share, jax.random.key(seed))
    built, move = learner_of(config, "prototypes", way)[0], in_turn(affine(), binary())
    features = jax.jit(lambda meta, x: built.features(meta, x.astype(np.float32) / 255.0))

    def embed(state: Params, images: np.ndarray) -> np.ndarray:
        return np.concatenate([features(state, images[begin : begin + 500]) for begin in range(0, len(images), 500)])

    def cluster(key: Any, codes: np.ndarray) -> np.ndarray:
        return jax.jit(kmeans(config.round_clusters, num_steps=15, restarts=1))(key, codes).labels

    def learn(key: Any, state: Params, images: Any) -> Params:
        clusters = mg.episodes(images, 1, config.query, way=way)
        moved = with_variants(clusters, lambda params, key, x: move(key, x), (), 1.0)
        state, more = fit(config, learner, moved, way, share, key, begin=state)
        for name, value in more.items():
            took[name] += value
        return state

    images, key = build.take(made.data, "train"), jax.random.fold_in(jax.random.key(seed), 11)
    members = 1 + config.query
    for found in self_training(embed, cluster, learn, images, meta, key, num_rounds=config.rounds, members=members):
        meta = found.state
    return meta, took


def fit(
    config: Config,
    learner: MetaLearner,
    family: TaskFamily,
    way: int,
    share: float,
    key: Any,
    begin: Params | None = None,
) -> tuple[Params, dict[str, float]]:
    """Train for a share of the budget; return averaged meta-parameters and what it took."""
    seconds, meta_steps = config.seconds * share, config.meta_steps and round(config.meta_steps * share)
    sampler = mg.uniform(family, config.tasks * (2 if way < config.way else 1))
    rate, options = 2e-3 if begin is None else 1e-3, {"begin": begin, "meta_steps": meta_steps}

    def rule(num_steps: int) -> Any:
        return mg.outer_optimizer(rate, num_steps, warmup=min(20, num_steps - 1), clip=10.0)

    spent = train_for(learner, family, sampler, rule, seconds, key, chunk=config.chunk, **options)
    return spent.meta, {"meta_steps": spent.meta_steps, "seconds": spent.seconds}


def test(config: Config, row: str, way: int, shots: int, data: build.Parts, meta: Params, seed: int) -> float:
    """Return the accuracy in %."""
    kind = ROWS[row][0]
    built, learner = learner_of(config, kind, way)
    step = LONGER if kind == "maml" else 0
    family = build.family(data, "test", shots, 15, model="classifier", way=way)
    measure = accuracy_curve(learner.path, built.model, family, steps=(step,), task_chunk=10)
    rest = {name: tree for name, tree in meta.items() if name in jax.eval_shape(learner.init, jax.random.key(0))}
    return 100 * float(measure(rest, jax.random.fold_in(jax.random.key(seed), TEST), config.test_tasks).mean[0])


def markdown(results: dict[str, Any]) -> str:
    """Return the table: means over seeds and, of several seeds, their 95 % intervals (of Student's t)."""
    lines = []
    for row in ROWS:
        seeds = [found for found in results["rows"].get(row, {}).values() if found["accuracy"]]
        if seeds:
            names = [f"{way}-way {shots}-shot" for way, shots in SETTINGS]
            cells = [_cell([found["accuracy"][name] for found in seeds if name in found["accuracy"]]) for name in names]
            lines.append([row, *cells, str(round(np.mean([found["meta_steps"] for found in seeds]))), str(len(seeds))])
    lines += [[f"published: {name}", *text.split(" / "), "", ""] for name, text in PUBLISHED.items()]
    header = ["tasks", *(f"{way}-way {shots}-shot" for way, shots in SETTINGS), "meta-steps", "seeds"]
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
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seconds", type=float, default=Config.seconds)
    parser.add_argument("--meta-steps", type=int, help="of every training, instead of a budget of time")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    config = Config(seconds=arguments.seconds, meta_steps=arguments.meta_steps)
    if arguments.quick:
        config = dataclasses.replace(config, seconds=4.0, vae_steps=200, test_tasks=20, way=20, clusters=100)
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    path, asked = out / "results.json", json.loads(json.dumps(dataclasses.asdict(config)))
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"config": asked, "rows": {}}
    default = json.loads(json.dumps(dataclasses.asdict(Config())))  # of settings that a file from before lacks
    if {**default, **results["config"]} != asked:
        parser.error(f"{path} is of another configuration, {results['config']}; choose another --out")
    data = load(arguments.data_dir)
    for seed in arguments.seeds:
        made = None
        for row in arguments.rows:
            found = results["rows"].setdefault(row, {})
            if str(seed) in found:
                continue
            made = made or material(config, data, arguments.data_dir, out / f"vae-{seed}.npz", seed)
            ways = (5, 20) if ROWS[row][0] == "maml" else (config.way,)
            entry: dict[str, Any] = {"accuracy": {}}
            for way in ways:
                meta, took = train(config, row, way, made, seed)
                entry |= took if way == ways[0] else {f"{name} {way}-way": value for name, value in took.items()}
                for tested, shots in SETTINGS:
                    if ROWS[row][0] != "maml" or tested == way:
                        found_now = test(config, row, tested, shots, data, meta, seed)
                        entry["accuracy"][f"{tested}-way {shots}-shot"] = found_now
            found[str(seed)] = entry
            path.write_text(json.dumps(results, indent=1))
            (out / "table.md").write_text(markdown(results))
            print(markdown(results), flush=True)


if __name__ == "__main__":
    main()
