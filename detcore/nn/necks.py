"""Necks: the trunk's maps to a pyramid of equally wide ones."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from detcore.nn.layers import _xavier

__all__ = ["FPN"]


class FPN(nn.Module):
    """Feature pyramid P3 to P7 from C3, C4, C5.

    A 1x1 convolution brings each map to ``out_channels``; from the top down, the map above is
    enlarged to the lateral's size and added; a 3x3 convolution makes P3, P4, P5. P6 and P7 are
    strided 3x3 convolutions. Biases yes, no normalisation, no activation but the one below.

    Args:
        in_channels: widths of C3, C4, C5.
        out_channels: width of every level.
        p6: made from ``"c5"`` (RetinaNet's paper, MMDetection's RetinaNet) or ``"p5"`` (FCOS,
            torchvision's first RetinaNet).
        relu_before_p7: as in the paper, FCOS and torchvision; MMDetection's RetinaNet has none.

    Raises:
        ValueError: if there are not three widths or ``p6`` is neither.

    Example:
        >>> import torch
        >>> maps = [torch.zeros(1, c, s, s) for c, s in [(8, 40), (16, 20), (32, 10)]]
        >>> [tuple(p.shape[1:]) for p in FPN([8, 16, 32], 24)(maps)]
        [(24, 40, 40), (24, 20, 20), (24, 10, 10), (24, 5, 5), (24, 3, 3)]

    Reference: Lin et al., Feature Pyramid Networks, CVPR 2017. arXiv:1612.03144
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        *,
        p6: Literal["c5", "p5"] = "c5",
        relu_before_p7: bool = False,
    ) -> None:
        super().__init__()
        if len(in_channels) != 3:
            raise ValueError(f"FPN: in_channels must be the widths of C3, C4, C5; got {tuple(in_channels)}.")
        if p6 not in ("c5", "p5"):
            raise ValueError(f'FPN: p6 must be "c5" or "p5"; got {p6!r}.')
        self.out_channels, self.p6_from, self.relu_before_p7 = out_channels, p6, relu_before_p7
        self.laterals = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in in_channels)
        self.outputs = nn.ModuleList(nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in in_channels)
        source = in_channels[-1] if p6 == "c5" else out_channels
        self.p6 = nn.Conv2d(source, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            _xavier(conv)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """P3, P4, P5, P6, P7."""
        merged = [lateral(f) for lateral, f in zip(self.laterals, features, strict=True)]
        for i in (1, 0):  # to the lateral's own size: strides leave odd sizes
            merged[i] = merged[i] + F.interpolate(merged[i + 1], size=merged[i].shape[-2:], mode="nearest")
        levels = [conv(m) for conv, m in zip(self.outputs, merged, strict=True)]
        p6 = self.p6(_two_pixels(features[-1] if self.p6_from == "c5" else levels[-1]))
        p7 = self.p7(_two_pixels(F.relu(p6) if self.relu_before_p7 else p6))
        return [*levels, p6, p7]


def _two_pixels(x: Tensor) -> Tensor:
    """``x``; where a side is one pixel, two, with the zeros that the convolution's own padding has there.

    The result is the same. But oneDNN's bfloat16 weight gradient of a strided 3x3 convolution on a
    map one pixel wide, channels last, reads memory that nobody wrote (torch 2.15: often NaN).
    """
    height, width = x.shape[-2:]
    return F.pad(x, (0, int(width == 1), 0, int(height == 1))) if min(height, width) == 1 else x
