"""Recall by size of the object and by the score from which detections count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from detcore.evaluation.matching import pairs_in_chunks, place_in_group
from detcore.evaluation.pooling import (
    PooledDetections,
    PooledTargets,
    check_num_classes,
    check_same_images,
    check_thresholds,
    join,
    pool_detections,
    pool_targets,
)

__all__ = ["SIZES", "RecallCounts", "RecallEvaluator", "size_classes"]

SIZES = ("small", "medium", "large")
"""Names of what :func:`size_classes` numbers."""


def size_classes(area: Float[np.ndarray, " M"]) -> Int[np.ndarray, " M"]:
    """Size class of every object: 0 small (below 32 x 32 pixels), 1 medium (below 96 x 96), 2 large.

    Args:
        area: square pixels.

    Example:
        >>> size_classes(np.array([1023.0, 1024.0, 9215.0, 9216.0])).tolist()
        [0, 1, 1, 2]

    Reference: bounds of Lin et al., Microsoft COCO, ECCV 2014. Deviation: COCO's tools count an area on a
        bound in both classes; here every object has one.
    """
    return np.searchsorted(np.array([32.0**2, 96.0**2]), area, side="right")


@dataclass(frozen=True)
class RecallCounts:
    """How many objects of each size are found by the detections from each score on.

    Args:
        score_thresholds: T of them, ascending.
        found: objects found, by threshold and :data:`SIZES`.
        objects: objects there are, by :data:`SIZES`.
    """

    score_thresholds: tuple[float, ...]
    found: Int[np.ndarray, "T 3"]
    objects: Int[np.ndarray, " 3"]

    def shares(self) -> Float[np.ndarray, "T 3"]:
        """Recall, in [0, 1]; nan where there is no object of that size.

        Example:
            >>> RecallCounts((0.1,), np.array([[3, 0, 2]]), np.array([4, 0, 2])).shares().tolist()
            [[0.75, nan, 1.0]]
        """
        with np.errstate(invalid="ignore"):  # 0 / 0
            return self.found / self.objects

    def as_dict(self) -> dict[str, Any]:
        """The counts as JSON types.

        Example:
            >>> RecallCounts((0.1,), np.array([[3, 0, 2]]), np.array([4, 0, 2])).as_dict()["found"]
            {'small': [3], 'medium': [0], 'large': [2]}
        """
        return {
            "score_thresholds": list(self.score_thresholds),
            "objects": dict(zip(SIZES, self.objects.tolist(), strict=True)),
            "found": dict(zip(SIZES, self.found.T.tolist(), strict=True)),
        }

    def summary(self) -> str:
        """Recall and the counts behind it as text, a line a threshold.

        Example:
            >>> print(RecallCounts((0.1,), np.array([[3, 0, 2]]), np.array([4, 0, 2])).summary())
            recall by size, score >=               small            medium             large
              0.1                            3/4   75.0%       0/0       -        2/2  100.0%
        """
        lines = [f"{'recall by size, score >=':<26}" + "".join(f"{size:>18}" for size in SIZES)]
        for threshold, found, shares in zip(self.score_thresholds, self.found, self.shares(), strict=True):
            cells = [
                f"{n}/{m}" + ("       -" if np.isnan(share) else f"{100 * share:>7.1f}%")
                for n, m, share in zip(found, self.objects, shares, strict=True)
            ]
            lines.append(f"  {threshold:<24g}" + "".join(f"{cell:>18}" for cell in cells))
        return "\n".join(lines)


class RecallEvaluator:
    """Share of the objects that are found, by their size, for lists of dicts from any detector.

    An object is found if a detection of its class overlaps it enough. There is no rivalry: one detection
    may find several objects. Objects marked ``ignore`` (difficult) or ``iscrowd`` need not be found and
    do not count. Detections are taken as they come, suppressed by the detector; its own lower
    limit of the score has to be below the thresholds here.

    Args:
        num_classes: C; labels are 0..C-1.
        score_thresholds: detections with this score or a higher one count; one number or several,
            ascending, in [0, 1].
        iou_threshold: least IoU of a detection and the object that it finds, in (0, 1].
        sizes: ``"voc"`` goes by the area of the object's box, in original pixels with both end pixels
            counted; ``"coco"`` by the annotated ``area``, the mask's. See :func:`size_classes`.
        class_aware: only detections of its own class find an object.
        inclusive: boxes are inclusive pixel indices with sides ``x2 - x1 + 1``, for IoU and for area.
            Boxes of detcore's data sets are not: their ``x2 - x1`` counts both end pixels already.
        max_detections: the best so many an image count, over all classes, >= 1; ``None`` for all.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> scene = {"boxes": [[0, 0, 20, 20], [0, 0, 100, 100]], "labels": [0, 1]}
        >>> seen = {"boxes": [[0, 0, 20, 18], [0, 0, 99, 99]], "labels": [0, 1], "scores": [0.05, 0.9]}
        >>> evaluator = RecallEvaluator(num_classes=2)
        >>> evaluator.update([seen], [scene])
        >>> numbers = evaluator.compute()
        >>> [(numbers[f"R{t}_small"], numbers[f"R{t}_large"]) for t in (0.01, 0.1)]
        [(1.0, 1.0), (0.0, 1.0)]

    Reference: Shi et al., Scale-balanced loss for object detection, Pattern Recognition 2021, Tables 3 and 4.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        score_thresholds: float | Sequence[float] = (0.01, 0.1, 0.3),
        iou_threshold: float = 0.5,
        sizes: Literal["voc", "coco"] = "voc",
        class_aware: bool = True,
        inclusive: bool = False,
        max_detections: int | None = 200,
    ):
        if sizes not in ("voc", "coco"):
            raise ValueError(f'RecallEvaluator: sizes must be "voc" or "coco"; got {sizes!r}.')
        if max_detections is not None and max_detections < 1:
            raise ValueError(f"RecallEvaluator: max_detections must be >= 1 or None; got {max_detections}.")
        self.num_classes = check_num_classes(num_classes, caller="RecallEvaluator")
        self.score_thresholds = _check_scores(score_thresholds)
        (self.iou_threshold,) = check_thresholds(iou_threshold, caller="RecallEvaluator")
        self.sizes, self.class_aware, self.inclusive = sizes, class_aware, inclusive
        self.max_detections = max_detections
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._detections: list[PooledDetections] = []
        self._targets: list[PooledTargets] = []

    def update(self, detections: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add images.

        Args:
            detections: one mapping an image: ``boxes`` (n, 4) corners in original pixels, ``scores`` (n,),
                ``labels`` (n,) in 0..C-1; n may be 0.
            targets: one mapping an image, in the same order: ``boxes``, ``labels`` and optionally
                ``area`` in square pixels (else the box's), ``iscrowd``, ``ignore``.

        Raises:
            KeyError: if a mapping lacks a key.
            ValueError: if the lists differ in length or a value is wrong; the message names the
                image, counted within this call, and the row.
        """
        found = pool_detections(detections, num_classes=self.num_classes, caller="RecallEvaluator.update")
        truth = pool_targets(targets, num_classes=self.num_classes, caller="RecallEvaluator.update")
        check_same_images(found, truth, caller="RecallEvaluator.update")
        self._detections.append(found)
        self._targets.append(truth)

    def counts(self, score_thresholds: float | Sequence[float] | None = None) -> RecallCounts:
        """Objects found and objects there are, by size.

        Args:
            score_thresholds: others than the evaluator's, for a curve.

        Raises:
            ValueError: if there is no image yet, or a threshold is out of range.
        """
        if not sum(part.num_images for part in self._targets):
            raise ValueError("RecallEvaluator.compute: needs at least one image; got none. Call update() first.")
        thresholds = self.score_thresholds if score_thresholds is None else _check_scores(score_thresholds)
        found, truth = join(self._detections), join(self._targets)
        scores = self._highest_scores(found, truth)[~truth.ignore]
        size = size_classes(self._areas(truth)[~truth.ignore])
        passing = scores >= np.array(thresholds)[:, None]  # T M
        return RecallCounts(
            thresholds,
            np.stack([np.bincount(size[row], minlength=len(SIZES)) for row in passing]),
            np.bincount(size, minlength=len(SIZES)),
        )

    def compute(self) -> dict[str, float]:
        """The numbers of all images so far, as fractions.

        Returns:
            ``R0.1``, recall of all objects by detections with a score of at least 0.1, ``R0.1_small``,
            ``R0.1_medium``, ``R0.1_large``, and the same for every other threshold; nan where there is
            no object of that size.

        Raises:
            ValueError: if there is no image yet.
        """
        counts = self.counts()
        result = {}
        total = int(counts.objects.sum())
        rows = zip(counts.score_thresholds, counts.found, counts.shares(), strict=True)
        for threshold, found, shares in rows:
            result[f"R{threshold:g}"] = int(found.sum()) / total if total else float("nan")
            result |= {f"R{threshold:g}_{size}": float(share) for size, share in zip(SIZES, shares, strict=True)}
        return result

    def _areas(self, truth: PooledTargets) -> Float[np.ndarray, " M"]:
        if self.sizes == "coco":
            return truth.area
        width, height = (truth.boxes[:, 2:] - truth.boxes[:, :2] + self.inclusive).T
        return width * height

    def _highest_scores(self, found: PooledDetections, truth: PooledTargets) -> Float[np.ndarray, " M"]:
        """The score of the best detection that finds each object; -1 if none does."""
        counts = _best_of_image(found, self.max_detections)
        highest = np.full(len(truth.image), -1.0)
        for detection_index, target_index, overlap in pairs_in_chunks(
            found, truth, class_aware=self.class_aware, crowds=False, inclusive=self.inclusive
        ):
            good = (overlap >= self.iou_threshold) & counts[detection_index]
            np.maximum.at(highest, target_index[good], found.scores[detection_index[good]])
        return highest


def _best_of_image(found: PooledDetections, limit: int | None) -> Bool[np.ndarray, " D"]:
    """Which detections are among the best ``limit`` of their image; of equals the first ones."""
    keep = np.full(len(found.image), True)
    if limit is not None:
        order = np.lexsort((-found.scores, found.image))  # stable
        keep[order] = place_in_group(found.image[order]) < limit
    return keep


def _check_scores(thresholds: float | Sequence[float]) -> tuple[float, ...]:
    values = tuple(np.atleast_1d(np.asarray(thresholds, dtype=np.float64)).tolist())
    if not values or any(not 0 <= t <= 1 for t in values) or any(b <= a for a, b in pairwise(values)):
        raise ValueError(f"RecallEvaluator: score_thresholds must be ascending numbers in [0, 1]; got {list(values)}.")
    return values
