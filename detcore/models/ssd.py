"""SSD: one convolution a level on six or seven maps, softmax over classes and background, hard negatives.

Liu et al., SSD: Single Shot MultiBox Detector, ECCV 2016. arXiv:1512.02325
Layers, default boxes and losses as in the released Caffe scripts; unrounded sides and no clipping.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn
from torchvision.models.detection.ssd import SSD as TorchvisionSSD
from torchvision.models.detection.ssd import SSDFeatureExtractorVGG, SSDHead

from detcore.coders import DeltaCoder
from detcore.default_boxes import LAYOUTS, Clip, DefaultBoxGenerator
from detcore.detector import DenseDetector
from detcore.losses.aiou import overlap_term
from detcore.losses.mining import hard_negative_mask, softmax_mining_term
from detcore.losses.terms import box_delta_term
from detcore.models.retinanet import rehearse
from detcore.nn.backbones import TinyTrunk, Trunk
from detcore.nn.inputs import ImageInput
from detcore.nn.level_head import LevelHead
from detcore.nn.pyramids import ExtraShape, SSDPyramid, halving_extras
from detcore.nn.vgg import VGGTrunk
from detcore.postprocess import select_by_class
from detcore.scoring import softmax_score
from detcore.ssd_assigner import ForceRule, ssd_assign

__all__ = ["SSD_CODER", "from_torchvision", "ssd", "ssd300", "ssd512", "ssd_detector", "vgg_or_own"]

SSD_CODER = DeltaCoder((10.0, 10.0, 5.0, 5.0), clamp="upper")
"""Deltas of the whole family: variances 0.1 and 0.2; only sizes that would overflow are held back."""

_CONV6_7 = (ExtraShape(256, 512), ExtraShape(128, 256))
_EXTRAS = {
    300: (*_CONV6_7, ExtraShape(128, 256, 3, 1, 0), ExtraShape(128, 256, 3, 1, 0)),
    512: (*_CONV6_7, ExtraShape(128, 256), ExtraShape(128, 256), ExtraShape(128, 256, 4, 1, 1)),
}


def ssd300(*, num_classes: int, **options: Any) -> DenseDetector:
    """SSD on pictures of 300 x 300 pixels.

    Args:
        num_classes: C, >= 1, background not counted.
        **options: of :func:`ssd`.

    Example:
        >>> with torch.device("meta"):
        ...     detector = ssd300(num_classes=20)
        >>> sum(p.numel() for p in detector.parameters())
        26285486
    """
    return ssd(num_classes=num_classes, size=300, **options)


def ssd512(*, num_classes: int, **options: Any) -> DenseDetector:
    """SSD on pictures of 512 x 512 pixels, with a seventh level.

    Args:
        num_classes: C, >= 1, background not counted.
        **options: of :func:`ssd`.

    Example:
        >>> ssd512(num_classes=20, backbone="tiny").priors.layout.total
        24564
    """
    return ssd(num_classes=num_classes, size=512, **options)


def ssd(
    *,
    num_classes: int,
    size: Literal[300, 512] = 300,
    backbone: str | nn.Module = "vgg16",
    weights_backbone: Any = None,
    channels: int = 64,
    boxes: Literal["voc", "coco"] = "voc",
    clip: Clip | None = None,
    warp_side: int | None = None,
    **options: Any,
) -> DenseDetector:
    """SSD.

    Args:
        num_classes: C, >= 1, background not counted.
        size: which of the two networks; also the side of its pictures.
        backbone: ``"vgg16"``, ``"vgg16_bn"`` for training from scratch, ``"tiny"`` for processors
            without a GPU, or a trunk of your own, with its maps' widths in ``channels``.
        weights_backbone: ImageNet weights, see :class:`detcore.nn.VGGTrunk`.
        channels: width of the extra layers on another trunk than VGG's; these halve the map down to
            one cell and take pictures of any size.
        boxes: sides of the default boxes, as published for each data set.
        clip: see :class:`detcore.default_boxes.DefaultBoxGenerator`.
        warp_side: side to which pictures given to ``detector(images)`` are warped; default ``size``
            on VGG; on other trunks they are left as they are.
        **options: of :func:`ssd_detector`.

    Raises:
        ValueError: if an option is out of range; the message names it.

    Example:
        >>> detector = ssd(num_classes=20, backbone="tiny")
        >>> detector.head.num_priors
        (4, 6, 6, 6, 4, 4)
    """
    if size not in _EXTRAS:
        raise ValueError(f"ssd: size must be 300 or 512; got {size}.")
    if boxes not in ("voc", "coco"):
        raise ValueError(f'ssd: boxes must be "voc" or "coco"; got {boxes!r}.')
    priors = DefaultBoxGenerator(LAYOUTS[f"ssd{size}_{boxes}"], clip=clip)
    trunk = vgg_or_own(backbone, weights=weights_backbone)
    levels, is_vgg = len(priors.num_priors), isinstance(trunk, VGGTrunk)
    extras = _EXTRAS[size] if is_vgg else halving_extras(channels, levels - len(trunk.channels))
    body = SSDPyramid(trunk, extras, scales={0: 20.0})
    return ssd_detector(
        body,
        priors,
        LevelHead(body.channels, priors.num_priors, num_classes + 1, SSD_CODER),
        num_classes=num_classes,
        inputs=ImageInput(warp_side=warp_side or (size if is_vgg else None)),
        **options,
    )


def vgg_or_own(backbone: str | nn.Module, *, weights: Any = None, stride: Literal[16, 32] = 16) -> Trunk:
    """The trunk that ``backbone`` names, or the given one.

    Raises:
        ValueError: if the name is unknown, weights are given for another trunk than VGG's, or a trunk
            of your own has no ``channels``.

    Example:
        >>> vgg_or_own("tiny").channels
        (64, 96, 128)
    """
    if isinstance(backbone, str) and backbone in ("vgg16", "vgg16_bn"):
        return VGGTrunk(backbone, weights=weights, stride=stride)
    if weights is not None:
        raise ValueError(f'ssd: weights_backbone must be None unless backbone is "vgg16" or "vgg16_bn"; got {weights}.')
    if backbone == "tiny":
        return TinyTrunk()
    if not isinstance(backbone, nn.Module) or not hasattr(backbone, "channels"):
        raise ValueError(
            'ssd: backbone must be "vgg16", "vgg16_bn", "tiny", or a module with a tuple `channels`, the widths of '
            f"its maps; got {backbone if isinstance(backbone, str) else type(backbone).__name__}."
        )
    return cast(Trunk, backbone)


def ssd_detector(
    body: nn.Module,
    priors: DefaultBoxGenerator,
    head: nn.Module,
    *,
    num_classes: int,
    inputs: ImageInput,
    positive_iou: float = 0.5,
    rule: ForceRule = "override",
    mining_ratio: float = 3.0,
    box_loss: Literal["smooth_l1", "iou", "giou", "aiou"] = "smooth_l1",
    aiou_beta: float = 0.8,
    score_threshold: float = 0.01,
    candidates: int = 400,
    nms_iou: float | None = 0.45,
    max_detections: int = 200,
) -> DenseDetector:
    """What SSD, FSSD and DSSD have in common: matching, loss, scores and selection.

    Args:
        body: images to maps.
        priors: default boxes on them.
        head: maps to logits of C classes and background, and deltas.
        num_classes: C, >= 1, background not counted.
        inputs: the door for pictures.
        positive_iou: see :func:`detcore.ssd_assigner.ssd_assign`.
        rule: see there.
        mining_ratio: negatives a positive, see :func:`detcore.losses.mining.softmax_mining_term`.
        box_loss: ``"smooth_l1"`` with beta 1 on deltas; ``"iou"``, ``"giou"`` or ``"aiou"`` on decoded boxes.
        aiou_beta: of :func:`detcore.losses.aiou.aiou_loss`.
        score_threshold: see :func:`detcore.postprocess.select_by_class`.
        candidates: see there.
        nms_iou: see there.
        max_detections: see there.

    Raises:
        ValueError: if an option is out of range; the message names it.

    Example:
        >>> list(ssd(num_classes=3, backbone="tiny").losses)
        ['cls', 'box']
    """
    if num_classes < 1:
        raise ValueError(f"ssd: num_classes must be >= 1, background not counted; got {num_classes}.")
    if box_loss not in ("smooth_l1", "iou", "giou", "aiou"):
        raise ValueError(f'ssd: box_loss must be "smooth_l1", "iou", "giou" or "aiou"; got {box_loss!r}.')
    on_deltas = partial(box_delta_term, coder=SSD_CODER, beta=1.0)
    detector = DenseDetector(
        body,
        priors,
        head,
        num_classes=num_classes,
        assign=partial(ssd_assign, positive_iou=positive_iou, rule=rule),
        losses={
            "cls": partial(softmax_mining_term, ratio=mining_ratio),
            "box": on_deltas if box_loss == "smooth_l1" else overlap_term(box_loss, beta=aiou_beta),
        },
        score=softmax_score,
        select=partial(
            select_by_class,
            score_threshold=score_threshold,
            candidates=candidates,
            nms_iou=nms_iou,
            max_detections=max_detections,
        ),
        inputs=inputs,
    )
    nobody = torch.zeros(1, 1, dtype=torch.bool, device="cpu")
    hard_negative_mask(torch.zeros(1, 1, device="cpu"), nobody, nobody, ratio=mining_ratio)  # refuses a wrong ratio
    rehearse(detector)
    return detector


def from_torchvision(model: TorchvisionSSD) -> DenseDetector:
    """Torchvision's ``ssd300_vgg16`` as one of ours: same weights, same detections.

    Labels are torchvision's less one, for background is not among them. torchvision's door, clipped
    default boxes, matching and thresholds are taken over.

    Args:
        model: on any device, in any mode, both kept.

    Raises:
        ValueError: if it is not an SSD300 on VGG-16 with torchvision's default boxes.

    Example:
        >>> from torchvision.models.detection import ssd300_vgg16
        >>> with torch.device("meta"):  # no need for real weights here
        ...     ours = from_torchvision(ssd300_vgg16(weights=None, weights_backbone=None, num_classes=21))
        >>> ours.num_classes
        20
    """
    trunk, head = _checked_parts(model)
    num_classes = head.classification_head.num_columns - 1
    ours = ssd300(
        num_classes=num_classes,
        boxes="coco",
        clip="sizes",
        positive_iou=model.proposal_matcher.high_threshold,
        mining_ratio=model.neg_to_pos_ratio,
        score_threshold=model.score_thresh,
        candidates=model.topk_candidates,
        nms_iou=model.nms_thresh,
        max_detections=model.detections_per_img,
    )
    ours.inputs = ImageInput(model.transform.image_mean, model.transform.image_std, warp_side=300)
    with torch.no_grad():
        ours.get_parameter("body.norms.0.weight").copy_(trunk.scale_weight)
        _copy(_convolutions(trunk), _convolutions(ours.body))
        _copy(head.regression_head.module_list, ours.get_submodule("head.outputs.deltas").children())
        logits = ours.get_submodule("head.outputs.logits").children()
        for theirs, mine in zip(head.classification_head.module_list, logits, strict=True):
            for name, value in theirs.named_parameters():
                by_prior = value.view(-1, num_classes + 1, *value.shape[1:])
                mine.get_parameter(name).copy_(by_prior.roll(-1, dims=1).reshape(value.shape))  # background first: last
    return ours.to(trunk.scale_weight.device).train(model.training)


def _convolutions(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


def _copy(theirs: Iterable[nn.Module], ours: Iterable[nn.Module]) -> None:
    for a, b in zip(theirs, ours, strict=True):
        b.load_state_dict(a.state_dict())


def _checked_parts(model: TorchvisionSSD) -> tuple[SSDFeatureExtractorVGG, SSDHead]:
    if not isinstance(model, TorchvisionSSD):
        raise ValueError(f"from_torchvision: model must be a torchvision SSD; got {type(model).__name__}.")
    layout, found = LAYOUTS["ssd300_coco"], model.anchor_generator
    sides = [s * layout.size for s in found.scales]
    expected = [*layout.sides, layout.last_side]
    same = len(sides) == 7 and all(abs(a - b) < 1e-3 for a, b in zip(sides, expected, strict=True))
    ratios = tuple(tuple(map(float, level)) for level in found.aspect_ratios)
    trunk, head = model.backbone, model.head
    is_vgg = isinstance(trunk, SSDFeatureExtractorVGG)
    if not is_vgg or not isinstance(head, SSDHead) or not same or ratios != layout.ratios:
        raise ValueError("from_torchvision: model must be ssd300_vgg16 with its own default boxes.")
    steps, warped = tuple(found.steps or ()), tuple(model.transform.fixed_size or ())
    if not found.clip or steps != layout.steps or warped != (300, 300):
        raise ValueError("from_torchvision: model must have ssd300_vgg16's steps, clipping and 300 x 300 pixels.")
    return trunk, head
