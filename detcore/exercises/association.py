"""Exercises of the chapter on the association loss: whose point is it, how PSE pulls, and where it comes to rest."""

from types import MappingProxyType

import torch
from torch import Tensor

from detcore.exercises._base import Exercise, Wrong

__all__ = ["EXERCISES"]


def _tensor(value: object, like: Tensor, what: str) -> Tensor:
    """The answer, or what is wrong with its kind."""
    if not isinstance(value, Tensor):
        raise Wrong(f"not a tensor: {what} must come back, got {type(value).__name__}")
    if value.shape != like.shape:
        raise Wrong(f"not one value each: {what} must have shape {tuple(like.shape)}, got {tuple(value.shape)}")
    return value


def _differs(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two answers disagree; nan and infinity always do."""
    return not torch.allclose(got.detach().double(), want.double(), rtol=tolerance, atol=tolerance)


def _row(values: Tensor) -> str:
    return "[" + ", ".join(f"{v:.4g}" for v in values.tolist()) + "]"


# --- point_owner(points, low, high, boxes)

# A large box, a small one inside it, and a third further right; points of a level for distances 16 to 64.
_BOXES = torch.tensor([[0.0, 0, 100, 60], [36, 12, 84, 44], [120, 0, 220, 100]])
_OWNERS = {  # point: (owner, what it tells apart)
    (60.0, 28.0): (1, "the largest object: of two candidates the one of smaller area wins"),
    (62.0, 6.0): (0, "outside the small object: the large one owns the point"),
    (10.0, 30.0): (-1, "the wrong distance: the farthest side decides the level, here 90 away"),
    (84.0, 28.0): (-1, "a point on the border: all four distances must be above 0"),
    (170.0, 50.0): (2, "inside the third: it is nobody else's"),
    (156.0, 50.0): (2, "an open end: a distance of exactly 64 belongs to the level"),
    (110.0, 30.0): (-1, "a point outside every box: nobody owns it"),
    (140.0, 50.0): (-1, "too far: 80 from the right side"),
}


def _check_owner(answer) -> None:
    points = torch.tensor(list(_OWNERS))
    want = torch.tensor([owner for owner, _ in _OWNERS.values()])
    got = _tensor(answer(points, 16.0, 64.0, _BOXES), want, "the index of an object, or -1, for each point")
    for (x, y), (owner, reason), value in zip(_OWNERS, _OWNERS.values(), got.tolist(), strict=True):
        if value != owner:
            raise Wrong(f"{reason}; point ({x:g}, {y:g}) must get {owner}, got {value}")
    near = torch.tensor([[60.0, 28.0]])
    if (value := answer(near, 24.0, 64.0, _BOXES).item()) != 1:
        raise Wrong(
            f"the lower end: a distance of exactly 24 belongs to a level that begins at 24, want 1, got {value}"
        )
    if (value := answer(near, 30.0, 64.0, _BOXES).item()) != 0:
        raise Wrong(
            "smallest before suitable: the small object does not suit a level from 30 on, so the large one, "
            f"60 from its farthest side, owns the point: want 0, got {value}"
        )
    if (value := answer(near, 16.0, 64.0, _BOXES.flip(0)).item()) != 1:
        raise Wrong(f"order of the objects: reversed, the same small object must win, want 1, got {value}")


def _sides(points: Tensor, boxes: Tensor) -> Tensor:
    x, y = points[:, None].unbind(-1)
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x - x1, y - y1, x2 - x, y2 - y], dim=-1)  # n m 4


def _cheapest(cost: Tensor, candidate: Tensor) -> Tensor:
    least, owner = cost.expand(candidate.shape).masked_fill(~candidate, torch.inf).min(dim=1)
    return torch.where(least < torch.inf, owner, -1)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(-1)


def _owner(points: Tensor, low: float, high: float, boxes: Tensor) -> Tensor:
    sides = _sides(points, boxes)
    farthest = sides.amax(-1)
    candidate = (sides.amin(-1) > 0) & (farthest >= low) & (farthest <= high)
    return _cheapest(_areas(boxes), candidate)


def _owner_open(points: Tensor, low: float, high: float, boxes: Tensor) -> Tensor:
    sides = _sides(points, boxes)
    farthest = sides.amax(-1)
    return _cheapest(_areas(boxes), (sides.amin(-1) > 0) & (farthest > low) & (farthest < high))


def _owner_border(points: Tensor, low: float, high: float, boxes: Tensor) -> Tensor:
    sides = _sides(points, boxes)
    farthest = sides.amax(-1)
    return _cheapest(_areas(boxes), (sides.amin(-1) >= 0) & (farthest >= low) & (farthest <= high))


def _owner_by_size(points: Tensor, low: float, high: float, boxes: Tensor) -> Tensor:
    sides = _sides(points, boxes)
    farthest = sides.amax(-1)
    return _cheapest(-_areas(boxes), (sides.amin(-1) > 0) & (farthest >= low) & (farthest <= high))


def _owner_then_range(points: Tensor, low: float, high: float, boxes: Tensor) -> Tensor:
    sides = _sides(points, boxes)
    owner = _cheapest(_areas(boxes), sides.amin(-1) > 0)
    farthest = sides.amax(-1).gather(1, owner.clamp(min=0)[:, None])[:, 0]
    return torch.where((owner >= 0) & (farthest >= low) & (farthest <= high), owner, -1)


def _owner_all_levels(points: Tensor, low: float, high: float, boxes: Tensor) -> Tensor:
    return _cheapest(_areas(boxes), _sides(points, boxes).amin(-1) > 0)


_OWNER = Exercise(
    name="point_owner",
    task=(
        "point_owner(points, low, high, boxes): (n,) index of the object that each point (x, y) of a level must find, "
        "-1 for none; the level is for farthest sides from low to high, both ends included."
    ),
    checker=_check_owner,
    solution=_owner,
    wrong=MappingProxyType(
        {
            "open ends": _owner_open,
            "border counted in": _owner_border,
            "largest object": _owner_by_size,
            "smallest object first, range after": _owner_then_range,
            "no range": _owner_all_levels,
            "a mask": lambda points, low, high, boxes: _sides(points, boxes).amin(-1) > 0,
        }
    ),
)


# --- pse_gradient(scores, ious, beta, k)

_P = torch.tensor([0.9, 0.5, 0.1, 0.6], dtype=torch.float64)
_I = torch.tensor([0.5, 0.9, 0.8, 0.6], dtype=torch.float64)


def _pse_gradient(scores: Tensor, ious: Tensor, beta: float, k: float) -> Tensor:
    return 2 * beta * (scores - k * ious) * scores * (1 - scores)


def _check_gradient(answer) -> None:
    want = _pse_gradient(_P, _I, 1.0, 1.0)
    got = _tensor(answer(_P, _I, 1.0, 1.0), _P, "dL/do of each positive")
    if not _differs(got, -want):
        raise Wrong(f"wrong sign: where p is above I the logit must come down, dL/do > 0; want {_row(want)}")
    if not _differs(got, 2 * (_P - _I)):
        raise Wrong(
            f"not down to the logit: this is dL/dp, the sigmoid's slope p (1 - p) is missing; want {_row(want)}"
        )
    if not _differs(got, want / 2):
        raise Wrong(f"half of it: the square gives a factor 2; want {_row(want)}, got {_row(got)}")
    if _differs(got, want):
        raise Wrong(f"not dL/do: at beta = k = 1 p = {_row(_P)} and I = {_row(_I)} give {_row(want)}, got {_row(got)}")
    got, want = answer(_P, _I, 0.25, 1.0), _pse_gradient(_P, _I, 0.25, 1.0)
    if _differs(got, want):
        raise Wrong(f"beta does not scale it: at beta = 0.25 want {_row(want)}, got {_row(got)}")
    got, want = answer(_P, _I, 1.0, 0.8), _pse_gradient(_P, _I, 1.0, 0.8)
    if _differs(got, want):
        raise Wrong(f"k does not move the goal: at k = 0.8 the goal is 0.8 I; want {_row(want)}, got {_row(got)}")


_GRADIENT = Exercise(
    name="pse_gradient",
    task="pse_gradient(scores, ious, beta, k): dL/do of beta (p - k I)^2, p = sigmoid(o), each, without autograd.",
    checker=_check_gradient,
    solution=_pse_gradient,
    wrong=MappingProxyType(
        {
            "the printed sign": lambda p, i, beta, k: -_pse_gradient(p, i, beta, k),
            "by the score": lambda p, i, beta, k: 2 * beta * (p - k * i),
            "2 forgotten": lambda p, i, beta, k: _pse_gradient(p, i, beta, k) / 2,
            "beta forgotten": lambda p, i, beta, k: _pse_gradient(p, i, 1.0, k),
            "k forgotten": lambda p, i, beta, k: _pse_gradient(p, i, beta, 1.0),
            "cross-entropy's": lambda p, i, beta, k: beta * (p - k * i),
            "the sum": lambda p, i, beta, k: _pse_gradient(p, i, beta, k).sum(),
        }
    ),
)


# --- resting_score(ious, alpha, beta, k)


def _resting(ious: Tensor, alpha: float, beta: float, k: float) -> Tensor:
    goal = k * ious
    return ((goal + (goal**2 + 2 * alpha / beta).sqrt()) / 2).clamp(max=1.0)


def _check_resting(answer) -> None:
    ious = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    want = _resting(ious, 0.25, 1.0, 1.0)
    got = _tensor(answer(ious, 0.25, 1.0, 1.0), ious, "the score at rest of each positive")
    if not got.isfinite().all():
        raise Wrong(f"no solution: there is one for every IoU, {_row(want)}; a minus under the root? got {_row(got)}")
    if not _differs(got, ious):
        raise Wrong(f"the spring alone: focal loss pulls too, so the rest lies above kI, {_row(want)}")
    if (got < ious - 1e-9).any():
        raise Wrong(f"below kI: focal loss only ever pulls up, so the rest is at {_row(want)}, got {_row(got)}")
    if _differs(got, want):
        raise Wrong(f"not where the two pulls cancel: I = {_row(ious)} come to rest at {_row(want)}, got {_row(got)}")
    for name, value, arguments in (
        ("k", 0.8, (0.25, 1.0, 0.8)),
        ("beta", 4.0, (0.25, 4.0, 1.0)),
        ("alpha", 0.1, (0.1, 1.0, 1.0)),
    ):
        got, want = answer(ious, *arguments), _resting(ious, *arguments)
        if _differs(got, want):
            raise Wrong(f"{name} does not enter as it should: at {name} = {value} want {_row(want)}, got {_row(got)}")
    high = torch.tensor([0.9, 1.0], dtype=torch.float64)
    got = answer(high, 0.25, 1.0, 1.0)
    if _differs(got, torch.ones(2)):
        raise Wrong(
            "a score above 1: from I = 1 - alpha / (2 beta) on nothing holds the score back, it goes to 1; "
            f"at I = {_row(high)} got {_row(got)}"
        )


_RESTING = Exercise(
    name="resting_score",
    task=(
        "resting_score(ious, alpha, beta, k): the score at which -alpha ln p + beta (p - k I)^2 is smallest, "
        "0 < p <= 1, for each IoU."
    ),
    checker=_check_resting,
    solution=_resting,
    wrong=MappingProxyType(
        {
            "as printed": lambda i, alpha, beta, k: (k * i + ((k * i) ** 2 - 2 * alpha / beta).sqrt()) / 2,
            "kI": lambda i, alpha, beta, k: k * i,
            "the other root": lambda i, alpha, beta, k: (k * i - ((k * i) ** 2 + 2 * alpha / beta).sqrt()) / 2,
            "first order": lambda i, alpha, beta, k: (k * i + (alpha / (2 * beta)) ** 0.5).clamp(max=1.0),
            "not held at 1": lambda i, alpha, beta, k: (k * i + ((k * i) ** 2 + 2 * alpha / beta).sqrt()) / 2,
            "k forgotten": lambda i, alpha, beta, k: _resting(i, alpha, beta, 1.0),
            "beta forgotten": lambda i, alpha, beta, k: _resting(i, alpha, 1.0, k),
        }
    ),
)

EXERCISES: tuple[Exercise, ...] = (_OWNER, _GRADIENT, _RESTING)
"""The chapter's exercises with code."""
