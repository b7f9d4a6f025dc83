"""Exercises of the primer on the SSD family: boxes of a cell, forced matches, hard negatives, two steps."""

import math
from types import MappingProxyType

import torch
from torch import Tensor

from detcore.exercises._answers import as_tensor, rows, same
from detcore.exercises._base import Exercise, Wrong
from detcore.exercises._two_steps import TWO_STEPS

__all__ = ["EXERCISES"]


# --- cell_boxes(column, row, step, side, following, ratios)


def _centred(column: int, row: int, step: float, shapes: list[tuple[float, float]], offset: float = 0.5) -> Tensor:
    x, y = (column + offset) * step, (row + offset) * step
    return torch.tensor([[x - w / 2, y - h / 2, x + w / 2, y + h / 2] for w, h in shapes])


def _shapes(side: float, following: float, ratios: list[float]) -> list[tuple[float, float]]:
    second = math.sqrt(side * following)
    boxes = [(side, side), (second, second)]
    for r in ratios:
        long, short = side * math.sqrt(r), side / math.sqrt(r)
        boxes += [(long, short), (short, long)]
    return boxes


def _cell_boxes(column: int, row: int, step: float, side: float, following: float, ratios: list[float]) -> Tensor:
    return _centred(column, row, step, _shapes(side, following, ratios))


def _check_cell(answer) -> None:
    cell = (2, 1, 16.0, 60.0, 111.0, [2.0, 3.0])
    want = _cell_boxes(*cell)
    got = as_tensor(answer(*cell), (6, 4), "6 boxes, two squares and two for each of two ratios, as corners,").double()
    centre, sides = (got[:, :2] + got[:, 2:]) / 2, got[:, 2:] - got[:, :2]
    goal, shapes = (want[:, :2] + want[:, 2:]) / 2, want[:, 2:] - want[:, :2]
    if torch.allclose(got[:, :2], goal.double()):
        raise Wrong("not corners: these are centre and sides, want x1, y1, x2, y2")
    if (got >= 0).all():
        raise Wrong("clipped to the picture: default boxes may reach beyond it, clipping changes what they match")
    area = sides.prod(1)
    if not torch.allclose(area[2:], area[:1].expand(4), rtol=1e-4):
        raise Wrong(
            "the ratio changes the area: width times sqrt r and height by sqrt r keep it at 3600, "
            f"got {rows(area[None])}"
        )
    if not same(area[1], torch.tensor(60.0 * 111), 0.1):
        raise Wrong(f"the second square: its side is the geometric mean, sqrt(60 * 111) = 81.61, got {sides[1, 0]:.4g}")
    if not same(centre, goal):
        raise Wrong(
            "not in the middle of the cell: column 2, row 1 of step 16 has its centre at (40, 24), "
            f"got ({centre[0, 0]:.4g}, {centre[0, 1]:.4g})"
        )
    if not same(sides, shapes):
        raise Wrong(
            f"another order: squares first, then lying and upright for each ratio; sides must be {rows(shapes)}, "
            f"got {rows(sides)}"
        )


_CELL = Exercise(
    name="cell_boxes",
    task=(
        "cell_boxes(column, row, step, side, following, ratios): (2 + 2 len(ratios), 4) corners of a cell's default "
        "boxes: square of side, square of sqrt(side * following), and for each ratio lying, then upright."
    ),
    checker=_check_cell,
    solution=_cell_boxes,
    wrong=MappingProxyType(
        {
            "no root": lambda i, j, t, m, n, ratios: _centred(
                i, j, t, _shapes(m, n, [])[:2] + [s for r in ratios for s in ((m * r, m), (m, m * r))]
            ),
            "arithmetic mean": lambda i, j, t, m, n, ratios: _centred(
                i, j, t, [(m, m), ((m + n) / 2, (m + n) / 2), *_shapes(m, n, ratios)[2:]]
            ),
            "corner of the cell": lambda i, j, t, m, n, ratios: _centred(i, j, t, _shapes(m, n, ratios), 0.0),
            "lying only": lambda i, j, t, m, n, ratios: _cell_boxes(i, j, t, m, n, ratios)[[0, 1, 2, 4]],
            "upright first": lambda i, j, t, m, n, ratios: _cell_boxes(i, j, t, m, n, ratios)[[0, 1, 3, 2, 5, 4]],
            "clipped": lambda *cell: _cell_boxes(*cell).clamp(min=0),
            "centre and sides": lambda i, j, t, m, n, ratios: torch.tensor(
                [[t * (i + 0.5), t * (j + 0.5), w, h] for w, h in _shapes(m, n, ratios)]
            ),
        }
    ),
)


# --- bipartite(overlap, threshold)

# Rows are priors, columns objects. The first two like the first prior best; the third touches nothing.
_OVERLAP = torch.tensor(
    [
        [0.45, 0.40, 0.00, 0.00],
        [0.10, 0.35, 0.00, 0.00],
        [0.20, 0.30, 0.00, 0.00],
        [0.00, 0.05, 0.00, 0.60],
        [0.00, 0.00, 0.00, 0.50],
        [0.00, 0.00, 0.00, 0.00],
    ]
)
_CROWD = torch.tensor([[0.80, 0.90], [0.10, 0.70], [0.75, 0.30]])


def _forced(overlap: Tensor) -> Tensor:
    """Object that got each prior, best free pair first, -1 for none."""
    free, owner = overlap.clone(), torch.full((len(overlap),), -1)
    for _ in range(overlap.shape[1]):
        prior, thing = divmod(int(free.argmax()), overlap.shape[1])
        if free[prior, thing] <= 1e-6:
            break
        owner[prior] = thing
        free[prior], free[:, thing] = -1.0, -1.0
    return owner


def _by_threshold(overlap: Tensor, threshold: float) -> Tensor:
    best, index = overlap.max(1)
    return torch.where(best >= threshold, index, -1)


def _bipartite(overlap: Tensor, threshold: float) -> Tensor:
    forced = _forced(overlap)
    return torch.where(forced >= 0, forced, _by_threshold(overlap, threshold))


def _override(overlap: Tensor, threshold: float, guard: float = 0.0) -> Tensor:
    owner = _by_threshold(overlap, threshold)
    for thing, column in enumerate(overlap.T):
        if column.max() > guard:
            owner[column.argmax()] = thing
    return owner


def _in_order(overlap: Tensor, threshold: float) -> Tensor:
    free, owner = overlap.clone(), _by_threshold(overlap, threshold)
    for thing in range(overlap.shape[1]):
        prior = int(free[:, thing].argmax())
        if free[prior, thing] > 1e-6:
            owner[prior], free[prior] = thing, -1.0
    return owner


def _check_bipartite(answer) -> None:
    got = as_tensor(answer(_OVERLAP, 0.5), (6,), "the object of each prior, -1 for none,")
    if (got == 2).any():
        raise Wrong("an object that touches nothing: the third overlaps no prior, nobody is to find it")
    if got[5] != -1:
        raise Wrong(f"a prior that touches nothing: the last one is background, -1, got {int(got[5])}")
    if not ((got == 0) | (got == 1)).any():
        raise Wrong("nobody is forced: the first two objects reach no 0.5 anywhere and must own a prior all the same")
    if not ((got == 0).any() and (got == 1).any()):
        raise Wrong(
            "an object without a prior: two like the first prior best, 0.45 against 0.40; the other must get the best "
            f"that is still free, got {got.tolist()}"
        )
    if got[4] != 3:
        raise Wrong("the threshold: a prior that nobody forced and that overlaps by exactly 0.5 is positive as well")
    crowd = as_tensor(answer(_CROWD, 0.95), (3,), "the object of each prior, -1 for none,")
    if crowd.tolist() != [1, -1, 0]:
        raise Wrong(
            "not the best pair of all first: the second object's 0.9 goes before the first's 0.8, whoever stands first "
            f"in the list; want [1, -1, 0], got {crowd.tolist()}"
        )
    want = _bipartite(_OVERLAP, 0.5)
    if got.tolist() != want.tolist():
        raise Wrong(f"another matching: want {want.tolist()}, got {got.tolist()}")


_BIPARTITE = Exercise(
    name="bipartite",
    task=(
        "bipartite(overlap, threshold): (N,) object of each prior, -1 for none, from IoUs (N, M): best free pair "
        "above 1e-6 first, until no object is left; other priors go to their best object from the threshold on."
    ),
    checker=_check_bipartite,
    solution=_bipartite,
    wrong=MappingProxyType(
        {
            "override": _override,
            "override, no guard": lambda overlap, threshold: _override(overlap, threshold, -1.0),
            "threshold only": _by_threshold,
            "object by object": _in_order,
            "forced only": lambda overlap, threshold: _forced(overlap),
            "everybody is positive": lambda overlap, threshold: _bipartite(overlap, 0.0),
        }
    ),
)


# --- hard_negatives(losses, positive, ratio)

_LOSSES = torch.tensor(
    [
        [0.1, 4.0, 0.9, 0.2, 0.5, 0.8, 0.3, 0.7],  # one positive, and it has the largest loss
        [2.0, 3.0, 1.0, 5.0, 4.0, 6.0, 0.5, 0.1],  # three positives: five negatives are left for nine places
        [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0],  # no object in the picture
    ]
)
_POSITIVE = torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]]) > 0


def _hardest(losses: Tensor, positive: Tensor, wanted: Tensor) -> Tensor:
    order = losses.masked_fill(positive, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return (rank < wanted) & ~positive


def _hard_negatives(losses: Tensor, positive: Tensor, ratio: float) -> Tensor:
    return _hardest(losses, positive, ratio * positive.sum(1, keepdim=True))


def _check_negatives(answer) -> None:
    got = as_tensor(answer(_LOSSES, _POSITIVE, 3.0), (3, 8), "true for each negative that is kept,").bool()
    if (got & _POSITIVE).any():
        raise Wrong("a positive among the negatives: they have their own place in the loss, and would count twice")
    if got[2].any():
        raise Wrong("negatives of an empty picture: three times no positive is none, as in SSD")
    counts = got.sum(1).tolist()
    if counts[0] != 3:
        raise Wrong(f"not three a positive: the first picture has one positive, so it keeps 3, got {counts[0]}")
    if not got[0, [2, 5, 7]].all():
        raise Wrong(f"not the hardest: losses 0.9, 0.8 and 0.7 are kept, got {rows(_LOSSES[:1, got[0]])}")
    if counts[1] != 5:
        raise Wrong(f"too few for nine: the second picture has only five negatives and keeps all, got {counts[1]}")
    if (few := int(answer(_LOSSES, _POSITIVE, 1.0).sum())) != 4:
        raise Wrong(f"the ratio is not used: one for each of four positives is 4 in all, got {few}")


_NEGATIVES = Exercise(
    name="hard_negatives",
    task=(
        "hard_negatives(losses, positive, ratio): (B, N) mask of each picture's negatives with the largest losses, "
        "ratio for each of its positives, no more than there are."
    ),
    checker=_check_negatives,
    solution=_hard_negatives,
    wrong=MappingProxyType(
        {
            "over the batch": lambda losses, positive, ratio: _hardest(
                losses.view(1, -1), positive.view(1, -1), ratio * positive.sum().view(1, 1)
            ).view(positive.shape),
            "positives not left out": lambda losses, positive, ratio: (
                losses.argsort(dim=1, descending=True).argsort(dim=1) < ratio * positive.sum(1, keepdim=True)
            ),
            "easiest": lambda losses, positive, ratio: (
                (
                    losses.masked_fill(positive, torch.inf).argsort(dim=1).argsort(dim=1)
                    < ratio * positive.sum(1, keepdim=True)
                )
                & ~positive
            ),
            "at most three": lambda losses, positive, ratio: _hardest(
                losses, positive, ratio * positive.any(1, keepdim=True)
            ),
            "positives counted in": lambda losses, positive, ratio: _hardest(
                losses, positive, ratio * positive.sum(1, keepdim=True) - positive.sum(1, keepdim=True)
            ),
            "ratio fixed": lambda losses, positive, ratio: _hard_negatives(losses, positive, 3.0),
        }
    ),
)


EXERCISES: tuple[Exercise, ...] = (_CELL, _BIPARTITE, _NEGATIVES, TWO_STEPS)
"""The chapter's exercises with code."""
