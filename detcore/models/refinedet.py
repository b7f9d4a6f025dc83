"""RefineDet: two steps in one network. Priors are first moved and filtered, then classified and moved again.

Zhang et al., Single-Shot Refinement Neural Network for Object Detection, CVPR 2018. arXiv:1711.06897
The anchor refinement module (ARM) says object or not, and moves the priors; transfer connection blocks (TCB)
carry its maps, coarse to fine, to the object detection module (ODM), which works on the moved priors.
VGG-16 and ResNet versions; their losses are in :mod:`detcore.losses.refine`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from detcore.coders import BoxCoder, DeltaCoder
from detcore.default_boxes import LAYOUTS, Clip, DefaultBoxGenerator
from detcore.detector import DenseDetector
from detcore.losses.refine import arm_box_term, arm_class_term, odm_class_term, refine_priors, surely_background
from detcore.losses.terms import LossTerm, box_delta_term
from detcore.models.ssd import ssd_detector, vgg_or_own
from detcore.nn.backbones import ResNetTrunk
from detcore.nn.deconvolution import ResidualBlock, batch_norm
from detcore.nn.inputs import ImageInput
from detcore.nn.level_head import _join_levels, level_outputs
from detcore.nn.pyramids import ExtraShape, SSDPyramid, halving_extras
from detcore.nn.transfer import ResNetMaps, TransferConnections
from detcore.nn.vgg import VGGTrunk
from detcore.scores import by_rows
from detcore.scoring import Scores, softmax_score
from detcore.structures import Predictions, Priors

__all__ = [
    "RefineHead",
    "refined_score",
    "refinedet",
    "refinedet320",
    "refinedet512",
]

_CODER = DeltaCoder((10.0, 10.0, 5.0, 5.0))
"""Variances 0.1 and 0.2, clamped on both sides: a prior refined to nothing would have no deltas of its own."""


class RefineHead(nn.Module):
    """ARM on the maps, ODM on what the transfer connections make of them.

    Args:
        in_channels: width of each level's map.
        num_priors: priors a cell of each level.
        num_logits: logits a prior in the second step; C + 1, background last.
        coder: reads deltas of both steps back as boxes.
        width: of the maps of the second step.
        block_width: of a residual block before every output, in both steps (ResNet version, whose transfer
            connections have batch norm); ``None``: outputs straight on the maps (VGG version).

    Returns predictions relative to the **refined** priors, with the ``extras`` that
    :mod:`detcore.losses.refine` lists.

    Example:
        >>> head = RefineHead([8, 8], [3, 3], 21, DeltaCoder(), width=4)
        >>> {name: convolutions[0].out_channels for name, convolutions in head.outputs.items()}
        {'objectness': 6, 'arm_deltas': 12, 'logits': 63, 'deltas': 12}

    Reference: Zhang et al., RefineDet, CVPR 2018, section 3.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_priors: Sequence[int],
        num_logits: int,
        coder: BoxCoder,
        *,
        width: int,
        block_width: int | None = None,
    ) -> None:
        super().__init__()
        self.coder, self.num_priors = coder, tuple(num_priors)
        self.transfer = TransferConnections(in_channels, width, norm=batch_norm if block_width else None)
        kernels, wide = [3] * len(in_channels), [width] * len(in_channels)
        self.arm_blocks, self.odm_blocks = (
            nn.ModuleList(ResidualBlock(c, block_width) if block_width else nn.Identity() for c in channels)
            for channels in (in_channels, wide)
        )
        if block_width:
            in_channels = wide = [block_width] * len(in_channels)
        self.outputs = nn.ModuleDict(
            {
                **level_outputs(in_channels, num_priors, {"objectness": 2, "arm_deltas": 4}, kernels),
                **level_outputs(wide, num_priors, {"logits": num_logits, "deltas": 4}, kernels),
            }
        )

    def forward(self, features: Sequence[Tensor], priors: Priors) -> Predictions:
        """Predictions of the second step, levels joined."""
        seen = [block(x) for block, x in zip(self.arm_blocks, features, strict=True)]
        objectness, arm_deltas = (self._joined(name, seen) for name in ("objectness", "arm_deltas"))
        refined = refine_priors(priors, arm_deltas, coder=self.coder)
        transferred = [block(x) for block, x in zip(self.odm_blocks, self.transfer(features), strict=True)]
        logits, deltas = (self._joined(name, transferred) for name in ("logits", "deltas"))
        boxes = self.coder.decode(deltas, refined.boxes)
        extras = {"objectness": objectness, "arm_deltas": arm_deltas, "arm_priors": priors.boxes}
        return Predictions(logits, deltas, boxes, refined, extras)

    def _joined(self, name: str, maps: Sequence[Tensor]) -> Tensor:
        return _join_levels(self.outputs[name], maps, self.num_priors)


@by_rows(has_background=True)
def refined_score(pred: Predictions, *, min_objectness: float = 0.01) -> Scores:
    """Softmax of the second step, 0 where the first is sure that there is nothing.

    Args:
        pred: with ``extras["objectness"]``.
        min_objectness: of :func:`detcore.losses.refine.surely_background`; 0 filters nothing.

    Raises:
        ValueError: if ``min_objectness`` is outside [0, 1].

    Example:
        >>> from functools import partial
        >>> unfiltered = partial(refined_score, min_objectness=0.0)

    Reference: Zhang et al., RefineDet, CVPR 2018, section 3.3.
    """
    scores = softmax_score(pred)
    filtered = torch.where(surely_background(pred, least=min_objectness)[..., None], 0.0, scores.ranking)
    return replace(scores, ranking=filtered, classes=filtered)


def refinedet320(*, num_classes: int, **options: Any) -> DenseDetector:
    """RefineDet on pictures of 320 x 320 pixels.

    Args:
        num_classes: C, >= 1, background not counted.
        **options: of :func:`refinedet`.

    Example:
        >>> with torch.device("meta"):
        ...     detector = refinedet320(num_classes=20)
        >>> sum(p.numel() for p in detector.parameters())
        34440884
    """
    return refinedet(num_classes=num_classes, size=320, **options)


def refinedet512(*, num_classes: int, **options: Any) -> DenseDetector:
    """RefineDet on pictures of 512 x 512 pixels: the same network and the same sides of its boxes, in pixels.

    Args:
        num_classes: C, >= 1, background not counted.
        **options: of :func:`refinedet`.

    Example:
        >>> refinedet512(num_classes=20, backbone="tiny").priors.layout.total
        16320
    """
    return refinedet(num_classes=num_classes, size=512, **options)


def refinedet(
    *,
    num_classes: int,
    size: Literal[320, 512] = 320,
    backbone: str | nn.Module = "vgg16",
    weights_backbone: Any = None,
    norm: Literal["fixed", "batch"] | None = None,
    channels: int = 64,
    clip: Clip | None = None,
    min_objectness: float = 0.01,
    mining_ratio: float = 3.0,
    candidates: int = 1000,
    max_detections: int = 500,
    warp_side: int | None = None,
    **options: Any,
) -> DenseDetector:
    """RefineDet.

    Args:
        num_classes: C, >= 1, background not counted.
        size: of the pictures.
        backbone: see :func:`detcore.models.ssd.ssd`; a trunk of your own has maps of strides 8, 16, 32. Also
            ``"resnet50"`` and ``"resnet101"``, the paper's larger version.
        weights_backbone: see there, and :class:`detcore.nn.ResNetTrunk`.
        norm: of a ResNet, see there; other trunks do not look at it.
        channels: width of the extra layer and of the second step on another trunk than VGG's.
        clip: of the first step's priors, see :class:`detcore.default_boxes.DefaultBoxGenerator`.
        min_objectness: below it a negative is not mined in training, and scores 0 in detection.
        mining_ratio: negatives a positive, in both steps.
        candidates: see :func:`detcore.postprocess.select_by_class`.
        max_detections: see there.
        warp_side: see :func:`detcore.models.ssd.ssd`.
        **options: of :func:`detcore.models.ssd.ssd_detector`; ``box_loss`` is that of the second step, the
            first keeps smooth L1.

    Raises:
        ValueError: if an option is out of range; the message names it.

    Example:
        >>> list(refinedet(num_classes=20, backbone="tiny").losses)
        ['arm_cls', 'arm_box', 'cls', 'box']
    """
    if size not in (320, 512):
        raise ValueError(f"refinedet: size must be 320 or 512; got {size}.")
    if not 0 <= min_objectness <= 1:
        raise ValueError(f"refinedet: min_objectness must be in [0, 1]; got {min_objectness}.")
    priors = DefaultBoxGenerator(LAYOUTS[f"refinedet{size}"], clip=clip)
    body, width, block_width = _body(backbone, weights=weights_backbone, norm=norm, channels=channels)
    detector = ssd_detector(
        body,
        priors,
        RefineHead(body.channels, priors.num_priors, num_classes + 1, _CODER, width=width, block_width=block_width),
        num_classes=num_classes,
        inputs=ImageInput(warp_side=warp_side or (size if _is_published(body.trunk) else None)),
        mining_ratio=mining_ratio,
        candidates=candidates,
        max_detections=max_detections,
        **options,
    )
    terms: dict[str, LossTerm] = {
        "arm_cls": partial(arm_class_term, assign=detector.assign, ratio=mining_ratio),
        "arm_box": partial(arm_box_term, assign=detector.assign, coder=_CODER, beta=1.0),
        "cls": partial(odm_class_term, ratio=mining_ratio, least=min_objectness),
        "box": partial(box_delta_term, coder=_CODER, beta=1.0),
    }
    if options.get("box_loss", "smooth_l1") != "smooth_l1":
        terms["box"] = detector.losses["box"][1]
    detector.losses = {name: (1.0, term) for name, term in terms.items()}
    detector.score = partial(refined_score, min_objectness=min_objectness)
    return detector


def _body(
    backbone: str | nn.Module, *, weights: Any, norm: Any, channels: int
) -> tuple[ResNetMaps | SSDPyramid, int, int | None]:
    """The maps, the width of the second step's, and that of the head's residual blocks."""
    if isinstance(backbone, str) and backbone in ("resnet50", "resnet101"):
        trunk = ResNetTrunk(backbone, weights=weights, norm=norm, trainable_stages=5)
        return ResNetMaps(trunk, 512), 256, 1024
    trunk = vgg_or_own(backbone, weights=weights, stride=32)
    is_vgg = isinstance(trunk, VGGTrunk)
    extras = [ExtraShape(256, 512)] if is_vgg else halving_extras(channels, 4 - len(trunk.channels))
    return SSDPyramid(trunk, extras, scales={0: 10.0, 1: 8.0}), 256 if is_vgg else channels, None


def _is_published(trunk: nn.Module) -> bool:
    return isinstance(trunk, VGGTrunk | ResNetTrunk)
