import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from detcore.assigners import max_iou_assign
from detcore.boxes import pairwise_iou
from detcore.priors import AnchorGenerator
from detcore.structures import BACKGROUND, IGNORE, Priors, Targets
from tests import reference
from tests.samples import image_of, no_hook, some_boxes, some_priors, targets_of

RULES = ["object", "prior", "off"]


def priors_of(boxes):
    return Priors(torch.tensor(boxes, dtype=torch.float64).reshape(1, -1, 4), (len(boxes),))


def bar(x, width):
    """``width`` pixels of a strip one pixel high: IoU becomes overlap of intervals."""
    return [float(x), 0.0, float(x + width), 1.0]


# E0.1: five anchors and four objects, all ten pixels long but the last; shifted by s they have IoU (10 - s) / (10 + s).
ANCHORS = [bar(0, 10), bar(3, 10), bar(100, 10), bar(200, 10), bar(108.2, 10)]
OBJECTS = [
    bar(2, 10),  # anchor 0 by 8/12 = .67, anchor 1 by 9/11 = .82
    bar(-6, 10),  # anchor 0 by 4/16 = .25, its best, though anchor 0 prefers object 0
    bar(104, 10),  # anchor 2 by 6/14 = .43, its best; anchor 4 by 5.8/14.2 = .41, between the thresholds
    bar(900, 10),  # disjoint from all
]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("object", [1, 0, 2, BACKGROUND, IGNORE]),
        ("prior", [0, 0, 2, BACKGROUND, IGNORE]),
        ("off", [0, 0, IGNORE, BACKGROUND, IGNORE]),
    ],
)
def test_max_iou_assign_on_five_anchors_and_four_objects(rule, expected):
    found = max_iou_assign(priors_of(ANCHORS), targets_of((OBJECTS, [0, 1, 2, 3])), force_match=rule)
    assert found.labels.tolist() == [expected]
    # the IoU is that with the object the prior owns now
    assert_close(found.iou[0, 0].item(), 4 / 16 if rule == "object" else 8 / 12)


def test_without_the_guard_the_object_out_of_reach_captures_every_prior():
    labels, _ = reference.max_iou_assign(ANCHORS, OBJECTS, [0, 1, 2, 3], guard=False)
    assert labels == [3, 3, 3, 3, 3]
    overlap = box_iou(torch.tensor(OBJECTS), torch.tensor(ANCHORS))
    theirs = Matcher(0.5, 0.4, allow_low_quality_matches=True)(overlap)
    assert (theirs >= 0).all()  # a negative and an ignored anchor became positive


@pytest.mark.parametrize(
    ("shift", "label"),
    [(3, 7), (4, IGNORE), (5, BACKGROUND)],  # 7/13 = .54, 6/14 = .43, 5/15 = .33
)
def test_max_iou_assign_thresholds(shift, label):
    found = max_iou_assign(priors_of([bar(0, 10)]), targets_of(([bar(shift, 10)], [7])), force_match="off")
    assert found.labels.tolist() == [[label]]


def test_max_iou_assign_thresholds_are_inclusive_below():
    # IoU exactly 1/2 and exactly 2/5: positive, and ignored (not negative)
    priors = priors_of([bar(0, 10), bar(100, 10)])
    found = max_iou_assign(priors, targets_of(([bar(0, 5), bar(100, 4)], [1, 2])), force_match="off", negative_iou=0.4)
    assert found.labels.tolist() == [[1, IGNORE]]


def test_max_iou_assign_forces_every_tied_prior():
    # two priors overlap the object by 4/16 each, a third by less
    priors = priors_of([bar(0, 10), bar(12, 10), bar(13, 10)])
    found = max_iou_assign(priors, targets_of(([bar(6, 10)], [3])))
    assert found.labels.tolist() == [[3, 3, BACKGROUND]]


def random_case(seed, count=40, objects=6):
    """Priors and objects on a coarse grid, so that ties and conflicts happen."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 12, (count + objects, 2), generator=generator) * 4.0
    sides = torch.randint(1, 8, (count + objects, 2), generator=generator) * 4.0
    boxes = torch.cat([corner, corner + sides], dim=-1).double()
    return boxes[:count], boxes[count:], torch.randint(0, 5, (objects,), generator=generator)


def assert_equals_loop(found, priors, boxes, labels, **options):
    expected, index = reference.max_iou_assign(priors.tolist(), boxes.tolist(), labels.tolist(), **options)
    assert found.labels[0].tolist() == expected
    for n, j in enumerate(index):
        if j >= 0:
            assert found.index[0, n] == j
            assert found.boxes[0, n].tolist() == boxes[j].tolist()
            assert_close(found.iou[0, n].item(), reference.iou(priors[n].tolist(), boxes[j].tolist()))
        else:
            assert found.boxes[0, n].tolist() == priors[n].tolist()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("objects", [0, 1, 6, 15])
def test_max_iou_assign_equals_its_loop(rule, objects):
    for seed in range(8):
        priors, boxes, labels = random_case(seed, objects=objects)
        found = max_iou_assign(Priors(priors[None], (40,)), targets_of((boxes, labels)), force_match=rule)
        assert_equals_loop(found, priors, boxes, labels, force_match=rule)


def test_random_cases_tell_the_rules_apart():
    different = 0
    for seed in range(8):
        priors, boxes, labels = random_case(seed, objects=15)
        results = [
            reference.max_iou_assign(priors.tolist(), boxes.tolist(), labels.tolist(), force_match=rule)[1]
            for rule in RULES
        ]
        different += results[0] != results[1] and results[1] != results[2]
    assert different >= 6


@pytest.mark.parametrize("objects", [1, 6, 15])
def test_prior_rule_equals_torchvision_where_every_object_is_reached(objects):
    compared = 0
    for seed in range(20):
        priors, boxes, labels = random_case(seed, objects=objects)
        overlap = box_iou(boxes, priors)
        if (overlap.amax(1) == 0).any():
            continue  # torchvision has no guard
        compared += 1
        theirs = Matcher(0.5, 0.4, allow_low_quality_matches=True)(overlap)
        expected = torch.where(theirs >= 0, labels[theirs.clamp(min=0)], theirs)
        found = max_iou_assign(Priors(priors[None], (40,)), targets_of((boxes, labels)), force_match="prior")
        assert found.labels[0].tolist() == expected.tolist()
    assert compared > 5


def test_rules_disagree_rarely_on_real_anchors():
    # E0.2: one anchor in 3069 on a 128 x 128 picture with overlapping objects
    maps = [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    anchors = AnchorGenerator()([torch.zeros(1, 1, *size) for size in maps], (128, 128))
    assert anchors.boxes.shape[1] == 3069
    generator = torch.Generator().manual_seed(10)  # of 12 draws: 1 to 25 anchors differ, here the fewest
    corner = torch.randint(0, 80, (8, 2), generator=generator)
    sides = torch.randint(8, 48, (8, 2), generator=generator)
    targets = targets_of((torch.cat([corner, corner + sides], dim=-1), torch.arange(8)), dtype=torch.float32)
    by_object, by_prior = (max_iou_assign(anchors, targets, force_match=rule) for rule in ("object", "prior"))
    assert (by_object.labels != by_prior.labels).sum() == 1
    assert by_object.positive.equal(by_prior.positive)


def test_image_without_objects_makes_every_prior_negative():
    priors = some_priors()
    found = max_iou_assign(priors, targets_of(([], []), slots=8))
    assert found.negative.all()
    assert found.boxes.equal(priors.boxes)
    assert found.iou.eq(0).all()


@pytest.mark.parametrize("degenerate", [[5.0, 5, 5, 9], [9.0, 9, 5, 5], [500.0, 500, 510, 510]])
def test_object_that_no_prior_can_reach_owns_nothing(degenerate):
    priors = some_priors()
    boxes = priors.boxes[0, :2] + 1
    alone = max_iou_assign(priors, targets_of((boxes, [0, 1])))
    beside = max_iou_assign(priors, targets_of((torch.cat([boxes, torch.tensor([degenerate])]), [0, 1, 2])))
    assert beside.labels.equal(alone.labels)
    only = max_iou_assign(priors, targets_of(([degenerate], [2])))
    assert only.negative.all()


def test_one_pixel_object_gets_its_best_prior():
    priors = some_priors(60)
    inside = priors.boxes[0, 7].clone()
    inside[2:] = inside[:2] + 1.0
    found = max_iou_assign(priors, targets_of(([inside.tolist()], [3])))
    best = pairwise_iou(priors.boxes[0], inside[None]).squeeze(1)
    assert found.positive[0].nonzero().flatten().tolist() == (best == best.max()).nonzero().flatten().tolist()


def two_images():
    first, second = random_case(0), random_case(1, objects=3)
    priors = Priors(first[0][None], (40,))
    return priors, targets_of((first[1], first[2]), (second[1], second[2]), ([], []))


@pytest.mark.parametrize("rule", RULES)
def test_batch_equals_its_images_one_by_one(rule):
    priors, targets = two_images()
    batch = max_iou_assign(priors, targets, force_match=rule)
    for i in range(3):
        one = max_iou_assign(priors, image_of(targets, i), force_match=rule)
        assert batch.labels[i].equal(one.labels[0])
        assert batch.boxes[i].equal(one.boxes[0])
        assert batch.iou[i].equal(one.iou[0])


@pytest.mark.parametrize("rule", RULES)
def test_padding_slots_change_nothing(rule):
    priors, boxes, labels = random_case(3)
    priors = Priors(priors[None], (40,))
    few, many = (max_iou_assign(priors, targets_of((boxes, labels), slots=n), force_match=rule) for n in (6, 24))
    assert few.labels.equal(many.labels)
    assert few.boxes.equal(many.boxes)
    assert few.iou.equal(many.iou)


def test_what_lies_in_invalid_slots_is_never_looked_at():
    priors, boxes, labels = random_case(3)
    priors, targets = Priors(priors[None], (40,)), targets_of((boxes, labels), slots=10)
    litter = torch.where(targets.valid[..., None], targets.boxes, priors.boxes[:, :10])
    found = max_iou_assign(priors, Targets(litter, targets.labels.clamp(min=4), targets.valid))
    clean = max_iou_assign(priors, Targets(targets.boxes, targets.labels.clamp(min=4), targets.valid))
    assert found.labels.equal(clean.labels)


def test_priors_of_each_image_are_its_own():
    # as after a refining head: the same objects, other priors
    first, second = some_boxes(30), some_boxes(30)
    boxes = some_boxes(3)
    both = max_iou_assign(
        Priors(torch.stack([first, second]), (30,)), targets_of((boxes, [0, 1, 2]), (boxes, [0, 1, 2]))
    )
    for i, own in enumerate((first, second)):
        one = max_iou_assign(Priors(own[None], (30,)), targets_of((boxes, [0, 1, 2])))
        assert both.labels[i].equal(one.labels[0])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), rule=st.sampled_from(RULES))
def test_assignment_follows_a_permutation_of_the_objects(seed, rule):
    torch.manual_seed(seed)
    priors, boxes, labels = some_priors(30), some_boxes(5), torch.arange(5)
    order = torch.randperm(5)
    found = max_iou_assign(priors, targets_of((boxes, labels)), force_match=rule)
    permuted = max_iou_assign(priors, targets_of((boxes[order], labels[order])), force_match=rule)
    # without ties and without a prior that is the best of two objects, the order of objects is nobody's business
    best = pairwise_iou(priors.boxes[0], boxes).argmax(0)
    if rule != "object" or len(set(best.tolist())) == 5:
        assert permuted.labels.equal(found.labels)
        assert permuted.boxes.equal(found.boxes)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_every_reachable_object_gets_a_prior_unless_a_later_one_takes_it(seed):
    torch.manual_seed(seed)
    priors, boxes = some_priors(30), some_boxes(5)
    found = max_iou_assign(priors, targets_of((boxes, torch.arange(5))))
    overlap = pairwise_iou(priors.boxes[0], boxes)
    for j in range(5):
        best = overlap[:, j].argmax()
        if overlap[best, j] > 0:
            assert found.labels[0, best] >= 0
            owner = int(found.index[0, best])
            assert owner == j or (owner > j and overlap[:, owner].argmax() == best)


def test_everything_ignored():
    priors = priors_of([bar(0, 10), bar(100, 10)])
    found = max_iou_assign(priors, targets_of(([bar(4, 10), bar(104, 10)], [0, 1])), force_match="off")
    assert found.ignored.all()
    assert found.num_positive == 1


# --- padding beyond an image


def grid_anchors(style, size):
    maps = [(-(-size[0] // s), -(-size[1] // s)) for s in (8, 16, 32, 64, 128)]
    generator = AnchorGenerator(style=style, base=2.0)
    return generator([torch.zeros(1, 1, *m) for m in maps], size)


def test_priors_beyond_the_padded_image_are_ignored_and_capture_nothing():
    boxes = priors_of([[20.0, 20, 40, 40], [60.0, 20, 80, 40], [66.0, 20, 86, 40]]).boxes
    priors = Priors(boxes, (3,), torch.tensor([[32.0, 32], [64, 32], [64, 32]]))
    targets = targets_of(([[62.0, 20, 82, 40]], [5]), sizes=torch.tensor([[50, 33]]))  # 33 px are padded to 64
    assert max_iou_assign(priors, targets).labels.tolist() == [[BACKGROUND, IGNORE, IGNORE]]
    wider = targets_of(([[62.0, 20, 82, 40]], [5]), sizes=torch.tensor([[50, 65]]))
    assert max_iou_assign(priors, wider).labels.tolist() == [[BACKGROUND, 5, 5]]
    low = targets_of(([[62.0, 20, 82, 40]], [5]), sizes=torch.tensor([[32, 65]]))  # the rows begin at 32
    assert max_iou_assign(priors, low).ignored.all()
    assert max_iou_assign(Priors(boxes, (3,)), targets).labels.tolist() == [[BACKGROUND, 5, 5]]


@pytest.mark.parametrize("style", ["exact", "mmdet0", "torchvision"])
def test_image_that_fills_the_batch_loses_no_prior(style):
    # 320: P7 has 3 cells for 2.5 strides; the third one's anchors count, they are in the image's own map
    priors = grid_anchors(style, (320, 320))
    objects = ([[10.0, 10, 60, 60]], [1])
    whole = targets_of(objects, dtype=torch.float32)
    sized = targets_of(objects, dtype=torch.float32, sizes=torch.tensor([[320, 320]]))
    assert max_iou_assign(priors, sized).labels.equal(max_iou_assign(priors, whole).labels)


@pytest.mark.parametrize("style", ["exact", "mmdet0"])
@pytest.mark.parametrize("size", [(90, 200), (33, 320), (161, 65)])
def test_smaller_image_in_a_batch_keeps_exactly_the_priors_it_has_alone(style, size):
    padded = tuple(-(-side // 32) * 32 for side in size)
    alone, batched = grid_anchors(style, padded), grid_anchors(style, (192, 320))
    targets = targets_of(([[5.0, 5, 30, 30]], [1]), dtype=torch.float32, sizes=torch.tensor([size]))
    one, many = max_iou_assign(alone, targets), max_iou_assign(batched, targets)
    kept = many.labels[0] != IGNORE
    assert (one.labels[0] != IGNORE).sum() == kept.sum()
    assert_close(batched.boxes[0][kept], alone.boxes[0][one.labels[0] != IGNORE], rtol=0, atol=0)
    assert many.labels[0][kept].tolist() == one.labels[0][one.labels[0] != IGNORE].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive_iou": 0.3}, "0 <= negative_iou <= positive_iou <= 1; got 0.4 and 0.3"),
        ({"negative_iou": -0.1}, "got -0.1 and 0.5"),
        ({"positive_iou": 1.5}, "got 0.4 and 1.5"),
        ({"force_match": "both"}, "force_match must be .*; got 'both'"),
    ],
)
def test_max_iou_assign_names_what_is_wrong(options, message):
    with no_hook(), pytest.raises(ValueError, match=message):
        max_iou_assign(some_priors(4), targets_of(([], [])), **options)
