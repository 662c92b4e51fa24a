"""`strokes`: procedural pen characters, sampled on the device inside jit; unlimited classes, no storage.

A class id, folded into a base key, gives one latent character: one to five cubic Bezier strokes, the later ones mostly
joined to a point of an earlier one. A drawing is that character with jittered control points under a small affine map.
Image, pen trajectory and stroke program all come from the drawing's `StrokeProgram`, so that models of images and of
sequences share their classes.

    point(t) = (1-t)^3 c0 + 3 t (1-t)^2 c1 + 3 t^2 (1-t) c2 + t^3 c3
    ink(p) = min over strokes, t |p - point(t)| <= width / 2

All randomness of a character, and of a drawing, is one vector, cut into pieces: each further `jax.random` call would
add to the compile time. Coordinates: the unit square, x to the right, y downwards.

Shape letters: S strokes (5, unused ones masked), P points of a stroke, H = W = size.

Source: after Lake, Salakhutdinov, Tenenbaum, Human-level concept learning through probabilistic program induction,
2015 (strokes, relations, motor variance), without its primitives learned from data.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.tasks.family import Spec, TaskFamily, shot_range
from metagen_jax.types import Array, Examples, Key, Task

MAX_STROKES = 5
POINTS = 12  # per stroke, where an image is rendered
EXTENT = 0.68  # longer side of a character's box
PEN = 0.072  # mean width of the pen, 2 pixels of 28
JITTER = 0.027  # standard deviation of a control point between drawings
NUM_STROKES = (0.08, 0.27, 0.32, 0.22, 0.11)  # probability of one to five strokes
FREE = 0.2  # probability that a later stroke is not joined to an earlier one

DRAWING = MAX_STROKES * 8 + 7  # random numbers of a drawing
HELD_OUT = 2**30  # training ids are below, held-out ids from here to 2**31
CLASSES = {"train": (0, HELD_OUT), "validation": (HELD_OUT, HELD_OUT + 2**29), "test": (HELD_OUT + 2**29, 2**31)}


class StrokeProgram(NamedTuple):
    """A character, or one drawing of it."""

    control: Array  # [S, 4, 2] float32, Bezier control points (x, y)
    used: Array  # [S] bool, a prefix
    width: Array  # [] float32, of the pen


def character(key: Key) -> StrokeProgram:
    """Return the latent character of a key, its box centred and EXTENT long on the longer side."""
    noise = jax.random.normal(key, (1 + 11 * MAX_STROKES,))
    uniform = jax.scipy.stats.norm.cdf(noise)
    num = 1 + jnp.searchsorted(jnp.asarray(np.cumsum(NUM_STROKES)[:-1], jnp.float32), uniform[0])
    used = jnp.arange(MAX_STROKES) < num
    noise, uniform = noise[1:].reshape(MAX_STROKES, 11), uniform[1:].reshape(MAX_STROKES, 11)

    def stroke(control: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        index, z, u = inputs  # entries 0 to 5 are used as uniform numbers, 6 to 10 as normal ones
        earlier = jnp.floor(u[0] * index).astype(jnp.int32)
        spot = jnp.where(u[1] < 0.35, 0.0, jnp.where(u[1] > 0.8, 1.0, u[2]))  # the ends are favoured
        joint = _bezier(spot) @ control[earlier]
        start = jnp.where((index == 0) | (u[3] < FREE), 0.3 * z[6:8], joint)
        # A joined stroke leaves its parent at 50 to 130 degrees, so that it does not run along it; pens favour the
        # axes and diagonals, so a heading is drawn half-way to the nearest multiple of 45 degrees.
        tangent = _tangent(spot) @ control[earlier]
        side = jnp.where(u[4] < 0.5, -1.0, 1.0) * (0.28 + 0.88 * jnp.abs(u[4] - 0.5)) * jnp.pi
        away = jnp.arctan2(tangent[1], tangent[0]) + side
        heading = jnp.where((index == 0) | (u[3] < FREE), 2 * jnp.pi * u[4], away)
        nearest = jnp.round(heading / (jnp.pi / 4)) * (jnp.pi / 4)
        heading = 0.5 * (heading + nearest)
        length = 0.6 * jnp.exp(0.35 * z[8])
        straight = (u[5] < 0.4) & (num > 1)  # two strokes of five; a character that is one line says little
        bend = jnp.where(straight, 0.12, 1.3)
        angles = heading + bend * jnp.stack([-z[9], jnp.zeros(()), z[9] + 0.6 * z[10]])
        legs = length / 3 * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
        points = start[None, :] + jnp.concatenate([jnp.zeros((1, 2)), jnp.cumsum(legs, axis=0)])
        return control.at[index].set(points), None

    empty = jnp.zeros((MAX_STROKES, 4, 2))
    control, _ = jax.lax.scan(stroke, empty, (jnp.arange(MAX_STROKES), noise, uniform))
    points = _points(control, 8)
    seen = used[:, None, None]
    low, high = jnp.where(seen, points, jnp.inf).min((0, 1)), jnp.where(seen, points, -jnp.inf).max((0, 1))
    scale = EXTENT / jnp.maximum((high - low).max(), 0.1)
    centred = 0.5 + (control - ((low + high) / 2)[None, None, :]) * scale
    return StrokeProgram(jnp.where(seen, centred, 0.5), used, jnp.float32(PEN))


def draw(program: StrokeProgram, key: Key) -> StrokeProgram:
    """Return one drawing of a character: jittered control points, a small affine map, a pen of some width."""
    return _drawing(program, jax.random.normal(key, (DRAWING,)))


def trajectory(program: StrokeProgram, points_per_stroke: int = POINTS) -> Array:
    """Return the pen's path [S * P, 3]: x, y, and pen-up.

    Pen-up is 1 at a stroke's last point (the pen leaves the paper after it) and 0 before; a stroke that is not used
    has pen-up 1 throughout and stays where the pen was last lifted, so that it draws nothing.

    Raises:
        ValueError: fewer than two points per stroke.
    """
    if points_per_stroke < 2:
        raise ValueError(f"a stroke needs at least 2 points, got points_per_stroke={points_per_stroke}")
    points = _points(program.control, points_per_stroke)
    last = points[program.used.sum() - 1, -1]
    points = jnp.where(program.used[:, None, None], points, last)
    up = (jnp.arange(points_per_stroke) == points_per_stroke - 1)[None, :] | ~program.used[:, None]
    return jnp.concatenate([points, up[..., None].astype(points.dtype)], axis=-1).reshape(-1, 3)


def render(program: StrokeProgram, size: int = 28) -> Array:
    """Return the image [size, size, 1], 1.0 where a pixel's centre is within half a pen width of a stroke, else 0.0."""
    points = _points(program.control, POINTS)
    centre = (jnp.arange(size) + 0.5) / size
    pixel_x, pixel_y = centre[None, :, None], centre[:, None, None]
    start, leg = points[:, :-1].reshape(-1, 2), jnp.diff(points, axis=1).reshape(-1, 2)
    from_x, from_y = pixel_x - start[None, None, :, 0], pixel_y - start[None, None, :, 1]
    leg_x, leg_y = leg[None, None, :, 0], leg[None, None, :, 1]
    along = (from_x * leg_x + from_y * leg_y) / jnp.maximum(leg_x**2 + leg_y**2, 1e-12)
    along = jnp.clip(along, 0.0, 1.0)
    squared = (from_x - along * leg_x) ** 2 + (from_y - along * leg_y) ** 2
    seen = jnp.repeat(program.used, POINTS - 1)[None, None, :]
    nearest = jnp.where(seen, squared, jnp.inf).min(axis=-1)
    return (nearest <= (program.width / 2) ** 2).astype(jnp.float32)[..., None]


def strokes(
    shot: int | tuple[int, int],
    query: int,
    *,
    way: int = 1,
    split: Literal["train", "validation", "test"] = "train",
    size: int = 28,
    seed: int = 0,
) -> TaskFamily:
    """Return the family of tasks on procedural characters.

    Args:
        shot: support drawings per class, or (smallest, largest): then each task draws its number uniformly and the
            support is padded to the largest.
        query: query drawings per class, drawn independently of the support.
        way: classes per task. They are drawn independently: of way classes out of 2**29 or more, two are equal with a
            probability below way**2 / 2**30.
        split: which class ids; training ids lie in [0, 2**30), held-out ids in [2**30, 2**31).
        size: side of the images.
        seed: another seed is another world of characters.

    Returns:
        A family whose support is [way * largest shot, size, size, 1] and whose query is [way * query, size, size, 1],
        both ordered by class; its data is the base key.

    Raises:
        ValueError: an unknown split, or a count out of range.
    """
    low, high = shot_range(shot)
    if query < 1 or way < 1 or size < 1:
        raise ValueError(f"expected at least one query image, way and pixel, got query={query}, way={way}, size={size}")
    if split not in CLASSES:
        raise ValueError(f"unknown split {split!r}; expected one of {', '.join(CLASSES)}")
    first, end = CLASSES[split]
    slots = high + query

    def describe(data: Key, key: Key) -> Spec:
        bits = jax.random.bits(key, (way,), jnp.uint32)
        return (first + (bits % jnp.uint32(end - first)).astype(jnp.int32)).astype(jnp.int32)

    def one_class(data: Key, noise: Array, which: Array) -> Array:
        program = character(jax.random.fold_in(data, which))
        return jax.vmap(lambda row: render(_drawing(program, row), size))(noise)

    def make(data: Key, key: Key, spec: Spec) -> Task:
        noise = jax.random.normal(key, (1 + way * slots * DRAWING,))
        share = jax.scipy.stats.norm.cdf(noise[0])  # uniform in (0, 1)
        num_shots = jnp.minimum(low + jnp.floor(share * (high - low + 1)).astype(jnp.int32), high)
        noise = noise[1:].reshape(way, slots, DRAWING)
        x = jax.vmap(one_class, in_axes=(None, 0, 0))(data, noise, spec)
        used = (jnp.arange(slots) < num_shots) | (jnp.arange(slots) >= high)
        x = jnp.where(used[None, :, None, None, None], x, 0.0)
        label = jnp.broadcast_to(jnp.arange(way, dtype=jnp.int32)[:, None], (way, slots))
        both = Examples(x, label, jnp.broadcast_to(used.astype(jnp.float32), (way, slots)))
        support = jax.tree.map(lambda leaf: leaf[:, :high].reshape(way * high, *leaf.shape[2:]), both)
        return Task(support, jax.tree.map(lambda leaf: leaf[:, high:].reshape(way * query, *leaf.shape[2:]), both))

    return TaskFamily(jax.random.key(seed), describe, make)


def _drawing(program: StrokeProgram, noise: Array) -> StrokeProgram:
    """Return the drawing that standard normal noise [DRAWING] stands for."""
    noise = jnp.clip(noise, -2.5, 2.5)
    jitter, rest = noise[: MAX_STROKES * 8].reshape(MAX_STROKES, 4, 2), noise[MAX_STROKES * 8 :]
    angle, shear = 0.13 * rest[0], 0.18 * rest[1]
    rotation = jnp.stack([jnp.cos(angle), -jnp.sin(angle), jnp.sin(angle), jnp.cos(angle)]).reshape(2, 2)
    sheared = jnp.stack([jnp.ones(()), shear, jnp.zeros(()), jnp.ones(())]).reshape(2, 2)
    matrix = rotation @ sheared * jnp.exp(0.12 * rest[2:4])[None, :]
    control = program.control + JITTER * jitter
    control = 0.5 + 0.03 * rest[4:6][None, None, :] + (control - 0.5) @ matrix.T
    return program._replace(control=control, width=program.width * jnp.exp(0.16 * rest[6]))


def _bezier(t: Array) -> Array:
    """Return the Bernstein weights [..., 4] of a cubic at t [...]."""
    s = 1.0 - t
    return jnp.stack([s**3, 3 * t * s**2, 3 * t**2 * s, t**3], axis=-1)


def _tangent(t: Array) -> Array:
    """Return weights [..., 4] whose product with the control points is the direction of a cubic at t [...]."""
    s = 1.0 - t
    return jnp.stack([-(s**2), s**2 - 2 * t * s, 2 * t * s - t**2, t**2], axis=-1)


def _points(control: Array, num: int) -> Array:
    """Return num points [S, num, 2] of each stroke, evenly spaced in t."""
    return jnp.einsum("pk,skd->spd", _bezier(jnp.linspace(0.0, 1.0, num)), control)
