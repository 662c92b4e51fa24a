"""How do time and memory of a meta-step grow with tasks, inner steps, shots and width?

    taskset -c 0 python benchmarks/scaling.py

Second-order MAML on workload W1, everything chosen automatically (form, tasks at a time), and for the number of inner
steps also the plain form with and without nested recomputation, whose memory grows with the square root of the steps.
The exponent is the slope of log time over log size from the middle of the range on: 1 is linear growth.
"""

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import agreement
import jax
import jax.numpy as jnp
import matplotlib
import measuring
import numpy as np
import optax
from workloads import w1

import metagen_jax as mg
from metagen_jax.adapt.factored import compact, is_factored
from metagen_jax.meta.batch import automatic_chunk, sum_over_tasks

SWEEPS: dict[str, Sequence[int]] = {
    "tasks": (1, 4, 16, 64, 256, 1024, 4096),
    "steps": (1, 2, 5, 10, 25, 50, 100),
    "shots": (1, 5, 10, 20, 50),
    "width": (100, 200, 400, 800, 1600),
}
TASKS = 16
WAYS: dict[str, dict[str, Any]] = {"auto": {}, "plain": {"form": "plain"}, "plain, nested": {"remat": "nested"}}


def measure(sweep: str, size: int, way: str, repeats: int) -> dict[str, Any]:
    """Compile and time one point."""
    sizes = {"steps": "num_steps", "shots": "support", "width": "width"}
    workload = w1(**({sizes[sweep]: size} if sweep in sizes else {}))
    given = agreement.problem(workload, size if sweep == "tasks" else TASKS)
    learner = mg.maml(workload.model, mg.fixed(optax.sgd(workload.rate)), workload.num_steps, **WAYS[way])
    total = jax.jit(sum_over_tasks(learner.field, chunk="auto"))
    count = len(given.keys)
    arguments = (given.params, given.keys, given.tasks, jnp.full(count, 1 / count))
    begin = time.perf_counter()
    compiled = total.lower(*arguments).compile()
    compile_seconds = time.perf_counter() - begin
    times = measuring.interleaved({"step": functools.partial(compiled, *arguments)}, repeats, seconds=20)["step"]
    support = jax.tree.map(lambda leaf: leaf[0], given.tasks.support)
    made, _ = jax.eval_shape(compact(learner.adapt), given.params, given.keys[0], support)
    layers = sum(is_factored(leaf) for leaf in jax.tree.leaves(made, is_leaf=is_factored))
    return {
        "size": size,
        "way": way,
        "milliseconds": 1e3 * measuring.median(times),
        "tasks_per_second": count / measuring.median(times),
        "temporary_megabytes": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "compile_seconds": compile_seconds,
        "dual_layers": layers,
        "tasks_at_a_time": automatic_chunk(learner.field, *arguments[:3]),
    }


def exponent(points: Sequence[dict[str, Any]]) -> float:
    """Return the slope of log time over log size in the upper half of the range."""
    upper = points[len(points) // 2 :]
    sizes, times = (np.log([point[name] for point in upper]) for name in ("size", "milliseconds"))
    return float(np.polyfit(sizes, times, 1)[0])


def section(sweeps: dict[str, list[dict[str, Any]]], where: str) -> str:
    """Return the tables as text."""
    header = ["", "way", "ms", "tasks/s", "temporary MB", "tasks at a time", "dual layers", "compile s"]
    parts = [f"W1, second-order MAML; {TASKS} tasks, 5 steps, 5 shots, width 400 where nothing else is said. {where}"]
    for sweep, points in sweeps.items():
        rows = [
            [
                f"{point['size']} {sweep}",
                point["way"],
                f"{point['milliseconds']:.1f}",
                f"{point['tasks_per_second']:.0f}",
                f"{point['temporary_megabytes']:.0f}",
                point["tasks_at_a_time"],
                point["dual_layers"],
                f"{point['compile_seconds']:.1f}",
            ]
            for point in points
        ]
        slopes = [
            f"{way} {exponent(chosen):.2f}"
            for way in WAYS
            if len(chosen := [point for point in points if point["way"] == way]) > 3
        ]
        parts.append(f"{measuring.markdown(header, rows)}\n\nExponent of time over {sweep}: {', '.join(slopes)}.")
    return "\n\n".join(parts)


def draw(sweeps: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Save time and memory over size."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(sweeps), figsize=(3.2 * len(sweeps), 5.6), squeeze=False)
    for column, (sweep, points) in enumerate(sweeps.items()):
        for row, (name, label) in enumerate((("milliseconds", "ms a meta-step"), ("temporary_megabytes", "MB"))):
            axis = axes[row, column]
            for way in WAYS:
                chosen = [point for point in points if point["way"] == way]
                axis.plot([p["size"] for p in chosen], [p[name] for p in chosen], marker="o", markersize=3, label=way)
            axis.set(xscale="log", yscale="log", xlabel=sweep, ylabel=label if column == 0 else None)
            axis.grid(alpha=0.3)
            if column == 1 and row == 0:
                axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print and keep the tables and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", nargs="+", default=list(SWEEPS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=measuring.RESULTS)
    arguments = parser.parse_args()
    sweeps = {}
    for sweep in arguments.sweeps:
        ways = WAYS if sweep == "steps" else ("auto",)
        sweeps[sweep] = [measure(sweep, size, way, arguments.repeats) for size in SWEEPS[sweep] for way in ways]
        print(section({sweep: sweeps[sweep]}, ""), flush=True)
    measuring.write("scaling", section(sweeps, measuring.circumstances()), sweeps, arguments.out)
    draw(sweeps, arguments.out / "scaling.png")


if __name__ == "__main__":
    main()
