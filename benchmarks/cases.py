"""The detectors that both packages have: how each side is built, and what its outputs and losses are called."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from benchmarks.synthetic import objects, trained_outputs, trained_points
from detcore.detector import DenseDetector
from detcore.models import fcos, retinanet
from detcore.structures import Predictions, Priors, pad_targets

Maps = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One detector on both sides.

    Args:
        title: begins the names of its rows.
        theirs: torchvision's class.
        convert: makes ours of it.
        maps: our names of the head's maps to theirs, and to theirs of the last convolution.
        terms: our names of the losses to theirs.
        per_cell: priors a cell.
        deltas: standard normal numbers to deltas as training meets them.
        trained: outputs of a trained head: detector, priors, objects, classes, pairs a level.
        loss_reads_boxes: whether the loss needs decoded boxes; theirs decodes them inside it.
        normalised_by_picture: whether theirs divides each picture's loss by that picture's own positives.
    """

    title: str
    theirs: type[nn.Module]
    convert: Callable[[nn.Module], DenseDetector]
    maps: Mapping[str, tuple[str, str]]
    terms: Mapping[str, str]
    per_cell: int
    deltas: Callable[[Tensor], Tensor]
    trained: Callable[..., Maps]
    loss_reads_boxes: bool
    normalised_by_picture: bool

    def both(self, size: int, num_classes: int) -> tuple[nn.Module, DenseDetector]:
        """Theirs on ResNet-18 with random weights, and ours with the same."""
        torch.manual_seed(0)
        trunk = resnet_fpn_backbone(
            backbone_name="resnet18",
            weights=None,
            norm_layer=nn.BatchNorm2d,
            trainable_layers=5,
            returned_layers=[2, 3, 4],
            extra_blocks=LastLevelP6P7(256, 256),
        )
        theirs = self.theirs(trunk, num_classes, min_size=size, max_size=size)
        return theirs, self.convert(theirs)

    def random_maps(self, shape: tuple[int, int], num_classes: int) -> Maps:
        """Outputs as at the start of training, (B, N, n) each, with gradients."""
        generator = torch.Generator().manual_seed(0)

        def draw(n: int) -> Tensor:
            return torch.randn(*shape, n, generator=generator)

        made = {"logits": draw(num_classes) - 4.6, "deltas": self.deltas(draw(4))}
        made |= {name: draw(1) for name in self.maps if name not in made}
        return {name: value.requires_grad_() for name, value in made.items()}

    def trained_maps(self, ours: DenseDetector, priors: Priors, batch: int, size: int, per_level: int) -> Maps:
        """Outputs that post-processing meets after training."""
        return self.trained(ours, priors, objects(batch, size, 10, ours.num_classes), per_level)

    def predictions(self, ours: DenseDetector, maps: Maps, priors: Priors, *, decode: bool = True) -> Predictions:
        """The maps as our predictions; ``decode=False`` where nobody reads the boxes."""
        extras = {name: value for name, value in maps.items() if name not in ("logits", "deltas")}
        deltas = maps["deltas"]
        boxes = ours.head.coder.decode(deltas, priors.boxes.expand(len(deltas), -1, -1)) if decode else deltas
        return Predictions(maps["logits"], deltas, boxes, priors, extras)

    def outputs(self, maps: Maps) -> dict[str, Tensor]:
        """The maps as their head's outputs."""
        return {self.maps[name][0]: value for name, value in maps.items()}

    def convolutions(self, model: nn.Module) -> dict[str, nn.Module]:
        """Our names of the maps to the last convolution of either side."""
        if isinstance(model, DenseDetector):
            return {name: model.head.outputs[name] for name in self.maps}
        return {name: model.get_submodule(path) for name, (_, path) in self.maps.items()}

    def their_losses(self, theirs: nn.Module, targets: list[Maps], maps: Maps, priors: Priors) -> list[Tensor]:
        """Their losses of these outputs, in the order of ours."""
        anchors = [priors.boxes[0]] * len(targets)
        levels = [] if self.theirs is RetinaNet else [list(priors.counts)]
        losses = theirs.compute_loss(targets, self.outputs(maps), anchors, *levels)
        return [losses[name] for name in self.terms.values()]


def _trained_anchors(ours: DenseDetector, priors: Priors, targets: list[Maps], per_level: int) -> Maps:
    logits, deltas = trained_outputs(priors, targets, ours.num_classes, threshold=0.05, per_level=per_level)
    return {"logits": logits, "deltas": deltas}


def _trained_points(ours: DenseDetector, priors: Priors, targets: list[Maps], per_level: int) -> Maps:
    match = ours.match(priors, pad_targets(targets))
    logits, deltas, centerness = trained_points(
        priors, match, ours.head.coder, ours.num_classes, threshold=0.2, per_level=per_level
    )
    return {"logits": logits, "deltas": deltas, "centerness": centerness}


_CLASSES, _BOXES = "head.classification_head", "head.regression_head"

CASES = {
    "retinanet": Case(
        title="RetinaNet",
        theirs=RetinaNet,
        convert=retinanet.from_torchvision,
        maps={
            "logits": ("cls_logits", f"{_CLASSES}.cls_logits"),
            "deltas": ("bbox_regression", f"{_BOXES}.bbox_reg"),
        },
        terms={"cls": "classification", "box": "bbox_regression"},
        per_cell=9,
        deltas=functools.partial(torch.mul, 0.2),
        trained=_trained_anchors,
        loss_reads_boxes=False,
        normalised_by_picture=True,
    ),
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
        per_cell=1,
        deltas=torch.exp,  # strides to each side, > 0
        trained=_trained_points,
        loss_reads_boxes=True,
        normalised_by_picture=False,
    ),
}
