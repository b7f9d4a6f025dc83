"""Pairs of object and prior that can matter, and the assignment that comes of them: shared by the local matchers."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from detcore.boxes import iou
from detcore.kernels._grid import Grid, grid_of, listed, sure_grid
from detcore.structures import BACKGROUND, IGNORE, Assignment, Priors, Targets

__all__ = ["Answer", "Pairs", "applies", "extent", "overlapping"]

_WORTH = 80_000  # pairs of slot and prior in the batch; with fewer the plain forms are nearly as fast
_FAR = 1e6  # pixels; beyond, float32 no longer tells them apart and the margins below would not do


def applies(priors: Priors, targets: Targets) -> bool:
    """Whether the local matchers can take these and it pays: on a CPU, priors on a grid, boxes of one type."""
    boxes = targets.boxes
    return (
        type(priors.boxes) is type(boxes) is Tensor
        and priors.boxes.device.type == boxes.device.type == "cpu"
        and priors.boxes.dtype == boxes.dtype
        and boxes.dtype in (torch.float32, torch.float64)
        and targets.labels.dtype == torch.int64
        and not (priors.boxes.requires_grad or boxes.requires_grad)
        and targets.labels.numel() * priors.boxes.shape[1] >= _WORTH
        and grid_of(priors) is not None
        and bool((boxes.abs() < _FAR).all())
    )


@dataclass(frozen=True)
class Pairs:
    """Objects with priors, in the order of the objects.

    Args:
        thing: which of the batch's objects, counted over all images, padded slots left out.
        slot: the object's own, in its image.
        at: the prior, counted over all images: image * N + index.
        overlap: IoU of the two, to the last bit as :func:`detcore.boxes.pairwise_iou` has it.
    """

    thing: Int[Tensor, " pairs"]
    slot: Int[Tensor, " pairs"]
    at: Int[Tensor, " pairs"]
    overlap: Float[Tensor, " pairs"]

    def where(self, keep: Bool[Tensor, " pairs"]) -> "Pairs":
        """The pairs at which ``keep`` is true."""
        chosen = keep.nonzero()[:, 0]
        return Pairs(*(getattr(self, f.name)[chosen] for f in fields(self)))

    def peak(self, things: int) -> Float[Tensor, " pairs"]:
        """The greatest overlap of each pair's object."""
        return self.overlap.new_zeros(things).scatter_reduce_(0, self.thing, self.overlap, "amax")[self.thing]


def extent(boxes: Float[Tensor, "n 4"]) -> tuple[Float[Tensor, "2 n 1"], Float[Tensor, "2 n 1"]]:
    """Where boxes begin and end along x and y, in float64."""
    ends = boxes.double().T[..., None]
    return ends[:2], ends[2:]


def overlapping(
    priors: Priors, targets: Targets, *, least: float, peaks: bool, divisor: int
) -> tuple[Pairs, Int[Tensor, " n"], Int[Tensor, " n"]]:
    """All pairs that overlap by ``least``, and with ``peaks`` also those of each object's greatest overlap.

    A few pairs of lesser overlap are among them. No prior beyond an image's padding is.

    Args:
        priors: on a grid.
        targets: padded objects.
        least: IoU in (0, 1].
        peaks: whether the priors that overlap an object most are wanted where they do by less than ``least``.
        divisor: as in :func:`detcore.assigners.max_iou_assign`.

    Returns:
        The pairs, and image and slot of each object.
    """
    grid, boxes = sure_grid(priors), priors.boxes[0]
    image, slot = targets.valid.nonzero(as_tuple=True)
    objects = targets.boxes[image, slot]
    within = grid.within(targets, divisor)
    within = within[:, image] if within.shape[1] > 1 else within  # 2 n C
    begin, end = extent(objects)
    centre, side = (begin + end) / 2, (end - begin).clamp(min=0)
    wanted = begin.new_full((len(objects), 1), least)
    if peaks and len(objects):
        # a lattice's greatest overlap is that of the prior whose centre is nearest, so the peak is one of C
        nearest = ((centre - grid.centre) / grid.step).round().minimum(within - 1).clamp(min=0).long()
        reached = iou(boxes[grid.prior(nearest)], objects[:, None]).masked_fill((within < 1).any(dim=0), 0.0)
        wanted = wanted.minimum(reached.double().amax(dim=1, keepdim=True)).clamp(min=_SLIGHT)
    thing, prior = listed(grid, *_windows(grid, centre, side, wanted * _NEARLY, within))
    overlap = iou(boxes[prior], objects[thing])
    return Pairs(thing, slot[thing], image[thing] * len(boxes) + prior, overlap), image, slot


_NEARLY = 1 - 1e-3  # windows a little too wide lose nothing: float32's rounding, and sides equal to 1e-4 only
_SLIGHT = 1e-30  # of an object that nothing reaches
_HAIR = 1e-3  # of a step


def _windows(
    grid: Grid,
    centre: Float[Tensor, "2 n 1"],
    side: Float[Tensor, "2 n 1"],
    least: Float[Tensor, "n 1"],
    within: Int[Tensor, "2 #n C"],
) -> tuple[Int[Tensor, "2 n C"], Int[Tensor, "2 n C"]]:
    r"""First and last column and row of the priors of each lattice that can overlap an object by ``least``.

    IoU >= t of areas A and G needs an intersection of t (A + G) / (1 + t). It is a product; along y the overlap is at
    most the lesser side, so along x it must be at least the intersection over that. There it is half of both sides
    less the distance of the centres.
    """
    greatest = torch.minimum(side, grid.side)  # 2 n C
    needed = least / (1 + least) * (side.prod(dim=0) + grid.side.prod(dim=0))  # n C
    reach = (side + grid.side) / 2 - needed / greatest.flip(0) + grid.slack
    middle = (centre - grid.centre) / grid.step
    first = (middle - reach / grid.step - _HAIR).ceil().clamp(min=0)
    last = (middle + reach / grid.step + _HAIR).floor().minimum(within - 1)
    possible = greatest.prod(dim=0) >= needed
    return torch.where(possible, first, 0).long(), torch.where(possible, last, -1).long()


class Answer:
    """An assignment in which nobody owns a prior yet; flat over the images, see :attr:`Pairs.at`.

    Args:
        priors: on a grid.
        targets: padded objects.
        divisor: as in :func:`detcore.assigners.max_iou_assign`.
    """

    def __init__(self, priors: Priors, targets: Targets, divisor: int) -> None:
        self.priors, self.targets, self.batch = priors, targets, len(targets.boxes)
        self.count = priors.boxes.shape[1]
        size = self.batch * self.count
        self.labels = torch.full((size,), BACKGROUND)
        self.index = torch.zeros(size, dtype=torch.int64)
        self.boxes = priors.boxes.repeat(self.batch, 1, 1).flatten(0, 1)
        self.iou = priors.boxes.new_zeros(size)
        self.beyond = _beyond(priors, targets, divisor)
        if self.beyond is not None:
            self.labels.masked_fill_(self.beyond.flatten(), IGNORE)

    def choose(self, at: Int[Tensor, " n"], slot: Int[Tensor, " n"], which: str) -> None:
        """Let the object of the least (``"amin"``) or last (``"amax"``) slot that wants a prior be its index."""
        self.index.scatter_reduce_(0, at, slot, which, include_self=False)

    def best(self, pairs: Pairs) -> Pairs:
        """Let every prior's index be the object that it overlaps most, the first of equals; returns those pairs."""
        greatest = pairs.overlap.new_zeros(len(self.index)).scatter_reduce_(0, pairs.at, pairs.overlap, "amax")
        won = pairs.where(pairs.overlap == greatest[pairs.at])
        self.choose(won.at, won.slot, "amin")
        return won

    def own(self, at: Int[Tensor, " n"]) -> None:
        """Make these priors positive: they predict the object of their index."""
        image, prior = at // self.count, at % self.count
        slot = image * self.targets.boxes.shape[1] + self.index[at]
        boxes = self.targets.boxes.flatten(0, 1)[slot]
        self.labels[at] = self.targets.labels.flatten()[slot]
        self.boxes[at] = boxes
        self.iou[at] = iou(self.priors.boxes[0, prior], boxes)

    def assignment(self) -> Assignment:
        """The same as :func:`detcore.assigners.max_iou_assign` and its like return it."""
        flat = (self.labels, self.index, self.boxes, self.iou)
        labels, index, boxes, overlap = (part.unflatten(0, (self.batch, -1)) for part in flat)
        return Assignment(labels, index, boxes, overlap, self.targets)


def _beyond(priors: Priors, targets: Targets, divisor: int) -> Bool[Tensor, "B N"] | None:
    """Priors whose cell begins beyond their image's padding, ``None`` if there is none."""
    if targets.sizes is None or priors.cells is None:
        return None
    padded = (targets.sizes + divisor - 1) // divisor * divisor  # B 2, (height, width)
    if (priors.cells.amax(dim=0) < padded.flip(1)).all():
        return None
    x, y = priors.cells.unbind(-1)
    return (y >= padded[:, :1]) | (x >= padded[:, 1:])
