"""DSSD: SSD on a ResNet, its maps merged from coarse to fine by deconvolution.

Fu et al., DSSD: Deconvolutional Single Shot Detector, 2017. arXiv:1701.06659
Layers as in the released Caffe branch. Of its default boxes only the meaning is kept, see
:data:`detcore.default_boxes.LAYOUTS`; DSSD513's further 512 convolutions on COCO are left out.
"""

from typing import Any, Literal, cast

from torch import nn

from detcore.default_boxes import LAYOUTS, Clip, DefaultBoxGenerator
from detcore.detector import DenseDetector
from detcore.models.ssd import SSD_CODER, ssd_detector
from detcore.nn.backbones import TinyTrunk, Trunk
from detcore.nn.deconvolution import DeconvolutionPyramid, StageShape, UpShape, batch_norm, group_norm
from detcore.nn.dilated import DilatedResNetTrunk
from detcore.nn.inputs import ImageInput
from detcore.nn.level_head import LevelHead

__all__ = ["dssd", "dssd320", "dssd321", "dssd512", "dssd513"]

_HALF, _CUT, _ODD = StageShape(2, 2), StageShape(3, 1), StageShape(3, 2, 1)
_STAGES = {320: (_HALF, _HALF, _CUT, _CUT), 512: (_HALF,) * 5}
_UPS = {
    320: (UpShape(3, 1), UpShape(3, 1), *[UpShape(2, 2)] * 3),
    512: (UpShape(2, 1), *[UpShape(2, 2)] * 5),
}


def dssd320(*, num_classes: int, backbone: str | nn.Module = "resnet50", **options: Any) -> DenseDetector:
    """DSSD on pictures of 320 x 320 pixels, with torchvision's pooling.

    Args:
        num_classes: C, >= 1, background not counted.
        backbone: of :func:`dssd`.
        **options: of :func:`dssd`.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     detector = dssd320(num_classes=20)
        >>> sum(p.numel() for p in detector.parameters())
        153388784
    """
    return dssd(num_classes=num_classes, size=320, backbone=backbone, **options)


def dssd321(*, num_classes: int, backbone: str | nn.Module = "resnet101", **options: Any) -> DenseDetector:
    """DSSD on pictures of 321 x 321 pixels, with Caffe's pooling, as published.

    Args:
        num_classes: C, >= 1, background not counted.
        backbone: of :func:`dssd`.
        **options: of :func:`dssd`.

    Example:
        >>> dssd321(num_classes=20, backbone="tiny").priors.layout.total
        17080
    """
    return dssd(num_classes=num_classes, size=321, backbone=backbone, **options)


def dssd512(*, num_classes: int, backbone: str | nn.Module = "resnet50", **options: Any) -> DenseDetector:
    """DSSD on pictures of 512 x 512 pixels, with torchvision's pooling and a seventh level.

    Args:
        num_classes: C, >= 1, background not counted.
        backbone: of :func:`dssd`.
        **options: of :func:`dssd`.

    Example:
        >>> dssd512(num_classes=20, backbone="tiny").priors.layout.total
        43688
    """
    return dssd(num_classes=num_classes, size=512, backbone=backbone, **options)


def dssd513(*, num_classes: int, backbone: str | nn.Module = "resnet101", **options: Any) -> DenseDetector:
    """DSSD on pictures of 513 x 513 pixels, with Caffe's pooling, as published, and a seventh level.

    Args:
        num_classes: C, >= 1, background not counted.
        backbone: of :func:`dssd`.
        **options: of :func:`dssd`.

    Example:
        >>> len(dssd513(num_classes=20, backbone="tiny").head.num_priors)
        7
    """
    return dssd(num_classes=num_classes, size=513, backbone=backbone, **options)


def dssd(
    *,
    num_classes: int,
    size: Literal[320, 321, 512, 513] = 320,
    backbone: str | nn.Module = "resnet50",
    weights_backbone: Any = None,
    norm: Literal["fixed", "batch"] | None = None,
    channels: int = 64,
    merge: Literal["product", "sum"] | None = "product",
    middle_kernel: int = 3,
    clip: Clip | None = None,
    warp_side: int | None = None,
    **options: Any,
) -> DenseDetector:
    """DSSD.

    Args:
        num_classes: C, >= 1, background not counted.
        size: which of the four networks; also the side of its pictures. 321 and 513 take Caffe's
            pooling, without which their maps are no halves of each other.
        backbone: ``"resnet50"``, ``"resnet101"``, ``"tiny"`` for processors without a GPU, or a trunk of
            your own, with its maps' widths in ``channels``.
        weights_backbone: ImageNet weights, see :class:`detcore.nn.ResNetTrunk`.
        norm: of the trunk, see there. New layers have batch norm, whose statistics on the topmost map
            are those of one cell a picture: train on several pictures at a time.
        channels: width of the new layers on another trunk than a ResNet; these halve any map, and are
            normalised over groups.
        merge: see :class:`detcore.nn.deconvolution.DeconvolutionModule`; ``None``: the paper's own baseline, SSD
            on the same trunk, extra stages and prediction modules, its maps not merged.
        middle_kernel: see :class:`detcore.nn.deconvolution.ResidualBlock`; 3 or 1.
        clip: see :class:`detcore.default_boxes.DefaultBoxGenerator`.
        warp_side: side to which pictures given to ``detector(images)`` are warped; default ``size``
            on a ResNet; on other trunks they are left as they are.
        **options: of :func:`detcore.models.ssd.ssd_detector`.

    Raises:
        ValueError: if an option is out of range; the message names it.

    Example:
        >>> dssd(num_classes=20, backbone="tiny").head.num_priors
        (8, 8, 8, 8, 8, 8)
    """
    if size not in (320, 321, 512, 513):
        raise ValueError(f"dssd: size must be 320, 321, 512 or 513; got {size}.")
    if middle_kernel not in (1, 3):
        raise ValueError(f"dssd: middle_kernel must be 3 or 1; got {middle_kernel}.")
    priors = DefaultBoxGenerator(LAYOUTS[f"dssd{size}"], clip=clip)
    pool = "caffe" if size in (321, 513) else "torchvision"
    trunk = _trunk(backbone, weights=weights_backbone, norm=norm, pool=pool)
    levels, is_resnet = len(priors.num_priors), isinstance(trunk, DilatedResNetTrunk)
    even = size // 2 * 2
    body = DeconvolutionPyramid(
        trunk,
        _STAGES[even] if is_resnet else [_ODD] * (levels - len(trunk.channels)),
        _UPS[even] if is_resnet else [UpShape()] * (levels - 1),
        1024 if is_resnet else channels,
        merge=merge,
        middle_kernel=middle_kernel,
        norm=batch_norm if is_resnet else group_norm,
    )
    kernels = [5 if level < 2 else 3 for level in range(levels)]
    return ssd_detector(
        body,
        priors,
        LevelHead(body.channels, priors.num_priors, num_classes + 1, SSD_CODER, kernels=kernels),
        num_classes=num_classes,
        inputs=ImageInput(warp_side=warp_side or (size if is_resnet else None)),
        **options,
    )


def _trunk(
    backbone: str | nn.Module,
    *,
    weights: Any,
    norm: Literal["fixed", "batch"] | None,
    pool: Literal["torchvision", "caffe"],
) -> Trunk:
    if isinstance(backbone, str) and backbone in ("resnet50", "resnet101"):
        return DilatedResNetTrunk(backbone, weights=weights, norm=norm, pool=pool)
    if weights is not None or norm is not None:
        raise ValueError("dssd: weights_backbone and norm only apply to resnet50 and resnet101.")
    if backbone == "tiny":
        return TinyTrunk()
    if not isinstance(backbone, nn.Module) or not hasattr(backbone, "channels"):
        raise ValueError(
            'dssd: backbone must be "resnet50", "resnet101", "tiny", or a module with a tuple `channels`, the widths '
            f"of its maps; got {backbone if isinstance(backbone, str) else type(backbone).__name__}."
        )
    return cast(Trunk, backbone)
