"""RetinaNet: one stage, dense anchors, focal loss.

Lin et al., Focal Loss for Dense Object Detection, ICCV 2017. arXiv:1708.02002
The defaults are those of MMDetection's RetinaNet, which the IoU-aware paper and RetinaNet-Conf
start from; options give the paper's or torchvision's where they differ.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead

from detcore.assigners import ForceMatch, max_iou_assign
from detcore.coders import DeltaCoder
from detcore.detector import DenseDetector
from detcore.losses.aiou import overlap_term
from detcore.losses.functional import sigmoid_focal_loss
from detcore.losses.terms import box_delta_term, focal_term
from detcore.models import _torchvision
from detcore.nn import FPN, DenseHead, ImageInput, build_trunk
from detcore.postprocess import select_by_pair, select_by_prior
from detcore.priors import AnchorGenerator, AnchorStyle
from detcore.scoring import Scores, class_score
from detcore.structures import BACKGROUND, Predictions, Priors, Targets

__all__ = ["from_torchvision", "retinanet"]

BoxLoss = Literal["smooth_l1", "l1", "iou", "giou", "aiou"]

_NOTHING: Mapping[str, int] = MappingProxyType({})


def retinanet(
    *,
    num_classes: int,
    backbone: str | nn.Module = "resnet50",
    weights_backbone: Any = None,
    norm: Literal["fixed", "batch"] | None = None,
    trainable_stages: int | None = None,
    channels: int | None = None,
    depth: int | None = None,
    p6: Literal["c5", "p5"] = "c5",
    relu_before_p7: bool = False,
    anchor_base: float = 4.0,
    anchor_style: AnchorStyle = "exact",
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    force_match: ForceMatch = "object",
    alpha: float = 0.25,
    gamma: float = 2.0,
    box_loss: BoxLoss = "smooth_l1",
    aiou_beta: float = 0.8,
    candidates_by: Literal["prior", "pair"] = "prior",
    score_threshold: float = 0.05,
    candidates: int = 1000,
    nms_iou: float | None = 0.5,
    max_detections: int = 100,
    short_side: int | None = None,
    long_side: int | None = None,
    box_extras: Mapping[str, int] = _NOTHING,
    class_extras: Mapping[str, int] = _NOTHING,
) -> DenseDetector:
    """RetinaNet.

    Args:
        num_classes: C, >= 1.
        backbone: see :func:`detcore.models.get_model`.
        weights_backbone: see there.
        norm: see :class:`detcore.nn.ResNetTrunk`.
        trainable_stages: see there.
        channels: width of pyramid and towers; default 256, or 64 on ``"tiny"``.
        depth: convolutions a tower; default 4, or 2 on ``"tiny"``.
        p6: see :class:`detcore.nn.FPN`.
        relu_before_p7: see there.
        anchor_base: see :class:`detcore.priors.AnchorGenerator`; 4 for pictures of 600 pixels
            and more, less for small ones.
        anchor_style: see there.
        positive_iou: see :func:`detcore.assigners.max_iou_assign`.
        negative_iou: see there.
        force_match: see there.
        alpha: of the focal loss.
        gamma: of the focal loss.
        box_loss: ``"smooth_l1"`` with beta 1/9 (IoU-aware paper), ``"l1"`` (RetinaNet-Conf), both
            on deltas; ``"iou"``, ``"giou"`` or ``"aiou"`` on decoded boxes.
        aiou_beta: of :func:`detcore.losses.aiou.aiou_loss`.
        candidates_by: how candidates compete before suppression, see :mod:`detcore.postprocess`.
        score_threshold: see :func:`detcore.postprocess.select_by_prior`.
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
        >>> detector = retinanet(num_classes=80)
        >>> sum(p.numel() for p in detector.parameters())
        37968692
    """
    if num_classes < 1:
        raise ValueError(f"retinanet: num_classes must be >= 1, background not counted; got {num_classes}.")
    if box_loss not in ("smooth_l1", "l1", "iou", "giou", "aiou"):
        raise ValueError(f'retinanet: box_loss must be "smooth_l1", "l1", "iou", "giou" or "aiou"; got {box_loss!r}.')
    if candidates_by not in ("prior", "pair"):
        raise ValueError(f'retinanet: candidates_by must be "prior" or "pair"; got {candidates_by!r}.')
    small = backbone == "tiny"
    channels = channels or (64 if small else 256)
    depth = depth if depth is not None else (2 if small else 4)

    trunk = build_trunk(backbone, weights=weights_backbone, norm=norm, trainable_stages=trainable_stages)
    neck = FPN(trunk.channels, channels, p6=p6, relu_before_p7=relu_before_p7)
    anchors = AnchorGenerator(base=anchor_base, style=anchor_style)
    coder = DeltaCoder(clamp="upper" if anchor_style == "torchvision" else "both")
    head = DenseHead(
        channels,
        anchors.num_priors,
        num_classes,
        coder,
        depth=depth,
        class_extras=class_extras,
        box_extras=box_extras,
    )
    if box_loss in ("smooth_l1", "l1"):
        box_term = partial(box_delta_term, coder=coder, beta=1 / 9 if box_loss == "smooth_l1" else 0.0)
    else:
        box_term = overlap_term(box_loss, beta=aiou_beta)
    detector = DenseDetector(
        nn.Sequential(trunk, neck),
        anchors,
        head,
        num_classes=num_classes,
        assign=partial(max_iou_assign, positive_iou=positive_iou, negative_iou=negative_iou, force_match=force_match),
        losses={"cls": partial(focal_term, alpha=alpha, gamma=gamma), "box": box_term},
        score=class_score,
        select=partial(
            {"prior": select_by_prior, "pair": select_by_pair}[candidates_by],
            score_threshold=score_threshold,
            candidates=candidates,
            nms_iou=nms_iou,
            max_detections=max_detections,
        ),
        inputs=ImageInput(short_side=short_side, long_side=long_side),
    )
    sigmoid_focal_loss(torch.zeros(0), torch.zeros(0, dtype=torch.bool), alpha=alpha, gamma=gamma)
    rehearse(detector)
    return detector


def rehearse(detector: DenseDetector, *, levels: int = 1) -> None:
    """Match and select on nothing, so that a wrong option is refused now, not at the first batch or validation.

    Args:
        detector: its ``assign`` and ``select`` are tried.
        levels: of the priors, where ``assign`` counts them.

    Example:
        >>> rehearse(retinanet(num_classes=3, backbone="tiny"))
    """
    nothing = torch.zeros(1, levels, 4, device="cpu")  # also where models are built on the meta device
    priors, nobody = Priors(nothing, (1,) * levels), torch.full((1, levels), BACKGROUND, device="cpu")
    detector.assign(priors, Targets(nothing, nobody, nobody >= 0))
    scores = Scores(nothing[..., :1], nothing[..., :1], nothing[..., 0])
    sizes = torch.ones(1, 2, dtype=torch.int64, device="cpu")
    detector.select(scores, Predictions(scores.ranking, nothing, nothing, priors), sizes)


def from_torchvision(model: TorchvisionRetinaNet) -> DenseDetector:
    """A torchvision RetinaNet (first version, any ResNet) as one of ours: same weights, same detections.

    torchvision's conventions are chosen throughout: anchors, resizing, P6 from P5, candidates by
    pair, forced matches, 300 detections. Labels stay torchvision's: channel k of its ``num_classes``
    is our label k, so a COCO checkpoint gives COCO's own ids 1..90.

    Args:
        model: ``torchvision.models.detection.retinanet_resnet50_fpn(...)``, with any weights and
            any of its detection options.

    Raises:
        ValueError: if the model is built differently (version 2's normalised towers, a trunk
            that is no ResNet, other anchors).

    Example:
        >>> import torchvision
        >>> theirs = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
        >>> from_torchvision(theirs).num_classes
        91
    """
    head = _checked_head(model)
    ours = retinanet(
        num_classes=head.classification_head.num_classes,
        backbone=_torchvision.trunk_name(model),
        norm=_torchvision.trunk_norm(model),
        p6="p5",
        relu_before_p7=True,
        anchor_style="torchvision",
        positive_iou=model.proposal_matcher.high_threshold,
        negative_iou=model.proposal_matcher.low_threshold,
        force_match="prior",
        box_loss="l1",
        candidates_by="pair",
        score_threshold=model.score_thresh,
        candidates=model.topk_candidates,
        nms_iou=model.nms_thresh,
        max_detections=model.detections_per_img,
    )
    return _torchvision.take_over(ours, model, _TO_OURS, _VERSION_1)


_VERSION_1 = "from_torchvision: model must be retinanet_resnet50_fpn (version 1);"


def _checked_head(model: TorchvisionRetinaNet) -> RetinaNetHead:
    if not isinstance(model, TorchvisionRetinaNet) or not isinstance(model.head, RetinaNetHead):
        raise ValueError(f"from_torchvision: model must be a torchvision RetinaNet; got {type(model).__name__}.")
    names = set(model.state_dict())
    if "backbone.fpn.extra_blocks.p6.weight" not in names or "head.classification_head.conv.0.1.weight" in names:
        raise ValueError(f"{_VERSION_1} this one has other towers or pyramid, as retinanet_resnet50_fpn_v2.")
    sides = tuple((s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in (32, 64, 128, 256, 512))
    anchors = model.anchor_generator
    if tuple(map(tuple, anchors.sizes)) != sides or any(tuple(r) != (0.5, 1.0, 2.0) for r in anchors.aspect_ratios):
        raise ValueError(f"from_torchvision: model must have torchvision's default anchors; got sizes {anchors.sizes}.")
    return model.head


_TO_OURS = {
    "head.classification_head.cls_logits.": "head.outputs.logits.",
    "head.regression_head.bbox_reg.": "head.outputs.deltas.",
    "head.classification_head.conv.": "head.class_tower.",
    "head.regression_head.conv.": "head.box_tower.",
}
