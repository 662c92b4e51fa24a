"""A run that was exported and imported is the run that it was, and a file that is none writes nothing."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from metagen_jax import build
from metagen_jax.cli import main
from metagen_jax.cli.runs import load, load_data
from metagen_jax.config import DataConfig, InnerConfig, ModelConfig, OuterConfig, TrainConfig, check
from metagen_jax.exporting import load_sampler
from metagen_jax.parameters import flat, load_meta, read_header, save_meta
from metagen_jax.run_directory import create

SUFFIXES = (".npz", ".safetensors")
STEPS = 3


def make_run(path, data, steps=STEPS):
    """Write the folder of a run whose meta-parameters are random, and return it."""
    config = check(
        TrainConfig(
            *("maml", "vae", DataConfig(str(data), size=8), ModelConfig(hidden=(4,), latents=2, context=2)),
            inner=InnerConfig(steps=1),
            outer=OuterConfig(steps=STEPS, warm_start=0),
            shots=(2, 2),
            query=2,
        )
    )
    parts = build.parts(config.data)
    built = build.model(config, parts.event, parts.binary)
    run = create(path, config, parts)
    meta = jax.jit(build.learner(config, built).init)(jax.random.key(0))
    noise = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(meta))))
    meta = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(noise), leaf.shape), meta)
    save_meta(run.meta, meta, step=steps)
    return run.path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with data, support images, a run, and the run exported as either kind of file."""
    root = tmp_path_factory.mktemp("exchange").resolve()
    rng = np.random.default_rng(0)
    for c in range(20):
        (root / "data" / f"ü{c:02}").mkdir(parents=True)
        for n in range(5):
            pixels = (255 * (rng.random((8, 8)) < 0.2 + 0.03 * c)).astype(np.uint8)
            Image.fromarray(pixels).save(root / "data" / f"ü{c:02}" / f"{n}.png")
    shutil.copytree(root / "data" / "ü03", root / "support")
    run = make_run(root / "run", root / "data")
    files = {suffix: root / f"shared{suffix}" for suffix in SUFFIXES}
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr("sys.stdout", (out := Stream()))
        for file in files.values():
            assert main(["export", str(run), str(file)]) == 0
    return SimpleNamespace(root=root, data=root / "data", run=run, files=files, said=out.text)


class Stream:
    encoding, text = "utf-8", ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return False


def tree(path):
    return {entry.relative_to(path).as_posix(): entry.read_bytes() for entry in path.rglob("*") if entry.is_file()}


def changed(place, path, change, suffix=".npz"):
    """Write the exported file again at a path, with a header that `change` was applied to."""
    target = jax.eval_shape(lambda: load(place.run).meta)
    meta, header = load_meta(place.files[suffix], target)
    header = json.loads(json.dumps(header))
    header = change(header) or header
    save_meta(path, meta, **header)
    return path


def refused(capsys, match, *arguments):
    """Assert that a command ends with code 2 and one line, which matches, and that nothing was written anywhere."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert re.search(match, said.err), said.err
    assert said.err.startswith("metagen: ")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_export_says_what_it_wrote_and_how_to_import_it(place):
    count = sum(leaf.size for leaf in jax.tree.leaves(load(place.run).meta))
    for suffix, file in place.files.items():
        assert f"{file}: {count:,} parameters, {file.stat().st_size:,} bytes\n" in place.said
        assert f"on another machine: metagen import shared{suffix}\n" in place.said
    assert f"it names what lies on this machine: {place.data}\n" in place.said


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_file_has_all_that_there_is_to_know_of_the_run(place, suffix):
    header = read_header(place.files[suffix])
    assert header["config"] == json.loads((place.run / "config.json").read_text())
    assert header["split"] == json.loads((place.run / "split.json").read_text())
    assert header["step"] == STEPS
    assert header["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_export_import_export_is_the_same_bit_for_bit(place, tmp_path, capsys, suffix):
    run, again = tmp_path / "there" / "run", tmp_path / f"again{suffix}"
    assert main(["import", str(place.files[suffix]), "--out", str(run)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith(f"{run}: maml vae, {STEPS} meta-steps, ")
    assert said.out.endswith(f"next: metagen evaluate {run}\n")
    assert sorted(tree(tmp_path)) == [f"there/run/{name}" for name in FOLDER]
    for name in ("config.json", "split.json"):
        assert (run / name).read_bytes() == (place.run / name).read_bytes(), name
    assert json.loads((run / "finished.json").read_text()) == {"steps": STEPS, "evaluation": ""}
    assert main(["export", str(run), str(again)]) == 0
    assert read_header(again) == read_header(place.files[suffix])
    first, second = load(place.run), load(run)
    assert first._replace(run=0, learner=0, built=0, meta=0) == second._replace(run=0, learner=0, built=0, meta=0)
    assert {name: leaf.tobytes() for name, leaf in arrays(first.meta)} == {
        n: x.tobytes() for n, x in arrays(second.meta)
    }
    if suffix == ".safetensors":
        assert again.read_bytes() == place.files[suffix].read_bytes()


FOLDER = ("config.json", "finished.json", "meta.npz", "split.json")


def arrays(meta):
    return [(name, np.asarray(leaf)) for name, leaf in flat(meta).items()]


@pytest.fixture(scope="module")
def imported(place):
    assert main(["import", str(place.files[".safetensors"]), "--out", str(place.root / "imported")]) == 0
    return place.root / "imported"


def test_adapt_makes_the_same_pictures_and_sampler_from_the_run_and_from_the_imported_one(place, imported, tmp_path):
    made = []
    for run in (place.run, imported):
        out, program = tmp_path / f"{run.name}.png", tmp_path / f"{run.name}.jaxexport"
        options = ["--num", "4", "--seed", "3", "--out", str(out), "--export", str(program)]
        assert main(["adapt", str(run), "--support", str(place.root / "support"), *options]) == 0
        made.append((out.read_bytes(), load_sampler(program)(3).tobytes()))
    assert made[0] == made[1]
    assert load_sampler(program)(0).shape == (4, 8, 8, 1)


@pytest.mark.slow
def test_evaluate_and_explore_measure_the_same_on_the_imported_run(place, imported, capsys):
    commands = {
        "evaluation.json": ["evaluate", "--shots", "2", "--num-samples", "5", "--no-baselines", "--classes", "4"],
        "explore/explore.json": ["explore", "--images", "20", "--clusters", "2"],
    }
    for name, (command, *options) in commands.items():
        found = []
        for run in (place.run, imported):
            assert main([command, str(run), *options]) == 0, capsys.readouterr().err
            found.append(json.loads((run / name).read_text()))
        assert found[0] == found[1]


def test_train_resume_says_that_an_imported_run_is_complete(place, imported, capsys):
    before = tree(imported)
    assert main(["train", "--resume", str(imported)]) == 0
    assert f"{imported} is complete: all {STEPS} meta-steps were taken" in capsys.readouterr().out
    assert tree(imported) == before


def test_info_shows_an_imported_run(imported, capsys):
    assert main(["info", str(imported)]) == 0
    assert f"maml vae, {STEPS} of {STEPS} meta-steps" in capsys.readouterr().out


def test_without_out_the_folder_is_the_next_one_after_the_name_of_the_file(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(place.files[".npz"], tmp_path / "my vae.npz")
    shutil.copy(place.files[".npz"], tmp_path / "猫.npz")
    for name in ("my vae.npz", "my vae.npz", "猫.npz"):
        assert main(["import", name]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["imported-1", "my-vae-1", "my-vae-2"]


def test_data_that_lie_elsewhere_here_are_named_on_import(place, tmp_path):
    shutil.copytree(place.data, tmp_path / "pictures")
    options = ["--data", str(tmp_path / "pictures"), "--data-dir", "unused"]
    assert main(["import", str(place.files[".npz"]), "--out", str(tmp_path / "run"), *options]) == 0
    data = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert (data.pop("source"), data.pop("data_dir")) == (str(tmp_path / "pictures"), "unused")
    there = json.loads((place.run / "config.json").read_text())["data"]
    assert data == {name: there[name] for name in data}
    assert load_data(load(tmp_path / "run")).split.digest == load_data(load(place.run)).split.digest


def test_nothing_is_written_over(place, tmp_path, capsys):
    (tmp_path / "a.npz").write_text("mine")
    (tmp_path / "run").mkdir()
    assert main(["import", str(place.files[".npz"]), "--out", str(tmp_path / "run")]) == 0  # an empty folder
    capsys.readouterr()
    before = tree(tmp_path)
    refused(capsys, "a.npz exists already", "export", place.run, tmp_path / "a.npz")
    refused(capsys, "run exists already", "import", place.files[".npz"], "--out", tmp_path / "run")
    assert tree(tmp_path) == before


def test_what_is_no_such_file_or_run_is_refused(place, tmp_path, capsys):
    refused(capsys, "is not the folder of a run", "export", tmp_path, tmp_path / "a.npz")
    refused(capsys, r"end in \.npz or \.safetensors", "export", place.run, tmp_path / "a.pt")
    refused(capsys, "is not there", "import", tmp_path / "none.npz")
    refused(capsys, "has the parameters of no whole run", "import", place.run / "meta.npz")
    assert not list(tmp_path.iterdir())
    partly = make_run(tmp_path / "partly", place.data, steps=2)
    refused(capsys, "stopped at meta-step 2 of 3.* train --resume", "export", partly, tmp_path / "a.npz")
    shutil.copytree(place.run, tmp_path / "edited")
    split = json.loads((tmp_path / "edited" / "split.json").read_text())
    split["train"][0], split["test"][0] = split["test"][0], split["train"][0]
    (tmp_path / "edited" / "split.json").write_text(json.dumps(split))
    refused(capsys, "changed after it was written", "export", tmp_path / "edited", tmp_path / "a.npz")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["edited", "partly"]


def test_without_the_libraries_the_command_that_installs_them_is_said(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    how = r"pip install 'metagen-jax\[export\]'"
    refused(capsys, how, "export", place.run, tmp_path / "a.safetensors")
    refused(capsys, how, "import", place.files[".safetensors"], "--out", tmp_path / "run")
    support = ("--support", place.root / "support", "--out", tmp_path / "a.png")
    refused(capsys, how, "adapt", place.run, *support, "--export", tmp_path / "a.jaxexport")
    refused(capsys, "must be a .jaxexport", "adapt", place.run, *support, "--export", tmp_path / "a.bin")
    assert not list(tmp_path.iterdir())


def test_adapt_writes_no_sampler_over_another(place, tmp_path, capsys):
    (tmp_path / "a.jaxexport").write_text("mine")
    support = ("--support", place.root / "support", "--out", tmp_path / "a.png")
    refused(capsys, "a.jaxexport exists already", "adapt", place.run, *support, "--export", tmp_path / "a.jaxexport")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.jaxexport"]


def test_other_versions_are_warned_of_in_one_line_that_any_terminal_shows(place, tmp_path, capsys):
    def older(header):
        header["config"]["provenance"]["versions"]["jax"] = "0.1\x1b[2J\nmetagen: all is well"

    file = changed(place, tmp_path / "a.npz", older)
    assert main(["import", str(file), "--out", str(tmp_path / "run")]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"metagen: jax is {jax.__version__} and was 0.1")
    assert err.count("\n") == 1
    assert "\x1b" not in err


def put(value, *names):
    """Return what puts a value into a header."""

    def change(header):
        for name in names[:-1]:
            header = header[name]
        header[names[-1]] = value

    return change


def swapped(header):
    split = header["split"]
    split["train"][0], split["test"][0] = split["test"][0], split["train"][0]


def signed_anew(header):
    swapped(header)
    from metagen_jax.tasks.splits import PARTS, _digest

    header["split"]["sha256"] = _digest(header["split"]["kind"], {part: header["split"][part] for part in PARTS})


CONFIG = ("config", "network")
DEEP = json.loads("[" * 30 + "]" * 30)
HOSTILE = {
    "no config": (put(None, "config"), "expected a JSON object"),
    "config is a list": (put([1], "config"), "expected a JSON object"),
    "config is empty": (put({}, "config"), "is not the configuration of a run"),
    "other schema": (put(99, "config", "schema"), "has schema 99"),
    "unknown field": (put(1, "config", "nonsense"), "does not fit this version"),
    "unknown learner": (put("malm", "config", "learner"), "did you mean 'maml'"),
    "text for a number": (put("9", *CONFIG, "latents"), "latents"),
    "a list for a record": (put([], "config", "inner"), "does not fit|inner"),
    "depth": (put(DEEP, "config", "inner", "rate"), "nested too deeply|rate"),
    "no latents": (put(0, *CONFIG, "latents"), "network.latents must be at least 1"),
    "other network": (put([5], *CONFIG, "hidden"), "another shape"),
    "more layers": (put([4, 4], *CONFIG, "hidden"), "are missing"),
    "absurd network": (put([10**9, 10**9], *CONFIG, "hidden"), "another shape|are missing|nothing can be built"),
    "beyond any network": (put([10**30], *CONFIG, "hidden"), "hidden|another shape|nothing can be built"),
    "negative network": (put([-4], *CONFIG, "hidden"), "another shape|nothing can be built|hidden"),
    "no event": (put(None, "config", "provenance", "event"), "event"),
    "absurd event": (put([10**9, 10**9, 1], "config", "provenance", "event"), "event"),
    "other event": (put([9, 9, 1], "config", "provenance", "event"), "another shape"),
    "provenance of another kind": (put(3, "config", "provenance"), "is not the configuration of a run"),
    "other step": (put(2, "step"), "it is of meta-step 2, and its configuration has 3"),
    "step is a text": (put("3", "step"), "it is of meta-step 3"),
    "no split": (put(None, "split"), "has a split, or has none"),
    "split is a number": (put(3, "split"), "no run that can be used"),
    "split is empty": (put({}, "split"), "has no classes"),
    "class twice": (lambda header: header["split"]["train"].append(header["split"]["test"][0]), "one of them twice"),
    "split edited": (swapped, "changed after it was written"),
    "split edited and signed": (signed_anew, "not the one that the run was trained with"),
    "split of other format": (put(7, "split", "format"), "has format 7"),
    "surrogates": (put("\ud800", "split", "kind"), "no run that can be used"),
    "no digest of a split": (put(None, "config", "provenance", "split"), "has a split, or has none"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_and_nothing_is_written(place, tmp_path, capsys, name):
    change, message = HOSTILE[name]
    file = changed(place, tmp_path / "a.npz", change)
    before = tree(tmp_path)
    refused(capsys, message, "import", file, "--out", tmp_path / "there" / "run")
    assert tree(tmp_path) == before
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_with_other_parameters_or_cut_short_are_refused_and_nothing_is_written(place, tmp_path, capsys, suffix):
    file = tmp_path / f"a{suffix}"
    content = place.files[suffix].read_bytes()
    for damaged in (content[:-3], content[: len(content) // 2], b"", b"not a file of arrays"):
        file.write_bytes(damaged)
        refused(capsys, "is damaged", "import", file, "--out", tmp_path / "run")
    header = read_header(place.files[suffix])
    meta = load(place.run).meta
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), meta)
    fewer = {name: tree for name, tree in meta.items() if name != "decoder"}
    for other, message in ((half, "is bfloat16"), (fewer, "are missing"), (meta | {"x": meta["decoder"]}, "too many")):
        save_meta(file, other, **header)
        refused(capsys, message, "import", file, "--out", tmp_path / "run")
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "change",
    [
        put("../../x", "config", "data", "source"),
        put("/../../x", "config", "data", "data_dir"),
        put("../../x", "split", "source"),
        put({"../../x": "1"}, "config", "provenance", "versions"),
        put("../../x", "config", "provenance", "device"),
        put({"out": "../../x"}, "config", "provenance", "options"),
    ],
)
def test_no_name_in_a_file_becomes_a_path_that_is_written(place, tmp_path, monkeypatch, change):
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b" / "c")
    monkeypatch.setenv("METAGEN_CACHE_DIR", str(place.root / "cache"))
    changed(place, tmp_path / "x.npz", change)
    assert main(["import", str(tmp_path / "x.npz")]) == 0
    run = tmp_path / "a" / "b" / "c" / "runs" / "x-1"
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / "x.npz", *(run / n for n in FOLDER)}
    if json.loads((run / "config.json").read_text())["data"]["source"] == "../../x":
        assert main(["explore", str(run)]) == 2  # there are no such data
        assert not (tmp_path / "a" / "x").exists()


def test_a_run_of_procedural_data_has_no_split_and_comes_back(tmp_path, capsys):
    config = check(
        TrainConfig(
            *("maml", "vae", DataConfig("strokes"), ModelConfig(hidden=(2,), latents=1, context=0)),
            outer=OuterConfig(steps=1, warm_start=7),
        )
    )
    parts = build.parts(config.data)
    run = create(tmp_path / "run", config, parts)
    learner = build.learner(config, build.model(config, parts.event, parts.binary))
    save_meta(run.meta, jax.jit(learner.init)(jax.random.key(0)), step=1)
    assert main(["export", str(run.path), str(tmp_path / "a.npz")]) == 0
    assert main(["import", str(tmp_path / "a.npz"), "--out", str(tmp_path / "again")]) == 0
    assert "its joint warm start was not exported" in capsys.readouterr().out
    assert (tmp_path / "again" / "config.json").read_bytes() == run.config.read_bytes()
    assert not (tmp_path / "again" / "split.json").exists()
