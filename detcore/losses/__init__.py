"""Losses: ``functional`` gives one value an element, ``terms`` masks, sums and normalises."""

from detcore.losses.association import association_term, pce_loss, pse_loss
from detcore.losses.functional import (
    giou_loss,
    iou_loss,
    log_iou_loss,
    quality_focal_loss,
    quality_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
)
from detcore.losses.terms import (
    LossTerm,
    box_delta_term,
    box_iou_term,
    box_loss_term,
    centerness_box_term,
    centerness_term,
    focal_term,
    iou_quality_term,
    quality_focal_term,
)

__all__ = [
    "LossTerm",
    "association_term",
    "box_delta_term",
    "box_iou_term",
    "box_loss_term",
    "centerness_box_term",
    "centerness_term",
    "focal_term",
    "giou_loss",
    "iou_loss",
    "iou_quality_term",
    "log_iou_loss",
    "pce_loss",
    "pse_loss",
    "quality_focal_loss",
    "quality_focal_term",
    "quality_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
]
