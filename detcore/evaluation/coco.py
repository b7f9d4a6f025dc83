"""COCO average precision and recall.

The numbers come from pycocotools behind one function from arrays to arrays, a :data:`CurveEngine`;
another engine of the same signature can take its place.
"""

import contextlib
import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from pycocotools.cocoeval import COCOeval

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
    xywh,
)

__all__ = [
    "AREA_RANGES",
    "CocoCurves",
    "CocoEvaluator",
    "CurveEngine",
    "pycocotools_curves",
    "threshold_grid",
]

AREA_RANGES = {
    "all": (0.0, 1e5**2),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e5**2),
}
"""Bounds of an object's area in square pixels, both inclusive."""


@dataclass(frozen=True)
class CocoCurves:
    """What COCO's protocol measures, before it is averaged.

    Letters: T IoU thresholds, R = 101 recalls 0, 0.01, ..., 1, C classes, A area ranges in the order
    of :data:`AREA_RANGES`, L limits on the number of detections.

    Args:
        precision: largest precision at this recall or a higher one; 0 beyond the recall reached,
            nan for a class without objects of that size.
        recall: share of the objects found; nan likewise.
    """

    precision: Float[np.ndarray, "T R C A L"]
    recall: Float[np.ndarray, "T C A L"]


CurveEngine = Callable[..., CocoCurves]
"""``(PooledDetections, PooledTargets, *, num_classes, iou_thresholds, limits, area_ranges) -> CocoCurves``."""


def threshold_grid(start: float = 0.5, stop: float = 0.95, step: float = 0.05) -> tuple[float, ...]:
    """Evenly spaced IoU thresholds, both ends included, as pycocotools computes them.

    Args:
        start: first threshold, in (0, 1].
        stop: last threshold, in [start, 1].
        step: distance, > 0; must divide ``stop - start``.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> [round(t, 2) for t in threshold_grid(0.5, 0.9, 0.1)]
        [0.5, 0.6, 0.7, 0.8, 0.9]
    """
    if not 0 < start <= stop <= 1:
        raise ValueError(f"threshold_grid: start and stop must satisfy 0 < start <= stop <= 1; got {start}, {stop}.")
    if step <= 0:
        raise ValueError(f"threshold_grid: step must be > 0; got {step}.")
    steps = round((stop - start) / step)
    if abs(steps * step - (stop - start)) > 1e-6:
        raise ValueError(f"threshold_grid: step must divide stop - start; got {step} and {stop - start:g}.")
    return tuple(np.linspace(start, stop, steps + 1).tolist())


def pycocotools_curves(
    detections: PooledDetections,
    targets: PooledTargets,
    *,
    num_classes: int,
    iou_thresholds: Sequence[float],
    limits: Sequence[int],
    area_ranges: Mapping[str, tuple[float, float]] = AREA_RANGES,
) -> CocoCurves:
    """Precision and recall of the official implementation, from arrays.

    A target with ``crowd`` takes any number of detections, by intersection over *detection* area. One
    with ``ignore`` alone takes a single detection, by ordinary IoU, like an object outside the area
    range: neither is a success or a failure.

    Args:
        detections: pooled detections of all images.
        targets: pooled objects of the same images.
        num_classes: C; labels are 0..C-1.
        iou_thresholds: least IoU of a match, ascending.
        limits: numbers of detections an image and class, ascending; the best by score stay.
        area_ranges: bounds of an object's area by name, A of them.

    Example:
        >>> dog = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
        >>> seen = {"boxes": [[0, 0, 10, 8]], "labels": [0], "scores": [0.9]}
        >>> curves = pycocotools_curves(
        ...     pool_detections([seen]), pool_targets([dog]), num_classes=1, iou_thresholds=[0.5, 0.9], limits=[100]
        ... )
        >>> curves.recall[:, 0, 0, 0].tolist()
        [1.0, 0.0]

    Reference: Lin et al., Microsoft COCO, ECCV 2014, and cocodataset.org/#detection-eval.
    """
    engine = _ArrayEval(detections, targets)
    engine.params.imgIds = list(range(targets.num_images))
    engine.params.catIds = list(range(num_classes))
    engine.params.iouThrs = np.asarray(iou_thresholds, dtype=np.float64)
    engine.params.maxDets = list(limits)
    engine.params.areaRng = [list(bounds) for bounds in area_ranges.values()]
    engine.params.areaRngLbl = list(area_ranges)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        engine.evaluate()
        engine.accumulate()
    precision, recall = engine.eval["precision"], engine.eval["recall"]
    return CocoCurves(np.where(precision < 0, np.nan, precision), np.where(recall < 0, np.nan, recall))


class _ArrayEval(COCOeval):
    """COCOeval that reads arrays instead of two COCO objects."""

    def __init__(self, detections: PooledDetections, targets: PooledTargets):
        super().__init__(iouType="bbox")
        self.detections, self.targets = detections, targets

    def _prepare(self):
        # The original also sets ignore = iscrowd here and so would count difficult objects.
        self._gts, self._dts = defaultdict(list), defaultdict(list)
        t, d = self.targets, self.detections
        rows = zip(
            t.image.tolist(), t.labels.tolist(), xywh(t.boxes).tolist(), t.area.tolist(), t.crowd.tolist(),
            t.ignore.tolist(), strict=True,
        )  # fmt: skip
        for i, (image, label, box, area, crowd, ignore) in enumerate(rows, 1):  # id 0 would mean "no match"
            self._gts[image, label].append(
                {"id": i, "bbox": box, "area": area, "iscrowd": int(crowd), "ignore": int(ignore)}
            )
        rows = zip(d.image.tolist(), d.labels.tolist(), xywh(d.boxes).tolist(), d.scores.tolist(), strict=True)
        for i, (image, label, box, score) in enumerate(rows, 1):
            self._dts[image, label].append({"id": i, "bbox": box, "area": box[2] * box[3], "score": score})


class CocoEvaluator:
    """Average precision and recall by COCO's rules, for lists of dicts from any detector.

    Detections of a class, best score first, each take the free object of their image that they overlap
    most, if that is at least the IoU threshold; average precision is the area under the resulting
    precision-recall curve, and AP its mean over classes and thresholds.

    Args:
        num_classes: C; labels are 0..C-1.
        iou_thresholds: least IoU of a match, each in (0, 1]: one number, several, or ``None`` for
            COCO's 0.5, 0.55, ..., 0.95. See :func:`threshold_grid`.
        max_detections: number of detections an image **and class** that count, >= 1: COCO's rule, though
            its name suggests a limit an image.
        by_size: false leaves out the numbers by object size, which take most of the time.
        engine: what turns arrays into curves.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> dog = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
        >>> seen = {"boxes": [[0, 0, 10, 8]], "labels": [0], "scores": [0.9]}
        >>> evaluator = CocoEvaluator(num_classes=1)
        >>> evaluator.update([seen], [dog])
        >>> numbers = evaluator.compute()  # an IoU of 0.8 passes 7 thresholds of 10
        >>> round(numbers["AP"], 2), round(numbers["AP50"], 2), round(numbers["AP90"], 2)
        (0.7, 1.0, 0.0)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        iou_thresholds: float | Sequence[float] | None = None,
        max_detections: int = 100,
        by_size: bool = True,
        engine: CurveEngine = pycocotools_curves,
    ):
        self.num_classes = check_num_classes(num_classes, caller="CocoEvaluator")
        self.iou_thresholds = check_thresholds(
            threshold_grid() if iou_thresholds is None else iou_thresholds, caller="CocoEvaluator"
        )
        if max_detections < 1:
            raise ValueError(f"CocoEvaluator: max_detections must be >= 1; got {max_detections}.")
        self.max_detections = max_detections
        self.limits = sorted({limit for limit in (1, 10) if limit < max_detections} | {max_detections})
        self.area_ranges = AREA_RANGES if by_size else {"all": AREA_RANGES["all"]}
        self.engine = engine
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._detections: list[PooledDetections] = []
        self._targets: list[PooledTargets] = []
        self._curves: CocoCurves | None = None

    def update(self, detections: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add images.

        Args:
            detections: one mapping an image: ``boxes`` (n, 4) corners in pixels, ``scores`` (n,),
                ``labels`` (n,) in 0..C-1; n may be 0.
            targets: one mapping an image, in the same order: ``boxes``, ``labels`` and optionally
                ``area`` in square pixels (else the box's), ``iscrowd``, ``ignore``.

        Raises:
            KeyError: if a mapping lacks a key.
            ValueError: if the lists differ in length or a value is wrong; the message names the
                image, counted within this call, and the row.
        """
        found = pool_detections(detections, num_classes=self.num_classes, caller="CocoEvaluator.update")
        truth = pool_targets(targets, num_classes=self.num_classes, caller="CocoEvaluator.update")
        check_same_images(found, truth, caller="CocoEvaluator.update")
        self._detections.append(found)
        self._targets.append(truth)
        self._curves = None

    def curves(self) -> CocoCurves:
        """Precision and recall of all images so far, computed once.

        Raises:
            ValueError: if there is no image yet.
        """
        if self._curves is None:
            if not sum(part.num_images for part in self._targets):
                raise ValueError("CocoEvaluator.compute: needs at least one image; got none. Call update() first.")
            self._curves = self.engine(
                join(self._detections),
                join(self._targets),
                num_classes=self.num_classes,
                iou_thresholds=self.iou_thresholds,
                limits=self.limits,
                area_ranges=self.area_ranges,
            )
        return self._curves

    def compute(self) -> dict[str, float]:
        """The numbers of all images so far, as fractions.

        Returns:
            ``AP``, mean over classes and thresholds; ``AP50``, ``AP75`` and so on, one for each
            threshold there is; ``AP_small``, ``AP_medium``, ``AP_large`` by the area of the object
            (32 and 96 pixels squared); ``AR1``, ``AR10``, ``AR100``, recall at that many detections
            an image and class (``AR100`` is called after ``max_detections``), ``AR_small`` and so on.
            nan where no class has an object of that size.

        Raises:
            ValueError: if there is no image yet.
        """
        curves = self.curves()
        sizes = list(self.area_ranges)[1:]
        result = {"AP": mean_present(curves.precision[:, :, :, 0, -1])}
        for i, threshold in enumerate(self.iou_thresholds):
            result[f"AP{100 * threshold:g}"] = mean_present(curves.precision[i, :, :, 0, -1])
        for i, size in enumerate(sizes, 1):
            result[f"AP_{size}"] = mean_present(curves.precision[:, :, :, i, -1])
        for i, limit in enumerate(self.limits):
            result[f"AR{limit}"] = mean_present(curves.recall[:, :, 0, i])
        for i, size in enumerate(sizes, 1):
            result[f"AR_{size}"] = mean_present(curves.recall[:, :, i, -1])
        return result

    def per_class(self) -> Float[np.ndarray, "T C"]:
        """Average precision of every class at every threshold; nan for a class without objects."""
        return self.curves().precision[:, :, :, 0, -1].mean(axis=1)  # nan stays nan
