"""IoU-aware RetinaNet: predict each box's IoU, and rank by class score and IoU together.

Wu, Li, Wang, IoU-aware single-stage object detector for accurate localization, 2020. arXiv:1912.05992
What the paper adds to RetinaNet: one 3x3 convolution on the last feature of the box tower, one loss
term (Eq. 3), one score (Eq. 5).
"""

from functools import partial
from typing import Any

import torch

from detcore.detector import DenseDetector
from detcore.losses import functional
from detcore.losses.functional import QualityLoss
from detcore.losses.terms import iou_quality_term
from detcore.models.retinanet import rehearse, retinanet
from detcore.postprocess import ThresholdOn
from detcore.scoring import fused_score, iou_aware_powers

__all__ = ["iou_aware_retinanet"]


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
    if quality_weight < 0:
        raise ValueError(f"iou_aware_retinanet: quality_weight must be >= 0; got {quality_weight}.")
    functional.quality_loss(torch.zeros(0), torch.zeros(0), kind=quality_loss)  # refuses an unknown kind
    detector = retinanet(num_classes=num_classes, box_extras={"iou": 1}, **options)
    detector.losses["iou"] = (quality_weight, partial(iou_quality_term, kind=quality_loss, detach=detach_iou_target))
    class_power, quality_power = iou_aware_powers(fusion_alpha)
    detector.score = partial(fused_score, quality="iou", class_power=class_power, quality_power=quality_power)
    detector.select = partial(detector.select, threshold_on=threshold_on)
    rehearse(detector)
    return detector
