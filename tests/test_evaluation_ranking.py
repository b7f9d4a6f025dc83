import math
import re

import numpy as np
import pytest
import torch

from detcore.boxes import pairwise_iou
from detcore.evaluation.coco import CocoEvaluator
from detcore.evaluation.matching import best_matches
from detcore.evaluation.pooling import pool_detections, pool_targets
from detcore.evaluation.ranking import count_above, score_bins, suppress, with_true_iou
from tests import reference
from tests.pictures import pictures


def crowded_scene(seed=0):
    """Ten objects with a hundred jittered boxes each, and a thousand boxes anywhere."""
    generator = np.random.default_rng(seed)
    corner = np.stack([np.arange(10) % 5 * 200.0 + 40, np.arange(10) // 5 * 300.0 + 60], axis=1)
    objects = np.concatenate([corner, corner + 100], axis=1)
    jittered = np.repeat(objects, 100, axis=0) + generator.normal(0, 14, (1000, 4))
    low = generator.random((1000, 2)) * [900, 500]
    scattered = np.concatenate([low, low + 40 + 120 * generator.random((1000, 2))], axis=1)
    boxes = np.concatenate([jittered, scattered])
    return {"boxes": boxes, "labels": np.zeros(2000)}, {"boxes": objects, "labels": np.zeros(10)}


def test_share_of_good_boxes_falls_although_every_object_keeps_its_best_box():
    candidates, target = crowded_scene()
    truth = pool_targets([target])
    iou = best_matches(pool_detections([candidates | {"scores": np.zeros(2000)}]), truth).iou
    share, best = {}, {}
    for name, scores in {"true": iou, "reversed": 1 - iou}.items():
        before = candidates | {"scores": scores}
        for stage, boxes in {"before": [before], "after": suppress([before], max_detections=None)}.items():
            pooled = pool_detections(boxes)
            match = best_matches(pooled, truth)
            # The floor is below every score: all boxes count.
            counts = count_above(pooled.scores, match.iou, pooled.image, num_images=1, floor=-1.0)
            share[name, stage], best[name, stage] = counts.iou_shares()[0], match.best
    # Ranked by the true IoU suppression loses nothing at all ...
    np.testing.assert_array_equal(best["true", "after"], best["true", "before"])
    # ... and yet the share of boxes with IoU > 0.5 falls from about a half to a few in a hundred.
    assert 0.4 < share["true", "before"] < 0.55
    assert share["true", "after"] < 0.05
    # The worst ranking there is loses the best box of every object, and its share falls less.
    assert (best["reversed", "after"] < best["reversed", "before"]).all()
    assert share["reversed", "after"] > share["true", "after"]


def test_counts_by_hand():
    scores = np.array([0.9, 0.6, 0.04, 0.55, 0.05])
    ious = np.array([0.4, 0.95, 0.99, 0.5, 0.9])
    counts = count_above(scores, ious, np.array([0, 0, 0, 2, 2]), num_images=3)
    assert counts.total.tolist() == [2, 0, 1]  # 0.05 itself is not above the floor
    assert counts.by_score.tolist() == [[2, 2, 1, 1, 1, 0], [0] * 6, [1, 1, 0, 0, 0, 0]]
    assert counts.by_iou.tolist() == [[1, 1, 1, 1, 1], [0] * 5, [0] * 5]  # 0.5 itself is not above 0.5
    np.testing.assert_allclose(counts.iou_shares(), [1 / 3] * 5)
    np.testing.assert_allclose(counts.score_shares(), [1, 1, 1 / 3, 1 / 3, 1 / 3, 0])
    np.testing.assert_allclose(counts.image_iou_shares()[:, 0], [0.5, math.nan, 0.0])
    np.testing.assert_allclose(counts.image_score_shares()[:, 2], [0.5, math.nan, 0.0])


def test_counts_of_nothing_have_nan_shares():
    counts = count_above(np.zeros(0), np.zeros(0), np.zeros(0, dtype=int), num_images=2)
    assert counts.total.tolist() == [0, 0]
    assert np.isnan(counts.iou_shares()).all()


def test_score_bins_by_hand():
    table = score_bins(np.array([0.0, 0.1, 0.25, 0.99, 1.0]), np.array([0.0, 0.6, 0.5, 0.7, 0.9]), bins=4)
    assert table.count.tolist() == [2, 1, 0, 2]
    np.testing.assert_allclose(table.mean_score, [0.05, 0.25, math.nan, 0.995])
    np.testing.assert_allclose(table.mean_iou, [0.3, 0.5, math.nan, 0.8])
    np.testing.assert_allclose(table.share_close, [0.5, 1, math.nan, 1])
    assert table.gap() == pytest.approx((2 * 0.25 + 0.25 + 2 * 0.195) / 5)


def test_score_bins_take_scores_beyond_the_ends():
    assert score_bins(np.array([-0.5, 1.5]), np.array([0.0, 1.0]), bins=2).count.tolist() == [1, 1]
    assert math.isnan(score_bins(np.zeros(0), np.zeros(0)).gap())
    with pytest.raises(ValueError, match="bins must be >= 1; got 0"):
        score_bins(np.zeros(1), np.zeros(1), bins=0)


def precision(detections, targets, num_classes):
    evaluator = CocoEvaluator(num_classes)
    evaluator.update(detections, targets)
    return evaluator.compute()


@pytest.mark.parametrize("seed", range(6))
def test_true_iou_ranks_at_least_as_well_where_no_object_is_found_twice(seed):
    generator = np.random.default_rng(seed)
    detections, targets = [], []
    for _ in range(8):
        n = int(generator.integers(1, 6))
        low = np.arange(n)[:, None] * [100.0, 0.0]  # far apart: one box an object
        objects = np.concatenate([low, low + 60], axis=1)
        boxes = np.concatenate([objects + generator.normal(0, 6, (n, 4)), objects + np.array([0, 300, 0, 300])])
        labels = generator.integers(0, 2, n)
        targets.append({"boxes": objects, "labels": labels})
        detections.append({"boxes": boxes, "labels": np.tile(labels, 2), "scores": generator.random(2 * n)})
    ours, oracle = (precision(d, targets, 2) for d in (detections, with_true_iou(detections, targets)))
    assert all(oracle[name] >= ours[name] - 1e-12 for name in ours if re.fullmatch(r"AP\d*", name))
    assert oracle["AP"] > ours["AP"] + 0.05


def test_true_iou_is_no_upper_bound_where_an_object_is_found_twice():
    objects = {"boxes": [[0, 0, 10, 10], [50, 0, 60, 10]], "labels": [0, 0]}
    boxes = [[0, 0, 10, 9], [0, 0, 10, 8], [50, 0, 60, 6]]  # IoU 0.9, 0.8 on the first object; 0.6 on the second
    seen = {"boxes": boxes, "labels": [0, 0, 0], "scores": [0.9, 0.1, 0.8]}
    actual = precision([seen], [objects], 1)["AP50"]
    oracle = precision(with_true_iou([seen], [objects]), [objects], 1)["AP50"]
    assert actual == pytest.approx(1)
    assert oracle == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert precision(suppress(with_true_iou([seen], [objects])), [objects], 1)["AP50"] == pytest.approx(1)


def test_true_iou_keeps_boxes_and_images():
    detections, targets = pictures()
    rescored = with_true_iou(detections, targets)
    assert [len(r["scores"]) for r in rescored] == [len(d["scores"]) for d in detections]
    for ours, given, truth in zip(rescored, detections, targets, strict=True):
        np.testing.assert_array_equal(ours["boxes"].numpy(), given["boxes"])
        np.testing.assert_array_equal(ours["labels"].numpy(), given["labels"])
        for box, label, score in zip(ours["boxes"].tolist(), given["labels"], ours["scores"].tolist(), strict=True):
            rivals = zip(truth["boxes"], truth["labels"], truth["iscrowd"], strict=True)
            expected = max([reference.iou(box, b) for b, k, crowd in rivals if k == label and not crowd], default=0)
            assert score == pytest.approx(expected, abs=1e-12)


def test_true_iou_of_any_class():
    seen = {"boxes": [[0, 0, 4, 4]], "labels": [1], "scores": [0.9]}
    target = {"boxes": [[0, 0, 4, 4]], "labels": [0]}
    assert with_true_iou([seen], [target])[0]["scores"].tolist() == [0]
    assert with_true_iou([seen], [target], class_aware=False)[0]["scores"].tolist() == [1]
    assert with_true_iou([], []) == []


def test_suppress_equals_the_loop():
    detections, _ = pictures()
    for given, ours in zip(detections, suppress(detections, nms_iou=0.4, max_detections=None), strict=True):
        expected = []
        for i in np.argsort(-given["scores"], kind="stable"):
            rivals = [
                j
                for j in expected
                if given["labels"][j] == given["labels"][i]
                and reference.iou(given["boxes"][i], given["boxes"][j]) > 0.4
            ]
            if not rivals:
                expected.append(i)
        np.testing.assert_allclose(ours["scores"].numpy(), given["scores"][expected])
        assert sorted(map(tuple, ours["boxes"].tolist())) == sorted(map(tuple, given["boxes"][expected].tolist()))


def test_suppress_keeps_the_best_and_what_belongs_to_them():
    seen = {
        "boxes": [[0, 0, 4, 4], [0, 0, 4, 4], [9, 9, 12, 12], [20, 20, 24, 24]],
        "labels": [0, 1, 0, 0],
        "scores": [0.5, 0.9, 0.7, 0.1],
        "quality": [0.1, 0.2, 0.3, 0.4],
    }
    [kept] = suppress([seen], max_detections=3)
    assert kept["quality"].tolist() == [0.2, 0.3, 0.1]  # boxes of two classes do not suppress each other
    [again] = suppress([kept])
    assert torch.equal(again["boxes"], kept["boxes"])
    assert float(pairwise_iou(kept["boxes"][1:], kept["boxes"][1:]).triu(1).max()) == 0
    [none] = suppress([{"boxes": torch.zeros(0, 4), "labels": [], "scores": []}])
    assert none["boxes"].shape == (0, 4)
    with pytest.raises(ValueError, match=r"nms_iou must be in \[0, 1\]; got 50"):
        suppress([seen], nms_iou=50.0)
