"""The terms of a detector's loss: (Predictions, Assignment) to one number.

Masking and normalisation live here and nowhere else. A term is masked with ``torch.where``, not by
indexing: shapes stay static, so a step is one compiled graph that never waits for the device.
Every term divides by the positives of the whole batch (:attr:`Assignment.num_positive`), but for
:func:`centerness_box_term`, which divides by the sum of its weights.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from detcore.assigners import centerness_target
from detcore.boxes import giou, iou
from detcore.coders import BoxCoder
from detcore.losses.dense import focal_sum, quality_focal_sum
from detcore.losses.functional import (
    QualityLoss,
    log_iou_loss,
    quality_loss,
    smooth_l1_loss,
)
from detcore.losses.weighting import PriorWeight, prior_shares, weigh_positives
from detcore.structures import Assignment, Predictions, joint_total

__all__ = [
    "LossTerm",
    "box_delta_term",
    "box_iou_term",
    "box_loss_term",
    "centerness_box_term",
    "centerness_term",
    "focal_term",
    "iou_quality_term",
    "quality_focal_term",
]

LossTerm = Callable[[Predictions, Assignment], Tensor]
"""What a detector accepts in ``losses``: any callable of this shape."""


def _mean_over_positives(
    loss: Float[Tensor, "B N"], match: Assignment, weight: PriorWeight | None = None
) -> Float[Tensor, ""]:
    return weigh_positives(torch.where(match.positive, loss, 0.0), match, weight).sum() / match.num_positive


def focal_term(
    pred: Predictions,
    match: Assignment,
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    weight: PriorWeight | None = None,
) -> Float[Tensor, ""]:
    """Focal loss over all classes of all priors that are not ignored, per positive prior.

    Args:
        pred: logits are used.
        match: objects of the same priors.
        alpha: of :func:`~detcore.losses.functional.sigmoid_focal_loss`.
        gamma: as there.
        weight: of positives, see :mod:`detcore.losses.weighting`.

    Example:
        >>> from detcore.models import get_model
        >>> detector = get_model("retinanet", num_classes=20, backbone="tiny")
        >>> list(detector.losses)
        ['cls', 'box']

    Reference: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, section 4.1. arXiv:1708.02002
    """
    shares = prior_shares(match, weight, like=pred.logits)
    return focal_sum(pred.logits, match.labels, shares, alpha=alpha, gamma=gamma)


def quality_focal_term(
    pred: Predictions, match: Assignment, *, beta: float = 2.0, weight: PriorWeight | None = None
) -> Float[Tensor, ""]:
    r"""Quality focal loss over all classes of all priors that are not ignored, per positive prior.

    .. math:: L = \frac{1}{N_{pos}} \sum_{i \notin ign} \sum_c |y_{ic} - p_{ic}|^{\beta}\, \mathrm{BCE}(p_{ic}, y_{ic}),
        \qquad y_{ic} = \mathrm{IoU}(b_i, \hat b_i) \text{ if } c = c_i \text{ else } 0

    The target of a positive's own class is the IoU its box reaches, a constant; every other entry's
    is 0: the class score itself learns to tell localisation.

    Args:
        pred: logits and decoded boxes are used.
        match: objects of the same priors.
        beta: of :func:`~detcore.losses.functional.quality_focal_loss`.
        weight: of positives, see :mod:`detcore.losses.weighting`.

    Raises:
        ValueError: if ``beta`` is negative.

    Example:
        >>> from detcore.models import get_model
        >>> list(get_model("retinanet_gfl", num_classes=20, backbone="tiny").losses)
        ['cls', 'box']

    Reference: Li et al., Generalized Focal Loss, NeurIPS 2020, Eq. (2). arXiv:2006.04388
    """
    reached = iou(pred.boxes, match.boxes).detach()
    shares = prior_shares(match, weight, like=pred.logits)
    return quality_focal_sum(pred.logits, match.labels, reached, shares, beta=beta)


def box_delta_term(
    pred: Predictions,
    match: Assignment,
    *,
    coder: BoxCoder,
    beta: float = 1 / 9,
    weight: PriorWeight | None = None,
) -> Float[Tensor, ""]:
    """Smooth L1 between predicted and wanted deltas, summed over the four, per positive prior.

    Args:
        pred: deltas relative to ``pred.priors``.
        match: objects of the same priors.
        coder: the head's own coder.
        beta: of :func:`~detcore.losses.functional.smooth_l1_loss`; 0 is L1, 1 is SSD's.
        weight: of positives, see :mod:`detcore.losses.weighting`.

    Example:
        >>> from functools import partial
        >>> from detcore.coders import DeltaCoder
        >>> term = partial(box_delta_term, coder=DeltaCoder(), beta=0.0)  # L1, as in RetinaNet-Conf
    """
    wanted = coder.encode(match.boxes, pred.priors.boxes.expand_as(match.boxes))
    return _mean_over_positives(smooth_l1_loss(pred.deltas, wanted, beta=beta).sum(-1), match, weight)


def box_iou_term(
    pred: Predictions,
    match: Assignment,
    *,
    measure: Callable[[Tensor, Tensor], Tensor] = giou,
    weight: PriorWeight | None = None,
) -> Float[Tensor, ""]:
    """1 - overlap of decoded and wanted boxes, per positive prior.

    Args:
        pred: decoded boxes are used.
        match: objects of the same priors.
        measure: :func:`~detcore.boxes.iou`, ``giou``, ``diou``, ``ciou`` or another of that shape.
        weight: of positives, see :mod:`detcore.losses.weighting`.

    Example:
        >>> from functools import partial
        >>> from detcore.boxes import diou
        >>> term = partial(box_iou_term, measure=diou)
    """
    return _mean_over_positives(1 - measure(pred.boxes, match.boxes), match, weight)


def box_loss_term(
    pred: Predictions,
    match: Assignment,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = log_iou_loss,
    weight: PriorWeight | None = None,
) -> Float[Tensor, ""]:
    """A loss of decoded and wanted boxes, per positive prior.

    Args:
        pred: decoded boxes are used.
        match: objects of the same priors.
        loss: one value a pair of boxes, such as :func:`~detcore.losses.functional.log_iou_loss`.
        weight: of positives, see :mod:`detcore.losses.weighting`.

    Example:
        >>> from detcore.models import get_model
        >>> get_model("fcos", num_classes=20, backbone="tiny", centerness=None).losses["box"][1].func.__name__
        'box_loss_term'
    """
    return _mean_over_positives(loss(pred.boxes, match.boxes), match, weight)


def centerness_box_term(
    pred: Predictions,
    match: Assignment,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = log_iou_loss,
    weight: PriorWeight | None = None,
) -> Float[Tensor, ""]:
    r"""A loss of decoded and wanted boxes, its mean weighted by how central each point is.

    .. math:: \frac{\sum_{i \in pos} c_i\, \ell(b_i, \hat b_i)}{\sum_{i \in pos} c_i}

    Args:
        pred: decoded boxes are used.
        match: objects of the same priors; :math:`c` is :func:`~detcore.assigners.centerness_target`.
        loss: as in :func:`box_loss_term`.
        weight: as there; a further factor above, not below.

    Example:
        >>> from detcore.models import get_model
        >>> get_model("fcos", num_classes=20, backbone="tiny").losses["box"][1].func.__name__
        'centerness_box_term'

    Reference: Tian et al., FCOS, ICCV 2019 (released code; its Eq. (2) has no weights).
    """
    central = torch.where(match.positive, centerness_target(pred.priors.boxes, match.boxes), 0.0)
    each = central * torch.where(match.positive, loss(pred.boxes, match.boxes), 0.0)
    return weigh_positives(each, match, weight).sum() / joint_total(central.sum(), least=1e-6)


def centerness_term(
    pred: Predictions, match: Assignment, *, name: str = "centerness", weight: PriorWeight | None = None
) -> Float[Tensor, ""]:
    """Cross-entropy between predicted and true centre-ness, per positive prior.

    Args:
        pred: ``pred.extras[name]`` holds the logits, (B, N, 1).
        match: objects of the same priors.
        name: which extra map.
        weight: of positives, see :mod:`detcore.losses.weighting`.

    Raises:
        KeyError: if the head has no such map.

    Example:
        >>> from detcore.models import get_model
        >>> list(get_model("fcos", num_classes=20, backbone="tiny").losses)
        ['cls', 'box', 'centerness']

    Reference: Tian et al., FCOS, ICCV 2019, section 3.3. arXiv:1904.01355
    """
    if name not in pred.extras:
        raise KeyError(f"centerness_term: the head must have the extra map {name!r}; it has {sorted(pred.extras)}.")
    target = centerness_target(pred.priors.boxes, match.boxes)
    return _mean_over_positives(quality_loss(pred.extras[name][..., 0], target), match, weight)


def iou_quality_term(
    pred: Predictions,
    match: Assignment,
    *,
    name: str = "iou",
    kind: QualityLoss = "bce",
    detach: bool = True,
    negative_weight: float = 0.0,
) -> Float[Tensor, ""]:
    r"""How far the predicted IoU of each positive prior is from the IoU its box reaches.

    .. math:: L_{\mathrm{IoU}} = \frac{1}{N_{pos}} \Bigl( \sum_{i \in pos}
        \ell\bigl(o_i,\ \mathrm{IoU}(b_i, \hat b_i)\bigr) + w \sum_{i \in neg} \ell(o_i, 0) \Bigr)

    Args:
        pred: ``pred.extras[name]`` holds the logits :math:`o`, (B, N, 1).
        match: objects of the same priors.
        name: which extra map.
        kind: of :func:`~detcore.losses.functional.quality_loss`.
        detach: treat the target IoU as a constant. If not, BCE pushes on the box with
            :math:`\partial \ell / \partial t = -o`: towards the object where the head already
            believes in the box, away from it where it does not.
        negative_weight: :math:`w`, >= 0: negatives (not the ignored) are pulled to quality 0. At 0.5,
            where training starts, 100 000 negatives add 6.9 to the sum at w = 1e-4.

    Raises:
        KeyError: if the head has no such map.
        ValueError: if ``negative_weight`` is negative.

    Example:
        >>> from detcore.models import get_model
        >>> list(get_model("iou_aware_retinanet", num_classes=20, backbone="tiny").losses)
        ['cls', 'box', 'iou']

    Reference: Wu et al., IoU-aware single-stage detector, 2020, Eq. (3), arXiv:1912.05992;
    RetinaNet-Conf, 2020, Eq. (10) and Table 2 (:math:`w`).
    Deviation: detached by default; the paper is silent and the authors' code attaches it.
    """
    if name not in pred.extras:
        raise KeyError(f"iou_quality_term: the head must have the extra map {name!r}; it has {sorted(pred.extras)}.")
    if negative_weight < 0:
        raise ValueError(f"iou_quality_term: negative_weight must be >= 0; got {negative_weight}.")
    logits, target = pred.extras[name][..., 0], iou(pred.boxes, match.boxes)
    target = target.detach() if detach else target
    loss = _mean_over_positives(quality_loss(logits, target, kind=kind), match)
    if negative_weight == 0:
        return loss
    away = quality_loss(logits, torch.zeros_like(target), kind=kind)
    return loss + negative_weight * torch.where(match.negative, away, 0.0).sum() / match.num_positive
