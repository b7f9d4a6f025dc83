"""How far a detector's scores and the quality of its boxes are apart, and what that costs.

A detector is misaligned if a box that fits better gets the lower score. Ranking and suppression go by
score, so the better box is lost. :func:`diagnose` measures it on lists of dicts from any detector.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from detcore.evaluation.coco import CocoEvaluator
from detcore.evaluation.correlation import Correlation, correlate
from detcore.evaluation.matching import best_matches
from detcore.evaluation.pooling import (
    PooledDetections,
    check_num_classes,
    check_same_images,
    pool_detections,
    pool_targets,
)
from detcore.evaluation.ranking import (
    ScoreBins,
    ThresholdCounts,
    count_above,
    lost_objects,
    score_bins,
    suppress,
    with_true_iou,
)

__all__ = ["Misalignment", "diagnose"]

AFTER, BEFORE = "after NMS", "before NMS"


@dataclass(frozen=True)
class Misalignment:
    """What :func:`diagnose` found. Entries for ``"before NMS"`` exist if it was given candidates.

    Args:
        num_images: images looked at.
        num_detections: boxes the detector returned.
        scores: score of each box, by stage (``"after NMS"``, ``"before NMS"``).
        ious: true IoU of each box, by stage; 0 without an object of its class.
        correlations: score against IoU, by ``"<kind of score>, <set of boxes>"``.
        counts: boxes above thresholds, by stage.
        best_ious: best IoU with a box of its class, for each object, by stage; crowds and ignored
            objects left out.
        average_precision: COCO's numbers by ranking: ``"as scored"``, ``"by true IoU"`` (same boxes) and
            ``"by true IoU before NMS"`` (candidates ranked and suppressed by true IoU).
        bins: boxes after NMS by score.
    """

    num_images: int
    num_detections: int
    scores: dict[str, Float[np.ndarray, " _"]]
    ious: dict[str, Float[np.ndarray, " _"]]
    correlations: dict[str, Correlation]
    counts: dict[str, ThresholdCounts]
    best_ious: dict[str, Float[np.ndarray, " M"]]
    average_precision: dict[str, dict[str, float]]
    bins: ScoreBins

    @property
    def num_objects(self) -> int:
        """Objects to find: neither crowds nor ignored."""
        return len(self.best_ious[AFTER])

    def objects_lost(self, threshold: float = 0.5) -> int | None:
        """Objects that a candidate reached by ``threshold`` and no final box does; ``None`` without candidates."""
        if BEFORE not in self.best_ious:
            return None
        return int(lost_objects(self.best_ious[BEFORE], self.best_ious[AFTER], threshold).sum())

    def as_dict(self) -> dict[str, Any]:
        """The numbers as JSON types, nan as ``None``; single boxes and objects are left out."""
        grid = (0.5, 0.6, 0.7, 0.8, 0.9)
        content = {
            "num_images": self.num_images,
            "num_objects": self.num_objects,
            "num_detections": self.num_detections,
            "correlations": {name: value.as_dict() for name, value in self.correlations.items()},
            "average_precision": self.average_precision,
            "best_iou": {
                stage: {"mean": _mean(best), "share": {f"{t:g}": _mean(best >= t) for t in grid}}
                for stage, best in self.best_ious.items()
            },
            "objects_lost": {f"{t:g}": self.objects_lost(t) for t in grid} if BEFORE in self.best_ious else None,
            "counts": {
                stage: {
                    "score_floor": value.floor,
                    "boxes": int(value.total.sum()),
                    "score_thresholds": list(value.score_thresholds),
                    "by_score": value.by_score.sum(0).tolist(),
                    "score_shares": value.score_shares().tolist(),
                    "iou_thresholds": list(value.iou_thresholds),
                    "by_iou": value.by_iou.sum(0).tolist(),
                    "iou_shares": value.iou_shares().tolist(),
                }
                for stage, value in self.counts.items()
            },
            "bins": {
                "edges": self.bins.edges.tolist(),
                "count": self.bins.count.tolist(),
                "mean_score": self.bins.mean_score.tolist(),
                "mean_iou": self.bins.mean_iou.tolist(),
                "share_close": self.bins.share_close.tolist(),
                "gap": self.bins.gap(),
            },
        }
        return _without_nan(content)

    def summary(self) -> str:
        """The numbers as text, for a terminal of 100 columns."""
        lines = [f"{self.num_images} images, {self.num_objects} objects, {self.num_detections} detections", ""]
        lines += [f"{'correlation of score and IoU':<28}{'boxes':>8}{'Pearson':>21}{'Spearman':>21}{'Kendall':>21}"]
        for name, c in self.correlations.items():
            cells = [
                f"{_number(getattr(c, key))} {_interval(c.intervals[key])}"
                for key in ("pearson", "spearman", "kendall")
            ]
            lines += [f"  {name:<26}{c.count:>8}" + "".join(f"{cell:>21}" for cell in cells)]
        names = [n for n in ("AP", "AP50", "AP60", "AP75", "AP90") if n in self.average_precision["as scored"]]
        lines += ["", f"{'average precision':<28}" + "".join(f"{n:>8}" for n in names)]
        for ranking, numbers in self.average_precision.items():
            lines += [f"  {ranking:<26}" + "".join(f"{_number(numbers[n]):>8}" for n in names)]
        grid = (0.5, 0.6, 0.7, 0.8, 0.9)
        lines += ["", f"{'best IoU of an object':<28}{'mean':>8}" + "".join(f"{f'>={t:g}':>8}" for t in grid)]
        for stage, best in self.best_ious.items():
            cells = [_number(v) for v in (_mean(best), *(_mean(best >= t) for t in grid))]
            lines += [f"  {stage:<26}" + "".join(f"{cell:>8}" for cell in cells)]
        if BEFORE in self.best_ious:
            lines += [f"  {'objects lost by NMS':<26}{'':>8}" + "".join(f"{self.objects_lost(t):>8}" for t in grid)]
        floor = self.counts[AFTER].floor
        lines += [
            "",
            f"{f'share of boxes, score > {floor:g}':<28}{'boxes':>8}" + "".join(f"{f'>{t:g}':>8}" for t in grid),
        ]
        for stage, c in self.counts.items():
            shares = {"IoU": (c.iou_thresholds, c.iou_shares()), "score": (c.score_thresholds, c.score_shares())}
            for what, (thresholds, values) in shares.items():
                cells = [_number(values[thresholds.index(t)]) for t in grid]
                label, total = f"{what}, {stage}", int(c.total.sum())
                lines += [f"  {label:<26}{total:>8}" + "".join(f"{cell:>8}" for cell in cells)]
        lines += ["", f"{'boxes by score':<28}{'boxes':>8}{'score':>8}{'IoU':>8}{'>=0.5':>8}"]
        rows = zip(self.bins.count, self.bins.mean_score, self.bins.mean_iou, self.bins.share_close, strict=True)
        for k, (count, *values) in enumerate(rows):
            label = f"{self.bins.edges[k]:.1f} to {self.bins.edges[k + 1]:.1f}"
            lines += [f"  {label:<26}{count:>8}" + "".join(f"{_number(v):>8}" for v in values)]
        return "\n".join(lines)


def diagnose(
    detections: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    num_classes: int,
    *,
    candidates: Sequence[Mapping[str, Any]] | None = None,
    class_aware: bool = True,
    iou_thresholds: float | Sequence[float] | None = None,
    max_detections: int = 100,
    nms_iou: float = 0.5,
    score_floor: float = 0.05,
    bootstrap: int = 200,
    seed: int = 0,
) -> Misalignment:
    """Measure how a detector's scores and the IoU of its boxes go together, and what it costs where they do not.

    A box's IoU is the largest with an object of its predicted class, 0 if there is none. Boxes on the
    background, all at 0, dominate the correlation over all boxes; the set ``IoU >= 0.5`` asks instead
    whether among boxes that found something the better one has the higher score.

    Args:
        detections: final boxes, one mapping an image: ``boxes`` corners in pixels, ``scores``,
            ``labels`` in 0..C-1, optionally ``class_scores`` and ``quality``, which are correlated too.
        targets: one mapping an image, in the same order: ``boxes``, ``labels``, optionally ``area``,
            ``iscrowd``, ``ignore``.
        num_classes: C.
        candidates: boxes before suppression, in the form of ``detections``, if the detector can tell.
        class_aware: the IoU asks for an object of the predicted class; else for any object.
        iou_thresholds: of average precision, as for :class:`CocoEvaluator`.
        max_detections: of average precision; also kept when candidates are suppressed by true IoU.
        nms_iou: of that suppression.
        score_floor: boxes up to it are not counted in the shares.
        bootstrap: draws for the 95 % intervals, over images; 0 for none.
        seed: of the draws.

    Raises:
        KeyError: if a mapping lacks a key.
        ValueError: if the lists differ in length, are empty, or a value is wrong.

    Example:
        >>> dog = {"boxes": [[0, 0, 10, 10]], "labels": [0]}
        >>> seen = {"boxes": [[0, 0, 10, 6], [20, 20, 30, 30]], "labels": [0, 0], "scores": [0.3, 0.8]}
        >>> report = diagnose([seen], [dog], num_classes=1)
        >>> report.correlations["scores, all boxes"].kendall, round(report.average_precision["by true IoU"]["AP50"], 6)
        (-1.0, 1.0)

    Reference: the correlations are those of 002, section IV-C, the counts those of 003, Table 1. Deviation:
        which boxes 002 correlates is not quite said; here it is the final ones, and others beside them.
    """
    check_num_classes(num_classes, caller="diagnose")
    truth = pool_targets(targets, num_classes=num_classes, caller="diagnose")
    if not truth.num_images:
        raise ValueError("diagnose: targets must hold at least one image; got none.")
    stages = {AFTER: detections} if candidates is None else {BEFORE: candidates, AFTER: detections}
    pooled: dict[str, PooledDetections] = {}
    for stage, boxes in stages.items():
        pooled[stage] = pool_detections(boxes, num_classes=num_classes, caller=f"diagnose ({stage})")
        check_same_images(pooled[stage], truth, caller=f"diagnose ({stage})")
    matches = {stage: best_matches(boxes, truth, class_aware=class_aware) for stage, boxes in pooled.items()}

    correlations = {}
    for stage, found in reversed(pooled.items()):
        overlap = matches[stage].iou
        sets = {"all boxes": np.full(len(overlap), True), "IoU >= 0.5": overlap >= 0.5}
        for kind, values in found.score_kinds().items():
            for name, rows in sets.items() if stage == AFTER else [(BEFORE, sets["all boxes"])]:
                correlations[f"{kind}, {name}"] = correlate(
                    values[rows], overlap[rows], found.image[rows], bootstrap=bootstrap, seed=seed
                )

    rankings = {"as scored": detections, "by true IoU": with_true_iou(detections, targets)}
    if candidates is not None:
        oracle = suppress(with_true_iou(candidates, targets), nms_iou=nms_iou, max_detections=max_detections)
        rankings["by true IoU before NMS"] = oracle
    precision = {}
    for name, boxes in rankings.items():
        evaluator = CocoEvaluator(num_classes, iou_thresholds=iou_thresholds, max_detections=max_detections)
        evaluator.update(boxes, targets)
        precision[name] = evaluator.compute()

    return Misalignment(
        num_images=truth.num_images,
        num_detections=len(pooled[AFTER].image),
        scores={stage: found.scores for stage, found in pooled.items()},
        ious={stage: match.iou for stage, match in matches.items()},
        correlations=correlations,
        counts={
            stage: count_above(
                found.scores, matches[stage].iou, found.image, num_images=truth.num_images, floor=score_floor
            )
            for stage, found in pooled.items()
        },
        best_ious={stage: match.best[~truth.ignore] for stage, match in matches.items()},
        average_precision=precision,
        bins=score_bins(pooled[AFTER].scores, matches[AFTER].iou),
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _interval(pair: tuple[float, float]) -> str:
    return "" if math.isnan(pair[0]) else f"[{pair[0]:.2f}, {pair[1]:.2f}]".replace("0.", ".")


def _without_nan(value: Any) -> Any:
    """JSON knows no nan."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
