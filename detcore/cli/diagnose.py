"""``detcore diagnose``."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from detcore.cli.detectors import announce, load_detector, loader_to_test, open_split
from detcore.cli.options import Common, Device, Flag, Pairs, is_shown, pick_device, read_pairs, write_json
from detcore.cli.pictures import save_figure
from detcore.evaluation import RecallCounts, RecallEvaluator, collect, diagnose, load_coco_results
from detcore.provenance import provenance
from detcore.viz import plot_misalignment

__all__: list[str] = []

EXAMPLES = """
examples:
  # any framework's boxes: COCO annotations and COCO results
  detcore diagnose --gt instances_val2017.json --detections results.json
  # with the boxes before suppression, if the framework can write them
  detcore diagnose --gt instances_val2017.json --detections results.json --candidates before_nms.json
  # our own checkpoint: what NMS had to choose from is looked at too
  detcore diagnose --checkpoint runs/cats --data coco-json:voc20 --only-with-objects

results.json is a list of {"image_id", "category_id", "bbox": [x, y, width, height], "score"}; with "class_score" and
"quality" too, those are correlated as well. KEY=VALUE words change options of the checkpoint's model.
"""

MANY = 5000
"""Boxes kept an image where nothing is suppressed."""

Boxes = list[dict[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Diagnose(Common):
    """How far a detector's scores and the quality of its boxes are apart, and what that costs.

    Prints correlations of score and IoU, AP as scored against AP ranked by true IoU, the best box of each object,
    and what suppression lost; OUTPUT gets the same as diagnosis.json and diagnosis.png.

    Args:
        options: options of the model, such as nms_iou=0.6; with --checkpoint.
        gt: COCO instances JSON; with --detections.
        detections: COCO results JSON.
        candidates: COCO results JSON with the boxes before suppression.
        checkpoint: file, or folder of a run, whose last.pt is taken; with --data.
        data: as for detcore train; classes are the checkpoint's.
        split: which part of it.
        only_with_objects: keep only pictures with an object of the checkpoint's classes.
        skip_bad: leave out bad objects and pictures, and count them, in place of stopping.
        class_aware: compare a box with objects of its class only.
        nms_iou: suppression of the candidates ranked by true IoU, in [0, 1].
        max_detections: boxes an image and class that count for AP.
        recall: also recall by size of the object, from the scores 0.01, 0.1 and 0.3 on; voc measures boxes, coco goes
            by the annotated area. The detector must give boxes of such low scores.
        score_floor: boxes up to this score are left out of the shares.
        bootstrap: draws for the 95 % intervals, over images; 0 for none.
        batch_size: pictures a batch.
        workers: processes that load pictures.
        device: auto takes a GPU if there is one.
        output: folder to write to.
    """

    options: Pairs = ()
    gt: Path | None = None
    detections: Path | None = None
    candidates: Path | None = None
    checkpoint: Path | None = None
    data: str | None = None
    split: Literal["train", "test"] = "test"
    only_with_objects: Flag = False
    skip_bad: Flag = False
    class_aware: bool = True
    nms_iou: float = 0.5
    max_detections: int = 100
    recall: Literal["voc", "coco"] | None = None
    score_floor: float = 0.05
    bootstrap: int = 200
    batch_size: int = 8
    workers: int = 2
    device: Device = "auto"
    output: Path = Path("diagnosis")

    def run(self) -> int:
        """Measure, print, write, draw."""
        self.begin()
        by_files = self.gt is not None and self.detections is not None
        by_checkpoint = self.checkpoint is not None and self.data is not None
        given = [name for name in ("gt", "detections", "candidates", "checkpoint", "data") if getattr(self, name)]
        if (
            by_files == by_checkpoint
            or len(given) > (3 if self.candidates else 2)
            or (by_checkpoint and self.candidates)
        ):
            raise ValueError(
                "detcore: diagnose takes either --gt and --detections (and --candidates), or --checkpoint and --data; "
                f"got {', '.join('--' + name for name in given) or 'none of them'}."
            )
        if by_files and self.options:
            raise ValueError(f"detcore: KEY=VALUE must come with --checkpoint; got {' '.join(self.options)}.")
        detections, targets, classes, candidates = self._from_files() if by_files else self._from_checkpoint()
        report = diagnose(
            detections,
            targets,
            len(classes),
            candidates=candidates,
            class_aware=self.class_aware,
            max_detections=self.max_detections,
            nms_iou=self.nms_iou,
            score_floor=self.score_floor,
            bootstrap=self.bootstrap,
        )
        recall = self._recall(detections, targets, len(classes))
        content = {
            **report.as_dict(),
            "recall_by_size": recall and recall.as_dict(),
            "classes": classes,
            "provenance": {**provenance(), "command": self.words},
        }
        write_json(self.output / "diagnosis.json", content)
        _draw(report, self.output / "diagnosis.png")
        print(report.summary())
        if recall is not None:
            print(f"\n{recall.summary()}")
        print(f"\nwrote {self.output / 'diagnosis.json'} and {self.output / 'diagnosis.png'}")
        return 0

    def _recall(self, detections: Boxes, targets: list[Any], num_classes: int) -> RecallCounts | None:
        if self.recall is None:
            return None
        judge = RecallEvaluator(num_classes, sizes=self.recall, class_aware=self.class_aware)
        judge.update(detections, targets)
        return judge.counts()

    def _from_files(self) -> tuple[Boxes, list[Any], tuple[str, ...], Boxes | None]:
        assert self.gt is not None  # run has looked
        assert self.detections is not None
        detections, targets, classes = load_coco_results(self.gt, self.detections)
        candidates = None if self.candidates is None else load_coco_results(self.gt, self.candidates)[0]
        return detections, targets, classes, candidates

    def _from_checkpoint(self) -> tuple[Boxes, list[Any], tuple[str, ...], Boxes | None]:
        assert self.checkpoint is not None  # run has looked
        assert self.data is not None
        device = pick_device(self.device)
        trained = load_detector(self.checkpoint, read_pairs(self.options), device)
        dataset = open_split(
            self.data, self.split, classes=trained.classes, skip_bad=self.skip_bad,
            only_with_objects=self.only_with_objects,
        )  # fmt: skip
        announce(dataset)
        loader = loader_to_test(dataset, trained.pictures, batch_size=self.batch_size, workers=self.workers)
        detector: Any = trained.detector
        found, targets = collect(detector, loader, dataset, device=device, progress=is_shown())
        detector.select = partial(detector.select, nms_iou=None, max_detections=MANY)
        candidates, _ = collect(detector, loader, dataset, device=device, progress=is_shown())
        return found, targets, trained.classes, candidates


def _draw(report: Any, path: Path) -> None:
    figure = Figure(figsize=(10, 8.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    plot_misalignment(report, axes=figure.subplots(2, 2).ravel())
    save_figure(figure, path)


COMMAND = Diagnose
