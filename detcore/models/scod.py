r"""SCOD: DSSD whose maps are taught to segment, and whose boxes are taught by AIoU.

Layer-wise customized weak segmentation block and AIoU loss, 2021. arXiv:2108.11021

.. math:: L = L_{cls} + L_{scws} + L_{AIoU} \qquad (9)

What the paper adds to DSSD: four blocks (:mod:`detcore.nn.scws`), their loss (:mod:`detcore.losses.segmentation`), and
another loss of boxes (:mod:`detcore.losses.aiou`). The first two ride on RetinaNet as well, the last on any detector.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

from torch import Tensor, nn

from detcore.default_boxes import LAYOUTS
from detcore.detector import DenseDetector
from detcore.losses.segmentation import Closed, area_ranges, weak_segmentation_term
from detcore.models.dssd import dssd
from detcore.models.retinanet import retinanet
from detcore.nn.convolution import use_fast_convolutions
from detcore.nn.deconvolution import DeconvolutionPyramid, batch_norm, group_norm
from detcore.nn.dilated import DilatedResNetTrunk
from detcore.nn.necks import FPN
from detcore.nn.scws import SegmentationBlocks, SegmentedPyramid

__all__ = ["SegmentedDeconvolution", "retinanet_scws", "scod", "scod320", "scod512"]

Position = Literal["backbone", "decoder"]

_FOUR = (1, 2, 3, 4)


class SegmentedDeconvolution(nn.Module):
    """DSSD's body with blocks on its maps before or after they are merged.

    Args:
        pyramid: DSSD's.
        blocks: on some of its maps.
        position: ``"backbone"``: on the maps of trunk and extra stages, as they enter the deconvolution
            path; ``"decoder"``: on the merged maps, before the prediction modules.

    Example:
        >>> import torch
        >>> maps, aside = scod(num_classes=20, backbone="tiny").body(torch.zeros(2, 3, 128, 128))
        >>> len(maps), tuple(aside["segmentation"].shape)  # 16 x 16, 8 x 8, 4 x 4 and 2 x 2 cells
        (6, (2, 340, 21))
    """

    def __init__(self, pyramid: DeconvolutionPyramid, blocks: SegmentationBlocks, position: Position) -> None:
        super().__init__()
        self.pyramid, self.blocks, self.position = pyramid, blocks, position

    def forward(self, images: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Maps of all levels, and what the blocks say aside."""
        size = (images.shape[-2], images.shape[-1])
        maps = self.pyramid.sources(images)
        if self.position == "backbone":
            maps, aside = self.blocks(maps, size)
            merged = self.pyramid.merge(maps)
        else:
            merged, aside = self.blocks(self.pyramid.merge(maps), size)
        return self.pyramid.finish(merged), aside


def scod320(*, num_classes: int, backbone: str | nn.Module = "resnet50", **options: Any) -> DenseDetector:
    """SCOD on pictures of 320 x 320 pixels.

    Args:
        num_classes: C, >= 1, background not counted.
        backbone: of :func:`detcore.models.dssd.dssd`; the paper has ``"resnet101"`` for COCO.
        **options: of :func:`scod`.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     detector, plain = scod320(num_classes=20), scod320(num_classes=20, blocks=())
        >>> sum(p.numel() for p in plain.parameters())  # DSSD320's
        153388784
        >>> sum(p.numel() for p in detector.parameters()) - 153388784
        37027540
    """
    return scod(num_classes=num_classes, size=320, backbone=backbone, **options)


def scod512(*, num_classes: int, backbone: str | nn.Module = "resnet50", **options: Any) -> DenseDetector:
    """SCOD on pictures of 512 x 512 pixels, with a seventh level.

    Args:
        num_classes: C, >= 1, background not counted.
        backbone: of :func:`detcore.models.dssd.dssd`.
        **options: of :func:`scod`.

    Example:
        >>> ranges = scod512(num_classes=20, backbone="tiny").body.blocks.ranges
        >>> [round(high, 1) for low, high in ranges.values()]
        [1835.0, 13094.1, 40946.9, inf]
    """
    return scod(num_classes=num_classes, size=512, backbone=backbone, **options)


def scod(
    *,
    num_classes: int,
    size: Literal[320, 321, 512, 513] = 320,
    blocks: Sequence[int] = _FOUR,
    position: Position = "backbone",
    attention: bool = True,
    open_top: bool = True,
    closed: Closed | None = None,
    seg_weight: float = 1.0,
    box_weight: float = 1.0,
    box_loss: Literal["smooth_l1", "iou", "giou", "aiou"] = "aiou",
    aiou_beta: float = 0.8,
    **options: Any,
) -> DenseDetector:
    """SCOD. Without blocks and with ``box_loss="smooth_l1"`` it is DSSD, bit for bit.

    Args:
        num_classes: C, >= 1, background not counted.
        size: which of DSSD's networks; the paper has 320 and 512.
        blocks: which of the four blocks there are, by number: 1 is that of stride 8, 4 that of stride 64.
            A block answers for the same objects whichever others there are.
        position: see :class:`SegmentedDeconvolution`.
        attention: see :class:`detcore.nn.scws.SegmentationBlock`.
        open_top: block 4 answers for all larger objects, see :func:`detcore.losses.segmentation.area_ranges`.
        closed: see :func:`detcore.losses.segmentation.weak_segmentation_labels`.
        seg_weight: of the blocks' loss, >= 0; 1 in the paper.
        box_weight: of the boxes' loss, >= 0; 1 in the paper.
        box_loss: see :func:`detcore.models.ssd.ssd_detector`.
        aiou_beta: see there.
        **options: of :func:`detcore.models.dssd.dssd`.

    Raises:
        ValueError: if an option is out of range; the message names it.

    Example:
        >>> detector = scod(num_classes=20, backbone="tiny", blocks=(1, 2))
        >>> list(detector.losses), list(detector.body.blocks.ranges)
        (['cls', 'box', 'scws'], [0, 1])

    Reference: SCOD, 2021, Eq. (9), Table 2.
    Deviation: where the blocks sit, and their layers, see :mod:`detcore.nn.scws`. Trunk and extra stages
    go on from their maps as they are; only the deconvolution path sees what the blocks make of them.
    """
    _check("scod", blocks, seg_weight, closed)
    if position not in ("backbone", "decoder"):
        raise ValueError(f'scod: position must be "backbone" or "decoder"; got {position!r}.')
    if box_weight < 0:
        raise ValueError(f"scod: box_weight must be >= 0; got {box_weight}.")
    detector = dssd(num_classes=num_classes, size=size, box_loss=box_loss, aiou_beta=aiou_beta, **options)
    detector.losses["box"] = (box_weight, detector.losses["box"][1])
    if not blocks:
        return detector
    pyramid, layout = cast(DeconvolutionPyramid, detector.body), LAYOUTS[f"dssd{size}"]
    channels = pyramid.source_channels if position == "backbone" else pyramid.merged_channels
    ranges = area_ranges(layout.side_ranges[:4], open_top=open_top)
    places = [number - 1 for number in blocks]
    parts = SegmentationBlocks(
        {place: channels[place] for place in places},
        num_classes + 1,
        {place: ranges[place] for place in places},
        made_for=layout.size,
        attention=attention,
        norm=batch_norm if isinstance(pyramid.trunk, DilatedResNetTrunk) else group_norm,
    )
    return _taught(detector, SegmentedDeconvolution(pyramid, parts, position), seg_weight, closed)


def retinanet_scws(
    *,
    num_classes: int,
    blocks: Sequence[int] = _FOUR,
    attention: bool = True,
    open_top: bool = True,
    closed: Closed | None = None,
    seg_weight: float = 1.0,
    **options: Any,
) -> DenseDetector:
    """RetinaNet with SCOD's blocks on P3 to P6.

    Args:
        num_classes: C, >= 1.
        blocks: as in :func:`scod`, like the next four; without any it is RetinaNet.
        attention: as there.
        open_top: as there.
        closed: as there.
        seg_weight: as there.
        **options: of :func:`detcore.models.retinanet.retinanet`.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> detector = retinanet_scws(num_classes=20, backbone="tiny", box_loss="aiou")
        >>> list(detector.losses), [round(high**0.5, 1) for _, high in detector.body.blocks.ranges.values()]
        (['cls', 'box', 'scws'], [45.9, 91.7, 183.4, inf])
    """
    _check("retinanet_scws", blocks, seg_weight, closed)
    detector = retinanet(num_classes=num_classes, **options)
    if not blocks:
        return detector
    neck = cast(FPN, detector.body.get_submodule("1"))
    ranges = area_ranges(detector.priors.sides[:4], open_top=open_top)
    places = [number - 1 for number in blocks]
    parts = SegmentationBlocks(
        dict.fromkeys(places, neck.out_channels),
        num_classes + 1,
        {place: ranges[place] for place in places},
        attention=attention,
        norm=group_norm,
    )
    return _taught(detector, SegmentedPyramid(detector.body, parts), seg_weight, closed)


def _taught(detector: DenseDetector, body: nn.Module, seg_weight: float, closed: Closed | None) -> DenseDetector:
    """The detector on a body with blocks, and their loss."""
    use_fast_convolutions(body)
    detector.body = body
    detector.losses["scws"] = (seg_weight, partial(weak_segmentation_term, closed=closed))
    return detector


def _check(where: str, blocks: Sequence[int], seg_weight: float, closed: Closed | None) -> None:
    if sorted(set(blocks)) != sorted(blocks) or not set(blocks) <= set(_FOUR):
        raise ValueError(f"{where}: blocks must be different numbers of 1 to 4; got {tuple(blocks)}.")
    if seg_weight < 0:
        raise ValueError(f"{where}: seg_weight must be >= 0; got {seg_weight}.")
    if closed not in ("right", None):
        raise ValueError(f'{where}: closed must be "right" or None; got {closed!r}.')
