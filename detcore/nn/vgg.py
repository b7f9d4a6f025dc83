"""VGG-16 with its fully connected layers turned into convolutions: the trunk of SSD, FSSD and RefineDet."""

from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.vgg import VGG

from detcore.nn.backbones import Trunk

__all__ = ["VGGTrunk"]

_BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGGTrunk(Trunk):
    """VGG-16 up to fc7, fully connected layers as convolutions ("reduced fc"), maps from stride 8 on.

    ======= ============= =============== ============================ ==========================
    stride  pool5         fc6             maps                         detectors
    ======= ============= =============== ============================ ==========================
    16      3x3, step 1   3x3, dilated 6  conv4_3, fc7 (8, 16)         SSD, FSSD
    32      2x2, step 2   3x3, dilated 3  conv4_3, conv5_3, fc7        RefineDet
                                          (8, 16, 32)
    ======= ============= =============== ============================ ==========================

    The third pooling rounds up, so that 300 pixels give maps of 38 and 19 cells. No dropout.

    Args:
        name: ``vgg16``, or ``vgg16_bn`` with batch norm after every convolution, which can be
            trained from scratch.
        weights: ImageNet weights of torchvision's model of that name, an enum or its name, see
            :meth:`copy_from`; ``None`` for random weights.
        stride: of fc7, a row of the table.

    Raises:
        ValueError: if ``name`` or ``stride`` is none of the above.

    Example:
        >>> trunk = VGGTrunk()
        >>> trunk.channels, sum(p.numel() for p in trunk.parameters())
        ((512, 1024), 20483904)

    Reference: Simonyan, Zisserman, VGG, ICLR 2015, arXiv:1409.1556; Liu et al., SSD, ECCV 2016,
    section 3, arXiv:1512.02325; Zhang et al., RefineDet, CVPR 2018, arXiv:1711.06897.
    """

    def __init__(
        self, name: Literal["vgg16", "vgg16_bn"] = "vgg16", *, weights=None, stride: Literal[16, 32] = 16
    ) -> None:
        super().__init__()
        if name not in ("vgg16", "vgg16_bn"):
            raise ValueError(f'VGGTrunk: name must be "vgg16" or "vgg16_bn"; got {name!r}.')
        if stride not in (16, 32):
            raise ValueError(f"VGGTrunk: stride must be 16 or 32; got {stride}.")
        self.name, self.stride = name, stride
        self.channels = (512, 1024) if stride == 16 else (512, 512, 1024)
        blocks, inside = [], 3
        for widths in _BLOCKS:
            layers: list[nn.Module] = []
            for width in widths:
                layers += self._conv(inside, width, kernel=3)
                inside = width
            blocks.append(nn.Sequential(*layers))
        self.blocks = nn.ModuleList(blocks)
        dilation = 6 if stride == 16 else 3
        self.fc = nn.Sequential(*self._conv(512, 1024, kernel=3, dilation=dilation), *self._conv(1024, 1024, kernel=1))
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
                nn.init.zeros_(part.get_parameter("bias"))
        if weights is not None:
            self.copy_from(getattr(torchvision.models, name)(weights=weights))

    def _conv(self, inside: int, width: int, *, kernel: int, dilation: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(inside, width, kernel, padding=dilation * (kernel // 2), dilation=dilation)
        norm = [nn.BatchNorm2d(width)] if self.name == "vgg16_bn" else []
        return [conv, *norm, nn.ReLU(inplace=True)]

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """The maps of the table, fine to coarse."""
        x = images
        for i, block in enumerate(self.blocks[:4]):
            x = block(F.max_pool2d(x, 2, ceil_mode=i == 3) if i else x)
        conv4 = x
        conv5 = self.blocks[4](F.max_pool2d(conv4, 2))
        if self.stride == 16:
            return [conv4, self.fc(F.max_pool2d(conv5, 3, stride=1, padding=1))]
        return [conv4, conv5, self.fc(F.max_pool2d(conv5, 2))]

    @torch.no_grad()
    def copy_from(self, net: VGG) -> None:
        """Take over the weights of torchvision's VGG-16.

        fc6 was 4096 outputs on 7 x 7 cells: every fourth output and every third row and column are kept,
        which its dilation spreads again; fc7 keeps every fourth output and input. With batch norm,
        that of fc6 and fc7 is new.

        Args:
            net: ``torchvision.models.vgg16`` or ``vgg16_bn``, whichever this trunk is.

        Raises:
            ValueError: if ``net`` is another network, or has features only (IMAGENET1K_FEATURES).

        Reference: Chen et al., DeepLab, 2016, section 4.1 (decimation). arXiv:1606.00915
        """
        theirs, ours = _layers(net.features), _layers(self.blocks)
        alike = [type(m) for m in ours] == [type(m) for m in theirs]
        if not alike or any(a.weight.shape != b.weight.shape for a, b in zip(ours, theirs, strict=True)):
            raise ValueError(f"VGGTrunk: net must be torchvision's {self.name}; got other layers.")
        fc6, fc7 = [m for m in net.classifier if isinstance(m, nn.Linear)][:2]
        thinned = fc6.weight.view(4096, 512, 7, 7)[::4, :, ::3, ::3]
        if not thinned.isfinite().all():
            raise ValueError(
                "VGGTrunk: net must have a classifier, fc6 and fc7 come from it; these weights have NaN there. "
                "Use IMAGENET1K_V1."
            )
        for mine, other in zip(ours, theirs, strict=True):
            mine.load_state_dict(other.state_dict())
        wide, deep = (m for m in self.fc if isinstance(m, nn.Conv2d))
        wide.weight.copy_(thinned)
        wide.get_parameter("bias").copy_(fc6.bias[::4])
        deep.weight.copy_(fc7.weight[::4, ::4, None, None])
        deep.get_parameter("bias").copy_(fc7.bias[::4])


def _layers(net: nn.Module) -> list[nn.Conv2d | nn.BatchNorm2d]:
    return [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
