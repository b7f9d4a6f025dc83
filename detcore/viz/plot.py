"""Measures plotted: score against IoU, curves, and the report of :mod:`detcore.evaluation.misalignment`."""

import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, Protocol, runtime_checkable

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes

from detcore.viz.draw import COLOURS, DASHES

__all__ = [
    "plot_best_iou",
    "plot_curves",
    "plot_misalignment",
    "plot_score_bins",
    "plot_score_iou",
]

Series = Sequence | np.ndarray  # of numbers

_MARKERS = ("o", "s", "^", "D", "v", "x")


def plot_score_iou(
    scores: Float[np.ndarray, " n"],
    ious: Float[np.ndarray, " n"],
    *,
    ax: Axes | None = None,
    title: str | None = None,
    max_dots: int = 5000,
    seed: int = 0,
) -> Axes:
    """One dot a box, true IoU against score; aligned boxes would lie on the diagonal.

    Args:
        scores: in [0, 1].
        ious: true IoU of each box, in [0, 1].
        ax: where to draw; ``None`` for a new figure.
        title: above the axes.
        max_dots: more boxes than this are thinned at random, and the label says so.
        seed: of the thinning.

    Example:
        >>> ax = plot_score_iou(np.array([0.2, 0.9]), np.array([0.7, 0.5]))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('score', 'IoU')
    """
    ax = ax or _new_axes((4.2, 4.0))
    note = ""
    if len(scores) > max_dots:
        chosen = np.random.default_rng(seed).choice(len(scores), max_dots, replace=False)
        note = f" ({max_dots} of {len(scores)} boxes)"
        scores, ious = scores[chosen], ious[chosen]
    ax.plot([0, 1], [0, 1], color=COLOURS[-1], linestyle="--", linewidth=1, label="aligned")
    ax.scatter(scores, ious, s=8, color=COLOURS[0], alpha=max(0.15, min(0.8, 200 / max(len(scores), 1))), linewidths=0)
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="score" + note, ylabel="IoU", aspect="equal")
    if title:
        ax.set_title(title)
    return ax


def plot_curves(
    x: Series,
    curves: Mapping[str, Series],
    *,
    bands: Mapping[str, tuple[Series, Series]] | None = None,
    xlabel: str = "IoU threshold",
    ylabel: str = "AP",
    title: str | None = None,
    markers: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Several curves over the same values, such as AP against alpha or against the IoU threshold.

    Args:
        x: values along the axis.
        curves: one y a value of ``x`` for each name; nan leaves a gap.
        bands: (low, high) around a curve, by its name, such as the spread over seeds.
        xlabel: under the axis.
        ylabel: beside the axis.
        title: above the axes.
        markers: mark the values themselves.
        ax: where to draw; ``None`` for a new figure.

    Raises:
        ValueError: if a curve has not one value for each of ``x``.

    Example:
        >>> ax = plot_curves([0.5, 0.75], {"as scored": [0.4, 0.2], "by true IoU": [0.5, 0.4]})
        >>> [line.get_label() for line in ax.lines]
        ['as scored', 'by true IoU']
    """
    for name, y in curves.items():
        if len(y) != len(x):
            raise ValueError(f"plot_curves: curves[{name!r}] must have {len(x)} values, one for each x; got {len(y)}.")
    ax = ax or _new_axes((4.8, 3.2))
    for (name, y), colour, dash, marker in zip(
        curves.items(), cycle(COLOURS), cycle(DASHES), cycle(_MARKERS), strict=False
    ):
        ax.plot(
            x,
            y,
            color=colour,
            linestyle=dash,
            marker=marker if markers else None,
            markersize=4,
            linewidth=1.8,
            label=name,
        )
        if bands and name in bands:
            ax.fill_between(x, *bands[name], color=colour, alpha=0.2, linewidth=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.3)
    ax.legend()
    if title:
        ax.set_title(title)
    return ax


def plot_best_iou(
    best_ious: Mapping[str, Float[np.ndarray, " M"]], *, ax: Axes | None = None, title: str | None = None
) -> Axes:
    """Share of objects whose best box reaches an IoU, for every IoU: what suppression cost lies between the curves.

    Args:
        best_ious: best IoU of each object, by stage, such as before and after NMS.
        ax: where to draw; ``None`` for a new figure.
        title: above the axes.

    Example:
        >>> ax = plot_best_iou({"before NMS": np.array([0.9, 0.6]), "after NMS": np.array([0.7, 0.6])})
        >>> before, after = (line.get_ydata() for line in ax.lines)
        >>> float(before[80]), float(after[80])  # at IoU 0.8
        (0.5, 0.0)
    """
    grid = np.linspace(0, 1, 101)
    curves = {
        name: (best[None, :] >= grid[:, None]).mean(1) if len(best) else np.full(101, np.nan)
        for name, best in best_ious.items()
    }
    ax = plot_curves(grid, curves, xlabel="IoU", ylabel="share of objects", title=title, markers=False, ax=ax)
    ax.set(xlim=(0, 1), ylim=(0, 1.02))
    return ax


def plot_score_bins(
    edges: Float[np.ndarray, " K_1"],
    mean_iou: Float[np.ndarray, " K"],
    count: Int[np.ndarray, " K"] | None = None,
    *,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Mean IoU of the boxes in each bin of score; aligned scores would follow the dashed line.

    Args:
        edges: bounds of the bins.
        mean_iou: nan in an empty bin, which gets no bar.
        count: boxes in each bin, written above the bars.
        ax: where to draw; ``None`` for a new figure.
        title: above the axes.

    Example:
        >>> ax = plot_score_bins(np.array([0.0, 0.5, 1.0]), np.array([0.2, 0.6]), np.array([30, 4]))
        >>> [text.get_text() for text in ax.texts]
        ['30', '4']
    """
    ax = ax or _new_axes((4.8, 3.2))
    height = np.nan_to_num(mean_iou)
    ax.bar(edges[:-1], height, width=np.diff(edges), align="edge", color=COLOURS[0], alpha=0.75, edgecolor="none")
    ax.plot([0, 1], [0, 1], color=COLOURS[-1], linestyle="--", linewidth=1)
    for x, y, n in zip(edges[:-1] + np.diff(edges) / 2, height, [] if count is None else count, strict=False):
        ax.text(x, y + 0.01, f"{n}", ha="center", va="bottom", fontsize=7)
    ax.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.05), xlabel="score", ylabel="mean IoU")
    if title:
        ax.set_title(title)
    return ax


@runtime_checkable
class _Report(Protocol):
    """What :func:`plot_misalignment` reads of a report."""

    scores: Mapping[str, Any]
    ious: Mapping[str, Any]
    best_ious: Mapping[str, Any]
    average_precision: Mapping[str, Mapping[str, float]]
    bins: Any


def plot_misalignment(report: _Report, axes: Sequence[Axes] | np.ndarray | None = None) -> np.ndarray:
    """The four pictures of a report: score and IoU, score bins, AP by ranking, best IoU of each object.

    Args:
        report: a ``detcore.evaluation.Misalignment``.
        axes: four of them, in a row or two by two; ``None`` for a new figure.

    Returns:
        The four Axes, in that order.

    Raises:
        ValueError: if ``axes`` are not four.

    Example:
        >>> from detcore.evaluation import diagnose
        >>> dog = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
        >>> seen = {"boxes": [[0, 0, 10, 6], [20, 20, 30, 30]], "labels": [0, 0], "scores": [0.3, 0.8]}
        >>> axes = plot_misalignment(diagnose([seen], [dog], num_classes=1))
        >>> [ax.get_title() for ax in axes]
        ['Final boxes', 'Boxes by score', 'AP by ranking', 'Best box of each object']
    """
    given = plt.subplots(2, 2, figsize=(9, 7.4), layout="constrained")[1] if axes is None else axes
    axes = np.asarray(given).ravel()
    if len(axes) != 4:
        raise ValueError(f"plot_misalignment: axes must be four; got {len(axes)}.")
    plot_score_iou(report.scores["after NMS"], report.ious["after NMS"], ax=axes[0], title="Final boxes")
    bins = report.bins
    plot_score_bins(bins.edges, bins.mean_iou, bins.count, ax=axes[1], title="Boxes by score")
    names = [name for name in report.average_precision["as scored"] if re.fullmatch(r"AP[\d.]+", name)]
    thresholds = [float(name[2:]) / 100 for name in names]
    curves = {ranking: [numbers[n] for n in names] for ranking, numbers in report.average_precision.items()}
    plot_curves(thresholds, curves, ax=axes[2], title="AP by ranking")
    plot_best_iou(report.best_ious, ax=axes[3], title="Best box of each object")
    return axes


def _new_axes(size: tuple[float, float]) -> Axes:
    return plt.subplots(figsize=size, layout="constrained")[1]
