"""The commands on games: training, critics, samples and translations measured, pictures, warnings."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_cli import bars, command, write_classes, write_support

from metagen_jax import report
from metagen_jax.cli import monitors, samples
from metagen_jax.cli.evaluate import Evaluate, evaluate_run
from metagen_jax.cli.runs import load
from metagen_jax.evaluate_samples import PER_CLASS, POOLED

TINY = [
    *("--shots", "2", "2", "--query", "4", "--network.hidden", "8", "--network.latents", "3"),
    *("--network.context", "2", "--inner.steps", "2", "--outer.tasks", "2", "--outer.warmup", "2"),
    *("--outer.steps", "6", "--outer.warm-start", "6"),
]
CRITICS = [
    *("--network.classifier-steps", "4", "--network.contrastive-steps", "3", "--network.channels", "2"),
    *("--network.features", "4", "--network.classifier-batch", "4", "--network.contrastive-batch", "4"),
]
EVALUATE = ["--shots", "2", "--num-images", "6", "--joint-steps", "3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with data, critics, and an evaluated run of Reptile on a GAN."""
    root = tmp_path_factory.mktemp("games")
    patch = pytest.MonkeyPatch()
    patch.setenv("METAGEN_CACHE_DIR", str(root / "cache"))
    data, run = write_classes(root / "data"), root / "run"
    critics = command("critics", "--data", data, "--out", root / "critics.npz", *CRITICS)
    assert critics.code == 0, critics.err
    trained = command("train", "reptile", "gan", "--data", data, "--out", run, *TINY)
    assert trained.code == 0, trained.err
    evaluated = command("evaluate", run, "--critics", root / "critics.npz", *EVALUATE)
    assert evaluated.code == 0, evaluated.err
    yield SimpleNamespace(root=root, data=data, run=run, critics=critics, trained=trained, evaluated=evaluated)
    patch.undo()


def test_a_game_s_run_folder_holds_what_is_promised(place):
    for name in ("config.json", "meta.npz", "evaluation.json", "evaluation.md", "baselines/joint-3.npz"):
        assert (place.run / name).stat().st_size > 0, name
    for name in ("learning_curve", "adaptation_curve", "adaptation_strip"):
        picture = np.asarray(Image.open(place.run / "figures" / f"{name}.png").convert("L"))
        assert min(picture.shape) > 150, name
        assert picture.std() > 5, name


def test_defaults_of_a_game_are_resolved_in_the_configuration(place):
    config = json.loads((place.run / "config.json").read_text())
    assert config["adversarial"]["loss"] == "wasserstein"
    assert config["adversarial"]["penalty"] == "gradient"
    assert (config["outer"]["rate"], config["outer"]["momentum"]) == (3e-4, 0.5)


def test_every_measure_is_reported_for_every_system_and_step_beside_copies_and_real_images(place):
    result = json.loads((place.run / "evaluation.json").read_text())
    assert list(result["systems"]) == ["reptile (gan)", "joint, fine-tuned", "scratch (SGD)", "scratch (Adam)"]
    assert list(result["references"]) == [samples.REAL, samples.COPY]
    for system in result["systems"].values():
        assert system["steps"] == [0, 1, 2, 3, 4]
        for name in PER_CLASS:
            assert len(system[name]) == 5
            assert all(entry["low"] <= entry["mean"] <= entry["high"] for entry in system[name])
        assert set(system["pooled"]) == set(POOLED)
        for values in system["pooled"].values():
            assert len(values) == 5
            assert all(entry["low"] <= entry["mean"] <= entry["high"] for entry in values)
    copies = result["references"][samples.COPY]
    assert copies["memorisation"][0]["mean"] == pytest.approx(0, abs=1e-6)
    assert copies["copies"][0]["mean"] == 1.0
    assert result["protocol"]["critics"]["weights_sha256"] in place.critics.out
    assert result["protocol"]["critics"]["config"]["channels"] == 2
    scores = [
        result["references"][name]["pooled"]["inception_score"][0]["mean"] for name in (samples.REAL, samples.COPY)
    ]
    assert scores[0] != scores[1]


def test_improvements_are_paired_differences_after_the_trained_number_of_steps(place):
    result = json.loads((place.run / "evaluation.json").read_text())
    run = result["systems"]["reptile (gan)"]["kid"]
    expected = {
        "its own step 0": run[0],
        "joint, not adapted": result["systems"]["joint, fine-tuned"]["kid"][0],
        **{name: result["systems"][name]["kid"][2] for name in list(result["systems"])[1:]},
    }
    assert set(result["improvements"]) == set(expected)
    for name, entry in expected.items():
        difference = entry["mean"] - run[2]["mean"]
        assert result["improvements"][name]["kid"]["mean"] == pytest.approx(difference, abs=1e-5)


def test_the_printed_tables_are_the_markdown_file(place):
    text = (place.run / "evaluation.md").read_text()
    assert text in place.evaluated.out
    for words in ("within each class", "all classes pooled", "the run is smaller, paired, than", samples.COPY):
        assert words in text
    assert re.search(r"joint, fine-tuned: (sgd|adam) on .* at .*, the best of 13 rules on 2 validation", text)


def test_critics_are_kept_and_found_again_and_never_used_for_other_training_classes(place, tmp_path):
    path = place.root / "critics.npz"
    again = command("critics", "--data", place.data, "--out", path, *CRITICS)
    assert again.code == 0
    assert "is there already" in again.out
    other_data = write_classes(tmp_path / "other", num_classes=12, seed=5)
    other = command("critics", "--data", other_data, "--out", path, *CRITICS)
    assert other.code == 2
    assert "trained on other images" in other.err
    cached = command("critics", "--data", place.data, *CRITICS)
    assert cached.code == 0
    (kept,) = (place.root / "cache").glob("critics-*.npz")
    assert str(kept) in cached.out
    named = command("critics", "--data", place.data, "--out", tmp_path / "c.txt")
    assert (named.code, named.err) == (2, f"metagen: --out must be a .npz file, got {tmp_path / 'c.txt'}\n")


def test_metrics_of_a_game_have_both_sides_and_the_monitors(place):
    records = [json.loads(line) for line in (place.run / "metrics.jsonl").read_text().splitlines()]
    warm, meta = records
    assert {"loss/generator", "loss/discriminator", "spread_ratio", "real_above_made", "loss_share"} <= set(warm)
    assert {"support/loss/generator", "support/loss/discriminator", "support/spread_ratio"} <= set(meta)
    assert len(meta["support/loss/generator"]) == 2


def test_adapting_a_gan_draws_new_images(place, tmp_path):
    support, out = write_support(tmp_path / "mine", *bars()), tmp_path / "grid.png"
    result = command("adapt", place.run, "--support", support, "--num", "4", "--out", out)
    assert result.code == 0, result.err
    assert re.search(r"adapted to 3 images in \d+\.\d ms \(2 steps", result.out)
    assert "nats" not in result.out
    assert np.asarray(Image.open(out).convert("L")).std() > 5


def test_info_of_a_game_lists_the_parts_of_both_sides(place):
    result = command("info", place.run)
    assert result.code == 0, result.err
    for player in ("generator_head", "discriminator_context", "discriminator_maps"):
        assert player in result.out
    assert "adversarial.loss = wasserstein" in result.out


def test_a_translator_is_trained_and_its_error_measured_against_the_truth(place, tmp_path):
    run = tmp_path / "run"
    options = [*TINY, "--adversarial.identity-weight", "1"]
    trained = command(
        "train", "fomaml", "cycle", "--data", place.data, "--inner.rates", "fixed", "--out", run, *options
    )
    assert trained.code == 0, trained.err
    evaluated = command("evaluate", run, "--shots", "2", "--classes", "3", "--no-baselines")
    assert evaluated.code == 0, evaluated.err
    result = json.loads((run / "evaluation.json").read_text())
    assert result["references"]["left as it is"]["error"][0]["mean"] > 0
    (errors,) = (system["error"] for system in result["systems"].values())
    assert all(0 < entry["mean"] < 1 for entry in errors)
    assert set(result["improvements"]) == {"its own step 0", "left as it is"}
    gain = result["improvements"]["its own step 0"]["mean"]
    assert gain == pytest.approx(errors[0]["mean"] - errors[2]["mean"], abs=1e-6)
    assert np.asarray(Image.open(run / "figures" / "translations.png").convert("L")).std() > 5
    adapted = command("adapt", run, "--support", write_support(tmp_path / "mine", *bars()), "--out", tmp_path / "g.png")
    assert adapted.code == 2
    assert "translat" in adapted.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["maml", "gan", "--adversarial.loss", "wassertein"], "wassertein"),
        (
            ["maml", "gan", "--inner.moves", "generator_contxt"],
            "inner.moves has generator_contxt; this model's players",
        ),
        (["maml", "gan", "--adversarial.critic-steps", "0"], "adversarial.critic_steps must be at least 1, got 0"),
        (["maml", "gan", "--adversarial.mode-seeking", "-1"], "adversarial.mode_seeking must be at least 0"),
        (["amortised", "vae"], "needs a model that reads its support, gan, autoregressive"),
        (["amortised", "gan", "--network.context", "0"], "needs context > 0"),
        (["maml", "cycle", "--network.network", "conv"], "dense so far"),
        (
            ["maml", "bigan", "--adversarial.penalty", "r1"],
            "adversarial.penalty=r1 means nothing to bigan; it is read by",
        ),
        (["maml", "vae", "--adversarial.critic-steps", "3"], "means nothing to vae; it is read by every game"),
    ],
)
def test_games_that_cannot_be_built_are_refused_and_no_run_is_made(place, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = command("train", *arguments, "--data", place.data, "--shots", 2, 2, "--query", 3)
    assert result.code == 2
    assert message in result.err
    assert list(tmp_path.iterdir()) == []


def test_domains_are_not_made_from_procedural_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command("train", "maml", "cycle", "--data", "strokes")
    assert result.code == 2
    assert "domains are made from stored images" in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-images", "3"], "at least 6, got 3"),
        (["--query", "0"], "--query must be"),
        (["--query", "3"], "at least 4 held-out images of each class, got 3"),
        (["--classes", "2"], "need more than 2 test classes of 4 held-out images"),
        (["--shots", "0"], "needs --shots of at least 1"),
        (["--critics", "no/such.npz"], "is not a critics file"),
    ],
)
def test_evaluating_samples_refuses_settings_that_cannot_be_met(place, options, message):
    result = command("evaluate", place.run, "--shots", "2", *options)
    assert result.code == 2
    assert message in result.err


# Monitors

QUIET = {"num_nonfinite": 0, "bad_inner_step": -1, "bad_task": -1}
HEALTHY = QUIET | {"spread_ratio": 0.9, "real_above_made": 0.8, "real_score": 1.0, "made_score": -1.0}


def test_a_healthy_game_is_not_warned_of():
    assert monitors.warnings_of(50, HEALTHY) == {}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"spread_ratio": 0.05}, "collapse", "vary 0.05 times as much as real ones"),
        ({"real_above_made": 1.0}, "one-sided", "the discriminator has won"),
        ({"real_above_made": 0.1}, "one-sided", "the generator has won"),
        ({"real_score": 5000.0}, "runaway", "scores have grown to 5000"),
    ],
)
def test_a_game_that_collapses_or_diverges_is_seen(change, kind, words):
    found = monitors.warnings_of(50, HEALTHY | change)
    assert set(found) == {kind}
    assert words in found[kind]
    on_support = {f"support/{name}": [0.5, value] for name, value in (HEALTHY | change).items() if name not in QUIET}
    assert set(monitors.warnings_of(50, QUIET | on_support)) == {kind}  # Reptile is judged on its support


def test_the_bar_shows_a_loss_of_games_too():
    assert monitors.shown_loss({"loss": 3.0, "support/loss": [9.0]}) == 3.0
    assert monitors.shown_loss({"loss/generator": 2.0, "loss/discriminator": 1.0}) == 1.0
    assert monitors.shown_loss({"support/loss/generator": [5.0, 4.0]}) == 4.0
    assert monitors.shown_loss({}) is None


def test_the_learning_curve_of_a_game_has_a_panel_for_the_spread_of_samples():
    warm = {"phase": "warm start", "step": 50, "loss/generator": 1.0, "loss/discriminator": 2.0, "spread_ratio": 0.5}
    meta = {"phase": "meta", "step": 50, "support/loss/generator": [3.0, 2.0], "support/spread_ratio": [0.2, 0.7]}
    axis, spread = report.learning_curve([warm, meta]).axes
    assert {line.get_label(): line.get_ydata().tolist() for line in axis.get_lines()[:3]} == {
        "warm start, discriminator": [2.0],
        "warm start, generator": [1.0],
        "generator": [2.0],
    }
    np.testing.assert_array_equal(spread.get_lines()[0].get_ydata(), [0.7])


def test_a_run_without_baselines_is_measured_against_its_own_step_0(place):
    finished = load(place.run)
    before = {name: (place.run / name).read_bytes() for name in ("evaluation.json", "evaluation.md")}
    result = evaluate_run(
        finished, Evaluate(place.run, shots=2, num_images=6, baselines=False, critics=place.root / "critics.npz")
    )
    assert list(result["systems"]) == ["reptile (gan)"]
    assert set(result["improvements"]) == {"its own step 0"}
    for name, content in before.items():
        (place.run / name).write_bytes(content)
