"""Does a run that is killed at any moment end as the run that nobody killed?

    taskset -c 0 python benchmarks/crash_test.py --kills 50

A small `metagen train` on procedural glyphs, in processes of its own. Once it runs to its end; then the same command is
begun again and killed by SIGKILL while it imports, compiles, warms up, saves, takes meta-steps, draws and evaluates,
at random moments of each, and is resumed after each kill until it ends, when it begins anew. Every end is compared with
that of the run that was never killed: parameters, average, optimiser, the state of the sampler, the key, the exported
average and every line of metrics.jsonl, bit for bit (but for the seconds that it took). The kills while compiling begin
without any compiled program, the others with those of the first run.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import measuring
import numpy as np

from metagen_jax import build
from metagen_jax.checkpoint import Checkpoints
from metagen_jax.run_directory import find, read_config
from metagen_jax.train import init_state

STAGES = ("importing", "compiling", "warm start", "saving", "meta-steps", "saving", "evaluating")
OPTIONS = (
    *("--data", "glyphs", "--shots", "2", "2", "--query", "3", "--network.hidden", "16", "--network.latents", "4"),
    *("--network.context", "4", "--inner.steps", "2", "--outer.tasks", "4", "--outer.warmup", "2"),
    *("--checkpoint-every", "50"),
)
LENGTHS = ("--outer.steps", "600", "--outer.warm-start", "300")
LIMIT = 600.0  # seconds that one process may take


class Kill(NamedTuple):
    """One kill."""

    run: int
    stage: str
    lines: int  # of metrics.jsonl when it was killed
    begun: bool  # whether the run had a folder
    saving: bool  # whether a checkpoint was half-written


class Ended(NamedTuple):
    """How a run ended."""

    arrays: dict[str, Any]
    lines: list[dict[str, Any]]
    evaluation: str


def main() -> None:
    """Kill, resume, compare; print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=measuring.RESULTS)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        kills, ends, whole = crash(Path(folder), arguments.kills, seed=arguments.seed, say=print)
    if differs := [text for text in ends if text]:
        sys.exit(f"{len(differs)} of {len(ends)} runs ended otherwise: {differs[0]}")
    count = Counter(kill.stage for kill in kills)
    rows = [
        [stage, str(count[stage]), str(sum(kill.saving for kill in kills if kill.stage == stage))]
        for stage in dict.fromkeys(STAGES)
    ]
    rows.append(["all", str(len(kills)), str(sum(kill.saving for kill in kills))])
    begun = sum(kill.begun for kill in kills)
    text = (
        f"{measuring.circumstances()}\n\n"
        f"{measuring.markdown(['killed while', 'kills', 'with a half-written checkpoint'], rows)}\n\n"
        f"{len(kills)} kills of {len(ends)} runs, seed {arguments.seed}; {len(kills) - begun} came before the run had "
        f"a folder, so that it was begun again, and {begun} were resumed. Every run ended as the one that was never "
        f"killed: {len(whole.arrays)} arrays and {len(whole.lines)} lines of metrics.jsonl, bit for bit; no line was "
        f"missing, doubled or torn. {time.perf_counter() - begin:.0f} s in all."
    )
    measuring.write("crash_test", text, [kill._asdict() for kill in kills], arguments.out)


def crash(
    folder: Path,
    num_kills: int,
    *,
    seed: int = 0,
    stages: Sequence[str] = STAGES,
    lengths: Sequence[str] = LENGTHS,
    say: Any,
) -> tuple[list[Kill], list[str], Ended]:
    """Kill a training process so many times, and resume it each time.

    Returns:
        The kills; for each run that ended how it differs from the one that was never killed, "" if it does not; and how
        that one ended.
    """
    draw, kills, ends = random.Random(seed), list[Kill](), list[str]()
    cache = folder / "programs"
    with begun(folder / "whole", cache, lengths, folder / "log") as process:
        if process.wait(LIMIT):
            raise RuntimeError((folder / "log").read_text()[-2000:])
    whole = ended(folder / "whole")
    say(f"never killed: {len(whole.lines)} lines, {len(whole.arrays)} arrays", flush=True)
    while len(kills) < num_kills or len(ends) == 0:
        number = len(ends)
        run = folder / str(number)
        for stage in [*stages, None]:
            if len(kills) == num_kills:
                stage = None
            programs = Path(tempfile.mkdtemp(dir=folder)) if stage == "compiling" else cache
            with begun(run, programs, lengths, folder / "log") as process:
                before = _lines(run)
                if stage is not None and _wait_for(stage, process, run, folder / "log", before, draw):
                    process.kill()
                    process.wait()
                    kill = Kill(number, stage, _lines(run), (run / "config.json").exists(), bool(list(_halves(run))))
                    kills.append(kill)
                    say(f"{len(kills)}: {kill}", flush=True)
                    continue
                if process.wait(LIMIT):
                    raise RuntimeError((folder / "log").read_text()[-2000:])
                break  # it ended before it came to be killed in that stage, or was to end
        ends.append(difference(whole, ended(run)))
        say(f"run {number}: {ends[-1] or 'equal'}", flush=True)
    return kills, ends, whole


def ended(path: Path) -> Ended:
    """Return everything that a run ended with."""
    run = find(path)
    config, _ = read_config(run)
    training = build.training(config)
    target = jax.eval_shape(
        lambda key: init_state(training.learner, training.sampler, training.optimizer, key), jax.random.key(0)
    )
    with Checkpoints(run.checkpoints) as checkpoints:
        state = checkpoints.restore(target, config.outer.steps)
    state = state._replace(key=jax.random.key_data(state.key))
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    with np.load(run.meta) as file:
        arrays |= {f"meta.npz {name}": file[name] for name in file.files}
    text = run.metrics.read_text()
    if not text.endswith("\n"):
        raise RuntimeError(f"the last line of {run.metrics} is torn")
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        line.pop("seconds")
    return Ended(arrays, lines, json.loads(run.finished.read_text())["evaluation"])


def difference(one: Ended, other: Ended) -> str:
    """Return what differs between two ends first, "" if nothing does."""
    if [(line["phase"], line["step"]) for line in one.lines] != [(line["phase"], line["step"]) for line in other.lines]:
        return "metrics.jsonl has other lines"
    for left, right in zip(one.lines, other.lines, strict=True):
        if left != right:
            return f"metrics.jsonl differs at {left['phase']} {left['step']}"
    if set(one.arrays) != set(other.arrays):
        return "there are other arrays"
    for name, array in one.arrays.items():
        if array.tobytes() != other.arrays[name].tobytes():
            return f"{name} differs"
    return "" if one.evaluation == other.evaluation else "the evaluation differs"


def begun(run: Path, programs: Path, lengths: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    """Begin the run, or go on with it if it has a folder."""
    there = (run / "config.json").exists()
    arguments = ["--resume", str(run)] if there else ["maml", "vae", *OPTIONS, *lengths, "--out", str(run)]
    code = "import sys; from metagen_jax.cli import main; sys.exit(main())"
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "MPLBACKEND": "Agg",
    }
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code, "train", *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment
        )


def _wait_for(
    stage: str, process: "subprocess.Popen[bytes]", run: Path, log: Path, before: int, draw: random.Random
) -> bool:
    """Wait for a random moment of a stage; return whether the process came to it and is still at work."""
    more, delay = draw.randint(1, 5), draw.random()
    if stage == "importing":
        time.sleep(6 * delay)
        return process.poll() is None
    until = time.perf_counter() + LIMIT
    while process.poll() is None and time.perf_counter() < until:
        text = log.read_text(errors="replace")
        lines = _lines(run)
        there = {
            "compiling": "compiling" in text,
            "warm start": lines >= before + more,
            "saving": lines >= before + more // 2 and any(_halves(run)),
            "meta-steps": "meta-training: compiled" in text and lines >= before + more,
            "evaluating": _last(text),
        }[stage]
        if there:
            time.sleep({"compiling": 3.0, "evaluating": 4.0, "saving": 0.01}.get(stage, 0.1) * delay)
            return process.poll() is None
        time.sleep(0.001 if stage == "saving" else 0.01)
    return False


def _last(text: str) -> bool:
    """Return whether the log says that all meta-steps were taken."""
    steps = [
        line.split()[1].split("/") for line in text.splitlines() if line.startswith("meta-training: ") and "/" in line
    ]
    return any(taken == total for taken, total in (step for step in steps if len(step) == 2))


def _lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def _halves(run: Path) -> Iterator[Path]:
    """Yield the folders of checkpoints that are being written."""
    for name in ("warm_start", "checkpoints"):
        if (run / name).is_dir():
            yield from (run / name).glob("*.orbax-checkpoint-tmp*")


if __name__ == "__main__":
    main()
