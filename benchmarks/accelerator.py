"""How fast is a meta-step on an accelerator, beside PyTorch on the same device, and what does its precision cost?

    python benchmarks/accelerator.py --seconds 200

Second-order MAML on the workloads of `workloads.py`, small and large numbers of tasks. Everything is at float32 unless
the row says tf32, in which products keep 10 bits of each factor's mantissa. "of the limit" is the share of the measured
peak of float32 matrix products that the products of the traced program stand for. Repeats are interleaved; a ratio is
of medians of one run; every row's meta-gradient is compared with that of the first row before it is
timed. PyTorch is `torch.func.vmap` over tasks of `torch.func.grad` on the same device, waited for like the others.

Cases are measured in the order of `CASES` as long as there is time, and what is done is kept.
"""

import argparse
import functools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import agreement
import jax
import jax.numpy as jnp
import measuring
import numpy as np
import optax
import peers
import sampler
from side_by_side import distance
from workloads import WORKLOADS

import metagen_jax as mg
from metagen_jax.cost import flops_of
from metagen_jax.meta.batch import sum_over_tasks

CASES = (("w1", 32), ("w1", 1024), ("w2", 32), ("w2", 512), ("w1", 8192), ("w3", 8), ("w3", 256))
WAYS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({"form": "plain"}, "float32"),
    "auto": ({}, "float32"),
    "plain, tf32": ({"form": "plain"}, "tensorfloat32"),
    "auto, tf32": ({}, "tensorfloat32"),
}
ROUNDING = {"float32": 1e-2, "tensorfloat32": 0.5}
EPISODES = 256  # drawn at a time
MOST_TASKS = 1024  # more are for the dual form alone: what the others keep of every task would fill the device


def limits() -> dict[str, float]:
    """Measure what the device does at most: products of 8192 x 8192 matrices, and a pass over 4 GB."""
    size, matrix, long = 8192, jnp.ones((8192, 8192)), jnp.ones(2**30)
    product = jax.jit(lambda a, precision: jnp.matmul(a, a, precision=precision), static_argnums=1)
    add = jax.jit(lambda a: a + 1)
    calls = {
        "float32": lambda: product(matrix, "float32"),
        "tf32": lambda: product(matrix, "tensorfloat32"),
        "add": lambda: add(long),
    }
    times = measuring.interleaved(calls, 10)
    found = {f"{name}_gflops": 2 * size**3 / min(times[name]) / 1e9 for name in ("float32", "tf32")}
    return found | {"bandwidth_gbytes": 2 * long.nbytes / min(times["add"]) / 1e9}


def ways(name: str, num_tasks: int) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, float]]]:
    """Return the ways of a case, compiled and compared, and what is known of each without timing it."""
    workload = WORKLOADS[name]()
    given = agreement.problem(workload, num_tasks)
    arguments = (given.params, given.keys, given.tasks, jnp.full(num_tasks, 1 / num_tasks))
    calls: dict[str, Callable[[], Any]] = {}
    facts: dict[str, dict[str, float]] = {}
    reference, lowered = None, {}
    for way, (options, precision) in WAYS.items():
        if num_tasks <= MOST_TASKS or "plain" not in way:
            learner = mg.maml(workload.model, mg.fixed(optax.sgd(workload.rate)), workload.num_steps, **options)
            total = sum_over_tasks(learner.field, chunk="auto")
            with jax.default_matmul_precision(precision):
                traced = jax.jit(total).trace(*arguments)
                lowered[way] = traced.lower(), flops_of(traced.jaxpr).products
    with ThreadPoolExecutor() as pool:
        programs = dict(zip(lowered, pool.map(lambda each: each[0].compile(), lowered.values()), strict=True))
    for way, compiled in programs.items():
        precision, products = WAYS[way][1], lowered[way][1]
        call = functools.partial(compiled, *arguments)
        gradient = jax.tree.map(np.asarray, call()[0])
        reference = gradient if reference is None else reference
        apart = distance(reference, gradient)
        assert apart < ROUNDING[precision], f"{name}, {num_tasks} tasks: {way} is {apart:.1e} from the first"
        again = jax.tree.map(np.asarray, call()[0])
        same = all(jax.tree.leaves(jax.tree.map(np.array_equal, gradient, again)))
        calls[way], facts[way] = (
            call,
            {
                "products": float(products),
                "temporary_megabytes": compiled.memory_analysis().temp_size_in_bytes / 1e6,
                "apart": apart,
                "repeats_bit_for_bit": float(same),
            },
        )
    module = peers.load("functional")
    if not isinstance(module, str) and num_tasks <= MOST_TASKS:
        import torch

        arrays = [jax.tree.map(np.asarray, tree) for tree in (given.params, given.tasks, given.noise)]
        sizes: dict[str, Any] = {"rate": workload.rate, "num_steps": workload.num_steps, "order": "maml"}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        step = module.meta_gradient(name, *arrays, **sizes, dtype="float32", device=device)
        wait = torch.cuda.synchronize if device == "cuda" else lambda: None

        def call() -> Any:
            found = step()
            wait()
            return found

        apart = distance(reference, peers.as_numpy("functional", name, call()[1]))
        assert apart < ROUNDING["float32"], f"{name}, {num_tasks} tasks: PyTorch is {apart:.1e} from the first"
        calls["PyTorch"], facts["PyTorch"] = (lambda: call() and None), {"apart": apart}
    return calls, facts


def measure(name: str, num_tasks: int, repeats: int) -> dict[str, Any]:
    """Measure one case."""
    calls, facts = ways(name, num_tasks)
    times = measuring.interleaved(calls, repeats, seconds=10)
    rows = {way: facts[way] | {"milliseconds": 1e3 * measuring.median(times[way])} for way in calls}
    for way, row in rows.items():
        row["spread"] = measuring.spread(times[way])
    return {"workload": name, "tasks": num_tasks, "rows": rows}


def section(results: dict[str, Any]) -> str:
    """Return the tables as text."""
    found = results["limits"]
    parts = [
        f"{results['where']}\n\nAt most: {found['float32_gflops'] / 1e3:.1f} TFLOP/s in float32 products, "
        f"{found['tf32_gflops'] / 1e3:.0f} in tf32 ones; {found['bandwidth_gbytes'] / 1e3:.2f} TB/s moved."
    ]
    if "episodes_per_second" in results:
        parts.append(
            f"Episodes drawn inside jit, {EPISODES} at a time: {results['episodes_per_second']:,.0f} per second."
        )
    header = ["", "ms", "interquartile", "tasks/s", "x PyTorch", "of the limit", "temporary MB", "apart"]
    for case in results["cases"]:
        rows, torch = [], case["rows"].get("PyTorch", {}).get("milliseconds")
        for way, row in case["rows"].items():
            seconds = row["milliseconds"] / 1e3
            limit = found["tf32_gflops" if "tf32" in way else "float32_gflops"]
            rows.append(
                [
                    way,
                    f"{row['milliseconds']:.2f}",
                    row["spread"],
                    f"{case['tasks'] / seconds:,.0f}",
                    f"{torch / row['milliseconds']:.1f}" if torch else "",
                    f"{row['products'] / seconds / 1e9 / limit:.2f}" if "products" in row else "",
                    f"{row['temporary_megabytes']:.0f}" if "temporary_megabytes" in row else "",
                    f"{row['apart']:.0e}",
                ]
            )
        title = f"**{case['workload'].upper()}, second-order MAML, {case['tasks']} tasks**"
        parts.append(f"{title}\n\n{measuring.markdown(header, rows)}")
    ways_of_ours = [row for case in results["cases"] for way, row in case["rows"].items() if way in WAYS]
    same = sum(row["repeats_bit_for_bit"] for row in ways_of_ours)
    parts.append(f"Called twice, {same:.0f} of {len(ways_of_ours)} programs gave the same meta-gradient bit for bit.")
    return "\n\n".join(parts)


def main() -> None:
    """Measure, print and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=600.0, help="after which no case is begun any more")
    parser.add_argument("--out", type=Path, default=measuring.RESULTS)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    results: dict[str, Any] = {"where": measuring.circumstances(), "limits": limits(), "cases": []}
    for name, num_tasks in CASES:
        if time.perf_counter() - begin < arguments.seconds:
            results["cases"].append(measure(name, num_tasks, arguments.repeats))
            measuring.write("accelerator", section(results), results, arguments.out)
    times = measuring.interleaved({"draw": sampler.drawing(sampler.bank(), EPISODES)}, 10)["draw"]
    results["episodes_per_second"] = EPISODES * sampler.STEPS / measuring.median(times)
    measuring.write("accelerator", section(results), results, arguments.out)


if __name__ == "__main__":
    main()
