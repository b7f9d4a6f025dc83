import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detcore.evaluation.voc import VocEvaluator, eleven_point_ap, precision_recall_area
from tests import reference
from tests.pictures import pictures


def evaluate(detections, targets, num_classes=1, **options):
    evaluator = VocEvaluator(num_classes, **options)
    evaluator.update(detections, targets)
    return evaluator


def voc_twin(detections, targets, label, threshold, ignored):
    """The devkit's loop for one class: success (1), failure (0) or neither, best score first; objects to find."""
    rows = [
        (-score, image, row)
        for image, found in enumerate(detections)
        for row, (score, k) in enumerate(zip(found["scores"], found["labels"], strict=True))
        if k == label
    ]
    used, verdicts = set(), []
    for _, image, row in sorted(rows, key=lambda r: r[0]):  # stable: equal scores keep their order
        best, which = -math.inf, None
        for j, (box, k) in enumerate(zip(targets[image]["boxes"], targets[image]["labels"], strict=True)):
            overlap = reference.iou(detections[image]["boxes"][row], box)
            if k == label and overlap > best:
                best, which = overlap, j
        if which is None or best < threshold:
            verdicts.append(0)
        elif ignored[image][which]:
            continue
        else:
            verdicts.append(int((image, which) not in used))
            used.add((image, which))
    wanted = sum(
        k == label and not skip
        for t, flags in zip(targets, ignored, strict=True)
        for k, skip in zip(t["labels"], flags, strict=True)
    )
    return verdicts, wanted


def eleven_points(verdicts, wanted):
    best = []
    for k in range(11):
        precisions = [
            sum(verdicts[: i + 1]) / (i + 1) for i in range(len(verdicts)) if 10 * sum(verdicts[: i + 1]) >= k * wanted
        ]
        best.append(max(precisions, default=0.0))
    return sum(best) / 11


def area_under(verdicts, wanted):
    total = 0.0
    for i in range(len(verdicts)):
        if verdicts[i]:
            total += max(sum(verdicts[: j + 1]) / (j + 1) for j in range(i, len(verdicts))) / wanted
    return total


@pytest.mark.parametrize(("interpolation", "average"), [("11point", eleven_points), ("area", area_under)])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_voc_evaluator_equals_the_loop(interpolation, average, threshold):
    detections, targets = pictures()
    targets = [t | {"ignore": t["labels"] * 0 + (np.arange(len(t["labels"])) % 4 == 2)} for t in targets]
    ignored = [(t["ignore"] + t["iscrowd"]) > 0 for t in targets]
    ours = evaluate(detections, targets, 3, iou_threshold=threshold, interpolation=interpolation)
    twins = [average(*voc_twin(detections, targets, k, threshold, ignored)) for k in range(3)]
    np.testing.assert_allclose(ours.per_class()[0], twins, rtol=0, atol=1e-12)
    assert ours.compute()["AP"] == pytest.approx(sum(twins) / 3)
    assert 0.05 < sum(twins) / 3 < 0.95


def test_eleven_points_compare_recalls_as_integers():
    # Three successes of ten objects reach recall 0.3 exactly: four points (0, .1, .2, .3) of eleven.
    correct = np.array([True, True, True])
    assert eleven_point_ap(correct, 10) == pytest.approx(4 / 11)
    recall = np.cumsum(correct) / 10
    naive = np.mean([1.0 if (recall >= t).any() else 0.0 for t in np.arange(0, 1.1, 0.1)])
    assert naive == pytest.approx(3 / 11)  # the mistake that the integers avoid


@pytest.mark.parametrize("wanted", range(1, 31))
def test_eleven_points_are_reached_at_every_exact_recall(wanted):
    correct = np.full(wanted, True)
    for found in range(wanted + 1):
        reached = sum(10 * found >= k * wanted for k in range(11))
        expected = reached / 11 if found else 0.0
        assert eleven_point_ap(correct[:found], wanted) == pytest.approx(expected)


@pytest.mark.parametrize("found", range(11))
def test_every_tenth_of_ten_objects_is_a_point(found):
    # Ten objects in ten pictures; the detector finds some and is wrong after that. Recall is exactly found / 10.
    target = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
    seen = [
        {"boxes": [[0, 0, 10, 10] if i < found else [50, 50, 60, 60]], "labels": [0], "scores": [1 - i / 100]}
        for i in range(10)
    ]
    value = evaluate(seen, [target] * 10, interpolation="11point").compute()["AP"]
    assert value == pytest.approx((found + 1) / 11 if found else 0)


def test_float_recalls_would_lose_points():
    """What the integers are for: recall 3/10, 6/10 and 7/10 fail the grid's 0.30000000000000004 and its like."""
    lost = [k for k in range(11) if k / 10 < np.arange(0, 1.1, 0.1)[k]]
    assert lost == [3, 6, 7]
    for k in lost:
        assert eleven_point_ap(np.full(k, True), 10) == pytest.approx((k + 1) / 11)


def test_both_rules_by_hand():
    correct = np.array([True, False, True, False])  # precisions 1, 1/2, 2/3, 1/2 of 4 objects
    assert precision_recall_area(correct, 4) == pytest.approx(1 / 4 * 1 + 1 / 4 * 2 / 3)
    # recall .25 covers 0, .1, .2 at precision 1; recall .5 covers .3, .4, .5 at 2/3
    assert eleven_point_ap(correct, 4) == pytest.approx((3 * 1 + 3 * 2 / 3) / 11)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(verdicts=st.lists(st.booleans(), min_size=1, max_size=40), missed=st.integers(0, 10))
def test_eleven_points_bound_the_area(verdicts, missed):
    # The envelope falls with recall, so the area between two of the points lies between their heights:
    # sum of points 1..10 <= 10 area <= sum of points 0..9.
    correct, wanted = np.array(verdicts), max(1, sum(verdicts) + missed)
    eleven, area = 11 * eleven_point_ap(correct, wanted), precision_recall_area(correct, wanted)
    precision = np.cumsum(correct) / np.arange(1, len(correct) + 1)
    first = precision.max()
    last = precision[np.cumsum(correct) == wanted].max(initial=0.0)  # at recall 1
    assert eleven - first - 1e-9 <= 10 * area <= eleven - last + 1e-9


def test_average_precision_without_objects_is_nan():
    none = np.zeros(0, dtype=bool)
    assert math.isnan(eleven_point_ap(none, 0))
    assert math.isnan(precision_recall_area(none, 0))
    assert eleven_point_ap(none, 3) == precision_recall_area(none, 3) == 0


@pytest.mark.parametrize("interpolation", ["area", "11point"])
def test_the_targets_as_detections_are_perfect(interpolation):
    _, targets = pictures()
    boxes = [{**t, "scores": np.ones(len(t["labels"]))} for t in targets]
    assert evaluate(boxes, targets, 3, interpolation=interpolation).compute()["AP"] == pytest.approx(1)


def test_difficult_objects_count_neither_way():
    hard, easy = [0, 0, 10, 10], [50, 50, 60, 60]
    target = {"boxes": [hard, easy], "labels": [0, 0], "ignore": [True, False]}
    # Unlike a COCO object, a difficult one takes any number of detections.
    seen = {"boxes": [hard, hard, easy], "labels": [0, 0, 0], "scores": [0.9, 0.8, 0.7]}
    assert evaluate([seen], [target]).compute()["AP"] == 1
    plain = {"boxes": [hard, easy], "labels": [0, 0]}
    assert evaluate([seen], [plain]).compute()["AP"] == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)


def test_a_detection_is_compared_with_its_best_object_only():
    # The second box fits the first object best (0.9), which is taken; the second object (0.6) would do.
    objects = {"boxes": [[0, 0, 10, 10], [0, 4, 10, 10]], "labels": [0, 0]}
    seen = {"boxes": [[0, 0, 10, 10], [0, 1, 10, 10]], "labels": [0, 0], "scores": [0.9, 0.8]}
    assert evaluate([seen], [objects]).compute()["AP"] == pytest.approx(0.5)


def test_iou_at_the_threshold_is_a_success():
    target = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
    half = {"boxes": [[0, 0, 10, 5]], "labels": [0], "scores": [0.9]}
    assert evaluate([half], [target]).compute()["AP50"] == 1
    less = {"boxes": [[0, 0, 10, 4.999]], "labels": [0], "scores": [0.9]}
    assert evaluate([less], [target]).compute()["AP50"] == 0


def test_inclusive_sides_are_one_pixel_longer():
    # Pixels 0..9 by 0..9 and 0..9 by 0..4: 50 / 100 pixels inclusive, 36 / 81 otherwise.
    target = {"boxes": [[0, 0, 9, 9]], "labels": [0]}
    seen = {"boxes": [[0, 0, 9, 4]], "labels": [0], "scores": [0.9]}
    assert evaluate([seen], [target], inclusive=True).compute()["AP50"] == 1
    assert evaluate([seen], [target]).compute()["AP50"] == 0


def test_several_thresholds_are_averaged():
    target = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
    seen = {"boxes": [[0, 0, 10, 7.5]], "labels": [0], "scores": [0.9]}
    result = evaluate([seen], [target], iou_threshold=[0.5, 0.6, 0.7, 0.8, 0.9]).compute()
    assert result == {"AP": pytest.approx(0.6), "AP50": 1, "AP60": 1, "AP70": 1, "AP80": 0, "AP90": 0}


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("interpolation", ["area", "11point"])
def test_an_iou_of_the_threshold_itself_passes(threshold, interpolation):
    target = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
    seen = {"boxes": [[0, 0, 10, round(10 * threshold)]], "labels": [0], "scores": [0.9]}
    ious = (0.5, 0.6, 0.7, 0.8, 0.9)
    result = evaluate([seen], [target], iou_threshold=ious, interpolation=interpolation).compute()
    assert [result[f"AP{100 * t:g}"] for t in ious] == [float(t <= threshold) for t in ious]


def test_images_are_counted_on_over_updates():
    detections, targets = pictures()
    evaluator = VocEvaluator(3)
    for image in zip(detections, targets, strict=True):
        evaluator.update([image[0]], [image[1]])
    assert evaluator.compute() == evaluate(detections, targets, 3).compute()
    evaluator.reset()
    with pytest.raises(ValueError, match=r"VocEvaluator.compute: needs at least one image"):
        evaluator.compute()


def test_classes_without_objects_are_left_out_of_the_mean():
    empty = {"boxes": np.zeros((0, 4)), "labels": []}
    seen = {"boxes": [[0, 0, 1, 1]], "labels": [1], "scores": [0.5]}
    target = {"boxes": [[0, 0, 1, 1]], "labels": [1]}
    evaluator = evaluate([seen, seen], [target, empty], 3)
    assert evaluator.compute()["AP"] == 1
    assert np.isnan(evaluator.per_class()[0]).tolist() == [True, False, True]
    assert math.isnan(evaluate([seen], [empty], 3).compute()["AP"])


def test_voc_evaluator_names_what_is_wrong():
    with pytest.raises(ValueError, match="IoU thresholds must be"):
        VocEvaluator(2, iou_threshold=0.0)
    with pytest.raises(ValueError, match="num_classes must be >= 1"):
        VocEvaluator(0)
    with pytest.raises(ValueError, match=r"VocEvaluator.update: .*got 1 and 0"):
        VocEvaluator(2).update([{"boxes": [[0, 0, 1, 1]], "labels": [1], "scores": [0.5]}], [])
