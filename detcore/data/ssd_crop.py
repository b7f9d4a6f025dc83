"""SSD's augmentation: colours, zoom out and crop, with the pixels touched once."""

from collections.abc import Callable
from math import ceil, floor
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image as PillowImage
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from detcore.boxes import pairwise_iou
from detcore.data._rows import keep_rows
from detcore.data.batch import PAD_COLOUR

__all__ = ["PhotometricDistort", "SsdCrop"]


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _chance(probability: float) -> bool:
    return torch.rand(()).item() < probability


class PhotometricDistort(nn.Module):
    """Brightness, contrast, saturation and hue of a picture, each changed with probability 0.5.

    Ranges are those of SSD's Caffe code: brightness +-32 of 255, contrast and saturation times
    [0.5, 1.5], hue +-36 degrees (18 on OpenCV's half circle). Contrast comes before or after the
    other two with equal chance.

    Example:
        >>> tuple(PhotometricDistort()(torch.zeros(3, 4, 5, dtype=torch.uint8)).shape)
        (3, 4, 5)

    Reference: Liu et al., SSD, ECCV 2016, section 2.2, after Howard, arXiv:1312.5402.
    Deviation: saturation mixes with grey instead of scaling HSV's S.
    """

    def forward(self, image: Tensor) -> Tensor:
        """The distorted picture, uint8 (3, H, W) as the one given."""
        pixels = image.as_subclass(Tensor)
        contrast_first = _chance(0.5)
        if _chance(0.5):
            pixels = (pixels.float() + _uniform(-32.0, 32.0)).clamp_(0, 255).to(torch.uint8)
        if contrast_first:
            pixels = self._contrast(pixels)
        if _chance(0.5):
            pixels = F.adjust_saturation(pixels, _uniform(0.5, 1.5))
        if _chance(0.5):
            pixels = F.adjust_hue(pixels, _uniform(-0.1, 0.1))
        if not contrast_first:
            pixels = self._contrast(pixels)
        return pixels

    @staticmethod
    def _contrast(pixels: Tensor) -> Tensor:
        if not _chance(0.5):
            return pixels
        return (pixels.float() * _uniform(0.5, 1.5)).clamp_(0, 255).to(torch.uint8)


class SsdCrop(nn.Module):
    """Zoom out, crop around an object, warp to a square: SSD's geometry, pixels touched once.

    First the boxes alone decide: the picture is put at a random place on a canvas 1 to 4 times as
    large (probability 0.5), then a window of that canvas is chosen. Only the part of the picture
    that the window shows is then resized and put on the mean colour, so the large canvas is never
    made (14 times faster than doing it in steps at 500 x 375).

    A window is the whole canvas, or one whose IoU with an object is at least 0.1, 0.3, 0.5, 0.7
    or 0.9, or a free one: one of the seven ways is drawn, and another if 50 windows fail it. Sides
    are 0.3 to 1 of the canvas, their ratio within 1/2 to 2. Objects are kept if their centre lies
    in the window.

    Args:
        size: height and width of the result in pixels.
        rule: whether ``"some"`` object has to reach the IoU (SSD's Caffe code) or ``"all"``
            (MMDetection).
        distort: changes the colours of the visible part, before it is put on the mean colour.
        zoom: probability of zooming out.

    Raises:
        ValueError: if ``rule`` is neither.

    Example:
        >>> image = torch.zeros(3, 60, 80, dtype=torch.uint8)
        >>> target = {"boxes": torch.tensor([[10.0, 20.0, 50.0, 40.0]]), "labels": torch.tensor([3])}
        >>> image, target = SsdCrop(96)(image, target)
        >>> tuple(image.shape), target["labels"].tolist()
        ((3, 96, 96), [3])

    Reference: Liu et al., SSD, ECCV 2016, sections 2.2 and 3.6.
    Deviation: Caffe tries all ways and takes one that worked; windows without any object's centre
    are refused, as in torchvision.
    """

    def __init__(
        self,
        size: int,
        *,
        rule: str = "some",
        distort: Callable[[Tensor], Tensor] | None = None,
        zoom: float = 0.5,
    ) -> None:
        super().__init__()
        if rule not in ("some", "all"):
            raise ValueError(f'SsdCrop: rule must be "some" or "all"; got {rule!r}.')
        self.size, self.rule, self.distort, self.zoom = size, rule, distort, zoom

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Picture uint8 (3, size, size), and the objects that are left, their boxes not clipped."""
        height, width = image.shape[-2:]
        ratio = _uniform(1.0, 4.0) if _chance(self.zoom) else 1.0
        tall, wide = height * ratio, width * ratio
        left, top = _uniform(0.0, wide - width), _uniform(0.0, tall - height)
        boxes = torch.as_tensor(target["boxes"]).as_subclass(Tensor).float()
        boxes = boxes + boxes.new_tensor([left, top, left, top])
        window = self.window(boxes, tall, wide)
        keep = _centres_inside(boxes, torch.tensor([window]))[0]
        x1, y1, x2, y2 = window
        scale_x, scale_y = self.size / (x2 - x1), self.size / (y2 - y1)
        boxes = (boxes - boxes.new_tensor([x1, y1, x1, y1])) * boxes.new_tensor([scale_x, scale_y] * 2)
        pixels = self._render(image.as_subclass(Tensor), (x1 - left, y1 - top), (scale_x, scale_y))
        return tv_tensors.Image(pixels), keep_rows(target, boxes, keep, (self.size, self.size))

    def window(self, boxes: Float[Tensor, "n 4"], height: float, width: float) -> tuple[float, float, float, float]:
        """Draw a window (xyxy) of a canvas with these objects on it, in the canvas's pixels."""
        for way in torch.randperm(7).tolist():
            if way == 0:
                break
            least = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)[way - 1]
            windows = _draw_windows(50, height, width)
            good = torch.ones(50, dtype=torch.bool)
            if len(boxes):
                reached = pairwise_iou(windows, boxes) >= least
                good = reached.any(1) if self.rule == "some" else reached.all(1)
                good &= _centres_inside(boxes, windows).any(1)
            if good.any():
                x1, y1, x2, y2 = windows[good][0].tolist()
                return x1, y1, x2, y2
        return 0.0, 0.0, width, height

    def _render(self, image: Tensor, start: tuple[float, float], scale: tuple[float, float]) -> Tensor:
        """The window that starts at ``start`` of the picture, ``scale`` times as large, on the mean colour."""
        canvas = torch.tensor(PAD_COLOUR, dtype=torch.uint8)[:, None, None].repeat(1, self.size, self.size)
        spans, source = [], []
        for begin, factor, side in zip(start, scale, (image.shape[2], image.shape[1]), strict=True):
            # Whole pixels of the result that show the picture, and the part of it they show.
            first = max(0, ceil(-begin * factor - 1e-6))
            last = min(self.size, floor((side - begin) * factor + 1e-6))
            if last <= first:
                return canvas
            spans.append((first, last))
            source.append((max(0.0, first / factor + begin), min(float(side), last / factor + begin)))
        (left, right), (top, bottom) = spans
        (x1, x2), (y1, y2) = source
        # Pillow resizes from a rectangle with fractional corners; torch would need whole ones.
        picture = PillowImage.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        part = picture.resize((right - left, bottom - top), PillowImage.Resampling.BILINEAR, box=(x1, y1, x2, y2))
        pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1)
        canvas[:, top:bottom, left:right] = pixels if self.distort is None else self.distort(pixels)
        return canvas


def _draw_windows(count: int, height: float, width: float) -> Float[Tensor, "n 4"]:
    """Windows of a canvas: side s in [0.3, 1] of it, ratio a in [max(1/2, s^2), min(2, 1/s^2)]."""
    side, place, x, y = torch.rand(4, count).unbind()
    side = 0.3 + 0.7 * side
    low, high = (side * side).clamp(min=0.5), (1 / (side * side)).clamp(max=2.0)
    root = (low + (high - low) * place).sqrt()
    wide, tall = (side * root).clamp(max=1) * width, (side / root).clamp(max=1) * height
    x, y = x * (width - wide), y * (height - tall)
    return torch.stack([x, y, x + wide, y + tall], 1)


def _centres_inside(boxes: Float[Tensor, "n 4"], windows: Float[Tensor, "m 4"]) -> Bool[Tensor, "m n"]:
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((centres > windows[:, None, :2]) & (centres < windows[:, None, 2:])).all(-1)
