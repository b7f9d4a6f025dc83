"""Exercises of the first chapter: boxes as COCO writes them, and the curve under which AP is the area."""

from types import MappingProxyType

import torch
from torch import Tensor

from detcore.exercises._base import Exercise, Wrong

__all__ = ["EXERCISES"]


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


# --- to_xyxy(boxes)

_COCO = torch.tensor([[10.0, 20.0, 30.0, 5.0], [0.5, 0.0, 1.0, 96.0]])
_CORNERS = torch.tensor([[10.0, 20.0, 40.0, 25.0], [0.5, 0.0, 1.5, 96.0]])


def _check_to_xyxy(answer) -> None:
    given = _COCO.clone()
    got = _tensor(answer(given), (2, 4), "the corners of two boxes")
    if _differs(given, _COCO):
        raise Wrong(f"changes its input: the caller's boxes were {_row(_COCO[0])} and are {_row(given[0])} now")
    if not _differs(got, _COCO):
        raise Wrong(f"nothing happened: {_row(_COCO[0])} is 30 pixels wide, so its right side is at 40, got it back")
    if not _differs(got - _CORNERS, torch.tensor([0.0, 0.0, -1.0, -1.0]).expand(2, 4)):
        raise Wrong(
            f"off by one pixel: corners are coordinates and not pixel indices, width is x2 - x1: {_row(_COCO[0])} must "
            f"give {_row(_CORNERS[0])}, got {_row(got[0])}"
        )
    if _differs(got[:, :2], _COCO[:, :2]):
        raise Wrong(
            f"first corner moved: COCO's x and y are the upper left corner, not the centre. {_row(_COCO[0])} must "
            f"begin with {_row(_COCO[0, :2])}, got {_row(got[0])}"
        )
    if _differs(got, _CORNERS):
        raise Wrong(f"second corner wrong: {_row(_COCO[0])} must give {_row(_CORNERS[0])}, got {_row(got[0])}")
    try:
        none = answer(torch.zeros(0, 4))
    except (RuntimeError, IndexError, ValueError) as error:
        raise Wrong(f"fails on a picture without objects: (0, 4) must give (0, 4), raised {error}") from error
    if not isinstance(none, Tensor) or tuple(none.shape) != (0, 4):
        shape = tuple(none.shape) if isinstance(none, Tensor) else type(none).__name__
        raise Wrong(f"a picture without objects loses its shape: (0, 4) must give (0, 4), got {shape}")


def _to_xyxy(boxes: Tensor) -> Tensor:
    x, y, width, height = boxes.unbind(-1)
    return torch.stack([x, y, x + width, y + height], dim=-1)


def _to_xyxy_in_place(boxes):
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _to_xyxy_from_centre(boxes):
    x, y, width, height = boxes.unbind(-1)
    return torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=-1)


_TO_XYXY = Exercise(
    name="to_xyxy",
    task="to_xyxy(boxes): corners (n, 4) of COCO's boxes (x, y, width, height), (n, 4); n may be 0.",
    checker=_check_to_xyxy,
    solution=_to_xyxy,
    wrong=MappingProxyType(
        {
            "given back": lambda boxes: boxes,
            "input overwritten": _to_xyxy_in_place,
            "as if from the centre": _to_xyxy_from_centre,
            "inclusive pixels": lambda boxes: _to_xyxy(boxes) - torch.tensor([0.0, 0.0, 1.0, 1.0]),
            "width and height swapped": lambda boxes: _to_xyxy(boxes[:, [0, 1, 3, 2]]),
            "row by row, rows needed": lambda boxes: torch.stack([_to_xyxy(box) for box in boxes]),
            "empty list for nothing": lambda boxes: torch.tensor([_to_xyxy(box).tolist() for box in boxes]),
        }
    ),
)


# --- precision_recall(scores, right, num_objects)

_SCORES = torch.tensor([0.2, 0.9, 0.6, 0.4])
_RIGHT = torch.tensor([True, True, False, True])
_OBJECTS = 5
_PRECISION, _RECALL = torch.tensor([1.0, 1 / 2, 2 / 3, 3 / 4]), torch.tensor([0.2, 0.2, 0.4, 0.6])


def _pair(value: object, count: int) -> tuple[Tensor, Tensor]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise Wrong(f"not a pair: precision and recall must come back, got {type(value).__name__}")
    precision, recall = (
        _tensor(part, (count,), name) for part, name in zip(value, ("precision", "recall"), strict=True)
    )
    return precision, recall


def _check_precision_recall(answer) -> None:
    precision, recall = _pair(answer(_SCORES, _RIGHT, _OBJECTS), 4)
    case = "scores [0.9, 0.6, 0.4, 0.2], right [yes, no, yes, yes], 5 objects"
    if not _differs(precision, _RECALL) and not _differs(recall, _PRECISION):
        raise Wrong("the two are swapped: precision comes first, recall second")
    if not _differs(recall[-1], torch.tensor(1.0)):
        raise Wrong(f"objects that nobody found are forgotten: {case} end at recall 0.6, got 1")
    if (recall.diff() < 0).any():
        raise Wrong(f"recall falls: taking one more detection can lose no object, got {_row(recall)}")
    unsorted = _RIGHT.cumsum(0)
    if not _differs(recall, unsorted / _OBJECTS):
        raise Wrong(f"not best first: the first detection given has the lowest score; {case} give {_row(_RECALL)}")
    if _differs(recall, _RECALL):
        raise Wrong(f"not the share of the objects: {case} give recall {_row(_RECALL)}, got {_row(recall)}")
    if _differs(precision, _PRECISION):
        raise Wrong(f"not the share of the detections so far: {case} give {_row(_PRECISION)}, got {_row(precision)}")
    try:
        nothing = answer(torch.zeros(0), torch.zeros(0, dtype=torch.bool), _OBJECTS)
    except (RuntimeError, IndexError, ValueError) as error:
        raise Wrong(f"fails without detections: both must be empty, raised {error}") from error
    _pair(nothing, 0)


def _precision_recall(scores: Tensor, right: Tensor, num_objects: int) -> tuple[Tensor, Tensor]:
    hits = right[scores.argsort(descending=True)].cumsum(0)
    return hits / torch.arange(1, len(hits) + 1), hits / num_objects


def _of_sorted(measure):
    """An answer that sorts as it should and then goes wrong in ``measure(right, num_objects)``."""
    return lambda scores, right, num_objects: measure(right[scores.argsort(descending=True)], num_objects)


_PRECISION_RECALL = Exercise(
    name="precision_recall",
    task="precision_recall(scores, right, num_objects): two (D,) tensors, after each detection, best score first.",
    checker=_check_precision_recall,
    solution=_precision_recall,
    wrong=MappingProxyType(
        {
            "recall first": lambda *args: _precision_recall(*args)[::-1],
            "share of what was found": _of_sorted(
                lambda right, n: (right.cumsum(0) / torch.arange(1, len(right) + 1), right.cumsum(0) / right.sum())
            ),
            "in the order given": lambda scores, right, n: (
                right.cumsum(0) / torch.arange(1, len(right) + 1),
                right.cumsum(0) / n,
            ),
            "one by one": _of_sorted(lambda right, n: (right.float(), right / n)),
            "precision over all detections": _of_sorted(
                lambda right, n: (right.cumsum(0) / len(right), right.cumsum(0) / n)
            ),
            "last value needed": lambda scores, right, n: (
                _precision_recall(scores, right, n)[0],
                _precision_recall(scores, right, n)[1].clamp(max=float(right.cumsum(0)[-1])),
            ),
        }
    ),
)

EXERCISES: tuple[Exercise, ...] = (_TO_XYXY, _PRECISION_RECALL)
"""The chapter's exercises with code."""
