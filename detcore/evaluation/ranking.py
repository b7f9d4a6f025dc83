"""What a detector's ranking costs: counts and bins by score, true IoU as the score, and suppression."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision.ops import batched_nms

from detcore.evaluation.matching import best_matches
from detcore.evaluation.pooling import check_same_images, pool_detections, pool_targets

__all__ = ["ScoreBins", "ThresholdCounts", "count_above", "score_bins", "suppress", "with_true_iou"]


@dataclass(frozen=True)
class ThresholdCounts:
    """How many boxes of each image exceed thresholds of score and of IoU.

    Args:
        floor: boxes with a score above it are counted, others not at all.
        score_thresholds: S of them.
        iou_thresholds: T of them.
        total: boxes above the floor, an image.
        by_score: boxes above the floor and each score threshold.
        by_iou: boxes above the floor whose IoU exceeds each IoU threshold.
    """

    floor: float
    score_thresholds: tuple[float, ...]
    iou_thresholds: tuple[float, ...]
    total: Int[np.ndarray, " I"]
    by_score: Int[np.ndarray, "I S"]
    by_iou: Int[np.ndarray, "I T"]

    def score_shares(self) -> Float[np.ndarray, " S"]:
        """Counts by score over the total of all images; nan without boxes."""
        return _share(self.by_score.sum(0), self.total.sum())

    def iou_shares(self) -> Float[np.ndarray, " T"]:
        """Counts by IoU over the total of all images; nan without boxes."""
        return _share(self.by_iou.sum(0), self.total.sum())

    def image_iou_shares(self) -> Float[np.ndarray, "I T"]:
        """Counts by IoU over each image's own total; nan for an image without boxes."""
        return _share(self.by_iou, self.total[:, None])

    def image_score_shares(self) -> Float[np.ndarray, "I S"]:
        """Counts by score over each image's own total; nan for an image without boxes."""
        return _share(self.by_score, self.total[:, None])


def _share(part: np.ndarray, whole: np.ndarray | np.integer) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def count_above(
    scores: Float[np.ndarray, " D"],
    ious: Float[np.ndarray, " D"],
    image: Int[np.ndarray, " D"],
    *,
    num_images: int,
    floor: float = 0.05,
    score_thresholds: Sequence[float] = (0.05, 0.5, 0.6, 0.7, 0.8, 0.9),
    iou_thresholds: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9),
) -> ThresholdCounts:
    """Count boxes above thresholds of score and of IoU, image by image.

    The share of boxes with IoU > 0.5 among those with score > 0.05 falls when suppression runs, and the
    fall has been read as a loss of good boxes. It is not one: of a hundred boxes on an object
    suppression keeps one and counts it once, while boxes scattered over the background have nothing to
    be suppressed by. The best IoU of each object (:func:`best_matches`) tells what is really lost.

    Args:
        scores: one a box.
        ious: true IoU of the box, 0 on the background.
        image: index of the box's image.
        num_images: I.
        floor: score that a box must exceed to be counted.
        score_thresholds: ascending.
        iou_thresholds: ascending.

    Example:
        >>> scores, ious = np.array([0.9, 0.6, 0.2, 0.01]), np.array([0.8, 0.55, 0.0, 0.95])
        >>> counts = count_above(scores, ious, np.zeros(4, dtype=int), num_images=1)
        >>> counts.total.tolist(), counts.by_iou.tolist()  # the last box is below the floor
        ([3], [[2, 1, 1, 0, 0]])

    Reference: 003, Table 1 and Figure 2; the errata are discussed beside the figure in the book.
    """
    keep = scores > floor

    def count(chosen: np.ndarray) -> np.ndarray:
        return np.bincount(image[keep & chosen], minlength=num_images)

    return ThresholdCounts(
        floor,
        tuple(score_thresholds),
        tuple(iou_thresholds),
        count(keep),
        np.stack([count(scores > t) for t in score_thresholds], axis=1),
        np.stack([count(ious > t) for t in iou_thresholds], axis=1),
    )


@dataclass(frozen=True)
class ScoreBins:
    """What boxes of about the same score are worth.

    Args:
        edges: bounds of the bins; bin k holds scores from ``edges[k]``, below ``edges[k + 1]``; the
            last one includes its upper bound.
        count: boxes in each bin.
        mean_score: nan in an empty bin.
        mean_iou: nan in an empty bin.
        share_close: share of boxes with IoU >= 0.5, which a calibrated class score would equal.
    """

    edges: Float[np.ndarray, " K_1"]
    count: Int[np.ndarray, " K"]
    mean_score: Float[np.ndarray, " K"]
    mean_iou: Float[np.ndarray, " K"]
    share_close: Float[np.ndarray, " K"]

    def gap(self) -> float:
        """Mean distance of score and IoU, bin by bin, weighted by the boxes in each; nan without boxes."""
        if not self.count.sum():
            return float("nan")
        filled = self.count > 0
        distance = np.abs(self.mean_score - self.mean_iou)[filled]
        return float(np.average(distance, weights=self.count[filled]))


def score_bins(scores: Float[np.ndarray, " D"], ious: Float[np.ndarray, " D"], *, bins: int = 10) -> ScoreBins:
    """Mean IoU of the boxes in bins of equal width in score.

    Args:
        scores: one a box; those outside [0, 1] fall into the first or the last bin.
        ious: true IoU of the box.
        bins: number of bins, >= 1.

    Raises:
        ValueError: if ``bins`` is below 1.

    Example:
        >>> table = score_bins(np.array([0.2, 0.7, 0.9]), np.array([0.0, 0.9, 0.5]), bins=2)
        >>> table.count.tolist(), table.mean_iou.tolist()
        ([1, 2], [0.0, 0.7])
    """
    if bins < 1:
        raise ValueError(f"score_bins: bins must be >= 1; got {bins}.")
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges[1:-1], scores, side="right")
    count = np.bincount(place, minlength=bins)

    def mean(values: np.ndarray) -> np.ndarray:
        return _share(np.bincount(place, weights=values, minlength=bins), count)

    return ScoreBins(edges, count, mean(scores), mean(ious), mean((ious >= 0.5).astype(float)))


def with_true_iou(
    detections: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]], *, class_aware: bool = True
) -> list[dict[str, Tensor]]:
    """The detections with the IoU that they really have as their score: an oracle's ranking.

    What they then gain in average precision is what a better ranking of the same boxes could bring.
    It is no upper bound: two boxes on one object are both ranked high, though the second one is a
    failure. That matters little after suppression and much before it; see :func:`suppress`.

    Args:
        detections: one mapping an image: ``boxes``, ``scores``, ``labels``.
        targets: one mapping an image, in the same order: ``boxes``, ``labels``, optionally ``iscrowd``;
            crowds count as no object.
        class_aware: only objects of the predicted class count.

    Returns:
        ``boxes``, ``labels`` and ``scores`` of each image, in the given order, float64.

    Raises:
        KeyError: if a mapping lacks a key.
        ValueError: if the lists differ in length or a value is wrong.

    Example:
        >>> dog = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
        >>> seen = {"boxes": [[0, 0, 10, 6], [0, 0, 10, 9]], "labels": [0, 0], "scores": [0.9, 0.4]}
        >>> with_true_iou([seen], [dog])[0]["scores"].tolist()
        [0.6, 0.9]
    """
    found = pool_detections(detections, caller="with_true_iou")
    truth = pool_targets(targets, caller="with_true_iou")
    check_same_images(found, truth, caller="with_true_iou")
    overlap = best_matches(found, truth, class_aware=class_aware).iou
    parts = np.searchsorted(found.image, np.arange(1, found.num_images))
    columns = [np.split(values, parts) for values in (found.boxes, found.labels, overlap)]
    return [
        {"boxes": torch.from_numpy(b), "labels": torch.from_numpy(k), "scores": torch.from_numpy(s)}
        for b, k, s in list(zip(*columns, strict=True))[: found.num_images]
    ]


def suppress(
    detections: Sequence[Mapping[str, Any]], *, nms_iou: float = 0.5, max_detections: int | None = 100
) -> list[dict[str, Tensor]]:
    """Non-maximum suppression, class by class, of lists of dicts.

    Args:
        detections: one mapping an image: ``boxes``, ``scores``, ``labels``; further keys of one value
            a box go along.
        nms_iou: a box goes if a better one of its class overlaps it by more than this, in [0, 1].
        max_detections: best boxes kept an image; ``None`` for all.

    Returns:
        The remaining detections of each image, best first.

    Raises:
        KeyError: if a mapping lacks a key.
        ValueError: if a value is wrong.

    Example:
        >>> seen = {"boxes": [[0, 0, 10, 6], [0, 0, 10, 9]], "labels": [0, 0], "scores": [0.9, 0.4]}
        >>> suppress([seen])[0]["scores"].tolist()
        [0.9]
    """
    if not 0 <= nms_iou <= 1:
        raise ValueError(f"suppress: nms_iou must be in [0, 1]; got {nms_iou}.")
    found = pool_detections(detections, caller="suppress")
    columns = {"boxes": found.boxes, "labels": found.labels, **found.score_kinds()}
    parts = np.searchsorted(found.image, np.arange(1, found.num_images))
    split = {name: np.split(values, parts) for name, values in columns.items()}
    result = []
    for i in range(found.num_images):  # at the door; the detectors' own suppression is batched
        mine = {name: torch.from_numpy(values[i]) for name, values in split.items()}
        kept = batched_nms(mine["boxes"], mine["scores"], mine["labels"], nms_iou)[:max_detections]
        result.append({name: values[kept] for name, values in mine.items()})
    return result


def lost_objects(
    before: Float[np.ndarray, " M"], after: Float[np.ndarray, " M"], threshold: float
) -> Bool[np.ndarray, " M"]:
    """Objects that some box reached by ``threshold`` before suppression and none after it."""
    return (before >= threshold) & (after < threshold)
