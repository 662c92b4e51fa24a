"""How the benchmarks measure: interleaved repeats, what the machine can do at most, tables with their circumstances."""

import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import metagen_jax as mg

RESULTS = Path(__file__).parent / "results"


def interleaved(
    calls: Mapping[str, Callable[[], Any]], repeats: int, *, seconds: float = 60.0
) -> dict[str, list[float]]:
    """Return wall seconds of each call: A B C, A B C, ..., after one warm-up round; each is waited for.

    Rounds stop after `repeats`, or after five once `seconds` have passed.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for number in range(repeats):
        if number >= 5 and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return times


def limits() -> dict[str, float]:
    """Measure what this machine does at most: products of 1024 x 1024 float32 matrices, and a pass over 256 MB."""
    matrix, long = jnp.ones((1024, 1024)), jnp.ones(32 * 2**20)
    product = jax.jit(lambda a: a @ a).lower(matrix).compile()
    add = jax.jit(lambda a: a + 1).lower(long).compile()
    times = interleaved({"product": lambda: product(matrix), "add": lambda: add(long)}, 15)
    return {
        "product_gflops": 2 * 1024**3 / min(times["product"]) / 1e9,
        "bandwidth_gbytes": 2 * long.nbytes / min(times["add"]) / 1e9,
    }


def resident_growth(call: Callable[[], Any]) -> float:
    """Return by how many bytes the resident memory of this process grows at most while the call runs (Linux)."""
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _field(status, "VmRSS")
    jax.block_until_ready(call())
    return float(_field(status, "VmHWM") - before)


def _field(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def median(times: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(times)


def spread(times: Sequence[float]) -> str:
    """Return the interquartile range in milliseconds."""
    low, _, high = statistics.quantiles(times, n=4)
    return f"{1e3 * low:.1f} to {1e3 * high:.1f}"


def circumstances(**more: str) -> str:
    """Return the line that says what was measured where."""
    device = jax.devices()[0]
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    name = cpu if device.platform == "cpu" else device.device_kind
    cores = f"{len(_affinity())} core(s)" if device.platform == "cpu" else device.platform
    versions = {"jax": jax.__version__, "metagen_jax": mg.__version__, "Python": platform.python_version(), **more}
    said = ", ".join(f"{package} {version}" for package, version in versions.items())
    return f"{datetime.date.today()}, {name}, {cores}, {said}; `python {' '.join(sys.argv)}`"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def write(name: str, text: str, numbers: Any, out: Path = RESULTS) -> None:
    """Print a section, and keep it with its raw numbers."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    (out / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    print(f"\n{text}\n", flush=True)


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
