import math

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from detcore.evaluation.coco import CocoEvaluator, threshold_grid
from detcore.evaluation.curves import AREA_RANGES, CocoCurves, pycocotools_curves
from tests.pictures import pictures


def found(boxes, scores, labels=None):
    return {"boxes": boxes, "scores": scores, "labels": [0] * len(boxes) if labels is None else labels}


def truth(boxes, labels=None, **flags):
    return {"boxes": boxes, "labels": [0] * len(boxes) if labels is None else labels, **flags}


NOTHING = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}


def numbers(detections, targets, num_classes=1, **options):
    evaluator = CocoEvaluator(num_classes, **options)
    evaluator.update(detections, targets)
    return evaluator.compute()


# pycocotools 2.0.11, numpy 2.4, with truth and results from as_coco_json(*pictures(), range(1, 15), [1, 5, 9])
# written to two files:
#   gt = COCO("truth.json"); e = COCOeval(gt, gt.loadRes("results.json"), "bbox")
#   e.evaluate(); e.accumulate(); e.summarize(); e.stats.round(9)
OFFICIAL = {
    "AP": 0.196240573,
    "AP50": 0.411114223,
    "AP75": 0.161666007,
    "AP_small": 0.017617476,
    "AP_medium": 0.286186943,
    "AP_large": 0.7,
    "AR1": 0.138780664,
    "AR10": 0.551082251,
    "AR100": 0.575937951,
    "AR_small": 0.1,
    "AR_medium": 0.677441077,
    "AR_large": 0.9,
    # e.eval["precision"][i, :, :, 0, -1].mean() for i in (2, 4, 6, 8)
    "AP60": 0.362900065,
    "AP70": 0.259068054,
    "AP80": 0.063902819,
    "AP90": 0.004610611,
}


def test_coco_evaluator_gives_the_official_numbers():
    ours = numbers(*pictures(), num_classes=3)
    assert {name: round(ours[name], 9) for name in OFFICIAL} == OFFICIAL
    assert list(ours)[:3] == ["AP", "AP50", "AP55"]


def test_per_class_gives_the_official_numbers():
    evaluator = CocoEvaluator(3)
    evaluator.update(*pictures())
    # e.eval["precision"][..., 0, -1].mean((0, 1))
    np.testing.assert_allclose(evaluator.per_class().mean(0), [0.16940976, 0.2171547, 0.20215726], atol=1e-8)


def test_other_thresholds_and_limits_give_the_official_numbers():
    # e.params.iouThrs = np.linspace(.5, .9, 5); e.params.maxDets = [1, 3, 5]: means over what is > -1
    ours = numbers(*pictures(), num_classes=3, iou_thresholds=threshold_grid(0.5, 0.9, 0.1), max_detections=5)
    assert round(ours["AP"], 9) == 0.213358105
    assert round(ours["AP_small"], 9) == 0.020744932
    assert round(ours["AR5"], 9) == 0.570923521
    assert round(ours["AR1"], 9) == 0.157936508
    assert [name for name in ours if name.startswith("AP") and name[2:].isdigit()] == [
        "AP50", "AP60", "AP70", "AP80", "AP90",
    ]  # fmt: skip
    assert not {"AR10", "AR100"} & set(ours)


def test_one_threshold_is_enough():
    ours = numbers(*pictures(), num_classes=3, iou_thresholds=0.6)
    assert ours["AP"] == ours["AP60"]
    assert round(ours["AP"], 9) == OFFICIAL["AP60"]
    assert "AP50" not in ours
    assert "AP62.5" in numbers(*pictures(), num_classes=3, iou_thresholds=[0.5, 0.625])


def test_average_precision_by_hand():
    # Right, wrong, right, of 2 objects: precision 1 up to recall 0.5 (51 of 101 points), then 2/3.
    detections = [found([[0, 0, 10, 10], [50, 50, 60, 60], [20, 0, 30, 10]], [0.9, 0.8, 0.7])]
    ours = numbers(detections, [truth([[0, 0, 10, 10], [20, 0, 30, 10]])])
    assert ours["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert ours["AR1"] == pytest.approx(0.5)
    assert ours["AR100"] == pytest.approx(1)


def test_a_duplicate_is_a_failure_and_costs_by_its_rank():
    objects = [truth([[0, 0, 10, 10], [20, 0, 30, 10]])]
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10]]
    assert numbers([found(boxes, [0.9, 0.1, 0.8])], objects)["AP50"] == pytest.approx(1)
    assert numbers([found(boxes, [0.9, 0.8, 0.1])], objects)["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_the_targets_as_detections_are_perfect():
    _, targets = pictures()
    boxes = [{**t, "scores": np.ones(len(t["labels"]))} for t in targets]
    plain = [{"boxes": t["boxes"], "labels": t["labels"]} for t in targets]
    ours = numbers(boxes, plain, num_classes=3)
    assert {name: round(value, 9) for name, value in ours.items() if name != "AR1"} == {
        name: 1 for name in ours if name != "AR1"
    }
    assert ours["AR1"] < 1  # several objects of a class in one picture


def test_difficult_objects_are_ignored_by_ordinary_iou():
    # A small box inside a large difficult one: IoU 0.25, but all of the detection is covered.
    easy, hard = [100, 100, 120, 120], [0, 0, 20, 20]
    inside = found([[0, 0, 10, 10], easy], [0.9, 0.8])
    difficult = truth([hard, easy], ignore=[True, False])
    crowd = truth([hard, easy], iscrowd=[1, 0])
    assert numbers([inside], [difficult])["AP"] == pytest.approx(0.5)  # a failure before the success
    assert numbers([inside], [crowd])["AP"] == pytest.approx(1)  # in a crowd it counts neither way
    assert numbers([found([hard, easy], [0.9, 0.8])], [difficult])["AP"] == pytest.approx(1)
    assert numbers([found([hard, easy], [0.9, 0.8])], [truth([hard, easy])])["AP"] == pytest.approx(1)


def test_a_difficult_object_takes_one_detection_and_a_crowd_any_number():
    easy, hard = [100, 100, 120, 120], [0, 0, 20, 20]
    boxes = [found([hard, hard, easy], [0.9, 0.8, 0.7])]
    assert numbers(boxes, [truth([hard, easy], ignore=[True, False])])["AP"] == pytest.approx(0.5)
    assert numbers(boxes, [truth([hard, easy], iscrowd=[1, 0])])["AP"] == pytest.approx(1)


def test_difficult_objects_need_not_be_found():
    objects = truth([[0, 0, 10, 10], [50, 50, 70, 70]], ignore=[False, True])
    ours = numbers([found([[0, 0, 10, 10]], [0.5])], [objects])
    assert ours["AP"] == pytest.approx(1)
    assert ours["AR100"] == pytest.approx(1)


def test_area_of_the_target_decides_its_size():
    box = [[0, 0, 40, 40]]
    seen = [found(box, [0.9])]
    own = numbers(seen, [truth(box)])  # 1600 square pixels
    assert (own["AP_medium"], math.isnan(own["AP_small"])) == (pytest.approx(1), True)
    given = numbers(seen, [truth(box, area=[900.0])])  # the object's silhouette is smaller than its box
    assert (given["AP_small"], math.isnan(given["AP_medium"])) == (pytest.approx(1), True)


def test_no_detections_give_zero_and_no_objects_give_nan():
    none = numbers([NOTHING], [truth([[0, 0, 10, 10]])])
    assert none["AP"] == 0
    assert none["AR100"] == 0
    empty = numbers([found([[0, 0, 1, 1]], [0.3])], [NOTHING])
    assert all(math.isnan(value) for value in empty.values())


def test_a_class_without_objects_is_left_out_of_the_mean():
    detections = [found([[0, 0, 10, 10], [0, 0, 5, 5]], [0.9, 0.8], [0, 1])]
    evaluator = CocoEvaluator(3)
    evaluator.update(detections, [truth([[0, 0, 10, 10]])])
    assert evaluator.compute()["AP"] == pytest.approx(1)
    assert np.isnan(evaluator.per_class()[0]).tolist() == [False, True, True]


def test_one_update_equals_many():
    detections, targets = pictures()
    evaluator = CocoEvaluator(3)
    for i in range(0, 14, 4):
        evaluator.update(detections[i : i + 4], targets[i : i + 4])
    evaluator.update([], [])
    assert evaluator.compute() == numbers(detections, targets, num_classes=3)
    evaluator.reset()
    evaluator.update([found([[0, 0, 4, 4]], [1.0])], [truth([[0, 0, 4, 4]])])
    assert evaluator.compute()["AP"] == pytest.approx(1)


def test_update_after_compute_counts():
    evaluator = CocoEvaluator(1)
    evaluator.update([found([[0, 0, 4, 4]], [1.0])], [truth([[0, 0, 4, 4]])])
    before = evaluator.compute()["AR100"]
    evaluator.update([NOTHING], [truth([[0, 0, 4, 4]])])
    assert (before, evaluator.compute()["AR100"]) == (pytest.approx(1), pytest.approx(0.5))


def test_tensors_of_any_kind_are_taken():
    box = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    wrapped = tv_tensors.BoundingBoxes(box, format="XYXY", canvas_size=(16, 16))
    seen = {
        "boxes": box.clone().requires_grad_(),
        "scores": torch.ones(1, dtype=torch.bfloat16),
        "labels": torch.zeros(1, dtype=torch.int32),
    }
    target = {"boxes": wrapped, "labels": torch.tensor([0]), "ignore": torch.tensor([False])}
    assert numbers([seen], [target])["AP"] == pytest.approx(1)


def test_nothing_is_printed(capsys):
    numbers(*pictures(), num_classes=3)
    assert capsys.readouterr() == ("", "")


def test_inputs_are_left_as_they_were():
    detections, targets = pictures()
    numbers(detections, targets, num_classes=3)
    again, same = pictures()
    for mine, theirs in zip(detections + targets, again + same, strict=True):
        for key, values in theirs.items():
            np.testing.assert_array_equal(mine[key], values)


def test_without_sizes_the_other_numbers_stay():
    whole, less = numbers(*pictures(), num_classes=3), numbers(*pictures(), num_classes=3, by_size=False)
    assert less == {name: value for name, value in whole.items() if "_" not in name}
    assert "AP75" in less
    assert "AR100" in less


def test_another_engine_takes_the_place_of_pycocotools():
    asked = {}

    def engine(found, objects, **options):
        asked.update(options, boxes=len(found.boxes), objects=len(objects.boxes))
        shape = (len(options["iou_thresholds"]), options["num_classes"], 4, len(options["limits"]))
        precision = np.full((shape[0], 101, *shape[1:]), 0.25)
        precision[:, :, 1] = np.nan
        return CocoCurves(precision, np.full(shape, 0.75))

    ours = numbers(*pictures(), num_classes=3, iou_thresholds=[0.5, 0.75], engine=engine)
    assert (ours["AP"], ours["AP75"], ours["AR_small"]) == (0.25, 0.25, 0.75)
    assert asked == {
        "num_classes": 3, "iou_thresholds": (0.5, 0.75), "limits": [1, 10, 100], "area_ranges": AREA_RANGES,
        "boxes": 378, "objects": 42,
    }  # fmt: skip
    assert numbers(*pictures(), num_classes=3) == numbers(*pictures(), num_classes=3, engine=pycocotools_curves)


def test_threshold_grid_equals_that_of_pycocotools():
    from pycocotools.cocoeval import Params

    assert threshold_grid() == tuple(Params("bbox").iouThrs.tolist())
    assert threshold_grid(0.5, 0.5, 0.1) == (0.5,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0.9, 0.1), "0 < start"),
        ((0.5, 1.1, 0.1), "stop <= 1"),
        ((0.9, 0.5, 0.1), "start <= stop"),
        ((0.5, 0.9, 0.0), "step must be > 0"),
        ((0.5, 0.9, 0.3), "step must divide"),
    ],
)
def test_threshold_grid_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        threshold_grid(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be >= 1; got 0"),
        ({"max_detections": 0}, "max_detections must be >= 1"),
        ({"iou_thresholds": [0.5, 0.5]}, "ascending"),
        ({"iou_thresholds": [0.9, 0.5]}, "ascending"),
        ({"iou_thresholds": []}, "ascending"),
        ({"iou_thresholds": 0.0}, r"in \(0, 1\]"),
        ({"iou_thresholds": 50.0}, r"in \(0, 1\]"),
    ],
)
def test_coco_evaluator_names_a_wrong_option(options, message):
    with pytest.raises(ValueError, match=message):
        CocoEvaluator(**{"num_classes": 2, **options})


GOOD = found([[0, 0, 4, 4]], [0.5])
AIM = truth([[0, 0, 4, 4]])


@pytest.mark.parametrize(
    ("detections", "targets", "error", "message"),
    [
        ([GOOD], [], ValueError, "same order; got 1 and 0"),
        ([{"boxes": [[0, 0, 1, 1]], "labels": [0]}], [AIM], KeyError, r'detections\[0\] must have the key \\?"scores'),
        ([GOOD, GOOD], [AIM, {"boxes": [[0, 0, 1, 1]]}], KeyError, r'targets\[1\] must have the key \\?"labels'),
        ([GOOD | {"boxes": [0, 0, 4, 4]}], [AIM], ValueError, r"shape \(n, 4\); got \(4,\)"),
        ([GOOD | {"boxes": [], "labels": [], "scores": []}], [AIM], ValueError, r"needs torch.zeros\(0, 4\)"),
        ([GOOD | {"boxes": [[4, 0, 0, 4]]}], [AIM], ValueError, r"x1 <= x2.*got \[4.0, 0.0, 0.0, 4.0\] in row 0"),
        ([GOOD | {"boxes": [[0, 0, math.nan, 4]]}], [AIM], ValueError, "finite xyxy"),
        ([GOOD | {"labels": [0, 0]}], [AIM], ValueError, "one label a box"),
        ([GOOD | {"labels": [1]}], [AIM], ValueError, "num_classes = 1; got 1 in row 0"),
        ([GOOD | {"labels": [-1]}], [AIM], ValueError, "background has none"),
        ([GOOD | {"labels": [0.5]}], [AIM], ValueError, "must be whole"),
        ([GOOD | {"scores": [0.5, 0.5]}], [AIM], ValueError, r'"scores"\] must have shape \(1,\)'),
        ([GOOD | {"scores": [math.nan]}], [AIM], ValueError, "finite; got nan in row 0"),
        ([GOOD], [AIM | {"area": [1.0, 2.0]}], ValueError, r'"area"\] must have shape \(1,\)'),
        ([GOOD], [AIM | {"ignore": [True, False]}], ValueError, r'"ignore"\] must have shape'),
        ([GOOD | {"quality": [0.5]}, GOOD], [AIM, AIM], ValueError, r'"quality" in every image or in none.*\[1\]'),
    ],
)
def test_update_names_the_image_and_the_row(detections, targets, error, message):
    evaluator = CocoEvaluator(1)
    with pytest.raises(error, match=message) as caught:
        evaluator.update(detections, targets)
    assert "CocoEvaluator.update" in str(caught.value)


def test_compute_needs_an_image():
    evaluator = CocoEvaluator(1)
    evaluator.update([], [])
    with pytest.raises(ValueError, match=r"at least one image; got none. Call update\(\) first"):
        evaluator.compute()
