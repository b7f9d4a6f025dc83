"""Priors that lie on regular grids, and the listing of those in a window: what the local matchers share.

All priors of one level and one place in the cell have one size and stand at regular steps: a lattice. Whether that
is so is read off the boxes, once for all equal priors; priors that moved have no grid.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from detcore.structures import Priors, Targets

__all__ = ["Grid", "grid_of", "listed", "sure_grid"]


@dataclass(frozen=True)
class Grid:
    """The C lattices of a set of priors. Pairs are x and y, in pixels and float64.

    Args:
        centre: of the first prior.
        side: of all priors.
        step: from one prior to the next, > 0.
        slack: by how much a prior's centre may be off.
        count: columns and rows.
        first: index of the first prior.
        stride: from one prior of a row to the next in index.
        level: of the lattice.
        begin: where the cells of each level's columns and rows begin, (2, L, most), infinite beyond the last; ``None``
            where cells are not told.
    """

    centre: Float[Tensor, "2 1 C"]
    side: Float[Tensor, "2 1 C"]
    step: Float[Tensor, "2 1 C"]
    slack: Float[Tensor, "2 1 C"]
    count: Int[Tensor, "2 1 C"]
    first: Int[Tensor, " C"]
    stride: Int[Tensor, " C"]
    level: Int[Tensor, " C"]
    begin: Float[Tensor, "2 L most"] | None

    def within(self, targets: Targets, divisor: int) -> Int[Tensor, "2 #B C"]:
        """Columns and rows that each image has; the others are beyond its padding, see ``max_iou_assign``."""
        if targets.sizes is None or self.begin is None:
            return self.count
        padded = ((targets.sizes + divisor - 1) // divisor * divisor).flip(1).T  # 2 B
        return (self.begin[:, None] < padded[..., None, None]).sum(dim=-1)[..., self.level]

    def prior(self, place: Int[Tensor, "2 *n C"]) -> Int[Tensor, "*n C"]:
        """Index of each lattice's prior at a column and a row."""
        return self.first + (place[1] * self.count[0] + place[0]) * self.stride


def listed(
    grid: Grid, least: Int[Tensor, "2 n C"], most: Int[Tensor, "2 n C"]
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Every prior of n windows in each lattice, as pairs (window, index of the prior) in order of the windows.

    Args:
        grid: of the priors.
        least: first column and row, both included.
        most: last column and row; below ``least``, the window is empty.
    """
    lattices = len(grid.first)
    wide, high = (most - least + 1).clamp(min=0)
    begin, wide = grid.prior(least).flatten(), wide.flatten()
    window, line = _spread(torch.where(wide > 0, high.flatten(), 0))  # first the rows
    lattice = window % lattices
    begin = begin[window] + line * (grid.count[0, 0] * grid.stride)[lattice]
    row, cell = _spread(wide[window])  # then the cells of each
    return (window // lattices)[row], begin[row] + cell * grid.stride[lattice][row]


def _spread(counts: Int[Tensor, " n"]) -> tuple[Int[Tensor, " total"], Int[Tensor, " total"]]:
    """``[2, 0, 1]`` -> ``[0, 0, 2], [0, 1, 0]``: whose each is, and its place there."""
    owner = torch.repeat_interleave(counts)
    return owner, torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]


_known: dict[tuple, tuple[Priors, Grid | None]] = {}
_MOST_KNOWN = 16  # shapes of a batch; each keeps a copy of its priors


def grid_of(priors: Priors) -> Grid | None:
    """The lattices of these priors, ``None`` where they do not lie on any.

    Worked out once: what is equal to priors seen before has their grid.
    """
    if priors.maps is None or len(priors.maps) != len(priors.counts) or len(priors.boxes) != 1:
        return None
    key = (priors.maps, priors.counts, priors.boxes.dtype, priors.cells is None)
    known = _known.get(key)
    if known is None or not _equal(known[0], priors):
        kept = Priors(
            priors.boxes.clone(), priors.counts, None if priors.cells is None else priors.cells.clone(), priors.maps
        )
        known = kept, _measured(kept, priors.maps)
        _known.pop(key, None)
        while len(_known) >= _MOST_KNOWN:
            del _known[next(iter(_known))]
        _known[key] = known
    return known[1]


def sure_grid(priors: Priors) -> Grid:
    """The lattices of priors that are known to lie on some.

    Raises:
        ValueError: if they do not.
    """
    grid = grid_of(priors)
    if grid is None:
        raise ValueError("sure_grid: priors must lie on a grid; got others. Ask grid_of first.")
    return grid


def _equal(one: Priors, other: Priors) -> bool:
    if one.cells is None or other.cells is None:
        return one.cells is other.cells and torch.equal(one.boxes, other.boxes)
    return torch.equal(one.boxes, other.boxes) and torch.equal(one.cells, other.cells)


def _measured(priors: Priors, maps: tuple[tuple[int, int], ...]) -> Grid | None:
    levels, begins, first = [], [], 0
    for level, ((rows, columns), count) in enumerate(zip(maps, priors.counts, strict=True)):
        stride, rest = divmod(count, rows * columns) if rows * columns else (0, 1)
        if rest or not stride:
            return None
        boxes = priors.boxes[0, first : first + count].view(rows, columns, stride, 4)
        x, y = boxes[0, :, :, 0::2], boxes[:, 0, :, 1::2]  # columns n 2, rows n 2
        if not (boxes[..., 0::2] == x).all() or not (boxes[..., 1::2] == y[:, None]).all():
            return None
        along_x, along_y = _axis(x.double()), _axis(y.double())
        if along_x is None or along_y is None:
            return None
        whole = torch.tensor([[columns], [rows]]).expand(-1, stride)
        at = first + torch.arange(stride)
        axes = torch.stack([along_x, along_y], 1)
        levels.append((axes, whole, at, torch.full_like(at, stride), torch.full_like(at, level)))
        if priors.cells is not None:
            cells = priors.cells[first : first + count].view(rows, columns, stride, 2)
            x, y = cells[0, :, 0, 0], cells[:, 0, 0, 1]
            if not (cells[..., 0] == x[:, None]).all() or not (cells[..., 1] == y[:, None, None]).all():
                return None
            begins += [x, y]
        first += count
    if any((begin.diff() < 0).any() for begin in begins):
        return None
    table = torch.nn.utils.rnn.pad_sequence(begins, True, torch.inf).unflatten(0, (-1, 2)) if begins else None
    measures, *rest = zip(*levels, strict=True)
    count, first, stride, level = (torch.cat(part, dim=-1) for part in rest)
    centre, side, step, slack = torch.cat(measures, dim=-1)[:, :, None]
    begin = None if table is None else table.transpose(0, 1)
    return Grid(centre, side, step, slack, count[:, None], first, stride, level, begin)


def _axis(edges: Float[Tensor, "places n 2"]) -> Float[Tensor, "4 n"] | None:
    """First centre, side, step and slack of n lattices along an axis; ``None`` unless sides and steps are equal."""
    sides, centres = edges[..., 1] - edges[..., 0], edges.mean(dim=-1)
    side = sides[0]
    step = centres.diff(dim=0).median(dim=0).values if len(centres) > 1 else torch.ones_like(side)
    place = torch.arange(len(centres))[:, None]
    slack = (centres - centres[0] - place * step).abs().amax(dim=0)
    regular = (side > 0) & (step > 0) & (slack <= step) & ((sides - side).abs().amax(dim=0) <= _EVEN * side)
    return torch.stack([centres[0], side, step, slack]) if regular.all() else None


_EVEN = 1e-4  # sides differ by the rounding of their corners
