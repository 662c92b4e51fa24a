"""Does every command end malformed input with one message, and leave everything as it was?

    taskset -c 0 python benchmarks/fuzz.py --inputs 2000 --seed 0

Every command of `metagen` is called in this process with malformed input: arguments (values of other types, out of
range, not finite, empty, of other alphabets; unknown, missing and repeated options), the files of a run (absent, cut
off, other bytes, another type of file, JSON and arrays with anything in them), and folders of pictures. First one after
the other through all kinds, then at random by the seed. What would train or compute is replaced by nothing, so that an
input that is valid after all is known by getting there. A finding is whatever else than that, or a refusal, comes out:
an exception, a traceback, more than one message, success with what is certainly bad, a file of the run or of the data
that changed, or no end within a few seconds. How input is spoilt is in `fuzz_inputs.py`.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import fuzz_inputs
import jax
import measuring
import numpy as np
from fuzz_inputs import Input, Place

from metagen_jax import build
from metagen_jax.cli import adapt, compare, critics, explore, labels, likelihood, main, plan, resume, samples, train
from metagen_jax.config import DataConfig, InnerConfig, ModelConfig, OuterConfig, TrainConfig, check
from metagen_jax.parameters import save_meta
from metagen_jax.run_directory import create
from metagen_jax.tasks import sources
from metagen_jax.tasks.image_set import ImageSet, image_set
from metagen_jax.tasks.sources.typefaces import SCRIPTS
from metagen_jax.writing import append, write

COMPUTING = (
    (train, "carry_out"),
    (resume, "carry_out"),
    (plan.plan, "trace"),
    (compare, "compare"),
    (critics, "_train"),
    (adapt, "_timed"),
    (explore, "_encode"),
    (explore, "_random_walks"),
    (likelihood, "_measure"),
    (likelihood, "baseline_systems"),
    (samples, "critics_for"),
    (labels, "accuracy_curve"),
)
"""What begins to train or to compute, once everything that was asked for was found to be right."""
LIMIT = 20.0  # seconds until a command counts as one that hangs
MEMORY = 1 << 30  # bytes by which a command may grow this process
ADDRESSES = 1 << 33  # bytes of addresses that it may take in all, so that this machine has some left
BOX = re.compile(r"[╭╰│]|^usage:|^Usage:", re.MULTILINE)  # of the parser of arguments


class Begun(BaseException):
    """The input was valid: what it asks for would begin now."""


class Hung(BaseException):
    """The command does not end."""


class Finding(NamedTuple):
    """What came of an input that should not have."""

    command: str
    what: str  # how the input was spoilt
    arguments: list[str]
    problem: str
    where: str  # last lines of the traceback


def run() -> None:
    """Feed every command, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=measuring.RESULTS)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, at_home(Path(folder) / "home"):
        counts, findings = fuzz(make_place(Path(folder)), arguments.inputs, arguments.seed)
    outcomes = ("inputs", "accepted", "refused", "unhandled")
    commands = sorted({command for command, _ in counts})
    rows = [[command, *(str(counts[command, outcome]) for outcome in outcomes)] for command in commands]
    rows.append(["all", *(str(sum(counts[command, outcome] for command in commands)) for outcome in outcomes)])
    text = (
        f"{measuring.circumstances()}\n\n"
        f"{measuring.markdown(['command', 'inputs', 'valid after all', 'refused with one message', 'unhandled'], rows)}"
        f"\n\nSeed {arguments.seed}; {time.perf_counter() - begin:.0f} s in all."
    )
    measuring.write("fuzz", text, [finding._asdict() for finding in findings], arguments.out)
    for finding in findings[:50]:
        print(f"{finding.command}: {finding.what}: {finding.problem}\n  {finding.arguments}\n  {finding.where}")
    sys.exit(1 if findings else 0)


def fuzz(place: Place, num_inputs: int, seed: int) -> tuple[Counter[tuple[str, str]], list[Finding]]:
    """Feed so many inputs.

    Returns:
        How many inputs of each command had each outcome, and what should not have happened.
    """
    counts, findings, draw = Counter[tuple[str, str]](), list[Finding](), random.Random(seed)
    for number, made in zip(range(num_inputs), fuzz_inputs.inputs(place, draw), strict=False):
        outcome, finding = feed(place, made)
        counts[made.command, "inputs"] += 1
        counts[made.command, outcome] += 1
        findings += [] if finding is None else [finding]
        if number % 200 == 199:
            print(f"{number + 1} inputs, {len(findings)} findings", file=sys.stderr, flush=True)
    return counts, findings


def feed(place: Place, made: Input) -> tuple[str, Finding | None]:
    """Give one input to its command; return what came of it: accepted, refused or unhandled."""
    made.prepare()
    before, memory = fuzz_inputs.snapshot(place.kept), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem, where = "", ""
    code: int | None = None
    try:
        with computing_nothing(), streams() as error, limits():
            code = main(made.arguments)
    except Begun:
        pass
    except BaseException as escaped:
        problem = f"{type(escaped).__name__}: {str(escaped)[:200]}"
        where = "".join(traceback.format_tb(escaped.__traceback__)[-3:])
    said = error.getvalue()
    if not problem:
        problem = _wrong(code, said, made.certain)
    changed = fuzz_inputs.snapshot(place.kept) != before
    if not problem and changed:
        problem = "a file was changed"
    if made.spoils or changed:
        place.renew()
    if not problem and (grown := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) > MEMORY // 1024:
        problem = f"{grown // 1024} MB taken"
    if problem:
        return "unhandled", Finding(made.command, made.what, made.arguments, problem, where or said[-500:])
    return ("refused" if code else "accepted"), None


def _wrong(code: int | None, said: str, certain: bool) -> str:
    """Return what is wrong with an exit code (None: it began to compute) and a standard error, "" if nothing is."""
    if not code:
        return "success with what is certainly bad" if certain else ""
    if "Traceback" in said:
        return "a traceback"
    if code != 2:  # 1 is of what failed on the way, and nothing was begun
        return f"exit code {code}"
    lines = said.strip().splitlines()
    if BOX.search(said) or (lines and lines[-1].startswith("metagen: ") and len(lines) <= 2):
        return ""
    return f"{len(lines)} lines on standard error"


@contextlib.contextmanager
def computing_nothing() -> Iterator[None]:
    """Let everything that would train or compute raise `Begun`."""

    def begun(*arguments: Any, **options: Any) -> None:
        raise Begun

    with contextlib.ExitStack() as stack:
        for module, name in COMPUTING:
            stack.enter_context(mock.patch.object(module, name, begun))
        stack.enter_context(mock.patch.object(sources, "glyphs", few_glyphs))  # drawing all takes seconds
        yield


@contextlib.contextmanager
def streams() -> Iterator[Any]:
    """Stand in for a terminal's standard output and error, and yield the second one."""

    class Terminal(io.TextIOWrapper):
        def getvalue(self) -> str:
            self.flush()
            return self.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]

    out, error = (Terminal(io.BytesIO(), encoding="utf-8", errors="strict") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of files that are skipped; they are no errors
        yield error


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Raise `Hung` after a while (signals are of the main thread), and `MemoryError` before the machine has no more."""

    def hung(*arguments: Any) -> None:
        raise Hung(f"no end within {LIMIT:.0f} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    most = taken + ADDRESSES if hard == resource.RLIM_INFINITY else min(taken + ADDRESSES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    before = signal.signal(signal.SIGALRM, hung)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def at_home(home: Path) -> Iterator[None]:
    """Have another home and another folder to work in, so that nothing of the user's is touched."""
    here = Path.cwd()
    work = home / "work"
    work.mkdir(parents=True)
    names = {"HOME": str(home), "METAGEN_CACHE_DIR": str(home / "cache")}
    with mock.patch.dict(os.environ, names):
        os.chdir(work)
        try:
            yield
        finally:
            os.chdir(here)


def few_glyphs(**options: Any) -> ImageSet:
    """Stand in for the glyphs: a few images of three letters of every script."""
    groups = [script for script in SCRIPTS for _ in range(3)]
    labels = np.repeat(np.arange(len(groups)), 16)
    pixels = np.where(np.random.default_rng(0).random((len(labels), 28, 28, 1)) < 0.2, 255, 0).astype(np.uint8)
    return image_set("glyphs-few", pixels, labels, [f"{g}/{n}" for n, g in enumerate(groups)], groups=groups, note="")


def make_place(root: Path) -> Place:
    """Write pictures, and runs that look as if they had been trained on them."""
    original = root / "original"
    fuzz_inputs.write_pictures(original)
    place = Place(root, original, root / "kept")
    place.renew()
    small = ModelConfig(hidden=(4,), latents=2, context=2)
    data = DataConfig(source=str(place.kept / "data"), size=8, split="class")
    outer = OuterConfig(steps=10, tasks=2)
    config = TrainConfig(learner="maml", model="vae", data=data, network=small, inner=InnerConfig(steps=1), outer=outer)
    shape: dict[str, Any] = {"shots": (1, 1), "query": 1}
    _write_run(original / "vae", config, **shape)
    _write_run(original / "gan", config, model="gan", learner="fomaml", **shape)
    _write_run(original / "classifier", config, model="classifier", learner="anil", way=2, **shape)
    place.renew()
    return place


def _write_run(folder: Path, config: TrainConfig, **settings: Any) -> None:
    config = check(dataclasses.replace(config, **settings))
    training = build.training(config)
    run = create(folder, config, training.data, options={"checkpoint_every": 5})
    save_meta(run.meta, training.learner.init(jax.random.key(0)), step=10)
    for phase, step in (("warm start", 5), ("meta", 5), ("meta", 10)):
        append(run.metrics, {"phase": phase, "step": step, "seconds": 0.5 * step, "loss": 3.0, "num_nonfinite": 0})
    for name in ("evaluation.json", "evaluation.md"):
        write(folder / name, "{}\n")
    write(run.finished, '{"steps": 10, "evaluation": "evaluated"}\n')
    with contextlib.redirect_stdout(io.StringIO()):
        main(["export", str(folder), str(folder / "exported.npz")])
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)


if __name__ == "__main__":
    run()
