"""Default boxes: the priors of the SSD family, and the published layouts of them.

Order: level, then y, then x, then prior of the cell, as everywhere. Unlike RetinaNet's anchors they
are shares of the picture: a detector made for 300 pixels has the same boxes, scaled, on 128.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from detcore.priors import maps_of
from detcore.structures import Priors

__all__ = ["LAYOUTS", "Clip", "DefaultBoxGenerator", "DefaultBoxLayout"]

Clip = Literal["cxcywh", "corners", "sizes"]
"""What is clamped to the picture; see :class:`DefaultBoxGenerator`."""


@dataclass(frozen=True)
class DefaultBoxLayout:
    r"""Sides and shapes of the default boxes of every level, for pictures of one size.

    A cell of level :math:`k` has, in this order, a square of side :math:`m_k`; if there is a last
    side, a square of side :math:`\sqrt{m_k m_{k+1}}`; and for each ratio :math:`r` of the level
    :math:`(m_k\sqrt r, m_k/\sqrt r)` and the same upright.

    Args:
        size: side of the picture in pixels.
        maps: side of each level's map in cells.
        sides: :math:`m_k` in pixels, one a level, > 0.
        last_side: what follows the last of ``sides``; ``None``: no level has the second square.
        ratios: for each level, width over height, > 0; each is used lying and upright.
        steps: pixels between cells, one a level, as the references write them down; ``None``: ``size``
            divided by the map's side.

    Raises:
        ValueError: if a number is not positive or there is not one a level.

    Example:
        >>> layout = DefaultBoxLayout(320, (40, 20), (32.0, 64.0), None, ((2.0,), (2.0,)))
        >>> layout.per_cell, layout.total
        ((3, 3), 6000)
    """

    size: int
    maps: tuple[int, ...]
    sides: tuple[float, ...]
    last_side: float | None
    ratios: tuple[tuple[float, ...], ...]
    steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        given = {"maps": self.maps, "sides": self.sides, "ratios": self.ratios, "steps": self.steps or self.maps}
        for name, values in given.items():
            if len(values) != len(self.maps) or not values:
                raise ValueError(
                    f"DefaultBoxLayout: {name} must be {len(self.maps)} values, one a level; got {values}."
                )
        numbers = [self.size, *self.maps, *self.sides, *(r for level in self.ratios for r in level)]
        numbers += [*(self.steps or ()), *([] if self.last_side is None else [self.last_side])]
        if min(numbers) <= 0:
            raise ValueError(f"DefaultBoxLayout: all numbers must be > 0; got {self}.")

    @property
    def per_cell(self) -> tuple[int, ...]:
        """How many default boxes a cell of each level has."""
        return tuple(1 + (self.last_side is not None) + 2 * len(level) for level in self.ratios)

    @property
    def total(self) -> int:
        """How many default boxes a picture of ``size`` has."""
        return sum(n * f * f for n, f in zip(self.per_cell, self.maps, strict=True))

    @property
    def side_ranges(self) -> tuple[tuple[float, float], ...]:
        """SSD's (min size, max size) of each level in pixels; twice the one size without a second square."""
        following = self.sides if self.last_side is None else (*self.sides[1:], self.last_side)
        return tuple(zip(self.sides, following, strict=True))

    def shapes(self, level: int) -> list[tuple[float, float]]:
        """(width, height) in pixels of the default boxes of one cell, in order."""
        side = self.sides[level]
        boxes = [(side, side)]
        if self.last_side is not None:
            second = (side * [*self.sides, self.last_side][level + 1]) ** 0.5
            boxes.append((second, second))
        for ratio in self.ratios[level]:
            long, short = side * ratio**0.5, side / ratio**0.5
            boxes += [(long, short), (short, long)]
        return boxes


_SSD300 = (38, 19, 10, 5, 3, 1)
_SSD512 = (64, 32, 16, 8, 4, 2, 1)
_RATIOS300 = ((2.0,), (2.0, 3.0), (2.0, 3.0), (2.0, 3.0), (2.0,), (2.0,))
_RATIOS512 = ((2.0,), (2.0, 3.0), (2.0, 3.0), (2.0, 3.0), (2.0, 3.0), (2.0,), (2.0,))
_STEPS300 = (8, 16, 32, 64, 100, 300)
_STEPS512 = (8, 16, 32, 64, 128, 256, 512)
_VOC300 = ((30.0, 60.0, 111.0, 162.0, 213.0, 264.0), 315.0)
_COCO300 = ((21.0, 45.0, 99.0, 153.0, 207.0, 261.0), 315.0)
_VOC512 = ((35.84, 76.8, 153.6, 230.4, 307.2, 384.0, 460.8), 537.6)
_COCO512 = ((20.48, 51.2, 133.12, 215.04, 296.96, 378.88, 460.8), 542.72)


def _dssd(size: int, maps: tuple[int, ...], shares: tuple[float, ...]) -> DefaultBoxLayout:
    *sides, last = (share * size for share in shares)
    return DefaultBoxLayout(size, maps, tuple(sides), last, ((1.6, 2.0, 3.0),) * len(maps))


def _refinedet(size: int, maps: tuple[int, ...]) -> DefaultBoxLayout:
    return DefaultBoxLayout(size, maps, (32.0, 64.0, 128.0, 256.0), None, ((2.0,),) * 4)


_DSSD321 = ((40, 20, 10, 5, 3, 1), (0.10, 0.20, 0.38, 0.56, 0.74, 0.92, 1.10))
_DSSD513 = (_SSD512, (0.04, 0.10, 0.27, 0.44, 0.61, 0.78, 0.95, 1.12))

LAYOUTS: dict[str, DefaultBoxLayout] = {
    "ssd300_voc": DefaultBoxLayout(300, _SSD300, *_VOC300, _RATIOS300, _STEPS300),
    "ssd300_coco": DefaultBoxLayout(300, _SSD300, *_COCO300, _RATIOS300, _STEPS300),
    "ssd512_voc": DefaultBoxLayout(512, _SSD512, *_VOC512, _RATIOS512, _STEPS512),
    "ssd512_coco": DefaultBoxLayout(512, _SSD512, *_COCO512, _RATIOS512, _STEPS512),
    "fssd300_voc": DefaultBoxLayout(300, _SSD300, *_VOC300, _RATIOS300),
    "fssd300_coco": DefaultBoxLayout(300, _SSD300, *_COCO300, _RATIOS300),
    "fssd512_voc": DefaultBoxLayout(512, _SSD512, *_VOC512, _RATIOS512),
    "fssd512_coco": DefaultBoxLayout(512, _SSD512, *_COCO512, _RATIOS512),
    "dssd320": _dssd(320, *_DSSD321),
    "dssd321": _dssd(321, *_DSSD321),
    "dssd512": _dssd(512, *_DSSD513),
    "dssd513": _dssd(513, *_DSSD513),
    "refinedet320": _refinedet(320, (40, 20, 10, 5)),
    "refinedet512": _refinedet(512, (64, 32, 16, 8)),
}
"""The published layouts, from the released training scripts; sides unrounded.

Caffe's layer stores SSD512's sides as whole pixels (35, 76, 153...); the PyTorch codes do not, nor
does this. FSSD's are SSD's boxes with centres that tile the picture. DSSD's scripts pass offsets
that their own layer misreads (the 1x1 centre lands at 51 520 pixels); here (j + 1/2) / f is meant.
"""


class DefaultBoxGenerator(nn.Module):
    r"""SSD's default boxes on a pyramid.

    The box shapes are shares of the picture: on another size than the layout's they scale with it,
    in width and height apart. Cell :math:`j` is centred at :math:`(j + 1/2)\,t`. The step :math:`t` is
    the layout's where picture and map have the sizes it names; elsewhere it is picture / map. The
    published steps of SSD300 do not tile it: the last centre of the 10 x 10 map is at 304 pixels.

    ========== ============================================== =======================================
    clip       what is clamped to the picture                 used by
    ========== ============================================== =======================================
    ``None``   nothing                                        the Caffe training scripts
    "cxcywh"   centre and sides                               ssd.pytorch; 134 of 8732 boxes move
    "sizes"    sides                                          torchvision
    "corners"  corners                                        nobody; half again as many positives on
                                                              VOC
    ========== ============================================== =======================================

    Args:
        layout: a value of :data:`LAYOUTS`, or your own.
        clip: see the table.

    Raises:
        ValueError: if ``clip`` is unknown.

    Example:
        >>> generator = DefaultBoxGenerator(LAYOUTS["ssd300_voc"])
        >>> priors = generator([torch.zeros(1, 1, f, f) for f in (38, 19, 10, 5, 3, 1)], (300, 300))
        >>> priors.boxes.shape[1], priors.boxes[0, 0].tolist()
        (8732, [-11.0, -11.0, 19.0, 19.0])

    Reference: Liu et al., SSD, ECCV 2016, section 2.2. arXiv:1512.02325
    """

    def __init__(self, layout: DefaultBoxLayout, *, clip: Clip | None = None) -> None:
        super().__init__()
        if clip not in (None, "cxcywh", "corners", "sizes"):
            raise ValueError(f'DefaultBoxGenerator: clip must be None, "cxcywh", "corners" or "sizes"; got {clip!r}.')
        self.layout, self.clip = layout, clip
        self.num_priors = layout.per_cell
        for level in range(len(layout.maps)):
            shares = torch.tensor(layout.shapes(level), dtype=torch.float64) / layout.size
            self.register_buffer(f"shares{level}", shares.float(), persistent=False)

    def _apply(self, fn, recurse: bool = True) -> "DefaultBoxGenerator":
        # follow the model to its device but stay float32: bfloat16 has no pixel 257
        device = fn(torch.empty(0, device=self.get_buffer("shares0").device)).device
        return super()._apply(lambda shares: shares.to(device), recurse)

    def forward(self, features: Sequence[Tensor], image_size: tuple[int, int]) -> Priors:
        """Default boxes of every map, (1, N, 4) in pixels.

        Raises:
            ValueError: if there are not as many maps as levels.
        """
        if len(features) != len(self.layout.maps):
            raise ValueError(
                f"DefaultBoxGenerator: features must be {len(self.layout.maps)} maps, one a level; got {len(features)}."
            )
        boxes, cells = [], []
        for level, feature in enumerate(features):
            shares = self.get_buffer(f"shares{level}")
            height, width = feature.shape[-2:]
            step_y, step_x = self._steps(level, (height, width), image_size)
            y, x = torch.meshgrid(
                torch.arange(height, device=shares.device, dtype=shares.dtype),
                torch.arange(width, device=shares.device, dtype=shares.dtype),
                indexing="ij",
            )
            centre = torch.stack([(x + 0.5) * step_x, (y + 0.5) * step_y], dim=-1).view(-1, 1, 2)  # cells, 1, 2
            begin = torch.stack([x * step_x, y * step_y], dim=-1).view(-1, 1, 2)
            boxes.append(self._corners(centre, shares, image_size).reshape(-1, 4))  # y x prior, 4
            cells.append(begin.expand(-1, len(shares), -1).reshape(-1, 2))
        return Priors(torch.cat(boxes)[None], tuple(len(b) for b in boxes), torch.cat(cells), maps_of(features))

    def _steps(self, level: int, shape: tuple[int, int], image_size: tuple[int, int]) -> tuple[float, float]:
        side, size, steps = self.layout.maps[level], self.layout.size, self.layout.steps
        if steps is not None and image_size == (size, size) and shape == (side, side):
            return float(steps[level]), float(steps[level])
        return image_size[0] / shape[0], image_size[1] / shape[1]

    def _corners(
        self, centre: Float[Tensor, "cells 1 2"], shares: Float[Tensor, "priors 2"], image_size: tuple[int, int]
    ) -> Float[Tensor, "cells priors 4"]:
        x, y = centre.unbind(-1)  # cells, 1
        height, width = image_size
        w, h = shares[:, 0] * width, shares[:, 1] * height
        if self.clip in ("cxcywh", "sizes"):
            w, h = w.clamp(max=width), h.clamp(max=height)
        if self.clip == "cxcywh":
            x, y = x.clamp(max=width), y.clamp(max=height)
        corners = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
        if self.clip == "corners":
            sides = (width, height, width, height)
            corners = [c.clamp(0, side) for c, side in zip(corners, sides, strict=True)]
        return torch.stack(corners, dim=-1)
