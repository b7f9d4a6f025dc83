"""Exercises of the chapter on IoU-aware RetinaNet: the fused score, the IoU to learn, and two gradients."""

from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from detcore.boxes import iou
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


# --- fuse(class_score, quality, alpha)

_P = torch.tensor([0.2, 0.9, 0.05, 0.6])
_Q = torch.tensor([0.9, 0.3, 0.5, 0.6])


def _check_fuse(answer) -> None:
    half = _tensor(answer(_P, _Q, 0.5), _P, "the fused scores")
    steps = torch.linspace(0.1, 0.9, 5)
    rising = answer(torch.full((5,), 0.5), steps, 0.3)
    if not (rising.diff() > 0).all():
        raise Wrong(
            f"not monotone: a box of higher quality must score higher, quality {_row(steps)} gave {_row(rising)}"
        )
    for alpha, want, name in ((1.0, _P, "class score"), (0.0, _Q, "quality")):
        got, other = answer(_P, _Q, alpha), (_Q if alpha else _P)
        if not _differs(got, other):
            raise Wrong(
                f"convention swapped: at alpha = {alpha:g} this paper's score is the {name}, {_row(want)}, "
                f"got {_row(got)}"
            )
        if _differs(got, want):
            raise Wrong(
                f"wrong at an end: alpha = {alpha:g} must leave the {name} alone, {_row(want)}, got {_row(got)}"
            )
    low, high = torch.minimum(_P, _Q), torch.maximum(_P, _Q)
    if (half < low - 1e-6).any() or (half > high + 1e-6).any():
        raise Wrong(f"not between its factors: at alpha = 0.5 p = {_row(_P)} and q = {_row(_Q)} gave {_row(half)}")
    if _differs(half, (_P * _Q).sqrt()):
        raise Wrong(
            f"not a geometric mean: at alpha = 0.5 the score is sqrt(p q) = {_row((_P * _Q).sqrt())}, got {_row(half)}"
        )
    got, want = answer(_P, _Q, 0.4), _P**0.4 * _Q**0.6
    if _differs(got, want):
        raise Wrong(f"wrong between the ends: at alpha = 0.4 the scores are {_row(want)}, got {_row(got)}")


def _fuse(class_score: Tensor, quality: Tensor, alpha: float) -> Tensor:
    return class_score**alpha * quality ** (1 - alpha)


_FUSE = Exercise(
    name="fuse",
    task="fuse(class_score, quality, alpha): Eq. (5) of the paper; tensors of one shape and alpha, all in [0, 1].",
    checker=_check_fuse,
    solution=_fuse,
    wrong=MappingProxyType(
        {
            "RetinaNet-Conf's convention": lambda p, q, alpha: p ** (1 - alpha) * q**alpha,
            "plain product": lambda p, q, alpha: p * q,
            "arithmetic mean": lambda p, q, alpha: alpha * p + (1 - alpha) * q,
            "powers that do not sum to 1": lambda p, q, alpha: p**alpha * q ** (1 - alpha**2),
            "error in place of quality": lambda p, q, alpha: _fuse(p, 1 - q, alpha),
            "alpha bent": lambda p, q, alpha: _fuse(p, q, alpha + 0.2 * (alpha - 0.5) * alpha * (1 - alpha)),
            "one number": lambda p, q, alpha: _fuse(p, q, alpha).mean(),
        }
    ),
)


# --- iou_target(priors, boxes, objects, positive)

# Four priors of one picture, the boxes the head made of them, and the object each was given.
_PRIORS = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 0, 30, 10], [20, 0, 30, 10]])
_OBJECTS = torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 8], [20, 0, 30, 6], [20, 0, 30, 6]])
_BOXES = torch.tensor([[0.0, 0, 10, 8], [0, 0, 10, 4], [20, 0, 30, 3], [20, 0, 30, 6]])
_POSITIVE = torch.tensor([True, True, True, False])


def _check_target(answer) -> None:
    boxes = _BOXES.clone().requires_grad_()
    want = torch.tensor([1.0, 0.5, 0.5, 0.0])
    got = _tensor(answer(_PRIORS, boxes, _OBJECTS, _POSITIVE), want, "one target a prior")
    anchors = iou(_PRIORS, _OBJECTS)
    if not _differs(got[:3], anchors[:3]):
        raise Wrong(
            "the prior's overlap: the branch rates the box that comes out, so the targets are the IoU of the boxes, "
            f"{_row(want[:3])}; those of the priors are {_row(anchors[:3])}"
        )
    if not _differs(got[:3], iou(_PRIORS, _BOXES)[:3]):
        raise Wrong(f"box against its own prior: compare with the object, {_row(want[:3])}, got {_row(got[:3])}")
    if _differs(got[:3], want[:3]):
        raise Wrong(f"not the IoU of box and object: positives must have {_row(want[:3])}, got {_row(got[:3])}")
    if _differs(got[3:], want[3:]):
        raise Wrong(
            "a negative has a target: prior 3 owns no object and takes no part, give it 0; "
            f"its box happens to fit something with IoU 1, got {got[3].item():.4g}"
        )
    if got.requires_grad:
        raise Wrong("a gradient runs through the target: it reaches the boxes, and the book's default is detached")


def _target(priors: Tensor, boxes: Tensor, objects: Tensor, positive: Tensor) -> Tensor:
    return torch.where(positive, iou(boxes, objects), 0.0).detach()


_TARGET = Exercise(
    name="iou_target",
    task="iou_target(priors, boxes, objects, positive): (N,) what the IoU branch learns, 0 where it is not asked.",
    checker=_check_target,
    solution=_target,
    wrong=MappingProxyType(
        {
            "IoU of the prior": lambda priors, boxes, objects, positive: torch.where(
                positive, iou(priors, objects), 0.0
            ),
            "negatives asked too": lambda priors, boxes, objects, positive: iou(boxes, objects).detach(),
            "attached": lambda priors, boxes, objects, positive: torch.where(positive, iou(boxes, objects), 0.0),
            "box against its prior": lambda priors, boxes, objects, positive: torch.where(
                positive, iou(priors, boxes), 0.0
            ).detach(),
            "0 or 1": lambda priors, boxes, objects, positive: (positive & (iou(boxes, objects) >= 0.5)).float(),
            "positives only, shape lost": lambda priors, boxes, objects, positive: iou(boxes, objects)[
                positive
            ].detach(),
        }
    ),
)


# --- quality_gradient(logits, targets)

_LOGITS = torch.tensor([1.5, -1.0, 0.0, 3.0], dtype=torch.float64)
_TARGETS = torch.tensor([0.7, 0.7, 0.7, 0.2], dtype=torch.float64)


def _check_gradient(answer) -> None:
    o, t = _LOGITS.clone().requires_grad_(), _TARGETS.clone().requires_grad_()
    loss = F.binary_cross_entropy_with_logits(o, t, reduction="sum")
    on_logit, on_target = torch.autograd.grad(loss, [o, t])
    pair = answer(_LOGITS, _TARGETS)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise Wrong(f"not a pair: (dL/do, dL/dt) must come back, got {type(pair).__name__}")
    by_logit, by_target = (_tensor(value, _LOGITS, "each gradient") for value in pair)
    if not _differs(by_logit, -on_logit):
        raise Wrong(f"dL/do has the wrong sign: a logit that says too much must go down, {_row(on_logit)}")
    if _differs(by_logit, on_logit):
        raise Wrong(f"not dL/do: sigmoid(o) - t is {_row(on_logit)}, got {_row(by_logit)}")
    if not _differs(by_target, -on_target):
        raise Wrong(f"dL/dt has the wrong sign: where o > 0 the loss falls as t rises, {_row(on_target)}")
    if not _differs(by_target, -on_logit):
        raise Wrong(f"dL/dt is not -dL/do: the two arguments do not enter alike, dL/dt is {_row(on_target)}")
    if _differs(by_target, on_target):
        raise Wrong(
            f"not dL/dt: at o = {_row(_LOGITS)} it is {_row(on_target)}, got {_row(by_target)}. "
            "Write the loss as softplus(o) - o t"
        )


def _gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return logits.sigmoid() - targets, -logits


_GRADIENT = Exercise(
    name="quality_gradient",
    task="quality_gradient(logits, targets): (dL/do, dL/dt) of cross-entropy, element by element, without autograd.",
    checker=_check_gradient,
    solution=_gradient,
    wrong=MappingProxyType(
        {
            "logit's sign": lambda o, t: (t - o.sigmoid(), -o),
            "derivative of the sigmoid left in": lambda o, t: ((o.sigmoid() - t) * o.sigmoid() * (1 - o.sigmoid()), -o),
            "target's sign": lambda o, t: (o.sigmoid() - t, o),
            "target as if it were the logit": lambda o, t: (o.sigmoid() - t, t - o.sigmoid()),
            "positive part only": lambda o, t: (o.sigmoid() - t, -F.softplus(o)),
            "logit only": lambda o, t: o.sigmoid() - t,
        }
    ),
)

EXERCISES: tuple[Exercise, ...] = (_FUSE, _TARGET, _GRADIENT)
"""The chapter's exercises with code."""
