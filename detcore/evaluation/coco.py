"""COCO average precision and recall.

The numbers come from one function from arrays to arrays, a :data:`detcore.evaluation.curves.CurveEngine`: ours in
NumPy or that of pycocotools, equal to the last bit; another one of the same signature can take their place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from detcore.evaluation.curves import AREA_RANGES, CocoCurves, CurveEngine, pycocotools_curves
from detcore.evaluation.numpy_curves import numpy_curves
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

__all__ = ["CocoEvaluator", "threshold_grid"]

ENGINES: dict[str, CurveEngine] = {"numpy": numpy_curves, "pycocotools": pycocotools_curves}


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
        engine: what turns arrays into curves: ``"numpy"``, ``"pycocotools"``, the slower reference, or
            a function of yours.

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
        engine: str | CurveEngine = "numpy",
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
        if isinstance(engine, str) and engine not in ENGINES:
            raise ValueError(f"CocoEvaluator: engine must be one of {sorted(ENGINES)} or a function; got {engine!r}.")
        self.engine = ENGINES[engine] if isinstance(engine, str) else engine
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
