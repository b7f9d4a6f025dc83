"""The fast form of :func:`detcore.assigners.max_iou_assign` for anchors on a grid, on a CPU.

Priors that overlap an object enough lie in a small window around it, a few columns and rows for each size of
anchor. Only those pairs are looked at: there is no table of all priors with all objects.
"""

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from detcore.boxes import iou
from detcore.kernels._pairs import Answer, applies, overlapping
from detcore.structures import BACKGROUND, IGNORE, Assignment, Priors, Targets

__all__ = ["max_iou_applies", "max_iou_assign"]

ForceMatch = Literal["object", "prior", "off"]

_LEAST = 0.1  # IoU below which windows hold nearly everything


def max_iou_applies(
    priors: Priors,
    targets: Targets,
    *,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    force_match: str = "object",
    divisor: int = 32,
) -> bool:
    """Whether :func:`max_iou_assign` here can take these arguments.

    Example:
        >>> from detcore.priors import AnchorGenerator
        >>> priors = AnchorGenerator([8])([torch.zeros(1, 1, 100, 168)], (800, 1344))
        >>> boxes, labels = torch.tensor([[0.0, 0, 10, 12]]).expand(4, 8, 4), torch.ones(4, 8, dtype=torch.int64)
        >>> eight = Targets(boxes, labels, labels > 0)
        >>> max_iou_applies(priors, eight), max_iou_applies(Priors(priors.boxes, priors.counts), eight)
        (True, False)
    """
    sound = _LEAST <= negative_iou <= positive_iou <= 1 and force_match in ("object", "prior", "off")
    return sound and applies(priors, targets)


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

    Arguments and result are those of :func:`detcore.assigners.max_iou_assign`, to the last bit.

    Example:
        >>> priors = Priors(torch.tensor([[[0.0, 0, 8, 8], [8, 0, 16, 8]]]), (2,), maps=((1, 2),))
        >>> one = Targets(torch.tensor([[[0.0, 0, 10, 8]]]), torch.tensor([[7]]), torch.tensor([[True]]))
        >>> max_iou_assign(priors, one).labels
        tensor([[ 7, -1]])
    """
    answer, forces = Answer(priors, targets, divisor), force_match != "off"
    pairs, image, _ = overlapping(priors, targets, least=negative_iou, peaks=forces, divisor=divisor)
    won = answer.best(pairs.where(pairs.overlap >= negative_iou))
    answer.labels[won.at] = IGNORE  # unless owned
    owned = won.at[won.overlap >= positive_iou]
    if forces:
        forced = pairs.where((pairs.overlap > 0) & (pairs.overlap == pairs.peak(len(image))))
        owned = torch.cat([owned, forced.at])
        if force_match == "object":
            answer.choose(forced.at, forced.slot, "amax")
        else:
            _prefer(answer, forced.at[answer.labels[forced.at] == BACKGROUND])
    answer.own(owned)
    answer.index[won.at] = answer.index[won.at].where(answer.labels[won.at] >= 0, 0)
    return answer.assignment()


def _prefer(answer: Answer, at: Int[Tensor, " n"]) -> None:
    """Let the index of forced priors that no object overlaps enough be the one that does it most."""
    image, prior = at // answer.count, at % answer.count
    overlap = iou(answer.priors.boxes[0, prior, None], answer.targets.boxes[image])  # n M
    answer.index[at] = overlap.masked_fill(~answer.targets.valid[image], -1.0).max(dim=1).indices
