"""Domain translation: tasks of two unpaired sets of characters, each of one group (a script) in one style.

A style is a cell of a finite grid: how far the characters lean, with what pen they are drawn, whether they are mirrored
and whether ink is dark on light. The traits are applied in this order; each row of an image moves as a whole,

    lean:      row i moves by round(slant * (centre - i)) pixels to the right; what enters is background
    pen:       "plain" x;   "bold" the largest of a pixel and its four neighbours;   "outline" bold - plain
    mirrored:  columns in reverse order
    inverted:  1 - x

None of them makes a new grey level, so binary images stay binary. (Erosion, the opposite of bold, would leave nothing
of the one- and two-pixel lines of 28x28 characters; the outline is legible.)

A task's images of domain A have label 0 and those of B label 1, all different drawings of whatever characters of the
group. Where both domains are of one group the drawings differ too, so nothing is paired; but then the true translation
of a drawing is known, the same drawing in the other style, and `paired_queries` gives it.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.tasks.family import Spec, TaskFamily, shot_range
from metagen_jax.tasks.image_set import ImageSet
from metagen_jax.types import Array, Examples, Key, Task

Pen = Literal["plain", "bold", "outline"]
Pairs = Literal["styles", "scripts", "both"]

SLANTS = (0.0, -0.4, 0.4)  # columns per row; positive leans to the right


class Style(NamedTuple):
    """How the characters of a domain look."""

    slant: float
    pen: Pen
    mirrored: bool
    inverted: bool


class Domains(NamedTuple):
    """What the tasks are made from, on the device."""

    images: Array  # [total, H, W, C] uint8, 0 to 255
    rows: Array  # [G, L] int32, the images of each group; L is the size of the largest, -1 marks padding
    styles: Array  # [S] int32, ids of the styles that occur


class StyleSplit(NamedTuple):
    """Ids of styles, ascending and disjoint."""

    train: tuple[int, ...]
    test: tuple[int, ...]


def styles() -> tuple[Style, ...]:
    """Return all styles; a style's id is its index. Style 0 changes nothing.

    Example:
        >>> len(styles()), styles()[0]
        (36, Style(slant=0.0, pen='plain', mirrored=False, inverted=False))
    """
    return tuple(
        Style(slant, pen, mirrored, inverted)
        for slant in SLANTS
        for pen in get_args(Pen)
        for mirrored in (False, True)
        for inverted in (False, True)
    )


def split_styles(num_test: int, *, seed: int = 0) -> StyleSplit:
    """Hold out styles at random, so that every trait still occurs in training: a held-out style is a new combination.

    No pair that has a held-out style can occur in a family made from the training styles.

    Args:
        num_test: styles held out.
        seed: of the shuffle; a shuffle that holds out every style of some trait is drawn again.

    Raises:
        ValueError: fewer than two styles to test or to train on, or no split in which every trait is trained.

    Example:
        >>> split = split_styles(8)
        >>> len(split.train), len(split.test), set(split.train) & set(split.test)
        (28, 8, set())
    """
    known, rng = styles(), np.random.default_rng(seed)
    if not 2 <= num_test <= len(known) - 2:
        raise ValueError(f"expected 2 <= num_test <= {len(known) - 2} of {len(known)} styles, got num_test={num_test}")
    traits = [set(values) for values in zip(*known, strict=True)]
    for _ in range(1000):
        order = rng.permutation(len(known))
        train = sorted(order[num_test:].tolist())
        if [set(values) for values in zip(*(known[index] for index in train), strict=True)] == traits:
            return StyleSplit(tuple(train), tuple(sorted(order[:num_test].tolist())))
    raise ValueError(f"holding out {num_test} of {len(known)} styles leaves some trait untrained; hold out fewer")


def apply_style(x: Array, style: Array | int) -> Array:
    """Return images [N, H, W, C] in [0, 1] in the style of this id (an integer [], which may be traced).

    Example:
        >>> inverted = styles().index(Style(0.0, "plain", False, True))
        >>> apply_style(jnp.eye(2).reshape(1, 2, 2, 1), inverted)[0, :, :, 0].tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    known, pens = styles(), get_args(Pen)
    slant = jnp.asarray([each.slant for each in known], jnp.float32)[style]
    pen = jnp.asarray([pens.index(each.pen) for each in known])[style]
    mirrored = jnp.asarray([each.mirrored for each in known])[style]
    inverted = jnp.asarray([each.inverted for each in known])[style]
    x = _lean(x, slant)
    bold = _bold(x)
    x = jnp.where(pen == 0, x, jnp.where(pen == 1, bold, bold - x))
    x = jnp.where(mirrored, x[:, :, ::-1], x)
    return jnp.where(inverted, 1 - x, x)


def translation(
    images: ImageSet,
    shot: int | tuple[int, int],
    query: int,
    *,
    pairs: Pairs = "styles",
    styles: Sequence[int] | None = None,
) -> TaskFamily:
    """Return the family of translation tasks between domains of these images.

    Args:
        images: whose groups (alphabets, scripts) are what a domain shows; groups with too few images are left out.
        shot: support images per domain, or (smallest, largest): then each task draws its number uniformly and the
            support is padded to the largest.
        query: query images per domain.
        pairs: in what the two domains of a task differ: "styles" (one group in two styles), "scripts" (two groups in
            one style) or "both".
        styles: ids to draw from, all equally likely; None for all. Give one part of `split_styles` to train on and
            the other to test on.

    Returns:
        A family whose spec is [4] int32, (group_a, style_a, group_b, style_b), with groups numbered as in
        `group_names(images, shot, query, pairs)`. Support [2 * largest shot, H, W, C] and query [2 * query, H, W, C],
        each A before B, are drawn without replacement, and no image is in two places of a task.

    Raises:
        ValueError: counts out of range, an unknown kind of pair, ids that are no styles or occur twice, or too few
            groups or styles for these pairs.
    """
    low, high = shot_range(shot)
    names = group_names(images, shot, query, pairs)
    ids = range(_NUM_STYLES) if styles is None else tuple(styles)
    if len(set(ids)) != len(ids) or not all(0 <= index < _NUM_STYLES for index in ids):
        raise ValueError(f"expected different style ids from 0 to {_NUM_STYLES - 1}, got {list(ids)}")
    needed = 1 if pairs == "scripts" else 2
    if len(ids) < needed:
        raise ValueError(f"tasks between {pairs} need at least {needed} style ids, got styles={list(ids)}")

    def describe(data: Domains, key: Key) -> Spec:
        group_key, style_key = jax.random.split(key)
        group = jax.random.permutation(group_key, data.rows.shape[0]).astype(jnp.int32)
        style = data.styles[jax.random.permutation(style_key, data.styles.shape[0])]
        other_group, other_style = int(pairs != "styles"), int(pairs != "scripts")
        return jnp.stack([group[0], style[0], group[other_group], style[other_style]])

    def make(data: Domains, key: Key, spec: Spec) -> Task:
        drawn, num_shots = _drawn(data, key, spec, low, high, query)
        used = (jnp.arange(high + query) < num_shots) | (jnp.arange(high + query) >= high)

        def domain(label: int) -> Examples:
            x = apply_style(_pixels(data, drawn[label]), spec[2 * label + 1])
            x = jnp.where(used[:, None, None, None], x, 0.0)
            return Examples(x, jnp.full(high + query, label, jnp.int32), used.astype(jnp.float32))

        def both(rows: slice) -> Examples:
            return jax.tree.map(lambda a, b: jnp.concatenate([a[rows], b[rows]]), in_a, in_b)

        in_a, in_b = domain(0), domain(1)
        return Task(both(slice(0, high)), both(slice(high, None)))

    return TaskFamily(_domains(images, names, ids), describe, make)


def paired_queries(shot: int | tuple[int, int], query: int) -> Callable[[Domains, Key, Spec], tuple[Array, Array]]:
    """Return the function that gives the query drawings of a task in the styles of both of its domains.

    Args:
        shot: as given to `translation`.
        query: as given to `translation`.

    Returns:
        (data, key, spec) -> (x_a, x_b), each [2 * query, H, W, C]: for the key and the spec that made the task, row n
        of both is the drawing behind row n of the task's query, so none of them is in the support. x_a[:query] and
        x_b[query:] are the query itself, x_b[:query] and x_a[query:] its true translations. They are so for pairs of
        "styles"; a drawing of one script has no true translation into another.

    Raises:
        ValueError: counts out of range.
    """
    low, high = shot_range(shot)
    _check_query(query)

    def drawings(data: Domains, key: Key, spec: Spec) -> tuple[Array, Array]:
        drawn, _ = _drawn(data, key, spec, low, high, query)
        x = _pixels(data, drawn[:, high:].reshape(-1))
        return apply_style(x, spec[1]), apply_style(x, spec[3])

    return drawings


def group_names(images: ImageSet, shot: int | tuple[int, int], query: int, pairs: Pairs) -> tuple[str, ...]:
    """Return the groups that have enough images for such tasks, in the order of their ids in a spec.

    Raises:
        ValueError: counts out of range, an unknown kind of pair, or too few groups that have enough images.
    """
    _, high = shot_range(shot)
    _check_query(query)
    if pairs not in get_args(Pairs):
        raise ValueError(f"pairs must be one of {get_args(Pairs)}, got {pairs!r}")
    count: dict[str, int] = {}
    for group, num in zip(images.groups, images.count, strict=True):
        count[group] = count.get(group, 0) + int(num)
    needed = (2 if pairs == "styles" else 1) * (high + query)
    names = tuple(group for group, num in count.items() if num >= needed)
    if len(names) < (1 if pairs == "styles" else 2):
        largest = sorted(((num, group) for group, num in count.items()), reverse=True)[:3]
        raise ValueError(
            f"{images.name}: tasks between {pairs} with {high} shots and {query} query images need "
            f"{'a group' if pairs == 'styles' else 'two groups'} of at least {needed} images; of {len(count)} groups "
            f"{len(names)} have so many, the largest being {', '.join(f'{group!r} ({n})' for n, group in largest)}. "
            "Ask for fewer images, or use images with larger groups"
        )
    return names


_NUM_STYLES = len(styles())


def _check_query(query: int) -> None:
    if query < 1:
        raise ValueError(f"expected at least one query image, got query={query}")


def _domains(images: ImageSet, names: Sequence[str], ids: Sequence[int]) -> Domains:
    group = np.repeat(np.array(images.groups), images.count)
    rows = [np.flatnonzero(group == name) for name in names]
    table = np.full((len(names), max(map(len, rows))), -1, np.int32)
    for index, of_group in enumerate(rows):
        table[index, : len(of_group)] = of_group
    return Domains(jnp.asarray(images.images), jnp.asarray(table), jnp.asarray(ids, jnp.int32))


def _drawn(data: Domains, key: Key, spec: Spec, low: int, high: int, query: int) -> tuple[Array, Array]:
    """Return the rows [2, high + query] of a task's images, all different, and its number of shots []."""
    shot_key, image_key = jax.random.split(key)
    num_shots = jax.random.randint(shot_key, (), low, high + 1)
    rows_a, rows_b = data.rows[spec[0]], data.rows[spec[2]]
    order = jax.random.uniform(image_key, (2, data.rows.shape[1]))
    _, drawn_a = jax.lax.top_k(jnp.where(rows_a >= 0, order[0], -1.0), high + query)
    taken = jnp.zeros(rows_a.shape, bool).at[drawn_a].set(spec[0] == spec[2])
    _, drawn_b = jax.lax.top_k(jnp.where((rows_b >= 0) & ~taken, order[1], -1.0), high + query)
    return jnp.stack([rows_a[drawn_a], rows_b[drawn_b]]), num_shots


def _pixels(data: Domains, rows: Array) -> Array:
    return data.images[rows].astype(jnp.float32) / 255.0


def _lean(x: Array, slant: Array) -> Array:
    rows, columns = x.shape[1:3]
    shift = jnp.round(slant * ((rows - 1) / 2 - jnp.arange(rows))).astype(jnp.int32)
    source = jnp.arange(columns)[None, :] - shift[:, None]
    moved = x[:, jnp.arange(rows)[:, None], jnp.clip(source, 0, columns - 1)]
    return jnp.where(((source >= 0) & (source < columns))[None, :, :, None], moved, 0.0)


def _bold(x: Array) -> Array:
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    inside = slice(1, -1)
    beside = [padded[:, :-2, inside], padded[:, 2:, inside], padded[:, inside, :-2], padded[:, inside, 2:]]
    return jnp.stack([x, *beside]).max(0)
