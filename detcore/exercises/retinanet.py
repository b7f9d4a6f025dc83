"""Exercises of the chapter on RetinaNet: the loss it learns by, and two measures of its misalignment."""

from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from detcore.boxes import pairwise_iou
from detcore.exercises._base import Exercise, Wrong

__all__ = ["EXERCISES"]


def _tensor(value: object, like: Tensor, what: str) -> Tensor:
    """The answer, or what is wrong with its kind."""
    if not isinstance(value, Tensor):
        raise Wrong(f"not a tensor: {what} must come back; got {type(value).__name__}")
    if value.shape != like.shape:
        raise Wrong(f"not one value each: {what} must have shape {tuple(like.shape)}; got {tuple(value.shape)}")
    return value


def _differs(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two answers disagree; nan and infinity always do."""
    return not torch.allclose(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def _row(values: Tensor) -> str:
    return "[" + ", ".join(f"{v:.4g}" for v in values.tolist()) + "]"


# --- focal_loss(logits, positive, alpha, gamma)

_LOGITS = torch.tensor([-2.0, -0.5, 0.3, 1.5])


def _check_focal(answer) -> None:
    yes, no = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    _tensor(answer(_LOGITS, yes, 0.25, 2.0), _LOGITS, "the loss of each element")
    plain = {True: F.softplus(-_LOGITS), False: F.softplus(_LOGITS)}  # -ln p and -ln(1 - p)
    for side, mask, weight in ((True, yes, 0.25), (False, no, 0.75)):
        got, want = answer(_LOGITS, mask, 0.25, 0.0), weight * plain[side]
        if _differs(got, want):
            name = "positives by alpha" if side else "negatives by 1 - alpha"
            raise Wrong(
                f"not weighted cross-entropy at gamma = 0, {name}: "
                f"logits {_row(_LOGITS)} with alpha = 0.25 must give {_row(want)}, got {_row(got)}"
            )
    for mask, name, right in (
        (yes, "positives", _LOGITS.sigmoid()),
        (no, "negatives", 1 - _LOGITS.sigmoid()),
    ):
        fade = answer(_LOGITS, mask, 0.25, 2.0) / answer(_LOGITS, mask, 0.25, 0.0)
        if _differs(fade, (1 - right) ** 2):
            raise Wrong(
                f"the {name} do not fade as (1 - p_t)^gamma: from gamma 0 to 2 the loss at p_t = {_row(right)} must "
                f"shrink by {_row((1 - right) ** 2)}, got {_row(fade)}"
            )
    far = torch.tensor([-200.0, 200.0])
    got, want = answer(far, torch.tensor([True, False]), 0.25, 2.0), torch.tensor([50.0, 150.0])
    if _differs(got, want):
        raise Wrong(
            f"not finite and linear far out: a positive at logit -200 and a negative at 200 must cost {_row(want)}, "
            f"got {_row(got)}. Work on the logit: -ln sigmoid(o) is softplus(-o)"
        )


def focal_loss(logits: Tensor, positive: Tensor, alpha: float, gamma: float) -> Tensor:
    wrong = torch.where(positive, -logits, logits)  # its sigmoid is 1 - p_t
    weight = torch.where(positive, alpha, 1 - alpha)
    return weight * wrong.sigmoid() ** gamma * F.softplus(wrong)


def _focal_of(weight, fade, nll):
    """A focal loss put together from its three factors, each of which may be wrong."""

    def loss(logits, positive, alpha, gamma):
        p = logits.sigmoid()
        true_side = torch.where(positive, p, 1 - p)
        return weight(positive, alpha) * fade(p, true_side) ** gamma * nll(logits, positive, true_side)

    return loss


def _balanced(positive, alpha):
    return torch.where(positive, alpha, 1 - alpha)


def _stable(logits, positive, _):
    return F.softplus(torch.where(positive, -logits, logits))


_FOCAL = Exercise(
    name="focal_loss",
    task="focal_loss(logits, positive, alpha, gamma): the loss of each element; positive is a mask of the same shape.",
    checker=_check_focal,
    solution=focal_loss,
    wrong=MappingProxyType(
        {
            "alpha on the wrong side": _focal_of(
                lambda positive, alpha: torch.where(positive, 1 - alpha, alpha), lambda p, t: 1 - t, _stable
            ),
            "alpha on both sides": _focal_of(lambda positive, alpha: alpha, lambda p, t: 1 - t, _stable),
            "hard examples fade": _focal_of(_balanced, lambda p, t: t, _stable),
            "1 - p for both sides": _focal_of(_balanced, lambda p, t: 1 - p, _stable),
            "logarithm of the probability": _focal_of(_balanced, lambda p, t: 1 - t, lambda o, y, t: -t.log()),
            "averaged": lambda *args: focal_loss(*args).mean(),
        }
    ),
)


# --- best_iou_per_object(boxes, labels, object_boxes, object_labels)

# Two objects side by side of class 0, one far off of class 1; every side is 10 pixels.
_OBJECTS = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [50, 50, 60, 60]])
_OBJECT_LABELS = torch.tensor([0, 0, 1])
_BOXES = torch.tensor(
    [
        [0.0, 0, 10, 8],  # IoU 0.8 with the first
        [0, 0, 20, 10],  # spans both: 0.5 with each
        [50, 50, 60, 60],  # the third exactly, but called class 0
        [50, 50, 60, 54],  # the third at 0.4, class 1
        [80, 80, 90, 90],  # nothing there
    ]
)
_LABELS = torch.tensor([0, 0, 0, 1, 1])
_NO_BOXES, _NO_LABELS = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)


def _class_aware(boxes: Tensor, labels: Tensor, object_boxes: Tensor, object_labels: Tensor) -> Tensor:
    """IoU of every (box, object) pair, 0 where their classes differ."""
    return torch.where(labels[:, None] == object_labels, pairwise_iou(boxes, object_boxes), 0.0)


def _check_best(answer) -> None:
    want = torch.tensor([0.8, 0.5, 0.4])
    got = _tensor(answer(_BOXES, _LABELS, _OBJECTS, _OBJECT_LABELS), want, "the best IoU of each object")
    if abs(got[2].item() - 1.0) < 1e-4:
        raise Wrong("a box of another class counts: object 2 of class 1 is hit exactly by a box of class 0, got 1.0")
    if abs(got[1].item()) < 1e-4:
        raise Wrong(
            "a box serves one object only: box 1 spans objects 0 and 1 with IoU 0.5 each, and object 1 must have 0.5 "
            "even though box 1 overlaps object 0 as much; got 0"
        )
    if _differs(got, want):
        raise Wrong(f"not the largest IoU: objects must have {_row(want)}, got {_row(got)}")
    flipped = answer(_BOXES.flip(0), _LABELS.flip(0), _OBJECTS, _OBJECT_LABELS)
    if _differs(flipped, want):
        raise Wrong(f"depends on the order of the boxes: reversed, objects have {_row(flipped)}, not {_row(want)}")
    try:
        nothing = answer(_NO_BOXES, _NO_LABELS, _OBJECTS, _OBJECT_LABELS)
    except (RuntimeError, IndexError, ValueError) as error:
        raise Wrong(f"fails on a picture without boxes: every object must then have 0, got {error}") from error
    if _differs(_tensor(nothing, want, "the best IoU of each object"), torch.zeros(3)):
        raise Wrong(f"not 0 without boxes: got {_row(nothing)}")


def best_iou_per_object(boxes: Tensor, labels: Tensor, object_boxes: Tensor, object_labels: Tensor) -> Tensor:
    same = labels[:, None] == object_labels  # D M
    ious = torch.where(same, pairwise_iou(boxes, object_boxes), 0.0)
    # the zero row: a picture without boxes
    return torch.cat([ious, torch.zeros(1, len(object_boxes))]).amax(dim=0)


def _best_of_own_boxes(boxes, labels, object_boxes, object_labels):
    """Each box is handed to the object it overlaps most and forgotten by the others."""
    ious = _class_aware(boxes, labels, object_boxes, object_labels)
    own = F.one_hot(ious.argmax(dim=1), len(object_boxes)).bool()
    return torch.where(own, ious, 0.0).amax(dim=0)


_BEST = Exercise(
    name="best_iou_per_object",
    task="best_iou_per_object(boxes, labels, object_boxes, object_labels): (M,) best IoU with a box of its class.",
    checker=_check_best,
    solution=best_iou_per_object,
    wrong=MappingProxyType(
        {
            "classes ignored": lambda boxes, labels, objects, _: pairwise_iou(boxes, objects).amax(dim=0),
            "best object of each box": lambda *args: _class_aware(*args).amax(dim=1),
            "a box serves one object": _best_of_own_boxes,
            "mean in place of maximum": lambda *args: _class_aware(*args).mean(dim=0),
            "no boxes forgotten": lambda *args: _class_aware(*args).amax(dim=0),
        }
    ),
)


# --- oracle_scores(boxes, labels, object_boxes, object_labels)


def _check_oracle(answer) -> None:
    want = torch.tensor([0.8, 0.5, 0.0, 0.4, 0.0])
    got = _tensor(answer(_BOXES, _LABELS, _OBJECTS, _OBJECT_LABELS), want, "the score of each box")
    if abs(got[2].item() - 1.0) < 1e-4:
        raise Wrong("a wrong label earns a score: box 2 is exactly where an object of another class is, got 1.0")
    if abs(got[3].item()) < 1e-4:
        raise Wrong("a loose box gets nothing: box 3 has IoU 0.4 with an object of its class, got 0.0")
    if _differs(got, want):
        raise Wrong(f"not the IoU with the best object: boxes must score {_row(want)}, got {_row(got)}")
    try:
        empty = answer(_BOXES, _LABELS, _NO_BOXES, _NO_LABELS)
    except (RuntimeError, IndexError, ValueError) as error:
        raise Wrong(f"fails on a picture without objects: every box must then score 0, got {error}") from error
    if _differs(_tensor(empty, want, "the score of each box"), torch.zeros(5)):
        raise Wrong(f"not 0 without objects: got {_row(empty)}")


def oracle_scores(boxes: Tensor, labels: Tensor, object_boxes: Tensor, object_labels: Tensor) -> Tensor:
    same = labels[:, None] == object_labels  # D M
    ious = torch.where(same, pairwise_iou(boxes, object_boxes), 0.0)
    # the zero column: a picture without objects
    return torch.cat([ious, torch.zeros(len(boxes), 1)], dim=1).amax(dim=1)


def _hits_only(*args):
    scores = oracle_scores(*args)
    return torch.where(scores >= 0.5, scores, 0.0)


_ORACLE = Exercise(
    name="oracle_scores",
    task="oracle_scores(boxes, labels, object_boxes, object_labels): (D,) best IoU with an object of the box's class.",
    checker=_check_oracle,
    solution=oracle_scores,
    wrong=MappingProxyType(
        {
            "classes ignored": lambda boxes, labels, objects, _: pairwise_iou(boxes, objects).amax(dim=1),
            "best box of each object": lambda *args: _class_aware(*args).amax(dim=0),
            "cut at 0.5": _hits_only,
            "summed over objects": lambda *args: _class_aware(*args).sum(dim=1),
            "no objects forgotten": lambda *args: _class_aware(*args).amax(dim=1),
        }
    ),
)

EXERCISES: tuple[Exercise, ...] = (_FOCAL, _BEST, _ORACLE)
"""The chapter's exercises with code."""
