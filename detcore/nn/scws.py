"""SCOD's blocks: a map segments what lies on it, and goes on with what it found.

Layer-wise customized weak segmentation block and AIoU loss, 2021. arXiv:2108.11021
The paper gives no layer table. Its own are the classifier and the order of things; widths, norms and the form of
the attention are ours.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from detcore.losses.segmentation import segmentation_cells
from detcore.nn.layers import _xavier, init_conv
from detcore.nn.necks import _two_pixels

__all__ = ["SegmentationBlock", "SegmentationBlocks", "SegmentedPyramid"]


class SegmentationBlock(nn.Module):
    r"""A weak segmentation block (SCWS): says what is on each cell, and gives back a map like the one it got.

    .. math:: Y = \mathrm{softmax}(W_{3 \times 3} F), \quad G = \mathrm{ReLU}(\mathrm{norm}(W_{1 \times 1} [F, Y])),
        \quad F' = G \,(1 + a(G))

    with :math:`a` the attention: a 3x3 convolution of stride 2, ReLU, a 3x3 convolution, enlarged to the
    map's size, sigmoid. :math:`Y` is no constant: the losses of the detector shape it too.

    Args:
        channels: width of the map.
        num_logits: of each cell; C + 1, background last.
        attention: without it :math:`F' = G`.
        norm: channels to a normalisation.

    Example:
        >>> refined, logits = SegmentationBlock(8, 4)(torch.zeros(2, 8, 5, 5))
        >>> tuple(refined.shape), tuple(logits.shape)
        ((2, 8, 5, 5), (2, 4, 5, 5))

    Reference: SCOD, 2021, Eq. (2), (3). Deviation: logits start near 0, so every class begins alike.
    """

    def __init__(
        self,
        channels: int,
        num_logits: int,
        *,
        attention: bool = True,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.classify = init_conv(nn.Conv2d(channels, num_logits, 3, padding=1))
        join = nn.Conv2d(channels + num_logits, channels, 1, bias=False)
        self.restore = nn.Sequential(join, norm(channels))
        _xavier(join)
        self.attention = _Attention(channels) if attention else None

    def forward(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K H W"]]:
        """The map made anew, and the logits of its cells."""
        logits = self.classify(x)
        said = logits.float().softmax(1).to(x.dtype)
        x = F.relu(self.restore(torch.cat([x, said], dim=1)))
        return (x if self.attention is None else x * (1 + self.attention(x))), logits


class _Attention(nn.Module):
    """How much each number of a map matters, in (0, 1), seen from a coarser map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        middle = max(1, channels // 4)
        self.down = nn.Conv2d(channels, middle, 3, stride=2, padding=1)
        self.out = nn.Conv2d(middle, channels, 3, padding=1)
        for conv in (self.down, self.out):
            _xavier(conv)

    def forward(self, x: Tensor) -> Tensor:
        coarse = self.out(F.relu(self.down(_two_pixels(x))))
        return F.interpolate(coarse, size=x.shape[-2:], mode="bilinear", align_corners=False).sigmoid()


class SegmentationBlocks(nn.Module):
    """Blocks on some of a pyramid's maps.

    Args:
        channels: width of each map that gets a block, by its place in the pyramid: 0 is the finest.
        num_logits: of :class:`SegmentationBlock`.
        ranges: (low, high) of the areas that each block answers for, in square pixels, by place.
        made_for: side of the pictures that ``ranges`` are meant for; on others they scale with the
            picture's area, as default boxes do. ``None``: they are what they are, like anchors.
        attention: of :class:`SegmentationBlock`.
        norm: as there.

    Raises:
        ValueError: if the places of ``channels`` and ``ranges`` differ, or there is none.

    Example:
        >>> blocks = SegmentationBlocks({1: 8}, 4, {1: (0.0, 900.0)})
        >>> maps, aside = blocks([torch.zeros(2, 6, 4, 4), torch.zeros(2, 8, 2, 2)], (32, 32))
        >>> {name: tuple(value.shape) for name, value in aside.items()}
        {'segmentation': (2, 4, 4), 'segmentation_cells': (1, 4, 4), 'segmentation_areas': (1, 4, 2)}
    """

    def __init__(
        self,
        channels: Mapping[int, int],
        num_logits: int,
        ranges: Mapping[int, tuple[float, float]],
        *,
        made_for: int | None = None,
        attention: bool = True,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if not channels or set(channels) != set(ranges):
            raise ValueError(
                "SegmentationBlocks: channels and ranges must be given for the same maps, one at least; "
                f"got {sorted(channels)} and {sorted(ranges)}."
            )
        self.ranges, self.made_for = dict(sorted(ranges.items())), made_for
        self.blocks = nn.ModuleDict(
            {
                str(place): SegmentationBlock(channels[place], num_logits, attention=attention, norm=norm)
                for place in self.ranges
            }
        )

    def forward(self, maps: Sequence[Tensor], image_size: tuple[int, int]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The maps, those with a block made anew; and what :mod:`detcore.losses.segmentation` asks for."""
        maps, logits, shapes = list(maps), [], []
        for place, block in self.blocks.items():
            maps[int(place)], said = block(maps[int(place)])
            logits.append(said.flatten(2).transpose(1, 2))  # B HW K
            shapes.append((said.shape[-2], said.shape[-1]))
        cells, areas = segmentation_cells(shapes, image_size, self._ranges(image_size), device=maps[0].device)
        aside = {"segmentation": torch.cat(logits, dim=1), "segmentation_cells": cells, "segmentation_areas": areas}
        return maps, aside

    def _ranges(self, image_size: tuple[int, int]) -> list[tuple[float, float]]:
        scale = 1.0 if self.made_for is None else image_size[0] * image_size[1] / self.made_for**2
        return [(low * scale, high * scale) for low, high in self.ranges.values()]


class SegmentedPyramid(nn.Module):
    """Any body, with blocks on the maps that it gives: SCOD's idea on a detector of your own.

    Args:
        body: images to maps, fine to coarse.
        blocks: on some of them.

    Example:
        >>> from detcore.nn import TinyTrunk
        >>> body = SegmentedPyramid(TinyTrunk(), SegmentationBlocks({0: 64}, 4, {0: (0.0, 900.0)}))
        >>> maps, aside = body(torch.zeros(2, 3, 64, 64))
        >>> [m.shape[1] for m in maps], aside["segmentation"].shape[1]
        ([64, 96, 128], 64)
    """

    def __init__(self, body: nn.Module, blocks: SegmentationBlocks) -> None:
        super().__init__()
        self.body, self.blocks = body, blocks

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Maps of all levels, and what the blocks say aside."""
        height, width = images.shape[-2:]
        return self.blocks(self.body(images), (height, width))
