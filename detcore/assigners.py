"""Assignment: which object, if any, each prior has to predict. Batched, static shapes, no gradients."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from detcore.boxes import pairwise_iou
from detcore.structures import BACKGROUND, IGNORE, Assignment, Priors, Targets

__all__ = ["ForceMatch", "max_iou_assign"]

ForceMatch = Literal["object", "prior", "off"]


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
    usable = _inside_own_padding(priors, targets, divisor)  # B N
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
    return _assignment(priors, targets, overlap, labels, index)


def _assignment(
    priors: Priors,
    targets: Targets,
    overlap: Float[Tensor, "B N M"],
    labels: Int[Tensor, "B N"],
    index: Int[Tensor, "B N"],
) -> Assignment:
    own = targets.boxes.gather(1, index[..., None].expand(-1, -1, 4))
    boxes = torch.where((labels >= 0)[..., None], own, priors.boxes)
    iou = overlap.gather(-1, index[..., None])[..., 0].clamp(min=0)
    return Assignment(labels, index, boxes, iou, targets)


def _inside_own_padding(priors: Priors, targets: Targets, divisor: int) -> Bool[Tensor, "B N"]:
    batch, count = len(targets.boxes), priors.boxes.shape[1]
    if targets.sizes is None or priors.cells is None:
        return torch.ones(batch, count, dtype=torch.bool, device=priors.boxes.device)
    padded = (targets.sizes + divisor - 1) // divisor * divisor  # B 2, (height, width)
    # where cells begin, not where boxes are centred: the last cell of a coarse map may be centred beyond
    # its image, and float32 corners give 63.999996 for a centre at 64
    x, y = priors.cells.unbind(-1)
    return (y < padded[:, :1]) & (x < padded[:, 1:])
