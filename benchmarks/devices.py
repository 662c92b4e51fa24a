"""How does a meta-step scale over devices, and what do they exchange?

    taskset -c 0,1 python benchmarks/devices.py   # 3 min; writes benchmarks/results/devices.md

Eight virtual devices of a CPU, each with one thread, share the cores that there are, so that more devices than cores
show what spreading costs and not what it gains. The same 32 tasks are spread over 1, 2, 4 and 8 of them; medians of
interleaved runs, without compiling. The exchanges between devices are counted in the compiled program.
"""

# ruff: noqa: E402
import argparse
import os
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import measuring
import numpy as np

from metagen_jax import build
from metagen_jax.config import DataConfig, InnerConfig, ModelConfig, OuterConfig, TrainConfig, check
from metagen_jax.sharding import collectives, everywhere, here, task_mesh
from metagen_jax.train import init_state, run_chunk

NUM_TASKS, NUM_STEPS = 32, 5
COUNTS = (1, 2, 4, 8)


def main() -> None:
    """Time, count, compare what was learned, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=measuring.RESULTS)
    arguments = parser.parse_args()
    config = check(
        TrainConfig(
            data=DataConfig("glyphs"),
            network=ModelConfig(hidden=(256, 256), latents=16),
            inner=InnerConfig(steps=3),
            outer=OuterConfig(steps=100, tasks=NUM_TASKS, warm_start=0, task_chunk=1),
            shots=(5, 5),
            query=5,
        )
    )
    calls, exchanged, learned = {}, {}, {}
    for count in COUNTS:
        mesh = task_mesh(NUM_TASKS, count)
        training = build.training(config, mesh=mesh)
        state = init_state(training.learner, training.sampler, training.optimizer, jax.random.key(0))
        state, data = everywhere((state, training.family.data), mesh)
        program = jax.jit(run_chunk(training.step, NUM_STEPS).__wrapped__).lower(state, data).compile()
        exchanged[count] = collectives(program)
        learned[count] = here(program(state, data)[0].meta)
        calls[str(count)] = lambda program=program, state=state, data=data: program(state, data)
    times = measuring.interleaved(calls, arguments.repeats, seconds=150.0)
    alone, rows = measuring.median(times["1"]), []
    cores = len(os.sched_getaffinity(0))
    for count in COUNTS:
        seconds = measuring.median(times[str(count)])
        apart = [
            float(np.abs(a - b).max() / np.abs(b).max())
            for a, b in zip(jax.tree.leaves(learned[count]), jax.tree.leaves(learned[1]), strict=True)
            if np.abs(b).max() > 0
        ]
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(exchanged[count].items())) or "none"
        rows.append(
            [
                str(count),
                f"{1e3 * seconds / NUM_STEPS:.1f}",
                measuring.spread([value / NUM_STEPS for value in times[str(count)]]),
                f"{NUM_TASKS * NUM_STEPS / seconds:.0f}",
                f"{alone / seconds:.2f}",
                f"{alone / seconds / min(count, cores):.2f}",
                kinds,
                f"{max(apart):.0e}" if count > 1 else "-",
            ]
        )
    header = ["devices", "ms a meta-step", "interquartile", "tasks/s", "speed-up", "of devices or cores"]
    text = (
        f"{measuring.circumstances()}\n\n"
        f"{measuring.markdown([*header, 'exchanges a meta-step', 'parameters apart'], rows)}\n\n"
        f"Second-order MAML of a dense VAE (256, 256), {NUM_TASKS} tasks of 5 + 5 images, 3 inner steps. In the last "
        f"column, the largest difference after {NUM_STEPS} meta-steps, relative to the largest parameter of its array: "
        "sums over tasks have another order."
    )
    measuring.write("devices", text, {"times": times, "exchanged": exchanged}, arguments.out)


if __name__ == "__main__":
    main()
