"""SSD's geometry: zoom out, crop and mirror, decided on the boxes alone, with the pixels touched once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from detcore.data._rows import keep_rows
from detcore.data.batch import PAD_COLOUR

__all__ = ["SsdCrop"]

LEAST_OVERLAPS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
"""What a window's IoU has to reach, one way of choosing it each; the seventh way is the whole canvas."""


def _random(count: int) -> np.ndarray:
    """Uniform in [0, 1), from torch's generator."""
    return torch.rand(count, dtype=torch.float64).numpy()


class SsdCrop(nn.Module):
    """Zoom out, crop around an object, mirror, warp to a square: SSD's geometry, pixels touched once.

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
            (MMDetection). ``"torchvision"`` draws as ``transforms.v2`` does with ``RandomZoomOut`` and
            ``RandomIoUCrop``, so that boxes are distributed as theirs: each side 0.3 to 1, ratio in pixels
            1/2 to 2, 40 windows, ways drawn again and again, and only objects that are kept can reach the IoU.
        distort: changes the colours of the visible part, before it is put on the mean colour.
        zoom: probability of zooming out.
        flip: probability of mirroring left to right.

    Raises:
        ValueError: if ``rule`` is none of these.

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
        flip: float = 0.0,
    ) -> None:
        super().__init__()
        if rule not in ("some", "all", "torchvision"):
            raise ValueError(f'SsdCrop: rule must be "some", "all" or "torchvision"; got {rule!r}.')
        self.size, self.rule, self.distort, self.zoom, self.flip = size, rule, distort, zoom, flip
        self._blank = torch.tensor(PAD_COLOUR, dtype=torch.uint8)[:, None, None].repeat(1, size, size)

    def forward(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Picture uint8 (3, size, size), and the objects that are left, their boxes not clipped."""
        target, across, down, mirrored = self._place(target, *image.shape[-2:])
        return tv_tensors.Image(self._render(image.as_subclass(Tensor), across, down, mirrored)), target

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

    def _place(self, target: dict[str, Any], height: int, width: int) -> tuple[dict[str, Any], "_Span", "_Span", bool]:
        """Draw canvas and window; the objects in it, where its pixels go along x and y, and whether mirrored."""
        zoom, ratio, right, below, flip = _random(5).tolist()
        ratio = 1 + 3 * ratio if zoom < self.zoom else 1.0
        canvas_width, canvas_height = int(width * ratio), int(height * ratio)
        left, top = int((canvas_width - width) * right), int((canvas_height - height) * below)
        boxes = torch.as_tensor(target["boxes"]).as_subclass(Tensor).float()
        # From here in pixels of the picture: the canvas starts left of it and above.
        canvas = boxes.new_tensor([-left, -top, canvas_width - left, canvas_height - top])
        window = self.window(boxes, canvas).numpy()
        corners = boxes.numpy()
        keep = _centres_inside(corners, window[None])[0]
        x1, y1, x2, y2 = window.round().astype(int).tolist()
        across, down = _Span.of(x1, x2, width, self.size), _Span.of(y1, y2, height, self.size)
        factor, shift = [across.scale, down.scale] * 2, [across.shift, down.shift] * 2
        corners = corners * np.array(factor, np.float32) + np.array(shift, np.float32)
        if flip < self.flip:
            corners[:, [0, 2]] = self.size - corners[:, [2, 0]]
        target = keep_rows(target, torch.from_numpy(corners), torch.from_numpy(keep), (self.size, self.size))
        return target, across, down, flip < self.flip

    def window(self, boxes: Float[Tensor, "n 4"], canvas: Float[Tensor, " 4"]) -> Float[Tensor, " 4"]:
        """Draw a window of a canvas with these objects on it; all are xyxy in the same pixels."""
        corners, whole = boxes.numpy(), canvas.numpy()
        for way in self._ways():
            if way == 0:
                break
            windows = (_torchvision_windows if self.rule == "torchvision" else _caffe_windows)(whole)
            good = self._good(windows, corners, LEAST_OVERLAPS[way - 1])
            first = good.argmax() if len(good) else 0
            if len(good) and good[first]:
                return torch.from_numpy(windows[first].astype(np.float32))
        return canvas

    def _ways(self) -> Iterator[int]:
        """Numbers of the ways to try, until one can be gone; 0 is the whole canvas."""
        if self.rule == "torchvision":
            return (int(torch.randint(7, ())) for _ in repeat(None))
        return iter(torch.randperm(7).tolist())

    def _good(self, windows: np.ndarray, boxes: np.ndarray, least: float) -> np.ndarray:
        """Which windows obey the rule."""
        inside = _centres_inside(boxes, windows)
        if not len(boxes):
            return np.full(len(windows), self.rule != "torchvision")
        if least == 0:
            return np.any(inside, 1)
        reached = _overlaps(windows, boxes) >= least
        if self.rule == "torchvision":
            return np.any(reached & inside, 1)
        return (np.any if self.rule == "some" else np.all)(reached, 1) & np.any(inside, 1)

    def _render(self, image: Tensor, across: "_Span", down: "_Span", mirrored: bool) -> Tensor:
        """What the window shows of the picture, on the mean colour."""
        if not (across.scale and down.scale):
            return self._blank.clone()
        part = image[:, down.first : down.last, across.first : across.last]
        part = F.resize_image(part, [down.stop - down.start, across.stop - across.start], antialias=True)
        part = part if self.distort is None else self.distort(part)
        part = part.flip(-1) if mirrored else part
        if part.shape[-2:] == (self.size, self.size):
            return part.clone() if part.data_ptr() == image.data_ptr() else part
        result, start = self._blank.clone(), self.size - across.stop if mirrored else across.start
        result[:, down.start : down.stop, start : start + part.shape[-1]] = part
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


def _caffe_windows(canvas: Float[np.ndarray, " 4"], count: int = 50) -> Float[np.ndarray, "m 4"]:
    """Windows of a canvas: side s in [0.3, 1] of it, ratio a in [max(1/2, s^2), min(2, 1/s^2)]."""
    side, place, x, y = _random(4 * count).reshape(4, count)
    side = 0.3 + 0.7 * side
    square = side * side
    low, high = np.maximum(square, 0.5), np.minimum(1 / square, 2.0)
    root = np.sqrt(low + (high - low) * place)
    wide, tall = np.minimum(side * root, 1), np.minimum(side / root, 1)
    x, y = x * (1 - wide), y * (1 - tall)
    left, top, right, bottom = canvas.tolist()
    shares = np.stack([x, y, x + wide, y + tall], 1)
    return shares * ([right - left, bottom - top] * 2) + [left, top, left, top]


def _torchvision_windows(canvas: Float[np.ndarray, " 4"], count: int = 40) -> Float[np.ndarray, "m 4"]:
    """Windows of whole pixels, either side 0.3 to 1 of the canvas; of ``count`` those of ratio 1/2 to 2."""
    wide, tall, x, y = _random(4 * count).reshape(4, count)
    left, top, right, bottom = canvas.tolist()
    width, height = np.floor((0.3 + 0.7 * np.stack([wide, tall])) * [[right - left], [bottom - top]])
    x, y = np.floor((right - left - width) * x) + left, np.floor((bottom - top - height) * y) + top
    shaped = (width >= 0.5 * height) & (width <= 2 * height) & (np.minimum(width, height) > 0)
    return np.stack([x, y, x + width, y + height], 1)[shaped]


def _overlaps(windows: Float[np.ndarray, "m 4"], boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "m n"]:
    """IoU of every window with every box, both with sides > 0."""
    x1, y1, x2, y2 = windows.T[..., None]
    left, top, right, bottom = boxes.T
    wide = np.minimum(x2, right) - np.maximum(x1, left)
    tall = np.minimum(y2, bottom) - np.maximum(y1, top)
    shared = np.maximum(wide, 0) * np.maximum(tall, 0)
    return shared / ((x2 - x1) * (y2 - y1) + (right - left) * (bottom - top) - shared)


def _centres_inside(boxes: Float[np.ndarray, "n 4"], windows: Float[np.ndarray, "m 4"]) -> Bool[np.ndarray, "m n"]:
    left, top, right, bottom = boxes.T
    x, y = (left + right) / 2, (top + bottom) / 2
    x1, y1, x2, y2 = windows.T[..., None]
    return (x > x1) & (x < x2) & (y > y1) & (y < y2)
