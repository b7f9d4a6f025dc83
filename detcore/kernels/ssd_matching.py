"""The fast form of :func:`detcore.ssd_assigner.ssd_assign` for default boxes on a grid, on a CPU.

As in :mod:`detcore.kernels.matching` only default boxes near an object are looked at; where several objects want one
default box under the bipartite rule, those that do not get it look at all.
"""

from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from detcore.boxes import iou
from detcore.kernels._pairs import Answer, Pairs, applies, overlapping
from detcore.structures import Assignment, Priors, Targets

__all__ = ["ssd_applies", "ssd_assign"]

ForceRule = Literal["override", "bipartite"]

_LEAST = 0.1  # IoU below which windows hold nearly everything
_TOUCH = 1e-6  # as in the plain form


def ssd_applies(
    priors: Priors, targets: Targets, *, positive_iou: float = 0.5, rule: str = "override", divisor: int = 32
) -> bool:
    """Whether :func:`ssd_assign` here can take these arguments.

    Example:
        >>> from detcore.priors import AnchorGenerator
        >>> priors = AnchorGenerator([8])([torch.zeros(1, 1, 100, 168)], (800, 1344))
        >>> boxes, labels = torch.tensor([[0.0, 0, 10, 12]]).expand(4, 8, 4), torch.ones(4, 8, dtype=torch.int64)
        >>> eight = Targets(boxes, labels, labels > 0)
        >>> ssd_applies(priors, eight), ssd_applies(Priors(priors.boxes, priors.counts), eight)
        (True, False)
    """
    return _LEAST <= positive_iou <= 1 and rule in ("override", "bipartite") and applies(priors, targets)


def ssd_assign(
    priors: Priors,
    targets: Targets,
    *,
    positive_iou: float = 0.5,
    rule: ForceRule = "override",
    divisor: int = 32,
) -> Assignment:
    """Give each prior the object it overlaps most, if by enough, and each object one prior whatever the overlap.

    Arguments and result are those of :func:`detcore.ssd_assigner.ssd_assign`, to the last bit.

    Example:
        >>> priors = Priors(torch.tensor([[[0.0, 0, 8, 8], [8, 0, 16, 8]]]), (2,), maps=((1, 2),))
        >>> one = Targets(torch.tensor([[[0.0, 0, 30, 8]]]), torch.tensor([[7]]), torch.tensor([[True]]))
        >>> ssd_assign(priors, one).labels
        tensor([[ 7, -1]])
    """
    answer = Answer(priors, targets, divisor)
    pairs, image, slot = overlapping(priors, targets, least=positive_iou, peaks=True, divisor=divisor)
    won = answer.best(pairs.where(pairs.overlap >= positive_iou))
    touching = (pairs.overlap > 0) & (pairs.overlap == pairs.peak(len(image)))
    firsts = _first_choices(pairs.where(touching))
    if rule == "override":
        answer.choose(firsts.at, firsts.slot, "amax")
        forced = firsts.at
    else:
        forced = _bipartite(answer, firsts.where(firsts.overlap > _TOUCH), image, slot)
    answer.own(torch.cat([won.at, forced]))
    return answer.assignment()


def _first_choices(pairs: Pairs) -> Pairs:
    """The first pair of each object; they come in order of the objects, but not of the priors."""
    things = int(pairs.thing[-1]) + 1 if len(pairs.thing) else 0
    first = pairs.at.new_zeros(things).scatter_reduce_(0, pairs.thing, pairs.at, "amin", include_self=False)
    return pairs.where(pairs.at == first[pairs.thing])


def _bipartite(answer: Answer, wish: Pairs, image: Int[Tensor, " n"], slot: Int[Tensor, " n"]) -> Int[Tensor, " owned"]:
    """Take the best free pair of an image again and again, as far as pairs touch; returns the priors taken.

    The same comes of this: every object asks for the prior it overlaps most; a prior keeps the object that overlaps
    it most, the first of equals; the others ask for their next, until nobody is sent away. Objects of all images
    take part in every round.
    """
    thing, at, overlap = wish.thing, wish.at, wish.overlap
    rows = overlap.new_empty(0, answer.count)  # of those sent away: their overlap with every prior they may ask for
    row = torch.full_like(slot, -1)
    while True:
        greatest = overlap.new_zeros(len(answer.index)).scatter_reduce_(0, at, overlap, "amax")
        best = overlap == greatest[at]
        answer.choose(at[best], slot[thing[best]], "amin")
        sent = (answer.index[at] != slot[thing]).nonzero()[:, 0]
        if not len(sent):
            return at
        who = thing[sent]
        new = who[row[who] < 0]
        row[new] = len(rows) + torch.arange(len(new))
        rows = torch.cat([rows, _rows(answer, new, image, slot)])
        rows[row[who], at[sent] % answer.count] = 0.0
        overlap[sent], prior = rows[row[who]].max(dim=1)
        at[sent] = image[who] * answer.count + prior
        left = (overlap > _TOUCH).nonzero()[:, 0]
        thing, at, overlap = thing[left], at[left], overlap[left]


def _rows(answer: Answer, thing: Int[Tensor, " n"], image: Int[Tensor, " all"], slot: Int[Tensor, " all"]) -> Tensor:
    """Overlap of objects with every prior, 0 beyond their image's padding."""
    overlap = iou(answer.priors.boxes, answer.targets.boxes[image[thing], slot[thing], None])  # n N
    return overlap if answer.beyond is None else overlap.masked_fill(answer.beyond[image[thing]], 0.0)
