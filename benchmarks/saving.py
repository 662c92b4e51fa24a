"""What do checkpoints in the background cost?

    taskset -c 0 python benchmarks/saving.py   # 5 min; writes benchmarks/results/saving.md

The same meta-training, in turns without saving, and saving the whole state (parameters, average, optimiser, sampler,
keys, with its seal) every so many meta-steps, by `Checkpoints`, as `metagen train` does. Medians of wall seconds of
interleaved runs in one process.
"""

import argparse
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import measuring

from metagen_jax import build
from metagen_jax.checkpoint import Checkpoints
from metagen_jax.config import DataConfig, OuterConfig, TrainConfig, check
from metagen_jax.train import init_state, run_chunk

CHUNK = 50


def main() -> None:
    """Train in turns, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=measuring.RESULTS)
    arguments = parser.parse_args()
    config = check(TrainConfig(data=DataConfig("glyphs"), outer=OuterConfig(steps=1000, tasks=8, warm_start=0)))
    training = build.training(config)
    first = init_state(training.learner, training.sampler, training.optimizer, jax.random.key(0))
    chunk = run_chunk(training.step, CHUNK)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(first._replace(key=jax.random.key_data(first.key))))

    def run(every: int | None) -> float:
        state = jax.tree.map(jnp.copy, first)
        with tempfile.TemporaryDirectory() as folder, Checkpoints(folder) as checkpoints:
            begin = time.perf_counter()
            for taken in range(CHUNK, arguments.steps + 1, CHUNK):
                state, _ = chunk(state, training.family.data)
                jax.block_until_ready(state)
                if every is not None and taken % every == 0:
                    checkpoints.save(state)
            checkpoints.wait()
            return time.perf_counter() - begin

    ways = {"never": None, f"every {arguments.steps}": arguments.steps, "every 100": 100, f"every {CHUNK}": CHUNK}
    run(CHUNK)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.repeats):
        for name, every in ways.items():
            times[name].append(run(every))
    rows = []
    for name, every in ways.items():
        pairs = [time / without for time, without in zip(times[name], times["never"], strict=True)]
        seconds = measuring.median(times[name])
        saved = 0 if every is None else arguments.steps // every
        rows.append(
            [
                name,
                str(saved),
                f"{1e3 * seconds / arguments.steps:.2f}",
                measuring.spread([value / arguments.steps for value in times[name]]),
                f"{100 * (measuring.median(pairs) - 1):+.1f} %" if saved else "-",
                f"{1e3 * (seconds - measuring.median(times['never'])) / saved:.0f}" if saved else "-",
            ]
        )
    header = ["saved", "checkpoints", "ms a meta-step", "interquartile", "against never (paired)", "ms a checkpoint"]
    text = (
        f"{measuring.circumstances()}\n\n{measuring.markdown(header, rows)}\n\n"
        f"`metagen train maml vae` with its defaults and 8 tasks, {arguments.steps} meta-steps a run, a state of "
        f"{size / 2**20:.1f} MiB; the last checkpoint is waited for. `--checkpoint-every` is 500 by default."
    )
    measuring.write("saving", text, times, arguments.out)


if __name__ == "__main__":
    main()
