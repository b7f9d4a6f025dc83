"""Exercises of the chapter on matching: the overlap of two boxes, and who has to find whom."""

from types import MappingProxyType

import torch
from torch import Tensor

from detcore.exercises._base import Exercise, Wrong

__all__ = ["EXERCISES"]

BACKGROUND, IGNORED = -1, -2


def _tensor(value: object, shape: tuple[int, ...], what: str) -> Tensor:
    """The answer, or what is wrong with its kind."""
    if not isinstance(value, Tensor):
        raise Wrong(f"not a tensor: {what} must come back, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise Wrong(f"wrong shape: {what} must have shape {shape}, got {tuple(value.shape)}")
    return value


def _differs(got: Tensor, want: Tensor) -> bool:
    """Whether two answers disagree; nan and infinity always do."""
    return not torch.allclose(got.double(), want.double(), rtol=1e-5, atol=1e-6)


def _row(values: Tensor) -> str:
    return "[" + ", ".join(f"{v:.4g}" for v in values.tolist()) + "]"


# --- iou(a, b)

# Same box, half covered, side by side, apart, apart in one direction only, one inside the other.
_A = torch.tensor([[0.0, 0, 4, 2], [0, 0, 4, 2], [0, 0, 4, 2], [0, 0, 4, 2], [0, 0, 4, 2], [0, 0, 4, 4]])
_B = torch.tensor([[0.0, 0, 4, 2], [2, 0, 6, 2], [4, 0, 8, 2], [9, 9, 12, 11], [0, 9, 4, 11], [1, 1, 3, 3]])
_IOU = torch.tensor([1.0, 1 / 3, 0.0, 0.0, 0.0, 0.25])
_CASES = (
    "the same box",
    "half of each shared",
    "side by side",
    "far apart",
    "one above the other",
    "one inside the other",
)


def _check_iou(answer) -> None:
    got = _tensor(answer(_A, _B), (6,), "one IoU for each pair of rows")
    for case, apart in (("far apart", 3), ("one above the other", 4)):
        if _differs(got[apart], torch.tensor(0.0)):
            raise Wrong(
                f"not 0 for boxes {case}: {_row(_A[apart])} and {_row(_B[apart])} share nothing, "
                f"got {got[apart]:.4g}. A negative width of the overlap is no width"
            )
    swapped = answer(_B, _A)
    if _differs(got, swapped):
        row = int((got - swapped).abs().nan_to_num(1).argmax())
        raise Wrong(
            f"not symmetric: {_row(_A[row])} with {_row(_B[row])} is {got[row]:.4g}, the other way {swapped[row]:.4g}"
        )
    if (got < -1e-6).any() or (got > 1 + 1e-6).any():
        raise Wrong(f"outside [0, 1]: got {_row(got)}")
    for factor in (0.01, 100.0):
        scaled = answer(_A * factor, _B * factor)
        if _differs(scaled, got):
            raise Wrong(
                f"not scale invariant: all boxes {factor:g} times as large give {_row(scaled)}, not {_row(got)}"
            )
    if _differs(got, _IOU):
        row = int((got - _IOU).abs().nan_to_num(1).argmax())
        raise Wrong(
            f"not intersection over union: {_CASES[row]}, {_row(_A[row])} and {_row(_B[row])}, must give "
            f"{_IOU[row]:.4g}, got {got[row]:.4g}"
        )
    point = torch.tensor([[3.0, 3.0, 3.0, 3.0]])
    of_points = answer(point, point)
    if not of_points.isfinite().all():
        raise Wrong(f"not finite for empty boxes: two boxes without area must give 0, got {of_points.item()}")
    if _differs(of_points, torch.zeros(1)):
        raise Wrong(f"two empty boxes overlap: they share no area, got {of_points.item():.4g}")


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    width = torch.minimum(a[:, 2], b[:, 2]) - torch.maximum(a[:, 0], b[:, 0])
    height = torch.minimum(a[:, 3], b[:, 3]) - torch.maximum(a[:, 1], b[:, 1])
    return width.clamp(min=0) * height.clamp(min=0)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _iou(a: Tensor, b: Tensor) -> Tensor:
    width = torch.minimum(a[:, 2], b[:, 2]) - torch.maximum(a[:, 0], b[:, 0])
    height = torch.minimum(a[:, 3], b[:, 3]) - torch.maximum(a[:, 1], b[:, 1])
    shared = width.clamp(min=0) * height.clamp(min=0)
    area_a = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    area_b = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    union = area_a + area_b - shared
    return shared / union.clamp(min=1e-9)  # two empty boxes: 0, not 0 / 0


def _iou_unclamped(a, b):
    """Two negative sides make a positive area."""
    width = torch.minimum(a[:, 2], b[:, 2]) - torch.maximum(a[:, 0], b[:, 0])
    height = torch.minimum(a[:, 3], b[:, 3]) - torch.maximum(a[:, 1], b[:, 1])
    return width * height / (_area(a) + _area(b) - width * height)


def _iou_product_clamped(a, b):
    """The product of the sides is clamped, and not the sides: here with their absolute values."""
    width = torch.minimum(a[:, 2], b[:, 2]) - torch.maximum(a[:, 0], b[:, 0])
    height = torch.minimum(a[:, 3], b[:, 3]) - torch.maximum(a[:, 1], b[:, 1])
    shared = width.clamp(min=0) * height.abs()
    return shared / (_area(a) + _area(b) - shared)


def _iou_of_pixels(a, b):
    one = torch.tensor([0.0, 0.0, 1.0, 1.0])
    a, b = a + one, b + one
    shared = _overlap(a, b) * (_overlap(a - one, b - one) > 0)
    return shared / (_area(a) + _area(b) - shared)


_IOU_EXERCISE = Exercise(
    name="iou",
    task="iou(a, b): (n,) intersection over union of boxes (n, 4) and (n, 4), row by row.",
    checker=_check_iou,
    solution=_iou,
    wrong=MappingProxyType(
        {
            "sides not clamped": _iou_unclamped,
            "only one side clamped": _iou_product_clamped,
            "over the first box": lambda a, b: _overlap(a, b) / _area(a).clamp(min=1e-9),
            "union counts the overlap twice": lambda a, b: 2 * _overlap(a, b) / (_area(a) + _area(b) - _overlap(a, b)),
            "over the sum of areas": lambda a, b: _overlap(a, b) / (_area(a) + _area(b)).clamp(min=1e-9),
            "inclusive pixels": _iou_of_pixels,
            "0 / 0": lambda a, b: _overlap(a, b) / (_area(a) + _area(b) - _overlap(a, b)),
            "one added to both": lambda a, b: (_overlap(a, b) + 1e-9) / (_area(a) + _area(b) - _overlap(a, b) + 1e-9),
            "every pair": lambda a, b: torch.stack([_iou(a, b[i : i + 1].expand_as(a)) for i in range(len(b))], dim=1),
        }
    ),
)


# --- assign(overlap)

# Six priors, four objects. Object 2 has its best prior at 0.3, object 3 is out of everybody's reach.
_OVERLAP = torch.tensor(
    [
        [0.8, 0.6, 0.0, 0.0],  # object 0, though 1 would do
        [0.1, 0.5, 0.0, 0.0],  # exactly at the threshold: object 1
        [0.45, 0.0, 0.0, 0.0],  # neither
        [0.4, 0.1, 0.0, 0.0],  # exactly at the lower one: neither
        [0.0, 0.2, 0.3, 0.0],  # object 2's best
        [0.0, 0.0, 0.0, 0.0],  # nothing here
    ]
)
# Object 1's best prior is prior 0, which overlaps object 0 more: it goes to the object that forces it.
_OWNER = torch.tensor([1, 1, IGNORED, IGNORED, 2, BACKGROUND])


def _check_assign(answer) -> None:
    got = _tensor(answer(_OVERLAP), (6,), "one number a prior")
    if got.is_floating_point() or got.dtype == torch.bool:
        raise Wrong(f"not whole numbers: an object's index, -1 or -2, got {got.dtype}")
    if got[5] >= 0:
        raise Wrong(
            f"an object out of reach captures priors: object 3 overlaps nothing, so its best IoU is 0 and prior 5 must "
            f"be {BACKGROUND}, got {int(got[5])}"
        )
    if got[4] < 0:
        raise Wrong(
            f"an object goes without a prior: nobody overlaps object 2 by 0.5, so its best, prior 4 with 0.3, has to "
            f"take it, got {int(got[4])}"
        )
    if got[2] >= 0 or got[2] == BACKGROUND:
        raise Wrong(f"the band between is not ignored: prior 2 at 0.45 must be {IGNORED}, got {int(got[2])}")
    if got[1] != 1:
        raise Wrong(f"the upper threshold is exclusive: exactly 0.5 is positive, prior 1 must be 1, got {int(got[1])}")
    if got[3] != IGNORED:
        raise Wrong(f"the lower threshold is inclusive: exactly 0.4 is ignored, got {int(got[3])}")
    if got[0] == 0:
        raise Wrong(
            "the prior's wish beats the object's: prior 0 is the best of objects 0 (0.8) and 1 (0.6); the last object "
            "that forces it has it, so 1, got 0"
        )
    if not torch.equal(got, _OWNER):
        raise Wrong(f"priors go astray: must be {_OWNER.tolist()}, got {got.tolist()}")
    tie = answer(torch.tensor([[0.2], [0.2], [0.1]]))
    if tie.tolist() != [0, 0, BACKGROUND]:
        raise Wrong(f"a tie is broken: two priors overlap the object by 0.2, both are its best, got {tie.tolist()}")
    try:
        nobody = answer(torch.zeros(3, 0))
    except (RuntimeError, IndexError, ValueError) as error:
        raise Wrong(f"fails on a picture without objects: every prior must be {BACKGROUND}, raised {error}") from error
    if nobody.tolist() != [BACKGROUND] * 3:
        raise Wrong(f"an empty picture is not all background: got {nobody.tolist()}")


def _assign(overlap: Tensor) -> Tensor:
    if overlap.shape[1] == 0:
        return torch.full(overlap.shape[:1], BACKGROUND)
    best, owner = overlap.max(dim=1)
    owner = torch.where(best >= 0.5, owner, torch.where(best < 0.4, BACKGROUND, IGNORED))
    for j, column in enumerate(overlap.T):
        if column.max() > 0:  # the guard
            owner[column == column.max()] = j
    return owner


def _assign_with(
    *, reaches=lambda best: best >= 0.5, misses=lambda best: best < 0.4, force="object", guard=0.0, ties=True
):
    """The solution with one rule changed."""

    def assign(overlap):
        best, own = overlap.max(dim=1)
        owner = torch.where(reaches(best), own, torch.where(misses(best), BACKGROUND, IGNORED))
        for j, column in enumerate(overlap.T):
            if force == "off" or column.max() <= guard:
                continue
            rows = (column == column.max()).nonzero()[:, 0][: None if ties else 1]
            owner[rows] = j if force == "object" else own[rows]
        return owner

    return assign


_ASSIGN = Exercise(
    name="assign",
    task="assign(overlap): for each of N priors its object's index, -1 for none, -2 for ignored; overlap is (N, M).",
    checker=_check_assign,
    solution=_assign,
    wrong=MappingProxyType(
        {
            "no guard": _assign_with(guard=-1.0),
            "no force match": _assign_with(force="off"),
            "no band": _assign_with(misses=lambda best: best < 0.5),
            "more than 0.5": _assign_with(reaches=lambda best: best > 0.5),
            "0.4 is negative": _assign_with(misses=lambda best: best <= 0.4),
            "the prior's own best": _assign_with(force="prior"),
            "first of a tie": _assign_with(ties=False),
            "no objects forgotten": _assign_with(),
            "as floats": lambda overlap: _assign(overlap).float(),
        }
    ),
)

EXERCISES: tuple[Exercise, ...] = (_IOU_EXERCISE, _ASSIGN)
"""The chapter's exercises with code."""
