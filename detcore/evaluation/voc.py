"""PASCAL VOC average precision: the 11-point rule of 2007 and the area rule of 2010."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from detcore.evaluation.matching import best_matches
from detcore.evaluation.pooling import (
    PooledDetections,
    PooledTargets,
    check_num_classes,
    check_same_images,
    check_thresholds,
    join,
    mean_present,
    pool_detections,
    pool_targets,
)

__all__ = ["VocEvaluator", "eleven_point_ap", "precision_recall_area"]


def eleven_point_ap(correct: Bool[np.ndarray, " D"], num_objects: int) -> float:
    r"""Average precision of 2007: the mean of the best precision at recall 0, 0.1, ..., 1 or more.

    .. math:: \mathrm{AP} = \frac{1}{11} \sum_{k=0}^{10} \max_{i:\ 10\,\mathrm{TP}_i \ge k\,n}
        \frac{\mathrm{TP}_i}{i}

    Recalls are compared as integers: ``numpy.arange(0, 1.1, 0.1)`` holds 0.30000000000000004 and so
    fails a detector that finds exactly 3 objects of 10.

    Args:
        correct: whether each detection of one class found an object, best score first; detections of
            ignored objects left out.
        num_objects: n, number of objects to find; nan is returned if it is 0.

    Example:
        >>> found = np.array([True, False])  # one object of two, so recall reaches 0.5
        >>> round(eleven_point_ap(found, 2), 4)  # six points of eleven have precision 1
        0.5455

    Reference: Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010, section 4.2.
    """
    if num_objects == 0:
        return float("nan")
    found, envelope = _curve(correct)
    first = np.searchsorted(10 * found, np.arange(11) * num_objects)  # where each recall is first reached
    return float(np.append(envelope, 0.0)[first].mean())


def precision_recall_area(correct: Bool[np.ndarray, " D"], num_objects: int) -> float:
    """Average precision since 2010: the area under the curve of best precision at a recall or more.

    Args:
        correct: whether each detection of one class found an object, best score first; detections of
            ignored objects left out.
        num_objects: number of objects to find; nan is returned if it is 0.

    Example:
        >>> precision_recall_area(np.array([True, False, True]), 2)  # 1/2 * 1 + 1/2 * 2/3
        0.8333333333333333

    Reference: Everingham et al., The PASCAL VOC Challenge: A Retrospective, IJCV 2015, section 2.2.
    """
    if num_objects == 0:
        return float("nan")
    _, envelope = _curve(correct)
    return float(envelope[correct].sum() / num_objects)  # every success is one step of 1 / n in recall


def _curve(correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Successes so far, and the largest precision from each detection on."""
    found = np.cumsum(correct)
    precision = found / np.arange(1, len(correct) + 1)
    return found, np.maximum.accumulate(precision[::-1])[::-1]


_INTERPOLATIONS = {"area": precision_recall_area, "11point": eleven_point_ap}


class VocEvaluator:
    """Average precision by PASCAL VOC's rules, for lists of dicts from any detector.

    Detections of a class, best score first over all images, are compared with the object of their image
    that they overlap most. If the IoU suffices, the first such detection is a success and every later
    one a failure, even where a second object would do (COCO would take that one). Detections whose best
    object is marked ``ignore`` (difficult) or ``iscrowd`` count neither way, and such objects need not be found.

    Args:
        num_classes: C; labels are 0..C-1.
        iou_threshold: least IoU of a success, in (0, 1]; or several, ascending.
        interpolation: ``"area"`` (VOC 2010 on) or ``"11point"`` (VOC 2007).
        inclusive: measure sides as the VOC devkit does, ``x2 - x1 + 1``, for boxes given as
            inclusive pixel indices. Boxes of detcore's data sets are not: their width is ``x2 - x1``.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> dog = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
        >>> seen = {"boxes": [[0, 0, 10, 9], [0, 0, 10, 8]], "labels": [0, 0], "scores": [0.9, 0.8]}
        >>> evaluator = VocEvaluator(num_classes=2)
        >>> evaluator.update([seen], [dog])
        >>> evaluator.compute()  # the second box is a duplicate, too late to do harm
        {'AP': 1.0, 'AP50': 1.0}
    """

    def __init__(
        self,
        num_classes: int,
        *,
        iou_threshold: float | Sequence[float] = 0.5,
        interpolation: Literal["area", "11point"] = "area",
        inclusive: bool = False,
    ):
        if interpolation not in _INTERPOLATIONS:
            raise ValueError(
                f"VocEvaluator: interpolation must be one of {sorted(_INTERPOLATIONS)}; got {interpolation!r}."
            )
        self.num_classes = check_num_classes(num_classes, caller="VocEvaluator")
        self.iou_thresholds = check_thresholds(iou_threshold, caller="VocEvaluator")
        self.interpolation = interpolation
        self.inclusive = inclusive
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._detections: list[PooledDetections] = []
        self._targets: list[PooledTargets] = []

    def update(self, detections: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add images.

        Args:
            detections: one mapping an image: ``boxes`` (n, 4) corners in pixels, ``scores`` (n,),
                ``labels`` (n,) in 0..C-1; n may be 0.
            targets: one mapping an image, in the same order: ``boxes``, ``labels`` and optionally
                ``ignore`` and ``iscrowd``.

        Raises:
            KeyError: if a mapping lacks a key.
            ValueError: if the lists differ in length or a value is wrong; the message names the
                image, counted within this call, and the row.
        """
        found = pool_detections(detections, num_classes=self.num_classes, caller="VocEvaluator.update")
        truth = pool_targets(targets, num_classes=self.num_classes, caller="VocEvaluator.update")
        check_same_images(found, truth, caller="VocEvaluator.update")
        self._detections.append(found)
        self._targets.append(truth)

    def per_class(self) -> Float[np.ndarray, "T C"]:
        """Average precision of every class at every threshold; nan for a class without objects.

        Raises:
            ValueError: if there is no image yet.
        """
        if not sum(part.num_images for part in self._targets):
            raise ValueError("VocEvaluator.compute: needs at least one image; got none. Call update() first.")
        found, truth = join(self._detections), join(self._targets)
        matches = best_matches(found, truth, crowds=True, inclusive=self.inclusive)
        num_objects = np.bincount(truth.labels[~truth.ignore], minlength=self.num_classes)
        order = np.lexsort((-found.scores, found.labels))  # by class, then by score; stable
        bounds = np.searchsorted(found.labels[order], np.arange(self.num_classes + 1))
        average = _INTERPOLATIONS[self.interpolation]
        result = np.full((len(self.iou_thresholds), self.num_classes), np.nan)
        for t, threshold in enumerate(self.iou_thresholds):
            verdict = _verdicts(matches.iou[order] >= threshold, matches.target[order], truth.ignore)
            for c in range(self.num_classes):
                mine = verdict[bounds[c] : bounds[c + 1]]
                result[t, c] = average(mine[mine >= 0] == 1, int(num_objects[c]))
        return result

    def compute(self) -> dict[str, float]:
        """The numbers of all images so far, as fractions.

        Returns:
            ``AP``, mean over classes (those with objects) and thresholds, and ``AP50`` or the like for
            each threshold; nan if no class has an object.

        Raises:
            ValueError: if there is no image yet.
        """
        values = self.per_class()
        result = {"AP": mean_present(values)}
        for threshold, row in zip(self.iou_thresholds, values, strict=True):
            result[f"AP{100 * threshold:g}"] = mean_present(row)
        return result


def _verdicts(
    close: Bool[np.ndarray, " D"], target: Int[np.ndarray, " D"], ignore: Bool[np.ndarray, " M"]
) -> Int[np.ndarray, " D"]:
    """1 for success, 0 for failure, -1 for neither; detections come best first."""
    verdict = np.zeros(len(close), dtype=np.int64)
    rows = np.flatnonzero(close)
    _, first = np.unique(target[rows], return_index=True)
    verdict[rows[first]] = 1
    verdict[rows[ignore[target[rows]]]] = -1
    return verdict
