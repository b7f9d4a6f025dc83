import gzip
import json
import math

import numpy as np
import pytest
import torch

from detcore.evaluation.recall import SIZES, RecallCounts, RecallEvaluator, size_classes
from detcore.evaluation.run import Evaluator
from tests import reference
from tests.pictures import pictures

EMPTY = {"boxes": np.zeros((0, 4)), "labels": [], "scores": []}


def evaluate(detections, targets, num_classes=1, **options):
    evaluator = RecallEvaluator(num_classes, **options)
    evaluator.update(detections, targets)
    return evaluator


def seen(*rows):
    """Detections of class 0 from (box, score)."""
    boxes, scores = zip(*rows, strict=True)
    return {"boxes": list(boxes), "labels": [0] * len(rows), "scores": list(scores)}


def mixed_pictures():
    """Pictures whose boxes often have the wrong class, and objects that are often difficult."""
    detections, targets = pictures()
    for found in detections:
        rows = np.arange(len(found["labels"]))
        found["labels"] = np.where(rows % 7 < 6, (found["labels"] + 1) % 3, found["labels"])
    for target in targets:
        target["ignore"] = (np.arange(len(target["labels"])) % 4 == 2).astype(int)
    return detections, targets


def recall_twin(detections, targets, score, *, iou_threshold=0.5, class_aware=True, limit=200, coco=False):
    """Objects found and objects there are, by size, box by box."""
    found, there = [0, 0, 0], [0, 0, 0]
    for d, t in zip(detections, targets, strict=True):
        rows = sorted(range(len(d["scores"])), key=lambda i: -d["scores"][i])[:limit]  # stable
        flags = t.get("ignore", t["labels"] * 0) + t["iscrowd"]
        for box, label, area, skip in zip(t["boxes"], t["labels"], t["area"], flags, strict=True):
            if skip:
                continue
            own = area if coco else (box[2] - box[0]) * (box[3] - box[1])
            size = 0 if own < 32 * 32 else 1 if own < 96 * 96 else 2
            there[size] += 1
            found[size] += any(
                d["scores"][i] >= score
                and (not class_aware or d["labels"][i] == label)
                and reference.iou(d["boxes"][i], box) >= iou_threshold
                for i in rows
            )
    return found, there


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_aware": False},
        {"iou_threshold": 0.7},
        {"sizes": "coco"},
        {"max_detections": 15},
        {"max_detections": None},
    ],
    ids=str,
)
def test_recall_equals_the_loop(options):
    detections, targets = mixed_pictures()
    twin = dict(options)
    twin["coco"] = twin.pop("sizes", "voc") == "coco"
    twin["limit"] = twin.pop("max_detections", 200)
    thresholds = (0.1, 0.3, 0.5, 0.7)
    counts = evaluate(detections, targets, 3, score_thresholds=thresholds, **options).counts()
    for row, threshold in zip(counts.found, thresholds, strict=True):
        found, there = recall_twin(detections, targets, threshold, **twin)
        assert row.tolist() == found
        assert counts.objects.tolist() == there
    assert (counts.found[0] > counts.found[-1]).any()  # thresholds matter
    assert (counts.found[0] < counts.objects).any()


def test_the_options_discriminate():
    detections, targets = mixed_pictures()
    rows = [{}, {"class_aware": False}, {"iou_threshold": 0.7}, {"sizes": "coco"}, {"max_detections": 15}]
    found = [evaluate(detections, targets, 3, **options).counts().found.tolist() for options in rows]
    assert all(found[0] != other for other in found[1:])


def test_size_classes_have_sharp_bounds():
    area = np.array([0.0, 1023.99, 1024.0, 9215.99, 9216.0, 1e9])
    assert size_classes(area).tolist() == [0, 0, 1, 1, 2, 2]


def test_size_classes_partition_the_objects():
    detections, targets = pictures()
    wanted = sum(int((t["iscrowd"] == 0).sum()) for t in targets)
    for sizes in ("voc", "coco"):
        counts = evaluate(detections, targets, 3, sizes=sizes).counts()
        assert counts.objects.sum() == wanted
        assert (counts.objects > 0).all()


def test_counts_never_fall_when_the_threshold_falls():
    detections, targets = pictures()
    counts = evaluate(detections, targets, 3).counts(np.linspace(0, 1, 21).tolist())
    assert (np.diff(counts.found, axis=0) <= 0).all()
    assert (counts.found <= counts.objects).all()


def test_recall_by_hand():
    # 31 x 31, 40 x 40 and 100 x 100 pixels; the large one is seen too far off (IoU 49 / 100)
    target = {"boxes": [[0, 0, 31, 31], [100, 0, 140, 40], [0, 100, 100, 200]], "labels": [0, 0, 0]}
    found = seen(([0, 0, 31, 31], 0.05), ([100, 0, 140, 20], 0.2), ([0, 100, 100, 149], 0.9))
    numbers = evaluate([found], [target]).compute()
    assert [numbers[f"R0.01_{size}"] for size in SIZES] == [1, 1, 0]
    assert [numbers[f"R0.1_{size}"] for size in SIZES] == [0, 1, 0]
    assert [numbers[f"R0.3_{size}"] for size in SIZES] == [0, 0, 0]
    assert [numbers[name] for name in ("R0.01", "R0.1", "R0.3")] == pytest.approx([2 / 3, 1 / 3, 0])
    assert len(numbers) == 12


def test_score_at_the_threshold_counts():
    target = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
    evaluator = evaluate([seen(([0, 0, 10, 10], 0.25))], [target], score_thresholds=[0.25, 0.26])
    assert (evaluator.compute()["R0.25"], evaluator.compute()["R0.26"]) == (1, 0)


def test_one_detection_may_find_two_objects():
    twins = {"boxes": [[0, 0, 10, 10], [0, 1, 10, 11]], "labels": [0, 0]}
    assert evaluate([seen(([0, 0, 10, 10], 0.9))], [twins]).counts().found[0].tolist() == [2, 0, 0]


def test_only_the_own_class_finds_an_object():
    target, other = {"boxes": [[0, 0, 10, 10]], "labels": [1]}, seen(([0, 0, 10, 10], 0.9))
    assert evaluate([other], [target], 2).compute()["R0.1"] == 0
    assert evaluate([other], [target], 2, class_aware=False).compute()["R0.1"] == 1


def test_difficult_objects_and_crowds_do_not_count():
    boxes = [[0, 0, 10, 10], [50, 0, 60, 10], [90, 0, 99, 10]]
    target = {"boxes": boxes, "labels": [0, 0, 0], "ignore": [1, 0, 0], "iscrowd": [0, 1, 0]}
    assert evaluate([seen(*((box, 0.9) for box in boxes))], [target]).counts().objects.tolist() == [1, 0, 0]


def test_the_best_detections_of_all_classes_count():
    target = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
    first = {"boxes": [[0, 0, 10, 10], [50, 50, 60, 60]], "labels": [0, 1], "scores": [0.5, 0.9]}
    assert evaluate([first], [target], 2, max_detections=1).compute()["R0.1"] == 0
    assert evaluate([first], [target], 2, max_detections=2).compute()["R0.1"] == 1
    # of equal scores the first one stays; another picture has a limit of its own
    equal = first | {"scores": [0.9, 0.9]}
    assert evaluate([first, equal], [target, target], 2, max_detections=1).compute()["R0.1"] == 0.5


def test_inclusive_sides_change_size_and_iou():
    # Pixels 0..31: 32 x 32 of them, or 31 x 31 between the first and the last
    target = {"boxes": [[0, 0, 31, 31]], "labels": [0]}
    found = seen(([0, 0, 31, 15], 0.9))  # 16 rows of 32; 15 of 31
    assert evaluate([found], [target], inclusive=True).counts().found[0].tolist() == [0, 1, 0]
    assert evaluate([found], [target]).counts().objects.tolist() == [1, 0, 0]
    assert evaluate([found], [target]).counts().found[0].tolist() == [0, 0, 0]


def test_annotated_area_decides_coco_sizes():
    target = {"boxes": [[0, 0, 40, 40]], "labels": [0], "area": [900.0]}
    assert evaluate([EMPTY], [target], sizes="coco").counts().objects.tolist() == [1, 0, 0]
    assert evaluate([EMPTY], [target]).counts().objects.tolist() == [0, 1, 0]


def test_recall_without_objects_is_nan():
    numbers = evaluate([seen(([0, 0, 5, 5], 0.5))], [EMPTY]).compute()
    assert all(math.isnan(value) for value in numbers.values())
    counts = evaluate([EMPTY], [{"boxes": [[0, 0, 5, 5]], "labels": [0]}]).counts()
    assert counts.found.tolist() == [[0, 0, 0]] * 3
    np.testing.assert_array_equal(counts.shares()[0], [0, math.nan, math.nan])


def test_images_are_counted_on_over_updates():
    detections, targets = pictures()
    evaluator = RecallEvaluator(3)
    assert isinstance(evaluator, Evaluator)
    for image in zip(detections, targets, strict=True):
        evaluator.update([image[0]], [image[1]])
    assert evaluator.compute() == evaluate(detections, targets, 3).compute()
    evaluator.reset()
    with pytest.raises(ValueError, match=r"RecallEvaluator.compute: needs at least one image"):
        evaluator.compute()


def test_tensors_are_welcome():
    detections, targets = pictures()
    as_tensors = [{k: torch.as_tensor(v) for k, v in d.items()} for d in detections]
    assert evaluate(as_tensors, targets, 3).compute() == evaluate(detections, targets, 3).compute()


def test_recall_counts_as_json_and_text():
    counts = RecallCounts((0.01, 0.3), np.array([[3, 0, 9], [1, 0, 2]]), np.array([4, 0, 10]))
    assert json.loads(json.dumps(counts.as_dict())) == {
        "score_thresholds": [0.01, 0.3],
        "objects": {"small": 4, "medium": 0, "large": 10},
        "found": {"small": [3, 1], "medium": [0, 0], "large": [9, 2]},
    }
    header, *rows = counts.summary().splitlines()
    assert header.split()[-3:] == list(SIZES)
    assert [row.split() for row in rows] == [
        ["0.01", "3/4", "75.0%", "0/0", "-", "9/10", "90.0%"],
        ["0.3", "1/4", "25.0%", "0/0", "-", "2/10", "20.0%"],
    ]
    assert len({len(line) for line in (header, *rows)}) == 1


def test_recall_evaluator_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"score_thresholds must be ascending numbers in \[0, 1\]; got \[0.3, 0.1\]"):
        RecallEvaluator(2, score_thresholds=(0.3, 0.1))
    with pytest.raises(ValueError, match="score_thresholds must be"):
        evaluate([EMPTY], [EMPTY]).counts(1.5)
    with pytest.raises(ValueError, match="max_detections must be >= 1 or None; got 0"):
        RecallEvaluator(2, max_detections=0)
    with pytest.raises(ValueError, match="IoU thresholds must be"):
        RecallEvaluator(2, iou_threshold=0.0)
    with pytest.raises(ValueError, match=r"RecallEvaluator.update: .*got 1 and 0"):
        RecallEvaluator(2).update([seen(([0, 0, 1, 1], 0.5))], [])


def test_official_voc_objects_by_size(data_root):
    """The denominators of the scale-balanced loss's Tables 3 and 4: both end pixels count."""
    file = data_root / "voc_annotations" / "pascal_test2007.json.gz"
    if not file.is_file():
        pytest.skip(f"needs the complete VOC annotations, {file}")
    rows = json.loads(gzip.decompress(file.read_bytes()))["annotations"]
    x, y, width, height = np.array([row["bbox"] for row in rows], dtype=float).T
    # One picture does for all: sizes do not depend on it.
    target = {"boxes": np.stack([x, y, x + width, y + height], 1), "labels": [0] * len(rows)}
    target["ignore"] = [row["ignore"] for row in rows]
    assert evaluate([EMPTY], [target]).counts().objects.tolist() == [516, 3813, 7703]
    # inclusive pixel indices, 0-based: the last pixel is one before the continuous corner
    target["boxes"] -= [0, 0, 1, 1]
    assert evaluate([EMPTY], [target], inclusive=True).counts().objects.tolist() == [516, 3813, 7703]
    assert evaluate([EMPTY], [target]).counts().objects.tolist() == [566, 3823, 7643]  # without the + 1
