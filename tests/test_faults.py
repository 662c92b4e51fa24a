"""Faults while a run is under way: what is said, that nothing saved is lost, and that it goes on as the same run."""

import dataclasses
import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro
from PIL import Image

import metagen_jax as mg
from metagen_jax import build, report, run_directory
from metagen_jax.checkpoint import Checkpoints
from metagen_jax.cli import Command, keeping, main, messages, stages
from metagen_jax.config import DataConfig, from_json, to_json
from metagen_jax.tasks import image_set, sources
from metagen_jax.tasks.sources import folder

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import crash_test

OPTIONS = [
    *("--size", "8", "--shots", "2", "2", "--query", "2", "--network.hidden", "8", "--network.latents", "2"),
    *("--network.context", "2", "--inner.steps", "1", "--outer.tasks", "1", "--outer.warmup", "2"),
    *("--outer.warm-start", "4", "--outer.steps", "12", "--checkpoint-every", "4"),
]
TRAIN = sys.modules["metagen_jax.train"]  # the package has a function of that name
FULL, READ_ONLY = "the disk is full", "nothing can be written there"


class Killed(BaseException):
    pass


@pytest.fixture(scope="module", autouse=True)
def programs():
    """Have dispatches of four steps, each compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "CHUNK", 4)
        patch.setattr(keeping, "short_evaluation", lambda *arguments: "evaluated")
        patch.setattr(TRAIN, "run_chunk", functools.cache(TRAIN.run_chunk))
        built, make = {}, build.training

        def training(config, mesh=None):
            text = to_json(config)
            if text not in built:
                built[text] = make(config, mesh=mesh)
            return built[text]

        patch.setattr(build, "training", training)
        yield SimpleNamespace(make=make)


@pytest.fixture(scope="module")
def place():
    """Return data, a run that nothing happened to, and that run as it was before its last dispatch."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)  # other users may read here
    try:
        write_classes(root / "data")
        whole, stopped = root / "whole", root / "stopped"
        assert begin(root, whole) == 0
        with pytest.MonkeyPatch.context() as patch:
            at(patch, keeping, "append", 4, die)
            with pytest.raises(Killed):
                begin(root, stopped)
        assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == ["4", "8"]
        yield SimpleNamespace(root=root, whole=whole, stopped=stopped, ended=crash_test.ended(whole))
    finally:
        shutil.rmtree(root)


@pytest.fixture
def disk(place):
    """Return a small file system of its own, or skip."""
    folder = place.root / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system is not allowed here")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    finally:
        folder.rmdir()


def write_classes(folder, num_classes=12, num_images=5, seed=0):
    rng = np.random.default_rng(seed)
    for c in range(num_classes):
        (folder / f"class{c:02}").mkdir(parents=True)
        for n in range(num_images):
            pixels = np.zeros((8, 8), np.uint8)
            pixels[c % 6 : c % 6 + 2, rng.integers(0, 3) + c // 6 :] = 255
            Image.fromarray(pixels).save(folder / f"class{c:02}" / f"{n}.png")


def begin(root, run, *options):
    return main(["train", "maml", "vae", "--data", str(root / "data"), "--out", str(run), *OPTIONS, *options])


def go_on(run):
    return main(["train", "--resume", str(run)])


def at(patch, owner, name, times, fault):
    """Let a fault come right before a function is called for the so manieth time."""
    count, original = [0], getattr(owner, name)

    def called(*arguments, **options):
        count[0] += 1
        if count[0] == times:
            fault()
        return original(*arguments, **options)

    patch.setattr(owner, name, called)


def die():
    raise Killed


def fill(folder):
    """Leave no byte."""
    with (folder / "filler").open("ab", buffering=0) as file:
        for size in (1 << 16, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def remount(folder, how):
    until = time.monotonic() + 10
    while subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], capture_output=True).returncode:
        assert time.monotonic() < until  # it is busy while a checkpoint is being written
        time.sleep(0.01)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def told(err):
    """Return the one message that there is."""
    assert "Traceback" not in err
    assert "ERROR" not in err
    said = [line for line in err.splitlines() if line.startswith("metagen:")]
    assert len(said) == 1, err
    return said[0]


def assert_whole(run, saved):
    """Assert that what was saved is there as it was, and that nothing is half-written under its own name."""
    assert {path: path.read_bytes() for path in saved} == saved
    text = (run / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    assert all(json.loads(line)["step"] for line in text.splitlines())
    for path in (run / "checkpoints").iterdir():
        assert (path / "whole.json").exists(), path
    with np.load(run / "meta.npz") as file:
        assert all(np.isfinite(file[name]).all() for name in file.files if name != "header")
    finished = run / "finished.json"
    assert not finished.exists() or json.loads(finished.read_text())


def assert_same(run, place):
    assert crash_test.difference(place.ended, crash_test.ended(run)) == ""
    assert not list(run.rglob("*partial*"))
    assert not list(run.rglob("*orbax-checkpoint-tmp*"))


MOMENTS = {
    "while a checkpoint is written": (Checkpoints, "save", 1),
    "before the meta-parameters": (keeping, "save_meta", 1),
    "before a line": (keeping, "append", 1),
    "before the figure": (report, "save", 1),
    "before the end": (keeping, "write", 1),
}


def fault_and_after(place, run, monkeypatch, capsys, moment, fault, repair, message):
    saved = files(run / "checkpoints")
    with monkeypatch.context() as patch:
        at(patch, *MOMENTS[moment], fault)
        try:
            code = go_on(run)
        finally:
            repair()
    err = capsys.readouterr().err
    assert code == 1
    assert message in told(err)
    assert str(run) in told(err)
    assert "metagen train --resume RUN" in told(err)
    if not (run / "checkpoints" / "4").exists():  # since the one of step 12 was written
        saved = {path: data for path, data in saved.items() if "8" in path.parts}
        assert (run / "checkpoints" / "12" / "whole.json").exists()
    assert_whole(run, saved)
    assert go_on(run) == 0
    assert_same(run, place)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_disk_that_is_full_costs_what_was_not_saved_yet(place, disk, monkeypatch, capsys, moment):
    run = shutil.copytree(place.stopped, disk / "run")
    make_room = (disk / "filler").unlink
    fault_and_after(place, run, monkeypatch, capsys, moment, lambda: fill(disk), make_room, FULL)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_file_that_may_not_grow_costs_what_was_not_saved_yet(place, tmp_path, monkeypatch, capsys, moment):
    run = shutil.copytree(place.stopped, tmp_path / "run")
    size = (run / "metrics.jsonl").stat().st_size + 10 if moment == "before a line" else 40
    # A line is cut after ten bytes, and taken back.
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    fault_and_after(
        *(place, run, monkeypatch, capsys, moment), lambda: limit_files(size), lambda: limit_files(unlimited), FULL
    )


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_becomes_read_only_is_kept(place, disk, monkeypatch, capsys, moment):
    run = shutil.copytree(place.stopped, disk / "run")
    fault_and_after(
        *(place, run, monkeypatch, capsys, moment), lambda: remount(disk, "ro"), lambda: remount(disk, "rw"), READ_ONLY
    )


def test_a_run_that_was_told_to_stop_and_cannot_be_saved_does_not_say_that_it_is(place, disk, monkeypatch, capsys):
    run = shutil.copytree(place.stopped, disk / "run")

    def stopped_while_full():
        fill(disk)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        at(patch, keeping.Progress, "update", 1, stopped_while_full)
        patch.setattr(keeping, "save_meta", lambda *arguments, **options: None)  # the checkpoint alone is to fail
        code = go_on(run)
    assert code == 1
    err = capsys.readouterr().err
    assert FULL in err
    assert "stopped by" not in err
    (disk / "filler").unlink()
    assert go_on(run) == 0
    assert_same(run, place)


@pytest.mark.parametrize("there", [False, True])
def test_where_there_is_no_room_for_a_run_nothing_of_it_is_left(place, disk, capsys, there):
    if there:
        (disk / "run").mkdir()
    fill(disk)
    assert begin(place.root, disk / "run") in (1, 2)
    assert FULL in told(capsys.readouterr().err)
    (disk / "filler").unlink()
    assert [path.relative_to(disk) for path in disk.rglob("*")] == ([Path("run")] if there else [])
    assert begin(place.root, disk / "run") == 0
    assert_same(disk / "run", place)


def test_a_read_only_file_system_is_refused_and_left_as_it_is(place, disk, capsys):
    run = shutil.copytree(place.stopped, disk / "run")
    remount(disk, "ro")
    before = files(disk)
    with pytest.warns(RuntimeWarning, match=r"latest does not lead to .*Read-only"):
        assert go_on(run) in (1, 2)
    assert READ_ONLY in told(capsys.readouterr().err)
    assert begin(place.root, disk / "other") in (1, 2)
    assert READ_ONLY in told(capsys.readouterr().err)
    assert files(disk) == before
    remount(disk, "rw")
    assert go_on(run) == 0
    assert_same(run, place)


def test_a_folder_that_a_user_may_not_write_is_refused_and_left_as_it_is(place, capsys):
    folder = place.root / "others"
    run = shutil.copytree(place.stopped, folder / "run")
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before, was = files(folder), os.geteuid()
    if was == 0:
        os.seteuid(65534)  # permissions do not bind root
    try:
        with pytest.warns(RuntimeWarning, match=r"latest does not lead to .*Permission denied"):
            assert go_on(run) in (1, 2)
        assert "Permission denied" in told(capsys.readouterr().err)
        assert begin(place.root, folder / "other") in (1, 2)
        assert "Permission denied" in told(capsys.readouterr().err)
    finally:
        os.seteuid(was)
    assert files(folder) == before
    for path in paths:
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert go_on(run) == 0
    assert_same(run, place)


def test_a_process_that_cannot_write_a_checkpoint_ends_soon_and_with_one_message(place, tmp_path):
    run = tmp_path / "run"
    code = (
        "import resource, sys; from metagen_jax.cli import keeping, main, stages; stages.CHUNK = 4; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, resource.RLIM_INFINITY)); "
        "keeping.short_evaluation = lambda *arguments: 'evaluated'; sys.exit(main())"
    )
    arguments = ["train", "maml", "vae", "--data", str(place.root / "data"), "--out", str(run), *OPTIONS]
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0", "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.returncode in (1, 2)
    assert FULL in told(process.stderr)
    assert sorted(path.name for path in run.iterdir() if path.name != "warm_start") == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "split.json",
    ]
    assert not list((run / "warm_start").iterdir())
    assert go_on(run) == 0
    assert_same(run, place)


def vanish(data):
    shutil.move(data, data.with_name("elsewhere"))


def truncate(data):
    picture = data / "class03" / "0.png"
    picture.write_bytes(picture.read_bytes()[:40])


def replace(data):
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(data / "class03" / "0.png")


@pytest.mark.parametrize(
    ("fault", "message"), [(vanish, "data"), (truncate, "0.png"), (replace, "is not the data that")]
)
def test_data_that_are_not_there_as_they_were_are_refused_until_they_are(
    place, tmp_path, monkeypatch, capsys, fault, message, programs
):
    run, data = shutil.copytree(place.stopped, tmp_path / "run"), place.root / "data"
    before, kept = files(run), shutil.copytree(data, tmp_path / "kept")
    cached = build.training
    monkeypatch.setattr(build, "training", programs.make)
    try:
        fault(data)
        assert go_on(run) == 2
    finally:
        shutil.rmtree(data, ignore_errors=True)
        shutil.rmtree(data.with_name("elsewhere"), ignore_errors=True)
        shutil.copytree(kept, data)
    assert message in told(capsys.readouterr().err)
    assert files(run) == before
    monkeypatch.setattr(build, "training", cached)
    assert go_on(run) == 0
    assert_same(run, place)


def test_data_that_vanish_in_the_middle_of_a_run_are_on_the_device(place, tmp_path, monkeypatch):
    run, data = shutil.copytree(place.stopped, tmp_path / "run"), place.root / "data"
    try:
        with monkeypatch.context() as patch:
            at(patch, keeping, "append", 1, lambda: vanish(data))
            assert go_on(run) == 0
        assert not data.exists()
    finally:
        shutil.move(data.with_name("elsewhere"), data)
    assert_same(run, place)


def test_a_prepared_set_that_is_lost_or_cut_short_is_made_again_and_another_one_is_refused(
    place, tmp_path, monkeypatch, capsys, programs
):
    monkeypatch.setenv("METAGEN_CACHE_DIR", str(tmp_path / "cache"))
    images = folder(place.root / "data", size=8)
    monkeypatch.setattr(sources, "glyphs", lambda: images)  # which takes long
    monkeypatch.setattr(build, "training", programs.make)
    checked = []
    config = dataclasses.replace(
        run_directory.read_config(run_directory.find(place.stopped))[0],
        data=DataConfig("glyphs"),
    )
    run = run_directory.create(tmp_path / "run", config, build.parts(config.data))
    monkeypatch.setattr("metagen_jax.cli.resume.carry_out", lambda *arguments: checked.append(arguments))
    (prepared,) = (tmp_path / "cache").glob("glyphs*.npz")
    content = prepared.read_bytes()
    prepared.unlink()
    assert go_on(run.path) == 0
    prepared.write_bytes(content[: len(content) // 2])
    with pytest.warns(RuntimeWarning, match="damaged and is made again"):
        assert go_on(run.path) == 0
    assert len(checked) == 2
    image_set.save(images._replace(images=np.flip(images.images, -2)), prepared)
    before = files(run.path)
    capsys.readouterr()
    assert go_on(run.path) == 2
    assert "is not the data that" in told(capsys.readouterr().err)
    assert files(run.path) == before
    assert len(checked) == 2


MEMORY_CHILD = """
import functools, pathlib, resource, sys
import crash_test
import jax
from metagen_jax import build
from metagen_jax.checkpoint import Checkpoints
from metagen_jax.cli import keeping, main, stages
root, options = sys.argv[1], sys.argv[2:]
stages.CHUNK = 4
keeping.short_evaluation = lambda *arguments: "evaluated"
train = sys.modules["metagen_jax.train"]
made, make_chunk, make, save = [], functools.cache(train.run_chunk), build.training, Checkpoints.save
def training(config, mesh=None):
    made[:] = made or [make(config)]
    return made[0]
build.training, train.run_chunk = training, make_chunk
assert main([*options, "--out", root + "/whole"]) == 0
def at_once(self, *arguments, **options):
    save(self, *arguments, **options)
    self.wait()
def limit(room):
    pages = int(open("/proc/self/statm").read().split()[0])
    soft = resource.RLIM_INFINITY if room is None else pages * resource.getpagesize() + room
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))
def short_of_memory(step, size, **options):
    chunk = make_chunk(step, size, **options)
    def limited(state, data):  # in the third dispatch alone, while no thread is saving
        limit(50 << 20 if int(state.step) == 8 else None)
        try:
            return jax.block_until_ready(chunk(state, data))
        finally:
            limit(None)
    return limited
train.run_chunk, Checkpoints.save = short_of_memory, at_once
assert main([*options, "--out", root + "/run"]) == 1
train.run_chunk, Checkpoints.save = make_chunk, save
print(sorted(path.name for path in pathlib.Path(root, "run", "checkpoints").iterdir()))
assert main(["train", "--resume", root + "/run"]) == 0
print("differs:", crash_test.difference(crash_test.ended(root + "/whole"), crash_test.ended(root + "/run")))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from /proc")
def test_a_meta_step_that_memory_does_not_suffice_for_is_said_with_what_helps(place, tmp_path):
    options = ["train", "maml", "vae", "--data", str(place.root / "data"), *OPTIONS, "--outer.warm-start", "0"]
    options += ["--outer.tasks", "2000", "--outer.task-chunk", "2000", "--network.hidden", "256"]
    process = subprocess.run(
        [sys.executable, "-c", MEMORY_CHILD, str(tmp_path), *options],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "benchmarks"), "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert process.returncode == 0, process.stderr
    assert told(process.stderr).startswith("metagen: out of memory")
    assert "['4', '8']" in process.stdout
    assert process.stdout.rstrip().endswith("differs:")


def test_what_is_advised_for_memory_are_options_that_there_are():
    advised = re.findall(r"(--[a-z.-]+[a-z])(?: (\d+|step)\b)?", messages.MEMORY)
    assert {name for name, _ in advised} == {"--outer.task-chunk", "--inner.remat", "--outer.tasks", "--network.hidden"}
    options = [part for name, value in advised for part in (name, value or "2")]
    learner = re.search(r"learner (\w+)", messages.MEMORY)[1]
    for command in ("train", "plan"):
        tyro.cli(Command, args=[command, learner, "vae", *options], config=(tyro.conf.OmitSubcommandPrefixes,))


def poisoned(make, bad):
    """Build a training in which the pictures of some tasks are not numbers: where `bad` holds of their class."""

    @functools.cache
    def built(text):
        config = from_json(text, where="here")
        made = make(config)

        def task(data, key, spec):
            found = made.family.make(data, key, spec)
            x = jnp.where(bad(spec[0]), jnp.nan, found.support.x)
            return found._replace(support=found.support._replace(x=x))

        family = made.family._replace(make=task)
        parts = made.learner, family, made.optimizer, made.data, made.built
        return made._replace(family=family, step=build.meta_step(config, *parts)[1])

    return lambda config, mesh=None: built(to_json(config))


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


SEVERAL = ["--outer.tasks", "4", "--outer.warm-start", "0"]


def test_tasks_that_are_not_finite_are_left_out_and_counted_also_across_a_resume(
    place, tmp_path, monkeypatch, capsys, programs
):
    made = programs.make
    monkeypatch.setattr(build, "training", poisoned(made, lambda which: which == 3))
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert begin(place.root, whole, *SEVERAL) == 0
    counts = [line["num_nonfinite"] for line in lines_of(whole)]
    assert 0 < sum(counts) < 24
    notes = re.findall(r"(\d+) tasks were not finite and were left out", capsys.readouterr().err)
    assert [int(note) for note in notes] == [count for count in counts if count]
    with monkeypatch.context() as patch:
        at(patch, keeping, "append", 2, die)
        with pytest.raises(Killed):
            begin(place.root, run, *SEVERAL)
    assert go_on(run) == 0
    ended = crash_test.ended(whole)
    assert crash_test.difference(ended, crash_test.ended(run)) == ""
    assert all(np.isfinite(array).all() for array in ended.arrays.values() if array.dtype.kind == "f")


@pytest.mark.parametrize("chunk", [4, 8])
def test_where_every_task_is_lost_training_stops_with_advice_and_goes_on_from_before(
    place, tmp_path, monkeypatch, capsys, chunk, programs
):
    run = shutil.copytree(place.stopped, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "8")
    before = files(run / "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "CHUNK", chunk)  # 8: all bad steps in one dispatch; 4: fewer than the patience in one
        patch.setattr(build, "training", poisoned(programs.make, lambda which: True))
        assert go_on(run) == 1
    err = capsys.readouterr().err
    assert "meta-step 8: 1 tasks are not finite" in told(err)
    assert "divide it by ten" in told(err)
    assert "tasks were not finite and were left out" in err
    assert files(run / "checkpoints") == before
    assert go_on(run) == 0
    assert_same(run, place)


def test_an_outer_rate_that_is_far_too_large_stops_training_with_advice_and_saves_nothing_of_it(
    place, tmp_path, capsys
):
    run = tmp_path / "run"
    assert begin(place.root, run, "--outer.rate", "3e38", "--outer.warm-start", "0") == 1
    assert "a smaller outer rate" in told(capsys.readouterr().err)
    assert not list((run / "checkpoints").iterdir())
    assert not (run / "meta.npz").exists()


def test_an_outer_update_that_overflows_is_not_taken_and_said():
    def field(meta, key, task):
        return {"model": jnp.full(2, 1e10)}, {}

    learner = mg.MetaLearner(lambda key: {"model": jnp.ones(2)}, lambda meta, key, support: (meta, {}), field)
    family = mg.TaskFamily((), lambda data, key: jnp.zeros(1, jnp.int32), lambda data, key, spec: spec)
    sampler, optimizer = mg.uniform(family, 3), optax.sgd(1e30, momentum=0.9)
    states = []
    with pytest.raises(mg.Divergence, match=r"meta-step 4: the tasks are finite.*The outer rate is too large"):
        mg.train(
            mg.make_step(learner, family, sampler, optimizer),
            mg.init_state(learner, sampler, optimizer, jax.random.key(0)),
            family.data,
            10,
            chunk=10,
            on_chunk=lambda state, metrics: states.append(state),
        )
    np.testing.assert_array_equal(states[0].meta["model"], 1)
    np.testing.assert_array_equal(states[0].average["model"], 1)
    np.testing.assert_array_equal(states[0].opt[0].trace["model"], 0)


def test_a_clock_that_goes_backwards_changes_nothing(place, tmp_path, monkeypatch):
    run = shutil.copytree(place.stopped, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "8")
    now, calls = time.time, [0]

    def backwards():
        calls[0] += 1
        return now() - 3600.0 * calls[0]

    monkeypatch.setattr(time, "time", backwards)
    assert go_on(run) == 0
    monkeypatch.undo()
    assert calls[0] > 10
    assert_same(run, place)


def test_where_the_run_that_latest_leads_to_is_gone_the_others_are_named_and_a_new_one_takes_its_place(
    place, tmp_path, capsys
):
    first, second = tmp_path / "first", tmp_path / "second"
    for run in (first, second):
        shutil.copytree(place.stopped, run)
        run_directory.point_latest(run_directory.RunDirectory(run))
    shutil.rmtree(second)
    assert (tmp_path / "latest").is_symlink()
    assert go_on(tmp_path / "latest") == 2
    assert f"runs in {tmp_path}: first" in told(capsys.readouterr().err)
    assert go_on(first) == 0
    assert go_on(tmp_path / "latest") == 0
    assert "first is complete" in capsys.readouterr().out
