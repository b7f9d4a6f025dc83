"""IoU-aware detectors: predict each box's IoU, and rank by class score and IoU together.

Wu, Li, Wang, IoU-aware single-stage object detector for accurate localization, 2020. arXiv:1912.05992
What the paper adds to RetinaNet: one 3x3 convolution on the last feature of the box tower, one loss
term (Eq. 3), one score (Eq. 5). The authors' code adds the same to FCOS.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from detcore.detector import DenseDetector
from detcore.losses import functional
from detcore.losses.functional import QualityLoss
from detcore.losses.terms import iou_quality_term
from detcore.models.fcos import fcos
from detcore.models.retinanet import rehearse, retinanet
from detcore.postprocess import ThresholdOn
from detcore.scoring import Scorer, fused_score, iou_aware_powers
from detcore.structures import Detections

__all__ = ["iou_aware_fcos", "iou_aware_retinanet"]


def iou_aware_retinanet(
    *,
    num_classes: int,
    quality_loss: QualityLoss = "bce",
    quality_weight: float = 1.0,
    detach_iou_target: bool = True,
    fusion_alpha: float = 0.5,
    threshold_on: ThresholdOn = "ranking",
    **options: Any,
) -> DenseDetector:
    r"""RetinaNet with an IoU branch.

    .. math:: L = L_{cls} + L_{loc} + L_{\mathrm{IoU}}, \qquad S = p^{\alpha}\, \mathrm{IoU}^{1-\alpha}

    Args:
        num_classes: C, >= 1.
        quality_loss: how predicted and reached IoU are compared; the paper uses ``"bce"``, and
            ``"l2"`` for comparison.
        quality_weight: weight of the IoU term, >= 0; 1 in the paper.
        detach_iou_target: whether the reached IoU is a constant for the gradient; see
            :func:`detcore.losses.terms.iou_quality_term`.
        fusion_alpha: :math:`\alpha` of Eq. (5), the exponent of the **class** score, in [0, 1].
        threshold_on: whether ``score_threshold`` cuts the fused (``"ranking"``) or the class score.
        **options: of :func:`detcore.models.retinanet.retinanet`.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> detector = iou_aware_retinanet(num_classes=80)
        >>> sum(p.numel() for p in detector.parameters()) - 37968692
        20745
    """
    _check("iou_aware_retinanet", quality_loss, quality_weight)
    detector = retinanet(num_classes=num_classes, box_extras={"iou": 1}, **options)
    detector.losses["iou"] = (quality_weight, partial(iou_quality_term, kind=quality_loss, detach=detach_iou_target))
    detector.score = _score(fusion_alpha)
    select: Callable[..., Detections] = detector.select  # a Selector hides the options behind it
    detector.select = partial(select, threshold_on=threshold_on)
    rehearse(detector)
    return detector


def iou_aware_fcos(
    *,
    num_classes: int,
    quality_loss: QualityLoss = "bce",
    quality_weight: float = 1.0,
    detach_iou_target: bool = True,
    fusion_alpha: float = 0.3,
    threshold_on: ThresholdOn = "ranking",
    **options: Any,
) -> DenseDetector:
    r"""FCOS with an IoU branch beside its centre-ness.

    .. math:: L = L_{cls} + L_{loc} + L_{cen} + L_{\mathrm{IoU}}, \qquad S = p^{\alpha}\, \mathrm{IoU}^{1-\alpha}

    As in the authors' code, centre-ness is still learnt and weighs the boxes in training, but the
    score uses the predicted IoU in its place; ``centerness=None`` removes it altogether.

    Args:
        num_classes: C, >= 1.
        quality_loss: as in :func:`iou_aware_retinanet`, like the next two.
        quality_weight: as there.
        detach_iou_target: as there.
        fusion_alpha: :math:`\alpha`, the exponent of the **class** score, in [0, 1]; 0.3 in the
            authors' code.
        threshold_on: whether ``score_threshold`` cuts the fused (``"ranking"``) or the class score.
        **options: of :func:`detcore.models.fcos.fcos`.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> list(iou_aware_fcos(num_classes=20, backbone="tiny").losses)
        ['cls', 'box', 'centerness', 'iou']

    Reference: released code, mmdet/models/anchor_heads/iou_aware_fcos_head.py.
    Deviation: candidates are chosen by pair, as in FCOS, not by prior.
    """
    _check("iou_aware_fcos", quality_loss, quality_weight)
    detector = fcos(num_classes=num_classes, box_extras={"iou": 1}, threshold_on=threshold_on, **options)
    detector.losses["iou"] = (quality_weight, partial(iou_quality_term, kind=quality_loss, detach=detach_iou_target))
    detector.score = _score(fusion_alpha)
    return detector


def _check(where: str, quality_loss: QualityLoss, quality_weight: float) -> None:
    if quality_weight < 0:
        raise ValueError(f"{where}: quality_weight must be >= 0; got {quality_weight}.")
    functional.quality_loss(torch.zeros(0), torch.zeros(0), kind=quality_loss)  # refuses an unknown kind


def _score(fusion_alpha: float) -> Scorer:
    class_power, quality_power = iou_aware_powers(fusion_alpha)
    return partial(fused_score, quality="iou", class_power=class_power, quality_power=quality_power)
