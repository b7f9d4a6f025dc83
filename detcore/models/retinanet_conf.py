"""RetinaNet-Conf: object confidence on the class tower, fused into the score.

Wu, Chen et al., RetinaNet-Conf, 2020. What the paper adds to RetinaNet: one 3x3 convolution on the
last feature of the class tower, one loss term (Eq. 10), one score (Eq. 11).
Deviation: the IoU that the confidence learns is a constant for the gradient; the authors' code
attaches it, and so does ``detach_iou_target=False``.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from detcore.detector import DenseDetector
from detcore.losses import functional
from detcore.losses.functional import QualityLoss
from detcore.losses.terms import iou_quality_term
from detcore.models.retinanet import BoxLoss, rehearse, retinanet
from detcore.postprocess import ThresholdOn
from detcore.scoring import conf_powers, fused_score
from detcore.structures import Detections

__all__ = ["retinanet_conf"]


def retinanet_conf(
    *,
    num_classes: int,
    quality_loss: QualityLoss = "bce",
    negative_weight: float = 0.0,
    quality_weight: float = 1.0,
    detach_iou_target: bool = True,
    fusion_alpha: float | None = 0.4,
    min_quality: float | None = None,
    threshold_on: ThresholdOn = "ranking",
    box_loss: BoxLoss = "l1",
    **options: Any,
) -> DenseDetector:
    r"""RetinaNet with object confidence.

    .. math:: S = p_{conf}^{\alpha}\, p_{cls}^{1-\alpha}

    The confidence learns the IoU that the prior's box reaches, as in the IoU-aware detector, but
    from the **class** tower; and :math:`\alpha` is the exponent of the **quality**, not of the class.

    Args:
        num_classes: C, >= 1.
        quality_loss: how confidence and reached IoU are compared; a row of the paper's Table 2.
        negative_weight: of :func:`detcore.losses.terms.iou_quality_term`; the paper's
            CE\ :sup:`w` has 1e-3 or 1e-4.
        quality_weight: weight of the confidence term, >= 0; 1 in the paper.
        detach_iou_target: whether the reached IoU is a constant for the gradient.
        fusion_alpha: :math:`\alpha` of Eq. (11), in [0, 1]; 0 ranks by class alone, ``None`` by the
            plain product :math:`p_{conf}\, p_{cls}`.
        min_quality: of :func:`detcore.scoring.fused_score`; the paper's filter is 0.5. With
            ``fusion_alpha`` it makes the rows of Table 4.
        threshold_on: whether ``score_threshold`` cuts the fused (``"ranking"``) or the class score.
        box_loss: of :func:`detcore.models.retinanet.retinanet`; plain L1 in the released code.
        **options: of :func:`detcore.models.retinanet.retinanet`.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> detector = retinanet_conf(num_classes=80, backbone="tiny")
        >>> list(detector.losses), detector.head.on_class_tower
        (['cls', 'box', 'confidence'], ('logits', 'confidence'))
    """
    if quality_weight < 0 or negative_weight < 0:
        raise ValueError(
            "retinanet_conf: quality_weight and negative_weight must be >= 0; "
            f"got {quality_weight} and {negative_weight}."
        )
    if min_quality is not None and not 0 <= min_quality <= 1:
        raise ValueError(f"retinanet_conf: min_quality must be None or in [0, 1]; got {min_quality}.")
    functional.quality_loss(torch.zeros(0), torch.zeros(0), kind=quality_loss)  # refuses an unknown kind
    detector = retinanet(num_classes=num_classes, class_extras={"confidence": 1}, box_loss=box_loss, **options)
    detector.losses["confidence"] = (
        quality_weight,
        partial(
            iou_quality_term,
            name="confidence",
            kind=quality_loss,
            detach=detach_iou_target,
            negative_weight=negative_weight,
        ),
    )
    class_power, quality_power = (1.0, 1.0) if fusion_alpha is None else conf_powers(fusion_alpha)
    detector.score = partial(
        fused_score,
        quality="confidence",
        class_power=class_power,
        quality_power=quality_power,
        min_quality=min_quality,
    )
    select: Callable[..., Detections] = detector.select  # a Selector hides the options behind it
    detector.select = partial(select, threshold_on=threshold_on)
    rehearse(detector)
    return detector
