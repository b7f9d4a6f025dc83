"""Precision and recall by COCO's protocol, from arrays to arrays: the shape of an engine, and the reference.

A :data:`CurveEngine` turns pooled detections and objects into :class:`CocoCurves`. There are two, and they agree to
the last bit: :func:`pycocotools_curves`, the official implementation, and the one in
:mod:`detcore.evaluation.numpy_curves`.
"""

import contextlib
import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from pycocotools.cocoeval import COCOeval

from detcore.evaluation.pooling import PooledDetections, PooledTargets, xywh

__all__ = ["AREA_RANGES", "CocoCurves", "CurveEngine", "pycocotools_curves"]

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
        >>> from detcore.evaluation import pool_detections, pool_targets
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
