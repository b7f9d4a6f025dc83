"""The losses, one value an element: no masking, no reduction, no normalisation (see ``terms``).

Types below float32 are computed in float32. Hyperparameters are keyword-only.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from detcore.boxes import area, giou, iou

__all__ = [
    "QualityLoss",
    "giou_loss",
    "iou_loss",
    "log_iou_loss",
    "quality_focal_loss",
    "quality_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
]

QualityLoss = Literal["bce", "l1", "smooth_l1", "l2", "qfl"]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def sigmoid_focal_loss(
    logits: Float[Tensor, "*shape"],
    targets: Bool[Tensor, "*shape"],
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
) -> Float[Tensor, "*shape"]:
    r"""Cross-entropy that fades out on examples the model already gets right.

    With :math:`p_t` the probability given to the true side of each binary decision
    (:math:`p` where ``targets`` is true, :math:`1 - p` elsewhere),

    .. math:: \mathrm{FL}(p_t) = -\alpha_t\,(1 - p_t)^{\gamma}\,\log p_t .

    At ``gamma=0, alpha=None`` this is binary cross-entropy; at ``gamma=2`` an easy example
    (:math:`p_t = 0.9`) weighs 100 times less than under it.

    Args:
        logits: raw class scores, before the sigmoid.
        targets: true at the class of the assigned object. For soft targets see
            :func:`quality_focal_loss`.
        alpha: weight of the positive side, in [0, 1]; ``None`` weighs both sides 1.
        gamma: focusing exponent, >= 0.

    Returns:
        The loss of every element, >= 0. Callers divide by the number of positive priors, not by
        the number of elements (RetinaNet, section 4.1).

    Raises:
        ValueError: if ``alpha`` is outside [0, 1] or ``gamma`` is negative.

    Example:
        >>> easy, hard = torch.logit(torch.tensor([0.7, 0.1]))
        >>> sigmoid_focal_loss(torch.stack([easy, hard]), torch.tensor([True, True]), alpha=None)
        tensor([0.0321, 1.8651])

    Reference: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, Eq. (5). arXiv:1708.02002
    """
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"sigmoid_focal_loss: alpha must be None or in [0, 1]; got {alpha}.")
    if gamma < 0:
        raise ValueError(f"sigmoid_focal_loss: gamma must be >= 0; got {gamma}.")
    logits = _wide(logits)
    # the logit of the false side: 1 - p_t is its sigmoid and -log p_t its softplus, at any magnitude
    wrong = logits * (1 - 2 * targets.to(torch.int8))  # eight bits, because the backward pass keeps the sign
    loss = F.softplus(wrong, threshold=80.0)  # torch's 20 would cut e^-20, visible in float64
    if gamma > 0:
        loss = loss * torch.exp(gamma * F.logsigmoid(wrong)) if gamma < 1 else loss * wrong.sigmoid() ** gamma
    if alpha is None:
        return loss
    positive = torch.full((), alpha, dtype=loss.dtype, device=loss.device)
    return loss * torch.where(targets, positive, 1 - positive)


def quality_focal_loss(
    logits: Float[Tensor, "*shape"], targets: Float[Tensor, "*shape"], *, beta: float = 2.0
) -> Float[Tensor, "*shape"]:
    r"""Cross-entropy towards a soft target, fading out as the prediction reaches it.

    .. math:: \mathrm{QFL}(p) = |y - p|^{\beta}\,\bigl(-y \log p - (1 - y) \log(1 - p)\bigr)

    Zero exactly at :math:`p = y` for :math:`\beta > 0`; the gradient flows through the factor too.

    Args:
        logits: raw scores, before the sigmoid.
        targets: :math:`y`, in [0, 1]; an IoU as a rule.
        beta: focusing exponent, >= 0.

    Returns:
        The loss of every element, >= 0.

    Raises:
        ValueError: if ``beta`` is negative.

    Example:
        >>> quality_focal_loss(torch.zeros(2), torch.tensor([0.5, 1.0]))
        tensor([0.0000, 0.1733])

    Reference: Li et al., Generalized Focal Loss, NeurIPS 2020, Eq. (2). arXiv:2006.04388
    """
    if beta < 0:
        raise ValueError(f"quality_focal_loss: beta must be >= 0; got {beta}.")
    logits, targets = _wide(logits), _wide(targets)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if beta == 0:
        return entropy
    gap = (targets - logits.sigmoid()).abs()
    # at 0 a power below 1 has no slope, and the sigmoid of a sure logit is exactly its target
    return torch.where(gap > 0, torch.where(gap > 0, gap, 1.0) ** beta * entropy, 0.0)


def smooth_l1_loss(
    prediction: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"], *, beta: float = 1 / 9
) -> Float[Tensor, "*shape"]:
    r"""Half a squared error near zero, an absolute error beyond.

    .. math:: \ell(d) = \frac{d^2}{2\beta} \ \text{if}\ |d| < \beta \ \text{else}\ |d| - \frac{\beta}{2}

    Args:
        prediction: any numbers, as a rule box deltas.
        target: the numbers wanted.
        beta: where the two pieces meet, in the unit of the error, >= 0; 0 is plain L1. 1/9 is
            Detectron's value for RetinaNet.

    Raises:
        ValueError: if ``beta`` is negative.

    Example:
        >>> smooth_l1_loss(torch.tensor([0.0, 0.5, 2.0]), torch.zeros(3), beta=1.0)
        tensor([0.0000, 0.1250, 1.5000])

    Reference: Girshick, Fast R-CNN, ICCV 2015, Eq. (3). arXiv:1504.08083
    """
    if beta < 0:
        raise ValueError(f"smooth_l1_loss: beta must be >= 0; got {beta}.")
    return F.smooth_l1_loss(_wide(prediction), _wide(target), reduction="none", beta=beta)


def iou_loss(boxes: Float[Tensor, "*#n 4"], targets: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*#n"]:
    """1 - IoU, in [0, 1]. No gradient where the boxes do not touch.

    Example:
        >>> iou_loss(torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([0.0, 0.0, 2.0, 1.0]))
        tensor(0.5000)
    """
    return 1 - iou(boxes, targets)


def log_iou_loss(
    boxes: Float[Tensor, "*#n 4"], targets: Float[Tensor, "*#n 4"], *, eps: float = 1e-6, added: float = 0.0
) -> Float[Tensor, "*#n"]:
    """-ln IoU, from 0 upwards; IoU is floored at ``eps`` so that boxes apart stay finite.

    Args:
        boxes: predicted corners in pixels.
        targets: wanted corners.
        eps: floor of the overlap, > 0; below it there is no gradient.
        added: to intersection and union, in square pixels, >= 0; 1 in FCOS's released code.

    Raises:
        ValueError: if ``added`` is negative.

    Example:
        >>> one, half = torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([0.0, 0.0, 2.0, 1.0])
        >>> log_iou_loss(one, half), log_iou_loss(one, half, added=1.0)  # ln 4/2, ln 5/3
        (tensor(0.6931), tensor(0.5108))

    Reference: Yu et al., UnitBox, ACM MM 2016, Eq. (1). arXiv:1608.01471
    """
    if added < 0:
        raise ValueError(f"log_iou_loss: added must be >= 0; got {added}.")
    overlap = iou(boxes, targets)
    if added:
        both = area(boxes) + area(targets)  # intersection + union
        union = both / (1 + overlap)
        overlap = (both - union + added) / (union + added)
    return -overlap.clamp(min=eps).log()


def giou_loss(boxes: Float[Tensor, "*#n 4"], targets: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*#n"]:
    """1 - GIoU, in [0, 2]; pulls boxes together even where they do not touch.

    Example:
        >>> giou_loss(torch.tensor([0.0, 0.0, 4.0, 1.0]), torch.tensor([0.0, 0.0, 1.0, 4.0]))
        tensor(1.4196)

    Reference: Rezatofighi et al., Generalized Intersection over Union, CVPR 2019. arXiv:1902.09630
    """
    return 1 - giou(boxes, targets)


def quality_loss(
    logits: Float[Tensor, "*shape"], targets: Float[Tensor, "*shape"], *, kind: QualityLoss = "bce"
) -> Float[Tensor, "*shape"]:
    r"""Distance of a predicted quality :math:`q = \sigma(o)` from its target :math:`t`.

    ========= ============================================ =====================================
    kind      element                                      remark
    ========= ============================================ =====================================
    bce       :math:`-t \ln q - (1-t) \ln(1-q)`            floor :math:`H(t)` at :math:`q = t`
    l1        :math:`|q - t|`
    smooth_l1 Huber form with beta = 1/9                   with beta = 1 it would equal l2
    l2        :math:`(q - t)^2 / 2`                        RetinaNet-Conf, Eq. (7)
    qfl       :math:`|t - q|^2 \cdot \mathrm{bce}`         Generalized Focal Loss, Eq. (2)
    ========= ============================================ =====================================

    Args:
        logits: :math:`o`, before the sigmoid.
        targets: :math:`t`, in [0, 1]; a gradient reaches it if it has one.
        kind: a row of the table.

    Raises:
        ValueError: if ``kind`` is unknown.

    Example:
        >>> o, t = torch.zeros(1), torch.full((1,), 0.75)
        >>> [round(quality_loss(o, t, kind=kind).item(), 4) for kind in ("bce", "l1", "l2")]
        [0.6931, 0.25, 0.0312]

    Reference: Wu et al., IoU-aware single-stage detector, 2020, Eq. (3), arXiv:1912.05992 (bce, l2);
    RetinaNet-Conf, 2020, Table 2 (all).
    """
    logits, targets = _wide(logits), _wide(targets)
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if kind == "qfl":
        return quality_focal_loss(logits, targets)
    error = logits.sigmoid() - targets
    if kind == "l1":
        return error.abs()
    if kind == "smooth_l1":
        return smooth_l1_loss(error, torch.zeros_like(error))
    if kind == "l2":
        return error**2 / 2
    raise ValueError(f'quality_loss: kind must be "bce", "l1", "smooth_l1", "l2" or "qfl"; got {kind!r}.')
