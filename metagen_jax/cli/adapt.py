"""`metagen adapt RUN --support DIR`: a handful of a user's images in, new ones of the same kind out."""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from metagen_jax import report
from metagen_jax.cli.runs import load
from metagen_jax.config import given
from metagen_jax.exporting import SUFFIX, check_installed, export_sampler
from metagen_jax.models.classifier import Classifier
from metagen_jax.tasks.resize import INK
from metagen_jax.tasks.sources import read_images
from metagen_jax.train import Divergence
from metagen_jax.types import Examples

REPEATS = 20  # of which the median time is reported


@dataclasses.dataclass(frozen=True)
class Adapt:
    """Adapt a trained model to a handful of images of your own, and draw new ones."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help="the run's folder, or runs/latest")]
    support: Path
    """folder with the images (PNG, JPEG, ... or .npy), all of one kind; any size, dark on light or light on dark"""
    num: int = 25
    """how many new images"""
    out: Path = Path("grid.png")
    """where the picture goes"""
    export: Path | None = None
    """also write the adapted generator, which makes --num images a call and needs jax alone, as this .jaxexport file
    (extra: export)"""
    force: bool = False
    """write over the picture, and the exported generator, if they exist"""
    seed: int = 0
    """of the new images"""


def run(arguments: Adapt) -> None:
    """Carry out the command; nothing is written unless everything went well."""
    a = arguments
    if a.num < 1:
        raise ValueError(f"--num must be at least 1, got {a.num}")
    if a.out.suffix.lower() != ".png":
        raise ValueError(f"--out must be a .png file, got {a.out}")
    if a.out.exists() and not a.force:
        raise ValueError(f"{a.out} exists already; choose another --out, or write over it with --force")
    if a.export is not None:
        _check_export(a.export, a.force)
    finished = load(a.run)
    if isinstance(finished.built, Classifier):
        raise ValueError(f"{a.run} is a classifier, which makes no images; measure it: metagen evaluate {a.run}")
    provenance = finished.provenance
    pixels = read_images(a.support, provenance.event, threshold=INK if provenance.binary else None)
    x = jnp.asarray(pixels, jnp.float32) / 255
    support = Examples(x, jnp.zeros(len(x), jnp.int32), jnp.ones(len(x)))
    adapt_key, sample_key = jax.random.split(jax.random.key(a.seed))

    (params, trace), compile_seconds, milliseconds = _timed(finished.learner.adapt, finished.meta, adapt_key, support)
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params)):
        raise Divergence(
            f"adapting to the {len(x)} images in {a.support} diverged: the run's inner rates are too large for them; "
            "train with a smaller --inner.rate, or on data that are more like these"
        )
    samples = jax.jit(finished.built.model.sample, static_argnums=2)(params, sample_key, a.num)
    program = None if a.export is None else export_sampler(finished.built.model.sample, params, a.num)
    report.save(report.support_and_samples(np.asarray(x), np.asarray(samples)), a.out)

    steps, shots = given(finished.config.inner.steps), finished.config.shots
    print(
        f"adapted to {len(x)} images in {milliseconds:.1f} ms ({steps} steps; compiled once in {compile_seconds:.1f} s)"
    )
    if steps and "loss" in trace:
        loss = np.asarray(trace["loss"])
        print(f"loss on them: {loss[0]:.2f} nats per image before adapting, {loss[-1]:.2f} before the last step")
    if not shots[0] <= len(x) <= shots[1]:
        print(f"note: the run was trained with {shots[0]} to {shots[1]} images a task")
    print(f"{a.num} new images: {a.out}")
    if a.export is not None and program is not None:
        _write(a.export, program)
        print(f"the adapted generator, {a.num} images a call ({len(program):,} bytes): {a.export}")


def _check_export(path: Path, force: bool) -> None:
    if path.suffix != SUFFIX:
        raise ValueError(f"--export must be a {SUFFIX} file, got {path}")
    if path.exists() and not force:
        raise ValueError(f"{path} exists already; choose another --export, or write over it with --force")
    check_installed()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
    """Return the result, the seconds of compiling, and the median milliseconds of a call after that."""
    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compile_seconds = time.perf_counter() - begin
    arguments = jax.block_until_ready(arguments)
    times, result = [], None
    for _ in range(REPEATS):
        begin = time.perf_counter()
        result = jax.block_until_ready(compiled(*jax.tree.map(_clone, arguments)))
        times.append(time.perf_counter() - begin)
    return result, compile_seconds, 1e3 * float(np.median(times))


def _clone(leaf: Any) -> Any:
    return jax.random.clone(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
