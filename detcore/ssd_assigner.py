"""SSD's assignment: each prior to what it overlaps by half, each object to at least one prior. Batched, static shapes.

What the detectors of the SSD family share; :func:`num_matched` counts priors an object for the scale-balanced loss.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from detcore.assigners import assignment_of, inside_own_padding
from detcore.boxes import pairwise_iou
from detcore.kernels import accelerated, ssd_matching
from detcore.kernels.ssd_matching import ForceRule
from detcore.structures import BACKGROUND, IGNORE, Assignment, Priors, Targets

__all__ = ["ForceRule", "num_matched", "ssd_assign"]


@accelerated(ssd_matching.ssd_assign, when=ssd_matching.ssd_applies)
def ssd_assign(
    priors: Priors,
    targets: Targets,
    *,
    positive_iou: float = 0.5,
    rule: ForceRule = "override",
    divisor: int = 32,
) -> Assignment:
    """Give each prior the object it overlaps most, if by enough, and each object one prior whatever the overlap.

    There is no band of ignored priors: below ``positive_iou`` a prior that no object forced is
    negative. Two published rules say which prior an object forces:

    ============= ==================================== ==============================================
    rule          an object forces                     remark
    ============= ==================================== ==============================================
    override      the prior it overlaps most           of two objects with the same best prior the
                                                       later one has it; the earlier may own none
    bipartite     the free prior it overlaps most,     best pair of all first; every object that
                  pair by pair                         touches enough priors owns one
    ============= ==================================== ==============================================

    Of equal overlaps the first prior, then the first object wins. An object that touches no prior
    owns none under either rule.

    Args:
        priors: boxes in pixels, shared by the batch or one set an image.
        targets: padded objects; padded slots own nothing.
        positive_iou: in (0, 1].
        rule: a row of the table. ``"bipartite"`` takes one step a slot, for which prior is still
            free depends on every pair before: its launches grow with the slots, not the images.
        divisor: as in :func:`detcore.assigners.max_iou_assign`.

    Raises:
        ValueError: if ``positive_iou`` is out of range or ``rule`` is unknown.

    Example:
        >>> priors = Priors(torch.tensor([[[0.0, 0, 10, 10], [5, 0, 15, 10], [40, 0, 50, 10]]]), (3,))
        >>> boxes, labels = torch.tensor([[[1.0, 0, 11, 10], [3, 0, 9, 5]]]), torch.tensor([[0, 1]])
        >>> two = Targets(boxes, labels, labels >= 0)
        >>> ssd_assign(priors, two).labels  # both like the first prior best, the later one has it
        tensor([[ 1, -1, -1]])
        >>> ssd_assign(priors, two, rule="bipartite").labels
        tensor([[ 0,  1, -1]])

    Reference: Liu et al., SSD, ECCV 2016, section 2.2, arXiv:1512.02325 (rules as in its PyTorch ports and
    torchvision, and in its Caffe release).
    Deviation: the ports force the first prior upon objects that touch none.
    """
    if not 0 < positive_iou <= 1:
        raise ValueError(f"ssd_assign: positive_iou must be in (0, 1]; got {positive_iou}.")
    if rule not in ("override", "bipartite"):
        raise ValueError(f'ssd_assign: rule must be "override" or "bipartite"; got {rule!r}.')
    usable = inside_own_padding(priors, targets, divisor)  # B N
    overlap = pairwise_iou(priors.boxes, targets.boxes)  # B N M
    overlap = overlap.masked_fill(~(targets.valid[:, None] & usable[:, :, None]), -1.0)
    best, index = overlap.max(dim=-1)
    forced = (_override if rule == "override" else _bipartite)(overlap)  # B N
    index = torch.where(forced >= 0, forced, index)
    labels = torch.where((best >= positive_iou) | (forced >= 0), targets.labels.gather(1, index), BACKGROUND)
    labels = torch.where(usable, labels, IGNORE)
    return assignment_of(priors, targets, overlap, labels, index)


def _override(overlap: Float[Tensor, "B N M"]) -> Int[Tensor, "B N"]:
    """The last object whose best prior each prior is, -1 for none."""
    batch, count, slots = overlap.shape
    peak, prior = overlap.max(dim=1)  # B M
    slot = torch.arange(slots, device=overlap.device).expand(batch, -1)
    nobody = torch.full((batch, count), -1, device=overlap.device)
    return nobody.scatter_reduce(1, prior, torch.where(peak > 0, slot, -1), "amax")


def _bipartite(overlap: Float[Tensor, "B N M"]) -> Int[Tensor, "B N"]:
    """The object that got each prior when the best free pair was taken again and again, -1 for none."""
    batch, count, slots = overlap.shape
    free, owner = overlap.clone(), torch.full((batch, count), -1, device=overlap.device)
    for _ in range(slots):  # greedy, so one pair after the other; each step is one pass over the batch
        peak, pair = free.flatten(1).max(dim=1, keepdim=True)  # B 1
        prior, slot = pair // slots, pair % slots
        # a pair that does not touch changes nothing: its prior stays free, and no pair after it touches either
        owner.scatter_(1, prior, torch.where(peak > _TOUCH, slot, owner.gather(1, prior)))
        free.scatter_(1, prior[..., None].expand(-1, 1, slots), -1.0)
        free.scatter_(2, slot[..., None].expand(-1, count, 1), -1.0)
    return owner


_TOUCH = 1e-6  # Caffe's, below which a pair is none


def num_matched(match: Assignment) -> Int[Tensor, "B M"]:
    """How many priors each object owns, forced ones included; 0 in padded slots.

    ``num_matched(match).gather(1, match.index)`` is the number for each prior's own object, where
    the prior is positive.

    Example:
        >>> priors = Priors(torch.tensor([[[0.0, 0, 10, 10], [1, 0, 11, 10], [40, 0, 50, 10]]]), (3,))
        >>> one = Targets(torch.tensor([[[0.0, 0, 10, 10]]]), torch.tensor([[7]]), torch.tensor([[True]]))
        >>> num_matched(ssd_assign(priors, one))
        tensor([[2]])
    """
    return torch.zeros_like(match.targets.labels).scatter_add(1, match.index, match.positive.long())
