"""Tasks out of latent space: a family like any other, so that every learner trains on it unchanged.

    class i of a task:   anchor z_i,   images decode(vary(z_i))      (`anchors`, `variations`)

An anchor that is a real image is itself the first support image; each other image of its class is decoded from a varied
code, or with probability 1 - share is the real image once more. Then every image may be changed by `augment`, the
query's only or all. With share 0 and an augmentation this is UMTRA, with share 1 LASIUM.

No label is used: a class is an image or a code. Nothing but the images that the bank was made from is seen.

Sources: Khodadadeh, Boloni & Shah, Unsupervised Meta-Learning for Few-Shot Image Classification, 2019 (UMTRA);
Khodadadeh et al., 2021 (LASIUM). Departures: both in one family with a share; anchors without rejection.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.latent.anchors import Anchors, Draw, LatentBank
from metagen_jax.latent.generator import Generator
from metagen_jax.latent.variations import Vary
from metagen_jax.tasks.family import Spec, TaskFamily, shot_range
from metagen_jax.types import Array, Examples, Key, Params, Task

Augment = Callable[[Key, Array], Array]
"""(key, x [N, H, W, C]) -> x of the same shape."""


def latent_bank(
    generator: Generator, params: Params, images: np.ndarray | None = None, *, chunk: int = 500
) -> LatentBank:
    """Encode images [M, H, W, C] uint8 and return them with their codes, for `latent_tasks`; None for no images.

    Raises:
        ValueError: images of another form, or a generator that cannot encode them.
    """
    if images is None:
        event = jax.eval_shape(generator.decode, params, jax.ShapeDtypeStruct((1, generator.num_latents), float)).shape
        return LatentBank(params, jnp.zeros((0, generator.num_latents)), jnp.zeros((0, *event[1:]), jnp.uint8))
    if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"expected images [M, H, W, C] uint8, got {list(images.shape)} {images.dtype}")
    encode = jax.jit(lambda params, x: generator.encode(params, x, jnp.zeros((chunk, generator.num_latents))))
    codes = []
    for begin in range(0, len(images), chunk):
        piece = images[begin : begin + chunk].astype(np.float32) / 255.0
        padded = np.pad(piece, ((0, chunk - len(piece)), (0, 0), (0, 0), (0, 0)))
        codes.append(np.asarray(encode(params, padded))[: len(piece)])
    return LatentBank(params, jnp.asarray(np.concatenate(codes)), jnp.asarray(images))


def image_bank(images: np.ndarray) -> LatentBank:
    """Return images [M, H, W, C] uint8 without codes, for tasks that have no generator."""
    return LatentBank({}, jnp.zeros((len(images), 1)), jnp.asarray(images))


def latent_tasks(
    generator: Generator | None,
    bank: LatentBank,
    anchors: Draw,
    variation: Vary,
    shot: int | tuple[int, int],
    query: int,
    *,
    way: int,
    share: float = 1.0,
    augment: Augment | None = None,
    augmented: Literal["query", "all"] = "query",
    as_codes: bool = False,
) -> TaskFamily:
    """Return the family of `way`-way tasks made around anchors.

    Args:
        generator: decodes, and has encoded the bank; None where nothing is decoded (share 0, anchors that are images).
        bank: of `latent_bank`; the family's data.
        anchors: of `metagen_jax.latent.anchors`.
        variation: of `metagen_jax.latent.variations`.
        shot: support images per class, or (smallest, largest): then each task draws its number uniformly and the
            support is padded to the largest with zero weight.
        query: query images per class.
        way: classes per task.
        share: probability that an image beyond the anchor's own is decoded instead of repeated from the bank; where
            an anchor has no real image, all are decoded.
        augment: changes images at the end, `metagen_jax.tasks.deformations.affine()` for instance.
        augmented: which images it changes.
        as_codes: leave the codes [N, Z] undecoded in place of images; for learners that decode them themselves
            (`metagen_jax.latent.adversarial`). Then all is decoded, and neither share nor augment is read.

    Returns:
        A family whose support is [way * largest shot, H, W, C] and whose query is [way * query, H, W, C], ordered by
        class. A description is a seed [1]: it fixes the classes, the key of `make` the images.

    Raises:
        ValueError: a number below one, a share outside [0, 1], codes with share or augmentation.
    """
    low, high = shot_range(shot)
    if low < 1 or query < 1 or way < 1:
        raise ValueError(f"expected at least one shot, query and way, got {shot=}, {query=}, {way=}")
    if not 0 <= share <= 1 or augmented not in ("query", "all"):
        raise ValueError(f"expected a share in [0, 1] and 'query' or 'all', got {share} and {augmented!r}")
    if generator is None and (share != 0 or as_codes):
        raise ValueError(f"without a generator nothing can be decoded, so the share must be 0; got {share}")
    if as_codes and (share != 1 or augment is not None):
        raise ValueError("a task of codes is decoded whole by its learner; leave share and augment out")
    slots = high + query

    def describe(data: LatentBank, key: Key) -> Spec:
        return jax.random.randint(key, (1,), 0, jnp.iinfo(jnp.int32).max, jnp.int32)

    def codes_of(data: LatentBank, key: Key, spec: Spec) -> tuple[Anchors, Array]:
        drawn = anchors(data, jax.random.key(spec[0]), way)
        varied = variation(key, drawn.codes, slots)
        return drawn, varied.at[:, 0].set(drawn.codes)

    def make(data: LatentBank, key: Key, spec: Spec) -> Task:
        vary_key, share_key, augment_key, shot_key = jax.random.split(key, 4)
        num_shots = jax.random.randint(shot_key, (), low, high + 1)
        drawn, codes = codes_of(data, vary_key, spec)
        if as_codes:
            return _task(codes, high, num_shots)
        if generator is None:
            real = _real(data, drawn.rows)
            x = jnp.broadcast_to(real[:, None], (way, slots, *real.shape[1:]))
        else:
            x = generator.decode(data.params, codes.reshape(way * slots, -1))
            x = x.reshape(way, slots, *x.shape[1:])
            if data.images.shape[0]:
                is_real = jax.random.uniform(share_key, (way, slots)) >= share
                is_real = is_real.at[:, 0].set(True) & (drawn.rows >= 0)[:, None]
                x = jnp.where(is_real[..., None, None, None], _real(data, drawn.rows)[:, None], x)
        if augment is not None:
            first = high if augmented == "query" else 0
            changed = augment(augment_key, x[:, first:].reshape(-1, *x.shape[2:]))
            x = jnp.concatenate([x[:, :first], changed.reshape(way, slots - first, *x.shape[2:])], 1)
        return _task(x, high, num_shots)

    return TaskFamily(bank, describe, make)


def _real(data: LatentBank, rows: Array) -> Array:
    return data.images[jnp.maximum(rows, 0)].astype(jnp.float32) / 255.0


def _task(x: Array, high: int, num_shots: Array) -> Task:
    """Cut [way, high + query, ...] into the support and the query of a task, ordered by class; the rest is padding."""
    way, slots = x.shape[:2]

    def examples(x: Array, used: Array) -> Examples:
        label = jnp.repeat(jnp.arange(way, dtype=jnp.int32), x.shape[1])
        x = jnp.where(used.reshape(1, -1, *(1,) * (x.ndim - 2)), x, 0.0)
        weight = jnp.broadcast_to(used.astype(jnp.float32)[None], x.shape[:2])
        return Examples(x.reshape(-1, *x.shape[2:]), label, weight.reshape(-1))

    return Task(
        examples(x[:, :high], jnp.arange(high) < num_shots), examples(x[:, high:], jnp.ones(slots - high, bool))
    )
