"""Boxes, priors and assignments drawn on a picture."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from detcore.structures import Assignment, Priors

__all__ = ["COLOURS", "draw_assignment", "draw_boxes", "draw_priors"]

COLOURS = ("#3b7fd4", "#d9660b", "#1f9470", "#cf5b9d", "#a58a12", "#808790")
"""Blue, orange, green, pink, gold, grey; each has a contrast of 3 or more with white and with a dark page."""

DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1)), (0, (1, 2)))


def draw_boxes(
    image: Any,
    boxes: Any,
    labels: Any = None,
    scores: Any = None,
    *,
    classes: Sequence[str] | None = None,
    ax: Axes | None = None,
    colour: str | None = None,
    dashed: bool = False,
    linewidth: float = 1.6,
) -> Axes:
    """Draw a picture with boxes and what they are.

    Args:
        image: (3, H, W) tensor, uint8 or float in [0, 1]; or an (H, W, 3) array, or a PIL picture;
            ``None`` to draw onto what the Axes shows already.
        boxes: (n, 4) corners in pixels of the picture.
        labels: (n,) class indices, for colour and text.
        scores: (n,) scores, for the text; the best box is drawn last, on top.
        classes: name of each class; without it the text shows the index.
        ax: where to draw; ``None`` for a new figure.
        colour: one colour for all boxes; ``None`` for one a class, in turn from :data:`COLOURS`.
        dashed: broken lines, to tell ground truth from detections.
        linewidth: of the boxes, in points.

    Raises:
        ValueError: if ``boxes``, ``labels`` and ``scores`` disagree in length or a label has no name.

    Example:
        >>> ax = draw_boxes(torch.zeros(3, 40, 60), [[5, 5, 30, 20]], [1], [0.87], classes=["cat", "dog"])
        >>> [text.get_text() for text in ax.texts]
        ['dog 0.87']
    """
    corners = _array(boxes).reshape(-1, 4) if len(boxes) == 0 else _array(boxes)
    if corners.ndim != 2 or corners.shape[-1] != 4:
        raise ValueError(f"draw_boxes: boxes must have shape (n, 4); got {tuple(corners.shape)}.")
    label_of = _per_box(labels, "labels", len(corners))
    score_of = _per_box(scores, "scores", len(corners))
    if label_of is not None and classes is not None and len(label_of) and label_of.max() >= len(classes):
        raise ValueError(f"draw_boxes: classes must name every label; got {len(classes)} for {int(label_of.max())}.")
    ax = _frame(_show(image, ax), corners)
    order = np.arange(len(corners)) if score_of is None else np.argsort(score_of, kind="stable")
    index = np.zeros(len(corners), dtype=int) if label_of is None else label_of.astype(int)
    colours = [colour or _colour(k) for k in index]
    _add_boxes(ax, corners[order], [colours[i] for i in order], linewidth, "--" if dashed else "-", halo=True)
    for i in order:
        parts: list[str] = (
            [] if label_of is None else [classes[int(index[i])] if classes is not None else str(index[i])]
        )
        parts += [] if score_of is None else [f"{score_of[i]:.2f}"]
        if parts:
            _tag(ax, corners[i], " ".join(parts), colours[i])
    return ax


def draw_priors(
    priors: Priors | Float[torch.Tensor, "n 4"],
    image: Any = None,
    *,
    chosen: Any = None,
    ax: Axes | None = None,
    linewidth: float = 0.8,
) -> Axes:
    """Draw priors, one colour and line style a level.

    Args:
        priors: as a detector has them, or corners in pixels.
        image: as for :func:`draw_boxes`.
        chosen: indices or mask of those to draw; all of a picture's priors make a carpet.
        ax: where to draw; ``None`` for a new figure.
        linewidth: in points.

    Example:
        >>> squares = torch.tensor([[[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 32.0, 32.0]]])
        >>> ax = draw_priors(Priors(squares, counts=(1, 0, 1)))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['level 0', 'level 2']
    """
    if isinstance(priors, Priors):
        corners, level = _array(priors.boxes[0]), np.repeat(np.arange(len(priors.counts)), priors.counts)
    else:
        corners, level = _array(priors), np.full(len(priors), -1)
    if chosen is not None:
        rows = _array(chosen)
        rows = np.flatnonzero(rows) if _is_mask(chosen) else rows.astype(int)
        corners, level = corners[rows], level[rows]
    ax = _frame(_show(image, ax), corners)
    for k in np.unique(level).tolist():
        label = f"level {k}" if k >= 0 else None
        _add_boxes(
            ax,
            corners[level == k],
            _colour(max(k, 0)),
            linewidth,
            DASHES[max(k, 0) % len(DASHES)],
            label=label,
            halo=len(level) <= 200,
        )
    if (level >= 0).any():
        ax.legend(loc="upper right", framealpha=0.8)
    return ax


def draw_assignment(
    image: Any,
    priors: Priors,
    match: Assignment,
    *,
    batch_index: int = 0,
    classes: Sequence[str] | None = None,
    show_ignored: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw which priors own which object: each object thick, its positives thin in the same colour.

    Args:
        image: as for :func:`draw_boxes`.
        priors: all priors of the picture.
        match: what the assigner made of them.
        batch_index: which picture of the batch.
        classes: name of each class.
        show_ignored: draw priors that take part in no loss, dotted grey.
        ax: where to draw; ``None`` for a new figure.

    Returns:
        The Axes; its title counts positives, ignored and negative priors.

    Example:
        >>> from detcore.structures import IGNORE, pad_targets
        >>> car = {"boxes": torch.tensor([[4.0, 4.0, 20.0, 20.0]]), "labels": torch.tensor([0])}
        >>> boxes = torch.tensor([[[4.0, 4.0, 20.0, 18.0], [0.0, 0.0, 16.0, 16.0]]])
        >>> match = Assignment(
        ...     labels=torch.tensor([[0, IGNORE]]),
        ...     index=torch.tensor([[0, 0]]),
        ...     boxes=boxes,
        ...     iou=torch.tensor([[0.88, 0.46]]),
        ...     targets=pad_targets([car]),
        ... )
        >>> ax = draw_assignment(torch.zeros(3, 32, 32), Priors(boxes, counts=(2,)), match)
        >>> ax.get_title()
        '1 positive, 1 ignored, 0 negative'
    """
    corners = _array(priors.boxes[batch_index if len(priors.boxes) > 1 else 0])
    positive, ignored, negative = (
        _array(mask[batch_index]).astype(bool) for mask in (match.positive, match.ignored, match.negative)
    )
    owner = _array(match.index[batch_index]).astype(int)
    valid = _array(match.targets.valid[batch_index]).astype(bool)
    objects, labels = _array(match.targets.boxes[batch_index]), _array(match.targets.labels[batch_index]).astype(int)
    ax = _show(image, ax)
    rows, slots = np.flatnonzero(positive), np.flatnonzero(valid)
    _frame(ax, np.concatenate([corners[positive | (ignored & show_ignored)], objects[slots]]))  # before the texts
    if show_ignored:
        _add_boxes(ax, corners[ignored], COLOURS[-1], 0.7, ":")
    _add_boxes(ax, corners[rows], [_colour(k) for k in owner[rows]], 0.9, "-")
    _add_boxes(ax, objects[slots], [_colour(k) for k in slots], 2.6, "-", halo=True)
    for k in slots:
        name = classes[labels[k]] if classes is not None else str(labels[k])
        _tag(ax, objects[k], f"{name}: {(owner[rows] == k).sum()}", _colour(k))
    ax.set_title(f"{positive.sum()} positive, {ignored.sum()} ignored, {negative.sum()} negative")
    return ax


def _colour(index: Any) -> str:
    """Colours in turn; grey is kept for what is ignored."""
    return COLOURS[int(index) % (len(COLOURS) - 1)]


def _is_mask(values: Any) -> bool:
    return (values.dtype if hasattr(values, "dtype") else np.asarray(values).dtype) in (torch.bool, np.bool_)


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().as_subclass(torch.Tensor).double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _per_box(values: Any, name: str, count: int) -> np.ndarray | None:
    """One number a box, or ``None``."""
    if values is None:
        return None
    values = _array(values)
    if values.shape != (count,):
        raise ValueError(f"draw_boxes: {name} must have shape ({count},), one a box; got {values.shape}.")
    return values


def _show(image: Any, ax: Axes | None) -> Axes:
    """The picture on the Axes, or the Axes alone, with y downwards."""
    if ax is None:
        _, ax = plt.subplots()
    if image is None:
        return ax
    if isinstance(image, torch.Tensor):
        pixels = image.detach().as_subclass(torch.Tensor).cpu()
        pixels = (pixels.float().clamp(0, 1) if pixels.is_floating_point() else pixels).movedim(0, -1).numpy()
    else:
        pixels = np.asarray(image)
    white = 255 if pixels.dtype == np.uint8 else 1  # else matplotlib would stretch a grey picture's contrast
    ax.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=white)
    ax.set_xticks([])
    ax.set_yticks([])
    # imshow puts the middle of the first pixel at 0; boxes count from its corner.
    height, width = pixels.shape[:2]
    ax.images[-1].set_extent((0, width, height, 0))
    ax.set(xlim=(0, width), ylim=(height, 0))
    return ax


def _frame(ax: Axes, corners: np.ndarray) -> Axes:
    """Without a picture, show all of the boxes, y downwards."""
    if not ax.images and len(corners):
        (x1, y1), (x2, y2) = corners[:, :2].min(0), corners[:, 2:].max(0)
        margin = 0.04 * max(x2 - x1, y2 - y1, 1.0)
        ax.set(xlim=(x1 - margin, x2 + margin), ylim=(y2 + margin, y1 - margin), aspect="equal")
    return ax


def _add_boxes(
    ax: Axes,
    corners: np.ndarray,
    colours: str | Sequence[str],
    linewidth: float,
    style: Any,
    *,
    label: str | None = None,
    halo: bool = False,
) -> None:
    """Outlines of all boxes as one artist; ``halo`` sets them off from any picture."""
    if not len(corners):
        return
    x1, y1, x2, y2 = corners.T
    polygons = np.stack([x1, y1, x2, y1, x2, y2, x1, y2], axis=1).reshape(-1, 4, 2)
    effects = [patheffects.withStroke(linewidth=linewidth + 1.4, foreground="#00000080")] if halo else None
    artist = PolyCollection(
        list(polygons), facecolors="none", edgecolors=colours, linewidths=linewidth, linestyles=[style], label=label,
        path_effects=effects,
    )  # fmt: skip
    ax.add_collection(artist, autolim=False)


def _tag(ax: Axes, box: np.ndarray, text: str, colour: str) -> None:
    """Text at a box's upper corner: above it, or inside where there is no room above."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    has_room = abs(box[1] - top) > 0.07 * abs(bottom - top)
    from_right = box[0] > left + 0.75 * (right - left)
    ax.text(
        min(box[2], right) if from_right else max(box[0], left), box[1] if has_room else max(box[1], top), text,
        color="white", fontsize=8, fontweight="bold", clip_on=True,
        ha="right" if from_right else "left", va="bottom" if has_room else "top",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2},
    )  # fmt: skip
