"""Exercises of the chapter on RetinaNet-Conf: score and filter, negatives with a weight, QFL, and recalibration."""

from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from detcore.exercises._base import Exercise, Wrong
from detcore.losses import quality_focal_loss

__all__ = ["EXERCISES"]


def _tensor(value: object, like: Tensor, what: str) -> Tensor:
    """The answer, or what is wrong with its kind."""
    if not isinstance(value, Tensor):
        raise Wrong(f"not a tensor: {what} must come back, got {type(value).__name__}")
    if value.shape != like.shape:
        raise Wrong(f"wrong shape: {what} must have shape {tuple(like.shape)}, got {tuple(value.shape)}")
    return value


def _differs(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two answers disagree; nan and infinity always do."""
    return not torch.allclose(got.detach().double(), want.double(), rtol=tolerance, atol=tolerance)


def _row(values: Tensor) -> str:
    return "[" + ", ".join(f"{v:.4g}" for v in values.tolist()) + "]"


# --- conf_score(class_score, confidence, alpha, min_confidence)

_P = torch.tensor([0.2, 0.9, 0.8, 0.6])
_Q = torch.tensor([0.9, 0.3, 0.5, 0.6])


def _check_score(answer) -> None:
    full = _tensor(answer(_P, _Q, 0.4, None), _P, "the scores")
    if not _differs(full, _P**0.4 * _Q**0.6):
        raise Wrong(
            f"the other paper's alpha: here it is the exponent of the confidence, {_row(_P**0.6 * _Q**0.4)}, "
            f"got {_row(full)}"
        )
    if not _differs(full, _P * _Q):
        raise Wrong(f"plain product: at alpha = 0.4 the scores are {_row(_P**0.6 * _Q**0.4)}, got {_row(full)}")
    if _differs(full, _P**0.6 * _Q**0.4):
        raise Wrong(f"not Eq. (11): at alpha = 0.4 the scores are {_row(_P**0.6 * _Q**0.4)}, got {_row(full)}")
    cut = answer(_P, _Q, 0.4, 0.5)
    if not _differs(cut, full):
        raise Wrong(f"nothing filtered: of confidences {_row(_Q)} those up to 0.5 must score 0, got {_row(cut)}")
    if cut[0] == 0:
        raise Wrong("filtered by the class score: box 0 has confidence 0.9 and stays, got score 0")
    if cut[2] != 0:
        raise Wrong(
            f"the border is kept: confidence 0.5 is not above 0.5, its score must be 0, got {cut[2].item():.4g}"
        )
    if _differs(cut, torch.where(_Q > 0.5, full, 0.0)):
        raise Wrong(f"survivors changed: the filter must leave {_row(full[[0, 3]])} alone, got {_row(cut[[0, 3]])}")
    if answer(_P, _Q, 0.0, 0.5)[1] != 0:
        raise Wrong("the filter fades with alpha: at alpha = 0 a confidence of 0.3 must still be thrown out")


def _score(class_score: Tensor, confidence: Tensor, alpha: float, min_confidence: float | None) -> Tensor:
    fused = class_score ** (1 - alpha) * confidence**alpha
    return fused if min_confidence is None else torch.where(confidence > min_confidence, fused, 0.0)


_SCORE = Exercise(
    name="conf_score",
    task="conf_score(class_score, confidence, alpha, min_confidence): Eq. (11), 0 where the confidence is not above "
    "min_confidence; None filters nothing.",
    checker=_check_score,
    solution=_score,
    wrong=MappingProxyType(
        {
            "the IoU-aware paper's alpha": lambda p, q, alpha, least: _score(p, q, 1 - alpha, least),
            "product": lambda p, q, alpha, least: p * q,
            "no filter": lambda p, q, alpha, least: _score(p, q, alpha, None),
            "filter on the class score": lambda p, q, alpha, least: torch.where(
                p > (least or 0.0), _score(p, q, alpha, None), 0.0
            ),
            "border kept": lambda p, q, alpha, least: torch.where(q >= (least or 0.0), _score(p, q, alpha, None), 0.0),
            "survivors fall back to the class score": lambda p, q, alpha, least: (
                _score(p, q, alpha, None) if least is None else torch.where(q > least, p, 0.0)
            ),
            "confidence zeroed before the power": lambda p, q, alpha, least: _score(
                p, q if least is None else torch.where(q > least, q, 0.0), alpha, None
            ),
        }
    ),
)


# --- weighted_ce(logits, targets, labels, weight)

_O = torch.tensor([1.5, -0.5, 0.0, 2.0, 0.4, -3.0, 0.7], dtype=torch.float64)
_T = torch.tensor([0.8, 0.6, 0.0, 0.1, 0.3, 0.4, 0.9], dtype=torch.float64)  # IoU of every box, also where nobody asks
_LABELS = torch.tensor([0, 3, -1, -1, -1, -2, -2])


def _check_weighted(answer) -> None:
    own = F.binary_cross_entropy_with_logits(_O, _T, reduction="none")
    away = F.binary_cross_entropy_with_logits(_O, torch.zeros_like(_T), reduction="none")
    positives, negatives = own[:2].sum() / 2, away[2:5].sum() / 2
    plain = _tensor(answer(_O, _T, _LABELS, 0.0), positives, "one number")
    if not _differs(plain, own[:2].sum() / len(_O)):
        raise Wrong(f"divided by all priors: two positives share {own[:2].sum():.4f}, got {plain:.4f}")
    if _differs(plain, positives):
        raise Wrong(f"not the positives' cross-entropy: at weight 0 it is {positives:.4f}, got {plain:.4f}")
    added = answer(_O, _T, _LABELS, 0.1) - plain
    everyone = 0.1 * away[2:].sum() / 2
    if not _differs(added, everyone):
        raise Wrong("ignored priors are pulled down: labels of -2 take part in nothing")
    if not _differs(added, 0.1 * own[2:5].sum() / 2):
        raise Wrong("negatives told their own IoU: CE^w pulls them to 0, whatever their box happens to reach")
    if not _differs(added, 0.1 * away[2:5].mean()):
        raise Wrong("negatives averaged: each one counts, so a hundred thousand of them can outweigh the positives")
    if _differs(added, 0.1 * negatives):
        raise Wrong(f"wrong share of the negatives: weight 0.1 must add {0.1 * negatives:.4f}, got {added:.4f}")
    empty = answer(_O, _T, torch.full_like(_LABELS, -1), 0.1)
    if not empty.isfinite() or _differs(empty, 0.1 * away.sum()):
        raise Wrong(f"a batch without objects: divide by at least 1, {0.1 * away.sum():.4f}, got {empty:.4f}")


def _weighted(logits: Tensor, targets: Tensor, labels: Tensor, weight: float) -> Tensor:
    positive, negative = labels >= 0, labels == -1
    entropy = F.binary_cross_entropy_with_logits(logits, torch.where(positive, targets, 0.0), reduction="none")
    share = positive.to(entropy) + weight * negative.to(entropy)
    return (share * entropy).sum() / positive.sum().clamp(min=1)


def _variant(asked, wanted, total):
    """A wrong answer: who is asked as a negative, what negatives are told, and what divides."""

    def answer(o: Tensor, t: Tensor, labels: Tensor, weight: float) -> Tensor:
        positive, negative = labels >= 0, asked(labels)
        own = F.binary_cross_entropy_with_logits(o, t, reduction="none")
        away = F.binary_cross_entropy_with_logits(o, wanted(t), reduction="none")
        return ((positive * own).sum() + weight * (negative * away).sum()) / total(positive, negative)

    return answer


_WEIGHTED = Exercise(
    name="weighted_ce",
    task="weighted_ce(logits, targets, labels, weight): CE^w as one number; labels >= 0 positive, -1 negative, "
    "-2 ignored.",
    checker=_check_weighted,
    solution=_weighted,
    wrong=MappingProxyType(
        {
            "divided by all": _variant(
                lambda labels: labels == -1, torch.zeros_like, lambda positive, negative: len(positive)
            ),
            "all but positives": _variant(
                lambda labels: labels < 0, torch.zeros_like, lambda positive, negative: positive.sum().clamp(min=1)
            ),
            "negatives rated": _variant(
                lambda labels: labels == -1, lambda t: t, lambda positive, negative: positive.sum().clamp(min=1)
            ),
            "no positives": _variant(
                lambda labels: labels == -1, torch.zeros_like, lambda positive, negative: positive.sum()
            ),
            "mean of the negatives": lambda o, t, labels, weight: (
                _weighted(o, t, labels, 0.0)
                + weight
                * F.binary_cross_entropy_with_logits(o, torch.zeros_like(o), reduction="none")[labels == -1].mean()
            ),
            "ignored positive": lambda o, t, labels, weight: _weighted(o, t, labels.abs() - 1, weight),
        }
    ),
)


# --- quality_focal(logits, targets, beta)

_LOGITS = torch.tensor([-6.0, -1.0, 0.0, 2.0, 4.0], dtype=torch.float64)
_TARGETS = torch.tensor([0.9, 0.9, 0.5, 0.3, 0.0], dtype=torch.float64)


def _check_qfl(answer) -> None:
    for beta in (2.0, 1.0, 1.5):
        got = _tensor(answer(_LOGITS, _TARGETS, beta), _LOGITS, "one loss an element")
        want = quality_focal_loss(_LOGITS, _TARGETS, beta=beta)
        if got.isnan().any():
            raise Wrong(f"nan: (t - q) to the power {beta:g} has no real value where q > t; take the absolute value")
        if (got < 0).all() or not _differs(got, -want):
            raise Wrong(
                f"as printed: without the minus of the logarithms the loss has a *maximum* at q = t, {_row(got)}"
            )
        if (got < -1e-9).any():
            raise Wrong(f"negative for odd exponents: at beta = {beta:g} a sure mistake earns {got.min():.4g}")
        if abs(got[2].item()) > 1e-9:
            raise Wrong(f"not zero at the target: q = t = 0.5 must cost nothing, got {got[2].item():.4g}")
        if not _differs(got, 0.25 * want):
            raise Wrong("alpha added: the quality focal loss has no balancing weight")
        if _differs(got, want):
            raise Wrong(f"not |t - q|^beta BCE: at beta = {beta:g} the losses are {_row(want)}, got {_row(got)}")
    logits = _LOGITS.clone().requires_grad_()
    (slope,) = torch.autograd.grad(answer(logits, _TARGETS, 2.0).sum(), logits)
    (wanted,) = torch.autograd.grad(quality_focal_loss(logits, _TARGETS).sum(), logits)
    if _differs(slope, wanted):
        raise Wrong(f"the factor is detached: a gradient runs through it too, {_row(wanted)}, got {_row(slope)}")


def _entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def _qfl(logits: Tensor, targets: Tensor, beta: float) -> Tensor:
    return (targets - logits.sigmoid()).abs() ** beta * _entropy(logits, targets)


_QFL = Exercise(
    name="quality_focal",
    task="quality_focal(logits, targets, beta): Eq. (13) as it is meant, element by element, for any beta >= 1.",
    checker=_check_qfl,
    solution=_qfl,
    wrong=MappingProxyType(
        {
            "no absolute value, beta 1 negative": lambda o, t, beta: (t - o.sigmoid()) ** round(beta) * _entropy(o, t),
            "no absolute value": lambda o, t, beta: (
                _qfl(o, t, beta) if beta == 1 else (t - o.sigmoid()) ** beta * _entropy(o, t)
            ),
            "no minus": lambda o, t, beta: -_qfl(o, t, beta),
            "cross-entropy alone": lambda o, t, beta: _entropy(o, t),
            "alpha of the focal loss": lambda o, t, beta: 0.25 * _qfl(o, t, beta),
            "factor detached": lambda o, t, beta: (t - o.sigmoid()).abs().detach() ** beta * _entropy(o, t),
        }
    ),
)


# --- recalibrate(scores, alpha, gamma)

_SCORES = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


def _check_recalibrate(answer) -> None:
    plain = _tensor(answer(_SCORES, 0.5, 0.0), _SCORES, "one probability a score")
    if _differs(plain, _SCORES):
        raise Wrong(f"cross-entropy is calibrated: at alpha = 0.5, gamma = 0 score 0.2 must stay, got {plain[3]:.4g}")
    got, want = answer(_SCORES, 0.25, 2.0), _recalibrate(_SCORES, 0.25, 2.0)
    if not _differs(got, _SCORES):
        raise Wrong("nothing done: focal loss teaches 0.5 to what is right 75% of the time, not 50%")
    if not (got.diff() > 0).all():
        raise Wrong("order changed: a higher score must stay a higher probability")
    half = got[9].item()
    if abs(half - 0.25) < 1e-6:
        raise Wrong("alpha on the wrong side: at score 0.5 it is 1 - alpha = 0.75, got 0.25")
    if abs(half - 0.75) > 1e-6:
        raise Wrong(f"wrong in the middle: at score 0.5 the probability is 1 - alpha = 0.75, got {half:.4g}")
    if not _differs(got, _recalibrate(_SCORES, 0.25, 0.0)):
        raise Wrong("gamma ignored: it huddles scores in the middle, so 0.8 stands for more than alpha alone says")
    if _differs(got, want):
        raise Wrong(
            "not where the pulls balance: derive both sides of the expected loss, the factor (1 - p)^gamma included; "
            f"score 0.7 stands for {want[13]:.4f}, got {got[13]:.4f}"
        )


def _side(p: Tensor, gamma: float) -> Tensor:
    """Slope of ``-(1 - p)^gamma ln p``, downwards."""
    return (1 - p) ** gamma / p - gamma * (1 - p) ** (gamma - 1) * p.log()


def _recalibrate(scores: Tensor, alpha: float, gamma: float) -> Tensor:
    pull, push = alpha * _side(scores, gamma), (1 - alpha) * _side(1 - scores, gamma)
    return push / (pull + push)


_RECALIBRATE = Exercise(
    name="recalibrate",
    task="recalibrate(scores, alpha, gamma): how often a prior is right to which focal loss teaches each score.",
    checker=_check_recalibrate,
    solution=_recalibrate,
    wrong=MappingProxyType(
        {
            "nothing": lambda p, alpha, gamma: p,
            "alpha swapped": lambda p, alpha, gamma: _recalibrate(p, 1 - alpha, gamma),
            "gamma left out": lambda p, alpha, gamma: _recalibrate(p, alpha, 0.0),
            "factor taken for a constant": lambda p, alpha, gamma: (
                (1 - alpha) * p**gamma / (1 - p) / ((1 - alpha) * p**gamma / (1 - p) + alpha * (1 - p) ** gamma / p)
            ),
            "falling": lambda p, alpha, gamma: p if gamma == 0 else 1 - _recalibrate(p, 1 - alpha, gamma),
            "losses balanced, not slopes": lambda p, alpha, gamma: (
                alpha
                * (1 - p) ** gamma
                * -p.log()
                / (alpha * (1 - p) ** gamma * -p.log() + (1 - alpha) * p**gamma * -(1 - p).log())
            ),
        }
    ),
)

EXERCISES: tuple[Exercise, ...] = (_SCORE, _WEIGHTED, _QFL, _RECALIBRATE)
"""The chapter's exercises with code."""
