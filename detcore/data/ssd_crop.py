"""SSD's augmentation: colours, zoom out and crop, with the pixels touched once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
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
    made.

    A window is the whole canvas, or one whose IoU with an object is at least 0.1, 0.3, 0.5, 0.7
    or 0.9, or a free one: one of the seven ways is drawn, and another if 50 windows fail it, so all
    ways that can be gone are equally likely. Shares of the canvas: side 0.3 to 1, ratio of width and
    height within 1/2 to 2. Objects are kept if their centre lies in the window.

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
    Deviation: windows without any object's centre are refused, as in torchvision and ssd.pytorch; Caffe
    trains on them. The canvas has the colour that all padding has here, one grey level off Caffe's
    (123, 117, 104). Caffe draws one of five ways to interpolate; here it is bilinear.
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
        target, across, down = self._place(target, height, width)
        return tv_tensors.Image(self._render(image.as_subclass(Tensor), across, down)), target

    def move_boxes(self, target: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        """What :meth:`forward` makes of the objects, from the same random numbers, without their picture.

        Args:
            target: as for :meth:`forward`.
            size: (height, width) of the picture in pixels.

        Example:
            >>> target = {"boxes": torch.tensor([[0.0, 0.0, 80.0, 60.0]])}
            >>> moved = SsdCrop(300, zoom=1.0).move_boxes(target, (60, 80))
            >>> tuple(moved["boxes"].shape), moved["boxes"].canvas_size
            ((1, 4), (300, 300))
        """
        return self._place(target, *size)[0]

    def _place(self, target: dict[str, Any], height: int, width: int) -> tuple[dict[str, Any], "_Span", "_Span"]:
        """Draw canvas and window; the objects in it, and where the picture's pixels go along x and y."""
        ratio = _uniform(1.0, 4.0) if _chance(self.zoom) else 1.0
        left, top = round(_uniform(0.0, width * (ratio - 1))), round(_uniform(0.0, height * (ratio - 1)))
        boxes = torch.as_tensor(target["boxes"]).as_subclass(Tensor).float()
        # From here in pixels of the picture: the canvas starts left of it and above.
        canvas = boxes.new_tensor([-left, -top, width * ratio - left, height * ratio - top])
        window = self.window(boxes, canvas)
        keep = _centres_inside(boxes, window[None])[0]
        x1, y1, x2, y2 = window.round().int().tolist()
        across, down = _Span.of(x1, x2, width, self.size), _Span.of(y1, y2, height, self.size)
        boxes = boxes * boxes.new_tensor([across.scale, down.scale] * 2)
        boxes = boxes + boxes.new_tensor([across.shift, down.shift] * 2)
        return keep_rows(target, boxes, keep, (self.size, self.size)), across, down

    def window(self, boxes: Float[Tensor, "n 4"], canvas: Float[Tensor, " 4"]) -> Float[Tensor, " 4"]:
        """Draw a window of a canvas with these objects on it; all are xyxy in the same pixels."""
        for way in torch.randperm(7).tolist():
            if way == 0:
                break
            least = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)[way - 1]
            windows = _draw_windows(50, canvas)
            good = torch.ones(50, dtype=torch.bool)
            if len(boxes):
                reached = pairwise_iou(windows, boxes) >= least
                good = reached.any(1) if self.rule == "some" else reached.all(1)
                good &= _centres_inside(boxes, windows).any(1)
            if good.any():
                return windows[good][0]
        return canvas

    def _render(self, image: Tensor, across: "_Span", down: "_Span") -> Tensor:
        """What the window shows of the picture, on the mean colour."""
        result = torch.tensor(PAD_COLOUR, dtype=torch.uint8)[:, None, None].repeat(1, self.size, self.size)
        if across.scale and down.scale:
            part = image[:, down.first : down.last, across.first : across.last]
            part = F.resize(part, [down.stop - down.start, across.stop - across.start], antialias=True)
            part = part if self.distort is None else self.distort(part)
            result[:, down.start : down.stop, across.start : across.stop] = part
        return result


@dataclass(frozen=True)
class _Span:
    """Along one axis: pixels first..last of the picture become start..stop of the result."""

    first: int
    last: int
    start: int
    stop: int

    @classmethod
    def of(cls, begin: int, end: int, side: int, size: int) -> "_Span":
        """A window begin..end, in pixels of a picture ``side`` long, is shown ``size`` pixels long."""
        first, last = max(begin, 0), min(end, side)
        if last <= first:  # the window shows mean colour only
            return cls(0, 1, 0, 0)
        factor = size / (end - begin)
        start = min(round((first - begin) * factor), size - 1)
        return cls(first, last, start, max(round((last - begin) * factor), start + 1))

    # Boxes follow what the rounding above did to the pixels, not what was asked for.
    @property
    def scale(self) -> float:
        return (self.stop - self.start) / (self.last - self.first)

    @property
    def shift(self) -> float:
        return self.start - self.first * self.scale


def _draw_windows(count: int, canvas: Float[Tensor, " 4"]) -> Float[Tensor, "m 4"]:
    """Windows of a canvas: side s in [0.3, 1] of it, ratio a in [max(1/2, s^2), min(2, 1/s^2)]."""
    side, place, x, y = torch.rand(4, count).unbind()
    side = 0.3 + 0.7 * side
    low, high = (side * side).clamp(min=0.5), (1 / (side * side)).clamp(max=2.0)
    root = (low + (high - low) * place).sqrt()
    wide, tall = (side * root).clamp(max=1), (side / root).clamp(max=1)
    x, y = x * (1 - wide), y * (1 - tall)
    whole = canvas[2:] - canvas[:2]
    return torch.stack([x, y, x + wide, y + tall], 1) * whole.repeat(2) + canvas[:2].repeat(2)


def _centres_inside(boxes: Float[Tensor, "n 4"], windows: Float[Tensor, "m 4"]) -> Bool[Tensor, "m n"]:
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((centres > windows[:, None, :2]) & (centres < windows[:, None, 2:])).all(-1)
