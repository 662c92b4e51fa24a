"""Figures that a person would want to look at, as matplotlib figures without its global state, and a Markdown table.

Shape letters: T tasks, N images of one set, K inner steps, H W C of an image in [0, 1].
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

INK = "#1f2933"
ACCENT = "#c2410c"
COLOURS = ("#1d6fa5", "#5b8c5a", "#8a6fae", "#8d6e4f", "#6b7280")
STYLE: Mapping[str, Any] = {"color": INK, "fontsize": 9}


class Line(NamedTuple):
    """A system's likelihood over inner steps: where it is one number, it is drawn as a horizontal line."""

    name: str
    steps: Sequence[int]  # [S]
    mean: Sequence[float | None]  # [S] nats per image, None where it diverged
    low: Sequence[float | None]  # [S]
    high: Sequence[float | None]  # [S]


class Column(NamedTuple):
    """One column of a strip: a few images for each task."""

    title: str
    images: np.ndarray  # [T, N, H, W, C]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.partial.png")
    figure.savefig(temporary, dpi=120, facecolor="white", format="png")
    temporary.replace(path)
    return path


def support_and_samples(support: np.ndarray, samples: np.ndarray) -> Figure:
    """Draw the images given [N, H, W, C] on the left and the new ones [M, H, W, C] on the right."""
    left, right = _grid(support, _side(len(support))), _grid(samples, _side(len(samples)))
    widths = [left.shape[1], right.shape[1]]
    height = max(left.shape[0], right.shape[0])
    figure = Figure(figsize=(max(3.5, sum(widths) / 60 + 0.8), height / 60 + 0.7), layout="constrained")
    axes = figure.subplots(1, 2, width_ratios=widths)
    for axis, image, title in zip(axes, (left, right), (f"{len(support)} given", f"{len(samples)} new"), strict=True):
        _show(axis, image, title)
        axis.set_anchor("N")
    return figure


def adaptation_strip(columns: Sequence[Column]) -> Figure:
    """Draw one row for each task: support, samples after each number of steps, held-out real images.

    Raises:
        ValueError: columns with different numbers of tasks.
    """
    rows = {len(column.images) for column in columns}
    if len(rows) != 1:
        raise ValueError(f"expected the same number of tasks in every column, got {sorted(rows)}")
    mosaics = [np.concatenate([_row(task) for task in column.images]) for column in columns]
    widths = [mosaic.shape[1] for mosaic in mosaics]
    figure = Figure(figsize=(sum(widths) / 62 + 0.5, mosaics[0].shape[0] / 62 + 0.5), layout="constrained")
    axes = figure.subplots(1, len(columns), width_ratios=widths, squeeze=False)[0]
    for axis, column, mosaic in zip(axes, columns, mosaics, strict=True):
        _show(axis, mosaic, column.title)
    return figure


def learning_curve(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the records of metrics.jsonl: the query's loss, and where there is one that of the support by inner step."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    for colour, phase in zip((COLOURS[4], COLOURS[0]), ("warm start", "meta"), strict=True):
        chosen = [record for record in records if record["phase"] == phase and record.get("loss") is not None]
        if not chosen:
            continue
        offset = max((r["step"] for r in records if r["phase"] == "warm start"), default=0) if phase == "meta" else 0
        steps = [record["step"] + offset for record in chosen]
        name = "joint warm start" if phase == "warm start" else "query, after adapting"
        axis.plot(steps, [record["loss"] for record in chosen], color=colour, label=name, linewidth=1.6)
        begin = [(record.get("support/loss") or [None])[0] for record in chosen]
        if all(value is not None for value in begin):
            axis.plot(steps, begin, color=COLOURS[1], label="support, before adapting", linewidth=1.0, alpha=0.8)
        if phase == "meta" and offset:
            axis.axvline(offset, color=INK, linewidth=0.8, linestyle=":")
    _finish(axis, "step", "loss, nats per image")
    if axis.lines:
        axis.legend(frameon=False, fontsize=8)
    return figure


def adaptation_curve(lines: Sequence[Line], trained_steps: int, *, unit: str = "ELBO") -> Figure:
    """Draw likelihood over inner steps with 95 % bands: the first line is the one in question."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    last = max(max(line.steps) for line in lines)
    for number, line in enumerate(lines):
        colour = ACCENT if number == 0 else COLOURS[(number - 1) % len(COLOURS)]
        mean, low, high = (_numbers(values) for values in (line.mean, line.low, line.high))
        steps = np.asarray(line.steps)
        if len(steps) == 1:
            steps, mean, low, high = np.array([0, last]), *(np.repeat(values, 2) for values in (mean, low, high))
        style = "-" if number == 0 else "--"
        axis.plot(steps, mean, style, color=colour, label=line.name, linewidth=2.2 if number == 0 else 1.3)
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.axvline(trained_steps, color=INK, linewidth=0.8, linestyle=":")
    axis.annotate(
        "trained number", (trained_steps, 0.02), (4, 0), xycoords=("data", "axes fraction"), textcoords="offset points", **STYLE
    )
    _limit(axis, lines)
    _finish(axis, "inner step", f"{unit}, nats per image (higher is better)")
    axis.legend(frameon=False, fontsize=8)
    return figure


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns line up.

    Example:
        >>> print(table(["system", "nats"], [["maml", "-119.1"]]))
        | system | nats   |
        |--------|--------|
        | maml   | -119.1 |
    """
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _limit(axis: Any, lines: Sequence[Line]) -> None:
    """Leave out of sight what is far below everything else (a baseline that diverges), and say so."""
    means = [_numbers(line.mean) for line in lines]
    best = max(np.nanmax(mean, initial=-np.inf) for mean in means)
    question = means[0][np.isfinite(means[0])]
    if not len(question):
        return
    span = max(best - question.min(), 1.0)
    floor = question.min() - 3 * span
    hidden = [line.name for line, mean in zip(lines, means, strict=True) if np.nanmin(mean, initial=np.inf) < floor]
    if hidden:
        axis.set_ylim(floor, best + 0.3 * span)
        axis.set_title(f"partly below the axis: {', '.join(hidden)}", **STYLE)


def _finish(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x, **STYLE)
    axis.set_ylabel(y, **STYLE)
    axis.tick_params(labelsize=8, colors=INK)
    axis.grid(color="#e5e7eb", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _show(axis: Any, image: np.ndarray, title: str) -> None:
    axis.imshow(image, cmap="gray_r" if image.ndim == 2 else None, vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, **STYLE)
    axis.set_axis_off()


def _side(count: int) -> int:
    return int(np.ceil(np.sqrt(count)))


def _row(images: np.ndarray) -> np.ndarray:
    return _grid(images, len(images))


def _grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Tile [N, H, W, C] into one image, [H', W'] for grey and [H', W', 3] for colour, with a thin pale frame."""
    num, height, width, channels = images.shape
    rows = -(-num // columns)
    framed = np.full((rows * columns, height + 2, width + 2, channels), 0.12 if channels == 1 else 1.0, np.float32)
    framed[num:] = 0.0 if channels == 1 else 1.0
    framed[:num, 1:-1, 1:-1] = np.clip(images, 0, 1)
    tiled = framed.reshape(rows, columns, height + 2, width + 2, channels).transpose(0, 2, 1, 3, 4)
    tiled = tiled.reshape(rows * (height + 2), columns * (width + 2), channels)
    return tiled[..., 0] if channels == 1 else tiled


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)
