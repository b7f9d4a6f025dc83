"""ResNet with a dilated last stage: the trunk of DSSD."""

from typing import Literal

import torchvision
from jaxtyping import Float
from torch import Tensor, nn

from detcore.nn.backbones import Trunk
from detcore.nn.layers import FixedBatchNorm2d

__all__ = ["DilatedResNetTrunk"]


class DilatedResNetTrunk(Trunk):
    """torchvision's ResNet-50 or 101, last stage dilated by 2 at stride 16; maps C3 and C5.

    The third stage of strides is left at 16, so C5 is as fine as C4, which is no source.

    ============= =================== =================== ==========================================
    pool          maps of 320, 512    maps of 321, 513    where
    ============= =================== =================== ==========================================
    torchvision   40, 20; 64, 32      41, 21; 65, 33      torchvision: padded, rounds down
    caffe         40, 20; 64, 32      40, 20; 64, 32      the released DSSD: unpadded, rounds up
    ============= =================== =================== ==========================================

    Args:
        name: ``resnet50`` or ``resnet101``.
        weights: as in :class:`detcore.nn.ResNetTrunk`.
        norm: as there.
        pool: the first pooling, a row of the table.

    Raises:
        ValueError: if ``name``, ``norm`` or ``pool`` is none of the above.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     maps = DilatedResNetTrunk("resnet50", pool="caffe")(torch.zeros(1, 3, 321, 321))
        >>> [tuple(m.shape[1:]) for m in maps]
        [(512, 40, 40), (2048, 20, 20)]

    Reference: Fu et al., DSSD, 2017, section 3.1. arXiv:1701.06659
    """

    channels = (512, 2048)

    def __init__(
        self,
        name: str,
        *,
        weights=None,
        norm: Literal["fixed", "batch"] | None = None,
        pool: Literal["torchvision", "caffe"] = "torchvision",
    ) -> None:
        super().__init__()
        if name not in ("resnet50", "resnet101"):
            raise ValueError(f'DilatedResNetTrunk: name must be "resnet50" or "resnet101"; got {name!r}.')
        norm = norm or ("fixed" if weights else "batch")
        if norm not in ("fixed", "batch"):
            raise ValueError(f'DilatedResNetTrunk: norm must be "fixed" or "batch"; got {norm!r}.')
        if pool not in ("torchvision", "caffe"):
            raise ValueError(f'DilatedResNetTrunk: pool must be "torchvision" or "caffe"; got {pool!r}.')
        layer = {"fixed": FixedBatchNorm2d, "batch": nn.BatchNorm2d}[norm]
        net = getattr(torchvision.models, name)(
            weights=weights, norm_layer=layer, replace_stride_with_dilation=[False, False, True]
        )
        first_pool = net.maxpool if pool == "torchvision" else nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, first_pool)
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """C3 and C5."""
        c3 = self.layer2(self.layer1(self.stem(images)))
        return [c3, self.layer4(self.layer3(c3))]
