"""``detcore predict``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from detcore.cli.detectors import Trained, announce, load_detector, loader_to_test, open_split
from detcore.cli.options import Common, Device, Flag, is_shown, pick_device, read_pairs, write_json
from detcore.cli.pictures import drawn_name, picture_figure, save_figure, source_name
from detcore.data import DataError, DetectionDataset
from detcore.data.records import read_picture
from detcore.evaluation import collect, to_coco_results
from detcore.viz import draw_boxes

__all__: list[str] = []

EXAMPLES = """
examples:
  # your own pictures: files, folders, or both
  detcore predict --checkpoint runs/cats holiday.jpg pictures/
  # a data set: image and category ids are its own, so results.json fits its annotations
  detcore predict --checkpoint runs/cats --data coco-json:voc20 --only-with-objects --draw 20 --truth
  detcore diagnose --gt voc20/instances_test.json --detections predictions/results.json

KEY=VALUE words change options of the model that do not change its weights, such as nms_iou=0.6.
"""

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True, kw_only=True)
class Predict(Common):
    """Detect on pictures or on a data set.

    OUTPUT gets results.json, a list in COCO's results format with all boxes in original pixels, images.json, which
    names the pictures and classes that its ids mean, and pictures/ with the boxes drawn.

    Args:
        files: pictures and folders of pictures, in place of --data; image ids count from 1 by file name.
        checkpoint: file, or folder of a run, whose last.pt is taken.
        data: as for detcore train; classes are the checkpoint's.
        split: which part of it.
        only_with_objects: keep only pictures with an object of the checkpoint's classes.
        skip_bad: leave out bad objects and pictures, and count them, in place of stopping.
        score_threshold: least score of a box to be drawn, in [0, 1]; results.json has those below it too.
        draw: pictures to draw at most; 0 draws none.
        truth: draw the data's own boxes too, in broken grey lines.
        batch_size: pictures a batch.
        workers: processes that load pictures.
        device: auto takes a GPU if there is one.
        output: folder to write to.
    """

    files: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[PICTURE ...] [KEY=VALUE ...]")
    ] = ()
    options: tyro.conf.Suppress[tuple[str, ...]] = ()
    checkpoint: Path
    data: str | None = None
    split: Literal["train", "test"] = "test"
    only_with_objects: Flag = False
    skip_bad: Flag = False
    score_threshold: float = 0.3
    draw: int = 50
    truth: Flag = False
    batch_size: int = 16
    workers: int = 2
    device: Device = "auto"
    output: Path = Path("predictions")

    def run(self) -> int:
        """Detect, write, draw."""
        self.begin()
        if bool(self.files) == (self.data is not None):
            raise ValueError("detcore: predict takes either pictures or --data SPEC; see detcore predict --help")
        if self.truth and self.data is None:
            raise ValueError("detcore: --truth must come with --data; pictures alone have no boxes.")
        device = pick_device(self.device)
        trained = load_detector(self.checkpoint, read_pairs(self.options), device)
        dataset = self._open(trained)
        announce(dataset)
        loader = loader_to_test(dataset, trained.pictures, batch_size=self.batch_size, workers=self.workers)
        detections, targets = collect(trained.detector, loader, dataset, device=device, progress=is_shown())
        category_ids = dataset.category_ids
        names = [source_name(dataset, i) for i in range(len(dataset))]
        write_json(self.output / "results.json", to_coco_results(detections, dataset.image_ids, category_ids))
        sizes = [target["original_size"].tolist() for target in targets]
        images = [
            {"id": i, "file_name": name, "height": height, "width": width}
            for i, name, (height, width) in zip(dataset.image_ids, names, sizes, strict=True)
        ]
        categories = [{"id": i, "name": name} for i, name in zip(category_ids, trained.classes, strict=True)]
        write_json(self.output / "images.json", {"images": images, "categories": categories, "annotations": []})
        drawn = range(min(self.draw, len(dataset)))
        for i in drawn:
            path = self.output / "pictures" / f"{drawn_name(dataset, i)}.png"
            self._draw(path, dataset[i][0], detections[i], targets[i] if self.truth else None, trained.classes)
        above = sum(int((found["scores"] >= self.score_threshold).sum()) for found in detections)
        print(
            f"{len(dataset)} pictures, {sum(len(found['boxes']) for found in detections)} boxes, {above} of score "
            f">= {self.score_threshold:g}; wrote {self.output / 'results.json'}"
            + (f" and {len(drawn)} pictures in {self.output / 'pictures'}" if drawn else "")
        )
        return 0

    def _open(self, trained: Trained) -> DetectionDataset:
        if self.data is None:
            return PictureFiles(_find(self.files), trained.classes, trained.category_ids, skip_bad=self.skip_bad)
        return open_split(
            self.data, self.split, classes=trained.classes, skip_bad=self.skip_bad,
            only_with_objects=self.only_with_objects,
        )  # fmt: skip

    def _draw(self, path: Path, image: Tensor, found: Any, truth: Any, classes: tuple[str, ...]) -> None:
        figure, ax = picture_figure(image)
        if truth is not None:
            draw_boxes(image, truth["boxes"], ax=ax, colour="#808790", dashed=True)
        kept = found["scores"] >= self.score_threshold
        draw_boxes(
            image if truth is None else None, found["boxes"][kept], found["labels"][kept], found["scores"][kept],
            classes=classes, ax=ax,
        )  # fmt: skip
        save_figure(figure, path)


class PictureFiles:
    """Picture files as a data set without objects.

    Args:
        files: in the order of their ids, which count from 1.
        classes: names of the classes that are looked for.
        category_ids: id of each.
        skip_bad: leave out files that cannot be decoded, in place of raising.

    Raises:
        DataError: if a file is no picture; names it.
    """

    name = "files"

    def __init__(
        self, files: list[Path], classes: tuple[str, ...], category_ids: tuple[int, ...], *, skip_bad: bool
    ) -> None:
        self.classes, self.category_ids = classes, category_ids
        self._sizes: dict[int, tuple[int, int]] = {}
        skipped = []
        for number, file in enumerate(files, start=1):
            try:
                with Image.open(file) as picture:  # the head only; the pixels are read when asked for
                    size = (picture.height, picture.width)
                if skip_bad:
                    read_picture(file)
            except (OSError, DataError) as error:
                if not skip_bad:
                    raise DataError(f"detcore: {file} must be a picture; got {error}. Or pass --skip-bad.") from error
                skipped.append(f"{file} left out: {error}")
                continue
            self._sizes[number] = size
        self.image_ids, self.skipped = tuple(self._sizes), tuple(skipped)
        self._files = [files[number - 1] for number in self.image_ids]
        if not self._sizes:
            raise DataError(f"detcore: there must be a picture to predict on; got none in {len(files)} files.")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
        return tv_tensors.Image(read_picture(self._files[index])), self.target(index)

    def path(self, index: int) -> Path:
        """Where picture ``index`` lies."""
        return self._files[index]

    def target(self, index: int) -> dict[str, Any]:
        """No objects."""
        image_id = self.image_ids[index]
        size = self._sizes[image_id]
        return {
            "boxes": tv_tensors.BoundingBoxes(  # pyright: ignore[reportCallIssue]  # torchvision's overloads
                torch.zeros(0, 4), format="XYXY", canvas_size=size
            ),
            "labels": torch.zeros(0, dtype=torch.int64),
            "image_id": image_id,
            "area": torch.zeros(0),
            "iscrowd": torch.zeros(0, dtype=torch.int64),
            "ignore": torch.zeros(0, dtype=torch.bool),
            "original_size": torch.tensor(size),
        }


def _find(paths: tuple[Path, ...]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES]
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"detcore: pictures must be files or folders; {path} does not exist.")
    return sorted(set(files), key=lambda file: (file.name, file))


COMMAND = Predict
