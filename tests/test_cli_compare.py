"""The commands on classifiers, and the comparison of learners."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from problems import flat
from test_cli import command, write_classes

from metagen_jax.baselines import image_gradients as gradients
from metagen_jax.cli.compare import Compare, num_meta_steps
from metagen_jax.cli.runs import load
from metagen_jax.cli.train import Train
from metagen_jax.config import DataConfig, InnerConfig, ModelConfig, OuterConfig, TrainConfig, check, from_json, to_json
from metagen_jax.parameters import load_meta

TINY = [
    *("--shots", "2", "2", "--query", "3", "--network.hidden", "8", "--outer.tasks", "2", "--outer.warmup", "2"),
    *("--outer.steps", "30"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with data, and an evaluated run of prototypes on a classifier."""
    root = tmp_path_factory.mktemp("compare")
    data, run = write_classes(root / "data"), root / "run"
    classes = ("--way", "3", "--split", "class")
    trained = command("train", "prototypes", "classifier", "--data", data, "--out", run, *classes, *TINY)
    assert trained.code == 0, trained.err
    evaluated = command("evaluate", run, "--shots", "1", "--tasks", "30")
    assert evaluated.code == 0, evaluated.err
    return SimpleNamespace(root=root, data=data, run=run, evaluated=evaluated)


def test_a_classifier_is_measured_by_accuracy_beside_what_has_learned_nothing(place):
    result = json.loads((place.run / "evaluation.json").read_text())
    assert set(result["systems"]) == {"prototypes (classifier)", "the same, untrained", "class means of pixels"}
    assert (result["protocol"]["way"], result["protocol"]["transductive"]) == (3, False)
    accuracy = result["systems"]["prototypes (classifier)"]["accuracy"][0]
    assert 100 / 3 < accuracy["low"] < accuracy["mean"] < accuracy["high"] <= 101
    gain = result["gains"]["the same, untrained"]["mean"]
    other = result["systems"]["the same, untrained"]["accuracy"][0]["mean"]
    assert gain == pytest.approx(accuracy["mean"] - other, abs=1e-4)
    assert "3-way 1-shot, 30 tasks of 3 queries a class" in place.evaluated.out
    picture = np.asarray(Image.open(place.run / "figures" / "adaptation_curve.png").convert("L"))
    assert picture.std() > 5


def test_what_a_classifier_cannot_do_is_said(place):
    out = command("adapt", place.run, "--support", place.data / "class00", "--out", place.root / "grid.png")
    assert (out.code, "is a classifier, which makes no images" in out.err) == (2, True)
    assert "--tasks" in command("evaluate", place.run, "--classes", "3").err
    assert "at least one support image" in command("evaluate", place.run, "--shots", "0").err
    refused = (
        (["joint", "classifier"], "no joint training"),
        (["maml", "classifier", "--outer.warm-start", "5"], "no joint training; got outer.warm_start=5"),
        (["prototypes", "gan"], "reads the head of a classifier"),
        (["matching", "classifier", "--inner.steps", "2"], "whose heads are linear; got matching"),
        (["maml", "vae", "--way", "3"], "way=3 means nothing to vae"),
        (["maml", "classifier", "--way", "1"], "at least two classes, got way=1"),
        (["maml", "classifier", "--data", "strokes"], "a classifier needs stored images"),
        (["reptile", "vae", "--inner.first-order-until", "0.5"], "first_order_until=0.5 means nothing to reptile"),
        (["maml_plus_plus", "vae", "--inner.multi-step-until", "1.5"], "share of the meta-steps, in"),
        (["maml", "vae", "--inner.strength", "2"], "strength=2.0 means nothing to maml; it is for imaml"),
        (["maml", "cycle", "--rotations"], "leave rotations out"),
        (["imaml", "gan", "--adversarial.dynamics", "consensus"], "solves the game itself"),
        (["maml", "gan", "--network.network", "gated"], "structure of vae and classifier"),
    )
    for arguments, reason in refused:
        found = command("train", *arguments, "--out", place.root / "never")
        assert (found.code, reason in found.err) == (2, True), (arguments, found.err)
    assert not (place.root / "never").exists()


def test_learners_are_compared_in_one_table_and_one_plot_from_one_warm_start(place):
    out = place.root / "vae"
    found = command(
        *("compare", "maml,cavia", "vae", "--data", place.data, "--out", out, *TINY, "--outer.steps", "4"),
        *("--outer.warm-start", "4", "--network.latents", "2", "--network.context", "2", "--inner.steps", "2"),
        *("--inner.rates", "fixed", "--num-samples", "2", "--test-shots", "2", "--inner.first-order-until", "0"),
    )
    assert found.code == 0, found.err
    result = json.loads((out / "comparison.json").read_text())
    assert {name: entry["meta_steps"] for name, entry in result["learners"].items()} == {"maml": 4, "cavia": 4}
    assert all(len(entry["curve"]) == 5 for entry in result["learners"].values())
    lines = [line for line in found.out.splitlines() if line.startswith("| ")]
    means = [float(line.split("|")[3].split("[")[0]) for line in lines[1:3]]
    assert means == sorted(means, reverse=True)
    picture = np.asarray(Image.open(out / "comparison.png").convert("L"))
    assert picture.std() > 5
    maml, cavia = load(out / "maml"), load(out / "cavia")
    assert "context" in maml.meta
    assert "context" not in cavia.meta
    for name, tree in load_meta(out / "maml" / "baselines" / "warm_start.npz", maml.meta)[0].items():
        other = load_meta(out / "cavia" / "baselines" / "warm_start.npz", maml.meta)[0][name]
        if name in ("encoder", "decoder", "head", "modulation"):  # which joint training learns: both begin there
            np.testing.assert_array_equal(flat(tree), flat(other))


def test_what_cannot_be_compared_is_said_before_anything_is_trained(place):
    out = place.root / "nothing"
    for learners, model, reason in (
        ("maml", "vae", "two different learners or more"),
        ("maml,maml", "vae", "two different learners or more"),
        ("maml,malm", "vae", "did you mean 'maml'"),
        ("maml,prototypes", "gan", "reads the head of a classifier"),
        ("maml,ridge", "classifier", "say how many with --tasks"),
    ):
        found = command("compare", learners, model, "--data", place.data, "--out", out, *TINY, "--classes", "3")
        assert (found.code, reason in found.err) == (2, True), found.err
    assert not out.exists()


def test_equal_gradients_and_equal_operations_count_what_they_say():
    def config(learner, model="vae", steps=None):
        return check(TrainConfig(learner, model, inner=InnerConfig(steps=steps), outer=OuterConfig(steps=100)))

    assert gradients(config("maml")) == 5 * 5 + 10
    assert gradients(config("joint")) == 15
    assert gradients(config("reptile")) == 25
    assert gradients(config("prototypes", "classifier")) == 15
    assert gradients(config("amortised", "gan", 2)) == 25
    assert gradients(config("maml_plus_plus")) == 5 * (5 + 10)
    assert gradients(config("regressed")) == 5 + 50 * (5 + 10)
    options = Compare(Train("maml,reptile", "vae"))
    assert num_meta_steps(config("reptile"), config("maml"), options) == 140


def test_equal_operations_are_counted_in_the_program(place):
    def config(learner, steps):
        data, network = DataConfig(str(place.data), split="class"), ModelConfig(hidden=(8,))
        inner, outer = InnerConfig(steps=steps), OuterConfig(steps=100, tasks=2)
        return check(TrainConfig(learner, "classifier", data, network, inner, outer, shots=(2, 2), query=3, way=3))

    options = Compare(Train("anil,fomaml", "classifier"), equal="operations")
    assert num_meta_steps(config("fomaml", 2), config("fomaml", 2), options) == 100
    longer = num_meta_steps(config("fomaml", 4), config("fomaml", 2), options)
    # 6 queries of 3 classes once, 2 supports of 3 classes in each step: (2 * 2 + 3) / (4 * 2 + 3) of the meta-steps
    assert 100 * 7 / 11 * 0.85 < longer < 100 * 7 / 11 * 1.15


def test_a_learner_that_drops_second_derivatives_at_first_goes_on_as_the_same_run(place):
    out = place.root / "phases"
    found = command(
        *("train", "maml", "classifier", "--data", place.data, "--out", out, "--way", "3", "--split", "class", *TINY),
        *("--outer.steps", "4", "--inner.first-order-until", "0.5", "--inner.steps", "1"),
    )
    assert found.code == 0, found.err
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4]
    assert load(out).step == 4
    assert np.isfinite(jax.flatten_util.ravel_pytree(load(out).meta)[0]).all()


def test_a_configuration_of_before_these_settings_is_read_as_it_was():
    text = json.loads(to_json(check(TrainConfig("maml", "vae", inner=InnerConfig(steps=3)))))
    for name in ("strength", "rule", "multi_step_until", "first_order_until", "teacher_steps"):
        del text["inner"][name]
    del text["way"], text["data"]["rotations"], text["network"]["pooling"]
    assert from_json(json.dumps(text)) == check(TrainConfig("maml", "vae", inner=InnerConfig(steps=3)))


def test_a_comparison_leaves_out_what_diverges_and_goes_on(place):
    out = place.root / "diverges"
    found = command(
        *("compare", "maml,prototypes", "classifier", "--data", place.data, "--out", out, "--way", "3", *TINY),
        *("--split", "class", "--outer.steps", "10", "--inner.rate", "1e30", "--tasks", "10", "--test-shots", "1"),
    )
    assert found.code == 0, found.err
    result = json.loads((out / "comparison.json").read_text())
    assert "prototypes" in result["learners"]
    if "maml" in result["learners"]:  # trained, and not finite in the test
        assert "diverged" in (out / "comparison.md").read_text()
    else:
        assert "maml diverged" in found.out
