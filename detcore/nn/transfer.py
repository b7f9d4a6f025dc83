"""RefineDet's parts between trunk and head: a fourth map, and the connections that carry maps to the second step."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from detcore.nn.backbones import Trunk
from detcore.nn.deconvolution import Norm, ResidualBlock, StageShape
from detcore.nn.layers import _xavier

__all__ = ["ResNetMaps", "TransferConnections"]


class TransferConnections(nn.Module):
    """The ARM's maps made ready for the ODM, each enriched by the coarser ones.

    3x3 convolution and ReLU, 3x3 convolution, plus the next coarser result enlarged by a transposed
    convolution, ReLU, 3x3 convolution and ReLU. The coarsest level has nothing to add.

    Args:
        in_channels: width of each map, fine to coarse.
        width: of every result.
        norm: channels to a normalisation behind every convolution, which then has no bias (ResNet version).

    Example:
        >>> import torch
        >>> maps = [torch.zeros(1, c, s, s) for c, s in [(8, 5), (16, 3)]]
        >>> [tuple(m.shape[1:]) for m in TransferConnections([8, 16], 4)(maps)]
        [(4, 5, 5), (4, 3, 3)]

    Reference: Zhang et al., RefineDet, CVPR 2018, Fig. 2.
    """

    def __init__(self, in_channels: Sequence[int], width: int, *, norm: Norm | None = None) -> None:
        super().__init__()

        def plain(inside: int) -> list[nn.Module]:
            return _normed(_xavier(nn.Conv2d(inside, width, 3, padding=1)), norm)

        self.inside = nn.ModuleList(nn.Sequential(*plain(c), nn.ReLU(inplace=True), *plain(width)) for c in in_channels)
        up = [nn.ConvTranspose2d(width, width, 2, stride=2) for _ in in_channels[1:]]
        self.up = nn.ModuleList(layer if norm is None else nn.Sequential(*_normed(layer, norm)) for layer in up)
        self.outside = nn.ModuleList(nn.Sequential(*plain(width), nn.ReLU(inplace=True)) for _ in in_channels)
        for layer in up:
            _xavier(layer)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """One map a level, fine to coarse. Of odd maps, the last row and column of what is added are cut off."""
        results: list[Tensor] = []
        for i in reversed(range(len(maps))):
            x = self.inside[i](maps[i])
            if results:
                height, width = x.shape[-2:]
                x = x + self.up[i](results[0])[..., :height, :width]
            results.insert(0, self.outside[i](F.relu(x)))
        return results


def _normed(conv: nn.Conv2d | nn.ConvTranspose2d, norm: Norm | None) -> list[nn.Module]:
    if norm is None:
        return [conv]
    conv.bias = None  # the normalisation has one
    return [conv, norm(conv.out_channels)]


class ResNetMaps(nn.Module):
    """Maps C3, C4, C5 of a ResNet and a fourth, half as fine, by one residual block.

    Args:
        trunk: images to three maps, their widths in ``channels``.
        width: of the fourth.

    Example:
        >>> import torch
        >>> from detcore.nn import TinyTrunk
        >>> [tuple(m.shape[1:]) for m in ResNetMaps(TinyTrunk(), 32)(torch.zeros(2, 3, 128, 128))]
        [(64, 16, 16), (96, 8, 8), (128, 4, 4), (32, 2, 2)]
    """

    def __init__(self, trunk: Trunk, width: int) -> None:
        super().__init__()
        self.trunk, self.stage = trunk, ResidualBlock(trunk.channels[-1], width, StageShape(1, 2))
        self.channels = (*trunk.channels, width)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of all levels, fine to coarse."""
        maps = list(self.trunk(images))
        return [*maps, self.stage(maps[-1])]
