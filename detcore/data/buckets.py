"""A few sizes for batches of pictures of any shape: less padding, and few shapes for whatever is made per shape."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from detcore.data.dataset import DetectionDataset
from detcore.data.transforms import ResizeShortSide

__all__ = ["Buckets", "size_buckets", "smallest_canvas"]

# Of many cameras; about six of ten pictures of VOC 2007 are no longer than that, and half of COCO's.
_USUAL_RATIO = 4 / 3


@dataclass(frozen=True)
class Buckets:
    """The sizes that batches may have, and which of them each picture of a data set fits.

    Args:
        canvases: (height, width) of each, in pixels.
        groups: index into ``canvases`` of each picture.

    Raises:
        ValueError: if there is no canvas, or a group names none of them.
    """

    canvases: tuple[tuple[int, int], ...]
    groups: Int[Tensor, " N"]

    def __post_init__(self) -> None:
        """Check both."""
        known = len(self.canvases)
        if not known:
            raise ValueError("Buckets: canvases must hold at least one (height, width); got none.")
        wrong = self.groups[(self.groups < 0) | (self.groups >= known)]
        if len(wrong):
            raise ValueError(f"Buckets: groups must be in [0, {known}), one canvas each; got {int(wrong[0])}.")


def smallest_canvas(sizes: Int[Tensor, "N 2"], canvases: Sequence[tuple[int, int]]) -> Int[Tensor, " N"]:
    """Index of the canvas with the fewest pixels that holds each (height, width); -1 where none does.

    The first of equals.

    Example:
        >>> smallest_canvas(torch.tensor([[20, 30], [50, 30], [40, 40]]), [(32, 64), (64, 32)]).tolist()
        [0, 1, -1]
    """
    room = torch.tensor(canvases)
    fits = (sizes[:, None] <= room).all(-1)
    pixels = torch.where(fits, room.prod(1), torch.iinfo(torch.int64).max)
    return torch.where(fits.any(1), pixels.argmin(1), -1)


def size_buckets(dataset: DetectionDataset, short_side: int, long_side: int, *, multiple: int = 32) -> Buckets:
    """Four canvases that hold whatever :class:`~detcore.data.transforms.ResizeShortSide` makes of a data set.

    Two lie: the cameras' usual 4:3, and the longest. Two stand. Nothing is decoded.

    Args:
        dataset: says each picture's size.
        short_side: pixels.
        long_side: its limit in pixels, >= short_side.
        multiple: of every height and width, >= 1.

    Example:
        >>> from detcore.data.scenes import Scenes
        >>> buckets = size_buckets(Scenes(3, size=64), 800, 1333)
        >>> buckets.canvases, buckets.groups.tolist()
        (((800, 1088), (800, 1344), (1088, 800), (1344, 800)), [0, 0, 0])
    """
    resize = ResizeShortSide(short_side, long_side)
    originals = [dataset.target(index)["original_size"] for index in range(len(dataset))]
    sizes = torch.tensor([resize.size(*map(int, original)) for original in originals]).view(-1, 2)
    usual = min(round(short_side * _USUAL_RATIO), long_side)
    short, *long = (-(-side // multiple) * multiple for side in (short_side, usual, long_side))
    lying = [(short, side) for side in dict.fromkeys(long)]
    canvases = tuple(dict.fromkeys([*lying, *((width, height) for height, width in lying)]))
    return Buckets(canvases, smallest_canvas(sizes, canvases))
