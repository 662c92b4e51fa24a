"""How much memory does a second-order meta-step need, beside PyTorch's libraries and textbook JAX?

    taskset -c 0 python benchmarks/memory.py

For the library it is what the compiled program needs in temporary buffers, which is exact, for two numbers of tasks.
For the peers it is by how much the resident memory of a process of its own grows at most during the first step, after
weights and data were made (of textbook JAX that includes compiling). What a process has freed before and uses again is
not seen, so that the peers' figures are lower bounds.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import agreement
import jax
import jax.numpy as jnp
import measuring
import numpy as np
import optax
import peers
from workloads import WORKLOADS

import metagen_jax as mg
from metagen_jax.meta.batch import sum_over_tasks

CASES = {"w1": (32, 64), "w2": (16, 32), "w3": (8, 16)}
OURS = {"library": {}, "library, plain form": {"form": "plain"}}


def grown(way: str, name: str, num_tasks: int) -> tuple[float, float | None]:
    """Return megabytes that a step adds to this process, and of temporary buffers of the library's program."""
    workload = WORKLOADS[name]()
    given = agreement.problem(workload, num_tasks)
    temporary: float | None = None
    if way in OURS:
        learner = mg.maml(workload.model, mg.fixed(optax.sgd(workload.rate)), workload.num_steps, **OURS[way])
        total = jax.jit(sum_over_tasks(learner.field, chunk="auto"))
        arguments = (given.params, given.keys, given.tasks, jnp.full(num_tasks, 1 / num_tasks))
        compiled = total.lower(*arguments).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes / 1e6
        step: Any = lambda: compiled(*arguments)  # noqa: E731
    else:
        module = peers.load(way)
        assert not isinstance(module, str), module
        arrays = [jax.tree.map(np.asarray, tree) for tree in (given.params, given.tasks, given.noise)]
        sizes = {"rate": workload.rate, "num_steps": workload.num_steps, "order": "maml", "dtype": "float32"}
        step = module.meta_gradient(workload.name, *arrays, **sizes)
    return measuring.resident_growth(step) / 1e6, temporary


def main() -> None:
    """Measure every way in a process of its own, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workloads", nargs="+", default=list(CASES))
    parser.add_argument("--out", type=Path, default=measuring.RESULTS)
    parser.add_argument("--one", nargs=3, metavar=("WAY", "WORKLOAD", "TASKS"), help="measure one way in this process")
    arguments = parser.parse_args()
    if arguments.one:
        way, name, count = arguments.one
        print(*grown(way, name, int(count)))
        return
    ways = [*OURS, *(peer for peer in peers.PEERS if not isinstance(peers.load(peer), str))]
    found: dict[str, dict[str, Any]] = {}
    for way in ways:
        for name in arguments.workloads:
            for count in CASES[name] if way in OURS else CASES[name][:1]:
                command = [sys.executable, __file__, "--one", way, name, str(count)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                growth, temporary = done.stdout.split()[-2:]
                found.setdefault(way, {})[f"{name} {count}"] = {
                    "growth_megabytes": float(growth),
                    "temporary_megabytes": None if temporary == "None" else float(temporary),
                }
                print(way, name, count, growth, temporary, flush=True)
    both = [f"{name} {count}" for name in arguments.workloads for count in CASES[name]]
    rows = [[way, *(_cell(found[way].get(key)) for key in both)] for way in ways]
    header = ["MB", *(f"{key} tasks" for key in both)]
    text = f"Second-order MAML, 5 steps. {measuring.circumstances()}\n\n{measuring.markdown(header, rows)}"
    measuring.write("memory", text, found, arguments.out)


def _cell(point: dict[str, Any] | None) -> str:
    if point is None:
        return ""
    exact = point["temporary_megabytes"]
    return f"{exact:.1f}" if exact is not None else f"{point['growth_megabytes']:.0f}"


if __name__ == "__main__":
    main()
