"""A short run of the fuzzer, and that it would notice what it looks for."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import fuzz
import fuzz_inputs

from metagen_jax.cli import info


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    with fuzz.at_home(root / "home"):
        yield fuzz.make_place(root)


def test_no_input_of_a_short_run_is_unhandled(place):
    counts, findings = fuzz.fuzz(place, 150, seed=0)
    assert not findings, "\n".join(map(str, findings))
    assert len({command for command, _ in counts}) >= 9
    outcomes = {
        name: sum(n for (_, outcome), n in counts.items() if outcome == name) for name in ("accepted", "refused")
    }
    assert outcomes["refused"] > 75
    assert outcomes["accepted"] > 5
    assert sum(outcomes.values()) == 150


@pytest.mark.parametrize("command", fuzz_inputs.COMMANDS)
def test_what_is_not_spoilt_is_accepted(place, command):
    valid = fuzz_inputs.Input(
        command, "nothing", fuzz_inputs._base(place, command, "vae"), False, fuzz_inputs._clear(place)
    )
    assert fuzz.feed(place, valid) == ("accepted", None)


def escapes(finished):
    raise KeyError("step")


def changes(finished):
    (finished.run.path / "metrics.jsonl").write_text("")
    raise ValueError("no")


def says_too_much(finished):
    print("one\ntwo\nthree", file=sys.stderr)
    raise ValueError("no")


def hangs(finished):
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    while True:
        pass


def takes_memory(finished):
    np.ones(fuzz.MEMORY, np.float32).sum()  # four times as many bytes
    raise ValueError("no")


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (escapes, "KeyError"),
        (changes, "a file was changed"),
        (says_too_much, "4 lines on standard error"),
        (hangs, "Hung"),
        (takes_memory, "MB taken"),
    ],
)
def test_the_fuzzer_notices(place, monkeypatch, broken, problem):
    monkeypatch.setattr(info, "describe", broken)
    monkeypatch.setattr(fuzz, "MEMORY", fuzz.MEMORY // 4)
    made = fuzz_inputs.Input("info", "nothing", ["info", str(place.kept / "vae")], False)
    outcome, finding = fuzz.feed(place, made)
    assert outcome == "unhandled"
    assert problem in finding.problem


def test_success_with_what_is_certainly_bad_is_a_finding(place):
    made = fuzz_inputs.Input("info", "nothing", ["info", str(place.kept / "vae")], True)
    outcome, finding = fuzz.feed(place, made)
    assert (outcome, finding.problem) == ("unhandled", "success with what is certainly bad")


def test_nothing_of_the_users_is_touched(place):
    assert Path(os.environ["METAGEN_CACHE_DIR"]).is_relative_to(place.root)
    assert Path.cwd().is_relative_to(place.root)
