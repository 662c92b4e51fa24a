"""Runs that are stopped, killed or damaged at any moment, and go on as the same run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from metagen_jax import run_directory
from metagen_jax.build import training
from metagen_jax.cli import keeping, main, resume, stages, warm_start
from metagen_jax.cli.interruption import Interrupted, stoppable
from metagen_jax.cli.train import train_run
from metagen_jax.config import ChoiceConfig, DataConfig, InnerConfig, ModelConfig, OuterConfig, TrainConfig, check

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import crash_test

CONFIG = check(
    TrainConfig(
        learner="maml",
        model="vae",
        data=DataConfig(source="glyphs"),
        network=ModelConfig(hidden=(8,), latents=2, context=2),
        inner=InnerConfig(steps=1, first_order_until=0.4),
        outer=OuterConfig(steps=10, tasks=4, warmup=2, warm_start=6),
        choice=ChoiceConfig(strategy="hard_buffer"),  # the sampler has a state
        shots=(2, 2),
        query=2,
    )
)
LINES = [("warm start", 4), ("warm start", 6), ("meta", 4), ("meta", 8), ("meta", 10)]


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def _dispatches_of_four(monkeypatch):
    monkeypatch.setattr(stages, "CHUNK", 4)
    monkeypatch.setattr(keeping, "short_evaluation", lambda *arguments: "evaluated")


def killed_at(monkeypatch, name, times, go):
    """Run until a function of `cli.keeping` has been called so often, and die there."""
    count, original = [0], getattr(keeping, name)

    def dying(*arguments, **options):
        count[0] += 1
        if count[0] == times:
            raise Killed
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(keeping, name, dying)
        with pytest.raises(Killed):
            go()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a run that nobody stopped, one that was killed everywhere, and what that one was before its last steps."""
    root, patch = tmp_path_factory.mktemp("resume"), pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(stages, "CHUNK", 4)
        context.setattr(keeping, "short_evaluation", lambda *arguments: "evaluated")
        whole, killed = root / "whole", root / "killed"
        train_run(CONFIG, whole, checkpoint_every=4)
        assert [(line["phase"], line["step"]) for line in lines_of(whole)] == LINES
        killed_at(context, "append", 1, lambda: train_run(CONFIG, killed, checkpoint_every=4))
        for name, times in (
            ("append", 2),  # in the warm start, after its first checkpoint
            ("save_meta", 1),  # in the meta-steps of first order, after their line and before their meta-parameters
            ("append", 1),  # before a line; no line was written
            ("save_meta", 2),  # in the last dispatch, before the last meta-parameters
        ):
            killed_at(context, name, times, lambda: resume.resume_run(killed))
            with (killed / "metrics.jsonl").open("a") as file:
                file.write('{"phase": "meta", "step": 99}\n{"phase": "me')  # later lines, and one that was cut off
        shutil.copytree(killed, root / "stopped")
        killed_at(context, "short_evaluation", 1, lambda: resume.resume_run(killed))
        before = (killed / "metrics.jsonl").read_bytes()
        killed_at(context, "write", 1, lambda: resume.resume_run(killed))
        assert (killed / "metrics.jsonl").read_bytes() == before
        resume.resume_run(killed)
    return SimpleNamespace(root=root, whole=whole, killed=killed, stopped=root / "stopped")


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def equal(one, other):
    return crash_test.difference(crash_test.ended(one), crash_test.ended(other)) == ""


def test_a_run_that_was_killed_in_every_stage_ends_as_the_one_that_was_not(place):
    ends = crash_test.ended(place.whole), crash_test.ended(place.killed)
    assert crash_test.difference(*ends) == ""
    assert any(".sampler" in name for name in ends[0].arrays)
    assert any(".opt" in name for name in ends[0].arrays)
    seconds = [line["seconds"] for line in lines_of(place.killed) if line["phase"] == "meta"]
    assert seconds == sorted(seconds)
    assert not (place.killed / "warm_start").exists()
    assert not list(place.killed.rglob("*partial*"))


def test_a_run_that_is_complete_says_so_and_is_left_as_it_is(place, capsys):
    before = {path: path.read_bytes() for path in place.killed.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(place.killed)]) == 0
    assert "is complete: all 10 meta-steps" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in place.killed.rglob("*") if path.is_file()} == before


def test_a_run_whose_last_meta_step_alone_is_lost_is_saved_at_its_end(place, tmp_path, monkeypatch):
    run = shutil.copytree(place.stopped, tmp_path / "r")
    for path in (run / "checkpoints" / "10", run / "meta.npz"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr(keeping, "lost", lambda metrics: np.arange(2) == 1)
    assert main(["train", "--resume", str(run)]) == 0
    assert equal(place.whole, run)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_it(place, tmp_path, capsys):
    run = shutil.copytree(place.stopped, tmp_path / "r")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "8"]
    data = max((run / "checkpoints" / "10").rglob("*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[:-5])
    assert main(["train", "--resume", str(run)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("metagen:")]
    assert len(said) == 1
    assert f"step 10 in {run / 'checkpoints'} is damaged" in said[0]
    assert equal(place.whole, run)


def test_where_every_checkpoint_is_damaged_that_is_said_and_nothing_changes(place, tmp_path, capsys):
    run = shutil.copytree(place.stopped, tmp_path / "r")
    for path in (run / "checkpoints").glob("*/whole.json"):
        path.write_text("{")
    refused_and_unchanged(run, r"none of the 2 checkpoints", capsys)


def refused_and_unchanged(run, message, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(run)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["provenance"].update(data="0" * 64), "is not the data that"),
        (lambda content: content["provenance"].update(split="0" * 64), "are not split as they were"),
        (lambda content: content["provenance"]["options"].update(generator="0" * 64), "its sha256 differs"),
        (lambda content: content.update(schema=99), "has schema 99"),
        (lambda content: content["network"].update(latents=3), "is of another shape"),
    ],
)
def test_other_data_splits_generators_and_networks_are_refused_and_nothing_changes(
    place, tmp_path, capsys, change, message
):
    run = shutil.copytree(place.stopped, tmp_path / "r")
    content = json.loads((run / "config.json").read_text())
    change(content)
    (run / "config.json").write_text(json.dumps(content))
    refused_and_unchanged(run, message, capsys)


def test_other_versions_are_warned_of_in_one_line(place, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(place.stopped, tmp_path / "r")
    content = json.loads((run / "config.json").read_text())
    content["provenance"]["versions"]["jax"] = "0.1"
    (run / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(resume, "carry_out", lambda *arguments: None)
    assert main(["train", "--resume", str(run)]) == 0
    assert capsys.readouterr().err == (
        f"metagen: jax is {jax.__version__} and was 0.1: the run goes on, but may not be the same to the last bit\n"
    )


def test_a_run_goes_on_on_another_number_of_devices_which_is_said(place, tmp_path, capsys):
    run = shutil.copytree(place.stopped, tmp_path / "r")
    for folder in ("checkpoints/10", "meta.npz"):
        path = run / folder
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["train", "--resume", str(run), "--distributed.devices", "2"]) == 0
    assert "began on 1 devices and goes on on 2" in capsys.readouterr().err
    whole, other = crash_test.ended(place.whole), crash_test.ended(run)
    assert set(whole.arrays) == set(other.arrays)
    for name, array in whole.arrays.items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(other.arrays[name], array, rtol=1e-4, atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(other.arrays[name], array, err_msg=name)


def test_tensorboard_is_told_to_pass_over_the_points_that_follow_the_checkpoint(place, tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    run = shutil.copytree(place.stopped, tmp_path / "r")
    content = json.loads((run / "config.json").read_text())
    content["provenance"]["options"]["tensorboard"] = True
    (run / "config.json").write_text(json.dumps(content))
    shutil.rmtree(run / "checkpoints" / "10")
    (run / "meta.npz").unlink()
    assert main(["train", "--resume", str(run)]) == 0
    (path,) = (run / "tensorboard" / "meta").iterdir()
    data, events = path.read_bytes(), []
    while data:  # records of TFRecord: a length of 8 bytes, 4 of its checksum, the event, 4 of its checksum
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert [event.step for event in events if event.session_log.status == SessionLog.START] == [9]
    assert {event.step for event in events if event.summary.value} == {10}


def test_a_run_that_another_process_is_at_work_on_is_refused(place, tmp_path, capsys):
    run = shutil.copytree(place.stopped, tmp_path / "r")
    with run_directory.locked(run_directory.find(run)):
        refused_and_unchanged(run, "another process is at work", capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["maml", "vae"], "takes no other option but --distributed; got learner, model"),
        (["--seed", "1", "--outer.steps", "5"], "takes no other option but --distributed; got seed, outer"),
    ],
)
def test_resume_takes_no_other_option(place, capsys, arguments, message):
    assert main(["train", "--resume", str(place.killed), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_resume_of_what_is_no_run_names_the_runs_beside_it(place, capsys):
    assert main(["train", "--resume", str(place.root / "kiled")]) == 2
    assert "runs in" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "expected LEARNER and MODEL" in capsys.readouterr().err


def test_what_meta_training_begins_with_comes_back_bitwise_with_no_player_more(tmp_path):
    made, run = training(CONFIG), run_directory.RunDirectory(tmp_path)
    assert warm_start.finished(run, CONFIG, made) is None
    given = {name: tree for name, tree in made.built.model.init(jax.random.key(1)).items() if name != "context"}
    warm_start.finish(run, made, jax.random.key(0), given, 6)
    found = warm_start.finished(run, CONFIG, made)
    assert set(found) == set(given)
    jax.tree.map(np.testing.assert_array_equal, found, given)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_waits_for_what_is_to_be_finished_and_handlers_come_back(number, code, capsys):
    before = signal.getsignal(number)
    done = []

    def waits():
        with stoppable("go on so") as stop:
            with stop.finishing():
                signal.raise_signal(number)
                done.append("finished")
            done.append("never")

    def does_not_wait():
        with stoppable("go on so"):
            signal.raise_signal(number)
            time.sleep(1)
            done.append("never")

    for work in (waits, does_not_wait):
        with pytest.raises(Interrupted, match="go on so") as caught:
            work()
        assert (done, caught.value.code) == (["finished"], code)
        assert signal.getsignal(number) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_outside_the_main_thread_no_signal_is_caught():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with stoppable("") as stop, stop.finishing():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_signal_while_training_saves_the_end_of_the_dispatch(place, tmp_path, monkeypatch, capsys):
    run, original, count = shutil.copytree(place.stopped, tmp_path / "r"), keeping.append, []
    shutil.rmtree(run / "checkpoints" / "10")

    def told(path, record):
        original(path, record)
        count.append(record["step"])
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(keeping, "append", told)
        assert main(["train", "--resume", str(run)]) == 143
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"metagen: stopped by SIGTERM; go on with: metagen train --resume {run}"
    assert count == [10]
    assert (run / "checkpoints" / "10" / "whole.json").exists()
    assert main(["train", "--resume", str(run)]) == 0
    assert equal(place.whole, run)


def test_a_second_ctrl_c_leaves_at_once_and_the_first_does_not():
    code = (
        "import ctypes, time; from metagen_jax.cli.interruption import stoppable\n"
        "with stoppable('go on so') as stop, stop.finishing():\n"
        "    print('held', flush=True)\n"
        "    end = time.monotonic() + 60\n"
        "    while time.monotonic() < end: ctypes.CDLL(None).sleep(60)\n"  # which a signal cuts short
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err.splitlines() == [
        "metagen: finishing the dispatch, and saving; Ctrl-C leaves at once",
        "metagen: left at once; go on so",
    ]


@pytest.mark.slow
def test_a_process_that_is_killed_or_told_to_stop_goes_on_as_the_same_run(tmp_path, monkeypatch):
    """Three kills and a SIGTERM of real processes; benchmarks/crash_test.py has fifty."""
    monkeypatch.setitem(os.environ, "JAX_PLATFORMS", "cpu")
    lengths = ("--outer.steps", "200", "--outer.warm-start", "100")
    stages = ("compiling", "saving", "evaluating")
    kills, ends, whole = crash_test.crash(tmp_path, 3, stages=stages, lengths=lengths, say=lambda *a, **k: None)
    assert len(kills) == 3
    assert ends == [""] * len(ends)
    run, log = tmp_path / "told", tmp_path / "log"
    with crash_test.begun(run, tmp_path / "programs", lengths, log) as process:
        while "meta-training: compiled" not in log.read_text():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert log.read_text().splitlines()[-1].endswith(f"go on with: metagen train --resume {run}")
    with crash_test.begun(run, tmp_path / "programs", lengths, log) as process:
        assert process.wait(120) == 0
    assert crash_test.difference(whole, crash_test.ended(run)) == ""
