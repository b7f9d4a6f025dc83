"""Assignment: which object, if any, each prior has to predict. Batched, static shapes, no gradients."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from detcore.boxes import area, iou, pairwise_iou, xyxy_to_cxcywh
from detcore.kernels import accelerated, matching, point_matching
from detcore.kernels.matching import ForceMatch
from detcore.structures import BACKGROUND, IGNORE, Assignment, Priors, Targets

__all__ = ["ForceMatch", "centerness_target", "fcos_assign", "max_iou_assign"]


@accelerated(matching.max_iou_assign, when=matching.max_iou_applies)
def max_iou_assign(
    priors: Priors,
    targets: Targets,
    *,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    force_match: ForceMatch = "object",
    divisor: int = 32,
) -> Assignment:
    """Give each prior the object it overlaps most, if it overlaps it enough.

    A prior is positive from ``positive_iou`` on, negative below ``negative_iou``, ignored in
    between. Objects that no prior overlaps enough would never be learnt, so every prior that
    attains an object's own maximum (ties included) is forced to be positive, provided that the
    maximum is above 0: without this guard an object out of every prior's reach captures all
    priors that miss it.

    Args:
        priors: boxes in pixels, shared by the batch or one set an image.
        targets: padded objects; padded slots own nothing.
        positive_iou: in [``negative_iou``, 1].
        negative_iou: in [0, ``positive_iou``].
        force_match: a forced prior goes to the ``"object"`` that forced it, the last one if
            several did (MMDetection), to the ``"prior"``'s own best object (torchvision), or
            forcing is ``"off"``.
        divisor: with ``targets.sizes``, priors whose cell begins beyond an image padded to multiples
            of this many pixels are ignored: they exist only because another image is larger.

    Raises:
        ValueError: if the thresholds are out of order or ``force_match`` is unknown.

    Example:
        >>> priors = Priors(torch.tensor([[[0.0, 0, 10, 10], [8, 0, 18, 10], [40, 40, 50, 50]]]), (3,))
        >>> one = Targets(torch.tensor([[[0.0, 0, 10, 12]]]), torch.tensor([[7]]), torch.tensor([[True]]))
        >>> max_iou_assign(priors, one).labels
        tensor([[ 7, -1, -1]])

    Reference: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, section 4 (thresholds).
    Deviation: forced matches as in MMDetection 2.4's MaxIoUAssigner, plus the guard.
    """
    if not 0 <= negative_iou <= positive_iou <= 1:
        raise ValueError(
            "max_iou_assign: thresholds must satisfy 0 <= negative_iou <= positive_iou <= 1; "
            f"got {negative_iou} and {positive_iou}."
        )
    if force_match not in ("object", "prior", "off"):
        raise ValueError(f'max_iou_assign: force_match must be "object", "prior" or "off"; got {force_match!r}.')
    usable = inside_own_padding(priors, targets, divisor)  # B N
    overlap = pairwise_iou(priors.boxes, targets.boxes)  # B N M
    overlap = overlap.masked_fill(~(targets.valid[:, None] & usable[:, :, None]), -1.0)
    best, index = overlap.max(dim=-1)

    labels = targets.labels.gather(1, index)
    none = torch.where(best < negative_iou, BACKGROUND, IGNORE)
    if force_match == "off":
        forced = torch.zeros_like(usable)
    else:
        peak = overlap.amax(dim=1, keepdim=True)  # B 1 M
        forcing = (overlap == peak) & (peak > 0)  # B N M
        forced = forcing.any(dim=-1)
        if force_match == "object":
            slot = torch.arange(overlap.shape[-1], device=overlap.device)
            last = torch.where(forcing, slot, -1).amax(dim=-1)
            index = torch.where(forced, last, index)
            labels = targets.labels.gather(1, index)
    labels = torch.where((best >= positive_iou) | forced, labels, none)
    labels = torch.where(usable, labels, IGNORE)
    return assignment_of(priors, targets, overlap, labels, index)


@accelerated(point_matching.fcos_assign, when=point_matching.fcos_applies)
def fcos_assign(
    priors: Priors,
    targets: Targets,
    *,
    ranges: Sequence[float] = (64.0, 128.0, 256.0, 512.0, math.inf),
    radius: float | None = None,
    closed: bool = True,
    divisor: int = 32,
) -> Assignment:
    """Give each point the smallest object around it whose size suits the point's level.

    An object is a candidate if the point lies strictly inside its box and the farthest of the
    box's four sides is within the level's range of distances. Of several candidates the one of
    smallest area wins, the lowest slot if areas tie.

    Args:
        priors: squares of side = stride around the points.
        targets: padded objects; padded slots own nothing.
        ranges: farthest side that each level is responsible for, in pixels, increasing; the next
            level begins there and the first is open below.
        radius: with centre sampling, a point must also lie less than this many strides from the
            object's centre, along either axis; ``None``: anywhere inside the object.
        closed: whether a distance equal to the end of a range belongs to it, so that two levels
            share it (FCOS) or none has it (``False``, torchvision).
        divisor: as in :func:`max_iou_assign`.

    Raises:
        ValueError: if ``ranges`` are not one a level, or not increasing, or ``radius`` is not
            positive.

    Example:
        >>> points = Priors(torch.tensor([[[0.0, 0, 8, 8], [8, 0, 16, 8], [0, 0, 16, 16]]]), (2, 1))
        >>> one = Targets(torch.tensor([[[2.0, 2, 10, 12]]]), torch.tensor([[7]]), torch.tensor([[True]]))
        >>> fcos_assign(points, one, ranges=[8.0, 16.0]).labels  # 8 from (4, 4); not around (12, 4); 6 from (8, 8)
        tensor([[ 7, -1, -1]])

    Reference: Tian et al., FCOS, ICCV 2019, sections 3.1 and 3.2, arXiv:1904.01355; centre sampling:
    FCOS: A simple and strong anchor-free object detector, 2020, arXiv:2006.09214.
    """
    if len(ranges) != len(priors.counts) or any(low >= high for low, high in pairwise(ranges)):
        raise ValueError(
            f"fcos_assign: ranges must be increasing, one for each of {len(priors.counts)} levels; got {ranges}."
        )
    if radius is not None and radius <= 0:
        raise ValueError(f"fcos_assign: radius must be None or > 0; got {radius}.")
    usable = inside_own_padding(priors, targets, divisor)  # B N
    x, y, stride, _ = xyxy_to_cxcywh(priors.boxes)[..., None].unbind(-2)  # 1 N 1 each
    x1, y1, x2, y2 = targets.boxes[:, None].unbind(-1)  # B 1 M each
    left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y  # B N M each
    inside = torch.minimum(torch.minimum(left, right), torch.minimum(top, bottom)) > 0
    farthest = torch.maximum(torch.maximum(left, right), torch.maximum(top, bottom))
    low, high = (_of_level(ends, priors) for ends in ([-math.inf, *ranges[:-1]], ranges))  # N 1 each
    suits = (farthest >= low) & (farthest <= high) if closed else (farthest > low) & (farthest < high)
    candidate = inside & suits & targets.valid[:, None] & usable[..., None]
    if radius is not None:
        candidate &= torch.maximum((left - right).abs(), (top - bottom).abs()) / 2 < radius * stride

    smallest, index = area(targets.boxes)[:, None].masked_fill(~candidate, math.inf).min(dim=-1)
    none = torch.where(usable, BACKGROUND, IGNORE)
    labels = torch.where(smallest < math.inf, targets.labels.gather(1, index), none)
    own = targets.boxes.gather(1, index[..., None].expand(-1, -1, 4))
    boxes = torch.where((labels >= 0)[..., None], own, priors.boxes)
    overlap = torch.where(labels >= 0, iou(priors.boxes, boxes), 0.0)
    return Assignment(labels, index, boxes, overlap, targets)


def _of_level(values: Sequence[float], priors: Priors) -> Float[Tensor, "N 1"]:
    """The value of each prior's level."""
    device, dtype = priors.boxes.device, priors.boxes.dtype
    return torch.cat(
        [torch.full((n, 1), v, device=device, dtype=dtype) for v, n in zip(values, priors.counts, strict=True)]
    )


def centerness_target(priors: Float[Tensor, "*#n 4"], boxes: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*#n"]:
    r"""How central a point is in its object: 1 at the centre, 0 on the border and outside.

    .. math:: \sqrt{\frac{\min(l, r)}{\max(l, r)} \cdot \frac{\min(t, b)}{\max(t, b)}}

    Args:
        priors: squares around the points.
        boxes: the object of each point.

    Example:
        >>> point, box = torch.tensor([4.0, 4.0, 12.0, 12.0]), torch.tensor([4.0, 0.0, 24.0, 16.0])
        >>> centerness_target(point, box)  # l, r = 4, 16; t, b = 8, 8
        tensor(0.5000)

    Reference: Tian et al., FCOS, ICCV 2019, Eq. (3). arXiv:1904.01355
    """
    x, y, _, _ = xyxy_to_cxcywh(priors).unbind(-1)
    x1, y1, x2, y2 = boxes.unbind(-1)
    across, down = ((p - lo, hi - p) for p, lo, hi in ((x, x1, x2), (y, y1, y2)))
    ratios = [torch.minimum(*sides).clamp(min=0) / torch.maximum(*sides).clamp(min=1e-9) for sides in (across, down)]
    return (ratios[0] * ratios[1]).sqrt()


def assignment_of(
    priors: Priors,
    targets: Targets,
    overlap: Float[Tensor, "B N M"],
    labels: Int[Tensor, "B N"],
    index: Int[Tensor, "B N"],
) -> Assignment:
    """What assigners by overlap return, out of the label and the object's slot of every prior."""
    positive = labels >= 0
    index = torch.where(positive, index, 0)
    own = targets.boxes.gather(1, index[..., None].expand(-1, -1, 4))
    boxes = torch.where(positive[..., None], own, priors.boxes)
    iou = torch.where(positive, overlap.gather(-1, index[..., None])[..., 0], 0.0)
    return Assignment(labels, index, boxes, iou, targets)


def inside_own_padding(priors: Priors, targets: Targets, divisor: int) -> Bool[Tensor, "B N"]:
    """Priors that their image has, and not only the batch; see ``divisor`` of :func:`max_iou_assign`."""
    batch, count = len(targets.boxes), priors.boxes.shape[1]
    if targets.sizes is None or priors.cells is None:
        return torch.ones(batch, count, dtype=torch.bool, device=priors.boxes.device)
    padded = (targets.sizes + divisor - 1) // divisor * divisor  # B 2, (height, width)
    # where cells begin, not where boxes are centred: the last cell of a coarse map may be centred beyond
    # its image, and float32 corners give 63.999996 for a centre at 64
    x, y = priors.cells.unbind(-1)
    return (y < padded[:, :1]) & (x < padded[:, 1:])
