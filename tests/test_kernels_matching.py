"""The local matchers give what the plain ones give, to the last bit, and look at few pairs."""

import math
from dataclasses import fields, replace

import pytest
import torch

from detcore import kernels
from detcore.assigners import fcos_assign, max_iou_assign
from detcore.default_boxes import LAYOUTS, DefaultBoxGenerator
from detcore.kernels import _grid, _pairs, disable, matching, point_matching, ssd_matching
from detcore.kernels._grid import grid_of
from detcore.models import get_model
from detcore.priors import AnchorGenerator, PointGenerator
from detcore.ssd_assigner import ssd_assign
from detcore.structures import IGNORE, Priors, Targets
from tests.samples import targets_of
from tests.zoo import EVERY_NETWORK


@pytest.fixture(autouse=True)
def however_few(monkeypatch):
    """Kernels are tried on small batches too, which do not need them."""
    monkeypatch.setattr(_pairs, "_WORTH", 1)


STRIDES = (8, 16, 32, 64, 128)
RANGES = (24.0, 48.0, 96.0, 192.0, math.inf)


def assert_same(found, wanted):
    """Every field of two assignments, type and last bit."""
    for name in (f.name for f in fields(wanted) if f.name != "targets"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert ours.dtype == theirs.dtype, name
        assert ours.is_contiguous() == theirs.is_contiguous(), name
        assert ours.equal(theirs), f"{name} at {(ours != theirs).nonzero()[:5].tolist()}"
    assert found.targets is wanted.targets


def maps_of_size(size, strides=STRIDES):
    return [torch.zeros(1, 1, -(-size[0] // stride), -(-size[1] // stride)) for stride in strides]


def anchors(size, **options):
    return AnchorGenerator(**options)(maps_of_size(size), size)


def points(size, **options):
    return PointGenerator(**options)(maps_of_size(size), size)


def default_boxes(name, clip=None, size=None):
    """Those of a layout; on another size than its own the maps are as a network would make them."""
    layout = LAYOUTS[name]
    if size is None:
        maps, size = [(side, side) for side in layout.maps], (layout.size, layout.size)
    else:
        maps = [tuple(max(1, round(s * side / layout.size)) for s in size) for side in layout.maps]
    return DefaultBoxGenerator(layout, clip=clip)([torch.zeros(1, 1, *m) for m in maps], size)


# --- objects of every kind


def rand(count, low, high):
    return low + (high - low) * torch.rand(count, 2)


def common(size, count):
    corner = torch.rand(count, 2) * torch.tensor(size).flip(0)
    return torch.cat([corner, corner + 4 + torch.rand(count, 2) ** 2 * max(size)], dim=1)


def one_pixel(size, count):
    corner = (torch.rand(count, 2) * torch.tensor(size).flip(0)).floor()
    return torch.cat([corner, corner + 1], dim=1)


def outside(size, count):
    """To the left of and above the picture, right of and below it; some touch it, some are out of all reach."""
    side = 10 + 60 * torch.rand(count, 2)
    corner = torch.where(torch.rand(count, 2) < 0.5, -1.3 * side, torch.tensor(size).flip(0) + rand(count, -9, 200))
    return torch.cat([corner, corner + side], dim=1)


def larger(size, count):
    return torch.cat([rand(count, -300, 10), torch.tensor(size).flip(0) + rand(count, -10, 300)], dim=1)


def identical(size, count):
    return common(size, 1).repeat(count, 1)


def whole_pixels(size, count):
    """Corners in steps of 4: overlaps that tie, and that are exactly a threshold."""
    corner = torch.randint(-2, max(size) // 4, (count, 2)) * 4.0
    return torch.cat([corner, corner + torch.randint(1, 24, (count, 2)) * 4.0], dim=1)


def without_area(size, count):
    boxes = common(size, count)
    boxes[:, 2:] = torch.where(torch.rand(count, 2) < 0.5, boxes[:, :2], boxes[:, :2] - 5)
    return boxes


def needles(size, count):
    boxes = common(size, count)
    boxes[:, 2] = boxes[:, 0] + 0.3
    return boxes


KINDS = (common, one_pixel, outside, larger, identical, whole_pixels, without_area, needles)


def shuffled(size, count):
    """Some of every kind."""
    boxes = torch.cat([kind(size, count // len(KINDS) + 1) for kind in KINDS])
    return boxes[torch.randperm(len(boxes))[:count]]


def batch_of(size, kind, counts, *, dtype=torch.float32, sizes=None):
    """As many objects an image as ``counts``; padded slots hold boxes that nobody may look at."""
    images = [(kind(size, n), torch.randint(0, 9, (n,))) for n in counts]
    targets = targets_of(*images, slots=max(8, *counts), dtype=dtype, sizes=sizes)
    litter = torch.rand_like(targets.boxes) * 50
    litter[..., 2:] += litter[..., :2]
    boxes = torch.where(targets.valid[..., None], targets.boxes, litter)
    # any order of valid slots, not only padding at the end
    order = torch.rand(targets.valid.shape).argsort(dim=1)
    return Targets(
        boxes.gather(1, order[..., None].expand(-1, -1, 4)),
        targets.labels.gather(1, order),
        targets.valid.gather(1, order),
        sizes,
    )


def as_double(priors):
    return Priors(priors.boxes.double(), priors.counts, priors.cells.double(), priors.maps)


COUNTS = (50, 0, 4)
EVERY_KIND = pytest.mark.parametrize("kind", [*KINDS, shuffled], ids=lambda kind: kind.__name__)
FORCE = pytest.mark.parametrize("force_match", ["object", "prior", "off"])
RULE = pytest.mark.parametrize("rule", ["override", "bipartite"])


def both(fast, public, priors, targets, **options):
    """The kernel, made sure that it is what the public function calls, and the plain form."""
    with disable():
        wanted = public(priors, targets, **options)
    found = fast(priors, targets, **options)
    assert_same(found, wanted)
    return wanted


# --- anchors


@EVERY_KIND
@FORCE
def test_anchors_with_objects_of_every_kind(force_match, kind):
    size, style = (64, 96), {"object": "exact", "prior": "torchvision", "off": "mmdet0"}[force_match]
    priors, targets = anchors(size, style=style), batch_of(size, kind, COUNTS)
    assert matching.max_iou_applies(priors, targets, force_match=force_match)
    both(matching.max_iou_assign, max_iou_assign, priors, targets, force_match=force_match)


@FORCE
@pytest.mark.parametrize("seed", range(10))
def test_anchors_with_random_settings(force_match, seed):
    torch.manual_seed(seed)
    size = tuple((torch.randint(1, 6, (2,)) * 32).tolist())
    options = {"base": 1 + 3 * float(torch.rand(())), "style": ("exact", "mmdet0", "torchvision")[seed % 3]}
    if seed % 4 == 0:
        options |= {"scales": [1.0], "ratios": [1.0]}
    sizes = torch.stack([torch.randint(1, side + 1, (3,)) for side in size], dim=1) if seed % 2 else None
    priors, dtype = anchors(size, **options), torch.float32
    if seed % 5 == 0:
        priors, dtype = as_double(priors), torch.float64
    targets = batch_of(size, shuffled, torch.randint(0, 20, (3,)).tolist(), dtype=dtype, sizes=sizes)
    negative, positive = (0.1 + 0.8 * torch.rand(2)).sort().values.tolist()
    wanted = both(
        matching.max_iou_assign,
        max_iou_assign,
        priors,
        targets,
        force_match=force_match,
        negative_iou=negative,
        positive_iou=positive,
        divisor=(32, 1, 128)[seed % 3],
    )
    assert wanted.negative.any()


@FORCE
def test_overlaps_of_exactly_the_thresholds(force_match):
    # squares of 40 pixels at every 8; a part of 20 x 40 overlaps by 1/2, of 16 x 40 by 2/5, and many tie
    priors = AnchorGenerator([8], scales=[1.25], ratios=[1.0])([torch.zeros(1, 1, 16, 16)], (128, 128))
    boxes = torch.tensor(
        [[20.0, 20, 40, 60], [60, 60, 76, 100], [60, 20, 100, 36], [20, 60, 36, 76], [84, 84, 124, 124]]
    )
    targets = targets_of((boxes, range(5)), (boxes[[1, 1, 0]], [5, 6, 7]), dtype=torch.float32)
    wanted = both(matching.max_iou_assign, max_iou_assign, priors, targets, force_match=force_match)
    assert {0.5, 1.0} <= set(wanted.iou[0].unique().tolist())
    assert wanted.ignored[1].any() == (force_match == "off")


def test_object_that_two_force_where_neither_is_enough():
    # with "prior" the index at a weakly forced prior is the best of all objects, in reach of their own windows or not
    priors = anchors((128, 128))
    boxes = torch.tensor([[30.0, 30, 34, 34], [30, 30, 35, 34], [30, 31, 34, 35], [10, 10, 13, 13]])
    targets = targets_of((boxes, range(4)), dtype=torch.float32)
    one, other = (
        both(matching.max_iou_assign, max_iou_assign, priors, targets, force_match=rule) for rule in ("prior", "object")
    )
    assert not one.index.equal(other.index)
    assert 0 < one.iou.max() < 0.4


# --- default boxes


@EVERY_KIND
@RULE
def test_default_boxes_with_objects_of_every_kind(rule, kind):
    for name, clip in (("ssd300_coco", "sizes"), ("refinedet320", "cxcywh")):
        priors, targets = default_boxes(name, clip, (96, 64)), batch_of((96, 64), kind, COUNTS)
        assert ssd_matching.ssd_applies(priors, targets, rule=rule)
        both(ssd_matching.ssd_assign, ssd_assign, priors, targets, rule=rule)


@RULE
@pytest.mark.parametrize("seed", range(10))
def test_default_boxes_with_random_settings(rule, seed):
    torch.manual_seed(seed)
    size = tuple((torch.randint(1, 6, (2,)) * 32).tolist())
    name = ("ssd300_voc", "fssd512_coco", "dssd513", "refinedet512")[seed % 4]
    sizes = torch.stack([torch.randint(1, side + 1, (3,)) for side in size], dim=1) if seed % 3 else None
    priors, dtype = default_boxes(name, (None, "sizes", "cxcywh")[seed % 3], size), torch.float32
    if seed % 5 == 0:
        priors, dtype = as_double(priors), torch.float64
    targets = batch_of(size, shuffled, torch.randint(0, 30, (3,)).tolist(), dtype=dtype, sizes=sizes)
    options = {"rule": rule, "positive_iou": 0.1 + 0.8 * float(torch.rand(())), "divisor": (32, 1)[seed % 2]}
    both(ssd_matching.ssd_assign, ssd_assign, priors, targets, **options)


@RULE
@pytest.mark.parametrize("clip", [None, "sizes", "cxcywh"])
def test_default_boxes_of_300_pixels(rule, clip):
    priors = default_boxes("ssd300_voc", clip)  # "cxcywh" moves the last column and row of the 10 x 10 map
    targets = batch_of((300, 300), shuffled, (24, 5))
    assert ssd_matching.ssd_applies(priors, targets, rule=rule)
    both(ssd_matching.ssd_assign, ssd_assign, priors, targets, rule=rule)


def test_bipartite_sends_away_and_asks_again():
    # twelve objects want one default box, and whoever is sent away displaces another elsewhere
    priors = default_boxes("ssd300_voc", size=(96, 96))
    box = torch.tensor([30.0, 30, 52, 50])
    near = box + torch.randint(0, 3, (12, 1)) + torch.tensor([0.0, 0, 1, 1]) * torch.randint(0, 2, (12, 1))
    targets = targets_of((near, range(12)), (near[:3], range(3)), dtype=torch.float32)
    wanted = both(ssd_matching.ssd_assign, ssd_assign, priors, targets, rule="bipartite", positive_iou=0.9)
    assert wanted.labels[0][wanted.positive[0]].sort().values.tolist() == list(range(12))


def test_default_boxes_that_clipping_moved():
    # with "cxcywh" the last column of the 10 x 10 map stands 4 pixels nearer than its step
    priors = default_boxes("ssd300_voc", "cxcywh")
    corner = priors.boxes[0, 38 * 38 * 4 + 19 * 19 * 6 + 99 * 6]  # the square of the last cell
    assert corner.tolist() == [244.5, 244.5, 355.5, 355.5]
    shift = torch.arange(-60.0, 60.0)
    for axis in (0, 1):
        boxes = corner + shift[:, None] * torch.tensor([1.0 - axis, axis] * 2)
        targets = Targets(boxes[:, None], torch.zeros(120, 1, dtype=torch.int64), torch.ones(120, 1, dtype=torch.bool))
        both(ssd_matching.ssd_assign, ssd_assign, priors, targets)


# --- points


@EVERY_KIND
@pytest.mark.parametrize("radius", [None, 1.5])
def test_points_with_objects_of_every_kind(radius, kind):
    for style in ("half", "torchvision"):
        priors, targets = points((96, 160), style=style), batch_of((96, 160), kind, COUNTS)
        options = {"ranges": RANGES, "radius": radius, "closed": style == "half"}
        assert point_matching.fcos_applies(priors, targets, **options)
        both(point_matching.fcos_assign, fcos_assign, priors, targets, **options)


@pytest.mark.parametrize("seed", range(20))
def test_points_with_random_settings(seed):
    torch.manual_seed(seed)
    size = tuple((torch.randint(1, 6, (2,)) * 32).tolist())
    sizes = torch.stack([torch.randint(1, side + 1, (3,)) for side in size], dim=1) if seed % 2 else None
    priors, dtype = points(size), torch.float32
    if seed % 5 == 0:
        priors, dtype = as_double(priors), torch.float64
    kind = (shuffled, whole_pixels)[seed % 2]
    targets = batch_of(size, kind, torch.randint(0, 20, (3,)).tolist(), dtype=dtype, sizes=sizes)
    options = {
        "ranges": (torch.rand(5).sort().values * 128).tolist() if seed % 3 else RANGES,
        "radius": (None, 0.5, 3.0)[seed % 3],
        "closed": seed % 4 < 2,
        "divisor": (32, 1)[seed % 2],
    }
    both(point_matching.fcos_assign, fcos_assign, priors, targets, **options)


def test_points_on_edges_and_ends_of_ranges():
    priors = points((64, 64), style="torchvision")
    boxes = torch.tensor([[0.0, 0, 48, 48], [8, 8, 32, 32], [8, 8, 32, 32], [16, 0, 64, 24]])
    targets = targets_of((boxes, range(4)), dtype=torch.float32)
    found = [
        both(point_matching.fcos_assign, fcos_assign, priors, targets, ranges=RANGES, closed=closed)
        for closed in (True, False)
    ]
    assert not found[0].labels.equal(found[1].labels)


# --- padding


@pytest.mark.parametrize(
    ("fast", "public", "make"),
    [
        (matching.max_iou_assign, max_iou_assign, anchors),
        (ssd_matching.ssd_assign, ssd_assign, lambda size: default_boxes("ssd300_voc", size=size)),
        (point_matching.fcos_assign, fcos_assign, points),
    ],
    ids=["anchors", "default boxes", "points"],
)
@pytest.mark.parametrize("seed", range(3))
def test_images_of_different_sizes(fast, public, make, seed):
    torch.manual_seed(seed)
    size, sizes = (128, 160), torch.tensor([[128, 160], [33, 150], [128, 32], [1, 1]])
    targets = batch_of(size, shuffled, (9, 14, 8, 3), sizes=sizes)
    wanted = both(fast, public, make(size), targets)
    assert wanted.ignored[1:].any(dim=1).all()
    assert wanted.positive[0].any()
    whole = both(fast, public, make(size), replace(targets, sizes=sizes[:1].expand(4, -1)))
    assert not whole.labels.equal(wanted.labels)
    # without cells nobody knows what lies beyond
    both(fast, public, replace(make(size), cells=None), targets)


def test_object_that_only_touches_priors_owns_none():
    priors = AnchorGenerator([8], scales=[1.0], ratios=[1.0])([torch.zeros(1, 1, 8, 8)], (64, 64))
    assert priors.boxes[0, -1].tolist() == [40, 40, 72, 72]
    for box in ([72.0, 10, 80, 30], [10.0, -40, 20, -16]):
        targets = targets_of(([box], [1]), dtype=torch.float32)
        for force_match in ("object", "prior"):
            wanted = both(matching.max_iou_assign, max_iou_assign, priors, targets, force_match=force_match)
            assert wanted.negative.all()
        for rule in ("override", "bipartite"):
            assert both(ssd_matching.ssd_assign, ssd_assign, priors, targets, rule=rule).negative.all()


def test_object_best_served_beyond_the_padding():
    # no cell of the finest level is in the picture: the object has its best prior on the next
    priors = anchors((64, 64))
    cells = priors.cells.clone()
    cells[: priors.counts[0]] += 1000
    targets = targets_of(([[2.0, 2, 12, 12]], [1]), dtype=torch.float32, sizes=torch.tensor([[64, 64]]))
    wanted = both(matching.max_iou_assign, max_iou_assign, replace(priors, cells=cells), targets)
    assert wanted.ignored.sum() == priors.counts[0]
    assert wanted.positive.any()


@pytest.mark.parametrize("rule", ["object", "prior", "override", "bipartite", "points"])
def test_batch_without_objects(rule):
    targets = batch_of((64, 96), common, (0, 0), sizes=torch.tensor([[64, 96], [32, 40]]))
    if rule == "points":
        wanted = both(point_matching.fcos_assign, fcos_assign, points((64, 96)), targets)
    elif rule in ("object", "prior"):
        wanted = both(matching.max_iou_assign, max_iou_assign, anchors((64, 96)), targets, force_match=rule)
    else:
        priors = default_boxes("ssd300_voc", size=(64, 96))
        wanted = both(ssd_matching.ssd_assign, ssd_assign, priors, targets, rule=rule)
    assert not wanted.positive.any()
    assert wanted.ignored[1].any()


# --- which priors are on a grid


def test_grid_is_read_off_the_boxes():
    grid = grid_of(anchors((96, 160), scales=[1.0], ratios=[1.0, 4.0]))
    assert grid.count[:, 0].tolist() == [[20, 20, 10, 10, 5, 5, 3, 3, 2, 2], [12, 12, 6, 6, 3, 3, 2, 2, 1, 1]]
    assert grid.side[:, 0, :2].tolist() == [[32, 16], [32, 64]]
    assert grid.step[:, 0, ::2].tolist() == [[8, 16, 32, 64, 128], [8, 16, 32, 64, 1]]  # one row: any step
    assert grid.first.tolist()[:4] == [0, 1, 480, 481]


ONE_LEVEL = AnchorGenerator([8], scales=[1.0], ratios=[1.0])([torch.zeros(1, 1, 8, 8)], (64, 64))


@pytest.mark.parametrize(
    "priors",
    [
        replace(anchors((64, 64)), maps=None),
        replace(anchors((64, 64)), maps=((8, 8),)),  # not a map a level
        replace(anchors((64, 64)), maps=((8, 7), (4, 4), (2, 2), (1, 1), (1, 1))),  # not the priors' maps
        replace(anchors((64, 96)), maps=((12, 8), (6, 4), (3, 2), (2, 1), (1, 1))),  # rows taken for columns
        replace(anchors((64, 64)), boxes=anchors((64, 64)).boxes.repeat(2, 1, 1)),  # each image's own
        replace(anchors((64, 64)), boxes=anchors((64, 64)).boxes + torch.rand(1, 774, 4)),  # moved
        replace(anchors((64, 64)), boxes=anchors((64, 64)).boxes ** 2 / 99),  # columns and rows, but no steps
        replace(ONE_LEVEL, boxes=ONE_LEVEL.boxes + torch.tensor([500.0, 0, 500, 0]) * (ONE_LEVEL.cells[:, :1] == 56)),
        replace(ONE_LEVEL, boxes=ONE_LEVEL.boxes.flip(1)),  # from the last row and column to the first
        replace(anchors((64, 64)), cells=torch.rand(774, 2)),
        replace(anchors((64, 64)), cells=-anchors((64, 64)).cells),
        default_boxes("ssd300_voc", "corners"),
    ],
    ids=lambda priors: "",
)
def test_other_priors_have_no_grid_and_are_matched_plainly(priors):
    assert grid_of(priors) is None
    targets = batch_of((64, 64), common, [3] * len(priors.boxes))
    assert not matching.max_iou_applies(priors, targets)
    assert not ssd_matching.ssd_applies(priors, targets)
    assert max_iou_assign(priors, targets).positive.any()


def test_grid_is_worked_out_once_for_equal_priors_and_never_for_others(monkeypatch):
    _grid._known.clear()
    first, again, other = (anchors((64, 96), style=style) for style in ("exact", "exact", "mmdet0"))
    grid = grid_of(first)
    assert grid_of(again) is grid
    assert not grid_of(other).centre.equal(grid.centre)
    assert grid_of(again).centre.equal(grid.centre)
    again.boxes[0, 7] += 1  # in place
    assert grid_of(again) is None
    assert grid_of(first).centre.equal(grid.centre)
    first.cells[7] += 1
    assert grid_of(first) is None


def test_few_shapes_are_remembered():
    _grid._known.clear()
    for columns in range(1, 40):
        grid_of(anchors((64, 8 * columns)))
    assert len(_grid._known) == _grid._MOST_KNOWN


# --- when


PRIORS = anchors((64, 64))
TARGETS = batch_of((64, 64), common, (3, 2))


@pytest.mark.parametrize(
    ("priors", "targets", "options"),
    [
        (PRIORS, TARGETS, {"negative_iou": 0.01}),
        (PRIORS, TARGETS, {"negative_iou": 0.6}),
        (PRIORS, TARGETS, {"force_match": "both"}),
        (as_double(PRIORS), TARGETS, {}),
        (replace(PRIORS, boxes=PRIORS.boxes.half()), replace(TARGETS, boxes=TARGETS.boxes.half()), {}),
        (PRIORS, replace(TARGETS, boxes=TARGETS.boxes.clone().requires_grad_()), {}),
        (PRIORS, replace(TARGETS, boxes=TARGETS.boxes * math.nan), {}),
        (PRIORS, replace(TARGETS, boxes=TARGETS.boxes * math.inf), {}),
        (PRIORS, replace(TARGETS, labels=TARGETS.labels.int()), {}),
        (PRIORS, TARGETS.to("meta"), {}),
    ],
)
def test_what_the_local_matcher_does_not_take(priors, targets, options):
    assert matching.max_iou_applies(PRIORS, TARGETS)
    assert not matching.max_iou_applies(priors, targets, **options)


def test_small_batches_are_matched_plainly(monkeypatch):
    pairs = TARGETS.labels.numel() * PRIORS.boxes.shape[1]
    monkeypatch.setattr(_pairs, "_WORTH", pairs)
    assert matching.max_iou_applies(PRIORS, TARGETS)
    monkeypatch.setattr(_pairs, "_WORTH", pairs + 1)
    assert not matching.max_iou_applies(PRIORS, TARGETS)


def test_public_functions_call_the_local_matchers_unless_told_otherwise(monkeypatch):
    called = []
    monkeypatch.setitem(kernels._switch, "on", True)
    own = _pairs.Answer.own
    monkeypatch.setattr(_pairs.Answer, "own", lambda answer, at: called.append(own(answer, at)))
    calls = [
        lambda: max_iou_assign(PRIORS, TARGETS),
        lambda: ssd_assign(PRIORS, TARGETS, rule="bipartite"),
        lambda: fcos_assign(points((64, 64)), TARGETS, ranges=RANGES),
    ]
    for count, call in enumerate(calls, start=1):
        with disable():
            call()
        call()
        assert len(called) == count


def test_wrong_options_are_refused_with_priors_on_a_grid_too():
    with pytest.raises(ValueError, match="thresholds must satisfy"):
        max_iou_assign(PRIORS, TARGETS, positive_iou=0.3)
    with pytest.raises(ValueError, match="positive_iou must be in"):
        ssd_assign(PRIORS, TARGETS, positive_iou=1.5)
    with pytest.raises(ValueError, match="ranges must be increasing"):
        fcos_assign(points((64, 64)), TARGETS, ranges=[1.0, 1.0, 2.0, 3.0, 4.0])
    with pytest.raises(ValueError, match="radius must be"):
        fcos_assign(points((64, 64)), TARGETS, radius=0.0)


@EVERY_NETWORK
def test_every_detector_matches_alike(name):
    detector = get_model(name, num_classes=9, backbone="tiny")
    pred = detector.predict(torch.rand(2, 3, 96, 96))
    targets = batch_of((96, 96), shuffled, (14, 5), sizes=torch.tensor([[96, 96], [60, 90]]))
    with disable():
        wanted = detector.match(pred.priors, targets)
    assert_same(detector.match(pred.priors, targets), wanted)
    assert IGNORE in wanted.labels[1]


# --- few pairs


def pairs_of(priors, targets, monkeypatch, module, match, **options):
    seen = []

    def counted(*args, listed=_grid.listed):
        seen.append(listed(*args))
        return seen[-1]

    monkeypatch.setattr(module, "listed", counted)
    match(priors, targets, **options)
    monkeypatch.undo()
    return len(seen[0][0])


def test_few_pairs_are_looked_at(monkeypatch):
    size, count = (800, 1344), 50
    boxes = torch.cat([common(size, count - 5).clamp(max=800), one_pixel(size, 5)])
    targets = targets_of((boxes, torch.zeros(count)), dtype=torch.float32)
    total = len(boxes) * anchors(size).boxes.shape[1]
    assert 0 < pairs_of(anchors(size), targets, monkeypatch, _pairs, matching.max_iou_assign) < total / 200
    total = len(boxes) * points(size).boxes.shape[1]
    options = {"ranges": (64.0, 128.0, 256.0, 512.0, math.inf)}
    near = pairs_of(points(size), targets, monkeypatch, point_matching, point_matching.fcos_assign, **options)
    assert 0 < near < total / 20
