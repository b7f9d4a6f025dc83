"""SSD's augmentation: ``ssd_transform`` beside torchvision's reference chain on ``transforms.v2``."""

from collections.abc import Callable
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from benchmarks.synthetic import objects
from benchmarks.timing import Row
from detcore.data.batch import PAD_COLOUR
from detcore.data.transforms import ssd_transform

SIDE = 300
HEIGHT, WIDTH = 375, 500  # most pictures of PASCAL VOC
OBJECTS = 3  # a picture there, about


def reference_chain(*, pil: bool, colours: bool = True) -> v2.Transform:
    """``data_augmentation="ssd"`` of torchvision's references/detection/presets.py, then SSD300's resize.

    The detector resizes there; here it is part of the chain, as in ours, so that both end with the same uint8 pictures.

    Args:
        pil: for pictures of PIL, the preset's default; else for uint8 tensors, its other way.
        colours: change them too; else the geometry alone.
    """
    picture = PIL.Image.Image if pil else tv_tensors.Image
    chain = [
        *([v2.RandomPhotometricDistort()] if colours else []),
        v2.RandomZoomOut(fill={picture: PAD_COLOUR}),
        v2.RandomIoUCrop(),
        v2.RandomHorizontalFlip(0.5),
        v2.Resize((SIDE, SIDE), antialias=True),
        *([v2.PILToTensor()] if pil else []),
        v2.SanitizeBoundingBoxes(),
    ]
    return v2.Compose(chain)


def samples(count: int) -> list[tuple[tv_tensors.Image, dict[str, Any]]]:
    """Pictures of VOC's size with their objects, one after the other as a data set gives them."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for target in objects(count, (HEIGHT, WIDTH), OBJECTS, 20):
        pixels = torch.randint(256, (3, HEIGHT, WIDTH), generator=generator, dtype=torch.uint8)
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(HEIGHT, WIDTH))
        made.append((tv_tensors.Image(pixels), {**target, "boxes": boxes}))
    return made


def augmentation_row(count: int, *, pil: bool, colours: bool = True) -> Row:
    """Pictures in, augmented pictures of 300 x 300 out, one by one; decoding is no part of it.

    Beside theirs on PIL, ours starts from what our data sets make of a picture of PIL: its bytes, colours side by side.
    """
    mine, chain = ssd_transform(SIDE, train=True, colours=colours), reference_chain(pil=pil, colours=colours)
    given = samples(count)
    theirs = [(F.to_pil_image(image), target) for image, target in given] if pil else given
    if pil:
        given = [(tv_tensors.Image(image.permute(1, 2, 0).contiguous().permute(2, 0, 1)), t) for image, t in given]

    def runner(transform: Callable, given: list) -> Callable[[], list[tuple[Tensor, dict[str, Any]]]]:
        return lambda: [transform(image, dict(target)) for image, target in given]

    by_torchvision, by_detcore = runner(chain, theirs), runner(mine, given)

    def check() -> None:
        torch.manual_seed(0)
        for image, target in by_torchvision() + by_detcore():
            assert image.dtype == torch.uint8
            assert image.shape == (3, SIDE, SIDE)
            assert len(target["boxes"]) == len(target["labels"])
            assert target["boxes"].min() >= 0
            assert target["boxes"].max() <= SIDE
        assert_alike(by_detcore, by_torchvision, rounds=-(-400 // count))

    torch.manual_seed(0)
    kind, part = "PIL" if pil else "uint8", "augmentation" if colours else "augmentation without colours"
    return Row(f"SSD300: {part}, theirs on {kind}, {count} pictures", check, by_torchvision, by_detcore)


def assert_alike(mine: Callable, theirs: Callable, *, rounds: int) -> None:
    """Both are random, and draw their windows differently: many pictures are alike on average only.

    Compared are the objects left in a picture, the root of their area, and the share of mean colour.
    """
    a, b = ([_traits(*sample) for _ in range(rounds) for sample in side()] for side in (mine, theirs))
    assert_close(torch.stack(a).mean(0), torch.stack(b).mean(0), rtol=0.3, atol=0.0)


def _traits(image: Tensor, target: dict[str, Any]) -> Tensor:
    boxes = target["boxes"].as_subclass(Tensor)
    side = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt().mean() if len(boxes) else torch.tensor(0.0)
    blank = (image.as_subclass(Tensor) == torch.tensor(PAD_COLOUR, dtype=torch.uint8)[:, None, None]).all(0)
    return torch.stack([torch.tensor(float(len(boxes))), side, blank.float().mean()])
