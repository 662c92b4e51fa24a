"""Several processes that train one run, on this host: what they agree on, and what happens when one of them is gone."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from metagen_jax.cli import main
from metagen_jax.cli.distributed import ORDERED
from metagen_jax.processes import agreed, agreed_tree, check_same, connect, is_first, largest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import crash_test

OPTIONS = (
    *("train", "maml", "vae", "--data", "glyphs", "--shots", "2", "2", "--query", "2", "--network.hidden", "8"),
    *("--network.latents", "2", "--network.context", "2", "--inner.steps", "1", "--outer.tasks", "4"),
    *("--outer.warmup", "2", "--outer.warm-start", "50", "--outer.steps", "250", "--checkpoint-every", "50"),
)
BOUND = 60.0  # seconds in which a process ends that has lost another one


def test_one_process_agrees_with_itself():
    tree = {"x": np.ones(2)}
    assert is_first()
    assert agreed("text") == "text"
    assert agreed(None) is None
    assert agreed_tree(tree, tree) is tree
    assert largest(15) == 15
    check_same("the configuration", "text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("localhost", 2, 0), r"HOST:PORT, got 'localhost'"),
        (("localhost:0", 2, 0), "from 1 to 65535, got 'localhost:0'"),
        (("localhost:99999", 2, 0), "from 1 to 65535, got 'localhost:99999'"),
        (("local host:1", 2, 0), "HOST:PORT, got 'local host:1'"),
        (("localhost:1234", 0, 0), "got 0 and 0"),
        (("localhost:1234", 2, 2), "got 2 and 2"),
        (("localhost:1234", 2, -1), "got 2 and -1"),
    ],
)
def test_an_address_a_count_or_an_index_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        connect(*options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--distributed.index", "1"), "missing: coordinator, processes"),
        (("--distributed.coordinator", "localhost:1", "--distributed.processes", "2"), "missing: index"),
        (("--distributed.cluster", "--distributed.index", "0"), "give none of them"),
        (("--distributed.devices", "99"), "expected 1 to 8 devices"),
        (("--distributed.cluster",), "did not find each other"),
    ],
)
def test_options_that_do_not_go_together_are_refused_and_nothing_is_written(options, message, tmp_path, capsys):
    assert main([*OPTIONS, "--out", str(tmp_path / "r"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "r").exists()


def test_the_switch_for_gpus_is_one_that_xla_knows_and_is_given_once():
    code = (
        "import os, sys; from metagen_jax.cli.distributed import Distributed, join\n"
        "join(Distributed(), deterministic=True); join(Distributed(), deterministic=True)\n"
        "import jax; assert jax.jit(lambda x: x + 1)(1) == 2; print(os.environ['XLA_FLAGS'])"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["--xla_cpu_multi_thread_eigen=false", ORDERED]


def environment_in(folder, **more):
    """Return the environment of processes whose bits are compared.

    Without the flag of `conftest.py` for fused loops: with it, metrics of one process with two devices differed from
    those of two processes.
    """
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    own = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "XLA_FLAGS": flags, "METAGEN_CACHE_DIR": folder / "cache"}
    return {name: str(value) for name, value in {**os.environ, **own, **more}.items()}


class Together:
    """Processes of one run, each in a session of its own."""

    def __init__(self, folder, arguments, count=2, options=((), ())):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = environment_in(folder)
        self.logs = [folder / f"log-{port}-{index}" for index in range(count)]
        self.processes = []
        for index, log in enumerate(self.logs):
            distributed = ("--distributed.coordinator", f"localhost:{port}", "--distributed.processes", str(count))
            command = (sys.executable, "-m", "metagen_jax", *arguments, *options[index], *distributed)
            with log.open("wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        (*command, "--distributed.index", str(index)), stdout=file, stderr=file, env=environment
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, seconds=300.0):
        return [process.wait(seconds) for process in self.processes]

    def said(self, index):
        return self.logs[index].read_text(errors="replace")

    def wait_for_lines(self, run, count, seconds=200.0):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= count:
                return
            if any(process.poll() is not None for process in self.processes):
                break
            time.sleep(0.05)
        pytest.fail(f"no {count} lines: {[self.said(index) for index in range(len(self.logs))]}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a run over two devices of one process, and a cache of its programs."""
    folder = tmp_path_factory.mktemp("processes")
    arguments = [*OPTIONS, "--out", str(folder / "one"), "--distributed.devices", "2"]
    command = [sys.executable, "-m", "metagen_jax", *arguments]
    subprocess.run(command, env=environment_in(folder, JAX_NUM_CPU_DEVICES=2), check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_when_a_process_dies_the_other_ends_and_both_go_on_to_the_end_that_one_process_has(place):
    run = place / "two"
    with Together(place, (*OPTIONS, "--out", str(run))) as both:
        both.wait_for_lines(run, 3)
        os.kill(both.processes[1].pid, signal.SIGKILL)
        begin = time.monotonic()
        assert both.processes[0].wait(BOUND) != 0
        assert time.monotonic() - begin < BOUND
        said = both.said(0)
        assert "another process" in said or "another task died" in said
    assert not (run / "finished.json").exists()
    with Together(place, ("train", "--resume", str(run))) as both:
        assert both.wait() == [0, 0], both.said(0) + both.said(1)
        assert "loss" in both.said(0)
        assert "meta-training" not in both.said(1)  # one of them keeps the run, and shows it
    one, two = crash_test.ended(place / "one"), crash_test.ended(run)
    assert crash_test.difference(one, two) == ""
    assert json.loads((run / "config.json").read_text())["provenance"]["options"]["devices"] == 2


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_what_they_had_is_saved(place):
    run = place / "stopped"
    with Together(place, (*OPTIONS, "--out", str(run))) as both:
        both.wait_for_lines(run, 2)
        both.processes[1].send_signal(signal.SIGTERM)
        assert both.wait() == [143, 143], both.said(0) + both.said(1)
        assert f"metagen train --resume {run}" in both.said(0)
    steps = [line["step"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
    assert (run / "checkpoints" / str(steps[-1])).is_dir() or (run / "warm_start" / str(steps[-1])).is_dir()


@pytest.mark.slow
def test_processes_that_were_given_different_things_all_say_so_and_write_nothing(place):
    run = place / "different"
    with Together(place, (*OPTIONS, "--out", str(run)), options=((), ("--seed", "7"))) as both:
        assert both.wait(120) == [2, 2], both.said(0) + both.said(1)
        for index in (0, 1):
            assert "the configuration of process 1 differs from that of process 0" in both.said(index)
    assert not run.exists()
