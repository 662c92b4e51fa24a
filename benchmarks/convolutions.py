"""Which form of a convolution is fastest where each task has kernels of its own?

    taskset -c 0 python benchmarks/convolutions.py

One table. A row is one layer: the second-order meta-gradient through some steps of gradient descent on its kernel (and
a scale of its input, so that the input has a gradient, unless it is the image), by `vmap` over the tasks with unrolled
steps, or one task after the other (`lax.map`) with a scan over steps. Columns are forms with equal results, which is
checked first: `product` (`models.convolutions.convolve`), the same product written patches @ kernel (`plain`), with
space-to-depth before it where the stride divides the window (`depth`), with patches by one gather (`gather`), and
`lax.conv_general_dilated` (`lax`). Cells are medians of interleaved repeats and the FLOP/s reached, counted by hand:
9 products in each step and 3 after the last, 4 and 2 for the image's layer. On CPUs time is that of the process, which
a shared machine disturbs least; elsewhere it is the clock's.

A last table times the decoder's stage, 7x7x64 to 14x14x32: sub-pixel, transposed, and `lax.conv_transpose`.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import metagen_jax as mg
from metagen_jax.models.convolutions import convolve, convolve_transposed, depth_to_space

LAYERS = {  # height and width, channels, features, window, stride
    "28x28x1 to 14x14x32, 4x4": (28, 1, 32, 4, 2),
    "28x28x1 to 14x14x32, 3x3": (28, 1, 32, 3, 2),
    "14x14x32 to 7x7x64, 4x4": (14, 32, 64, 4, 2),
    "14x14x32 to 7x7x64, 3x3": (14, 32, 64, 3, 2),
    "7x7x64 to 4x4x64, 4x4": (7, 64, 64, 4, 2),
    "7x7x64 to 4x4x64, 3x3": (7, 64, 64, 3, 2),
    "14x14x32 to 14x14x32, 3x3 stride 1": (14, 32, 32, 3, 1),
}
Convolution = Callable[[jax.Array, jax.Array, int], jax.Array]
clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter


def _padded(x: jax.Array, window: int, stride: int) -> tuple[jax.Array, int]:
    size = x.shape[1]
    out = math.ceil(size / stride)
    more = max((out - 1) * stride + window - size, 0)
    return jnp.pad(x, [(0, 0), (more // 2, more - more // 2), (more // 2, more - more // 2), (0, 0)]), out


def plain(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Slices and patches @ kernel."""
    window, _, _, features = kernel.shape
    x, out = _padded(x, window, stride)
    last = (out - 1) * stride + 1
    places = [(i, j) for i in range(window) for j in range(window)]
    patches = jnp.concatenate([x[:, i : i + last : stride, j : j + last : stride] for i, j in places], axis=-1)
    return patches @ kernel.reshape(-1, features)


def depth(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Space-to-depth first, where that makes the stride one."""
    window, _, channels, features = kernel.shape
    if stride == 1 or window % stride:
        return plain(x, kernel, stride)
    x, out = _padded(x, window, stride)
    count, blocks = x.shape[1] // stride, window // stride
    x = x[:, : count * stride, : count * stride].reshape(-1, count, stride, count, stride, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, count, count, stride * stride * channels)
    kernel = kernel.reshape(blocks, stride, blocks, stride, channels, features).transpose(0, 2, 1, 3, 4, 5)
    patches = [x[:, i : i + out, j : j + out] for i in range(blocks) for j in range(blocks)]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, features)


def gather(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Patches by one gather, whose derivative is a scatter."""
    window, _, _, features = kernel.shape
    x, out = _padded(x, window, stride)
    index = stride * np.arange(out)[:, None] + np.arange(window)
    patches = x[:, index[:, None, :, None], index[None, :, None, :]]
    return patches.reshape(-1, out, out, kernel.size // features) @ kernel.reshape(-1, features)


FORMS: dict[str, Convolution] = {
    "product": partial(convolve, form="product"),
    "plain": plain,
    "depth": depth,
    "gather": gather,
    "lax": partial(convolve, form="lax"),
}


def sub_pixel(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A 3x3 convolution to four times the features, which become pixels."""
    return depth_to_space(convolve(x, kernel, 1), stride)


def meta_gradient(convolution: Convolution, stride: int, image: bool, steps: int, batching: str) -> Callable:
    """Return the meta-gradient of every task, by `vmap` with unrolled steps or by `map` with scanned ones."""

    def loss(params: dict, x: jax.Array) -> jax.Array:
        x = x if image else x * params["scale"].reshape(1, 1, 1, -1)
        return jnp.square(jax.nn.gelu(convolution(x, params["kernel"], stride))).mean()

    def adapted(params: dict, support: jax.Array, query: jax.Array) -> jax.Array:
        def step(params: dict, _: None) -> tuple[dict, None]:
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params, support)), None

        unroll = steps if batching == "vmap" else 1
        return loss(jax.lax.scan(step, params, None, steps, unroll=unroll)[0], query)

    one = jax.grad(adapted)
    return jax.jit(jax.vmap(one) if batching == "vmap" else lambda *tasks: jax.lax.map(lambda task: one(*task), tasks))


def measure(programs: dict[str, Callable], inputs: dict[str, tuple], repeats: int, limit: float) -> dict[str, float]:
    """Return the median seconds of each program; one that has taken `limit` seconds is not repeated further."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for name, program in programs.items():
        jax.block_until_ready(program(*inputs[name]))
    for _ in range(repeats):
        for name, program in programs.items():
            if len(seconds[name]) < 2 or sum(seconds[name]) < limit:
                begin = clock()
                jax.block_until_ready(program(*inputs[name]))
                seconds[name].append(clock() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def tasks(size: int, shape: tuple[int, ...], num_tasks: int, images: int) -> tuple:
    """Return the tasks' parameters, support and query."""
    rng = np.random.default_rng(0)
    kernels = rng.normal(size=(num_tasks, *shape)) / math.sqrt(math.prod(shape[:-1]))
    params = {"kernel": kernels.astype(np.float32), "scale": np.ones((num_tasks, shape[2]), np.float32)}
    x = rng.normal(size=(2, num_tasks, images, size, size, shape[2])).astype(np.float32)
    return jax.device_put((params, x[0], x[1]))


def cell(seconds: float, flops: float) -> str:
    """Return milliseconds and GFLOP/s."""
    return f"{1e3 * seconds:.1f} ({flops / seconds / 1e9:.0f})"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=16)
    parser.add_argument("--images", type=int, nargs="+", default=[5, 15])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--limit", type=float, default=4.0, help="seconds after which a form is not repeated")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    arguments = parser.parse_args()
    num_tasks, steps = arguments.tasks, arguments.steps
    print(f"jax {jax.__version__}, mg {mg.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}")
    print(f"{num_tasks} tasks, {steps} steps; ms (GFLOP/s)\n")
    print("| layer | images | tasks by | " + " | ".join(arguments.forms) + " |")
    print("|---|---|---|" + "---|" * len(arguments.forms), flush=True)
    for layer, (size, channels, features, window, stride) in LAYERS.items():
        for images in arguments.images:
            inputs = tasks(size, (window, window, channels, features), num_tasks, images)
            flops = 2 * num_tasks * images * math.ceil(size / stride) ** 2 * window**2 * channels * features
            flops *= 4 * steps + 2 if channels == 1 else 9 * steps + 3
            for batching in ("vmap", "map"):
                programs = {}
                for form in arguments.forms:
                    program = meta_gradient(FORMS[form], stride, channels == 1, steps, batching)
                    programs[form] = program.lower(*inputs).compile()
                kernels = [np.asarray(program(*inputs)["kernel"]) for program in programs.values()]
                for other in kernels[1:]:
                    np.testing.assert_allclose(other, kernels[0], rtol=1e-3, atol=1e-3 * np.abs(kernels[0]).max())
                taken = measure(programs, dict.fromkeys(programs, inputs), arguments.repeats, arguments.limit)
                cells = [cell(taken[form], flops) for form in arguments.forms]
                print(f"| {layer} | {images} | {batching} | " + " | ".join(cells) + " |", flush=True)

    stages: dict[str, tuple[Convolution, int, int]] = {
        "sub-pixel, 3x3": (sub_pixel, 3, 4 * 32),
        "transposed, 4x4": (partial(convolve_transposed, form="product"), 4, 32),
        "lax.conv_transpose, 4x4": (partial(convolve_transposed, form="lax"), 4, 32),
    }
    stages = {name: stages[name] for name in stages if "lax" in arguments.forms or "lax" not in name}
    print("\n| stage, 7x7x64 to 14x14x32 | images | tasks by | ms | GFLOP/s |\n|---|---|---|---|---|")
    for images in arguments.images:
        for batching in ("vmap", "map"):
            inputs_of = {name: tasks(7, (w, w, 64, f), num_tasks, images) for name, (_, w, f) in stages.items()}
            programs = {
                name: meta_gradient(stage, 2, False, steps, batching).lower(*inputs_of[name]).compile()
                for name, (stage, _, _) in stages.items()
            }
            if "lax" in arguments.forms:
                ours, theirs = (np.asarray(programs[n](*inputs_of[n])["kernel"]) for n in list(stages)[1:])
                np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())
            taken = measure(programs, inputs_of, arguments.repeats, arguments.limit)
            for name, (_, window, features) in stages.items():
                flops = 2 * num_tasks * images * 49 * window**2 * 64 * features * (9 * steps + 3)
                rate = flops / taken[name] / 1e9
                print(f"| {name} | {images} | {batching} | {1e3 * taken[name]:.1f} | {rate:.0f} |", flush=True)


if __name__ == "__main__":
    main()
