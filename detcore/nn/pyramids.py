"""What the SSD family puts on a trunk: normalised sources and ever coarser maps."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from detcore.nn.backbones import Trunk
from detcore.nn.layers import _xavier
from detcore.nn.necks import _two_pixels

__all__ = ["ExtraShape", "L2Norm", "SSDPyramid", "convolution", "extra_layers", "halving_extras"]


class L2Norm(nn.Module):
    """Each position's channels divided by their Euclidean length, times one learned weight a channel.

    conv4_3 is an order of magnitude larger than the maps above it; this brings it to their scale.

    Args:
        channels: width of the map.
        scale: where the weights begin; 20 in SSD, 10 and 8 in RefineDet.

    Example:
        >>> L2Norm(2, 10.0)(torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)).flatten().tolist()
        [6.0, 8.0]

    Reference: Liu et al., ParseNet, 2015, section 3.3. arXiv:1506.04579
    """

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), float(scale)))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The normalised map; the length is taken in float32 or wider."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.normalize(wide, dim=1, eps=1e-10).to(x.dtype) * self.weight[:, None, None]


class ExtraShape(NamedTuple):
    """One extra layer: a 1x1 convolution to ``middle`` channels, then a wider one to ``width``."""

    middle: int
    width: int
    kernel: int = 3
    stride: int = 2
    padding: int = 1


def convolution(inside: int, width: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> nn.Sequential:
    """Convolution and ReLU, as every new layer of SSD: Xavier's weights, no bias at the start.

    Example:
        >>> convolution(4, 8, 3, 2)(torch.zeros(1, 4, 5, 5)).shape
        torch.Size([1, 8, 3, 3])
    """
    conv = _xavier(nn.Conv2d(inside, width, kernel, stride=stride, padding=padding))
    guard = [_Twice()] if (kernel, stride, padding) == (3, 2, 1) else []
    return nn.Sequential(*guard, conv, nn.ReLU(inplace=True))


class _Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _two_pixels(x)


def extra_layers(inside: int, shapes: Sequence[ExtraShape]) -> nn.ModuleList:
    """SSD's extra layers, each on the one before; see :class:`ExtraShape`.

    Example:
        >>> layers = extra_layers(1024, [ExtraShape(256, 512), ExtraShape(128, 256)])
        >>> layers[0](torch.zeros(1, 1024, 19, 19)).shape
        torch.Size([1, 512, 10, 10])
    """
    layers = []
    for shape in shapes:
        middle = convolution(inside, shape.middle, 1, 1, 0)
        layers.append(nn.Sequential(middle, convolution(shape.middle, *shape[1:])))
        inside = shape.width
    return nn.ModuleList(layers)


def halving_extras(channels: int, count: int) -> list[ExtraShape]:
    """Extra layers that halve any map, rounding up, down to one cell: for small trunks and pictures of any size.

    Example:
        >>> halving_extras(64, 1)
        [ExtraShape(middle=32, width=64, kernel=3, stride=2, padding=1)]
    """
    return [ExtraShape(max(1, channels // 2), channels)] * count


class SSDPyramid(Trunk):
    """A trunk's maps, some of them L2-normalised, and extra layers on the last: one map a level.

    Args:
        trunk: images to maps, their widths in ``channels``.
        extras: further levels.
        scales: which of the trunk's maps are normalised: index to the weights' start. Extra layers
            go on from the map as it is.

    Example:
        >>> from detcore.nn import TinyTrunk
        >>> body = SSDPyramid(TinyTrunk(), halving_extras(64, 3), {0: 20.0})
        >>> body.channels, [m.shape[-1] for m in body(torch.zeros(1, 3, 128, 128))]
        ((64, 96, 128, 64, 64, 64), [16, 8, 4, 2, 1, 1])

    Reference: Liu et al., SSD, ECCV 2016, Fig. 2. arXiv:1512.02325
    """

    def __init__(
        self,
        trunk: Trunk,
        extras: Sequence[ExtraShape],
        scales: Mapping[int, float] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.norms = nn.ModuleDict({str(i): L2Norm(trunk.channels[i], scale) for i, scale in scales.items()})
        self.extras = extra_layers(trunk.channels[-1], extras)
        self.channels = (*trunk.channels, *(shape.width for shape in extras))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """Maps of all levels, fine to coarse."""
        maps = list(self.trunk(images))
        x = maps[-1]
        for i, norm in self.norms.items():
            maps[int(i)] = norm(maps[int(i)])
        for layer in self.extras:
            x = layer(x)
            maps.append(x)
        return maps
