"""Semi-supervised few-shot classification of Omniglot: what unlabelled images, real and generated, add to one example.

Claim: prototypes refined with the unlabelled images of a task classify better than those of the labelled ones alone;
where other classes are among the unlabelled images, a cluster or a mask for distractors keeps most of the gain. And, a
row that no article has: how much of that gain is to be had from images that a VAE generates, with no other data.

Published (Ren et al., Meta-Learning for Semi-Supervised Few-Shot Classification, 2018; 5-way 1-shot, %; 4 x 64 channels
with max-pooling and batch normalisation, tens of thousands of episodes, means over 10 splits), see PUBLISHED below.

Protocol. 28x28 binary Omniglot (the binarisation of `omniglot_gmn`), 1200 / 100 / 323 characters at random, alphabets
mixed; turns by 90 degrees are classes of their own, in training (4800, as theirs) and test (1292, theirs 1692), and
labels are split over those, as in the authors' code. Training: 10 % of the images of each class, that is two, have a
label: one support, one query. Unlabelled images are the other 18, M = 5 drawn of each class of the task, and of H = 5
distractor classes. Test: as in the authors' code every image of the classes is for drawing; one support, M unlabelled,
the rest query. There M = 5 and 14 queries (their setting for Omniglot; the article's text says M = 20, which 20 images
of a class do not give), here also M = 14 and 5 queries. Non-transductive (normalisation of each example by itself).

Trainings, each of them of CPU time on one core without compiling (or of `--meta-steps`): `prototypes`, 20-way, which
learns faster, for `seconds`; from there each row goes on for `more_seconds`, 5-way: "supervised" as before, the others
with unlabelled images, one training without and one with distractors. "Inference only" is the supervised row's network,
tested with soft k-means. "Generated": of each labelled image five images decode(encode(x) + noise), rounded, of a VAE
that saw the training characters, without labels and with symmetries; its distractors are samples of the prior. In the
test, too, those are the only unlabelled images. The cluster's radius begins at 3000 and is learned from there: of 100
to 100,000, tried on the validation characters with a network that was trained for ten seconds, the best with
distractors (without them, larger ones are better, by 0.35 points at most).

    taskset -c 0 python experiments/semi_supervised.py --data-dir DIR --out runs/semi --seeds 0 1 2  # 25 min a seed
    taskset -c 0 python experiments/semi_supervised.py --data-dir DIR --out runs/quick --quick  # 3 to 4 min

A run that was stopped goes on where it was.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import metagen_jax as mg
from metagen_jax import build
from metagen_jax.baselines import train_joint
from metagen_jax.budget import train_for
from metagen_jax.config import DataConfig, ModelConfig, OuterConfig, TrainConfig, check
from metagen_jax.evaluate_labels import accuracy_curve
from metagen_jax.metrics.interval import over_seeds
from metagen_jax.models.networks import conv_features, num_features_of
from metagen_jax.models.refined_heads import soft_kmeans
from metagen_jax.parameters import load_meta, save_meta
from metagen_jax.report import table
from metagen_jax.tasks.episodes import episodes
from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.tasks.image_set import ImageSet
from metagen_jax.tasks.partly_labelled import hidden_labels, partly_labelled, with_unlabelled
from metagen_jax.tasks.rotations import with_rotations
from metagen_jax.tasks.splits import by_count
from metagen_jax.types import Array, Key, Params, Task

WAY, SHOT, UNLABELLED, DISTRACTORS, SHARE = 5, 1, 5, 5, 0.1
IMAGES = 20  # of a class
TEST = 100  # what the seed's key is folded for

PUBLISHED = {
    "supervised": "94.84 / 94.84",
    "inference only": "97.65 / 95.30",
    "soft k-means": "97.44 / 95.41",
    "cluster": "97.82 / 97.29",
    "masked": "97.54 / 97.38",
    "generated": "",
}
"""Without and with distractors, %."""

HEADS: dict[str, dict[str, Any]] = {
    "supervised": {},
    "inference only": {},
    "soft k-means": {},
    "cluster": {"distractors": "cluster", "radius": 3000.0},
    "masked": {"distractors": "masked"},
    "generated": {},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained and measured."""

    channels: tuple[int, ...] = (32, 32, 32, 32)
    seconds: float = 100.0  # of the common beginning
    more_seconds: float = 60.0  # of every row from there
    meta_steps: int | None = None  # instead
    more_meta_steps: int | None = None  # instead
    chunk: int = 25  # meta-steps per dispatch
    tasks: int = 4  # of a meta-step of the common beginning
    more_tasks: int = 8  # of a meta-step of a row
    pretraining_way: int = 20
    vae_steps: int = 3000
    noise: float = 0.5  # in the VAE's latent space, standard deviation
    conditions: tuple[str, ...] = ("clean", "distractors")
    tested: tuple[int, ...] = (UNLABELLED, 14)  # unlabelled images of each class in the test, the rest are queries
    test_tasks: int = 1000


def load(data_dir: str) -> tuple[build.Parts, ImageSet, ImageSet]:
    """Return the data with the split of the protocol, and turned classes of training and test."""
    data = build.parts(DataConfig("omniglot_gmn", data_dir))
    assert data.images is not None
    data = data._replace(split=by_count(data.images, 0, validation=100, test=323))
    return data, with_rotations(build.take(data, "train")), with_rotations(build.take(data, "test"))


def classifier(config: Config, way: int, row: str) -> tuple[mg.Classifier, mg.MetaLearner]:
    """Return the classifier of a row and its learner; parameters do not depend on the ways."""
    body = conv_features((28, 28, 1), config.channels)
    size = num_features_of(body, (28, 28, 1))
    steps = 0 if row == "supervised" else 1
    built = mg.classifier(body, size, way, soft_kmeans(steps, scale=8.0 / size, **HEADS[row]))
    return built, mg.amortised(built.model, built.embed)


def generator(config: Config, data: build.Parts, data_dir: str, path: Path, seed: int) -> tuple[mg.Vae, Params]:
    """Return a VAE of the training characters, trained without labels, and its parameters."""
    settings = check(
        TrainConfig(
            "joint",
            "vae",
            DataConfig("omniglot_gmn", data_dir, symmetries=True),
            ModelConfig(hidden=(400, 400)),
            outer=OuterConfig(config.vae_steps, warm_start=0, warm_start_rate=2e-3, warmup=20),
            shots=(5, 5),
            query=10,
            seed=seed,
        )
    )
    built = build.model(settings, data.event, data.binary)
    assert isinstance(built, mg.Vae)
    if not path.exists():
        family = build.training_tasks(settings, data)
        params = train_joint(settings, family, built, config.vae_steps, jax.random.key(seed))
        save_meta(path, params, step=config.vae_steps)
    return built, load_meta(path, jax.eval_shape(built.model.init, jax.random.key(0)))[0]


def with_generated(family: TaskFamily, vae: mg.Vae, params: Params, config: Config, distractors: int) -> TaskFamily:
    """Return the family whose unlabelled images are decoded from near the codes of the labelled ones."""

    def more(params: Params, key: Key, spec: Spec, task: Task) -> Array:
        del spec
        near_key, prior_key = jax.random.split(key)
        mean, _ = vae.latent.encode(params, jnp.repeat(task.support.x, UNLABELLED, axis=0))
        made = vae.latent.decode(params, mean + config.noise * jax.random.normal(near_key, mean.shape))
        if distractors:
            made = jnp.concatenate([made, vae.model.sample(params, prior_key, distractors * UNLABELLED)])
        return jnp.round(made)

    return with_unlabelled(family, more, params)


def train(
    config: Config, row: str, way: int, family: TaskFamily, begin: Params | None, seed: int
) -> tuple[Params, dict[str, float]]:
    """Train for the budget that there is; return averaged meta-parameters and what it took."""
    _, learner = classifier(config, way, row)
    seconds, meta_steps, tasks = (
        (config.seconds, config.meta_steps, config.tasks)
        if begin is None
        else (config.more_seconds, config.more_meta_steps, config.more_tasks)
    )
    sampler, key = mg.uniform(family, tasks), jax.random.key(seed)
    if begin is not None:  # what a head learns beside the scale begins where it does
        begin = {**begin, "head": learner.init(key)["head"] | begin["head"]}

    def rule(num_steps: int) -> Any:
        return mg.outer_optimizer(2e-3 if begin is None else 1e-3, num_steps, warmup=min(20, num_steps - 1), clip=10.0)

    spent = train_for(
        learner, family, sampler, rule, seconds, key, begin=begin, chunk=config.chunk, meta_steps=meta_steps
    )
    return spent.meta, {"meta_steps": spent.meta_steps, "seconds": spent.seconds}


def test(config: Config, row: str, family: TaskFamily, meta: Params, seed: int) -> list[float]:
    """Return accuracy in % and its half width over tasks."""
    built, learner = classifier(config, WAY, row)
    measure = accuracy_curve(learner.path, built.model, family, steps=(0,), task_chunk=10)
    found = measure(meta, jax.random.fold_in(jax.random.key(seed), TEST), config.test_tasks)
    return [100 * float(found.mean[0]), 100 * float(found.half_width[0])]


def rows_of(config: Config, seed: int, data_dir: str, out: Path, results: dict[str, Any], keep: Any) -> None:
    """Train and test the rows of a seed that are not done."""
    data, training, testing = load(data_dir)
    partly: dict[str, Any] = {"labelled_share": SHARE, "seed": seed}
    start = out / f"start-{seed}.npz"
    if not start.exists():
        way = config.pretraining_way
        family = partly_labelled(training, SHOT, 1, way=way, unlabelled=0, **partly)
        meta, took = train(config, "supervised", way, family, None, seed)
        save_meta(start, meta, step=int(took["meta_steps"]))
    target = jax.eval_shape(classifier(config, WAY, "supervised")[1].init, jax.random.key(0))
    begin, header = load_meta(start, target)
    results.setdefault("start", {})[str(seed)] = {"meta_steps": header["step"]}
    vae, vae_params = generator(config, data, data_dir, out / f"vae-{seed}.npz", seed)
    labelled = partly_labelled(training, SHOT, 1, way=WAY, unlabelled=0, **partly)

    for row in HEADS:
        entry = results["rows"].setdefault(row, {}).setdefault(str(seed), {})
        for condition in config.conditions:
            if condition in entry:
                continue
            others = DISTRACTORS if condition == "distractors" else 0
            if row == "supervised" and entry:
                entry[condition] = next(iter(entry.values()))  # it has no unlabelled images
                keep()
                continue
            if row == "inference only":
                meta, took = load_meta(out / f"supervised-{seed}.npz", target)[0], {"meta_steps": 0}
            else:
                family = labelled
                if row == "generated":
                    family = with_generated(labelled, vae, vae_params, config, others)
                elif row != "supervised":
                    family = partly_labelled(
                        training, SHOT, 1, way=WAY, unlabelled=UNLABELLED, distractors=others, **partly
                    )
                meta, took = train(config, row, WAY, family, begin, seed)
                if row == "supervised":
                    save_meta(out / f"supervised-{seed}.npz", meta, step=int(took["meta_steps"]))
            found = {}
            for num in config.tested:
                query = IMAGES - SHOT - num
                if row in ("supervised", "generated"):
                    family = episodes(testing, SHOT, query, way=WAY)
                    family = with_generated(family, vae, vae_params, config, others) if row == "generated" else family
                else:
                    family = hidden_labels(testing, SHOT, query, way=WAY, unlabelled=num, distractors=others)
                found[str(num)] = test(config, row, family, meta, seed)
            entry[condition] = {**took, "accuracy": found}
            keep()


def markdown(results: dict[str, Any]) -> str:
    """Return the table: means over seeds with their 95 % intervals (Student's t); of one seed, intervals over tasks."""

    def cell(entry: dict[str, Any], condition: str, num: int) -> str:
        found = np.array([seed[condition]["accuracy"][str(num)] for seed in entry.values() if condition in seed])
        if not len(found):
            return "-"
        half = found[0, 1] if len(found) == 1 else over_seeds(found[:, 0].tolist())[1]
        return f"{found[:, 0].mean():.2f} ± {half:.2f}"

    asked = results["config"]
    cases = [(condition, num) for condition in asked["conditions"] for num in asked["tested"]]
    lines = []
    for row, entry in results["rows"].items():
        steps = {str(seed[name].get("meta_steps", 0)) for seed in entry.values() for name in seed}
        cells = [cell(entry, condition, num) for condition, num in cases]
        lines.append([row, *cells, " / ".join(sorted(steps)), str(len(entry)), PUBLISHED[row]])
    names = [f"{condition}, M = {num}" for condition, num in cases]
    return table(["5-way 1-shot, %", *names, "meta-steps from the start", "seeds", "published"], lines) + "\n"


def main() -> None:
    """Train and test every row, keeping what is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--seconds", type=float, default=Config.seconds)
    parser.add_argument("--more-seconds", type=float, default=Config.more_seconds)
    steps = "of the common beginning and of every row from there, instead of budgets of time"
    parser.add_argument("--meta-steps", type=int, nargs=2, default=(None, None), help=steps)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    first, more = arguments.meta_steps
    config = Config(
        seconds=arguments.seconds, more_seconds=arguments.more_seconds, meta_steps=first, more_meta_steps=more
    )
    if arguments.quick:
        short: dict[str, Any] = {"seconds": 10.0, "more_seconds": 2.0, "vae_steps": 200, "test_tasks": 40}
        config = dataclasses.replace(config, conditions=("distractors",), tested=(UNLABELLED,), **short)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path, asked = arguments.out / "results.json", json.loads(json.dumps(dataclasses.asdict(config)))
    results = json.loads(path.read_text()) if path.exists() else {"config": asked, "rows": {}}
    default = json.loads(json.dumps(dataclasses.asdict(Config())))  # of settings that a file from before lacks
    if {**default, **results["config"]} != asked:
        parser.error(f"{path} is of another configuration, {results['config']}; choose another --out")

    def keep() -> None:
        path.write_text(json.dumps(results, indent=1))
        (arguments.out / "table.md").write_text(markdown(results))
        print(markdown(results), flush=True)

    for seed in arguments.seeds:
        rows_of(config, seed, arguments.data_dir, arguments.out, results, keep)
    keep()


if __name__ == "__main__":
    main()
