"""COCO's precision and recall in NumPy, for all images, classes, thresholds and object sizes at once.

Equal to :func:`detcore.evaluation.curves.pycocotools_curves` to the last bit, and some tens of times faster.

COCO's matching is sequential: the detections of an image and class, best score first, take one object after the
other. Groups of different images or classes do not touch each other, though, and neither do thresholds and area ranges.
So there is one round for the first candidate of every group, one for the second, and so on; and in a round one step for
every candidate's first object, one for its second.

Letters: D detections that count, M objects, K candidates (detections that overlap an object enough), P candidates of
one round, C classes, T thresholds, A area ranges, L limits, R recalls.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from detcore.evaluation.curves import AREA_RANGES, CocoCurves
from detcore.evaluation.matching import candidates_in_chunks, group_starts, place_in_group, shared_area
from detcore.evaluation.pooling import PooledDetections, PooledTargets, xywh

__all__ = ["numpy_curves"]

RECALLS = np.linspace(0.0, 1.0, 101)
LARGEST_THRESHOLD = 1 - 1e-10  # so that an IoU of 1 passes a threshold of 1
AFTER_ALL_OTHERS = 2.0**-60  # a factor that keeps every bit of an IoU and puts it below every threshold


@dataclass(frozen=True)
class _Pairs:
    """Detections and objects that overlap enough, grouped by detection; a group is one candidate.

    Args:
        detection: index of each candidate among the detections, ascending.
        start: where each candidate's pairs begin.
        count: how many pairs each candidate has, >= 1.
        target: index of the object of each pair, in the given order.
        overlap: IoU of each pair.
    """

    detection: Int[np.ndarray, " K"]
    start: Int[np.ndarray, " K"]
    count: Int[np.ndarray, " K"]
    target: Int[np.ndarray, " N"]
    overlap: Float[np.ndarray, " N"]


@dataclass(frozen=True)
class _Matches:
    """What became of the candidates.

    Args:
        detection: index of each candidate among the detections.
        matched: whether it found an object.
        excused: whether that object is ignored, so that the candidate does not count.
    """

    detection: Int[np.ndarray, " K"]
    matched: Bool[np.ndarray, "K A T"]
    excused: Bool[np.ndarray, "K A T"]


def numpy_curves(
    detections: PooledDetections,
    targets: PooledTargets,
    *,
    num_classes: int,
    iou_thresholds: Sequence[float],
    limits: Sequence[int],
    area_ranges: Mapping[str, tuple[float, float]] = AREA_RANGES,
) -> CocoCurves:
    """Precision and recall by COCO's rules, equal to :func:`detcore.evaluation.curves.pycocotools_curves`.

    Args:
        detections: pooled detections of all images.
        targets: pooled objects of the same images.
        num_classes: C; labels are 0..C-1.
        iou_thresholds: least IoU of a match, in (0, 1], ascending.
        limits: numbers of detections an image and class, ascending; the best by score stay.
        area_ranges: bounds of an object's area by name, A of them.

    Example:
        >>> from detcore.evaluation import pool_detections, pool_targets
        >>> dog = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
        >>> seen = {"boxes": [[0, 0, 10, 8]], "labels": [0], "scores": [0.9]}
        >>> curves = numpy_curves(
        ...     pool_detections([seen]), pool_targets([dog]), num_classes=1, iou_thresholds=[0.5, 0.9], limits=[100]
        ... )
        >>> curves.recall[:, 0, 0, 0].tolist()
        [1.0, 0.0]

    Reference: Lin et al., Microsoft COCO, ECCV 2014, and cocodataset.org/#detection-eval.
    """
    thresholds = np.minimum(np.asarray(iou_thresholds, dtype=np.float64), LARGEST_THRESHOLD)
    bounds = np.array(list(area_ranges.values()), dtype=np.float64)
    found, rank = _best_by_score(detections, num_classes, limits[-1])
    ignored = targets.ignore[:, None] | _outside(targets.area, bounds)
    pairs = _overlapping_pairs(found, targets, thresholds[0])
    group = found.image[pairs.detection] * num_classes + found.labels[pairs.detection]
    matches = _match(pairs, group, ignored, targets.crowd, thresholds)
    num_objects = np.zeros((num_classes, len(bounds)), dtype=np.int64)
    np.add.at(num_objects, targets.labels, ~ignored)
    return _accumulate(found, rank, matches, num_objects, bounds, limits)


def _outside(area: Float[np.ndarray, " n"], bounds: Float[np.ndarray, "A 2"]) -> Bool[np.ndarray, "n A"]:
    return (area[:, None] < bounds[:, 0]) | (area[:, None] > bounds[:, 1])


def _best_by_score(
    detections: PooledDetections, num_classes: int, limit: int
) -> tuple[PooledDetections, Int[np.ndarray, " D"]]:
    """The best detections of every image and class, best first, and the rank of each in its group, from 0.

    Groups lie in the order of images, then classes; of equal scores the one given first is the better.
    """
    group = detections.image * num_classes + detections.labels
    order = np.lexsort((-detections.scores, group))
    rank = place_in_group(group[order])
    order, rank = order[rank < limit], rank[rank < limit]
    image, boxes, labels, scores = (
        values[order] for values in (detections.image, detections.boxes, detections.labels, detections.scores)
    )
    return PooledDetections(image, boxes, labels, scores, None, None, detections.num_images), rank


def _overlapping_pairs(detections: PooledDetections, targets: PooledTargets, least: float) -> _Pairs:
    """All pairs in one image and class with an IoU of at least ``least``.

    The operations and their order are those of the C code in pycocotools, for the sake of the last bit: the far
    corners are rounded sums. For a crowd the area of the detection stands in the place of the union.
    """
    (area, box), (other_area, other) = (
        (side[:, 2] * side[:, 3], np.concatenate([side[:, :2], side[:, :2] + side[:, 2:]], axis=1))
        for side in (xywh(detections.boxes), xywh(targets.boxes))
    )
    parts = []
    for d, t in candidates_in_chunks(detections, targets, np.arange(len(targets.image)), class_aware=True):
        shared = shared_area(box, d, other, t)
        whole = np.where(targets.crowd[t], area[d], area[d] + other_area[t] - shared)
        overlap = np.divide(shared, whole, out=np.zeros(len(d)), where=shared > 0)
        near = overlap >= least
        parts.append((d[near], t[near], overlap[near]))
    none = np.zeros(0, dtype=np.int64)
    detection, target, overlap = (np.concatenate(each) for each in zip((none, none, np.zeros(0)), *parts, strict=True))
    start = group_starts(detection)
    return _Pairs(detection[start], start, np.diff(start, append=len(detection)), target, overlap)


def _rounds(
    group: Int[np.ndarray, " K"], count: Int[np.ndarray, " K"]
) -> Iterator[tuple[Int[np.ndarray, " P"], list[int]]]:
    """The candidates of every round, one of each group that still has one, those with the most objects first.

    With them how many have a first object, a second, and so on.
    """
    place = place_in_group(group)
    order = np.lexsort((-count, place))
    sizes = np.bincount(place)
    ends = np.cumsum(sizes)
    for low, high in zip(ends - sizes, ends, strict=True):
        candidates = order[low:high]
        objects = np.arange(int(count[candidates[0]]))
        yield candidates, (high - low - np.searchsorted(count[candidates[::-1]], objects, side="right")).tolist()


def _match(
    pairs: _Pairs,
    group: Int[np.ndarray, " K"],
    ignored: Bool[np.ndarray, "M A"],
    crowd: Bool[np.ndarray, " M"],
    thresholds: Float[np.ndarray, " T"],
) -> _Matches:
    """Let every candidate take an object.

    A candidate takes the free object of largest IoU, the last of equals, and an ignored one only if there is no other.
    """
    num_areas, num_thresholds = ignored.shape[1], len(thresholds)
    taken = np.zeros((len(crowd), num_areas, num_thresholds), dtype=bool)
    matched, excused = np.zeros((2, len(group), num_areas, num_thresholds), dtype=bool)
    for candidates, holders in _rounds(group, pairs.count):
        best = np.zeros((len(candidates), num_areas, num_thresholds))
        choice = np.full(best.shape, -1)
        for step, holding in enumerate(holders):
            pair = pairs.start[candidates[:holding]] + step
            target, overlap = pairs.target[pair], pairs.overlap[pair]
            worth = np.where(ignored[target], AFTER_ALL_OTHERS, 1.0) * overlap[:, None]
            better = (overlap[:, None] >= thresholds)[:, None] & (worth[:, :, None] >= best[:holding])
            better &= ~taken[target]
            best[:holding] = np.where(better, worth[:, :, None], best[:holding])
            choice[:holding] = np.where(better, target[:, None, None], choice[:holding])
        row, area, threshold = np.nonzero(choice >= 0)
        target = choice[row, area, threshold]
        taken[target, area, threshold] = ~crowd[target]
        matched[candidates[row], area, threshold] = True
        excused[candidates[row], area, threshold] = ignored[target, area]
    return _Matches(pairs.detection, matched, excused)


def _accumulate(
    found: PooledDetections,
    rank: Int[np.ndarray, " D"],
    matches: _Matches,
    num_objects: Int[np.ndarray, "C A"],
    bounds: Float[np.ndarray, "A 2"],
    limits: Sequence[int],
) -> CocoCurves:
    """The curves of every class, area range and limit, from the matches of each detection."""
    order = np.lexsort((-found.scores, found.labels))  # of equal scores the earlier image first
    labels, rank, size = found.labels[order], rank[order], xywh(found.boxes[order])[:, 2:]
    inside = ~_outside(size[:, 0] * size[:, 1], bounds)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    place = place[matches.detection]
    down = np.argsort(place)
    place, matched, excused = place[down], matches.matched[down], matches.excused[down]
    num_classes, num_areas = num_objects.shape
    shape = (matched.shape[2], num_classes, num_areas, len(limits))
    precision, recall = np.empty((shape[0], len(RECALLS), *shape[1:])), np.empty(shape)
    for i, limit in enumerate(limits):
        counts = rank < limit
        for a in range(num_areas):
            usual = inside[:, a] & counts  # does the detection count, if it finds nothing?
            hit = matched[:, a] & ~excused[:, a] & counts[place, None]
            change = hit * 1 - (usual[place, None] & matched[:, a])
            precision[:, :, :, a, i], recall[:, :, a, i] = _curves(labels, usual, place, hit, change, num_objects[:, a])
    return CocoCurves(precision, recall)


def _curves(
    labels: Int[np.ndarray, " D"],
    usual: Bool[np.ndarray, " D"],
    place: Int[np.ndarray, " K"],
    hit: Bool[np.ndarray, "K T"],
    change: Int[np.ndarray, "K T"],
    num_objects: Int[np.ndarray, " C"],
) -> tuple[Float[np.ndarray, "T R C"], Float[np.ndarray, "T C"]]:
    """Precision at 101 recalls, and the recall reached, of every class; nan for a class without objects.

    Detections lie by class, best first. Only successes matter: precision is largest at one.

    Args:
        labels: class of every detection.
        usual: whether a detection counts if nothing is said of it in ``change``.
        place: which detections the candidates are, ascending.
        hit: whether a candidate is a success, at each threshold.
        change: 1 where a candidate counts in spite of ``usual``, -1 where it does not, else 0.
        num_objects: number of objects to be found in each class.
    """
    classes = np.arange(len(num_objects) + 1)
    begin, candidates_begin = np.searchsorted(labels, classes), np.searchsorted(labels[place], classes)
    total, change, hits = _running_sum(usual), _running_sum(change), _running_sum(hit)
    row, threshold = np.nonzero(hit)
    label = labels[place[row]]
    until, since = (row + 1, threshold), (candidates_begin[label], threshold)
    successes = hits[until] - hits[since]
    counted = total[place[row] + 1] - total[begin[label]] + change[until] - change[since]
    reached = np.searchsorted(RECALLS, successes / num_objects[label], side="right") - 1
    precision = np.zeros((hit.shape[1], len(RECALLS), len(num_objects)))
    np.maximum.at(precision, (threshold, reached, label), successes / (counted + np.spacing(1.0)))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # or the best at a higher recall
    found = np.diff(hits[candidates_begin], axis=0).T
    absent = num_objects == 0
    return np.where(absent, np.nan, precision), np.where(absent, np.nan, found / np.maximum(num_objects, 1))


def _running_sum(values: np.ndarray) -> np.ndarray:
    """Sum of the first 0, 1, 2, ... rows."""
    none = np.zeros((1, *values.shape[1:]), dtype=np.int64)
    return np.concatenate([none, np.cumsum(values, axis=0)])
