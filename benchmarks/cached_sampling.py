"""What the cache of a causal network is worth: milliseconds of a sample with it, and with one evaluation a pixel.

    taskset -c 0 python benchmarks/cached_sampling.py   # 2 min; writes benchmarks/results/cached_sampling.md

Both give the same images for the same noise, which is checked before anything is timed. 28x28 pixels, six blocks of 32
features; medians of interleaved runs, without compiling.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import metagen_jax as mg
from metagen_jax.report import table
from metagen_jax.types import Array, Key, Params

EVENT = (28, 28, 1)


def uncached(built: mg.Autoregressive, params: Params, key: Key, num: int) -> Array:
    """Return samples, by an evaluation of the whole network for each pixel."""
    height, width, _ = EVENT

    def one(x: Array, number: Array) -> tuple[Array, None]:
        i, j = number // width, number % width
        said = built.logits(params, x)[:, i, j]
        noise = jax.random.uniform(jax.random.fold_in(key, number), (num,))
        return x.at[:, i, j, 0].set((noise < jax.nn.sigmoid(said)).astype(x.dtype)), None

    return jax.lax.scan(one, jnp.zeros((num, *EVENT)), jnp.arange(height * width))[0]


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cached_sampling.md")
    arguments = parser.parse_args()
    built = mg.autoregressive(EVENT)
    params = jax.tree.map(lambda leaf: leaf + 0.02, built.model.init(jax.random.key(0)))
    lines = []
    for num in (1, 16):
        ways = {
            "cache": jax.jit(lambda params, key, num=num: built.model.sample(params, key, num)),
            "no cache": jax.jit(lambda params, key, num=num: uncached(built, params, key, num)),
        }
        made = [np.asarray(way(params, jax.random.key(1))) for way in ways.values()]
        share = float((made[0] == made[1]).mean())
        assert share > 0.99, share  # rounding may turn a pixel, and those after it
        evaluate = jax.jit(built.logits)
        x = jnp.asarray(made[0])
        jax.block_until_ready(evaluate(params, x))
        times: dict[str, list[float]] = {**{name: [] for name in ways}, "one evaluation": []}
        for repeat in range(arguments.repeats):
            for name, way in ways.items():
                begin = time.perf_counter()
                jax.block_until_ready(way(params, jax.random.key(repeat)))
                times[name].append(1e3 * (time.perf_counter() - begin))
            begin = time.perf_counter()
            jax.block_until_ready(evaluate(params, x))
            times["one evaluation"].append(1e3 * (time.perf_counter() - begin))
        cache, plain, once = (float(np.median(times[name])) for name in ("cache", "no cache", "one evaluation"))
        lines.append([str(num), f"{cache:.0f}", f"{plain:.0f}", f"{plain / cache:.0f}", f"{once:.1f}"])
    header = ["images", "cache, ms", "no cache, ms", "times faster", "one evaluation, ms"]
    text = f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n\n" + table(header, lines) + "\n"
    arguments.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
