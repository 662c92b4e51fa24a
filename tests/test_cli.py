import json
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from metagen_jax import build
from metagen_jax.checkpoint import Checkpoints
from metagen_jax.cli import adapt, evaluate, info, main, quickstart, summary
from metagen_jax.cli.monitors import summarise, warnings_of
from metagen_jax.cli.runs import load
from metagen_jax.cli.train import Train
from metagen_jax.config import DataConfig, TrainConfig
from metagen_jax.tasks.samplers import uniform
from metagen_jax.train import init_state

TINY = [
    *("--shots", "2", "2", "--query", "3", "--network.hidden", "16", "--network.latents", "4"),
    *("--network.context", "4", "--inner.steps", "2", "--outer.tasks", "4", "--outer.warmup", "2"),
]
SHORT = ["--outer.steps", "10", "--outer.warm-start", "10", "--checkpoint-every", "5"]


def write_classes(folder, num_classes=20, num_images=8, seed=0):
    """Write classes of bars that differ by angle and place, white on black."""
    rng = np.random.default_rng(seed)
    for c in range(num_classes):
        (folder / f"class{c:02}").mkdir(parents=True)
        for n in range(num_images):
            pixels = np.zeros((28, 28), np.uint8)
            row, column = 4 + c % 10 * 2 + rng.integers(0, 2), 4 + c // 10 * 12
            pixels[row : row + 3, column : column + 9] = 255
            Image.fromarray(pixels).save(folder / f"class{c:02}" / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with data, a trained and evaluated run, and what the commands printed."""
    root = tmp_path_factory.mktemp("cli")
    data = write_classes(root / "data")
    run = root / "run"
    trained = command("train", "maml", "vae", "--data", data, "--out", run, "--tensorboard", *TINY, *SHORT)
    assert trained.code == 0, trained.err
    evaluated = command("evaluate", run, "--shots", "2", "--num-samples", "50", "--joint-steps", "5")
    assert evaluated.code == 0, evaluated.err
    return SimpleNamespace(root=root, data=data, run=run, trained=trained, evaluated=evaluated)


def command(*arguments):
    """Run `metagen` in this process; return its exit code and what it printed."""
    patch = pytest.MonkeyPatch()
    streams = {name: Stream() for name in ("stdout", "stderr")}
    with patch.context() as context:
        for name, stream in streams.items():
            context.setattr(sys, name, stream)
        code = main([str(argument) for argument in arguments])
    return SimpleNamespace(code=code, out=streams["stdout"].text, err=streams["stderr"].text)


class Stream:
    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return False


def write_support(folder, *images):
    folder.mkdir()
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def bars(num=3):
    pixels = np.zeros((num, 28, 28), np.uint8)
    pixels[:, 10:13, 4:20] = 255
    return pixels


def test_run_folder_holds_everything_that_is_promised(place):
    for name in (
        "config.json",
        "split.json",
        "metrics.jsonl",
        "meta.npz",
        "evaluation.json",
        "evaluation.md",
        "baselines/joint-5.npz",
        "figures/learning_curve.png",
        "figures/adaptation_curve.png",
        "figures/adaptation_strip.png",
    ):
        assert (place.run / name).stat().st_size > 0, name
    assert any((place.run / "tensorboard").iterdir())
    assert not list(place.run.rglob("*.partial*"))
    assert json.loads((place.run / "config.json").read_text())["provenance"]["binary"]
    for name in ("learning_curve", "adaptation_curve", "adaptation_strip"):
        picture = np.asarray(Image.open(place.run / "figures" / f"{name}.png").convert("L"))
        assert min(picture.shape) > 200
        assert picture.std() > 5


def test_every_line_of_metrics_is_an_object_with_phase_step_and_finite_loss(place):
    records = [json.loads(line) for line in (place.run / "metrics.jsonl").read_text().splitlines()]
    assert [(record["phase"], record["step"]) for record in records] == [("warm start", 10), ("meta", 10)]
    assert all(np.isfinite(record["loss"]) for record in records)
    assert len(records[1]["support/loss"]) == 2
    assert records[1]["num_nonfinite"] == 0


def test_training_says_compiling_first_and_prints_a_short_evaluation(place):
    assert place.trained.err.index("compiling") < place.trained.err.index("10/10 meta-steps")
    assert "2 validation classes: ELBO" in place.trained.out


def test_last_checkpoint_is_the_state_that_the_meta_parameters_are_of(place):
    finished = load(place.run)
    data = build.parts(finished.config.data)
    family = build.family(data, "train", (2, 2), 3)
    target = jax.eval_shape(
        lambda: init_state(finished.learner, uniform(family, 4), build.outer(finished.config), jax.random.key(0))
    )
    with Checkpoints(place.run / "checkpoints") as checkpoints:
        state = checkpoints.restore(target)
    assert int(state.step) == finished.step == 10
    jax.tree.map(np.testing.assert_array_equal, state.average, finished.meta)


def test_evaluation_has_every_system_on_every_step_with_ordered_intervals(place):
    result = json.loads((place.run / "evaluation.json").read_text())
    assert list(result["systems"]) == ["maml (vae)", "joint, fine-tuned", "scratch (SGD)", "scratch (Adam)"]
    assert result["protocol"]["classes"] == 4
    for system in result["systems"].values():
        assert system["curve"]["steps"] == [0, 1, 2, 3, 4]
        assert system["table"]["steps"] == [0, 2, 4]
        for entries in (system["table"]["elbo"], system["table"]["iwae"], system["curve"]["elbo_gain"]):
            assert all(entry["low"] <= entry["mean"] <= entry["high"] for entry in entries)
        assert system["table"]["elbo_gain"][0]["mean"] == 0
        for elbo, iwae in zip(system["table"]["elbo"], system["table"]["iwae"], strict=True):
            assert elbo["mean"] < iwae["mean"]
    sgd, adam = (result["systems"][f"scratch ({name})"]["curve"]["elbo"] for name in ("SGD", "Adam"))
    assert sgd[0] == adam[0]  # the same weights on the same episodes
    assert set(result["advantages"]) == {*list(result["systems"])[1:], "joint, not adapted"}
    assert result["copy"]["mean"] < 0


def test_differences_of_means_are_means_of_the_paired_differences(place):
    result = json.loads((place.run / "evaluation.json").read_text())
    tables = {name: system["table"]["elbo"] for name, system in result["systems"].items()}
    for name, advantage in result["advantages"].items():
        other = tables["joint, fine-tuned"][0] if name == "joint, not adapted" else tables[name][1]
        assert advantage["elbo"]["mean"] == pytest.approx(tables["maml (vae)"][1]["mean"] - other["mean"], abs=1e-3)


def test_printed_table_is_the_markdown_file(place):
    assert (place.run / "evaluation.md").read_text() in place.evaluated.out
    assert "joint, not adapted" in place.evaluated.out
    assert re.search(
        r"joint, fine-tuned: (sgd|adam) on .* at .*, the best of 14 rules on 2 validation", place.evaluated.out
    )


def test_quickstart_summary_compares_the_run_with_its_step_0_and_every_baseline(place):
    lines = quickstart.summary(json.loads((place.run / "evaluation.json").read_text())).splitlines()
    names = [line.split("|")[1].strip() for line in lines[2:-1]]
    assert names == [
        "maml (vae)",
        "the same at step 0",
        "joint, fine-tuned",
        "joint, not adapted",
        "scratch (SGD)",
        "scratch (Adam)",
        "copy of the support (exact)",
    ]


def test_diverged_class_is_shown_and_never_averaged_away():
    values = np.array([[-1.0, np.nan], [-2.0, -1.0]])
    entry = summary.interval(values[:, 1])
    assert entry == {"mean": None, "low": None, "high": None, "num_nonfinite": 1}
    assert summary.cell(entry) == "diverged (1 classes)"


def test_summary_of_a_dispatch_leaves_out_what_is_not_finite_and_says_where_it_was():
    metrics = {
        "loss": np.array([1.0, np.nan, 3.0]),
        "num_nonfinite": np.array([0, 2, 1]),
        "bad_task": np.array([-1, 7, 3]),
        "support/loss": np.array([[1.0, 2.0], [np.nan, np.nan], [3.0, np.inf]]),
    }
    record = summarise(metrics)
    assert record == {"loss": 2.0, "num_nonfinite": 3, "bad_task": 7, "support/loss": [2.0, 2.0]}


def test_adapt_draws_new_images_and_reports_time_apart_from_compiling(place, tmp_path):
    support, out = write_support(tmp_path / "mine", *bars()), tmp_path / "grid.png"
    result = command("adapt", place.run, "--support", support, "--num", "6", "--out", out)
    assert result.code == 0, result.err
    assert re.search(r"adapted to 3 images in \d+\.\d ms \(2 steps; compiled once in \d+\.\d s\)", result.out)
    assert "trained with 2 to 2 images" in result.out
    picture = np.asarray(Image.open(out).convert("L"))
    assert (picture[:, : picture.shape[1] // 2] < 60).any()  # the ink of the support
    before = out.read_bytes()
    again = command("adapt", place.run, "--support", support, "--num", "6", "--out", out)
    assert (again.code, out.read_bytes()) == (2, before)
    assert "--force" in again.err
    forced = command("adapt", place.run, "--support", support, "--num", "7", "--out", out, "--force")
    assert forced.code == 0
    assert out.read_bytes() != before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "1.png").write_bytes(b""), r"1\.png"),
        (lambda folder: (folder / "1.png").write_bytes(b"not a picture"), r"1\.png"),
        (lambda folder: [entry.unlink() for entry in folder.iterdir()], "has no pictures"),
        (lambda folder: np.save(folder / "z.npy", np.full((28, 28), np.nan)), r"z\.npy: 784 of 784 pixels are NaN"),
        (lambda folder: np.save(folder / "z.npy", np.full((28, 28), 7.0)), r"floats must lie in \[0, 1\], got 7 to 7"),
        (lambda folder: np.save(folder / "z.npy", np.zeros((28, 28, 3))), r"expected an array \[H, W, 1\]"),
        (lambda folder: np.save(folder / "z.npy", np.zeros((0, 28))), r"got \[0, 28"),
    ],
)
def test_adapt_refuses_bad_images_and_writes_nothing(place, tmp_path, spoil, message):
    support, out = write_support(tmp_path / "mine", *bars()), tmp_path / "grid.png"
    spoil(support)
    result = command("adapt", place.run, "--support", support, "--out", out)
    assert result.code == 2
    assert re.search(message, result.err)
    assert result.err.count("\n") == 1
    assert not out.exists()


def test_adapting_that_diverges_is_said_and_nothing_is_written(place, tmp_path, monkeypatch):
    finished = load(place.run)
    wild = {name: tree for name, tree in finished.meta.items() if name.endswith("log_rate")}
    broken = finished.meta | jax.tree.map(lambda log_rate: log_rate + 200, wild)
    monkeypatch.setattr(adapt, "load", lambda path: finished._replace(meta=broken))
    support, out = write_support(tmp_path / "mine", *bars()), tmp_path / "grid.png"
    result = command("adapt", place.run, "--support", support, "--out", out)
    assert (result.code, out.exists()) == (1, False)
    assert "diverged" in result.err
    assert "inner.rate" in result.err


def test_info_shows_settings_versions_sizes_rates_and_progress(place):
    result = command("info", place.run)
    assert result.code == 0, result.err
    assert "10 of 10 meta-steps" in result.out
    assert "network.hidden = (16,)" in result.out
    assert jax.__version__ in result.out
    assert re.search(r"\| prior\.mean +\| 0\.\d+ +\| 0\.\d+ +\| 0\.\d+ to 0\.\d+ +\|", result.out)
    assert "last record (meta, step 10): loss" in result.out


def test_learned_rates_are_geometric_means_by_step_or_over_entries():
    meta = {"a": jnp.zeros(2), "a/log_rate": {"w": jnp.log(jnp.array([[0.1, 0.4], [1.0, 1.0]]))}}
    (by_step,) = info.learned_rates(meta, per_entry=False)
    assert by_step == ("a.w", pytest.approx([0.2, 1.0]), "0.1 to 1")
    (over_entries,) = info.learned_rates(meta, per_entry=True)
    assert over_entries == ("a.w", pytest.approx([0.04**0.25]), "0.1 to 1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["malm", "vae", "--data", "DATA"], r"unknown learner 'malm'; did you mean 'maml'\? Known: maml, fomaml"),
        (["maml", "vea", "--data", "DATA"], r"unknown model 'vea'; did you mean 'vae'\?"),
        (["maml", "vae", "--data", "glyps"], r"unknown data set 'glyps'; nearest: glyphs"),
        (["maml", "vae", "--data", "no/such/folder"], r"no/such/folder is not there"),
        (
            ["maml", "vae", "--data", "DATA", "--shots", "5", "5", "--query", "10"],
            r"need 15 images in each class.*\(8\)",
        ),
        (["maml", "vae", "--data", "DATA", "--hold-out", "Klingon"], "no group Klingon"),
        (["maml", "vae", "--data", "DATA", "--inner.moves", "encodr"], "inner.moves has encodr"),
        (["maml", "vae", "--data", "DATA", "--inner.rate", "-1"], "inner.rate must be positive, got -1"),
        (["reptile", "vae", "--data", "DATA", "--inner.rates", "per_step"], "reptile has fixed inner rates"),
        (["maml", "vae", "--data", "DATA", "--out", "RUN"], "exists already, and a run is never written over"),
        (["maml", "vae", "--data", "DATA", "--checkpoint-every", "0"], "--checkpoint-every must be at least 1"),
        (["maml", "vae", "--data", "DATA", "--query", "many"], "query"),
        (["maml", "vae", "--dat", "DATA"], "--data"),
        (["maml"], "MODEL"),
    ],
)
def test_train_refuses_bad_input_with_code_2_and_makes_no_run(place, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    filled = [{"DATA": place.data, "RUN": place.run}.get(argument, argument) for argument in arguments]
    before = sorted(place.run.rglob("*"))
    result = command("train", *filled)
    assert result.code == 2
    assert re.search(message, result.err), result.err
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []
    assert sorted(place.run.rglob("*")) == before


def test_unreadable_picture_of_a_class_is_named_and_no_run_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_classes(tmp_path / "data", num_classes=5)
    (data / "class03" / "2.png").write_bytes(b"\x89PNG nothing")
    result = command("train", "maml", "vae", "--data", data, *TINY)
    assert result.code == 2
    assert "class03/2.png" in result.err.replace("\\", "/")
    assert not (tmp_path / "runs").exists()


def test_inner_rate_that_diverges_ends_with_the_reason_and_keeps_the_folder(place, tmp_path):
    out = tmp_path / "wild"
    options = ["--inner.fast-rate", "1e12", "--inner.rates", "fixed", "--outer.steps", "10", "--outer.warm-start", "0"]
    result = command("train", "maml", "vae", "--data", place.data, "--out", out, *TINY, *options)
    assert result.code == 1
    assert re.search(r"tasks are not finite, the first of them task 0 .*inner rate is too large", result.err)
    assert (out / "config.json").exists()
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss"] is None
    assert records[0]["num_nonfinite"] == 40
    unfinished = command("evaluate", out)
    assert unfinished.code == 2
    assert "stopped before its first checkpoint" in unfinished.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["network"].update(latents=5), r"meta\.npz is of another shape: .*has \[4, 16\]"),
        (lambda content: content.update(schema=99), "has schema 99, this version reads 2"),
        (lambda content: content["inner"].update(colour="red"), "does not fit this version.*colour"),
        (lambda content: content["provenance"].update(data="0" * 64), "is not the data that"),
    ],
)
def test_run_of_another_shape_version_or_data_is_refused(place, tmp_path, change, message):
    content = json.loads((place.run / "config.json").read_text())
    change(content)
    for name in ("meta.npz", "split.json"):
        (tmp_path / name).write_bytes((place.run / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(content))
    result = command("evaluate", tmp_path)
    assert result.code == 2
    assert re.search(message, result.err), result.err
    assert not (tmp_path / "evaluation.json").exists()


def test_path_that_is_no_run_names_those_beside_it(place):
    result = command("info", place.root / "rum")
    assert result.code == 2
    assert re.search(r"rum is not the folder of a run .*: run$", result.err.strip())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-samples", "70"], "a multiple, got 70"),
        (["--classes", "1"], "at least 2"),
        (["--shots", "20"], "23 images"),
    ],
)
def test_evaluate_refuses_settings_that_cannot_be_met(place, options, message):
    result = command("evaluate", place.run, *options)
    assert result.code == 2
    assert message in result.err


def test_interrupted_training_has_its_own_code(place, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("metagen_jax.cli.stages.train", interrupt)
    result = command(
        "train", "maml", "vae", "--data", place.data, "--out", tmp_path / "r", *TINY, "--outer.warm-start", 0
    )
    assert (result.code, result.err.splitlines()[-1]) == (130, "metagen: stopped; what was finished is kept")


def test_traceback_is_shown_only_when_asked_for(place):
    with pytest.raises(ValueError, match="unknown learner"):
        main(["train", "malm", "vae", "--data", str(place.data), "--traceback"])


def test_missing_extra_says_what_to_install(place, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    result = command("train", "maml", "vae", "--data", place.data, "--out", tmp_path / "r", "--tensorboard")
    assert (result.code, (tmp_path / "r").exists()) == (2, False)
    assert "metagen-jax[tensorboard]" in result.err


def test_command_line_reaches_every_setting_of_a_run():
    flat = {
        "source": "data",
        **{name: name for name in ("data_dir", "split", "hold_out", "size", "symmetries", "rotations")},
    }
    assert set(flat) == set(DataConfig.__dataclass_fields__)
    reached = set(Train.__dataclass_fields__)
    assert set(flat.values()) <= reached
    assert set(TrainConfig.__dataclass_fields__) <= reached


@pytest.mark.parametrize(
    "name", ["quickstart", "plan", "train", "evaluate", "compare", "adapt", "critics", "explore", "info"]
)
def test_help_of_every_command_describes_every_option(name):
    result = command(name, "--help")
    assert result.code == 0
    assert len(result.out) > 300
    top = command("--help")
    assert name in top.out


def test_entry_point_runs_as_a_process():
    code = "import sys; from metagen_jax.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "info", "no/such/run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("metagen: no/such/run is not the folder of a run")
    assert done.stdout == ""


def test_procedural_strokes_need_no_split_and_runs_without_out_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("metagen_jax.cli.stages.train", interrupt)
    for number in (1, 2):
        result = command("train", "maml", "vae", "--data", "strokes", *TINY, "--outer.warm-start", 0)
        assert result.code == 130
        assert "procedural strokes, unlimited classes" in result.out
        run = tmp_path / "runs" / f"maml-vae-strokes-{number}"
        assert (run / "config.json").exists()
        assert not (run / "split.json").exists()
        assert (tmp_path / "runs" / "latest").resolve() == run


def test_evaluation_without_baselines_measures_the_run_against_its_own_step_0(place, tmp_path):
    run = tmp_path / "copy"
    run.mkdir()
    for name in ("config.json", "meta.npz", "split.json"):
        (run / name).write_bytes((place.run / name).read_bytes())
    result = evaluate.evaluate_run(load(run), evaluate.Evaluate(run, shots=2, num_samples=100, baselines=False))
    assert list(result["systems"]) == ["maml (vae)"]
    assert result["reference"] == "maml (vae) at step 0"
    assert (result["protocol"]["num_samples"], result["protocol"]["curve_samples"]) == (100, 50)
    assert result["copy"] is None
    assert "IWAE-100" in (run / "evaluation.md").read_text()
    assert not (run / "baselines").exists()


def test_a_person_is_told_of_tasks_left_out_and_of_an_inner_loop_that_climbs():
    quiet = {"num_nonfinite": 0, "bad_inner_step": -1, "bad_task": -1, "support/loss": [120.0, 110.0]}
    assert warnings_of(50, quiet) == {}
    lost = warnings_of(50, quiet | {"num_nonfinite": 3, "bad_inner_step": 2, "bad_task": 7})
    assert "3 tasks were not finite" in lost["nonfinite"]
    assert "task 7 of its batch, diverged at inner step 2" in lost["nonfinite"]
    climbing = warnings_of(50, quiet | {"support/loss": [120.0, 900.0]})
    assert "from 120.0 to 900.0 nats per image: its rates are too large" in climbing["rising"]
