"""The fast form of :func:`detcore.assigners.fcos_assign` for points on a grid, on a CPU.

The points that an object can own lie inside its box and, on each level, not farther from any side than the level's
range: a window of columns and rows. Only those are looked at.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from detcore.boxes import area, xyxy_to_cxcywh
from detcore.kernels._grid import listed, sure_grid
from detcore.kernels._pairs import Answer, applies, extent
from detcore.structures import Assignment, Priors, Targets

__all__ = ["fcos_applies", "fcos_assign"]

_RANGES = (64.0, 128.0, 256.0, 512.0, math.inf)
_HAIR = 0.01  # of a step: windows a little too wide lose nothing


def fcos_applies(
    priors: Priors,
    targets: Targets,
    *,
    ranges: Sequence[float] = _RANGES,
    radius: float | None = None,
    closed: bool = True,
    divisor: int = 32,
) -> bool:
    """Whether :func:`fcos_assign` here can take these arguments.

    Example:
        >>> from detcore.priors import PointGenerator
        >>> priors = PointGenerator([8])([torch.zeros(1, 1, 100, 168)], (800, 1344))
        >>> boxes, labels = torch.tensor([[0.0, 0, 10, 12]]).expand(4, 8, 4), torch.ones(4, 8, dtype=torch.int64)
        >>> eight = Targets(boxes, labels, labels > 0)
        >>> (
        ...     fcos_applies(priors, eight, ranges=[64.0]),
        ...     fcos_applies(Priors(priors.boxes, priors.counts), eight, ranges=[64.0]),
        ... )
        (True, False)
    """
    sound = len(ranges) == len(priors.counts) and all(low < high for low, high in pairwise(ranges))
    return sound and (radius is None or radius > 0) and applies(priors, targets)


def fcos_assign(
    priors: Priors,
    targets: Targets,
    *,
    ranges: Sequence[float] = _RANGES,
    radius: float | None = None,
    closed: bool = True,
    divisor: int = 32,
) -> Assignment:
    """Give each point the smallest object around it whose size suits the point's level.

    Arguments and result are those of :func:`detcore.assigners.fcos_assign`, to the last bit.

    Example:
        >>> points = Priors(torch.tensor([[[0.0, 0, 8, 8], [8, 0, 16, 8]]]), (2,), maps=((1, 2),))
        >>> one = Targets(torch.tensor([[[2.0, 2, 10, 12]]]), torch.tensor([[7]]), torch.tensor([[True]]))
        >>> fcos_assign(points, one, ranges=[8.0]).labels
        tensor([[ 7, -1]])
    """
    answer = Answer(priors, targets, divisor)
    image, slot = targets.valid.nonzero(as_tuple=True)
    objects = targets.boxes[image, slot]
    thing, prior = _near(priors, targets, objects, image, ranges, radius, divisor)

    # as the plain form has it, pair by pair
    x, y, stride, _ = xyxy_to_cxcywh(priors.boxes[0, prior]).unbind(-1)
    x1, y1, x2, y2 = objects[thing].unbind(-1)
    left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
    inside = torch.minimum(torch.minimum(left, right), torch.minimum(top, bottom)) > 0
    farthest = torch.maximum(torch.maximum(left, right), torch.maximum(top, bottom))
    ends = torch.tensor([-math.inf, *ranges], dtype=farthest.dtype)
    level = torch.bucketize(prior, torch.tensor(priors.counts).cumsum(0), right=True)
    low, high = ends[level], ends[level + 1]
    suits = (farthest >= low) & (farthest <= high) if closed else (farthest > low) & (farthest < high)
    candidate = inside & suits
    if radius is not None:
        candidate &= torch.maximum((left - right).abs(), (top - bottom).abs()) / 2 < radius * stride

    kept = candidate.nonzero()[:, 0]
    thing, at = thing[kept], image[thing[kept]] * answer.count + prior[kept]
    size = area(objects)[thing]
    smallest = size.new_zeros(len(answer.index)).scatter_reduce_(0, at, size, "amin", include_self=False)
    best = size == smallest[at]
    answer.choose(at[best], slot[thing[best]], "amin")
    answer.own(at)
    return answer.assignment()


def _near(
    priors: Priors,
    targets: Targets,
    objects: Float[Tensor, "n 4"],
    image: Int[Tensor, " n"],
    ranges: Sequence[float],
    radius: float | None,
    divisor: int,
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Pairs of object and point, in order of the objects: all that can matter, and a few that do not."""
    grid = sure_grid(priors)
    within = grid.within(targets, divisor)
    within = within[:, image] if within.shape[1] > 1 else within  # 2 n C
    low, high = (torch.tensor(ends, dtype=torch.float64)[grid.level] for ends in ([-math.inf, *ranges[:-1]], ranges))
    begin, end = extent(objects)
    first, last = torch.maximum(begin, end - high), torch.minimum(end, begin + high)  # 2 n C
    if radius is not None:
        centre, reach = (begin + end) / 2, radius * grid.side
        first, last = torch.maximum(first, centre - reach), torch.minimum(last, centre + reach)
    margin = _HAIR + grid.slack / grid.step
    least = ((first - grid.centre) / grid.step - margin).ceil().clamp(min=0)
    most = ((last - grid.centre) / grid.step + margin).floor().minimum(within - 1)
    large = (end - begin).amax(dim=0) * (1 + _HAIR) >= low  # no point inside is farther from a side than that
    return listed(grid, least.long(), torch.where(large, most, -1).long())
