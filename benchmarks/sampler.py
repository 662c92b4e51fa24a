"""How many episodes a second are drawn on the device?

    taskset -c 0 python benchmarks/sampler.py

Episodes are drawn inside jit from a bank of 964 classes of 20 images of 28x28 (the size of Omniglot's training part),
5 support and 15 query images without replacement, many meta-steps per dispatch; all pixels are consumed, so nothing
is left out. Beside it, the share of a meta-step of workload W1 that this is.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import agreement
import jax
import jax.numpy as jnp
import measuring
import numpy as np
import optax
from workloads import w1

import metagen_jax as mg
from metagen_jax.meta.batch import sum_over_tasks

STEPS = 20


def bank() -> mg.TaskFamily:
    """Return tasks of random pixels."""
    pixels = (np.random.default_rng(0).random((964 * 20, 28, 28, 1)) < 0.2).astype(np.uint8) * 255
    names, labels = [f"class {index}" for index in range(964)], np.repeat(np.arange(964), 20)
    images = mg.image_set("noise", pixels, labels, names, groups=[""] * 964, note="random pixels")
    return mg.episodes(images, shot=5, query=15)


def drawing(family: mg.TaskFamily, count: int) -> Callable[[], mg.types.Array]:
    """Return the compiled call that draws so many tasks in each of `STEPS` steps and consumes all their pixels."""
    sampler = mg.uniform(family, count)

    def draw(key: mg.Key, data: object) -> mg.types.Array:
        def step(state: object, key: mg.Key) -> tuple[object, mg.types.Array]:
            propose_key, make_key = jax.random.split(key)
            specs, weights = sampler.propose(state, data, propose_key, {})
            keys = jax.random.split(make_key, len(weights))
            tasks = jax.vmap(family.make, in_axes=(None, 0, 0))(data, keys, specs)
            return state, tasks.support.x.sum() + tasks.query.x.sum()

        return jax.lax.scan(step, sampler.init(key), jax.random.split(key, STEPS))[1]

    compiled = jax.jit(draw).lower(jax.random.key(0), family.data).compile()
    return lambda: compiled(jax.random.key(0), family.data)


def main() -> None:
    """Measure, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=measuring.RESULTS)
    arguments = parser.parse_args()
    family, calls, counts = bank(), {}, (16, 256)
    for count in counts:
        calls[f"{count}"] = drawing(family, count)
    workload = w1()
    given = agreement.problem(workload, 16)
    learner = mg.maml(workload.model, mg.fixed(optax.sgd(workload.rate)), workload.num_steps)
    total = jax.jit(sum_over_tasks(learner.field, chunk="auto"))
    calls["meta-step"] = lambda: total(given.params, given.keys, given.tasks, jnp.full(16, 1 / 16))
    seconds = {name: measuring.median(times) for name, times in measuring.interleaved(calls, arguments.repeats).items()}
    rates = {count: STEPS * count / seconds[f"{count}"] for count in counts}
    share = seconds["16"] / STEPS / seconds["meta-step"]
    rows = [[f"{count} tasks at a time", f"{rate:,.0f}", f"{20 * rate:,.0f}"] for count, rate in rates.items()]
    text = (
        f"{measuring.circumstances()}\n\n{measuring.markdown(['', 'episodes/s', 'images/s'], rows)}\n\n"
        f"Drawing 16 tasks takes {100 * share:.1f} % of the time of the meta-step of W1 that learns from them."
    )
    measuring.write("sampler", text, {"episodes_per_second": rates, "share_of_meta_step": share}, arguments.out)


if __name__ == "__main__":
    main()
