"""Transforms of a picture together with its boxes, on ``torchvision.transforms.v2``.

Pixels stay uint8: a quarter of what floats take to move and keep. Detectors normalise on the device.
Every transform takes and gives ``(image, target)``, draws from torch's generator only, and keeps
the per-object keys of the target in step with its boxes. ``area`` stays in original pixels.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from detcore.data._rows import PER_OBJECT, keep_rows
from detcore.data.colours import PhotometricDistort
from detcore.data.ssd_crop import SsdCrop

__all__ = [
    "PER_OBJECT",
    "PhotometricDistort",
    "ResizeShortSide",
    "SsdCrop",
    "drop_empty",
    "flip_transform",
    "learn_difficult",
    "retinanet_transform",
    "square_transform",
    "ssd_transform",
]


def drop_empty(image: Tensor, target: Mapping[str, Any], *, min_side: float = 1.0) -> tuple[Tensor, dict[str, Any]]:
    """Clip boxes to the picture and drop what is left with a side below ``min_side``.

    Args:
        image: (3, H, W).
        target: with ``boxes``, xyxy in pixels, and any of ``PER_OBJECT``.
        min_side: pixels.

    Returns:
        The same picture, and a new target.

    Example:
        >>> boxes = torch.tensor([[2.0, 2.0, 30.0, 9.0], [7.9, 0.0, 8.0, 5.0]])
        >>> target = {"boxes": boxes, "labels": torch.tensor([4, 5])}
        >>> _, target = drop_empty(torch.zeros(3, 10, 20, dtype=torch.uint8), target)
        >>> target["boxes"].tolist(), target["labels"].tolist()
        ([[2.0, 2.0, 20.0, 9.0]], [4])
    """
    height, width = image.shape[-2:]
    boxes = torch.as_tensor(target["boxes"]).as_subclass(Tensor).numpy()
    boxes = boxes.clip(0, np.array([width, height, width, height], boxes.dtype))
    keep = (boxes[:, 2:] - boxes[:, :2] >= min_side).all(1)
    return image, keep_rows(target, torch.from_numpy(boxes), torch.from_numpy(keep), (height, width))


def learn_difficult(image: Tensor, target: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Make objects marked difficult ones to learn, as SSD does on VOC; crowds stay left out.

    Args:
        image: (3, H, W), given back as it is.
        target: with ``iscrowd``; its ``ignore`` is replaced.

    Returns:
        The same picture, and a new target.

    Example:
        >>> target = {"iscrowd": torch.tensor([0, 1]), "ignore": torch.tensor([True, True])}
        >>> learn_difficult(torch.zeros(3, 10, 20, dtype=torch.uint8), target)[1]["ignore"].tolist()
        [False, True]
    """
    return image, {**target, "ignore": torch.as_tensor(target["iscrowd"]).bool()}


def flip_transform() -> v2.Transform:
    """Mirror left to right with probability 0.5.

    Example:
        >>> flip_transform()
        RandomHorizontalFlip(p=0.5)
    """
    return v2.RandomHorizontalFlip(0.5)


class ResizeShortSide(nn.Module):
    """Resize so that the short side is ``short_side``, unless the long side would pass ``long_side``.

    Args:
        short_side: pixels, >= 1.
        long_side: pixels, >= short_side.

    Raises:
        ValueError: if a side is out of range.

    Example:
        >>> resize = ResizeShortSide(600, 1000)
        >>> resize.size(375, 500), resize.size(200, 800)
        ((600, 800), (250, 1000))

    Reference: Lin et al., Feature Pyramid Networks, CVPR 2017, section 5.1 (800 pixels; 1333 is Detectron's).
    """

    def __init__(self, short_side: int, long_side: int) -> None:
        super().__init__()
        if not 1 <= short_side <= long_side:
            raise ValueError(
                f"ResizeShortSide: short_side must be in [1, long_side]; got {short_side} with {long_side}."
            )
        self.short_side, self.long_side = short_side, long_side

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture of this size gets."""
        scale = min(self.short_side / min(height, width), self.long_side / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Resize picture and boxes."""
        size = list(self.size(*image.shape[-2:]))
        boxes = F.resize(target["boxes"], size)
        return F.resize(image, size, antialias=True), {**target, "boxes": boxes}

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"{self.short_side}, {self.long_side}"


def retinanet_transform(short_side: int = 800, long_side: int = 1333, *, train: bool) -> v2.Transform:
    """RetinaNet's recipe: resize keeping the aspect; in training mirror with probability 0.5.

    Args:
        short_side: pixels; COCO 800, VOC 600.
        long_side: limit in pixels; COCO 1333, VOC 1000.
        train: mirror or not.

    Example:
        >>> from torchvision import tv_tensors
        >>> boxes = tv_tensors.BoundingBoxes(
        ...     torch.tensor([[10.0, 20.0, 50.0, 40.0]]), format="XYXY", canvas_size=(60, 80)
        ... )
        >>> image = tv_tensors.Image(torch.zeros(3, 60, 80, dtype=torch.uint8))
        >>> image, target = retinanet_transform(120, 200, train=False)(image, {"boxes": boxes})
        >>> tuple(image.shape), target["boxes"].tolist()
        ((3, 120, 160), [[20.0, 40.0, 100.0, 80.0]])

    Reference: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, section 4.1. arXiv:1708.02002
    """
    flips = [flip_transform()] if train else []
    return v2.Compose([ResizeShortSide(short_side, long_side), *flips, drop_empty])


def square_transform(size: int, *, train: bool) -> v2.Transform:
    """Warp to ``size`` x ``size``; in training mirror with probability 0.5.

    The cheapest recipe, for small experiments: every picture has one size, so a
    :class:`detcore.data.loader.CachedLoader` can serve it.

    Args:
        size: height and width in pixels.
        train: mirror or not.

    Example:
        >>> from torchvision import tv_tensors
        >>> image = tv_tensors.Image(torch.zeros(3, 60, 80, dtype=torch.uint8))
        >>> boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(60, 80))
        >>> tuple(square_transform(96, train=True)(image, {"boxes": boxes})[0].shape)
        (3, 96, 96)
    """
    flips = [flip_transform()] if train else []
    return v2.Compose([v2.Resize((size, size), antialias=True), *flips, drop_empty])


def ssd_transform(size: int = 300, *, train: bool, rule: str = "some", colours: bool = True) -> v2.Transform:
    """SSD's recipe: zoom out, crop, mirror and warp to a square, and colours; in evaluation warp only.

    Args:
        size: height and width in pixels.
        train: augment or not.
        rule: of the crop, ``"some"``, ``"all"`` or ``"torchvision"``; see :class:`SsdCrop`.
        colours: false leaves them as they are, for :class:`detcore.data.loader.Recoloured` to change on the device.

    Example:
        >>> from torchvision import tv_tensors
        >>> image = tv_tensors.Image(torch.zeros(3, 60, 80, dtype=torch.uint8))
        >>> boxes = tv_tensors.BoundingBoxes(
        ...     torch.tensor([[8.0, 6.0, 40.0, 30.0]]), format="XYXY", canvas_size=(60, 80)
        ... )
        >>> image, target = ssd_transform(300, train=False)(image, {"boxes": boxes})
        >>> tuple(image.shape), target["boxes"].tolist()
        ((3, 300, 300), [[30.0, 30.0, 150.0, 150.0]])

    Reference: Liu et al., SSD, ECCV 2016, sections 2.2 and 3.6. arXiv:1512.02325
    """
    if not train:
        return square_transform(size, train=False)
    distort = PhotometricDistort() if colours else None
    return v2.Compose([SsdCrop(size, rule=rule, distort=distort, flip=0.5), drop_empty])
