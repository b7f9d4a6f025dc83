"""Priors on a pyramid of feature maps. Order: level, then y, then x, then prior of the cell.

The cells' own boxes are worked out once; a forward pass only shifts them, on the device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detcore.structures import Priors

__all__ = ["AnchorGenerator", "CachedPriors", "PointGenerator", "PriorGenerator"]

AnchorStyle = Literal["exact", "mmdet0", "torchvision"]
PointStyle = Literal["half", "torchvision"]

_KEPT = 16  # shapes of a batch whose priors are remembered


@runtime_checkable
class PriorGenerator(Protocol):
    """What a detector asks of its priors."""

    @property
    def num_priors(self) -> int | tuple[int, ...]:
        """Priors a cell, one number for all levels or one a level."""
        ...

    def __call__(self, features: Sequence[Tensor], image_size: tuple[int, int]) -> Priors:
        """Priors of the maps ``features`` of a batch of images of ``image_size`` (height, width)."""
        ...


class AnchorGenerator(nn.Module):
    r"""RetinaNet's anchors: every scale with every aspect ratio at every cell.

    With side :math:`s = \text{base} \cdot \text{stride} \cdot \text{scale}` and ratio
    :math:`r = h / w`, an anchor is :math:`s/\sqrt r` wide and :math:`s\sqrt r` high. Anchors are
    neither clipped nor dropped at the border. Prior index in a cell = ratio * len(scales) + scale.

    Three published conventions differ by up to half a stride and a pixel:

    ============= =================================== ==========================================
    style         centre of cell (x, y)               sizes
    ============= =================================== ==========================================
    exact         (x stride, y stride)                exact (MMDetection 2); cell i of a strided
                                                      network is centred on pixel i * stride
    mmdet0        x stride + stride / 2               whole pixels (MMDetection 0.6's inclusive
                                                      corners, its x2 + 1 here)
    torchvision   (x, y) * (image size // map size)   sides cut to integers, corners rounded
    ============= =================================== ==========================================

    Args:
        strides: pixels between cells, one a level.
        scales: side multipliers within an octave, > 0.
        ratios: height over width, > 0.
        base: side of scale 1 in strides, > 0. Four in RetinaNet; smaller for small pictures.
        style: one of the conventions above.

    Attributes:
        sides: least and largest side of each level's squares in pixels, before any rounding.

    Raises:
        ValueError: if a sequence is empty, a value is not positive, or ``style`` is unknown.

    Example:
        >>> anchors = AnchorGenerator([8, 16], scales=[1.0], ratios=[1.0])
        >>> priors = anchors([torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 1, 1)], (16, 16))
        >>> priors.boxes[0, 1].tolist(), priors.counts
        ([-8.0, -16.0, 24.0, 16.0], (4, 1))

    Reference: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, section 4. arXiv:1708.02002
    """

    def __init__(
        self,
        strides: Sequence[int] = (8, 16, 32, 64, 128),
        scales: Sequence[float] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        *,
        base: float = 4.0,
        style: AnchorStyle = "exact",
    ) -> None:
        super().__init__()
        for name, values in {"strides": strides, "scales": scales, "ratios": ratios, "base": [base]}.items():
            if not len(values) or min(values) <= 0:
                raise ValueError(f"AnchorGenerator: {name} must be positive numbers; got {values}.")
        if style not in _CELLS:
            raise ValueError(f"AnchorGenerator: style must be one of {sorted(_CELLS)}; got {style!r}.")
        self.strides, self.style = tuple(strides), style
        self.num_priors = len(scales) * len(ratios)
        self.sides = tuple((base * stride * min(scales), base * stride * max(scales)) for stride in strides)
        for level, stride in enumerate(strides):
            cell = _CELLS[style](stride, base, scales, ratios)
            self.register_buffer(f"cell{level}", cell, persistent=False)

    def _apply(self, fn, recurse: bool = True) -> "AnchorGenerator":
        # follow the model to its device but stay float32: bfloat16 has no pixel 257
        device = fn(torch.empty(0, device=self.get_buffer("cell0").device)).device
        return super()._apply(lambda cell: cell.to(device), recurse)

    def forward(self, features: Sequence[Tensor], image_size: tuple[int, int]) -> Priors:
        """Anchors of every map, (1, N, 4) in pixels.

        Raises:
            ValueError: if there are not as many maps as strides.
        """
        if len(features) != len(self.strides):
            raise ValueError(
                f"AnchorGenerator: features must be {len(self.strides)} maps, one a stride; got {len(features)}."
            )
        boxes, cells = [], []
        for level, (feature, stride) in enumerate(zip(features, self.strides, strict=True)):
            cell = self.get_buffer(f"cell{level}")
            begin = _cells_of(feature, stride, image_size if self.style == "torchvision" else None)[:, None]
            boxes.append((begin.repeat(1, 1, 2) + cell).view(-1, 4))  # y x prior, 4
            cells.append(begin.expand(-1, self.num_priors, -1).reshape(-1, 2))
        return Priors(torch.cat(boxes)[None], tuple(len(b) for b in boxes), torch.cat(cells), maps_of(features))


class PointGenerator(nn.Module):
    """FCOS's points: one a cell, as a square of side = stride around it.

    ============= ============================== =================================================
    style         point of cell (x, y)           remark
    ============= ============================== =================================================
    half          x stride + floor(stride / 2)   FCOS's released code
    torchvision   x (image size // map size)     half a stride further up and to the left
    ============= ============================== =================================================

    Args:
        strides: pixels between cells, one a level.
        style: one of the conventions above.

    Raises:
        ValueError: if there is no stride, one is not positive, or ``style`` is unknown.

    Example:
        >>> points = PointGenerator([8, 16])([torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 1)], (8, 16))
        >>> points.boxes[0].tolist()  # around (4, 4), (12, 4) and (8, 8)
        [[0.0, 0.0, 8.0, 8.0], [8.0, 0.0, 16.0, 8.0], [0.0, 0.0, 16.0, 16.0]]

    Reference: Tian et al., FCOS, ICCV 2019, section 3.1. arXiv:1904.01355
    """

    num_priors = 1

    def __init__(self, strides: Sequence[int] = (8, 16, 32, 64, 128), *, style: PointStyle = "half") -> None:
        super().__init__()
        if not len(strides) or min(strides) <= 0:
            raise ValueError(f"PointGenerator: strides must be positive numbers; got {strides}.")
        if style not in ("half", "torchvision"):
            raise ValueError(f'PointGenerator: style must be "half" or "torchvision"; got {style!r}.')
        self.strides, self.style = tuple(strides), style

    def forward(self, features: Sequence[Tensor], image_size: tuple[int, int]) -> Priors:
        """Points of every map as squares, (1, N, 4) in pixels.

        Raises:
            ValueError: if there are not as many maps as strides.
        """
        if len(features) != len(self.strides):
            raise ValueError(
                f"PointGenerator: features must be {len(self.strides)} maps, one a stride; got {len(features)}."
            )
        boxes, cells = [], []
        for feature, stride in zip(features, self.strides, strict=True):
            begin = _cells_of(feature, stride, image_size if self.style == "torchvision" else None)
            point = begin + (stride // 2 if self.style == "half" else 0)
            boxes.append(torch.cat([point - stride / 2, point + stride / 2], dim=-1))
            cells.append(begin)
        return Priors(torch.cat(boxes)[None], tuple(len(b) for b in boxes), torch.cat(cells), maps_of(features))


class CachedPriors(nn.Module):
    """A generator that remembers the priors of the last few shapes; in a compiled graph they are constants anyway.

    Args:
        generator: what makes them. Its other attributes are this one's too.

    Example:
        >>> priors, maps = CachedPriors(PointGenerator([8])), [torch.zeros(1, 4, 2, 2)]
        >>> priors(maps, (16, 16)) is priors(maps, (16, 16)), priors.strides
        (True, (8,))
    """

    def __init__(self, generator: PriorGenerator) -> None:
        super().__init__()
        self.generator = generator
        self.known: dict[tuple, Priors] = {}

    def __getattr__(self, name: str) -> Any:
        """Of the generator, where this module has none of that name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("generator"), name)

    def forward(self, features: Sequence[Tensor], image_size: tuple[int, int]) -> Priors:
        """Priors of the maps ``features`` of a batch of images of ``image_size`` (height, width)."""
        if torch.compiler.is_compiling():
            return self.generator(features, image_size)
        key = (*((feature.shape[-2:], feature.device) for feature in features), tuple(image_size))
        if key not in self.known:
            while len(self.known) >= _KEPT:
                self.known.pop(next(iter(self.known)))
            with torch.inference_mode(False):  # they may be used again where gradients are wanted
                self.known[key] = self.generator(features, image_size)
        return self.known[key]

    def __getstate__(self) -> dict:
        """Without what is remembered, which copies and files need not carry."""
        return {**vars(self), "known": {}}


def maps_of(features: Sequence[Tensor]) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of every map."""
    return tuple((feature.shape[-2], feature.shape[-1]) for feature in features)


def _cells_of(feature: Tensor, stride: int, image_size: tuple[int, int] | None) -> Float[Tensor, "cells 2"]:
    """(x, y) in pixels where each cell of a map begins; torchvision works its step out from the sizes."""
    height, width = feature.shape[-2:]
    step_y, step_x = (stride, stride) if image_size is None else (image_size[0] // height, image_size[1] // width)
    y, x = torch.meshgrid(
        torch.arange(height, device=feature.device, dtype=torch.float32) * step_y,
        torch.arange(width, device=feature.device, dtype=torch.float32) * step_x,
        indexing="ij",
    )
    return torch.stack([x, y], dim=-1).view(-1, 2)


def _around_zero(sides: Sequence[float], ratios: Sequence[float]) -> Float[Tensor, "n 4"]:
    half = [(s / math.sqrt(r) / 2, s * math.sqrt(r) / 2) for r in ratios for s in sides]
    return torch.tensor([(-w, -h, w, h) for w, h in half])


def _exact_cell(stride: int, base: float, scales: Sequence[float], ratios: Sequence[float]) -> Tensor:
    return _around_zero([base * stride * s for s in scales], ratios)


def _mmdet0_cell(stride: int, base: float, scales: Sequence[float], ratios: Sequence[float]) -> Tensor:
    # inclusive corners c -+ (side - 1) / 2 about c = (stride - 1) / 2, rounded; then x2 + 1 makes them ours
    centre = (stride - 1) / 2
    grow = torch.tensor([0.5, 0.5, -0.5, -0.5])
    inclusive = (_exact_cell(stride, base, scales, ratios) + centre + grow).round()
    return inclusive + torch.tensor([0.0, 0.0, 1.0, 1.0])


def _torchvision_cell(stride: int, base: float, scales: Sequence[float], ratios: Sequence[float]) -> Tensor:
    return _around_zero([float(int(base * stride * s)) for s in scales], ratios).round()


_CELLS: dict[str, Callable[[int, float, Sequence[float], Sequence[float]], Tensor]] = {
    "exact": _exact_cell,
    "mmdet0": _mmdet0_cell,
    "torchvision": _torchvision_cell,
}
