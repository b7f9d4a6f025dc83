"""SCOD's weak labels and their loss: by hand, against a loop over cells, and as laws."""

import math

import pytest
import torch
from torch.testing import assert_close

from detcore.default_boxes import LAYOUTS
from detcore.losses.segmentation import (
    area_ranges,
    segmentation_cells,
    weak_segmentation_labels,
    weak_segmentation_term,
)
from detcore.priors import AnchorGenerator
from detcore.structures import Assignment, Predictions, Priors
from tests import reference
from tests.counting import LaunchCounter
from tests.samples import image_of, no_hook, targets_of

MAPS = [(40, 40), (20, 20), (10, 10), (5, 5)]
DSSD320 = area_ranges(LAYOUTS["dssd320"].side_ranges[:4])


def labels_of(boxes, labels=None, *, maps=MAPS, size=(320, 320), ranges=DSSD320, **options):
    """Labels of one picture, a list of grids, one a block."""
    targets = targets_of((boxes, labels or list(range(len(boxes)))), slots=8, dtype=torch.float32)
    found = weak_segmentation_labels(*segmentation_cells(maps, size, ranges), targets, **options)[0]
    return [part.view(shape) for part, shape in zip(found.split([h * w for h, w in maps]), maps, strict=True)]


# --- ranges


@pytest.mark.parametrize(
    ("layout", "highs"),
    [
        ("dssd320", [3072, 11284.48, 26951.68, 49254.4, 78192.64, 113766.4]),
        ("dssd512", [1835.0, 13094.1, 40946.9, 83951.6, 142108.3, 215416.8, 303877.3]),
        ("refinedet320", [1024, 4096, 16384, 65536]),
    ],
)
def test_ranges_are_those_of_the_detectors_own_priors(layout, highs):
    ranges = area_ranges(LAYOUTS[layout].side_ranges, open_top=False)
    assert_close([high for _, high in ranges], [float(high) for high in highs], rtol=0, atol=0.051)
    if layout != "dssd512":  # exact, not rounded to a digit
        assert_close([high for _, high in ranges], [float(high) for high in highs], rtol=1e-12, atol=0)
    assert [low for low, _ in ranges] == [0.0, *[high for _, high in ranges[:-1]]]


def test_open_top_changes_the_last_range_only():
    scales = LAYOUTS["dssd320"].side_ranges[:4]
    strict, open_top = area_ranges(scales, open_top=False), area_ranges(scales)
    assert open_top[:3] == strict[:3]
    assert open_top[3] == (strict[3][0], math.inf)


def test_ranges_of_anchors_span_an_octave():
    [first, second, *_] = area_ranges(AnchorGenerator().sides)
    largest = 32 * 2 ** (2 / 3)
    assert_close(first[1], (32 * largest + largest**2) / 2, rtol=1e-12, atol=0)
    assert_close(second[1], 4 * first[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scales", [[], [(0.0, 1.0)], [(2.0, 1.0)], [(1.0, 2.0), (-1.0, 3.0)]])
def test_ranges_refuse_what_is_no_range(scales):
    with pytest.raises(ValueError, match="area_ranges: scales must be pairs 0 < min <= max, one a layer"):
        area_ranges(scales)


# --- cells


def test_cells_tile_the_picture_row_by_row():
    cells, areas = segmentation_cells([(2, 3), (1, 1)], (30, 60), [(0.0, 5.0), (5.0, math.inf)])
    assert cells[0].tolist()[:4] == [[0, 0, 20, 15], [20, 0, 40, 15], [40, 0, 60, 15], [0, 15, 20, 30]]
    assert cells[0].tolist()[-1] == [0, 0, 60, 30]
    assert areas[0].tolist() == [[0, 5]] * 6 + [[5, math.inf]]


# --- labels


def test_cells_of_a_picture_of_320_are_looked_at_in_their_middle():
    # 24 x 24 pixels: layer 1. Centres are at 4, 12, 20, 28...; 12 <= x < 36 has 12, 20, 28 and not 4, 36
    first, *others = labels_of([[12.0, 20, 36, 44]])
    assert (first[2:5, 1:4] == 0).all()  # y: 20, 28, 36
    assert (first >= 0).sum() == 9
    assert all((grid == -1).all() for grid in others)
    # a quarter of a pixel to the right, the first column is left, and x = 36 is gained: half-open
    moved = labels_of([[12.25, 20, 36.25, 44]])[0]
    assert (moved[2:5, 2:5] == 0).all()
    assert (moved >= 0).sum() == 9


@pytest.mark.parametrize(
    ("side", "layer"), [(55.0, 0), (56.0, 1), (106.0, 1), (107.0, 2), (164.0, 2), (165.0, 3), (230.0, 3), (319.0, 3)]
)
def test_each_object_belongs_to_one_layer(side, layer):
    counts = [int((grid >= 0).sum()) for grid in labels_of([[0.5, 0.5, 0.5 + side, 0.5 + side]])]
    assert [count > 0 for count in counts] == [number == layer for number in range(4)]


def test_without_an_open_top_the_largest_objects_are_background():
    strict = area_ranges(LAYOUTS["dssd320"].side_ranges[:4], open_top=False)
    big = [[10.0, 10, 310, 310]]
    assert all((grid == -1).all() for grid in labels_of(big, ranges=strict))
    assert (labels_of(big)[3] == 0).sum() == 25
    assert (labels_of([[10.0, 10, 230, 230]], ranges=strict)[3] == 0).sum() > 0  # 48 400, just below 49 254.4


def test_an_area_exactly_on_a_bound_is_background_unless_closed():
    exact = [[0.0, 0, 48, 64]]  # 3072
    assert all((grid == -1).all() for grid in labels_of(exact))
    right = labels_of(exact, closed="right")
    assert [int((grid >= 0).sum()) for grid in right] == [48, 0, 0, 0]
    for box, layer in (([0.0, 0, 48, 63.99], 0), ([0.0, 0, 48, 64.01], 1)):
        assert [bool((grid >= 0).any()) for grid in labels_of([box])] == [number == layer for number in range(4)]


def test_smallest_wins_and_only_those_of_the_layer_compete():
    # 40 x 40 on 50 x 50: both of layer 1, the smaller wins whatever its place; a 200 x 200 below both is untouched
    boxes = [[0.0, 0, 50, 50], [10, 10, 50, 50], [0, 0, 200, 200]]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        grids = labels_of([boxes[i] for i in order], order)
        assert grids[0][0, 0] == 0
        assert grids[0][2, 2] == 1
        assert grids[3][0, 0] == 2  # the small ones lie on this cell's centre too
    # of equal areas the first wins
    assert labels_of([[0.0, 0, 40, 40], [0, 0, 40, 40]], [2, 1])[0][1, 1] == 2


@pytest.mark.parametrize("closed", [None, "right"])
@pytest.mark.parametrize("size", [(320, 320), (96, 160)])
def test_labels_are_those_of_a_loop_over_cells(closed, size):
    torch.manual_seed(3)
    maps = [(-(-size[0] // s), -(-size[1] // s)) for s in (8, 16, 32, 64)]
    ranges = DSSD320 if size == (320, 320) else [(0.0, 400.0), (400.0, 900.0), (900.0, 2500.0), (2500.0, 4900.0)]
    images = []
    for count in (12, 5, 1, 0):
        corner = (torch.rand(count, 2) * size[0] * 0.8).round()
        sides = (torch.rand(count, 2) ** 2 * size[0] * 0.7).round() + 2
        images.append((torch.cat([corner, corner + sides], dim=1), torch.randint(0, 9, (count,))))
    exact = torch.tensor([[0.0, 0, 20, 20], [30, 30, 60, 60], [0, 0, 48, 64]])  # 400, 900, 3072
    images.append((exact, torch.tensor([1, 2, 3])))
    targets = targets_of(*images, slots=16, dtype=torch.float32)
    cells = segmentation_cells(maps, size, ranges)
    found = weak_segmentation_labels(*cells, targets, closed=closed)
    for row, (boxes, labels) in zip(found.tolist(), images, strict=True):
        wanted = reference.segmentation_labels(
            maps, size, ranges, boxes.tolist(), labels.tolist(), closed=closed is not None
        )
        assert row == wanted
    assert len(found.unique()) > 5
    assert (found[3] == -1).all()
    for i in range(len(images)):  # a batch is its images one by one, and padding says nothing
        assert weak_segmentation_labels(*cells, image_of(targets, i), closed=closed).equal(found[i : i + 1])


def test_labels_name_what_is_wrong():
    cells = segmentation_cells([(1, 1)], (8, 8), [(0.0, 9.0)])
    with no_hook(), pytest.raises(ValueError, match=r'closed must be "right" or None; got .left'):
        weak_segmentation_labels(*cells, targets_of(([], []), dtype=torch.float32), closed="left")


# --- the loss


def said(logits, maps, size, ranges):
    """Predictions of a detector without priors."""
    cells, areas = segmentation_cells(maps, size, ranges)
    nothing = torch.zeros(len(logits), 1, 4)
    aside = {"segmentation": logits, "segmentation_cells": cells.to(logits), "segmentation_areas": areas.to(logits)}
    return Predictions(torch.zeros(len(logits), 1, 1), nothing, nothing, Priors(nothing[:1], (1,)), aside=aside)


def matched(targets):
    batch = len(targets.boxes)
    label = torch.full((batch, 1), -1)
    return Assignment(label, label * 0, torch.zeros(batch, 1, 4), torch.zeros(batch, 1), targets)


SMALL = [(4, 4), (2, 2), (1, 1)]
RANGES = ((0.0, 300.0), (300.0, 600.0), (600.0, math.inf))


def a_batch(*, sizes=None, dtype=torch.float32):
    objects = [([[0.0, 0, 16, 16], [8, 8, 30, 30]], [1, 2]), ([[2.0, 2, 31, 31]], [0]), ([], [])]
    return targets_of(*objects, slots=8, sizes=sizes, dtype=dtype)


@pytest.mark.parametrize("classes", [1, 3, 20])
def test_uniform_logits_cost_ln_of_n_plus_1_a_block(classes):
    for chosen in ([0], [0, 1], [0, 1, 2]):
        maps, ranges = [SMALL[i] for i in chosen], [RANGES[i] for i in chosen]
        logits = torch.full((2, sum(h * w for h, w in maps), classes + 1), 0.7)
        targets = targets_of(([[0.0, 0, 16, 16]], [0]), ([], []), slots=8, dtype=torch.float32)
        loss = weak_segmentation_term(said(logits, maps, (32, 32), ranges), matched(targets))
        assert_close(loss.item(), len(chosen) * math.log(classes + 1), rtol=1e-6, atol=0)


def test_term_is_the_loop_twins_and_background_is_last():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 21, 4), a_batch()
    found = weak_segmentation_term(said(logits, SMALL, (32, 32), RANGES), matched(targets))
    labels = []
    for boxes, own, valid in zip(targets.boxes, targets.labels, targets.valid, strict=True):
        objects = boxes[valid].tolist(), own[valid].tolist()
        labels.append(reference.segmentation_labels(SMALL, (32, 32), RANGES, *objects))
    assert {label for row in labels for label in row} == {-1, 0, 1, 2}
    assert_close(found.item(), reference.weak_segmentation_loss(logits, labels, [16, 4, 1]), rtol=1e-5, atol=0)
    # the mean over all cells of all blocks, or the mean of the blocks, would be something else
    assert abs(found.item() - reference.weak_segmentation_loss(logits, labels, [21])) > 1.0


def test_term_is_worked_by_hand():
    # one cell, two classes, logits 2, 1, 0: e^2 / (e^2 + e + 1) = 0.6652. Its object is of class 0
    logits = torch.tensor([[[2.0, 1.0, 0.0]]])
    for boxes, expected in (([[0.0, 0, 8, 8]], 0.4076), ([[5.0, 0, 8, 8]], 2.4076)):
        targets = targets_of((boxes, [0]), slots=8, dtype=torch.float32)
        pred = said(logits, [(1, 1)], (8, 8), [(0.0, math.inf)])
        assert_close(weak_segmentation_term(pred, matched(targets)).item(), expected, rtol=0, atol=1e-4)


def test_padding_beyond_a_picture_takes_no_part():
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 3)
    own = [([[0.0, 0, 10, 10]], [1])]
    targets = targets_of(*own, slots=8, sizes=torch.tensor([[32, 16]]), dtype=torch.float32)
    wide = weak_segmentation_term(said(logits, [(2, 2)], (32, 32), RANGES[:1]), matched(targets))
    alone = targets_of(*own, slots=8, dtype=torch.float32)
    narrow = weak_segmentation_term(said(logits[:, ::2], [(2, 1)], (32, 16), RANGES[:1]), matched(alone))
    assert_close(wide, narrow)
    # a cell that reaches over the border counts by its half: 16 of 24 columns, and 8
    targets = targets_of(*own, slots=8, sizes=torch.tensor([[32, 24]]), dtype=torch.float32)
    part = weak_segmentation_term(said(logits, [(2, 2)], (32, 32), RANGES[:1]), matched(targets))
    entropy = [
        reference.softmax_entropy(row, label) for row, label in zip(logits[0].tolist(), [1, -1, -1, -1], strict=True)
    ]
    assert_close(part.item(), (entropy[0] + entropy[2]) / 3 + (entropy[1] + entropy[3]) / 6, rtol=1e-5, atol=0)


def test_batch_is_the_mean_of_its_pictures():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 21, 4), a_batch(sizes=torch.tensor([[32, 32], [20, 30], [8, 9]]))
    together = weak_segmentation_term(said(logits, SMALL, (32, 32), RANGES), matched(targets))
    alone = [
        weak_segmentation_term(said(logits[i : i + 1], SMALL, (32, 32), RANGES), matched(image_of(targets, i)))
        for i in range(3)
    ]
    assert_close(together, sum(alone) / 3)


def test_term_passes_gradcheck_and_works_in_half_precision():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True), a_batch()
    assert torch.autograd.gradcheck(
        lambda x: weak_segmentation_term(said(x, SMALL[1:], (32, 32), RANGES[1:]), matched(targets)), [logits]
    )
    logits = torch.randn(3, 21, 4)
    narrow = logits.detach().bfloat16()
    pred = said(narrow, SMALL, (32, 32), RANGES)
    pred.aside.update(said(narrow.float(), SMALL, (32, 32), RANGES).aside, segmentation=narrow)
    loss = weak_segmentation_term(pred, matched(targets))
    assert loss.dtype == torch.float32
    assert_close(loss, weak_segmentation_term(said(narrow.float(), SMALL, (32, 32), RANGES), matched(targets)))


def test_term_asks_for_what_the_body_must_say():
    nothing = torch.zeros(1, 1, 4)
    pred = Predictions(torch.zeros(1, 1, 1), nothing, nothing, Priors(nothing, (1,)))
    with pytest.raises(KeyError, match=r"the body must give segmentation aside; it gives \[\]"):
        weak_segmentation_term(pred, matched(targets_of(([], []), dtype=torch.float32)))


def test_launches_do_not_grow_with_batch_or_objects_and_nothing_waits():
    counts = []
    for batch, slots in ((1, 8), (8, 40)):
        cells = segmentation_cells(MAPS, (320, 320), DSSD320)
        targets = targets_of(*[([[0.0, 0, 30, 30]] * 5, [1] * 5)] * batch, slots=slots, dtype=torch.float32)
        with LaunchCounter() as counter:
            weak_segmentation_labels(*cells, targets)
        assert not counter.syncs
        counts.append(counter.launches)
    assert counts[0] == counts[1]
