"""``detcore eval``."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detcore.cli.detectors import announce, load_detector, loader_to_test, open_split
from detcore.cli.options import Common, Device, Flag, Pairs, is_shown, pick_device, read_pairs, write_json
from detcore.evaluation import CocoEvaluator, RecallEvaluator, VocEvaluator, collect
from detcore.provenance import provenance

__all__: list[str] = []

EXAMPLES = """
examples:
  detcore eval --checkpoint runs/cats --data coco-json:voc20 --only-with-objects
  # the same weights, ranked by the class score alone, and with another suppression
  detcore eval --checkpoint runs/cats --data coco-json:voc20 --only-with-objects fusion_alpha=1 nms_iou=0.6
  detcore eval --checkpoint runs/retinanet/best.pt --data voc:VOCdevkit --voc

KEY=VALUE words change options of the model that do not change its weights: score_threshold, candidates,
nms_iou, max_detections, and what the paper adds, such as fusion_alpha and threshold_on.
"""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Common):
    """Average precision and recall of a checkpoint on a data set, in original pixels.

    Args:
        options: options of the model, such as nms_iou=0.6.
        checkpoint: file, or folder of a run, whose last.pt is taken.
        data: as for detcore train; classes are the checkpoint's.
        split: which part of it.
        only_with_objects: keep only pictures with an object of the checkpoint's classes.
        skip_bad: leave out bad objects and pictures, and count them, in place of stopping.
        voc: also PASCAL VOC's average precision, by area and by 11 points: at IoU 0.5, 0.7 and 0.9, and the mean of
            0.5, 0.6, 0.7, 0.8 and 0.9.
        recall: also recall by size of the object, from the scores 0.01, 0.1 and 0.3 on; voc measures boxes, coco goes
            by the annotated area. The model's score_threshold must be as low: score_threshold=0.01.
        batch_size: pictures a batch.
        workers: processes that load pictures.
        device: auto takes a GPU if there is one.
        output: JSON file for the numbers; default: eval.json beside the checkpoint.
    """

    options: Pairs = ()
    checkpoint: Path
    data: str
    split: Literal["train", "test"] = "test"
    only_with_objects: Flag = False
    skip_bad: Flag = False
    voc: Flag = False
    recall: Literal["voc", "coco"] | None = None
    batch_size: int = 16
    workers: int = 2
    device: Device = "auto"
    output: Path | None = None

    def run(self) -> int:
        """Detect, measure, print, write."""
        self.begin()
        device = pick_device(self.device)
        trained = load_detector(self.checkpoint, read_pairs(self.options), device)
        dataset = open_split(
            self.data, self.split, classes=trained.classes, skip_bad=self.skip_bad,
            only_with_objects=self.only_with_objects,
        )  # fmt: skip
        announce(dataset)
        loader = loader_to_test(
            dataset, trained.pictures, batch_size=self.batch_size, workers=self.workers, in_order=False
        )
        detections, targets = collect(trained.detector, loader, dataset, device=device, progress=is_shown())
        metrics: dict[str, float] = {}
        recall = None
        for prefix, judge, kept in self._judges(len(trained.classes)):
            judge.update(detections, targets)
            numbers = judge.compute()
            metrics |= {prefix + name: numbers[name] for name in kept or numbers}
            if isinstance(judge, RecallEvaluator):
                recall = judge.counts()
        folder = self.checkpoint if self.checkpoint.is_dir() else self.checkpoint.parent
        output = self.output or folder / "eval.json"
        content = {
            "metrics": metrics,
            "recall_by_size": recall and recall.as_dict(),
            "model": trained.spec,
            "classes": trained.classes,
            "pictures": trained.pictures,
            "data": {
                "spec": self.data, "split": self.split, "name": dataset.name, "pictures": len(dataset),
                "num_skipped": len(dataset.skipped), "skipped": list(dataset.skipped),
            },
            "provenance": {**provenance(device), "command": self.words},
        }  # fmt: skip
        write_json(output, content)
        print(format_numbers(metrics))
        lowest = getattr(trained.detector.select, "keywords", {}).get("score_threshold", 0.0)
        if recall is not None and lowest > recall.score_thresholds[0]:
            print(f"recall: the model gives no box of a score below {lowest:g}; score_threshold=0.01 changes that")
        print(f"wrote {output}")
        return 0

    def _judges(self, num_classes: int) -> list[tuple[str, Any, tuple[str, ...]]]:
        """What their numbers are called after, evaluators, and which numbers to keep if not all."""
        judges: list[tuple[str, Any, tuple[str, ...]]] = [("", CocoEvaluator(num_classes), ())]
        if self.voc:
            ious, kept = (0.5, 0.6, 0.7, 0.8, 0.9), ("AP", "AP50", "AP70", "AP90")
            area = VocEvaluator(num_classes, iou_threshold=ious)
            points = VocEvaluator(num_classes, iou_threshold=ious, interpolation="11point")
            judges += [("VOC_area_", area, kept), ("VOC_11point_", points, kept)]
        if self.recall is not None:
            judges += [("", RecallEvaluator(num_classes, sizes=self.recall), ())]
        return judges


def format_numbers(metrics: Mapping[str, float]) -> str:
    """Numbers in lines of four.

    Example:
        >>> print(format_numbers({"AP": 0.25, "AP50": 0.5}))
        AP            0.250   AP50          0.500
    """
    cells = [f"{name:<12}{value:>7.3f}" for name, value in metrics.items()]
    return "\n".join("   ".join(cells[i : i + 4]) for i in range(0, len(cells), 4))


COMMAND = Evaluate
