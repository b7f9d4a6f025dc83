"""FCOS: every point inside an object predicts its distances to the four sides; no anchors.

Tian et al., FCOS: Fully Convolutional One-Stage Object Detection, ICCV 2019. arXiv:1904.01355
The defaults are those of the released code, but for plain IoU where it adds 1 to both areas;
:func:`fcos_improved` is the same group's later version (arXiv:2006.09214).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection.fcos import FCOSHead

from detcore.assigners import fcos_assign
from detcore.coders import DistanceCoder
from detcore.detector import DenseDetector
from detcore.losses.aiou import aiou_loss
from detcore.losses.functional import giou_loss, iou_loss, log_iou_loss, sigmoid_focal_loss
from detcore.losses.terms import box_loss_term, centerness_box_term, centerness_term, focal_term
from detcore.models import _torchvision
from detcore.models.retinanet import rehearse
from detcore.nn import FPN, DenseHead, Exp, ImageInput, Scale, build_trunk
from detcore.postprocess import ThresholdOn, select_by_pair
from detcore.priors import PointGenerator, PointStyle
from detcore.scoring import class_score, fused_score

__all__ = ["fcos", "fcos_improved", "from_torchvision"]

BoxLoss = Literal["log_iou", "log_iou_plus_one", "iou", "giou", "aiou"]
Tower = Literal["class_tower", "box_tower"]

_NOTHING: Mapping[str, int] = MappingProxyType({})
# no prediction is so far off that it gets no gradient: boxes hold their own point, so IoU > 0
_BOX_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "log_iou": partial(log_iou_loss, eps=1e-12),
    "log_iou_plus_one": partial(log_iou_loss, eps=1e-12, added=1.0),
    "iou": iou_loss,
    "giou": giou_loss,
    "aiou": aiou_loss,  # boxes far off, once shrunk, do part: they get none
}
_ACTIVATIONS = {"exp": Exp, "relu": nn.ReLU}


def fcos(
    *,
    num_classes: int,
    backbone: str | nn.Module = "resnet50",
    weights_backbone: Any = None,
    norm: Literal["fixed", "batch"] | None = None,
    trainable_stages: int | None = None,
    channels: int | None = None,
    depth: int | None = None,
    group_norm: bool = True,
    point_style: PointStyle = "half",
    range_base: float = 8.0,
    closed_ranges: bool = True,
    radius: float | None = None,
    distances: Literal["exp", "relu"] = "exp",
    level_scales: bool = True,
    normalise: bool = False,
    centerness: Tower | None = "class_tower",
    box_loss: BoxLoss = "log_iou",
    aiou_beta: float = 0.8,
    weigh_boxes: bool | None = None,
    alpha: float = 0.25,
    gamma: float = 2.0,
    score_threshold: float = 0.05,
    threshold_on: ThresholdOn = "classes",
    candidates: int = 1000,
    nms_iou: float | None = 0.6,
    max_detections: int = 100,
    short_side: int | None = None,
    long_side: int | None = None,
    box_extras: Mapping[str, int] = _NOTHING,
    class_extras: Mapping[str, int] = _NOTHING,
) -> DenseDetector:
    r"""FCOS.

    .. math:: S = \sqrt{p\, c}

    with :math:`p` the class score and :math:`c` the predicted centre-ness; :math:`p` alone without it.

    Args:
        num_classes: C, >= 1.
        backbone: see :func:`detcore.models.get_model`.
        weights_backbone: see there.
        norm: of the trunk, see :class:`detcore.nn.ResNetTrunk`.
        trainable_stages: see there.
        channels: width of pyramid and towers, a multiple of 8 with ``group_norm``; default 256, or
            64 on ``"tiny"``.
        depth: convolutions a tower; default 4, or 2 on ``"tiny"``.
        group_norm: groups of 8 channels are normalised in the towers: 32 groups of 256.
        point_style: see :class:`detcore.priors.PointGenerator`.
        range_base: each level's farthest side in its strides, so 64, 128, 256 and 512 pixels by
            default; less for small pictures. The last level is open.
        closed_ranges: see :func:`detcore.assigners.fcos_assign`.
        radius: centre sampling, see there.
        distances: :math:`e^{s x}`, or :math:`\max(s x, 0)`.
        level_scales: whether each level learns its own :math:`s`; 1 if not.
        normalise: distances in strides instead of pixels.
        centerness: which tower predicts it; ``None``: nothing does.
        box_loss: ``"log_iou"``, ``"log_iou_plus_one"`` with 1 added to intersection and union as in
            the released code, ``"iou"``, ``"giou"`` or ``"aiou"``.
        aiou_beta: of :func:`detcore.losses.aiou.aiou_loss`.
        weigh_boxes: by true centre-ness; ``None``: where it is predicted.
        alpha: of the focal loss.
        gamma: of the focal loss.
        score_threshold: see :func:`detcore.postprocess.select_by_pair`.
        threshold_on: see there.
        candidates: see there.
        nms_iou: see there.
        max_detections: see there.
        short_side: resize pictures given to ``detector(images)``, see :class:`detcore.nn.ImageInput`.
        long_side: see there.
        box_extras: further outputs on the box tower, for papers that add a branch.
        class_extras: the same on the class tower.

    Raises:
        ValueError: if an option is out of range; the message names it.

    Example:
        >>> detector = fcos(num_classes=80)
        >>> sum(p.numel() for p in detector.parameters())
        32297370
    """
    if num_classes < 1:
        raise ValueError(f"fcos: num_classes must be >= 1, background not counted; got {num_classes}.")
    if box_loss not in _BOX_LOSSES:
        raise ValueError(f"fcos: box_loss must be one of {sorted(_BOX_LOSSES)}; got {box_loss!r}.")
    if distances not in _ACTIVATIONS:
        raise ValueError(f'fcos: distances must be "exp" or "relu"; got {distances!r}.')
    if centerness not in ("class_tower", "box_tower", None):
        raise ValueError(f'fcos: centerness must be "class_tower", "box_tower" or None; got {centerness!r}.')
    if range_base <= 0:
        raise ValueError(f"fcos: range_base must be > 0; got {range_base}.")
    small = backbone == "tiny"
    channels = channels or (64 if small else 256)
    depth = depth if depth is not None else (2 if small else 4)
    if group_norm and channels % 8:
        raise ValueError(f"fcos: channels must be a multiple of 8 with group_norm; got {channels}.")

    trunk = build_trunk(backbone, weights=weights_backbone, norm=norm, trainable_stages=trainable_stages)
    neck = FPN(trunk.channels, channels, p6="p5", relu_before_p7=True)
    points = PointGenerator(style=point_style)
    on_class, on_box = dict(class_extras), dict(box_extras)
    if centerness is not None:
        {"class_tower": on_class, "box_tower": on_box}[centerness]["centerness"] = 1
    head = DenseHead(
        channels,
        points.num_priors,
        num_classes,
        DistanceCoder(normalise=normalise),
        depth=depth,
        norm=_groups_of_8 if group_norm else None,
        on_deltas=_distances(len(points.strides), _ACTIVATIONS[distances], level_scales),
        class_extras=on_class,
        box_extras=on_box,
    )
    weighted = centerness is not None if weigh_boxes is None else weigh_boxes
    aiou_loss(torch.zeros(0, 4), torch.zeros(0, 4), beta=aiou_beta)  # refuses a wrong beta
    loss = partial(aiou_loss, beta=aiou_beta) if box_loss == "aiou" else _BOX_LOSSES[box_loss]
    losses = {
        "cls": partial(focal_term, alpha=alpha, gamma=gamma),
        "box": partial(centerness_box_term if weighted else box_loss_term, loss=loss),
    }
    detector = DenseDetector(
        nn.Sequential(trunk, neck),
        points,
        head,
        num_classes=num_classes,
        assign=partial(
            fcos_assign,
            ranges=(*(range_base * stride for stride in points.strides[:-1]), math.inf),
            radius=radius,
            closed=closed_ranges,
        ),
        losses=losses if centerness is None else losses | {"centerness": centerness_term},
        score=class_score if centerness is None else partial(fused_score, quality="centerness"),
        select=partial(
            select_by_pair,
            score_threshold=score_threshold,
            threshold_on=threshold_on,
            candidates=candidates,
            nms_iou=nms_iou,
            max_detections=max_detections,
        ),
        inputs=ImageInput(short_side=short_side, long_side=long_side),
    )
    sigmoid_focal_loss(torch.zeros(0), torch.zeros(0, dtype=torch.bool), alpha=alpha, gamma=gamma)
    rehearse(detector, levels=len(points.strides))
    return detector


def _groups_of_8(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // 8, channels)


def _distances(levels: int, activation: Callable[[], nn.Module], scales: bool) -> Sequence[nn.Module]:
    return [nn.Sequential(Scale(), activation()) if scales else activation() for _ in range(levels)]


def fcos_improved(
    *,
    num_classes: int,
    radius: float | None = 1.5,
    distances: Literal["exp", "relu"] = "relu",
    normalise: bool = True,
    centerness: Tower | None = "box_tower",
    box_loss: BoxLoss = "giou",
    **options: Any,
) -> DenseDetector:
    """FCOS with centre sampling, centre-ness on the box tower, GIoU, and distances in strides.

    Args:
        num_classes: C, >= 1.
        radius: as in :func:`fcos`, like the other arguments.
        distances: as there.
        normalise: as there.
        centerness: as there.
        box_loss: as there.
        **options: of :func:`fcos`.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> fcos_improved(num_classes=20, backbone="tiny").head.on_class_tower
        ('logits',)

    Reference: Tian et al., FCOS: A simple and strong anchor-free object detector, TPAMI 2020. arXiv:2006.09214
    """
    return fcos(
        num_classes=num_classes,
        radius=radius,
        distances=distances,
        normalise=normalise,
        centerness=centerness,
        box_loss=box_loss,
        **options,
    )


def from_torchvision(model: TorchvisionFCOS) -> DenseDetector:
    """A torchvision FCOS on any ResNet as one of ours: same weights, same detections, same losses.

    torchvision's conventions are chosen throughout: points without the half stride, ranges without
    their ends, no scale to learn, boxes not weighted, and a threshold on the fused score. Labels stay
    torchvision's, as in :func:`detcore.models.retinanet.from_torchvision`.

    Args:
        model: ``torchvision.models.detection.fcos_resnet50_fpn(...)``, with any weights and any of
            its options.

    Raises:
        ValueError: if the model is built differently (a trunk that is no ResNet, other points).

    Example:
        >>> import torchvision
        >>> theirs = torchvision.models.detection.fcos_resnet50_fpn(weights=None, weights_backbone=None)
        >>> from_torchvision(theirs).num_classes
        91
    """
    if not isinstance(model, TorchvisionFCOS) or not isinstance(model.head, FCOSHead):
        raise ValueError(f"from_torchvision: model must be a torchvision FCOS; got {type(model).__name__}.")
    sizes = tuple(map(tuple, model.anchor_generator.sizes))
    if sizes != ((8,), (16,), (32,), (64,), (128,)):
        raise ValueError(f"from_torchvision: model must have torchvision's default points; got sizes {sizes}.")
    ours = fcos_improved(
        num_classes=model.head.classification_head.num_classes,
        backbone=_torchvision.trunk_name(model),
        norm=_torchvision.trunk_norm(model),
        point_style="torchvision",
        closed_ranges=False,
        radius=float(model.center_sampling_radius),
        level_scales=False,
        weigh_boxes=False,
        score_threshold=model.score_thresh,
        threshold_on="ranking",
        candidates=model.topk_candidates,
        nms_iou=model.nms_thresh,
        max_detections=model.detections_per_img,
    )
    refusal = "from_torchvision: model must be as fcos_resnet50_fpn;"
    return _torchvision.take_over(ours, model, _TO_OURS, refusal)


_TO_OURS = {
    "head.classification_head.cls_logits.": "head.outputs.logits.",
    "head.regression_head.bbox_reg.": "head.outputs.deltas.",
    "head.regression_head.bbox_ctrness.": "head.outputs.centerness.",
    "head.classification_head.conv.": "head.class_tower.",
    "head.regression_head.conv.": "head.box_tower.",
}
