"""FSSD: SSD on a pyramid grown from one map into which three sources are fused.

Li, Zhou, FSSD: Feature Fusion Single Shot Multibox Detector, 2017. arXiv:1712.00960
The released codes differ in small things; here conv6_2 is padded (Caffe), all three sources are reduced and the
batch norm has a scale and a shift (PyTorch), and maps are enlarged without aligning corners (PyTorch).
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from detcore.default_boxes import LAYOUTS, Clip, DefaultBoxGenerator
from detcore.detector import DenseDetector
from detcore.models.ssd import SSD_CODER, ssd_detector, vgg_or_own
from detcore.nn.backbones import Trunk
from detcore.nn.inputs import ImageInput
from detcore.nn.level_head import LevelHead
from detcore.nn.pyramids import ExtraShape, SSDPyramid, convolution
from detcore.nn.vgg import VGGTrunk

__all__ = ["FusedPyramid", "fssd", "fssd300", "fssd512"]

_EXTRAS = (ExtraShape(256, 512, 3, 1, 1), ExtraShape(128, 256))
"""conv6 keeps the map's side, unlike SSD's, so that conv7_2 has half of fc7's."""

# kernel, stride and padding of each level's convolution on the one before; the first is on the fused map
_SAME, _HALF, _CUT, _LAST = (3, 1, 1), (3, 2, 1), (3, 1, 0), (4, 1, 1)
_LEVELS = {
    300: ((512, *_SAME), (512, *_HALF), (256, *_HALF), (256, *_HALF), (256, *_CUT), (256, *_CUT)),
    512: ((512, *_SAME), (512, *_HALF), (256, *_HALF), (256, *_HALF), (256, *_HALF), (256, *_HALF), (256, *_LAST)),
}


class FusedPyramid(nn.Module):
    """Three sources to one map, and from it one map a level.

    Each source is reduced by a 1x1 convolution and ReLU, enlarged to the first one's size, and joined;
    batch norm; then convolutions with ReLU, each on the one before.

    Args:
        body: images to maps, their widths in ``channels``.
        sources: which three of its maps are fused, the finest first.
        width: of each reduced source.
        levels: for each level (channels, kernel, stride, padding).

    Example:
        >>> from detcore.nn import TinyTrunk
        >>> body = FusedPyramid(TinyTrunk(), (0, 1, 2), 32, [(48, 3, 1, 1), (64, 3, 2, 1)])
        >>> [tuple(m.shape[1:]) for m in body(torch.zeros(2, 3, 96, 96))]
        [(48, 12, 12), (64, 6, 6)]

    Reference: Li, Zhou, FSSD, 2017, section 3. arXiv:1712.00960
    """

    def __init__(
        self, body: Trunk, sources: Sequence[int], width: int, levels: Sequence[tuple[int, int, int, int]]
    ) -> None:
        super().__init__()
        self.body, self.sources = body, tuple(sources)
        self.reduce = nn.ModuleList(convolution(body.channels[i], width, 1, 1, 0) for i in sources)
        self.norm = nn.BatchNorm2d(width * len(self.sources))
        self.channels = tuple(channels for channels, *_ in levels)
        inside = [width * len(self.sources), *self.channels]
        self.levels = nn.ModuleList(convolution(i, *level) for i, level in zip(inside, levels, strict=False))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """Maps of all levels, fine to coarse."""
        maps = self.body(images)
        reduced = [reduce(maps[i]) for reduce, i in zip(self.reduce, self.sources, strict=True)]
        size = reduced[0].shape[-2:]
        enlarged = [F.interpolate(m, size=size, mode="bilinear", align_corners=False) for m in reduced[1:]]
        x, levels = self.norm(torch.cat([reduced[0], *enlarged], dim=1)), []
        for level in self.levels:
            x = level(x)
            levels.append(x)
        return levels


def fssd300(*, num_classes: int, **options: Any) -> DenseDetector:
    """FSSD on pictures of 300 x 300 pixels.

    Args:
        num_classes: C, >= 1, background not counted.
        **options: of :func:`fssd`.

    Example:
        >>> with torch.device("meta"):
        ...     detector = fssd300(num_classes=20)
        >>> sum(p.numel() for p in detector.parameters())
        33902510
    """
    return fssd(num_classes=num_classes, size=300, **options)


def fssd512(*, num_classes: int, **options: Any) -> DenseDetector:
    """FSSD on pictures of 512 x 512 pixels, with a seventh level.

    Args:
        num_classes: C, >= 1, background not counted.
        **options: of :func:`fssd`.

    Example:
        >>> fssd512(num_classes=20, backbone="tiny").priors.layout.total
        24564
    """
    return fssd(num_classes=num_classes, size=512, **options)


def fssd(
    *,
    num_classes: int,
    size: Literal[300, 512] = 300,
    backbone: str | nn.Module = "vgg16",
    weights_backbone: Any = None,
    channels: int = 64,
    boxes: Literal["voc", "coco"] = "voc",
    clip: Clip | None = None,
    warp_side: int | None = None,
    **options: Any,
) -> DenseDetector:
    """FSSD.

    Args:
        num_classes: C, >= 1, background not counted.
        size: which of the two networks; also the side of its pictures.
        backbone: see :func:`detcore.models.ssd.ssd`; a trunk of your own gives the three sources, of
            strides 8, 16 and 32.
        weights_backbone: see there.
        channels: width of sources and levels on another trunk than VGG's.
        boxes: see there.
        clip: see there.
        warp_side: see there.
        **options: of :func:`detcore.models.ssd.ssd_detector`.

    Raises:
        ValueError: if an option is out of range; the message names it.

    Example:
        >>> fssd(num_classes=20, backbone="tiny").body.channels
        (64, 64, 64, 64, 64, 64)
    """
    if size not in _LEVELS:
        raise ValueError(f"fssd: size must be 300 or 512; got {size}.")
    if boxes not in ("voc", "coco"):
        raise ValueError(f'fssd: boxes must be "voc" or "coco"; got {boxes!r}.')
    priors = DefaultBoxGenerator(LAYOUTS[f"fssd{size}_{boxes}"], clip=clip)
    trunk = vgg_or_own(backbone, weights=weights_backbone)
    is_vgg = isinstance(trunk, VGGTrunk)
    if is_vgg:
        body = FusedPyramid(SSDPyramid(trunk, _EXTRAS), (0, 1, 3), 256, _LEVELS[size])
    else:
        halving = [(channels, *_SAME), *[(channels, *_HALF)] * (len(priors.num_priors) - 1)]
        body = FusedPyramid(trunk, (0, 1, 2), channels, halving)
    return ssd_detector(
        body,
        priors,
        LevelHead(body.channels, priors.num_priors, num_classes + 1, SSD_CODER),
        num_classes=num_classes,
        inputs=ImageInput(warp_side=warp_side or (size if is_vgg else None)),
        **options,
    )
