"""Every detection's best object and every object's best detection, over a whole data set at once."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from detcore.evaluation.pooling import PooledDetections, PooledTargets, check_same_images

__all__ = ["BestMatches", "best_matches"]

PAIRS_AT_ONCE = 1 << 21  # 2 million pairs of boxes are about 300 MB on the way
EMPTY = 1e-9  # least union, as in detcore.boxes: two empty boxes overlap by 0


@dataclass(frozen=True)
class BestMatches:
    """The best partner of every box, without rivalry: several detections may share an object.

    Args:
        iou: largest IoU of each detection with an object it may be matched with; 0 if none.
        target: index of that object, the first of equals; -1 where ``iou`` is 0.
        best: largest IoU of each object with a detection it may be matched with; 0 if none.
    """

    iou: Float[np.ndarray, " D"]
    target: Int[np.ndarray, " D"]
    best: Float[np.ndarray, " M"]


def best_matches(
    detections: PooledDetections,
    targets: PooledTargets,
    *,
    class_aware: bool = True,
    crowds: bool = False,
    inclusive: bool = False,
) -> BestMatches:
    """Match every detection with the object of its image that it overlaps most.

    Args:
        detections: pooled detections.
        targets: pooled objects of the same images.
        class_aware: only objects of the predicted class count.
        crowds: crowd boxes count as objects too. By default they do not: a crowd box is not one object,
            and the IoU with it says nothing about localisation.
        inclusive: measure sides as the PASCAL VOC devkit does, ``x2 - x1 + 1``.

    Raises:
        ValueError: if the two hold different numbers of images.

    Example:
        >>> from detcore.evaluation.pooling import pool_detections, pool_targets
        >>> dog = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
        >>> seen = {"boxes": [[0, 0, 10, 5], [0, 0, 10, 10]], "labels": [0, 1], "scores": [0.9, 0.8]}
        >>> found, truth = pool_detections([seen]), pool_targets([dog])
        >>> best_matches(found, truth).iou.tolist()
        [0.5, 0.0]
        >>> best_matches(found, truth, class_aware=False).iou.tolist()
        [0.5, 1.0]
    """
    check_same_images(detections, targets, caller="best_matches")
    largest = np.zeros(len(detections.image))
    target = np.full(len(detections.image), -1)
    best = np.zeros(len(targets.image))
    for detection_index, target_index, overlap in pairs_in_chunks(
        detections, targets, class_aware=class_aware, crowds=crowds, inclusive=inclusive
    ):
        np.maximum.at(best, target_index, overlap)
        # A chunk holds all pairs of its detections, side by side: one segment each.
        starts = group_starts(detection_index)
        owners = detection_index[starts]
        largest[owners] = np.maximum.reduceat(overlap, starts)
        hits = np.flatnonzero((overlap == largest[detection_index]) & (overlap > 0))
        winners, first = np.unique(detection_index[hits], return_index=True)
        target[winners] = target_index[hits[first]]
    return BestMatches(largest, target, best)


def pairs_in_chunks(
    detections: PooledDetections, targets: PooledTargets, *, class_aware: bool, crowds: bool, inclusive: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Detection index, object index and IoU of all pairs that may match, in chunks.

    Pairs of one detection lie side by side, objects in the given order, and never in two chunks.
    """
    candidates = np.arange(len(targets.image)) if crowds else np.flatnonzero(~targets.crowd)
    corner = np.array([0.0, 0.0, 1.0, 1.0]) if inclusive else np.zeros(4)
    boxes, others = detections.boxes + corner, targets.boxes + corner
    area, other_area = (np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (boxes, others))
    for d, t in candidates_in_chunks(detections, targets, candidates, class_aware=class_aware):
        shared = shared_area(boxes, d, others, t)
        yield d, t, shared / np.maximum(area[d] + other_area[t] - shared, EMPTY)


def shared_area(
    boxes: Float[np.ndarray, "D 4"],
    d: Int[np.ndarray, " n"],
    others: Float[np.ndarray, "M 4"],
    t: Int[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    """Area that box ``d`` shares with the other box ``t``, of every pair."""
    near, far = np.maximum, np.minimum
    width, height = (far(boxes[d, i + 2], others[t, i + 2]) - near(boxes[d, i], others[t, i]) for i in (0, 1))
    return np.maximum(width, 0) * np.maximum(height, 0)


def group_starts(key: Int[np.ndarray, " n"]) -> Int[np.ndarray, " groups"]:
    """Where the groups of equal keys begin; keys are >= 0 and equal ones lie side by side."""
    return np.flatnonzero(np.diff(key, prepend=-1))


def place_in_group(key: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The place of every element in its group of equal keys: 0, 1, 2, ..., 0, 1, ..."""
    start = group_starts(key)
    return np.arange(len(key)) - np.repeat(start, np.diff(start, append=len(key)))


def candidates_in_chunks(
    detections: PooledDetections, targets: PooledTargets, candidates: Int[np.ndarray, " n"], *, class_aware: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Detection index and object index of all pairs in one image, with ``class_aware`` of one class, in chunks.

    Pairs of one detection lie side by side, objects in the given order, and never in two chunks. Only the
    objects ``candidates`` take part.
    """
    num_labels = 1 + max(detections.labels.max(initial=0), targets.labels.max(initial=0))
    key = detections.image * num_labels + detections.labels if class_aware else detections.image
    target_key = targets.image * num_labels + targets.labels if class_aware else targets.image
    candidates = candidates[np.argsort(target_key[candidates], kind="stable")]
    target_key = target_key[candidates]
    begin = np.searchsorted(target_key, key, side="left")
    counts = np.searchsorted(target_key, key, side="right") - begin
    total = np.cumsum(counts)
    low = 0
    while low < len(key):
        done = total[low - 1] if low else 0
        high = max(low + 1, int(np.searchsorted(total, done + PAIRS_AT_ONCE, side="right")))
        count = counts[low:high]
        size = int(count.sum())
        if size:
            detection_index = np.repeat(np.arange(low, high), count)
            within = np.arange(size) - np.repeat(np.cumsum(count) - count, count)
            yield detection_index, candidates[np.repeat(begin[low:high], count) + within]
        low = high
