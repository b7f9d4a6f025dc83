"""Matching alone against torchvision's: objects of a batch to priors, without losses."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.ops import box_area, box_iou

from benchmarks.cases import CASES, Case, Maps, canvas_of
from benchmarks.synthetic import Shape, objects
from benchmarks.timing import Row
from detcore.structures import Priors, pad_targets

CROWD = 50


def matching_rows(*, size: Shape, large: Shape, few: int, batch: int, num_classes: int) -> dict[str, Callable[[], Row]]:
    """Name of every comparison to what builds it.

    Args:
        size: height and width of small pictures in pixels; SSD300's are 300 x 300.
        large: the same of large pictures.
        few: objects a picture in half of the rows; the others have 50.
        batch: pictures.
        num_classes: as torchvision counts them.
    """
    made: dict[str, Callable[[], Row]] = {}
    for key, case in CASES.items():
        for shape in dict.fromkeys((case.shape(size), case.shape(large))):
            for count in (few, CROWD):
                name = f"{key}-matching{'-large' if shape == large else ''}-{count}"
                made[name] = functools.partial(matching_row, case, shape, count, batch, num_classes)
    return made


def matching_row(case: Case, shape: Shape, count: int, batch: int, num_classes: int) -> Row:
    """Which object each prior has to predict; theirs answers with indices, ours with labels, boxes and IoUs too."""
    theirs, ours = case.both(shape, num_classes)
    priors = case.priors(ours, shape)
    targets = objects(batch, shape, count, ours.num_classes)
    padded, their_targets = pad_targets(targets), case.their_targets(targets)
    if isinstance(theirs, FCOS):  # its matching is the first part of its loss
        theirs.head.compute_loss = lambda targets, outputs, anchors, matched: matched

    def check() -> None:
        match = ours.match(priors, padded)
        assert (match.index >= 0).all()
        assert match.positive.any(dim=1).all()
        mine = torch.where(match.positive, match.index, match.labels)
        wanted = torch.stack(their_matches(theirs, their_targets, priors))
        other = mine != wanted
        if isinstance(theirs, FCOS):  # looks for the largest 1e8 - area: in float32 such numbers lie 8 apart
            areas = box_area(padded.boxes.flatten(0, 1)).view_as(padded.labels)
            gap = areas.gather(1, mine.clamp(min=0)) - areas.gather(1, wanted.clamp(min=0))
            other &= (gap.abs() > 8) | (mine < 0) | (wanted < 0)
        assert not other.any()

    height, width = canvas_of(shape)
    name = f"{case.title}: matching, {height} x {width}, {count} objects, B={batch}"
    return Row(name, check, lambda: their_matches(theirs, their_targets, priors), lambda: ours.match(priors, padded))


def their_matches(theirs: nn.Module, targets: list[Maps], priors: Priors) -> list[Tensor]:
    """Index of each prior's object, picture by picture; -1 for none, -2 for ignored."""
    anchors = priors.boxes[0]
    if isinstance(theirs, FCOS):
        return theirs.compute_loss(targets, {}, [anchors] * len(targets), list(priors.counts))
    return [theirs.proposal_matcher(box_iou(target["boxes"], anchors)) for target in targets]
