import dataclasses
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cli import Stream, write_classes

from metagen_jax import build
from metagen_jax.cli import main
from metagen_jax.config import (
    ChoiceConfig,
    DataConfig,
    GeneratedConfig,
    ModelConfig,
    OuterConfig,
    TrainConfig,
    check,
    from_json,
    to_json,
)
from metagen_jax.strategies.candidates import pinned
from metagen_jax.tasks.mixing import Mixed

VAE = (
    "--network.hidden",
    "16",
    "--network.latents",
    "4",
    "--network.context",
    "0",
    "--shots",
    "2",
    "2",
    "--query",
    "3",
)
CLASSIFIER = ("--network.hidden", "8", "--way", "3", "--shots", "1", "2", "--query", "2")
SHORT = ("--outer.steps", "4", "--outer.tasks", "2", "--outer.warmup", "1")
GENERATIVE = {"learner": "maml", "model": "vae", "way": None}
STRATEGIES = (
    *("score_softmax", "hard_buffer", "class_pairs"),
    *("agreement", "greedy_set", "information", "self_paced"),
)


def command(monkeypatch, *arguments):
    streams = {name: Stream() for name in ("stdout", "stderr")}
    with monkeypatch.context() as context:
        for name, stream in streams.items():
            context.setattr(sys, name, stream)
        code = main([str(argument) for argument in arguments])
    return SimpleNamespace(code=code, out=streams["stdout"].text, err=streams["stderr"].text)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and a generator trained on them."""
    root = tmp_path_factory.mktemp("generated")
    data = write_classes(root / "data")
    patch = pytest.MonkeyPatch()
    trained = command(patch, "train", "joint", "vae", "--data", data, "--out", root / "vae", *VAE, *SHORT)
    assert trained.code == 0, trained.err
    return SimpleNamespace(root=root, data=data, vae=root / "vae")


def configured(place, strategy="uniform", model="classifier", **generated):
    return check(
        TrainConfig(
            "prototypes" if model == "classifier" else "maml",
            model,
            DataConfig(str(place.data)),
            ModelConfig(hidden=(8,), latents=4, context=0),
            outer=OuterConfig(4, tasks=2, warmup=1, warm_start=0),
            generated=GeneratedConfig(**generated),
            choice=ChoiceConfig(strategy),
            shots=(1, 2),
            query=2,
            way=3 if model == "classifier" else None,
        )
    )


def test_a_learner_trains_on_real_and_generated_tasks_and_says_so(place, monkeypatch):
    out = place.root / "mixed"
    options = ("--generated.run", place.vae, "--generated.tasks", "0.5", "--generated.images", "0.5")
    more = ("--generated.deform", "affine", "--generated.weight", "1.0", "0.5", "--choice.strategy", "uniform")
    result = command(
        monkeypatch, "train", "prototypes", "classifier", "--data", place.data, "--out", out, *CLASSIFIER, *SHORT,
        *options, *more,
    )  # fmt: skip
    assert result.code == 0, result.err
    kept = json.loads((out / "config.json").read_text())
    assert kept["generated"]["tasks"] == 0.5
    assert kept["generated"]["run"] == str(place.vae.resolve())
    assert kept["generated"]["weight"] == [1.0, 0.5]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(record["loss"]) for record in records if "loss" in record)


def test_without_a_label_and_without_a_generator(place, monkeypatch):
    out = place.root / "repeated"
    options = ("--generated.tasks", "1", "--generated.decoded", "0", "--generated.deform", "elastic")
    result = command(
        monkeypatch, "train", "prototypes", "classifier", "--data", place.data, "--out", out, *CLASSIFIER, *SHORT,
        *options, "--generated.deformed", "all", "--choice.strategy", "self_paced",
    )  # fmt: skip
    assert result.code == 0, result.err


def test_shares_of_zero_are_the_plain_tasks_and_one_is_unsupervised(place):
    data = build.parts(DataConfig(str(place.data)))
    plain = build.training_tasks(configured(place), data)
    run = str(place.vae)
    spec = plain.describe(plain.data, jax.random.key(1))
    real = build.family(data, "train", (1, 2), 2, model="classifier", way=3)
    jax.tree.map(
        np.testing.assert_array_equal,
        plain.make(plain.data, jax.random.key(2), spec),
        real.make(real.data, jax.random.key(2), spec),
    )
    mixed = build.training_tasks(configured(place, run=run, tasks=0.5), data)
    assert isinstance(mixed.data, Mixed)
    none = mixed._replace(data=mixed.data._replace(share=jnp.float32(0.0)))
    spec = none.describe(none.data, jax.random.key(1))
    jax.tree.map(
        np.testing.assert_array_equal,
        none.make(none.data, jax.random.key(2), spec),
        plain.make(plain.data, jax.random.key(2), plain.describe(plain.data, jax.random.key(1))),
    )
    alone = build.training_tasks(configured(place, run=run, tasks=1.0), data)
    task = alone.make(alone.data, jax.random.key(0), alone.describe(alone.data, jax.random.key(1)))
    assert task.support.x.shape == (6, 28, 28, 1)
    assert task.query.label.tolist() == [0, 0, 1, 1, 2, 2]


def test_variants_and_deformations_change_the_images_that_they_should(place):
    data = build.parts(DataConfig(str(place.data)))

    def task(**generated):
        family = build.training_tasks(configured(place, **generated), data)
        return family.make(family.data, jax.random.key(2), family.describe(family.data, jax.random.key(1)))

    plain, varied = task(), task(run=str(place.vae), images=1.0)
    deformed = task(deform="affine", deformed="all")
    np.testing.assert_array_equal(plain.support.x, varied.support.x)
    assert float(jnp.abs(plain.query.x - varied.query.x).max(axis=(1, 2, 3)).min()) > 0.01
    assert set(np.unique(task(run=str(place.vae), images=1.0, binary=True).query.x)) <= {0.0, 1.0}
    used = plain.support.weight > 0
    assert float(jnp.abs(plain.support.x - deformed.support.x).max(axis=(1, 2, 3))[used].min()) > 0.5
    assert set(np.unique(deformed.query.x)) <= {0.0, 1.0}  # these images are binary


@pytest.mark.parametrize("anchors", ["prior", "beyond", "between"])
def test_every_kind_of_anchor_makes_images(place, anchors):
    data = build.parts(DataConfig(str(place.data)))
    made = build.training_tasks(configured(place, run=str(place.vae), tasks=1.0, anchors=anchors), data)
    task = made.make(made.data, jax.random.key(0), made.describe(made.data, jax.random.key(1)))
    assert float(task.query.x.min()) >= 0 <= float(task.query.x.max()) <= 1
    classes = task.query.x.reshape(3, 2, -1)
    assert float(jnp.abs(classes[:, 0] - jnp.roll(classes[:, 0], 1, 0)).max()) > 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_proposes_tasks_of_the_family_that_the_step_makes(place, strategy):
    config = configured(place, strategy)
    parts = build.training(config)
    state = parts.sampler.init(jax.random.key(0))
    meta = parts.learner.init(jax.random.key(1))
    specs, weights = jax.jit(parts.sampler.propose)(state, parts.family.data, jax.random.key(2), meta)
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-5)
    family = parts.family if strategy == "class_pairs" else pinned(parts.family)
    task = family.make(parts.family.data, jax.random.key(3), jax.tree.map(lambda leaf: leaf[0], specs))
    assert task.query.label.tolist() == [0, 0, 1, 1, 2, 2]
    parts.sampler.update(state, specs, jnp.ones(2))


def test_the_worst_case_is_of_groups_and_one_group_has_none(place):
    config = configured(place, "worst_case")
    data = build.parts(config.data)
    with pytest.raises(ValueError, match="only one"):
        build.training(config)
    images = data.images._replace(groups=tuple("ab"[number % 2] for number in range(data.images.num_classes)))
    data = data._replace(images=images)
    built = build.model(config, data.event, data.binary)
    learner, tasks = build.learner(config, built), build.training_tasks(config, data)
    family, sampler = build.choice(config, data, built, learner, tasks)
    specs, weights = sampler.propose(sampler.init(jax.random.key(0)), family.data, jax.random.key(1), {})
    np.testing.assert_allclose(weights, 0.5, rtol=1e-6)  # it begins uniform
    state = sampler.update(sampler.init(jax.random.key(0)), specs, jnp.array([5.0, 0.0]))
    assert float(jnp.abs(state - sampler.init(jax.random.key(0))).max()) > 1e-3


def test_strategies_choose_generated_tasks_for_a_generative_model_too(place):
    config = configured(place, "information", "vae", run=str(place.vae), tasks=1.0)
    parts = build.training(config)
    meta = parts.learner.init(jax.random.key(1))
    state = parts.sampler.init(jax.random.key(0))
    specs, _ = parts.sampler.propose(state, parts.family.data, jax.random.key(2), meta)
    assert specs["statistics"].embedding.shape == (2, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generated": {"tasks": 0.5}}, "need a generator"),
        ({"generated": {"tasks": 1.5, "run": "x"}}, r"share, in \[0, 1\]"),
        ({"generated": {"anchors": "prior"}}, "about generated tasks"),
        ({"generated": {"run": "x"}}, "would make nothing"),
        ({"generated": {"deformed": "all"}}, "set generated.deform"),
        ({"generated": {"tasks": 1.0, "run": "x", "images": 0.5}}, "images is about real tasks"),
        ({"generated": {"tasks": 1.0, "run": "x", "weight": (1, 0)}}, "weight is beside real tasks"),
        ({"generated": {"tasks": 1.0, "run": "x", "anchors": "beyond", "decoded": 0.5}}, "all decoded"),
        ({"generated": {"tasks": 1.0, "decoded": 0.0, "strength": 0.1}}, "strength is about what is decoded"),
        ({"generated": {"images": 0.5, "run": "x", "variation": "others"}}, "variation is about generated tasks"),
        ({"generated": {"tasks": 1.0, "run": "x", "variation": "others", "strength": 1.5}}, r"\[0, 1\]"),
        ({**GENERATIVE, "generated": {"tasks": 0.5, "run": "x", "variation": "others", "strength": 0.3}}, "way >= 2"),
        ({"generated": {"tasks": 0.5, "run": "x"}, "data": DataConfig(rotations=True)}, None),
        ({"generated": {"tasks": 1.0, "run": "x"}, "data": DataConfig(rotations=True)}, "real tasks"),
        ({**GENERATIVE, "generated": {"tasks": 0.5, "run": "x"}, "shots": (0, 2)}, "at least one support"),
        ({**GENERATIVE, "model": "cycle", "choice": {"strategy": "worst_case"}}, "domains"),
        ({"generated": {"strength": -1.0, "tasks": 0.5, "run": "x"}}, "strength"),
        ({"choice": {"candidates": 4}}, "means nothing to uniform"),
        ({"choice": {"strategy": "agreement", "candidates": 1}}, "at least as many"),
        ({"choice": {"strategy": "agreement", "begin": 0.2}}, "self_paced"),
        ({"choice": {"strategy": "self_paced", "begin": 0.0}}, r"\(0, 1\]"),
        ({"choice": {"strategy": "class_pairs"}, "generated": {"tasks": 0.5, "run": "x"}}, "by their classes"),
        ({"choice": {"strategy": "agreement"}, "generated": {"tasks": 0.5, "run": "x", "weight": (1, 0)}}, "weight"),
        ({**GENERATIVE, "choice": {"strategy": "class_pairs"}}, "two classes"),
        ({**GENERATIVE, "model": "gan", "choice": {"strategy": "information"}}, "embedding"),
        ({**GENERATIVE, "data": DataConfig("strokes"), "generated": {"deform": "affine"}}, "strokes"),
    ],
)
def test_settings_that_cannot_be_are_refused(place, changes, message):
    config = configured(place)
    for name, values in changes.items():
        record = {"generated": GeneratedConfig, "choice": ChoiceConfig}.get(name)
        config = dataclasses.replace(config, **{name: record(**values) if record else values})
    if message is None:
        assert check(config) == config
        return
    with pytest.raises(ValueError, match=message):
        check(config)


def test_a_generator_of_another_split_is_refused(place, monkeypatch):
    other = write_classes(place.root / "other", seed=1)
    result = command(
        monkeypatch, "train", "prototypes", "classifier", "--data", other, "--out", place.root / "leak", *CLASSIFIER,
        *SHORT, "--generated.run", place.vae, "--generated.tasks", "0.5",
    )  # fmt: skip
    assert result.code == 2
    assert "another split" in result.err
    assert not (place.root / "leak").exists()


def test_what_is_no_run_or_makes_nothing_is_refused(place, tmp_path):
    data = build.parts(DataConfig(str(place.data)))
    with pytest.raises(ValueError, match="not the folder of a run"):
        build.trained_generator(str(tmp_path), data)
    with pytest.raises(ValueError, match="Classifier"):
        build.generator(build.model(configured(place), data.event, data.binary), 4)


def test_a_configuration_survives_being_written_and_old_ones_are_read(place):
    config = configured(place, "agreement", run="runs/vae", tasks=0.5)
    assert from_json(to_json(config)) == config
    old = json.loads(to_json(configured(place)))
    del old["generated"], old["choice"]
    assert from_json(json.dumps(old)) == configured(place)
