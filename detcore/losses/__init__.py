"""Losses: ``functional`` gives one value an element, ``terms`` masks, sums and normalises."""

from detcore.losses.aiou import aiou_loss, overlap_term
from detcore.losses.association import association_term, pce_loss, pse_loss
from detcore.losses.dense import focal_sum, quality_focal_sum
from detcore.losses.functional import (
    giou_loss,
    iou_loss,
    log_iou_loss,
    quality_focal_loss,
    quality_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
)
from detcore.losses.mining import hard_negative_mask, mined_entropy_sum, softmax_mining_term
from detcore.losses.refine import arm_box_term, arm_class_term, odm_class_term
from detcore.losses.scale_balanced import scale_balance, scale_balanced_weight
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
from detcore.losses.weighting import PriorWeight, prior_shares

__all__ = [
    "LossTerm",
    "PriorWeight",
    "aiou_loss",
    "arm_box_term",
    "arm_class_term",
    "association_term",
    "box_delta_term",
    "box_iou_term",
    "box_loss_term",
    "centerness_box_term",
    "centerness_term",
    "focal_sum",
    "focal_term",
    "giou_loss",
    "hard_negative_mask",
    "iou_loss",
    "iou_quality_term",
    "log_iou_loss",
    "mined_entropy_sum",
    "odm_class_term",
    "overlap_term",
    "pce_loss",
    "prior_shares",
    "pse_loss",
    "quality_focal_loss",
    "quality_focal_sum",
    "quality_focal_term",
    "quality_loss",
    "scale_balance",
    "scale_balanced_weight",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "softmax_mining_term",
]
