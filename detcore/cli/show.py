"""``detcore show``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from detcore.cli.detectors import announce, load_detector, open_split, transform_for
from detcore.cli.options import Common, Flag, Pairs, read_pairs, write_json
from detcore.cli.pictures import drawn_name, picture_figure, save_figure
from detcore.data import DetectionDataset
from detcore.data.loader import TransformedDataset, collate
from detcore.models import get_model
from detcore.structures import Priors
from detcore.viz import draw_assignment, draw_boxes, draw_priors

__all__: list[str] = []

EXAMPLES = """
examples:
  # the data alone
  detcore show --data voc:VOCdevkit --count 20
  # how a model would see it: priors, and which of them own which object
  detcore show --data scenes --model retinanet anchor_base=2
  detcore show --data coco-json:voc20 --checkpoint runs/cats --split test
"""


@dataclass(frozen=True, kw_only=True)
class Show(Common):
    """Draw data; with a model or a checkpoint also its priors, and which priors own which object.

    OUTPUT gets a PNG file a picture and kind: boxes_..., priors_..., assignment_..., and show.json with the counts.

    Args:
        options: options of the model, such as anchor_base=2.
        data: as for detcore train.
        split: which part of it.
        classes: keep these classes only; default: all, or the checkpoint's.
        only_with_objects: keep only pictures with an object of the classes kept.
        skip_bad: leave out bad objects and pictures, and count them, in place of stopping.
        model: detector to show priors and assignments of.
        backbone: its trunk; where the priors lie depends on its strides only.
        size: pixels of the square that pictures are warped to for the model; default: as they are.
        checkpoint: file, or folder of a run, in place of --model and --size.
        count: pictures to draw.
        first: position of the first one, from 0.
        output: folder to write to.
    """

    options: Pairs = ()
    data: str
    split: Literal["train", "test"] = "train"
    classes: tuple[str, ...] | None = None
    only_with_objects: Flag = False
    skip_bad: Flag = False
    model: str | None = None
    backbone: str = "tiny"
    size: int | None = None
    checkpoint: Path | None = None
    count: int = 8
    first: int = 0
    output: Path = Path("shown")

    def run(self) -> int:
        """Draw."""
        self.begin()
        if self.model is not None and self.checkpoint is not None:
            raise ValueError("detcore: show takes --model or --checkpoint, not both.")
        if self.options and self.model is None and self.checkpoint is None:
            raise ValueError("detcore: KEY=VALUE must come with --model or --checkpoint.")
        trained = None
        if self.checkpoint is not None:
            trained = load_detector(self.checkpoint, read_pairs(self.options), torch.device("cpu"))
        dataset = open_split(
            self.data, self.split, classes=trained.classes if trained else self.classes, skip_bad=self.skip_bad,
            only_with_objects=self.only_with_objects,
        )  # fmt: skip
        if not 0 <= self.first < len(dataset) or self.count < 1:
            raise ValueError(
                f"detcore: --first must be in [0, {len(dataset)}) and --count >= 1; got {self.first} and {self.count}."
            )
        announce(dataset)
        chosen = range(self.first, min(self.first + self.count, len(dataset)))
        self._draw_boxes(dataset, chosen)
        if trained is not None:
            self._draw_matches(dataset, chosen, trained.detector, trained.pictures)
        elif self.model is not None:
            model = get_model(
                self.model, num_classes=len(dataset.classes), backbone=self.backbone, **read_pairs(self.options)
            )
            self._draw_matches(dataset, chosen, model, {} if self.size is None else {"size": self.size})
        print(f"drew {len(chosen)} of {len(dataset)} pictures of {dataset.name} in {self.output}")
        return 0

    def _draw_boxes(self, dataset: DetectionDataset, chosen: range) -> None:
        for i in chosen:
            image, target = dataset[i]
            figure, ax = picture_figure(image)
            ignored = target["ignore"]
            draw_boxes(image, target["boxes"][~ignored], target["labels"][~ignored], classes=dataset.classes, ax=ax)
            draw_boxes(None, target["boxes"][ignored], ax=ax, colour="#808790", dashed=True)
            save_figure(figure, self.output / f"boxes_{drawn_name(dataset, i)}.png")

    def _draw_matches(self, dataset: DetectionDataset, chosen: range, model: Any, pictures: dict[str, Any]) -> None:
        view = TransformedDataset(dataset, transform_for(pictures))
        counts = {}
        for i in chosen:
            image, target = view[i]
            batch = collate([(image, target)])
            with torch.no_grad():
                priors = model.eval().predict(batch.images).priors
            match = model.match(priors, batch.targets)
            figure, ax = picture_figure(image, title=True)
            draw_assignment(image, priors, match, classes=dataset.classes, ax=ax)
            save_figure(figure, self.output / f"assignment_{drawn_name(dataset, i)}.png")
            figure, ax = picture_figure(image)
            draw_priors(priors, image, chosen=_in_the_middle(priors, image.shape[-2:]), ax=ax)
            save_figure(figure, self.output / f"priors_{drawn_name(dataset, i)}.png")
            masks = {"positive": match.positive, "ignored": match.ignored, "negative": match.negative}
            counts[dataset.image_ids[i]] = {name: int(mask.sum()) for name, mask in masks.items()}
        write_json(self.output / "show.json", counts)


def _in_the_middle(priors: Priors, size: torch.Size) -> Bool[Tensor, " N"]:
    """Of each level, the priors of the cell nearest to the middle of a picture of (height, width)."""
    boxes = priors.boxes[0]
    middle = torch.tensor([size[1] / 2, size[0] / 2])
    distance = ((boxes[:, :2] + boxes[:, 2:]) / 2 - middle).norm(dim=1)
    levels = distance.split(priors.counts)
    return torch.cat([level <= level.min() + 1e-3 if len(level) else level > 0 for level in levels])


COMMAND = Show
