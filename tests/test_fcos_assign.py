"""The assignment of points and their centre-ness; ``max_iou_assign`` has ``test_assigners.py``."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.models.detection.fcos import FCOS, FCOSHead

from detcore.assigners import centerness_target, fcos_assign
from detcore.priors import PointGenerator
from detcore.structures import BACKGROUND, IGNORE, Priors
from tests import reference
from tests.samples import FAST, image_of, no_hook, targets_of

STRIDES = (8, 16, 32, 64, 128)
RANGES = (64.0, 128.0, 256.0, 512.0, math.inf)
NEAR = (32.0, 64.0, 128.0, 256.0, math.inf)  # half of FCOS's: pictures of 256 pixels fill four levels


def points_at(*levels):
    """Points (x, y, stride), one list a level."""
    rows = [[x - s / 2, y - s / 2, x + s / 2, y + s / 2] for level in levels for x, y, s in level]
    return Priors(torch.tensor(rows, dtype=torch.float64)[None], tuple(len(level) for level in levels))


def pyramid(size, style="half"):
    maps = [(-(-size // s), -(-size // s)) for s in STRIDES]
    return PointGenerator(style=style)([torch.zeros(1, 1, *m) for m in maps], (size, size))


def labels_of(priors, *objects, **options):
    return fcos_assign(priors, targets_of((list(objects), list(range(len(objects))))), **options).labels[0].tolist()


# --- one rule at a time


@pytest.mark.parametrize(
    ("far", "closed", "expected"),
    [
        (63.0, True, [0, BACKGROUND]),
        (64.0, True, [0, 0]),  # both ends belong to the range
        (65.0, True, [BACKGROUND, 0]),
        (128.0, True, [BACKGROUND, 0]),
        (129.0, True, [BACKGROUND, BACKGROUND]),  # a third level's
        (64.0, False, [BACKGROUND, BACKGROUND]),  # torchvision drops it
        (65.0, False, [BACKGROUND, 0]),
    ],
)
def test_fcos_assign_gives_an_object_to_the_level_of_its_farthest_side(far, closed, expected):
    priors = points_at([(10, 10, 8)], [(10, 10, 16)], [])
    assert labels_of(priors, [5, 5, 10 + far, 15], ranges=[64.0, 128.0, math.inf], closed=closed) == expected


def test_first_and_last_range_are_open():
    priors = points_at([(10, 10, 8)], [(10, 10, 16)])
    assert labels_of(priors, [9.99, 9.99, 10.01, 10.01], ranges=[64.0, math.inf]) == [0, BACKGROUND]
    assert labels_of(priors, [0, 0, 1e5, 1e5], ranges=[64.0, math.inf]) == [BACKGROUND, 0]


@pytest.mark.parametrize("edge", [0, 1, 2, 3])
def test_point_on_an_edge_is_negative(edge):
    priors = points_at([(10, 10, 8)])
    box = [0.0, 0.0, 30.0, 30.0]
    assert labels_of(priors, box, ranges=[64.0]) == [0]
    box[edge] = 10.0
    assert labels_of(priors, box, ranges=[64.0]) == [BACKGROUND]


@pytest.mark.parametrize(
    ("second", "owner"),
    [
        ([0.0, 0, 59, 17], 0),  # 59 x 17 = 1003 > 1000
        ([0.0, 0, 25, 40], 0),  # 1000 again: the lower index
        ([0.0, 0, 37, 27], 1),  # 999
    ],
)
def test_fcos_assign_prefers_the_smaller_object(second, owner):
    # 1e8 - area in float32 has steps of 8: these three would tie
    priors = points_at([(5, 5, 8)])
    found = fcos_assign(priors, targets_of(([[0.0, 0, 50, 20], second], [7, 8])), ranges=[64.0])
    assert found.index.tolist() == [[owner]]
    assert found.labels.tolist() == [[7 + owner]]
    assert found.boxes[0, 0].tolist() == [[0.0, 0, 50, 20], second][owner]
    assert_close(found.iou.item(), 64 / [1000, 59 * 17 if second[2] == 59 else 999][owner])  # its square is [1, 9]^2


def test_smaller_object_of_another_level_does_not_count():
    priors = points_at([(20, 20, 8)], [(20, 20, 16)])
    assert labels_of(priors, [0, 0, 120, 120], [10, 10, 40, 40], ranges=[64.0, 128.0]) == [1, 0]


@pytest.mark.parametrize(
    ("x", "radius", "expected"),
    [
        (50.0, 1.5, 0),
        (61.9, 1.5, 0),
        (62.0, 1.5, BACKGROUND),  # 12 = 1.5 strides from the centre, strictly less is asked
        (38.0, 1.5, BACKGROUND),
        (62.0, 2.0, 0),
        (98.0, None, 0),
        (100.0, 20.0, BACKGROUND),  # the square is clipped to the object: its edge stays an edge
    ],
)
def test_centre_sampling_keeps_points_near_the_centre(x, radius, expected):
    priors = points_at([(x, 50, 8)])
    assert labels_of(priors, [0, 0, 100, 100], ranges=[128.0], radius=radius) == [expected]


def test_centre_sampling_counts_in_strides_of_the_points_level():
    priors = points_at([(70, 50, 8)], [(70, 50, 16)])
    assert labels_of(priors, [0, 0, 100, 100], ranges=[70.0, 128.0], radius=1.5) == [BACKGROUND, 0]


def test_padded_slots_own_nothing():
    priors = points_at([(5, 5, 8)])
    few, many = (targets_of(([[0.0, 0, 20, 20]], [3]), slots=slots) for slots in (1, 9))
    many.boxes[0, 4] = torch.tensor([1.0, 1, 9, 9])  # smaller, but not valid
    assert fcos_assign(priors, many, ranges=[64.0]).labels.equal(fcos_assign(priors, few, ranges=[64.0]).labels)
    nobody = fcos_assign(priors, targets_of(([], [])), ranges=[64.0])
    assert nobody.labels.tolist() == [[BACKGROUND]]
    assert nobody.boxes.equal(priors.boxes)
    assert nobody.iou.tolist() == [[0.0]]


def test_points_beyond_the_padded_image_are_ignored():
    priors = pyramid(64)
    whole = ([[2.0, 2, 62, 62]], [1])
    narrow = fcos_assign(priors, targets_of(whole, sizes=torch.tensor([[64, 20]]), dtype=torch.float32), ranges=RANGES)
    beyond = priors.cells[:, 0] >= 32  # 20 pixels are padded to 32
    assert narrow.ignored[0].equal(beyond)
    assert narrow.positive[0, ~beyond].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranges": [64.0, 128.0]}, r"increasing, one for each of 1 levels; got \[64.0, 128.0\]"),
        ({"ranges": [64.0], "radius": 0.0}, "radius must be None or > 0; got 0.0"),
    ],
)
def test_fcos_assign_names_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        fcos_assign(points_at([(5, 5, 8)]), targets_of(([], [])), **options)


def test_ranges_must_increase():
    with pytest.raises(ValueError, match="ranges must be increasing"):
        fcos_assign(points_at([(5, 5, 8)], [(5, 5, 16)]), targets_of(([], [])), ranges=[64.0, 64.0])


# --- against loops and torchvision


def on_a_grid(count, size, step=4):
    """Boxes whose corners are multiples of ``step``, so that points lie on edges and distances on ends of ranges."""
    corner = torch.randint(0, size // step - 2, (count, 2)) * step
    side = (torch.rand(count, 2) ** 2 * size / step).long().clamp(min=2) * step
    return torch.cat([corner, torch.minimum(corner + side, torch.tensor(size))], dim=-1).double()


@FAST
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(0, 9),
    radius=st.sampled_from([None, 1.5, 0.7]),
    closed=st.booleans(),
)
def test_fcos_assign_equals_its_loop(seed, count, radius, closed):
    torch.manual_seed(seed)
    priors = pyramid(96)
    boxes, labels = on_a_grid(count, 96), torch.randint(0, 5, (count,))
    if count > 1:
        boxes[1] = boxes[0]  # equal areas
    found = fcos_assign(priors, targets_of((boxes, labels), slots=9), ranges=NEAR, radius=radius, closed=closed)
    expected, index = reference.fcos_assign(
        priors.boxes[0].tolist(),
        priors.counts,
        boxes.tolist(),
        labels.tolist(),
        ranges=NEAR,
        radius=radius,
        closed=closed,
    )
    assert found.labels[0].tolist() == expected
    owner = torch.tensor(index)
    assert found.index[0][owner >= 0].equal(owner[owner >= 0])
    assert_close(found.boxes[0][owner >= 0], boxes[owner[owner >= 0]])


def test_batch_equals_its_images_one_by_one():
    priors = pyramid(96)
    targets = targets_of(*[(on_a_grid(n, 96), torch.arange(n)) for n in (3, 0, 7)], slots=8)
    many = fcos_assign(priors, targets, ranges=NEAR)
    assert many.positive.any(dim=1).tolist() == [True, False, True]
    for i in range(3):
        one = fcos_assign(priors, image_of(targets, i), ranges=NEAR)
        assert one.labels[0].equal(many.labels[i])
        assert_close(one.boxes[0], many.boxes[i])


def torchvision_matches(priors, boxes, radius, monkeypatch):
    """What torchvision's FCOS assigns to each point, which it hands to the loss of its head."""
    monkeypatch.setattr(FCOSHead, "compute_loss", lambda head, targets, outputs, anchors, matched: matched)
    model = FCOS.__new__(FCOS)
    model.__dict__.update(center_sampling_radius=radius, head=FCOSHead.__new__(FCOSHead))
    target = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)}
    return model.compute_loss([target], {}, [priors.boxes[0]], list(priors.counts))[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("radius", [1.5, 3.0, 100.0])
def test_fcos_assign_equals_torchvision(seed, radius, monkeypatch):
    torch.manual_seed(seed)
    priors = pyramid(320, style="torchvision")
    # corners in steps of 4: distances of exactly 64, and areas in steps of 16, which 1e8 - area tells apart
    boxes = on_a_grid(12, 320).float()
    theirs = torchvision_matches(priors, boxes, radius, monkeypatch)
    targets = targets_of((boxes, torch.arange(12)), dtype=torch.float32)
    ours = fcos_assign(priors, targets, ranges=RANGES, radius=radius, closed=False)
    assert (theirs >= 0).sum() > 20
    assert ours.labels[0].equal(theirs)
    assert not fcos_assign(priors, targets, ranges=RANGES, radius=radius + 1).labels.equal(ours.labels)


def test_torchvision_drops_the_point_exactly_64_from_a_side(monkeypatch):
    priors = pyramid(320, style="torchvision")
    box = torch.tensor([[40.0, 40, 168, 168]])  # 64 from (104, 104), a point of P3 alone
    theirs = torchvision_matches(priors, box, 1.5, monkeypatch)
    ours = fcos_assign(priors, targets_of((box, [0]), dtype=torch.float32), ranges=RANGES, radius=1.5)
    extra = (ours.labels[0] >= 0) & (theirs < 0)
    assert priors.boxes[0, extra].tolist() == [[100.0, 100, 108, 108]]


# --- centre-ness


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([0.0, 0, 20, 20], 1.0),  # the centre
        ([6.0, 0, 26, 20], 0.5),  # l, r = 4, 16; t = b
        ([6.0, 2, 26, 14], math.sqrt(4 / 16 * 4 / 8)),
        ([10.0, 0, 20, 20], 0.0),  # the edge
        ([11.0, 0, 20, 20], 0.0),  # outside
    ],
)
def test_centerness_target_by_hand(box, expected):
    priors = points_at([(10, 10, 8)]).boxes[0, 0]
    assert_close(centerness_target(priors, torch.tensor(box).double()).item(), expected)


def test_centerness_target_equals_its_loop():
    priors = pyramid(96)
    targets = targets_of((on_a_grid(9, 96), torch.arange(9)))
    match = fcos_assign(priors, targets, ranges=NEAR)
    found = centerness_target(priors.boxes.double(), match.boxes)[match.positive]
    rows = zip(priors.boxes[match.positive].tolist(), match.boxes[match.positive].tolist(), strict=True)
    assert_close(found, torch.tensor([reference.centerness(*row) for row in rows]).double())
    assert len(found) > 10


def test_centerness_of_negatives_is_finite():
    priors = pyramid(64)
    match = fcos_assign(priors, targets_of(([], []), dtype=torch.float32), ranges=RANGES)
    assert match.labels.ne(IGNORE).all()
    assert centerness_target(priors.boxes, match.boxes).eq(1).all()  # boxes are the points' own there


def test_ranges_are_refused_as_a_user_meets_it():
    with no_hook(), pytest.raises(ValueError, match="one for each of 5 levels"):
        fcos_assign(pyramid(64), targets_of(([], []), dtype=torch.float32), ranges=(64, 128))
