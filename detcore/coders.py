"""How a head writes a box down relative to its prior, and how it is read back.

A coder holds no weights and is hashable, so heads and loss terms can share one.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["BoxCoder", "DeltaCoder", "DistanceCoder"]


@runtime_checkable
class BoxCoder(Protocol):
    """What heads and box terms ask of a coder."""

    def encode(self, boxes: Float[Tensor, "*#n 4"], priors: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*#n 4"]:
        """Corners to what the head has to output at ``priors``."""
        ...

    def decode(self, deltas: Float[Tensor, "*#n 4"], priors: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*#n 4"]:
        """Head output at ``priors`` to corners, in float32 or wider."""
        ...


@dataclass(frozen=True)
class DeltaCoder:
    r"""Centre shift in prior sizes, size as a log ratio.

    .. math:: d = \left(\omega_x\frac{g_x - a_x}{a_w},\ \omega_y\frac{g_y - a_y}{a_h},\
        \omega_w\ln\frac{g_w}{a_w},\ \omega_h\ln\frac{g_h}{a_h}\right)

    Args:
        weights: the four :math:`\omega`; 1 for RetinaNet, (10, 10, 5, 5) for SSD (variances 0.1, 0.2).
        limit: log ratios are clamped to this when decoding, so that exp cannot overflow.
        clamp: ``"both"`` sides (MMDetection) or only the ``"upper"`` one (torchvision).

    Raises:
        ValueError: if a weight or the limit is not positive, or ``clamp`` is unknown.

    Example:
        >>> prior, box = torch.tensor([0.0, 0.0, 10.0, 10.0]), torch.tensor([5.0, 0.0, 15.0, 20.0])
        >>> DeltaCoder().encode(box, prior)
        tensor([0.5000, 0.5000, 0.0000, 0.6931])

    Reference: Girshick et al., R-CNN, CVPR 2014, Appendix C. arXiv:1311.2524
    """

    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    limit: float = math.log(1000 / 16)
    clamp: Literal["both", "upper"] = "both"

    def __post_init__(self) -> None:
        if len(self.weights) != 4 or min(self.weights) <= 0 or self.limit <= 0:
            raise ValueError(f"DeltaCoder: weights (four) and limit must be > 0; got {self.weights}, {self.limit}.")
        if self.clamp not in ("both", "upper"):
            raise ValueError(f'DeltaCoder: clamp must be "both" or "upper"; got {self.clamp!r}.')

    def encode(self, boxes: Float[Tensor, "*#n 4"], priors: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*#n 4"]:
        """Corners in pixels to deltas; boxes and priors need positive sides."""
        bx, by, bw, bh = _centre_size(boxes)
        px, py, pw, ph = _centre_size(priors)
        wx, wy, ww, wh = self.weights
        return torch.stack(
            [wx * (bx - px) / pw, wy * (by - py) / ph, ww * (bw / pw).log(), wh * (bh / ph).log()], dim=-1
        )

    def decode(self, deltas: Float[Tensor, "*#n 4"], priors: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*#n 4"]:
        """Deltas to corners in pixels, float32 or wider, not clipped to the image."""
        dtype = torch.promote_types(deltas.dtype, torch.float32)
        dx, dy, dw, dh = (d / w for d, w in zip(deltas.to(dtype).unbind(-1), self.weights, strict=True))
        px, py, pw, ph = _centre_size(priors.to(dtype))
        low = -self.limit if self.clamp == "both" else None
        cx, cy = px + dx * pw, py + dy * ph
        half_w = pw * dw.clamp(low, self.limit).exp() / 2
        half_h = ph * dh.clamp(low, self.limit).exp() / 2
        return torch.stack([cx - half_w, cy - half_h, cx + half_w, cy + half_h], dim=-1)


@dataclass(frozen=True)
class DistanceCoder:
    """Distances from the prior's centre to the four sides: (left, top, right, bottom).

    Args:
        normalise: distances in prior sides (a point's side is its stride) instead of pixels.

    Example:
        >>> point = torch.tensor([12.0, 12.0, 20.0, 20.0])  # stride 8 around (16, 16)
        >>> DistanceCoder().encode(torch.tensor([10.0, 11.0, 30.0, 21.0]), point)
        tensor([ 6.,  5., 14.,  5.])

    Reference: Tian et al., FCOS, ICCV 2019, Eq. (1). arXiv:1904.01355
    """

    normalise: bool = False

    def encode(self, boxes: Float[Tensor, "*#n 4"], priors: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*#n 4"]:
        """Corners in pixels to distances; negative where the centre lies outside the box."""
        x, y, w, h = _centre_size(priors)
        sx, sy = (w, h) if self.normalise else (torch.ones_like(w), torch.ones_like(h))
        x1, y1, x2, y2 = boxes.unbind(-1)
        return torch.stack([(x - x1) / sx, (y - y1) / sy, (x2 - x) / sx, (y2 - y) / sy], dim=-1)

    def decode(self, deltas: Float[Tensor, "*#n 4"], priors: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*#n 4"]:
        """Distances to corners in pixels, float32 or wider, not clipped to the image."""
        dtype = torch.promote_types(deltas.dtype, torch.float32)
        x, y, w, h = _centre_size(priors.to(dtype))
        sx, sy = (w, h) if self.normalise else (torch.ones_like(w), torch.ones_like(h))
        left, top, right, bottom = deltas.to(dtype).unbind(-1)
        return torch.stack([x - left * sx, y - top * sy, x + right * sx, y + bottom * sy], dim=-1)


def _centre_size(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
