"""Trunks: images to three maps C3, C4, C5 of strides 8, 16, 32."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, cast

import torchvision
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from detcore.nn.layers import FixedBatchNorm2d

__all__ = ["ResNetTrunk", "TinyTrunk", "Trunk", "build_trunk"]

Norm = Literal["fixed", "batch"]

if TYPE_CHECKING:

    class Trunk(nn.Module):
        """A module from images (B, 3, H, W) to maps, fine to coarse, with their widths in ``channels``."""

        channels: tuple[int, ...]
else:
    Trunk = nn.Module  # so that a trunk of your own need not descend from it
    """A module from images (B, 3, H, W) to maps, C3, C4 and C5 as a rule, with their widths in ``.channels``."""

_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")


class ResNetTrunk(Trunk):
    """torchvision's ResNet without its classifier.

    Args:
        name: ``resnet18``, ``resnet34``, ``resnet50`` or ``resnet101``.
        weights: a torchvision weights enum or its name (``"IMAGENET1K_V1"``, ``"DEFAULT"``), or
            ``None`` for random weights.
        norm: ``"fixed"`` uses stored statistics (fine-tuning), ``"batch"`` those of the batch
            (training from scratch). ``None``: fixed if there are weights.
        trainable_stages: how many of the last stages learn, 0 to 5 (stem, C2, C3, C4, C5).
            ``None``: 3 if there are weights (stem and C2 stay as they are), else 5.

    Raises:
        ValueError: if ``name``, ``norm`` or ``trainable_stages`` is none of the above.

    Example:
        >>> ResNetTrunk("resnet18").channels
        (128, 256, 512)

    Reference: He et al., Deep Residual Learning, CVPR 2016, Table 1. arXiv:1512.03385
    """

    def __init__(
        self, name: str, *, weights=None, norm: Norm | None = None, trainable_stages: int | None = None
    ) -> None:
        super().__init__()
        if name not in _RESNETS:
            raise ValueError(f"ResNetTrunk: name must be one of {', '.join(_RESNETS)}; got {name!r}.")
        norm = norm or ("fixed" if weights else "batch")
        if norm not in ("fixed", "batch"):
            raise ValueError(f'ResNetTrunk: norm must be "fixed" or "batch"; got {norm!r}.')
        layer = {"fixed": FixedBatchNorm2d, "batch": nn.BatchNorm2d}[norm]
        net = getattr(torchvision.models, name)(weights=weights, norm_layer=layer)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        wide = 4 if name in ("resnet50", "resnet101") else 1
        self.channels = (128 * wide, 256 * wide, 512 * wide)
        stages = [self.stem, self.layer1, self.layer2, self.layer3, self.layer4]
        learn = trainable_stages if trainable_stages is not None else (3 if weights else 5)
        if not 0 <= learn <= 5:
            raise ValueError(f"ResNetTrunk: trainable_stages must be 0 to 5; got {learn}.")
        for stage in stages[: 5 - learn]:
            stage.requires_grad_(False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """C3, C4, C5."""
        c3 = self.layer2(self.layer1(self.stem(images)))
        c4 = self.layer3(c3)
        return [c3, c4, self.layer4(c4)]


class TinyTrunk(Trunk):
    """A small residual network for processors without a GPU, for tests and for the book.

    One residual block a stride, batch norm, trained from scratch.

    Args:
        widths: channels at strides 2, 4, 8, 16, 32.

    Raises:
        ValueError: if there are not five widths.

    Example:
        >>> trunk = TinyTrunk()
        >>> trunk.channels, sum(p.numel() for p in trunk.parameters())
        ((64, 96, 128), 488784)
    """

    def __init__(self, widths: Sequence[int] = (16, 32, 64, 96, 128)) -> None:
        super().__init__()
        if len(widths) != 5:
            raise ValueError(f"TinyTrunk: widths must be five numbers, strides 2 to 32; got {widths}.")
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        self.stages = nn.ModuleList(_halving_block(a, b) for a, b in pairwise(widths))
        self.channels = tuple(widths[2:])

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """C3, C4, C5."""
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]


def _halving_block(inside: int, outside: int) -> nn.Module:
    shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride=2, bias=False), nn.BatchNorm2d(outside))
    return BasicBlock(inside, outside, stride=2, downsample=shortcut)


def build_trunk(
    backbone: str | nn.Module, *, weights=None, norm: Norm | None = None, trainable_stages: int | None = None
) -> Trunk:
    """A trunk by name, or the given module if it has ``channels``.

    Args:
        backbone: a ResNet's name, ``"tiny"``, or your own trunk: a module from images to
            [C3, C4, C5] with a tuple ``channels``.
        weights: as in :class:`ResNetTrunk`; ``tiny`` has none.
        norm: as in :class:`ResNetTrunk`.
        trainable_stages: as in :class:`ResNetTrunk`.

    Raises:
        ValueError: if the name is unknown, or options do not apply to the trunk.

    Example:
        >>> build_trunk("tiny").channels
        (64, 96, 128)
    """
    options = {"weights_backbone": weights, "norm": norm, "trainable_stages": trainable_stages}
    given = [name for name, value in options.items() if value is not None]
    if isinstance(backbone, nn.Module):
        if not hasattr(backbone, "channels"):
            raise ValueError(
                f"build_trunk: backbone {type(backbone).__name__} must have a tuple `channels`, "
                "the widths of the maps C3, C4, C5 that it returns."
            )
        if given:
            raise ValueError(f"build_trunk: {', '.join(given)} only apply to a backbone given by name.")
        return cast(Trunk, backbone)
    if backbone == "tiny":
        if given:
            raise ValueError(f'build_trunk: {", ".join(given)} do not apply to "tiny", which is trained from scratch.')
        return TinyTrunk()
    if backbone not in _RESNETS:
        raise ValueError(f"build_trunk: backbone must be one of {', '.join((*_RESNETS, 'tiny'))}; got {backbone!r}.")
    return ResNetTrunk(backbone, weights=weights, norm=norm, trainable_stages=trainable_stages)
