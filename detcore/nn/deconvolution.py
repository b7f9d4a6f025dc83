"""DSSD's parts: residual extra stages, the deconvolution path, and the prediction module before each head."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from detcore.nn.backbones import Trunk
from detcore.nn.layers import _xavier
from detcore.nn.necks import _two_pixels

__all__ = [
    "DeconvolutionModule",
    "DeconvolutionPyramid",
    "ResidualBlock",
    "StageShape",
    "UpShape",
    "batch_norm",
    "group_norm",
]

Norm = Callable[[int], nn.Module]


def batch_norm(channels: int) -> nn.Module:
    """Batch norm with the released DSSD's epsilon.

    Deviation: torch's momentum; the released one (0.999 in Caffe's sense) needs stored statistics to start from.

    Example:
        >>> batch_norm(8).eps
        0.001
    """
    return nn.BatchNorm2d(channels, eps=1e-3)


def group_norm(channels: int) -> nn.Module:
    """Norm over groups of 16 channels: works on one cell of one picture, where a batch has no statistics.

    Example:
        >>> group_norm(64).num_groups
        4
    """
    return nn.GroupNorm(max(1, channels // 16), channels)


class StageShape(NamedTuple):
    """Kernel, stride and padding of an extra stage's first convolution and of its shortcut."""

    kernel: int
    stride: int
    padding: int = 0


class UpShape(NamedTuple):
    """Kernel and stride of a transposed convolution."""

    kernel: int = 2
    stride: int = 2


_POINTWISE, _TWICE = StageShape(1, 1), UpShape(2, 2)


class ResidualBlock(nn.Module):
    """A bottleneck whose shortcut is a projection: an extra stage of DSSD, or its prediction module.

    Args:
        inside: width of the input.
        width: of the output; the bottleneck has a quarter.
        shape: of the first convolution and the shortcut; 1x1 in a prediction module.
        middle_kernel: side of the second convolution's kernel, odd. 3 in the released code; the paper's
            Fig. 3 has 1 in its prediction module.
        norm: channels to a normalisation, after every convolution.

    Example:
        >>> import torch
        >>> ResidualBlock(8, 16, StageShape(2, 2))(torch.zeros(2, 8, 10, 10)).shape
        torch.Size([2, 16, 5, 5])

    Reference: Fu et al., DSSD, 2017, Fig. 2 (c). arXiv:1701.06659
    """

    def __init__(
        self,
        inside: int,
        width: int,
        shape: StageShape = _POINTWISE,
        *,
        middle_kernel: int = 3,
        norm: Norm = batch_norm,
    ) -> None:
        super().__init__()
        middle = max(1, width // 4)
        self.main = nn.Sequential(
            *_normed(inside, middle, *shape, norm=norm),
            nn.ReLU(inplace=True),
            *_normed(middle, middle, middle_kernel, 1, middle_kernel // 2, norm=norm),
            nn.ReLU(inplace=True),
            *_normed(middle, width, 1, 1, 0, norm=norm),
        )
        self.shortcut = nn.Sequential(*_normed(inside, width, *shape, norm=norm))
        self.halves = tuple(shape) == (3, 2, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        """ReLU of the sum."""
        x = _two_pixels(x) if self.halves else x
        return F.relu(self.main(x) + self.shortcut(x))


def _normed(inside: int, width: int, kernel: int, stride: int, padding: int, *, norm: Norm) -> list[nn.Module]:
    conv = nn.Conv2d(inside, width, kernel, stride=stride, padding=padding, bias=False)
    nn.init.xavier_uniform_(conv.weight)
    return [conv, norm(width)]


class DeconvolutionModule(nn.Module):
    """A coarser map enlarged and merged with a finer one.

    Coarse: transposed convolution, 3x3 convolution, norm. Fine: twice (3x3 convolution, norm), ReLU between.
    Then their product or sum, and ReLU. What the transposed convolution makes too much is cut off on the
    right and at the bottom.

    Args:
        coarse: width of the coarser map.
        fine: width of the finer map.
        width: of the result.
        up: of the transposed convolution.
        merge: element-wise ``"product"``, which did better in the paper, or ``"sum"``.
        norm: channels to a normalisation.

    Raises:
        ValueError: if ``merge`` is neither; in the forward pass, if the enlarged map is smaller than the finer.

    Example:
        >>> import torch
        >>> module = DeconvolutionModule(8, 4, 6, UpShape(3, 1))
        >>> module(torch.zeros(2, 8, 1, 1), torch.zeros(2, 4, 3, 3)).shape
        torch.Size([2, 6, 3, 3])

    Reference: Fu et al., DSSD, 2017, Fig. 3. arXiv:1701.06659
    """

    def __init__(
        self,
        coarse: int,
        fine: int,
        width: int,
        up: UpShape = _TWICE,
        *,
        merge: Literal["product", "sum"] = "product",
        norm: Norm = batch_norm,
    ) -> None:
        super().__init__()
        if merge not in ("product", "sum"):
            raise ValueError(f'DeconvolutionModule: merge must be "product" or "sum"; got {merge!r}.')
        self.merge = merge
        self.up = _xavier(nn.ConvTranspose2d(coarse, width, up.kernel, stride=up.stride))
        self.coarse = nn.Sequential(*_normed(width, width, 3, 1, 1, norm=norm))
        self.fine = nn.Sequential(
            *_normed(fine, width, 3, 1, 1, norm=norm),
            nn.ReLU(inplace=True),
            *_normed(width, width, 3, 1, 1, norm=norm),
        )

    def forward(self, coarse: Float[Tensor, "B C h w"], fine: Float[Tensor, "B D H W"]) -> Float[Tensor, "B E H W"]:
        """The merged map, of the finer one's size."""
        enlarged, (height, width) = self.up(coarse), fine.shape[-2:]
        if enlarged.shape[-2] < height or enlarged.shape[-1] < width:
            raise ValueError(
                f"DeconvolutionModule: maps must be halves of each other; got {tuple(coarse.shape[-2:])}, enlarged to "
                f"{tuple(enlarged.shape[-2:])}, below {(height, width)}. Pictures of 321 and 513 pixels need "
                'DilatedResNetTrunk(pool="caffe"); 320 and 512 need neither.'
            )
        up, side = self.coarse(enlarged[..., :height, :width]), self.fine(fine)
        return F.relu(up * side if self.merge == "product" else up + side)


class DeconvolutionPyramid(nn.Module):
    """A trunk, residual extra stages, the way back by deconvolution, and a prediction module a level.

    Args:
        trunk: images to maps, their widths in ``channels``.
        stages: extra stages on the last of them.
        ups: transposed convolutions, from the coarsest level down: one fewer than levels.
        width: of extra stages and of the result; merged maps have half.
        merge: of :class:`DeconvolutionModule`; ``None``: no way back and no ``ups``, the plain SSD on a ResNet.
        middle_kernel: of the prediction modules, see :class:`ResidualBlock`.
        norm: channels to a normalisation.

    Example:
        >>> import torch
        >>> from detcore.nn import TinyTrunk
        >>> body = DeconvolutionPyramid(TinyTrunk(), [StageShape(3, 2, 1)] * 2, [UpShape()] * 4, 32)
        >>> [tuple(m.shape[1:]) for m in body(torch.zeros(2, 3, 128, 128))]
        [(32, 16, 16), (32, 8, 8), (32, 4, 4), (32, 2, 2), (32, 1, 1)]

    Reference: Fu et al., DSSD, 2017, Fig. 1. arXiv:1701.06659
    """

    def __init__(
        self,
        trunk: Trunk,
        stages: Sequence[StageShape],
        ups: Sequence[UpShape],
        width: int,
        *,
        merge: Literal["product", "sum"] | None = "product",
        middle_kernel: int = 3,
        norm: Norm = batch_norm,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        inside = [trunk.channels[-1], *[width] * (len(stages) - 1)]
        self.stages = nn.ModuleList(
            ResidualBlock(c, width, shape, norm=norm) for c, shape in zip(inside, stages, strict=True)
        )
        merged = max(1, width // 2)
        coarse = [width, *[merged] * (len(ups) - 1)]
        self.source_channels = (*trunk.channels, *[width] * len(stages))
        self.merged_channels = (*[merged] * len(ups), width) if merge else self.source_channels
        self.channels = (width,) * len(self.source_channels)
        self.deconvolutions = nn.ModuleList()
        if merge:
            rows = zip(coarse, self.source_channels[-2::-1], ups, strict=True)
            self.deconvolutions.extend(
                DeconvolutionModule(c, fine, merged, up, merge=merge, norm=norm) for c, fine, up in rows
            )
        self.predictions = nn.ModuleList(
            ResidualBlock(c, width, middle_kernel=middle_kernel, norm=norm) for c in self.merged_channels
        )

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """Maps of all levels, fine to coarse."""
        return self.finish(self.merge(self.sources(images)))

    def sources(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """Maps of trunk and extra stages, fine to coarse, of widths ``source_channels``."""
        maps = list(self.trunk(images))
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps

    def merge(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Those merged from coarse to fine, of widths ``merged_channels``; the coarsest stays as it is."""
        if not self.deconvolutions:
            return list(maps)
        merged = [maps[-1]]
        for module, fine in zip(self.deconvolutions, maps[-2::-1], strict=True):
            merged.append(module(merged[-1], fine))
        return merged[::-1]

    def finish(self, merged: Sequence[Tensor]) -> list[Tensor]:
        """Those through their prediction modules, of widths ``channels``."""
        return [module(m) for module, m in zip(self.predictions, merged, strict=True)]
