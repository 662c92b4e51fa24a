"""A classifier from scratch on 5, 10 or 15 images of each new class: what generated variants of them are worth.

Question: where a classifier has nothing but a few images of characters that nobody has seen, a generator that was
trained on other characters may know how drawings of one character differ. Are its variants worth more than no
augmentation, and more than affine maps, which cost nothing, or anything beside them?

Published: a classifier on Omniglot with 5 samples of a class goes from 69 to 82 % with the images of a conditional GAN
(Antoniou, Storkey & Edwards, Data Augmentation Generative Adversarial Networks, 2017); another protocol: deeper
classifier, more classes in one problem, standard augmentation in both numbers.

Protocol: 28x28 binary Omniglot (the binarisation of `omniglot_gmn`), 1200 / 100 / 323 characters at random, alphabets
mixed. A problem has 20 test characters with 15 real images each, of which the first 5, 10 or all are used, and 5 test
images each, the same for all rows. The classifier (4 stride-2 convolutions with 32 channels) begins at random weights;
all rows have the same number of Adam steps, the same batches of real images and the same first weights. In rows with
variants each image of a batch is a variant with probability 1/2, drawn from a pool of some variants of each real image
which are made once (means of pixels, grey); in rows with affine maps each image of each batch is moved by a map of its
own, and real ones are made binary again. Generators see training characters alone; their KL term has a small weight,
as variants should keep more of an image than a good likelihood asks for.

| row      | variants                                                                                          |
|----------|---------------------------------------------------------------------------------------------------|
| vae      | decode(encode(x) + s noise) of a jointly trained VAE                                              |
| one-shot | samples of a meta-learned VAE, adapted to the one image x                                         |
| pooled   | samples of the same, adapted to all images of the class that are used                             |

The strength s was chosen among 0.3, 0.6 and 1 on four problems of validation characters. Numbers are means over
problems, of several trainings of the generators, with 95 % intervals over problems; gains are paired by problem.

    taskset -c 0 python experiments/low_data_classifier.py --data-dir DIR --out runs/low_data  # about 20 min
    taskset -c 0 python experiments/low_data_classifier.py --data-dir DIR --out runs/quick --quick  # about 2 min

A run that was stopped goes on with the next seed.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metagen_jax as mg
from metagen_jax import build
from metagen_jax.budget import clock
from metagen_jax.config import DataConfig, InnerConfig, ModelConfig, OuterConfig, TrainConfig, check
from metagen_jax.latent.generator import of_vae
from metagen_jax.latent.variants import by_adapting, perturbed
from metagen_jax.metrics.interval import over_classes
from metagen_jax.models.classifier import classifier
from metagen_jax.models.networks import conv_features, num_features_of
from metagen_jax.report import Column, adaptation_strip, save, table
from metagen_jax.tasks.deformations import affine
from metagen_jax.tasks.splits import by_count
from metagen_jax.types import Array, Examples, Key, Params

WAY, MOST, TEST_IMAGES = 20, 15, 5
SHOTS = (5, 10, 15)
POOLS = ("vae", "one-shot", "pooled")
ROWS: dict[str, tuple[str | None, bool]] = {  # row -> which variants, whether affine
    "none": (None, False),
    "affine": (None, True),
    **{name: (name, False) for name in POOLS},
    **{f"affine + {name}": (name, True) for name in POOLS},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """How long things are trained, and what they are tested on."""

    joint_steps: int = 1500  # of the VAE, on all training characters as one set
    meta_steps: int = 600  # of the learner, from there
    learner: str = "anil"  # moves the VAE's prior, by learned rates
    beta: float = 0.2  # weight of the KL term
    strength: float = 0.6  # s, of the noise on codes
    variants: int = 8  # of each real image, in the pool
    classifier_steps: int = 200
    batch: int = 40
    rate: float = 3e-3  # of Adam, decays to zero
    problems: int = 6  # for each seed
    part: str = "test"
    seeds: int = 3


def configured(config: Config, learner: str, num_steps: int, data_dir: str, seed: int) -> TrainConfig:
    """Return the configuration of a generator's training: what `metagen train LEARNER vae` would take."""
    is_joint = learner == "joint"
    return check(
        TrainConfig(
            learner,
            "vae",
            DataConfig("omniglot_gmn", data_dir),
            ModelConfig(hidden=(500, 500), context=0, beta=config.beta),
            InnerConfig(),
            OuterConfig(
                num_steps,
                tasks=16 if is_joint else 8,
                rate=2e-3 if is_joint else 1e-3,
                warmup=min(20, num_steps - 1),
                warm_start=0,
            ),
            shots=(5, 5) if is_joint else (1, MOST),
            query=10 if is_joint else 5,
            seed=seed,
        )
    )


def load(data_dir: str) -> build.Parts:
    """Return the data with the split of the protocol."""
    data = build.parts(DataConfig("omniglot_gmn", data_dir))
    return data._replace(split=by_count(data.images, 0, validation=100, test=323))


def train(settings: TrainConfig, data: build.Parts, begin: Params) -> Params:
    """Train a generator as it says, from what is learned already; return averaged meta-parameters."""
    family = build.training_tasks(settings, data)
    learner = build.learner(settings, build.model(settings, data.event, data.binary))
    optimizer = build.outer(settings)
    sampler, step = build.meta_step(settings, learner, family, optimizer)
    meta = jax.jit(learner.init)(jax.random.key(settings.seed))
    meta = jax.tree.map(jnp.copy, {**meta, **{name: tree for name, tree in begin.items() if name in meta}})
    state = mg.init_state(learner, sampler, optimizer, jax.random.key(settings.seed + 1000), meta=meta)
    return mg.train(step, state, family.data, settings.outer.steps, chunk=25).average


def problems(config: Config, data: build.Parts, seed: int) -> tuple[Array, Array]:
    """Return the real images [P, way, MOST, H, W, C] of problems, and their test images [P, way, 5, H, W, C]."""
    family = mg.episodes(build.take(data, config.part), MOST, TEST_IMAGES, way=WAY)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(99), seed), (2, config.problems))
    specs = jax.vmap(family.describe, in_axes=(None, 0))(family.data, keys[0])
    tasks = jax.jit(jax.vmap(family.make, in_axes=(None, 0, 0)))(family.data, keys[1], specs)
    real, test = (x.reshape(config.problems, WAY, -1, *data.event) for x in (tasks.support.x, tasks.query.x))
    return real, test


def pools(config: Config, data: build.Parts, real: Array, data_dir: str, seed: int) -> dict[str, np.ndarray]:
    """Return variants [SHOTS, P, way, MOST, V, H, W, C] of each kind, in [0, 255]; only `pooled` depends on shots."""
    joint = configured(config, "joint", config.joint_steps, data_dir, seed)
    taught = configured(config, config.learner, config.meta_steps, data_dir, seed)
    params = train(joint, data, {})
    meta = train(taught, data, params)
    built = build.model(joint, data.event, data.binary)
    model, learner = built.model, build.learner(taught, built)
    images, keys = real.reshape(-1, *data.event), jax.random.split(jax.random.key(seed + 2000), 3)

    def repeated(vary: Callable[[Any, Key, Array], Array], params: Params, key: Key) -> np.ndarray:
        """Return `variants` variants of every image, some images at a time."""

        def one(key: Key, x: Array) -> Array:
            return _bytes(vary(params, key, jnp.stack([x] * config.variants)))

        split = jax.random.split(key, images.shape[0])
        made = jax.jit(lambda: jax.lax.map(lambda pair: one(*pair), (split, images), batch_size=50))()
        return np.asarray(made).reshape(*real.shape[:3], config.variants, *data.event)

    def pooled(shots: Array, key: Key, x: Array) -> Array:
        """Return MOST * variants samples of what the first images of a class [MOST, H, W, C] adapt the VAE to."""
        adapt_key, sample_key = jax.random.split(key)
        used = (jnp.arange(MOST) < shots).astype(float)
        support = Examples(x * used[:, None, None, None], jnp.zeros(MOST, jnp.int32), used)
        adapted, _ = learner.adapt(meta, adapt_key, support)
        return _bytes(model.sample(adapted, sample_key, MOST * config.variants))

    classes = real.reshape(-1, MOST, *data.event)
    draw = jax.jit(lambda shots, keys: jax.lax.map(lambda pair: pooled(shots, *pair), (keys, classes), batch_size=10))
    of_shots = [draw(shots, jax.random.split(jax.random.fold_in(keys[2], shots), len(classes))) for shots in SHOTS]
    shape = (*real.shape[:3], config.variants, *data.event)
    vae = repeated(perturbed(of_vae(built, joint.network.latents), config.strength), params, keys[0])
    one_shot = repeated(by_adapting(learner.adapt, model.sample), meta, keys[1])
    return {
        "vae": np.stack([vae] * len(SHOTS)),
        "one-shot": np.stack([one_shot] * len(SHOTS)),
        "pooled": np.stack([np.asarray(made).reshape(shape) for made in of_shots]),
    }


def _bytes(x: Array) -> Array:
    return jnp.round(255 * x).astype(jnp.uint8)


def trainer(config: Config, event: tuple[int, int, int]) -> Callable[..., Array]:
    """Return the function that trains one classifier and tests it: accuracy in [0, 1].

    (key, real [way, MOST, H, W, C], variants [way, MOST, V, H, W, C], test [way, 5, H, W, C], shots, share, moves),
    all traced, so that rows and numbers of images are one program; `moves` says whether affine maps move images.
    """
    body = conv_features(event, (32, 32, 32, 32))
    features = num_features_of(body, event)
    made = classifier(body, features, WAY)
    field, move = mg.vector_field(made.model.game), affine()
    rule = optax.adam(optax.cosine_decay_schedule(config.rate, config.classifier_steps))

    def run(key: Key, real: Array, variants: Array, test: Array, shots: Array, share: Array, moves: Array) -> Array:
        init_key, run_key = jax.random.split(key)

        def batch(key: Key) -> Examples:
            keys = jax.random.split(key, 5)
            label = jax.random.randint(keys[0], (config.batch,), 0, WAY)
            which = jax.random.randint(keys[1], (config.batch,), 0, shots)
            version = jax.random.randint(keys[2], (config.batch,), 0, config.variants)
            generated = jax.random.uniform(keys[3], (config.batch,)) < share
            generated = generated[:, None, None, None]
            x = jnp.where(generated, variants[label, which, version] / 255.0, real[label, which])
            moved = move(keys[4], x)
            x = jnp.where(moves, jnp.where(generated, moved, (moved > 0.5).astype(jnp.float32)), x)
            return Examples(x, label, jnp.ones(config.batch))

        def step(carry: tuple[Params, Any], number: Array) -> tuple[tuple[Params, Any], None]:
            params, state = carry
            batch_key, game_key = jax.random.split(jax.random.fold_in(run_key, number))
            direction, _ = field(params, game_key, batch(batch_key))
            updates, state = rule.update(direction, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = made.model.init(init_key)
        (params, _), _ = jax.lax.scan(step, (params, rule.init(params)), jnp.arange(config.classifier_steps))
        chosen = made.logits(params, test.reshape(-1, *event)).argmax(1)
        return (chosen == jnp.repeat(jnp.arange(WAY), TEST_IMAGES)).mean()

    return jax.jit(jax.vmap(run, in_axes=(0, 0, 0, 0, None, None, None)))


def measure(config: Config, data: build.Parts, seed: int, data_dir: str, out: Path) -> dict[str, Any]:
    """Return the accuracies {row: {shots: [P]}} in % of one seed, and what it took."""
    begin = clock()
    real, test = problems(config, data, seed)
    made = pools(config, data, real, data_dir, seed)
    took = {"generators_seconds": clock() - begin}
    picture(out / f"variants-{seed}.png", np.asarray(real[0]), {name: of[0, 0] for name, of in made.items()})
    run, rows = trainer(config, data.event), {}
    begin = clock()
    for row, (pool, moves) in ROWS.items():
        rows[row] = {}
        for number, shots in enumerate(SHOTS):
            variants = jnp.asarray(made[POOLS[0] if pool is None else pool][number])
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), shots), config.problems)  # of all rows
            found = run(keys, real, variants, test, shots, 0.0 if pool is None else 0.5, moves)
            rows[row][str(shots)] = (100 * np.asarray(found, float)).tolist()
    return {"rows": rows, **took, "classifiers_seconds": clock() - begin}


def picture(path: Path, real: np.ndarray, made: dict[str, np.ndarray]) -> None:
    """Draw five real images of some classes, affine maps of them, and variants of each kind (pooled from five)."""
    classes, shown = slice(0, 10), SHOTS[0]
    x = real[classes, :shown]
    moved = affine()(jax.random.key(0), jnp.asarray(x).reshape(-1, *x.shape[2:])) > 0.5
    columns = [Column("real", x), Column("affine", np.asarray(moved, float).reshape(x.shape))]
    columns += [Column(name, variants[classes, :shown, 0] / 255.0) for name, variants in made.items()]
    save(adaptation_strip(columns), path)


def markdown(seeds: list[dict[str, Any]]) -> str:
    """Return the table: accuracy for each number of real images, and paired gains over none and over affine."""

    def values(row: str, shots: int) -> np.ndarray:
        return np.concatenate([entry["rows"][row][str(shots)] for entry in seeds])

    def cell(of: np.ndarray, sign: str = "") -> str:
        found = over_classes(of)
        return f"{found.mean:{sign}.1f} ± {(found.high - found.low) / 2:.1f}"

    lines = []
    for row in ROWS:
        line = [row, *(cell(values(row, shots)) for shots in SHOTS)]
        for other in ("none", "affine"):
            gains = [values(row, shots) - values(other, shots) for shots in SHOTS]
            line += ["" if row == other else cell(gain, "+") for gain in gains]
        lines.append(line)
    header = ["augmentation", *(f"{shots} images" for shots in SHOTS)]
    header += [f"over {other}, {shots}" for other in ("none", "affine") for shots in SHOTS]
    return table(header, lines) + "\n"


def main() -> None:
    """Train generators and classifiers for every seed, keeping what is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=Config.seeds)
    parser.add_argument("--part", choices=("validation", "test"), default=Config.part)
    parser.add_argument("--strength", type=float, default=Config.strength)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    config = Config(seeds=arguments.seeds, part=arguments.part, strength=arguments.strength)
    if arguments.quick:
        config = dataclasses.replace(
            config, joint_steps=400, meta_steps=100, variants=4, classifier_steps=80, problems=2, seeds=1
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.json"
    asked = {name: value for name, value in dataclasses.asdict(config).items() if name != "seeds"}  # more can follow
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"config": asked, "seeds": []}
    if results["config"] != asked:
        parser.error(f"{path} is of another configuration, {results['config']}; choose another --out")
    data = load(arguments.data_dir)
    for seed in range(len(results["seeds"]), config.seeds):
        results["seeds"].append(measure(config, data, seed, arguments.data_dir, arguments.out))
        path.write_text(json.dumps(results, indent=1))
        (arguments.out / "table.md").write_text(markdown(results["seeds"]))
        print(markdown(results["seeds"]), flush=True)


if __name__ == "__main__":
    main()
