"""Figures that a person would want to look at, as matplotlib figures without its global state, and a Markdown table.

Shape letters: T tasks, N images of one set, K inner steps, H W C of an image in [0, 1].
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#1f2933"
ACCENT = "#c2410c"
COLOURS = ("#1d6fa5", "#5b8c5a", "#8a6fae", "#8d6e4f", "#6b7280", "#b08900")
STYLE: dict[str, Any] = {"color": INK, "fontsize": 9}


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
    """Draw the records of metrics.jsonl: the loss of the warm start, then query and support in meta-training."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    warm = [record for record in records if record["phase"] == "warm start"]
    meta = [record for record in records if record["phase"] == "meta"]
    offset = max((record["step"] for record in warm), default=0)
    support = [record.get("support/loss") or [None] for record in meta]
    curves = (
        ("joint warm start", COLOURS[4], warm, [record.get("loss") for record in warm], 0),
        ("support, before adapting", COLOURS[1], meta, [trace[0] for trace in support], offset),
        ("support, at the last inner step", COLOURS[2], meta, [trace[-1] for trace in support], offset),
        ("query, after adapting", COLOURS[0], meta, [record.get("loss") for record in meta], offset),
    )
    for name, colour, chosen, losses, begin in curves:
        steps = [record["step"] + begin for record in chosen]
        values = _numbers(losses)
        if np.isfinite(values).any():
            axis.plot(steps, values, color=colour, label=name, linewidth=1.8 if name.startswith("query") else 1.2)
    if warm and meta:
        axis.axvline(offset, color=INK, linewidth=0.8, linestyle=":")
    _finish(axis, "step", "loss, nats per image")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)
    return figure


def adaptation_curve(lines: Sequence[Line], above: Sequence[Line], trained_steps: int, *, reference: str) -> Figure:
    """Draw likelihood over inner steps with 95 % bands; the first line of each panel is the one in question.

    Args:
        lines: the systems' ELBO. Its bands are wide where classes differ, so beside it are
        above: the same as paired differences, class by class, to the reference.
        trained_steps: the number of inner steps of training.
        reference: what the differences are to.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = {
        line.name: ACCENT if number == 0 else COLOURS[number % len(COLOURS)] for number, line in enumerate(lines)
    }
    for axis, shown in ((left, lines), (right, above)):
        _draw(axis, shown, colours, max(max(line.steps) for line in lines))
        axis.axvline(trained_steps, color=INK, linewidth=0.8, linestyle=":")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.axhline(0, color=INK, linewidth=0.8)
    _finish(left, "inner step (dotted: the trained number)", "ELBO, nats per image (higher is better)")
    _finish(right, "inner step (dotted: the trained number)", f"above {reference}, paired by class")
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=8)
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
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _draw(axis: Any, lines: Sequence[Line], colours: Mapping[str, str], last: int) -> None:
    """Draw lines with their bands; what is far below the first one (a baseline that diverges) is only named."""
    question = _numbers(lines[0].mean)
    span = max(float(np.nanmax(question, initial=-np.inf) - np.nanmin(question, initial=np.inf)), 5.0)
    floor = float(np.nanmin(question, initial=np.inf)) - 1.5 * span
    lows: list[float] = []
    highs: list[float] = []
    hidden: list[str] = []
    for number, line in enumerate(lines):
        mean, low, high = (_numbers(values) for values in (line.mean, line.low, line.high))
        steps = np.asarray(line.steps)
        if len(steps) == 1:
            steps, mean, low, high = np.array([0, last]), *(np.repeat(values, 2) for values in (mean, low, high))
        style, width = ("-", 2.2) if number == 0 else ("--", 1.4)
        axis.plot(steps, mean, style, color=colours[line.name], label=line.name, linewidth=width)
        axis.fill_between(steps, low, high, color=colours[line.name], alpha=0.15 if number == 0 else 0.08, linewidth=0)
        if np.isfinite(floor) and not np.nanmin(mean, initial=np.inf) >= floor:
            hidden.append(line.name)
        else:
            lows.append(float(np.nanmin(low, initial=np.inf)))
            highs.append(float(np.nanmax(high, initial=-np.inf)))
    if hidden and np.isfinite([*lows, *highs]).all():
        margin = 0.05 * (max(highs) - min(lows))
        axis.set_ylim(min(lows) - margin, max(highs) + margin)
        axis.set_title(f"in part or whole below: {', '.join(hidden)}", color=INK, fontsize=8)


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
