"""Association loss: tie the class score of a positive prior to the IoU its box reaches.

Xu et al., association loss for one-stage detectors, 2020. Added to the classification loss of any
detector.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from detcore.boxes import iou
from detcore.losses.weighting import PriorWeight, weigh_positives
from detcore.structures import Assignment, Predictions

__all__ = ["Association", "association_term", "pce_loss", "pse_loss"]

Association = Literal["pse", "pce"]


def pse_loss(
    scores: Float[Tensor, "*shape"], ious: Float[Tensor, "*shape"], *, beta: float = 1.0, k: float = 1.0
) -> Float[Tensor, "*shape"]:
    r"""Prediction squared error: a spring between class score and IoU.

    .. math:: \mathrm{PSE}(p, I) = \beta\,(p - kI)^2

    With :math:`p = \sigma(o)` its slope :math:`2\beta\,(p - kI)\,p\,(1 - p)` vanishes at
    :math:`p = kI` and where the sigmoid is flat: early in training, when every score is about
    0.01, the spring is slack.

    Args:
        scores: :math:`p`, class probability, in [0, 1].
        ious: :math:`I`, what the box reaches, in [0, 1]; a gradient reaches it if it has one.
        beta: stiffness, >= 0.
        k: the score wanted of a perfect box, > 0; above 1, every box with :math:`I \ge 1/k` is to
            have the score 1.

    Returns:
        The loss of every element, >= 0, in float32 or wider.

    Raises:
        ValueError: if ``beta`` is negative or ``k`` is not positive.

    Example:
        >>> pse_loss(torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.9]))
        tensor([0.1600, 0.1600])

    Reference: Xu et al., association loss, 2020, Eq. (8).
    """
    _check("pse_loss", beta, k)
    return beta * _gap(scores, ious, k) ** 2


def pce_loss(
    scores: Float[Tensor, "*shape"], ious: Float[Tensor, "*shape"], *, beta: float = 1.0, k: float = 1.0
) -> Float[Tensor, "*shape"]:
    r"""Prediction cross-entropy: the pull of :func:`pse_loss` with a slope that does not fade near the goal.

    .. math:: \mathrm{PCE}(p, I) = -\beta \ln\bigl(1 - |p - kI|\bigr)

    With :math:`p = \sigma(o)` the slope is :math:`\beta\,\mathrm{sign}(p - kI)\,p\,(1 - p) / (1 - |p - kI|)`:
    it jumps from one sign to the other at :math:`p = kI`. For :math:`k > 1` the argument of the
    logarithm could be negative; it is held at 1e-6 or more, and where it is held (:math:`kI \ge 1 + p`)
    nothing pulls.

    Args:
        scores: as in :func:`pse_loss`.
        ious: as there.
        beta: as there.
        k: as there.

    Returns:
        The loss of every element, in [0, 13.8 beta], in float32 or wider.

    Raises:
        ValueError: if ``beta`` is negative or ``k`` is not positive.

    Example:
        >>> pce_loss(torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.9]))
        tensor([0.5108, 0.5108])

    Reference: Xu et al., association loss, 2020, Eq. (9).
    Deviation: the paper does not say what happens where the argument is not positive.
    """
    _check("pce_loss", beta, k)
    return -beta * (1 - _gap(scores, ious, k).abs()).clamp(min=1e-6).log()


def association_term(
    pred: Predictions,
    match: Assignment,
    *,
    kind: Association = "pse",
    beta: float = 1.0,
    k: float = 1.0,
    score: Literal["label", "max"] = "label",
    activation: Literal["sigmoid", "softmax"] = "sigmoid",
    weight: PriorWeight | None = None,
) -> Float[Tensor, ""]:
    r"""PSE or PCE between the class score of each positive prior and the IoU its box reaches.

    .. math:: L_{as} = \frac{1}{N_{pos}} \sum_{i \in pos} \ell\bigl(p_i,\ \mathrm{IoU}(b_i, \hat b_i)\bigr)

    The IoU is a constant: the boxes do not learn to suit the scores. Negatives add nothing. Beside
    focal loss, whose pull is always upwards, PSE comes to rest where the two slopes cancel, above
    :math:`kI` (at 0.59 for :math:`I = 0.5`, with the defaults of both); PCE, whose slope jumps, at
    :math:`kI` itself from about 0.26 on.

    Args:
        pred: logits and decoded boxes are used.
        match: objects of the same priors.
        kind: ``"pse"`` (:func:`pse_loss`) or ``"pce"`` (:func:`pce_loss`).
        beta: of :func:`pse_loss`.
        k: of :func:`pse_loss`.
        score: :math:`p` is that of the prior's own class (``"label"``) or the highest of all
            (``"max"``). Where a wrong class leads, the latter pushes the wrong class.
        activation: how the head's logits become class scores: ``"sigmoid"`` each on its own, or
            ``"softmax"`` over classes and background, the last, which then counts as no class.
        weight: of positives, see :mod:`detcore.losses.weighting`.

    Raises:
        ValueError: if an option is none of the above.

    Example:
        Any detector takes it; here RetinaNet:

        >>> from functools import partial
        >>> from detcore.models import get_model
        >>> detector = get_model("retinanet", num_classes=20, backbone="tiny")
        >>> detector.losses["association"] = (1.0, partial(association_term, kind="pce"))

    Reference: Xu et al., association loss, 2020, Eq. (8), (9), (12).
    Deviation: ``score="label"`` by default; Eq. (12) writes the maximum.
    """
    losses = {"pse": pse_loss, "pce": pce_loss}
    if kind not in losses:
        raise ValueError(f'association_term: kind must be "pse" or "pce"; got {kind!r}.')
    if score not in ("label", "max"):
        raise ValueError(f'association_term: score must be "label" or "max"; got {score!r}.')
    if activation not in ("sigmoid", "softmax"):
        raise ValueError(f'association_term: activation must be "sigmoid" or "softmax"; got {activation!r}.')
    values = _wide(pred.logits) if activation == "sigmoid" else _wide(pred.logits).softmax(-1)[..., :-1]
    own = values.gather(-1, match.labels.clamp(min=0)[..., None])[..., 0] if score == "label" else values.amax(-1)
    own = own.sigmoid() if activation == "sigmoid" else own
    reached = iou(pred.boxes, match.boxes).detach().to(own.dtype)
    loss = torch.where(match.positive, losses[kind](own, reached, beta=beta, k=k), 0.0)
    return weigh_positives(loss, match, weight).sum() / match.num_positive


def _gap(scores: Tensor, ious: Tensor, k: float) -> Tensor:
    return _wide(scores) - k * _wide(ious)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _check(where: str, beta: float, k: float) -> None:
    if beta < 0 or k <= 0:
        raise ValueError(f"{where}: beta must be >= 0 and k > 0; got {beta} and {k}.")
