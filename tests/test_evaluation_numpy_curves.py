import dataclasses

import numpy as np
import pytest
from pycocotools import mask

from detcore.evaluation.coco import CocoEvaluator, threshold_grid
from detcore.evaluation.curves import pycocotools_curves
from detcore.evaluation.numpy_curves import numpy_curves
from detcore.evaluation.pooling import pool_detections, pool_targets, xywh
from tests.pictures import pictures

SIDES = [8, 16, 32, 33, 40, 96, 97, 120]  # 32 and 96 lie on the bounds of the area ranges
THRESHOLDS = [threshold_grid(), threshold_grid(0.5, 0.9, 0.1), (0.05, 1 / 3, 0.5), (0.75,), (0.5, 1.0)]
LIMITS = [[1, 10, 100], [1, 3], [7]]


def random_boxes(rng, count):
    corner = rng.integers(0, 12, (count, 2)) * 8
    return np.concatenate([corner, corner + rng.choice(SIDES, (count, 2))], axis=1).astype(float)


def random_target(rng, classes):
    count = rng.integers(0, 9)
    boxes = random_boxes(rng, count)
    beside = np.flatnonzero(rng.random(count) < 0.3)[1:]
    boxes[beside] = boxes[beside - 1] + [8, 0, 8, 0]  # a detection between the two overlaps both equally
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return {
        "boxes": boxes,
        "labels": rng.choice(classes, count),
        "area": area * rng.choice([1, 0.5], count),
        "iscrowd": rng.random(count) < 0.15,
        "ignore": rng.random(count) < 0.15,
    }


def random_detection(rng, target, classes):
    """Boxes near the objects and boxes anywhere, on a grid that makes equal IoUs, with scores of few values."""
    count = rng.choice([0, 5, 30, 260])
    boxes, labels = random_boxes(rng, count), rng.choice(classes, count)
    if len(target["boxes"]):
        near = rng.random(count) < 0.7
        owner = rng.integers(0, len(target["boxes"]), near.sum())
        boxes[near] = target["boxes"][owner]
        boxes[near, 2:] += rng.integers(0, 3, (near.sum(), 2)) * 4
        boxes[near, ::2] += rng.integers(0, 3, (near.sum(), 1)) * 4
        labels[near] = np.where(rng.random(near.sum()) < 0.8, target["labels"][owner], labels[near])
    if rng.random() < 0.5:
        boxes += rng.normal(0, 0.3, boxes.shape) * (rng.random(len(boxes)) < 0.5)[:, None]
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])  # some are empty
    scores = rng.integers(1, 12, count) / 12 if rng.random() < 0.7 else rng.random(count)
    known = np.isin(labels, classes)
    return {"boxes": boxes[known], "labels": labels[known], "scores": scores[known]}


def random_case(seed):
    """Detections and objects of 1 to 11 pictures; objects and detections each lack some of the classes."""
    rng = np.random.default_rng(seed)
    num_classes = int(rng.integers(1, 7))
    having, seeing = (rng.choice(num_classes, rng.integers(1, num_classes + 1)) for _ in range(2))
    targets = [random_target(rng, having) for _ in range(rng.integers(1, 12))]
    detections = [random_detection(rng, target, seeing) for target in targets]
    options = {
        "num_classes": num_classes,
        "iou_thresholds": THRESHOLDS[rng.integers(len(THRESHOLDS))],
        "limits": LIMITS[rng.integers(len(LIMITS))],
    }
    return detections, targets, options


def bits(values):
    return values.view(np.int64).tolist()


def assert_same_bits(detections, targets, options):
    found, objects = pool_detections(detections), pool_targets(targets)
    ours, theirs = (engine(found, objects, **options) for engine in (numpy_curves, pycocotools_curves))
    np.testing.assert_array_equal(ours.precision, theirs.precision)
    assert (bits(ours.precision), bits(ours.recall)) == (bits(theirs.precision), bits(theirs.recall))


@pytest.mark.parametrize("seed", range(60))
def test_curves_equal_those_of_pycocotools_to_the_last_bit(seed):
    assert_same_bits(*random_case(seed))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_a_thousand_cases_equal_pycocotools_to_the_last_bit(block):
    for seed in range(1000 + 100 * block, 1100 + 100 * block):
        assert_same_bits(*random_case(seed))


def test_the_random_cases_hold_what_they_are_for():
    seen = dict.fromkeys(("crowd", "tie", "limit", "bound", "alone", "unseen", "empty picture", "partial"), 0)
    for detections, targets, options in map(random_case, range(60)):
        found, objects = pool_detections(detections), pool_targets(targets)
        groups = np.unique(found.image * 9 + found.labels, return_counts=True)[1]
        curves = numpy_curves(found, objects, **options)
        seen["crowd"] += objects.crowd.any()
        seen["tie"] += len(np.unique(found.scores)) < len(found.scores)
        seen["limit"] += (groups > options["limits"][-1]).any()
        seen["bound"] += np.isin(objects.area, [32.0**2, 96.0**2]).any()
        seen["alone"] += len(set(found.labels) - set(objects.labels)) > 0
        seen["unseen"] += len(set(objects.labels) - set(found.labels)) > 0
        seen["empty picture"] += len(set(objects.image)) < objects.num_images
        seen["partial"] += ((curves.recall > 0) & (curves.recall < 1)).any()
    assert min(seen.values()) >= 5, seen


def boxes(count):
    corner = np.arange(count)[:, None] * [[3.0, 5.0]]
    return np.concatenate([corner, corner + 40], axis=1)


OBJECTS = {"boxes": boxes(3), "labels": [0, 1, 1]}
SEEN = {"boxes": boxes(4), "labels": [0, 1, 1, 1], "scores": [0.5, 0.4, 0.4, 0.9]}
NO_OBJECTS = {"boxes": np.zeros((0, 4)), "labels": []}
NOTHING = NO_OBJECTS | {"scores": []}
OPTIONS = {"num_classes": 3, "iou_thresholds": (0.5, 0.75), "limits": [1, 10]}


@pytest.mark.parametrize(
    ("detections", "targets"),
    [
        ([NOTHING], [NO_OBJECTS]),
        ([NOTHING], [OBJECTS]),
        ([SEEN], [NO_OBJECTS]),
        ([SEEN, NOTHING], [NO_OBJECTS, OBJECTS]),
        ([SEEN], [OBJECTS | {"ignore": [True] * 3}]),
        ([SEEN], [OBJECTS | {"iscrowd": [1] * 3}]),
        ([SEEN], [OBJECTS | {"boxes": boxes(3) + 500}]),
        ([SEEN | {"boxes": np.zeros((4, 4))}], [OBJECTS | {"boxes": np.zeros((3, 4))}]),
    ],
    ids=["nothing", "no detections", "no objects", "other pictures", "ignored", "crowds", "far", "points"],
)
def test_curves_where_something_is_missing(detections, targets):
    assert_same_bits(detections, targets, OPTIONS)


def test_a_crowd_that_is_not_ignored_may_be_found_by_many():
    found = pool_detections([SEEN])
    objects = dataclasses.replace(pool_targets([OBJECTS | {"iscrowd": [0, 1, 1]}]), ignore=np.zeros(3, dtype=bool))
    ours, theirs = (engine(found, objects, **OPTIONS) for engine in (numpy_curves, pycocotools_curves))
    assert ours.recall[0, 1, 0, 1] == 1.5  # three of two
    assert (bits(ours.precision), bits(ours.recall)) == (bits(theirs.precision), bits(theirs.recall))


def test_an_ignored_object_of_larger_iou_does_not_win_over_a_free_one():
    box = np.array([[0.0, 0.0, 40.0, 40.0]])
    objects = {"boxes": np.concatenate([box, box * 0.9]), "labels": [0, 0], "ignore": [True, False]}
    seen = {"boxes": box, "labels": [0], "scores": [0.5]}
    curves = numpy_curves(pool_detections([seen]), pool_targets([objects]), **OPTIONS)
    assert curves.recall[:, 0, 0, 0].tolist() == [1, 1]
    assert_same_bits([seen], [objects], OPTIONS)


def test_of_equal_ious_the_last_object_wins():
    # So the first detection takes what the second needs: it has an IoU of 2 / 3 with the other object.
    objects = {"boxes": [[0, 0, 10, 10], [2, 0, 12, 10]], "labels": [0, 0]}
    seen = {"boxes": [[1, 0, 11, 10], [2, 0, 12, 10]], "labels": [0, 0], "scores": [0.9, 0.8]}
    curves = numpy_curves(pool_detections([seen]), pool_targets([objects]), **OPTIONS)
    assert curves.recall[:, 0, 0, 1].tolist() == [1, 0.5]
    assert_same_bits([seen], [objects], OPTIONS)


def test_ious_that_differ_in_the_last_bits_are_no_tie():
    # The narrower object goes first; the wider one is too wide for the second detection at 0.75.
    objects = {"boxes": [[0, 0, 40, 40], [0, 0, 40 * (1 + 2.0**-51), 40]], "labels": [0, 0]}
    seen = {"boxes": [[0, 0, 40, 40], [0, 0, 30, 40]], "labels": [0, 0], "scores": [0.9, 0.8]}
    curves = numpy_curves(pool_detections([seen]), pool_targets([objects]), **OPTIONS)
    assert curves.recall[:, 0, 0, 1].tolist() == [1, 0.5]
    assert_same_bits([seen], [objects], OPTIONS)


def test_a_threshold_of_one_forgives_rounding():
    objects = {"boxes": [[0, 0, 40, 40], [50, 0, 90, 40]], "labels": [0, 0]}
    seen = {"boxes": [[0, 0, 40 * (1 + 2.0**-40), 40], [50, 0, 90.001, 40]], "labels": [0, 0], "scores": [0.9, 0.8]}
    options = OPTIONS | {"iou_thresholds": (1.0,)}
    curves = numpy_curves(pool_detections([seen]), pool_targets([objects]), **options)
    assert curves.recall[0, 0, 0, 1] == 0.5
    assert_same_bits([seen], [objects], options)


def test_an_iou_is_that_of_pycocotools_to_the_last_bit():
    # Each picture's IoU is a threshold, so one bit less is one match less.
    rng = np.random.default_rng(0)
    corner, side = rng.random((2, 200, 2)) * 100  # left of the picture's edge a side is longer than its far end
    ours = np.concatenate([corner - 100, corner - 100 + side + 1], axis=1)
    truth = ours + rng.random((200, 4))
    overlap = np.diag(mask.iou(xywh(ours), xywh(truth), [0] * 200))
    detections = [{"boxes": box[None], "labels": [0], "scores": [0.5]} for box in ours]
    targets = [{"boxes": box[None], "labels": [0]} for box in truth]
    assert_same_bits(detections, targets, OPTIONS | {"iou_thresholds": np.unique(overlap).tolist()})


def test_pairs_may_come_in_many_parts(monkeypatch):
    monkeypatch.setattr("detcore.evaluation.matching.PAIRS_AT_ONCE", 7)
    assert_same_bits(*pictures(), {**OPTIONS, "iou_thresholds": threshold_grid()})


@pytest.mark.parametrize("options", [{}, {"iou_thresholds": 0.6}, {"max_detections": 4}, {"by_size": False}])
def test_the_evaluator_gives_the_same_numbers_with_both_engines(options):
    both = []
    for engine in ("numpy", "pycocotools"):
        evaluator = CocoEvaluator(3, engine=engine, **options)
        evaluator.update(*pictures())
        both.append((list(evaluator.compute().items()), evaluator.per_class().tolist()))
    assert both[0] == both[1]


def test_numpy_is_the_default_and_a_wrong_engine_is_named():
    assert CocoEvaluator(1).engine is numpy_curves
    assert CocoEvaluator(1, engine="pycocotools").engine is pycocotools_curves
    with pytest.raises(ValueError, match=r"engine must be one of \['numpy', 'pycocotools'\].*got 'fast'"):
        CocoEvaluator(1, engine="fast")
