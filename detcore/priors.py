"""Priors on a pyramid of feature maps. Order: level, then y, then x, then prior of the cell.

The cells' own boxes are worked out once; a forward pass only shifts them, on the device.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detcore.structures import Priors

__all__ = ["AnchorGenerator", "PriorGenerator"]

AnchorStyle = Literal["exact", "mmdet0", "torchvision"]


@runtime_checkable
class PriorGenerator(Protocol):
    """What a detector asks of its priors."""

    num_priors: int

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
            height, width = feature.shape[-2:]
            step_y, step_x = stride, stride
            if self.style == "torchvision":
                step_y, step_x = image_size[0] // height, image_size[1] // width
            y, x = torch.meshgrid(
                torch.arange(height, device=cell.device, dtype=cell.dtype) * step_y,
                torch.arange(width, device=cell.device, dtype=cell.dtype) * step_x,
                indexing="ij",
            )
            begin = torch.stack([x, y], dim=-1).view(-1, 1, 2)  # cells, 1, 2
            boxes.append((begin.repeat(1, 1, 2) + cell).view(-1, 4))  # y x prior, 4
            cells.append(begin.expand(-1, self.num_priors, -1).reshape(-1, 2))
        return Priors(torch.cat(boxes)[None], tuple(len(b) for b in boxes), torch.cat(cells))


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
