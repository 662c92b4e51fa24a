"""What do products at bfloat16 cost in accuracy?

    python benchmarks/precision.py

Two questions, one table. The meta-gradient of second-order MAML on a VAE (784-64-64-16, all weights moved by SGD, 8
tasks of 5 + 10 strokes images) after 1, 5 and 20 inner steps: relative error in the Euclidean norm against everything
in float64, at the same parameters, images and noise. And the bound on unseen
characters after identical short trainings, first joint and then meta (context and prior moved through learned rates):
elbo in nats per image after five inner steps, the mean over the same episodes, and its paired difference to float32
with the standard error over characters; beside it the KL term of the last meta-steps, which says that codes are used.
"""

import argparse
import platform
import time
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metagen_jax as mg
from metagen_jax import build
from metagen_jax.adapt.starts import fixed
from metagen_jax.config import InnerConfig, ModelConfig, TrainConfig, check
from metagen_jax.evaluate import adaptation_curve
from metagen_jax.meta.batch import sum_over_tasks
from metagen_jax.meta.learners import joint, maml, task_keys
from metagen_jax.tasks.samplers import uniform
from metagen_jax.tasks.strokes import strokes
from metagen_jax.train import init_state, make_step, outer_optimizer, train

PRECISIONS = ("float32", "tf32", "bfloat16")
NUM_TASKS = 8


def errors(num_steps: int) -> dict[str, float]:
    """Return the relative error of the meta-gradient at each precision."""
    family = strokes(5, 10)
    keys = jax.random.split(jax.random.key(1), NUM_TASKS)
    specs = jax.vmap(family.describe, in_axes=(None, 0))(family.data, keys)
    tasks = jax.jit(jax.vmap(family.make, in_axes=(None, 0, 0)))(family.data, keys, specs)
    normal = jax.random.normal
    single = lambda key, shape: normal(key, shape, jnp.float32)  # or float64 would meet other noise  # noqa: E731

    def gradient(precision: str, dtype: type) -> np.ndarray:
        network = ModelConfig(hidden=(64, 64), latents=8, context=0, precision=precision)
        model = build.model(check(TrainConfig(network=network)), (28, 28, 1), True)
        learner = maml(model.model, fixed(optax.sgd(1e-3)), num_steps)
        initial = jax.jit(maml(model.model, fixed(optax.sgd(1e-3)), num_steps).init)(jax.random.key(0))
        cast = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), tree)  # noqa: E731
        examples = [part._replace(x=cast(part.x), weight=cast(part.weight)) for part in tasks]
        weights = np.full(NUM_TASKS, 1 / NUM_TASKS, dtype)
        arguments = (
            cast(initial),
            task_keys(jax.random.key(3), NUM_TASKS),
            tasks._replace(support=examples[0], query=examples[1]),
            weights,
        )
        with jax.enable_x64(dtype is np.float64), mock.patch("jax.random.normal", single):
            direction = jax.jit(sum_over_tasks(learner.field))(*arguments)[0]
        leaves = jax.tree.leaves(direction)
        if {leaf.dtype for leaf in leaves} != {np.dtype(dtype)}:
            raise TypeError(f"expected gradients of {np.dtype(dtype)}, got {sorted({str(x.dtype) for x in leaves})}")
        return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])

    exact = gradient("float32", np.float64)
    return {
        precision: float(np.linalg.norm(gradient(precision, np.float32) - exact) / np.linalg.norm(exact))
        for precision in PRECISIONS
    }


class Trained(NamedTuple):
    """What a training came to."""

    elbo: np.ndarray  # [C] nats per image of each unseen character
    kl: float  # nats per image, over the last meta-steps
    seconds: float  # of the process, with compilation


def trained(precision: str, seed: int, joint_steps: int, meta_steps: int, num_classes: int) -> Trained:
    """Train jointly, then meta-train, and adapt to unseen characters."""
    network = ModelConfig(hidden=(128, 128), latents=16, context=32, precision=precision)
    config = check(TrainConfig(network=network, inner=InnerConfig(steps=5)))
    model = build.model(config, (28, 28, 1), True)
    learner = build.learner(config, model)
    warm = joint(model.model, fixed(optax.sgd(1e-3)), 0, learns=build.roles(config, model).joint)
    family, unseen = strokes(5, 10), strokes(5, 10, split="test")
    sampler = uniform(family, 16)
    begin = time.process_time()
    rule = outer_optimizer(2e-3, joint_steps, warmup=20, clip=100.0)
    first = init_state(warm, sampler, rule, jax.random.key(seed))
    first = train(make_step(warm, family, sampler, rule), first, family.data, joint_steps)
    rule = outer_optimizer(1e-3, meta_steps, warmup=20, clip=100.0, rate_of_rates=2e-2)
    meta = jax.jit(learner.init)(jax.random.key(seed + 100)) | first.average
    state = init_state(learner, sampler, rule, jax.random.key(seed + 200), meta=meta)
    kl: list[float] = []
    state = train(
        make_step(learner, family, sampler, rule),
        state,
        family.data,
        meta_steps,
        on_chunk=lambda state, metrics: kl.append(float(np.mean(metrics["kl"]))),
    )
    seconds = time.process_time() - begin
    specs = jax.vmap(unseen.describe, in_axes=(None, 0))(unseen.data, jax.random.split(jax.random.key(7), num_classes))
    key = jax.random.key(8)
    curve = adaptation_curve(learner.path, model.density, unseen, state.average, specs, key, steps=(5,), num_samples=50)
    return Trained(np.asarray(curve.elbo)[:, -1], kl[-1], seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inner-steps", type=int, nargs="*", default=[1, 5, 20])
    parser.add_argument("--joint-steps", type=int, default=2000)
    parser.add_argument("--meta-steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--classes", type=int, default=256)
    arguments = parser.parse_args()
    print(f"jax {jax.__version__}, mg {mg.__version__}, {jax.devices()[0].device_kind}, {platform.machine()}\n")
    print("| measure | " + " | ".join(PRECISIONS) + " |\n|---|" + "---|" * len(PRECISIONS))
    for num_steps in arguments.inner_steps:
        row = errors(num_steps)
        cells = [f"{row[precision]:.1e}" for precision in PRECISIONS]
        print(f"| error of the meta-gradient, {num_steps} steps | " + " | ".join(cells) + " |", flush=True)
    names = [precision for precision in PRECISIONS if precision != "tf32" or jax.default_backend() != "cpu"]
    for seed in range(arguments.seeds):
        sizes = (arguments.joint_steps, arguments.meta_steps, arguments.classes)
        runs = {name: trained(name, seed, *sizes) for name in names}
        cells = []
        for precision in PRECISIONS:
            if precision not in runs:
                cells.append("as float32")
                continue
            run = runs[precision]
            apart = run.elbo - runs["float32"].elbo
            error = apart.std() / np.sqrt(len(apart))
            more = f"{apart.mean():+.2f} ± {error:.2f}" if precision != "float32" else "-"
            cells.append(f"{run.elbo.mean():.2f} ({more}; KL {run.kl:.1f}; {run.seconds:.0f} s)")
        print(f"| elbo after training, seed {seed} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
