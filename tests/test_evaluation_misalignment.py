import json
import math

import numpy as np
import pytest

from detcore.evaluation.coco import CocoEvaluator
from detcore.evaluation.misalignment import diagnose
from detcore.evaluation.ranking import suppress, with_true_iou
from tests.pictures import pictures


@pytest.fixture(scope="module")
def report():
    candidates, targets = pictures()
    candidates = [c | {"class_scores": c["scores"] ** 2, "quality": 1 - c["scores"]} for c in candidates]
    return diagnose(suppress(candidates), targets, 3, candidates=candidates, bootstrap=20)


def test_diagnose_correlates_every_kind_and_set(report):
    assert list(report.correlations) == [
        f"{kind}, {name}" for kind in ("scores", "class_scores", "quality") for name in ("all boxes", "IoU >= 0.5")
    ] + [f"{kind}, before NMS" for kind in ("scores", "class_scores", "quality")]
    scores, squared, against = (report.correlations[f"{k}, all boxes"] for k in ("scores", "class_scores", "quality"))
    assert squared.kendall == pytest.approx(scores.kendall)  # the same order
    assert squared.pearson != pytest.approx(scores.pearson)
    assert against.spearman == pytest.approx(-scores.spearman)
    assert report.correlations["scores, IoU >= 0.5"].count == (report.ious["after NMS"] >= 0.5).sum()
    assert report.correlations["scores, before NMS"].count == 378


def test_diagnose_ranks_three_times(report):
    candidates, targets = pictures()
    final = suppress(candidates)
    rankings = {
        "as scored": final,
        "by true IoU": with_true_iou(final, targets),
        "by true IoU before NMS": suppress(with_true_iou(candidates, targets)),
    }
    for name, boxes in rankings.items():
        evaluator = CocoEvaluator(3)
        evaluator.update(boxes, targets)
        assert report.average_precision[name] == evaluator.compute()
    ap = [report.average_precision[name]["AP"] for name in rankings]
    assert ap[0] + 0.05 < ap[1] < ap[2]


def test_diagnose_follows_every_object(report):
    _, targets = pictures()
    assert report.num_objects == sum(int((t["iscrowd"] == 0).sum()) for t in targets) == 37
    before, after = report.best_ious["before NMS"], report.best_ious["after NMS"]
    assert (after <= before).all()
    assert report.objects_lost(0.8) == sum(b >= 0.8 > a for a, b in zip(after, before, strict=True)) > 0


def test_report_is_json(report):
    content = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert content["num_images"] == 14
    assert content["correlations"]["scores, all boxes"]["kendall"] == report.correlations["scores, all boxes"].kendall
    assert content["average_precision"]["as scored"]["AP"] == report.average_precision["as scored"]["AP"]
    assert content["counts"]["before NMS"]["boxes"] == int(report.counts["before NMS"].total.sum())
    assert content["objects_lost"]["0.5"] == report.objects_lost(0.5)
    assert len(content["bins"]["count"]) == 10


def test_summary_shows_the_numbers(report):
    text = report.summary()
    assert f"14 images, 37 objects, {report.num_detections} detections" in text
    c = report.correlations["scores, all boxes"]
    low, high = c.intervals["pearson"]
    assert 0 < low < c.pearson < high < 1
    assert f"{c.pearson:.3f} [.{100 * low:02.0f}, .{100 * high:02.0f}]" in text
    assert f"{report.average_precision['by true IoU before NMS']['AP75']:.3f}" in text
    assert "objects lost by NMS" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_aligned_scores_correlate_perfectly_and_reversed_ones_backwards():
    candidates, targets = pictures()
    aligned = with_true_iou(candidates, targets)
    turned = [a | {"scores": 1 - a["scores"]} for a in aligned]
    good, bad = (diagnose(d, targets, 3, bootstrap=0).correlations["scores, all boxes"] for d in (aligned, turned))
    assert (good.pearson, good.spearman, good.kendall) == (pytest.approx(1),) * 3
    assert (bad.pearson, bad.spearman, bad.kendall) == (pytest.approx(-1),) * 3


def test_without_candidates_there_is_only_one_stage():
    detections, targets = pictures()
    report = diagnose(detections, targets, 3, bootstrap=0)
    assert set(report.counts) == set(report.best_ious) == {"after NMS"}
    assert set(report.average_precision) == {"as scored", "by true IoU"}
    assert report.objects_lost() is None
    assert report.as_dict()["objects_lost"] is None
    assert "before NMS" not in report.summary()


def test_a_wrong_class_has_iou_zero_unless_classes_do_not_matter():
    target = {"boxes": [[0, 0, 10, 10], [50, 50, 60, 60]], "labels": [0, 1]}
    seen = {"boxes": [[0, 0, 10, 8], [50, 50, 60, 59]], "labels": [1, 1], "scores": [0.9, 0.3]}
    assert diagnose([seen], [target], 2).ious["after NMS"].tolist() == [0, 0.9]
    report = diagnose([seen], [target], 2, class_aware=False)
    assert report.ious["after NMS"].tolist() == [0.8, 0.9]
    assert report.best_ious["after NMS"].tolist() == [0.8, 0.9]


def test_crowds_are_no_objects_and_difficult_ones_are_not_asked_for():
    target = {
        "boxes": [[0, 0, 10, 10], [50, 50, 60, 60], [80, 80, 90, 90]],
        "labels": [0, 0, 0],
        "iscrowd": [1, 0, 0],
        "ignore": [True, True, False],
    }
    seen = {"boxes": [[0, 0, 10, 10], [50, 50, 60, 60]], "labels": [0, 0], "scores": [0.9, 0.8]}
    report = diagnose([seen], [target], 1)
    # A box on a difficult object is a good box; one on a crowd says nothing about localisation.
    assert report.ious["after NMS"].tolist() == [0, 1]
    assert report.best_ious["after NMS"].tolist() == [0]


def test_no_boxes_and_no_objects_are_reported_as_such():
    empty = {"boxes": np.zeros((0, 4)), "labels": [], "scores": []}
    report = diagnose([empty], [empty], 2, candidates=[empty])
    assert math.isnan(report.correlations["scores, all boxes"].pearson)
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["average_precision"]["as scored"]["AP"] is None
    assert "0 objects, 0 detections" in report.summary()


def test_diagnose_names_what_is_wrong():
    seen = {"boxes": [[0, 0, 4, 4]], "labels": [0], "scores": [0.5]}
    target = {"boxes": [[0, 0, 4, 4]], "labels": [0]}
    with pytest.raises(ValueError, match=r"diagnose \(after NMS\): .*got 2 and 1"):
        diagnose([seen, seen], [target], 1)
    with pytest.raises(ValueError, match=r"diagnose \(before NMS\): .*got 0 and 1"):
        diagnose([seen], [target], 1, candidates=[])
    with pytest.raises(ValueError, match="at least one image"):
        diagnose([], [], 1)
    with pytest.raises(ValueError, match="num_classes must be >= 1"):
        diagnose([seen], [target], 0)
    with pytest.raises(ValueError, match=r"diagnose: targets\[0\].*num_classes = 1; got 3"):
        diagnose([seen], [target | {"labels": [3]}], 1)
