"""A torchvision detector's trunk, pyramid and door as ours; the models add their heads."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn
from torchvision.models.detection import FCOS, RetinaNet

from detcore.detector import DenseDetector
from detcore.nn import ImageInput

_TO_OURS = {
    "backbone.body.conv1.": "body.0.stem.0.",
    "backbone.body.bn1.": "body.0.stem.1.",
    "backbone.body.": "body.0.",
    "backbone.fpn.inner_blocks.": "body.1.laterals.",
    "backbone.fpn.layer_blocks.": "body.1.outputs.",
    "backbone.fpn.extra_blocks.": "body.1.",
}


def trunk_name(model: FCOS | RetinaNet) -> str:
    """The ResNet that ``model`` stands on."""
    stages = dict(model.get_submodule("backbone.body").named_children())
    names: dict[tuple[int, ...], str] = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34", (3, 4, 23, 3): "resnet101"}
    blocks = tuple(len([*stages[f"layer{i}"].children()]) if f"layer{i}" in stages else 0 for i in (1, 2, 3, 4))
    if blocks not in names:
        raise ValueError(f"from_torchvision: model must have a ResNet 18, 34, 50 or 101; got blocks {blocks}.")
    first = stages["layer1"].get_submodule("0")
    return "resnet50" if blocks == (3, 4, 6, 3) and hasattr(first, "conv3") else names[blocks]


def trunk_norm(model: FCOS | RetinaNet) -> Literal["batch", "fixed"]:
    """Whether its batch norm uses the statistics of the batch."""
    return "batch" if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) else "fixed"


def take_over(ours: DenseDetector, model: FCOS | RetinaNet, head: Mapping[str, str], refusal: str) -> DenseDetector:
    """Give ``ours`` the door, weights, device and mode of ``model``.

    Args:
        ours: built with the model's options.
        model: torchvision's.
        head: its names in the head to ours.
        refusal: how an error about other weights begins.
    """
    door = model.transform
    ours.inputs = ImageInput(
        door.image_mean,
        door.image_std,
        divisor=door.size_divisible,
        short_side=door.min_size[-1],  # pyright: ignore[reportIndexIssue]  # declared an int, but kept as a tuple
        long_side=door.max_size,
    )
    wanted = ours.state_dict()
    weights = _renamed(model.state_dict(), {**_TO_OURS, **head})
    counters = {name: torch.tensor(0) for name in wanted if name.endswith("num_batches_tracked")}
    weights = {**counters, **weights}
    if {name: value.shape for name, value in weights.items()} != {name: value.shape for name, value in wanted.items()}:
        raise ValueError(f"{refusal} this one has another trunk or pyramid.")
    ours.load_state_dict(weights)
    for mine, theirs in zip(_norms(ours), _norms(model), strict=True):
        mine.eps = theirs.eps  # torchvision's COCO weights were trained with eps 0
    return ours.to(next(model.parameters()).device).train(model.training)


def _norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "running_mean")]


def _renamed(state: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Their names to ours; torchvision has blocks around some convolutions, ours are all in a row."""
    renamed = {}
    for name, value in state.items():
        theirs = next(prefix for prefix in names if name.startswith(prefix))
        rest = name.removeprefix(theirs).split(".")
        if theirs.startswith("backbone.fpn.") and rest[0].isdigit():
            rest = [rest[0], *rest[2:]]  # blocks.0.0.weight: convolution inside a block
        if theirs.endswith("_head.conv.") and len(rest) == 3:  # blocks of (convolution, ReLU)
            rest = [str(2 * int(rest[0])), *rest[2:]]
        renamed[names[theirs] + ".".join(rest)] = value
    return renamed
