"""Figures of a space of codes: a map, clusters with their members, and walks between and beyond codes.

Shape letters: N images, C clusters, M members of each, P pairs, S places of a walk, H W C of an image in [0, 1].
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from metagen_jax.report import INK, STYLE, Column, adaptation_strip

REST = "#d1d5db"
COLOURED = [colormaps["tab10"](number) for number in (0, 1, 2, 3, 4, 5, 6, 8, 9)]  # but for its grey


class Panel(NamedTuple):
    """One map: points and the group that each is of."""

    title: str
    points: np.ndarray  # [N, 2]
    groups: Sequence[str]  # [N]


Project = Callable[[np.ndarray], tuple[np.ndarray, tuple[str, str]]]  # codes [N, Z] -> points [N, 2], what the axes are


def principal_axes(codes: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
    """Return the codes [N, Z] along the two directions in which they vary most, [N, 2], and the shares of variance."""
    left, scale, _ = np.linalg.svd(codes - codes.mean(0), full_matrices=False)
    share = np.square(scale) / max(float(np.square(scale).sum()), 1e-30)
    points = np.pad(left[:, :2] * scale[:2], ((0, 0), (0, max(0, 2 - len(scale)))))
    first, second = (f"axis {n + 1}: {100 * share[n]:.0f} % of the variance" if n < len(share) else "" for n in (0, 1))
    return points, (first, second)


def t_sne(seed: int) -> Project:
    """Return t-SNE of scikit-learn, which begins at the principal axes.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError('t-SNE is in scikit-learn: pip install "metagen-jax[digits]"; or map with pca') from error

    def project(codes: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
        perplexity = min(30.0, (len(codes) - 1) / 3)
        return TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(codes), ("", "")

    return project


def code_map(panels: Sequence[Panel], *, title: str, axes: tuple[str, str] = ("", "")) -> Figure:
    """Draw maps of codes beside each other in the same frame, the largest groups in the same colours.

    Args:
        panels: at least one; a group that has no colour is grey, and how many do is said.
        title: of the whole.
        axes: what the two directions are.
    """
    figure = Figure(figsize=(6.2 * len(panels) + 0.4, 5.6), layout="constrained")
    figure.suptitle(title, **STYLE)
    largest = [
        name for name, _ in Counter(name for panel in panels for name in panel.groups).most_common(len(COLOURED))
    ]
    both = np.concatenate([panel.points for panel in panels])
    low, high = both.min(0), both.max(0)
    margin = 0.03 * (high - low) + 1e-9
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        groups = np.array(panel.groups)
        rest = ~np.isin(groups, largest)
        axis.scatter(*panel.points[rest].T, s=3, color=REST, linewidths=0)
        for name, colour in zip(largest, COLOURED, strict=False):
            axis.scatter(*panel.points[groups == name].T, s=7, color=colour, linewidths=0, label=name or "no group")
        grey = len(set(panel.groups) - set(largest))
        axis.set_title(f"{panel.title}{f' (grey: {grey} other groups)' if grey else ''}", **STYLE)
        axis.set_xlim(low[0] - margin[0], high[0] + margin[0])
        axis.set_ylim(low[1] - margin[1], high[1] + margin[1])
        axis.set_xlabel(axes[0], **STYLE)
        axis.set_ylabel(axes[1], **STYLE)
        axis.tick_params(labelsize=8, colors=INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7, markerscale=2, loc="upper left", bbox_to_anchor=(0, -0.1), ncols=3)
    return figure


def cluster_rows(centres: np.ndarray, members: np.ndarray) -> Figure:
    """Draw one row for each cluster: its decoded centre [C, H, W, C] and the members nearest to it [C, M, H, W, C]."""
    return adaptation_strip([Column("centre", centres[:, None]), Column("members nearest to it", members)])


def walks(ends: Sequence[tuple[str, np.ndarray]], places: Sequence[str], images: np.ndarray, *, title: str) -> Figure:
    """Draw one row for each walk through the space of codes.

    Args:
        ends: titles and real images [P, H, W, C] that are shown before the walks; none for codes of no image.
        places: what each place is called, [S].
        images: [P, S, H, W, C].
        title: of the whole.

    Raises:
        ValueError: another number of places than names.
    """
    if images.shape[1] != len(places):
        raise ValueError(f"expected a name for each of {images.shape[1]} places of the walks, got {len(places)}")
    shown = [Column(name, real[:, None]) for name, real in ends]
    figure = adaptation_strip([*shown, *(Column(name, images[:, [n]]) for n, name in enumerate(places))])
    figure.set_size_inches(max(figure.get_figwidth(), 4.0), figure.get_figheight() + 0.2)
    figure.suptitle(title, **STYLE)
    return figure
