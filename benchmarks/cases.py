"""The detectors that both packages have: how each side is built, and what its outputs and losses are called."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet, ssd300_vgg16
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from benchmarks.synthetic import Shape, objects, seeded, trained_outputs, trained_points
from detcore.default_boxes import LAYOUTS
from detcore.detector import DenseDetector
from detcore.models import fcos, retinanet, ssd
from detcore.structures import Predictions, Priors, pad_targets

Maps = dict[str, Tensor]


def canvas_of(shape: Shape) -> Shape:
    """What a batch of such pictures is padded to."""
    height, width = (-(-side // 32) * 32 for side in shape)
    return height, width


@dataclass(frozen=True)
class Case:
    """One detector on both sides.

    Args:
        title: begins the names of its rows.
        theirs: torchvision's class.
        convert: makes ours of it.
        maps: our names of the head's maps to theirs, and to theirs of the last convolution.
        terms: our names of the losses to theirs.
        deltas: standard normal numbers to deltas as training meets them.
        trained: outputs of a trained head: detector, priors, objects, classes, pairs a level.
        loss_reads_boxes: whether the loss needs decoded boxes; theirs decodes them inside it.
        normalised_by_picture: whether theirs divides each picture's loss by that picture's own positives.
        first_label: theirs' number of our label 0.
    """

    title: str
    theirs: type[nn.Module]
    convert: Callable[[nn.Module], DenseDetector]
    maps: Mapping[str, tuple[str, str]]
    terms: Mapping[str, str]
    deltas: Callable[[Tensor], Tensor]
    trained: Callable[..., Maps]
    loss_reads_boxes: bool
    normalised_by_picture: bool
    first_label: int = 0

    def shape(self, wanted: Shape) -> Shape:
        """Of this detector's pictures where the setting asks for ``wanted``."""
        return wanted

    def both(self, shape: Shape, num_classes: int, backbone: str = "resnet18") -> tuple[nn.Module, DenseDetector]:
        """Theirs on a ResNet with random weights, and ours with the same."""
        torch.manual_seed(0)
        trunk = resnet_fpn_backbone(
            backbone_name=backbone,
            weights=None,
            norm_layer=nn.BatchNorm2d,
            trainable_layers=5,
            returned_layers=[2, 3, 4],
            extra_blocks=LastLevelP6P7(256, 256),
        )
        theirs = self.theirs(trunk, num_classes, min_size=min(shape), max_size=max(shape))
        return theirs, self.convert(theirs)

    def priors(self, ours: DenseDetector, shape: Shape) -> Priors:
        """The priors of one batch of pictures; both sides have the same."""
        canvas = canvas_of(shape)
        maps = [[-(-side // stride) for side in canvas] for stride in (8, 16, 32, 64, 128)]  # halved, rounding up
        return ours.priors([torch.empty(1, 1, *sides) for sides in maps], canvas)

    def their_targets(self, targets: list[Maps]) -> list[Maps]:
        """The objects as they number classes."""
        return [{**target, "labels": target["labels"] + self.first_label} for target in targets]

    def as_ours(self, detections: list[Maps]) -> list[Maps]:
        """Their detections with our numbers of classes."""
        return [{**found, "labels": found["labels"] - self.first_label} for found in detections]

    def as_theirs(self, maps: Maps) -> Maps:
        """The maps with the channels in their order, under our names."""
        return maps

    def random_maps(self, shape: tuple[int, int], num_classes: int) -> Maps:
        """Outputs as at the start of training, (B, N, n) each, with gradients."""
        generator = seeded(0)

        def draw(n: int) -> Tensor:
            return torch.randn(*shape, n, generator=generator)

        made = {"logits": draw(num_classes) - 4.6, "deltas": self.deltas(draw(4))}
        made |= {name: draw(1) for name in self.maps if name not in made}
        return {name: value.requires_grad_() for name, value in made.items()}

    def trained_maps(self, ours: DenseDetector, priors: Priors, batch: int, shape: Shape, per_level: int) -> Maps:
        """Outputs that post-processing meets after training."""
        return self.trained(ours, priors, objects(batch, shape, 10, ours.num_classes), per_level)

    def predictions(self, ours: DenseDetector, maps: Maps, priors: Priors, *, decode: bool = True) -> Predictions:
        """The maps as our predictions; ``decode=False`` where nobody reads the boxes."""
        extras = {name: value for name, value in maps.items() if name not in ("logits", "deltas")}
        deltas = maps["deltas"]
        boxes = ours.head.coder.decode(deltas, priors.boxes.expand(len(deltas), -1, -1)) if decode else deltas
        return Predictions(maps["logits"], deltas, boxes, priors, extras)

    def outputs(self, maps: Maps) -> dict[str, Tensor]:
        """The maps as their head's outputs."""
        return {self.maps[name][0]: value for name, value in maps.items()}

    def convolutions(self, model: nn.Module) -> dict[str, list[nn.Module]]:
        """Our names of the maps to the last convolutions of either side: one for all levels, or one a level."""
        if isinstance(model, DenseDetector):
            last = {name: model.head.outputs[name] for name in self.maps}
        else:
            last = {name: model.get_submodule(path) for name, (_, path) in self.maps.items()}
        return {name: list(m) if isinstance(m, nn.ModuleList) else [m] for name, m in last.items()}

    def their_losses(self, theirs: nn.Module, targets: list[Maps], maps: Maps, priors: Priors) -> list[Tensor]:
        """Their matching and losses of these outputs, in the order of ours."""
        anchors = [priors.boxes[0]] * len(targets)
        levels = [] if self.theirs is RetinaNet else [list(priors.counts)]
        losses = theirs.compute_loss(targets, self.outputs(maps), anchors, *levels)
        return [losses[name] for name in self.terms.values()]

    def their_detections(
        self, theirs: nn.Module, maps: Maps, priors: Priors, shape: Shape
    ) -> Callable[[], list[dict[str, Tensor]]]:
        """What works out their detections of these outputs."""
        batch = len(maps["deltas"])
        outputs = {name: list(value.split(priors.counts, 1)) for name, value in self.outputs(maps).items()}
        anchors = [list(priors.boxes[0].split(priors.counts))] * batch
        return functools.partial(theirs.postprocess_detections, outputs, anchors, [shape] * batch)


class SsdCase(Case):
    """SSD300 on VGG-16: pictures of 300 pixels, and background is their class 0 and our last channel."""

    def shape(self, wanted: Shape) -> Shape:
        """Always 300 x 300."""
        return 300, 300

    def both(self, shape: Shape, num_classes: int, backbone: str = "vgg16") -> tuple[nn.Module, DenseDetector]:
        """Theirs with random weights, and ours with the same; the trunk is always VGG-16."""
        torch.manual_seed(0)
        theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=num_classes)
        return theirs, self.convert(theirs)

    def priors(self, ours: DenseDetector, shape: Shape) -> Priors:
        """The 8732 default boxes."""
        maps = [torch.empty(1, 1, side, side) for side in LAYOUTS["ssd300_coco"].maps]
        return ours.priors(maps, shape)

    def as_theirs(self, maps: Maps) -> Maps:
        """Background first."""
        return {**maps, "logits": maps["logits"].roll(1, dims=-1)}

    def their_losses(self, theirs: nn.Module, targets: list[Maps], maps: Maps, priors: Priors) -> list[Tensor]:
        """Matching as in the ``forward`` of their SSD, then their losses in the order of ours."""
        anchors = priors.boxes[0]
        matched = [theirs.proposal_matcher(box_iou(target["boxes"], anchors)) for target in targets]
        losses = theirs.compute_loss(targets, self.outputs(maps), [anchors] * len(targets), matched)
        return [losses[name] for name in self.terms.values()]

    def their_detections(
        self, theirs: nn.Module, maps: Maps, priors: Priors, shape: Shape
    ) -> Callable[[], list[dict[str, Tensor]]]:
        """What works out their detections; levels are joined."""
        batch = len(maps["deltas"])
        anchors, sizes = [priors.boxes[0]] * batch, [shape] * batch
        return functools.partial(theirs.postprocess_detections, self.outputs(maps), anchors, sizes)


def _trained_anchors(ours: DenseDetector, priors: Priors, targets: list[Maps], per_level: int) -> Maps:
    logits, deltas = trained_outputs(
        priors, targets, ours.num_classes, coder=ours.head.coder, threshold=0.05, per_level=per_level
    )
    return {"logits": logits, "deltas": deltas}


def _trained_default_boxes(ours: DenseDetector, priors: Priors, targets: list[Maps], per_level: int) -> Maps:
    logits, deltas = trained_outputs(
        priors, targets, ours.num_classes, coder=ours.head.coder, threshold=0.01, per_level=per_level
    )
    background = torch.zeros_like(logits[..., :1])  # then the softmax of the few that stand out is nearly their sigmoid
    return {"logits": torch.cat([logits, background], dim=-1), "deltas": deltas}


def _trained_points(ours: DenseDetector, priors: Priors, targets: list[Maps], per_level: int) -> Maps:
    match = ours.match(priors, pad_targets(targets))
    logits, deltas, centerness = trained_points(
        priors, match, ours.head.coder, ours.num_classes, threshold=0.2, per_level=per_level
    )
    return {"logits": logits, "deltas": deltas, "centerness": centerness}


_CLASSES, _BOXES = "head.classification_head", "head.regression_head"

CASES = {
    "fcos": Case(
        title="FCOS",
        theirs=FCOS,
        convert=fcos.from_torchvision,
        maps={
            "logits": ("cls_logits", f"{_CLASSES}.cls_logits"),
            "deltas": ("bbox_regression", f"{_BOXES}.bbox_reg"),
            "centerness": ("bbox_ctrness", f"{_BOXES}.bbox_ctrness"),
        },
        terms={"cls": "classification", "box": "bbox_regression", "centerness": "bbox_ctrness"},
        deltas=torch.exp,  # strides to each side, > 0
        trained=_trained_points,
        loss_reads_boxes=True,
        normalised_by_picture=False,
    ),
    "ssd300": SsdCase(
        title="SSD300",
        theirs=SSD,
        convert=ssd.from_torchvision,
        maps={
            "logits": ("cls_logits", f"{_CLASSES}.module_list"),
            "deltas": ("bbox_regression", f"{_BOXES}.module_list"),
        },
        terms={"cls": "classification", "box": "bbox_regression"},
        deltas=torch.clone,
        trained=_trained_default_boxes,
        loss_reads_boxes=False,
        normalised_by_picture=False,
        first_label=1,
    ),
    "retinanet": Case(
        title="RetinaNet",
        theirs=RetinaNet,
        convert=retinanet.from_torchvision,
        maps={
            "logits": ("cls_logits", f"{_CLASSES}.cls_logits"),
            "deltas": ("bbox_regression", f"{_BOXES}.bbox_reg"),
        },
        terms={"cls": "classification", "box": "bbox_regression"},
        deltas=functools.partial(torch.mul, 0.2),
        trained=_trained_anchors,
        loss_reads_boxes=False,
        normalised_by_picture=True,
    ),
}
