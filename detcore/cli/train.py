"""``detcore train``."""

import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from accelerate import PartialState
from torch import nn

from detcore.checkpoint import load_checkpoint
from detcore.cli.detectors import (
    Augment,
    announce,
    cached_loader,
    choose_pictures,
    has_one_size,
    loader_to_test,
    loader_to_train,
    open_split,
)
from detcore.cli.evaluate import format_numbers
from detcore.cli.options import Common, Flag, Pairs, is_shown, read_pairs, write_json
from detcore.data import DetectionDataset
from detcore.evaluation import CocoEvaluator, evaluate
from detcore.models import get_model
from detcore.provenance import provenance
from detcore.training import TrainConfig, train

__all__: list[str] = []

EXAMPLES = """
examples:
  # no data needed, minutes on a processor
  detcore train --model iou_aware_retinanet --backbone tiny --data scenes --size 96 --epochs 20 \\
      --batch-size 16 --warmup-steps 100 --schedule cosine anchor_base=2
  # two classes of a COCO-format file, cached as 128 x 128 pixels
  detcore train --model iou_aware_retinanet --backbone tiny --data coco-json:voc20 --classes cat dog \\
      --only-with-objects --size 128 --output runs/cats anchor_base=2 fusion_alpha=0.4
  # SSD's recipe on VOC 2007 + 2012, from scratch
  detcore train --model ssd300 --backbone vgg16_bn --data voc:VOCdevkit --augment ssd --difficult --batch-size 32
  # RetinaNet's recipe on VOC 2007 + 2012, one GPU; then the same on four
  detcore train --model retinanet --weights-backbone DEFAULT --data voc:VOCdevkit --short-side 600 --long-side 1000
  torchrun --nproc-per-node 4 -m detcore train --model retinanet --data voc:VOCdevkit --batch-size 4
  # go on after a crash or Ctrl-C
  detcore train ... --output runs/cats --resume auto

KEY=VALUE words are options of the model; a wrong one is answered with the list of those there are.
"""


@dataclass(frozen=True)
class Settings(TrainConfig):
    """TrainConfig's fields as flags; checked when the run begins, where --output is known."""

    __doc__ = TrainConfig.__doc__
    output_dir: tyro.conf.Suppress[None] = None
    resume: Annotated[
        str | None,
        tyro.conf.arg(metavar="auto|FILE", help="checkpoint to go on from; auto takes OUTPUT/last.pt if it is there."),
    ] = None
    seed: Annotated[int, tyro.conf.arg(help="of new weights, the order of the pictures, and flips.")] = 0

    def __post_init__(self) -> None:
        """Nothing: see above."""


@dataclass(frozen=True, kw_only=True)
class Train(Common):
    """Train a detector, evaluate it on the data's test split, and write checkpoints and result.json.

    OUTPUT gets last.pt and best.pt (by AP), metrics.jsonl, and at the end result.json: the numbers, all
    settings, where they come from, and what was left out.

    Args:
        options: options of the model, such as anchor_base=2 box_loss=giou.
        model: which detector; an unknown name is answered with the list.
        backbone: trunk: resnet18, resnet34, resnet50, resnet101; vgg16, vgg16_bn in the SSD family; or tiny for
            processors without a GPU; default: the model's.
        weights_backbone: ImageNet weights of the trunk: DEFAULT, or an enum's name; default: random.
        data: voc:DIR, coco:DIR, coco-json:FILE or :DIR, scenes or scenes:size=96,images=500,seed=1,noise=0.1.
        classes: keep these classes only; default: all.
        only_with_objects: keep only pictures with an object of the classes kept, in both splits.
        skip_bad: leave out bad objects and pictures, and count them, in place of stopping.
        difficult: learn objects marked difficult too, as SSD does on VOC; crowds are never learnt.
        augment: what happens to pictures at random. flip: they are mirrored. ssd: colours, zoom out, crop and mirror,
            on squares; every picture is decoded anew each epoch, by --workers; a GPU changes the colours of a whole
            batch itself. none: nothing.
        size: warp pictures to this many pixels square, cached in memory (on the GPU if there is one); default in the
            SSD family: what the model was made for.
        short_side: resize pictures so that their short side has this many pixels; default: 800, and
            scenes as they are. Pictures of like shape share a batch, in one of four sizes.
        long_side: limit of the long side, in pixels; default: short side x 1333 / 800.
        batch_size: pictures a step and process.
        workers: processes that load pictures; with --size, threads that fill the cache.
        output: folder of the run; default: runs/MODEL.
        eval_every: epochs between two evaluations on the test split; 0 evaluates at the end only.
        settings: how to train.
    """

    options: Pairs = ()
    model: str
    backbone: str | None = None
    weights_backbone: str | None = None
    data: str
    classes: tuple[str, ...] | None = None
    only_with_objects: Flag = False
    skip_bad: Flag = False
    difficult: Flag = False
    augment: Augment = "flip"
    size: int | None = None
    short_side: int | None = None
    long_side: int | None = None
    batch_size: int = 16
    workers: int = 2
    output: Path | None = None
    eval_every: int = 1
    settings: tyro.conf.OmitArgPrefixes[Settings] = Settings()

    def run(self) -> int:
        """Train, evaluate, write."""
        self.begin()
        started = time.perf_counter()
        settings = {field.name: getattr(self.settings, field.name) for field in fields(TrainConfig)}
        config = TrainConfig(**{**settings, "output_dir": self.folder})
        self._check()
        # Validation may keep the other processes waiting for long.
        state = PartialState(cpu=config.device == "cpu", timeout=timedelta(hours=6))
        device = state.device or torch.device("cpu")
        pictures = self._pictures()
        sets = {split: self._open(split) for split in ("train", "test")}
        detector = self._build(sets["train"], pictures)
        self._check_resumed(detector, sets["train"])
        if state.is_main_process:
            for split, dataset in sets.items():
                announce(dataset, split)
        judge = _Judge(sets["test"], pictures, self, device)
        history = train(detector, self._loader(sets["train"], pictures, state, device), config, validate=judge)
        if state.is_main_process:
            metrics = judge.at_the_end(history.model, config.epochs - 1)
            result = {
                "metrics": metrics,
                "model": detector.spec,
                "classes": sets["train"].classes,
                "pictures": pictures,
                "data": {"spec": self.data, **{split: _describe(dataset) for split, dataset in sets.items()}},
                "augment": self.augment,
                "difficult": self.difficult,
                "batch_size": self.batch_size,
                "processes": state.num_processes,
                "precision": history.precision,
                "config": asdict(config),
                "seconds": round(time.perf_counter() - started, 1),
                "provenance": {**provenance(device), "command": self.words},
            }
            write_json(self.folder / "result.json", result)
            print(format_numbers(metrics))
            print(f"wrote {self.folder / 'result.json'} and {self.folder / 'last.pt'}")
        state.wait_for_everyone()
        return 0

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return self.output or Path("runs") / self.model

    def _check(self) -> None:
        """What would otherwise be noticed minutes later, once the data is read."""
        if self.size is not None and (self.short_side, self.long_side) != (None, None):
            raise ValueError("detcore: --size warps to a square; it must not come with --short-side or --long-side.")
        if self.long_side is not None and self.short_side is None:
            raise ValueError(f"detcore: --long-side must come with --short-side; got {self.long_side} alone.")
        for name, value, least in (("size", self.size, 32), ("batch-size", self.batch_size, 1),
                                   ("workers", self.workers, 0), ("eval-every", self.eval_every, 0)):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"detcore: --{name} must be >= {least}; got {value}.")
        if self.settings.resume is None and (self.folder / "last.pt").exists():
            raise FileExistsError(
                f"detcore: --output must not hold another run; got {self.folder}, which has last.pt. Go on from it "
                "with --resume auto, or choose another folder."
            )

    def _pictures(self) -> dict[str, Any]:
        is_scenes = self.data.partition(":")[0] == "scenes"
        pictures = choose_pictures(
            self.model, self.backbone, read_pairs(self.options), size=self.size, short_side=self.short_side,
            long_side=self.long_side, as_they_are=is_scenes,
        )  # fmt: skip
        if self.augment == "ssd" and "size" not in pictures:
            raise ValueError("detcore: --augment ssd makes squares; it must come with --size.")
        return pictures

    def _open(self, split: str) -> DetectionDataset:
        return open_split(
            self.data, split, classes=self.classes, skip_bad=self.skip_bad, only_with_objects=self.only_with_objects
        )

    def _build(self, dataset: DetectionDataset, pictures: dict[str, Any]) -> nn.Module:
        torch.manual_seed(self.settings.seed)
        # The detector's own door prepares pictures in the same way, where it can.
        door = {} if has_one_size(pictures) else pictures
        options = {**door, **read_pairs(self.options)}
        detector: Any = get_model(
            self.model,
            num_classes=len(dataset.classes),
            backbone=self.backbone,
            weights_backbone=self.weights_backbone,
            **options,
        )
        detector.pictures = {**pictures, "category_ids": list(dataset.category_ids)}
        return detector

    def _check_resumed(self, detector: nn.Module, dataset: DetectionDataset) -> None:
        resume = self.settings.resume
        path = self.folder / "last.pt" if resume == "auto" else Path(resume or "")
        if resume is None or (resume == "auto" and not path.exists()):
            return
        before = load_checkpoint(path)
        now = {"spec": detector.spec, "classes": list(dataset.classes), "pictures": detector.pictures}
        for name, value in now.items():
            if before.get(name) != value:
                raise ValueError(
                    f"detcore: --resume must go on with the same {name} as {path}, {before.get(name)}; got {value}."
                )

    def _loader(
        self, dataset: DetectionDataset, pictures: dict[str, Any], state: PartialState, device: torch.device
    ) -> Any:
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "shuffle": True,
            "seed": self.settings.seed,
            "rank": state.process_index,
            "world_size": state.num_processes,
            # Equal batches keep a compiled step's shapes, and several processes in step.
            "drop_last": state.num_processes > 1 or len(dataset) >= self.batch_size,
        }
        if has_one_size(pictures) and self.augment != "ssd":
            flip = 0.5 if self.augment == "flip" else 0.0
            options |= {"threads": self.workers, "difficult": self.difficult, "flip": flip, "device": device}
            return cached_loader(dataset, pictures, **options)
        options |= {"num_workers": self.workers, "augment": self.augment, "difficult": self.difficult}
        return loader_to_train(dataset, pictures, device=device, **options)


class _Judge:
    """Evaluates on the test split every so many epochs, and knows the numbers of the last one."""

    def __init__(self, dataset: DetectionDataset, pictures: dict[str, Any], command: Train, device: torch.device):
        self.dataset, self.pictures, self.command, self.device = dataset, pictures, command, device
        self.loader: Any = None
        self.latest: tuple[int, dict[str, float]] | None = None

    def __call__(self, model: nn.Module, epoch: int) -> dict[str, float]:
        every, epochs = self.command.eval_every, self.command.settings.epochs
        if epoch != epochs - 1 and (not every or (epoch + 1) % every):
            return {}
        batch_size = self.command.batch_size
        if self.loader is None and has_one_size(self.pictures):
            self.loader = cached_loader(
                self.dataset,
                self.pictures,
                threads=self.command.workers,
                device=self.device,
                batch_size=batch_size,
                shuffle=False,
            )
        elif self.loader is None:
            workers = self.command.workers
            self.loader = loader_to_test(
                self.dataset, self.pictures, batch_size=batch_size, workers=workers, in_order=False
            )
        evaluator = CocoEvaluator(len(self.dataset.classes))
        numbers = evaluate(model, self.loader, self.dataset, evaluator, device=self.device, progress=is_shown())
        self.latest = (epoch, numbers)
        return numbers

    def at_the_end(self, model: nn.Module | None, epoch: int) -> dict[str, float]:
        """The numbers after the last epoch; anew where a resumed run had nothing left to train."""
        assert model is not None  # train gives one
        return self.latest[1] if self.latest and self.latest[0] == epoch else self(model, epoch)


def _describe(dataset: DetectionDataset) -> dict[str, Any]:
    targets = [dataset.target(i) for i in range(len(dataset))]
    return {
        "name": dataset.name,
        "pictures": len(dataset),
        "objects": sum(int((~target["ignore"]).sum()) for target in targets),
        "num_skipped": len(dataset.skipped),
        "skipped": list(dataset.skipped),
    }


COMMAND = Train
