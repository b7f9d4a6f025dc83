r"""SCOD's weak segmentation: every cell of a map says which object lies on it, and boxes stand in for masks.

Layer-wise customized weak segmentation block and AIoU loss, 2021. arXiv:2108.11021

A body for this term (see :mod:`detcore.nn.scws`) gives, in ``Predictions.aside``, for the P cells of all its
blocks one after another, each block's row by row:

======================== ============ ============================================================
name                     shape        what
======================== ============ ============================================================
``segmentation``         B P C + 1    logits of the classes and of background, the last
``segmentation_cells``   1 P 4        corners of each cell in pixels; each block's tile the picture
``segmentation_areas``   1 P 2        areas (low, high) of the objects its block answers for
======================== ============ ============================================================
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from detcore.boxes import area, clip_boxes
from detcore.structures import BACKGROUND, Assignment, Predictions, Targets, joint_total

__all__ = ["Closed", "area_ranges", "segmentation_cells", "weak_segmentation_labels", "weak_segmentation_term"]

Closed = Literal["right"]


def area_ranges(scales: Sequence[tuple[float, float]], *, open_top: bool = True) -> tuple[tuple[float, float], ...]:
    r"""Areas of the objects that each layer answers for, from the sides of its priors.

    .. math:: s^{high}_i = \frac{a^{min}_i a^{max}_i + (a^{max}_i)^2}{2}, \qquad
        s^{low}_1 = 0, \quad s^{low}_i = s^{high}_{i-1}

    With SSD's (min size, max size) the bound lies midway between the areas of this layer's larger
    square prior and of the next layer's smaller one.

    Args:
        scales: :math:`(a^{min}, a^{max})` of each layer in pixels, 0 < min <= max, finest layer first.
        open_top: the last layer answers for everything above. Strictly after the formula, objects above
            its bound are background on every layer: 15.5 % of VOC's with DSSD320's first four layers.

    Returns:
        (low, high) of each layer in square pixels.

    Raises:
        ValueError: if there is no layer, or a side is out of range.

    Example:
        >>> area_ranges([(32.0, 64.0), (64.0, 121.6)], open_top=False)
        ((0.0, 3072.0), (3072.0, 11284.48))

    Reference: SCOD, 2021, section on scale-customised labels.
    Deviation: the paper says nothing of objects above the last bound; ``open_top=False`` is its formula.
    """
    if not scales or any(not 0 < least <= most for least, most in scales):
        raise ValueError(f"area_ranges: scales must be pairs 0 < min <= max, one a layer; got {scales}.")
    highs = [(least * most + most**2) / 2 for least, most in scales]
    lows = [0.0, *highs[:-1]]
    if open_top:
        highs[-1] = float("inf")
    return tuple(zip(lows, highs, strict=True))


def segmentation_cells(
    maps: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    ranges: Sequence[tuple[float, float]],
    *,
    device: torch.device | str = "cpu",
) -> tuple[Float[Tensor, "1 P 4"], Float[Tensor, "1 P 2"]]:
    """The cells of some maps as boxes, and the range of areas of each.

    Args:
        maps: (height, width) of each block's map in cells.
        image_size: (height, width) in pixels; each map's cells tile it.
        ranges: (low, high) in square pixels, one a map.
        device: where to.

    Example:
        >>> cells, areas = segmentation_cells([(2, 2), (1, 1)], (16, 16), [(0.0, 100.0), (100.0, float("inf"))])
        >>> cells[0, 1].tolist(), areas[0, 1].tolist(), areas[0, 4].tolist()
        ([8.0, 0.0, 16.0, 8.0], [0.0, 100.0], [100.0, inf])
    """
    cells, areas = [], []
    for (height, width), (low, high) in zip(maps, ranges, strict=True):
        step_y, step_x = image_size[0] / height, image_size[1] / width
        y, x = torch.meshgrid(
            torch.arange(height, device=device, dtype=torch.float32),
            torch.arange(width, device=device, dtype=torch.float32),
            indexing="ij",
        )
        corners = [x * step_x, y * step_y, (x + 1) * step_x, (y + 1) * step_y]
        cells.append(torch.stack(corners, dim=-1).view(-1, 4))
        areas.append(torch.stack([torch.full_like(x, low), torch.full_like(x, high)], dim=-1).view(-1, 2))
    return torch.cat(cells)[None], torch.cat(areas)[None]


def weak_segmentation_labels(
    cells: Float[Tensor, "1 P 4"], areas: Float[Tensor, "1 P 2"], targets: Targets, *, closed: Closed | None = None
) -> Int[Tensor, "B P"]:
    r"""What each cell should say: the class of the smallest object on its centre, of those that its block answers for.

    An object counts if the cell's centre lies in its box (:math:`x_1 \le x < x_2`, y alike) and its area is
    within the range, bounds excluded. Only such objects compete: a small one that belongs to another
    layer hides nothing here. Of equal areas the first wins.

    Args:
        cells: corners in pixels.
        areas: (low, high) in square pixels.
        targets: boxes in pixels of the batch.
        closed: ``"right"`` lets an area equal to ``high`` in, so that no size falls between two layers.

    Returns:
        Class of each cell, or ``BACKGROUND``.

    Raises:
        ValueError: if ``closed`` is neither.

    Example:
        >>> cells, areas = segmentation_cells([(2, 2), (1, 1)], (16, 16), [(0.0, 100.0), (100.0, float("inf"))])
        >>> boxes = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 16, 16]]])  # 64 and 256 square pixels
        >>> targets = Targets(boxes, torch.tensor([[3, 7]]), torch.tensor([[True, True]]))
        >>> weak_segmentation_labels(cells, areas, targets)
        tensor([[ 3, -1, -1, -1,  7]])

    Reference: SCOD, 2021, Eq. (1). Deviation: the paper does not say which point of a cell is looked at.
    """
    if closed not in ("right", None):
        raise ValueError(f'weak_segmentation_labels: closed must be "right" or None; got {closed!r}.')
    x, y = ((cells[..., :2] + cells[..., 2:]) / 2)[..., None].unbind(-2)  # 1 P 1
    low, high = areas[..., None].unbind(-2)
    x1, y1, x2, y2 = targets.boxes[:, None].unbind(-1)  # B 1 M
    size = area(targets.boxes)[:, None]
    suits = (size > low) & ((size <= high) if closed else (size < high))
    owns = suits & (x >= x1) & (x < x2) & (y >= y1) & (y < y2) & targets.valid[:, None]  # B P M
    sizes = torch.where(owns, size, torch.inf)
    smallest = sizes.argmin(-1)  # the first of equals, as torch promises for argmin but not for min
    labels = targets.labels.gather(1, smallest)
    return torch.where(owns.any(-1), labels, BACKGROUND)


def weak_segmentation_term(pred: Predictions, match: Assignment, *, closed: Closed | None = None) -> Float[Tensor, ""]:
    r"""Cross-entropy of every cell of every block.

    .. math:: L_{scws} = \sum_{i} \frac{1}{H_i W_i} \sum_{x, y} -\ln Y_i(x, y, c_{xy})

    Mean over a block's cells and over the pictures, sum over blocks. Of a picture that is smaller than
    its batch, cells count by the part of them that lies in it.

    Args:
        pred: ``aside`` holds what the table above lists.
        match: only its targets are used.
        closed: of :func:`weak_segmentation_labels`.

    Raises:
        KeyError: if the body says nothing aside.

    Example:
        >>> from detcore.models import get_model
        >>> list(get_model("scod320", num_classes=20, backbone="tiny").losses)
        ['cls', 'box', 'scws']

    Reference: SCOD, 2021, Eq. (4), (9). Deviation: the paper does not say how blocks are summed.
    """
    if "segmentation" not in pred.aside:
        raise KeyError(f"weak_segmentation_term: the body must give segmentation aside; it gives {sorted(pred.aside)}.")
    logits, cells = pred.aside["segmentation"], pred.aside["segmentation_cells"]
    logits = logits if logits.element_size() >= 4 else logits.float()
    with torch.no_grad():
        labels = weak_segmentation_labels(cells, pred.aside["segmentation_areas"], match.targets, closed=closed)
        wanted = torch.where(labels == BACKGROUND, logits.shape[-1] - 1, labels)
        share = _share_of_picture(cells, match.targets)
    entropy = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
    images = torch.full((), float(len(logits)), device=logits.device)
    return (entropy * share).sum() / joint_total(images, least=1.0)


def _share_of_picture(cells: Float[Tensor, "1 P 4"], targets: Targets) -> Float[Tensor, "#B P"]:
    """How much of its picture each cell covers; each block's add up to 1."""
    if targets.sizes is None:
        width, height = cells[..., 2].amax(), cells[..., 3].amax()
        return area(cells) / (width * height)
    inside = clip_boxes(cells.expand(len(targets.sizes), -1, -1), targets.sizes)
    return area(inside) / targets.sizes.prod(dim=1, keepdim=True)
