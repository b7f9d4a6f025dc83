"""Exercises of the chapter on SCOD: boxes that shrink, which layer an object belongs to, and what a cell says."""

from types import MappingProxyType

import torch
from torch import Tensor

from detcore.boxes import adaptive_iou, area, iou
from detcore.exercises._base import Exercise, Wrong
from detcore.exercises.association import _differs, _row, _tensor

__all__ = ["EXERCISES"]


# --- aiou(a, b, beta)

_A = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 10, 20], [0, 0, 10, 10]]).double()
_B = torch.tensor([[2.0, 0, 12, 10], [18, 1, 30, 13], [1, 2, 7, 16], [40, 40, 50, 50]]).double()


def _centre_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]


def _made(centre: Tensor, sides: Tensor) -> Tensor:
    return torch.cat([centre - sides / 2, centre + sides / 2], dim=1)


def _shrunk(boxes: Tensor, beta: float) -> Tensor:
    centre, sides = _centre_and_sides(boxes)
    return _made(centre, beta * sides)


def _plain(a: Tensor, b: Tensor, *, held: bool = True) -> Tensor:
    sides = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])
    both = (sides.clamp(min=0) if held else sides).prod(1)
    return both / (area(a) + area(b) - both)


def _aiou(a: Tensor, b: Tensor, beta: float) -> Tensor:
    return _plain(_shrunk(a, beta), _shrunk(b, beta))


def _nearer(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """Brings the centres together in place of moving them apart."""
    (ca, sa), (cb, sb) = _centre_and_sides(a), _centre_and_sides(b)
    return _plain(_made(ca, sa), _made(ca + beta * (cb - ca), sb))


def _check_aiou(answer) -> None:
    want = adaptive_iou(_A, _B, beta=0.8)
    got = _tensor(answer(_A, _B, 0.8), want, "one value a pair")
    other = answer(_A + 7.0, _B + 7.0, 0.8)
    if _differs(other, got):
        raise Wrong(f"not the same elsewhere: both boxes moved by 7, {_row(got)} became {_row(other)}")
    other = answer(_B, _A, 0.8)
    if _differs(other, got):
        raise Wrong(f"not symmetric: both boxes shrink; {_row(got)}, with the boxes changed over {_row(other)}")
    if _differs(got[3:], want[3:]):
        raise Wrong(f"boxes apart: a negative width times a negative height is no overlap; want 0, got {_row(got[3:])}")
    if not _differs(got, iou(_A, _B)):
        raise Wrong(f"beta does not enter: at 0.8 the first pair has {want[0]:.4f}, its IoU is {got[0]:.4f}")
    if not _differs(got, _aiou(_A, _B, 0.8**0.5)):
        raise Wrong(f"areas in place of sides: each side is multiplied by beta; want {_row(want)}, got {_row(got)}")
    if (got > iou(_A, _B) + 1e-9).any():
        raise Wrong(f"above the IoU: shrinking can only tell centres further apart; want {_row(want)}, got {_row(got)}")
    if _differs(got, want):
        raise Wrong(f"not the IoU of the shrunk boxes: want {_row(want)}, got {_row(got)}")
    got, want = answer(_A, _B, 0.5), adaptive_iou(_A, _B, beta=0.5)
    if _differs(got, want):
        raise Wrong(f"beta fixed: at 0.5 want {_row(want)}, got {_row(got)}")


_AIOU = Exercise(
    name="aiou",
    task=(
        "aiou(a, b, beta): boxes (n, 4) as corners; the IoU of each pair after both boxes have kept their centres "
        "and shrunk their sides to beta times."
    ),
    checker=_check_aiou,
    solution=_aiou,
    wrong=MappingProxyType(
        {
            "about the origin": lambda a, b, beta: _plain(torch.cat([a[:, :2], beta * a[:, 2:]], 1), _shrunk(b, beta)),
            "only one shrinks": lambda a, b, beta: _plain(_shrunk(a, beta), b),
            "nothing held at 0": lambda a, b, beta: _plain(_shrunk(a, beta), _shrunk(b, beta), held=False),
            "coordinates times beta": lambda a, b, beta: _plain(beta * a, beta * b),
            "areas": lambda a, b, beta: _aiou(a, b, beta**0.5),
            "centres nearer": _nearer,
            "times beta": lambda a, b, beta: beta * _plain(a, b),
            "beta fixed": lambda a, b, beta: _aiou(a, b, 0.8),
        }
    ),
)


# --- area_bounds(sides, open_top)

_SIDES = ((32.0, 64.0), (64.0, 120.0), (120.0, 180.0))


def _bounds(sides, open_top: bool = True):
    highs = [(least * most + most**2) / 2 for least, most in sides]
    lows = [0.0, *highs[:-1]]
    if open_top:
        highs[-1] = float("inf")
    return list(zip(lows, highs, strict=True))


def _from_own_side(sides, open_top):
    return [(least**2, high) for (least, _), (_, high) in zip(sides, _bounds(sides, open_top), strict=True)]


def _between(mean):
    def bounds(sides, open_top):
        highs = [mean(least, most) for least, most in sides]
        lows = [0.0, *highs[:-1]]
        return list(zip(lows, [*highs[:-1], float("inf")] if open_top else highs, strict=True))

    return bounds


def _check_bounds(answer) -> None:
    def ask(open_top):
        try:
            return [(float(low), float(high)) for low, high in answer(list(_SIDES), open_top)]
        except (TypeError, ValueError) as error:
            raise Wrong(f"not pairs: (low, high) of each layer must come back; {error}") from None

    want, got = _bounds(_SIDES, False), ask(False)
    if len(got) != len(want):
        raise Wrong(f"not one pair a layer: want {len(want)}, got {len(got)}")
    highs, lows = [high for _, high in got], [low for low, _ in got]
    if highs[-1] == float("inf"):
        raise Wrong("open although strict: with open_top = False the last bound is the formula's")
    if highs[0] < 200:
        raise Wrong(f"a side, not an area: the first layer ends at {want[0][1]:g} square pixels, got {highs[0]:g}")
    if lows[0] != 0:
        raise Wrong(f"nobody for the smallest: the first layer begins at 0, got {lows[0]:g}")
    if lows[1:] != highs[:-1]:
        raise Wrong(f"gaps or overlaps: each layer begins where the last one ended; got {got}")
    if any(abs(a - b) > 1e-6 for a, (_, b) in zip(highs, want, strict=True)):
        raise Wrong(f"not midway between min * max and max * max: want {[h for _, h in want]}, got {highs}")
    if ask(True)[-1][1] != float("inf"):
        raise Wrong("closed although open: with open_top = True the last layer answers for everything above")


_BOUNDS = Exercise(
    name="area_bounds",
    task=(
        "area_bounds(sides, open_top): sides is a list of (min, max) of each layer's priors in pixels, finest first; "
        "the list of (low, high) of the areas that each layer answers for."
    ),
    checker=_check_bounds,
    solution=_bounds,
    wrong=MappingProxyType(
        {
            "sides": _between(lambda least, most: (least + most) / 2),
            "squares of the two sides": _between(lambda least, most: (least**2 + most**2) / 2),
            "begins at its own side": _from_own_side,
            "overlapping": lambda sides, top: [
                (0.0 if i == 0 else sides[i][0] ** 2, high) for i, (_, high) in enumerate(_bounds(sides, top))
            ],
            "always open": lambda sides, top: _bounds(sides, True),
            "always closed": lambda sides, top: _bounds(sides, False),
            "one too few": lambda sides, top: _bounds(sides, top)[:-1],
        }
    ),
)


# --- cell_labels(centres, low, high, boxes, labels)

_BOXES = torch.tensor([[0.0, 0, 40, 40], [10, 10, 30, 30], [12, 12, 20, 20], [32, 0, 64, 50], [64, 0, 84, 20]])
_LABELS = torch.tensor([5, 6, 7, 8, 9])  # areas 1600, 400, 64, 1600, 400
_CENTRES = {  # cell's centre: (label, what it tells apart); areas between 100 and 1601
    (4.0, 36.0): (5, "a cell on one object: it has that object's class"),
    (50.0, 58.0): (-1, "a cell on none: background is -1"),
    (26.0, 26.0): (6, "the larger object: of two on a cell the one of smaller area wins"),
    (16.0, 16.0): (6, "a small object of another layer: it neither wins here nor hides the others"),
    (32.0, 8.0): (5, "a tie: of equal areas the first object wins"),
    (40.0, 36.0): (8, "the right side: a box ends before x2"),
    (64.0, 8.0): (9, "the left side: a box begins at x1"),
}


def _cells(centres: Tensor, low: float, high: float, boxes: Tensor, labels: Tensor, **other: bool) -> Tensor:
    x, y = centres[:, None].unbind(-1)
    x1, y1, x2, y2 = boxes.unbind(-1)
    size = area(boxes)
    before = x <= x2 if other.get("right_in") else x < x2
    after = x > x1 if other.get("left_out") else x >= x1
    on = after & before & (y >= y1) & (y < y2)
    suits = (size >= low) & (size <= high) if other.get("closed") else (size > low) & (size < high)
    candidates = on if other.get("all_compete") else on & suits
    key = -size if other.get("largest") else size
    cost = torch.where(candidates, key, torch.inf)
    best = len(size) - 1 - cost.flip(1).argmin(1) if other.get("last") else cost.argmin(1)
    found = candidates.any(1) & (suits[best] | (not other.get("all_compete", False)))
    return torch.where(found, labels[best], 0 if other.get("zero") else -1)


def _check_cells(answer) -> None:
    centres = torch.tensor(list(_CENTRES))
    want = torch.tensor([label for label, _ in _CENTRES.values()])
    got = _tensor(answer(centres, 100.0, 1601.0, _BOXES, _LABELS), want, "a label for each cell")
    for (x, y), (label, reason), value in zip(_CENTRES, _CENTRES.values(), got.tolist(), strict=True):
        if value != label:
            raise Wrong(f"{reason}; cell at ({x:g}, {y:g}) must get {label}, got {value}")
    for low, high in ((100.0, 400.0), (400.0, 1601.0)):
        value = answer(torch.tensor([[70.0, 8.0]]), low, high, _BOXES, _LABELS).item()
        if value != -1:
            raise Wrong(
                f"an area on the bound: 400 lies in neither of (100, 400) and (400, 1601); the cell of ({low:g}, "
                f"{high:g}) must get -1, got {value}"
            )


_CELLS = Exercise(
    name="cell_labels",
    task=(
        "cell_labels(centres, low, high, boxes, labels): what each cell of a block must say, the label of the smallest "
        "object on its centre among those with low < area < high, or -1; centres (cells, 2), boxes half-open."
    ),
    checker=_check_cells,
    solution=_cells,
    wrong=MappingProxyType(
        {
            "largest wins": lambda *a: _cells(*a, largest=True),
            "all compete": lambda *a: _cells(*a, all_compete=True),
            "closed bounds": lambda *a: _cells(*a, closed=True),
            "right side in": lambda *a: _cells(*a, right_in=True),
            "left side out": lambda *a: _cells(*a, left_out=True),
            "last of equals": lambda *a: _cells(*a, last=True),
            "background 0": lambda *a: _cells(*a, zero=True),
        }
    ),
)

EXERCISES: tuple[Exercise, ...] = (_AIOU, _BOUNDS, _CELLS)
"""The chapter's exercises with code."""
