import numpy as np
import pytest
import torch

from detcore.evaluation import matching
from detcore.evaluation.matching import best_matches
from detcore.evaluation.pooling import join, pool_detections, pool_targets, xywh
from tests import reference
from tests.pictures import pictures


def twin(detections, targets, class_aware, crowds):
    """Best IoU and first best object of each detection, best IoU of each object, by loops."""
    ious, which = [], []
    best = [0.0] * sum(len(t["labels"]) for t in targets)
    offset = 0
    for found, truth in zip(detections, targets, strict=True):
        for box, label in zip(found["boxes"], found["labels"], strict=True):
            largest, index = 0.0, -1
            for j in range(len(truth["labels"])):
                if (class_aware and truth["labels"][j] != label) or (truth["iscrowd"][j] and not crowds):
                    continue
                overlap = reference.iou(box, truth["boxes"][j])
                best[offset + j] = max(best[offset + j], overlap)
                if overlap > largest:
                    largest, index = overlap, offset + j
            ious.append(largest)
            which.append(index)
        offset += len(truth["labels"])
    return ious, which, best


@pytest.mark.parametrize("chunk", [1, 7, 1 << 21])
@pytest.mark.parametrize("crowds", [False, True])
@pytest.mark.parametrize("class_aware", [False, True])
def test_best_matches_equals_the_loop(monkeypatch, class_aware, crowds, chunk):
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", chunk)
    detections, targets = pictures()
    ours = best_matches(pool_detections(detections), pool_targets(targets), class_aware=class_aware, crowds=crowds)
    ious, which, best = twin(detections, targets, class_aware, crowds)
    np.testing.assert_allclose(ours.iou, ious, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours.best, best, rtol=0, atol=1e-12)
    assert ours.target.tolist() == which
    assert 0 < sum(i < 0 for i in which) < len(which)


def test_the_first_of_equal_objects_is_taken():
    same = {"boxes": [[0, 0, 4, 4], [0, 0, 4, 4]], "labels": [1, 1]}
    seen = pool_detections([{"boxes": [[0, 0, 4, 4]], "labels": [1], "scores": [0.5]}])
    assert best_matches(seen, pool_targets([same])).target.tolist() == [0]


def test_boxes_meet_only_objects_of_their_own_image():
    target = {"boxes": [[0, 0, 4, 4]], "labels": [0]}
    empty = {"boxes": torch.zeros(0, 4), "labels": []}
    seen = {"boxes": [[0, 0, 4, 4]], "labels": [0], "scores": [0.5]}
    none = empty | {"scores": []}
    ours = best_matches(pool_detections([seen, none]), pool_targets([empty, target]))
    assert (ours.iou.tolist(), ours.target.tolist(), ours.best.tolist()) == ([0], [-1], [0])


@pytest.mark.parametrize("which", ["detections", "targets", "both"])
def test_best_matches_of_nothing_is_nothing(which):
    empty = {"boxes": torch.zeros(0, 4), "labels": [], "scores": []}
    full = {"boxes": [[0, 0, 4, 4]], "labels": [0], "scores": [0.5]}
    seen = pool_detections([full if which == "targets" else empty])
    objects = pool_targets([full if which == "detections" else empty])
    ours = best_matches(seen, objects)
    assert ours.iou.tolist() == [0.0] * (which == "targets")
    assert ours.best.tolist() == [0.0] * (which == "detections")


def test_best_matches_needs_the_same_images():
    with pytest.raises(ValueError, match=r"best_matches: detections and targets must hold.*got 0 and 1"):
        best_matches(pool_detections([]), pool_targets([{"boxes": [[0, 0, 1, 1]], "labels": [0]}]))


def test_pooled_images_are_counted_on():
    detections, targets = pictures()
    for pool, entries in ((pool_detections, detections), (pool_targets, targets)):
        whole, parts = pool(entries), join([pool(entries[:5]), pool([]), pool(entries[5:])])
        assert whole.num_images == parts.num_images == 14
        for name in ("image", "boxes", "labels"):
            np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_a_kind_of_score_that_one_part_lacks_is_left_out():
    with_it = pool_detections([{"boxes": [[0, 0, 1, 1]], "labels": [0], "scores": [0.5], "quality": [0.4]}])
    without = pool_detections([{"boxes": [[0, 0, 1, 1]], "labels": [0], "scores": [0.5]}])
    assert set(with_it.score_kinds()) == {"scores", "quality"}
    assert set(join([with_it, with_it]).score_kinds()) == {"scores", "quality"}
    assert set(join([with_it, without]).score_kinds()) == {"scores"}


def test_crowds_are_ignored_said_or_not_and_area_is_the_boxes_own():
    pooled = pool_targets(
        [
            {"boxes": [[0, 0, 4, 5], [0, 0, 1, 1]], "labels": [0, 0], "iscrowd": [1, 0]},
            {"boxes": [[0, 0, 2, 2]], "labels": [0], "ignore": [True], "area": [3.5]},
        ]
    )
    assert pooled.crowd.tolist() == [True, False, False]
    assert pooled.ignore.tolist() == [True, False, True]
    assert pooled.area.tolist() == [20.0, 1.0, 3.5]


def test_xywh_keeps_the_corner():
    assert xywh(np.array([[1.0, 2.0, 5.0, 4.0]])).tolist() == [[1.0, 2.0, 4.0, 2.0]]
