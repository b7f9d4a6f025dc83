"""Matching alone against torchvision's: objects of a batch to priors, without losses."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.ops import box_iou

from benchmarks.cases import CASES, Case, Maps
from benchmarks.synthetic import objects
from benchmarks.timing import Row
from detcore.detector import DenseDetector
from detcore.structures import Priors, pad_targets

CROWD = 50


def matching_rows(*, size: int, large: int, few: int, batch: int, num_classes: int) -> dict[str, Callable[[], Row]]:
    """Name of every comparison to what builds it.

    Args:
        size: side of small pictures in pixels; SSD300's are 300.
        large: side of a square with as many pixels as a large picture; 1024 makes 800 x 1344.
        few: objects a picture in half of the rows; the others have 50.
        batch: pictures.
        num_classes: as torchvision counts them.
    """
    wide = (large * 25 // 32, large * 42 // 32)
    made: dict[str, Callable[[], Row]] = {}
    for key, case in CASES.items():
        sides = [(case.side(size),) * 2] + ([wide] if key != "ssd300" else [])
        for shape in sides:
            for count in (few, CROWD):
                name = f"{key}-matching{'-large' if shape == wide else ''}-{count}"
                made[name] = functools.partial(matching_row, case, shape, count, batch, num_classes)
    return made


def matching_row(case: Case, shape: tuple[int, int], count: int, batch: int, num_classes: int) -> Row:
    """Which object each prior has to predict; theirs answers with indices, ours with labels, boxes and IoUs too."""
    theirs, ours = case.both(min(shape), num_classes)
    priors = priors_of(case, ours, shape)
    targets = objects(batch, min(shape), count, ours.num_classes)
    padded, their_targets = pad_targets(targets), case.their_targets(targets)
    if isinstance(theirs, FCOS):  # its matching is the first part of its loss
        theirs.head.compute_loss = lambda targets, outputs, anchors, matched: matched

    def check() -> None:
        match = ours.match(priors, padded)
        assert (match.index >= 0).all()
        assert match.positive.any(dim=1).all()
        wanted = torch.stack(their_matches(theirs, their_targets, priors))
        assert torch.where(match.positive, match.index, match.labels).equal(wanted)

    name = f"{case.title}: matching, {shape[0]} x {shape[1]}, {count} objects, B={batch}"
    return Row(name, check, lambda: their_matches(theirs, their_targets, priors), lambda: ours.match(priors, padded))


def their_matches(theirs: nn.Module, targets: list[Maps], priors: Priors) -> list[Tensor]:
    """Index of each prior's object, picture by picture; -1 for none, -2 for ignored."""
    anchors = priors.boxes[0]
    if isinstance(theirs, FCOS):
        return theirs.compute_loss(targets, {}, [anchors] * len(targets), list(priors.counts))
    return [theirs.proposal_matcher(box_iou(target["boxes"], anchors)) for target in targets]


def priors_of(case: Case, ours: DenseDetector, shape: tuple[int, int]) -> Priors:
    """The priors of pictures of this height and width; both sides have the same."""
    if shape == (case.side(shape[0]),) * 2:
        return case.priors(ours, shape[0])
    maps = [tuple(-(-side // stride) for side in shape) for stride in (8, 16, 32, 64, 128)]
    return ours.priors([torch.empty(1, 1, *sides) for sides in maps], shape)
