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
    try:
        figure.savefig(temporary, dpi=120, facecolor="white", format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
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
    """Draw the records of metrics.jsonl: the loss of the warm start, then query and support in meta-training.

    A game has one curve for each side's loss, and its spread ratio in a panel of its own.
    """
    is_game = not any("loss" in record or "support/loss" in record for record in records)
    figure = Figure(figsize=(10 if is_game else 7, 3.6), layout="constrained")
    axis, *others = figure.subplots(1, 1 + is_game, squeeze=False)[0]
    warm = [record for record in records if record["phase"] == "warm start"]
    meta = [record for record in records if record["phase"] == "meta"]
    offset = max((record["step"] for record in warm), default=0)
    if is_game:
        _draw_sides(axis, warm, meta, offset)
        _draw_curves(
            others[0], [("spread of samples over that of real images", COLOURS[0], meta, "spread_ratio")], offset
        )
        others[0].axhline(1, color=INK, linewidth=0.8)
        _finish(others[0], "step", "1: as varied as real images")
    else:
        curves = [
            ("joint warm start", COLOURS[4], warm, "loss"),
            ("support, before adapting", COLOURS[1], meta, "support/loss first"),
            ("support, at the last inner step", COLOURS[2], meta, "support/loss"),
            ("query, after adapting", COLOURS[0], meta, "loss"),
        ]
        _draw_curves(axis, curves, offset)
    for panel in (axis, *others):
        if warm and meta:
            panel.axvline(offset, color=INK, linewidth=0.8, linestyle=":")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=8)
    _finish(axis, "step", "loss" if is_game else "loss, nats per image")
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


def measure_curves(panels: Mapping[str, Sequence[Line]], trained_steps: int) -> Figure:
    """Draw one panel for each measure over inner steps with 95 % bands, the first line being the one in question.

    Args:
        panels: title -> lines; a line of one step is drawn across, as something that does not adapt.
        trained_steps: the number of inner steps of training.
    """
    figure = Figure(figsize=(3.7 * min(3, len(panels)) + 0.4, 3.1 * -(-len(panels) // 3) + 0.6), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 3), min(3, len(panels)), squeeze=False).ravel()
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        last = max(max(line.steps) for line in lines)
        for number, line in enumerate(lines):
            mean, low, high = (_numbers(values) for values in (line.mean, line.low, line.high))
            steps = np.asarray(line.steps)
            flat = len(steps) == 1
            if flat:
                steps, mean, low, high = np.array([0, last]), *(np.repeat(values, 2) for values in (mean, low, high))
            colour = ACCENT if number == 0 else COLOURS[(number - 1) % len(COLOURS)]
            style = "-" if number == 0 else ":" if flat else "--"
            axis.plot(steps, mean, style, color=colour, label=line.name, linewidth=2.2 if number == 0 else 1.4)
            axis.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.axvline(trained_steps, color=INK, linewidth=0.8, linestyle=":")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(title, color=INK, fontsize=8)
        _finish(axis, "inner step (dotted: the trained number)", "")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
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


def _draw_sides(axis: Any, warm: Sequence[Any], meta: Sequence[Any], offset: int) -> None:
    """Draw each side's loss: on the query where it is judged there, else on the support at the last inner step."""
    names = sorted({name for record in (*warm, *meta) for name in record if "loss/" in name})
    on_query = [name for name in names if not name.startswith("support/")]
    judged = [name for name in on_query if any(name in record for record in meta)]
    chosen = judged or [name for name in names if name.startswith("support/")]
    curves = [
        ("warm start, " + name.split("loss/")[1], COLOURS[4 + n % 2], warm, name) for n, name in enumerate(on_query)
    ]
    curves += [(name.split("loss/")[1], COLOURS[n % 4], meta, name) for n, name in enumerate(chosen)]
    _draw_curves(axis, curves, offset)


def _draw_curves(axis: Any, curves: Sequence[tuple[str, str, Sequence[Any], str]], offset: int) -> None:
    """Draw a field of records over steps; of a trace over inner steps its last entry, or with ` first` its first."""
    for title, colour, records, field in curves:
        name, _, which = field.partition(" ")
        found = [record.get(name, record.get(f"support/{name}")) for record in records]
        values = [(v or [None])[0 if which else -1] if isinstance(v, list) else v for v in found]
        begin = 0 if records and records[0]["phase"] == "warm start" else offset
        if np.isfinite(_numbers(values)).any():
            width = 1.8 if title.startswith("query") else 1.2
            axis.plot(
                [r["step"] + begin for r in records], _numbers(values), color=colour, label=title, linewidth=width
            )


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
