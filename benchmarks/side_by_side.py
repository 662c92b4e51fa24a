"""How fast is a meta-step, beside PyTorch's libraries, textbook JAX and the limit of the machine?

    taskset -c 0 python benchmarks/side_by_side.py

Workloads and peers are those of `workloads.py` and `peers`; `pip install "metagen-jax[benchmark]"` brings PyTorch.
Before anything is timed, losses and meta-gradients are compared in float64 (`agreement.py`) and once more in float32
at the size that is timed. One thread for all: pin the process to one core. Repeats are interleaved, and every ratio is
of medians of one run. "of the limit" is the share of the measured peak of matrix products that the floating-point
operations of products in the traced program, counted analytically, stand for. PyTorch is given the allocator settings
with which `torch.func` was found to be twice as fast (no memory is handed back to the system between steps); the
process starts itself again with them.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import agreement
import jax
import jax.numpy as jnp
import measuring
import numpy as np
import optax
import peers
from workloads import WORKLOADS, Workload

import metagen_jax as mg
from metagen_jax.cost import flops
from metagen_jax.meta.batch import sum_over_tasks

CASES = (
    ("w1", "maml", 32),
    ("w1", "maml", 64),
    ("w1", "fomaml", 32),
    ("w1", "reptile", 32),
    ("w2", "maml", 16),
    ("w2", "fomaml", 16),
    ("w2", "reptile", 16),
    ("w3", "maml", 8),
    ("w3", "fomaml", 8),
    ("w3", "reptile", 8),
)
ROUNDING = 1e-2
"""Of float32 meta-gradients, relative: a ReLU whose input rounds to the other side of zero changes a whole column, and
Reptile's is a small difference of weights. The exact comparison is in float64."""
OURS = {
    "library": {},
    "library, plain form": {"form": "plain"},
}


class Row:
    """One way to the meta-gradient, compiled."""

    def __init__(self, call: Callable[[], Any], *, compile_seconds: float | None = None) -> None:
        self.call, self.compile_seconds = call, compile_seconds
        self.products: int | None = None
        self.temporary: float | None = None


def ours(workload: Workload, given: agreement.Problem, order: str, options: dict[str, Any]) -> Row:
    """Return the library's meta-gradient with these options of the inner loop."""
    learner = agreement.LEARNERS[order](
        workload.model, mg.fixed(optax.sgd(workload.rate)), workload.num_steps, **options
    )
    total = sum_over_tasks(learner.field, chunk="auto")
    arguments = (given.params, given.keys, given.tasks, jnp.full(len(given.keys), 1 / len(given.keys)))
    begin = time.perf_counter()
    compiled = jax.jit(total).lower(*arguments).compile()
    row = Row(functools.partial(compiled, *arguments), compile_seconds=time.perf_counter() - begin)
    row.products = flops(total, *arguments).products
    row.temporary = float(compiled.memory_analysis().temp_size_in_bytes)
    return row


def theirs(peer: str, workload: Workload, arrays: list[Any], order: str, **options: Any) -> Row | str:
    """Return a peer's meta-gradient, or why there is none."""
    module = peers.load(peer)
    if isinstance(module, str):
        return module
    sizes = {"rate": workload.rate, "num_steps": workload.num_steps, "order": order, "dtype": "float32"}
    return Row(module.meta_gradient(workload.name, *arrays, **sizes, **options))


def compare(case: tuple[str, str, int], repeats: int, peak: float) -> dict[str, Any]:
    """Measure one case."""
    name, order, num_tasks = case
    workload = WORKLOADS[name]()
    given = agreement.problem(workload, num_tasks, order)
    arrays = [jax.tree.map(np.asarray, tree) for tree in (given.params, given.tasks, given.noise)]
    rows: dict[str, Row | str] = {label: ours(workload, given, order, options) for label, options in OURS.items()}
    rows |= {peer: theirs(peer, workload, arrays, order) for peer in peers.PEERS}
    working = {label: row for label, row in rows.items() if isinstance(row, Row)}
    reference = jax.tree.map(np.asarray, working["library"].call()[0])
    for label, row in working.items():
        found = row.call()
        gradient = found[0] if label in OURS else peers.as_numpy(label, name, found[1])
        gap = distance(reference, jax.tree.map(np.asarray, gradient))
        assert gap < ROUNDING, f"{case}: the meta-gradient of {label} differs by {gap:.1e}"
    times = measuring.interleaved({label: row.call for label, row in working.items()}, repeats)
    seconds = {label: measuring.median(each) for label, each in times.items()}
    torch = [label for label in working if label in peers.PEERS and label != "textbook"]
    best = min(torch, key=seconds.__getitem__) if torch else None
    result: dict[str, Any] = {"workload": name, "order": order, "tasks": num_tasks, "best_torch": best, "rows": {}}
    for label, row in rows.items():
        if isinstance(row, str):
            result["rows"][label] = {"skipped": row}
            continue
        result["rows"][label] = {
            "milliseconds": 1e3 * seconds[label],
            "interquartile": measuring.spread(times[label]),
            "tasks_per_second": num_tasks / seconds[label],
            "temporary_megabytes": row.temporary and row.temporary / 1e6,
            "compile_seconds": row.compile_seconds,
            "of_limit": row.products and row.products / seconds[label] / 1e9 / peak,
            "times_faster": best and seconds[best] / seconds[label],
        }
    return result


def distance(ours: Any, theirs: Any) -> float:
    """Return the norm of the difference of two meta-gradients, relative to that of the first."""
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(a**2) for a, _ in pairs)))


def section(results: list[dict[str, Any]]) -> str:
    """Return the tables as text."""
    header = ["", "ms", "interquartile", "tasks/s", "x best PyTorch", "temporary MB", "of the limit", "compile s"]
    parts = [f"One thread. {where}" for where in dict.fromkeys(result["where"] for result in results)]
    for result in results:
        lines = []
        for label, row in result["rows"].items():
            if "skipped" in row:
                lines.append([label, row["skipped"], *[""] * (len(header) - 2)])
                continue
            lines.append(
                [
                    f"**{label}**" if label == result["best_torch"] else label,
                    f"{row['milliseconds']:.0f}",
                    row["interquartile"],
                    f"{row['tasks_per_second']:.0f}",
                    f"{row['times_faster']:.1f}" if row["times_faster"] else "",
                    f"{row['temporary_megabytes']:.0f}" if row["temporary_megabytes"] is not None else "",
                    f"{row['of_limit']:.2f}" if row["of_limit"] else "",
                    f"{row['compile_seconds']:.1f}" if row["compile_seconds"] else "",
                ]
            )
        peak, bandwidth = result["limits"]["product_gflops"], result["limits"]["bandwidth_gbytes"]
        title = (
            f"**{result['workload'].upper()}, {result['order']}, {result['tasks']} tasks** (in this run products at "
            f"most {peak:.0f} GFLOP/s, memory {bandwidth:.0f} GB/s)"
        )
        parts.append(f"{title}\n\n{measuring.markdown(header, lines)}")
    return "\n\n".join(parts)


def main() -> None:
    """Measure, print and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    parser.add_argument("--orders", nargs="+", default=list(peers.ORDERS))
    parser.add_argument("--out", type=Path, default=measuring.RESULTS)
    parser.add_argument("--resume", action="store_true", help="keep the cases that were measured before")
    parser.add_argument("--skip-agreement", action="store_true", help="do not compare in float64 first")
    arguments = parser.parse_args()
    _keep_memory()
    cases = [case for case in CASES if case[0] in arguments.workloads and case[1] in arguments.orders]
    versions = _torch()
    if not arguments.skip_agreement:
        for name, order in dict.fromkeys((name, order) for name, order, _ in cases):
            print(f"float64: {name}, {order}: {agreement.check(WORKLOADS[name](), order)}", flush=True)
    limits = measuring.limits()
    kept = arguments.out / "side_by_side.json"
    results = json.loads(kept.read_text())["cases"] if arguments.resume and kept.exists() else []
    for case in cases:
        result = compare(case, arguments.repeats, limits["product_gflops"])
        result |= {"limits": limits, "where": measuring.circumstances(**versions)}
        results = [other for other in results if (other["workload"], other["order"], other["tasks"]) != case] + [result]
        results.sort(key=lambda result: CASES.index((result["workload"], result["order"], result["tasks"])))
        measuring.write("side_by_side", section(results), {"cases": results}, arguments.out)


def _keep_memory() -> None:
    """Start again with an allocator that keeps what it has, which is read when a process begins."""
    wanted = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "16000000000"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def _torch() -> dict[str, str]:
    """Return PyTorch's version, having given it one thread, or nothing where it is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(1)
    return {"torch": torch.__version__}


if __name__ == "__main__":
    main()
