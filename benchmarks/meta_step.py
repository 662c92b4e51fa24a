"""What does differentiating a batch of tasks as one game save, and how long does adapting to five images take?

    python benchmarks/meta_step.py

One table. Rows are the same meta-gradient (checked to 1e-4 before anything is timed) of second-order MAML on a VAE
(784-256-256-32, context 256, 5 support and 10 query images, 5 inner steps), by two routes: each task's field and
then their weighted sum, or the field of the weighted sum. Where only a context and the prior move inside, the large
kernels are shared, and the second route has one gradient of each instead of one for each task. Repeats are interleaved;
medians; a ratio is of medians of one run.
"""

import argparse
import statistics
import time

import jax
import numpy as np

import metagen_jax as mg
from metagen_jax import build
from metagen_jax.config import ModelConfig, TrainConfig, check
from metagen_jax.meta.batch import sum_over_tasks
from metagen_jax.meta.learners import task_keys
from metagen_jax.tasks.strokes import strokes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    config = check(TrainConfig(network=ModelConfig(hidden=(256, 256), context=256)))
    model = build.model(config, (28, 28, 1), True)
    learner = build.learner(config, model)
    meta = learner.init(jax.random.key(0))
    family = strokes(5, 10)
    specs = jax.vmap(family.describe, in_axes=(None, 0))(
        family.data, jax.random.split(jax.random.key(1), arguments.tasks)
    )
    keys = jax.random.split(jax.random.key(2), arguments.tasks)
    tasks = jax.jit(jax.vmap(family.make, in_axes=(None, 0, 0)))(family.data, keys, specs)
    weights = jax.numpy.full(arguments.tasks, 1 / arguments.tasks)

    plain = lambda meta, key, task: learner.field(meta, key, task)  # a field that hides its game  # noqa: E731
    routes = {
        "each task, then the sum": jax.jit(sum_over_tasks(plain)),
        "the sum as one game": jax.jit(sum_over_tasks(learner.field)),
    }
    inputs = (meta, task_keys(jax.random.key(3), arguments.tasks), tasks, weights)
    compiled, compile_seconds = {}, {}
    for name, route in routes.items():
        begin = time.perf_counter()
        compiled[name] = route.lower(*inputs).compile()
        compile_seconds[name] = time.perf_counter() - begin
    first, second = (jax.tree.leaves(route(*inputs)[0]) for route in compiled.values())
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(1.0, float(abs(b).max())))

    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(arguments.repeats):
        for name, route in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(route(*inputs))
            seconds[name].append(time.perf_counter() - begin)
    support = jax.tree.map(lambda leaf: leaf[0], tasks.support)
    adapt = jax.jit(learner.adapt).lower(meta, jax.random.key(4), support).compile()
    latency = []
    for _ in range(arguments.repeats):
        begin = time.perf_counter()
        jax.block_until_ready(adapt(meta, jax.random.key(4), support))
        latency.append(time.perf_counter() - begin)

    print(f"jax {jax.__version__}, mg {mg.__version__}, {jax.devices()[0].device_kind}, {arguments.tasks} tasks\n")
    print("| meta-gradient | median ms | interquartile range | temporary MB | compile s | speed |")
    print("|---|---|---|---|---|---|")
    slow = statistics.median(seconds["each task, then the sum"])
    for name, times in seconds.items():
        low, median, high = statistics.quantiles(times, n=4)
        memory = compiled[name].memory_analysis().temp_size_in_bytes / 1e6
        spread, took = f"{1e3 * low:.1f} to {1e3 * high:.1f}", compile_seconds[name]
        print(f"| {name} | {1e3 * median:.1f} | {spread} | {memory:.0f} | {took:.1f} | {slow / median:.1f}x |")
    print(f"\nadapting to 5 images by 5 steps: {1e3 * statistics.median(latency):.2f} ms (median, compiled before)")


if __name__ == "__main__":
    main()
