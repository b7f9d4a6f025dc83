"""Models and runs shared by test_training.py and the processes that it starts.

``python -m tests.training_worker killed OUT`` is killed in the middle of an epoch, by its own hand;
``torchrun ... tests/training_worker.py shared OUT`` trains on several processes.
"""

import os
import pathlib
import signal
import sys

import torch
from torch import nn

from detcore.boxes import pairwise_iou
from detcore.data.loader import make_loader
from detcore.data.scenes import Scenes
from detcore.models import get_model
from detcore.structures import BACKGROUND, Assignment, Targets
from detcore.training import TrainConfig, train

SCENES = Scenes(16, size=64)


class Toy(nn.Module):
    """Boxes and classes from four cells of a picture; draws random numbers, as dropout does."""

    def __init__(self, *, dropout=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(2))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 5)

    def loss(self, images, targets: Targets):
        features = self.dropout(self.body(images.float() / 255).flatten(2).transpose(1, 2))
        raw = self.head(features).float()  # B 4 5
        cells = torch.tensor([[0.0, 0, 32, 32], [32, 0, 64, 32], [0, 32, 32, 64], [32, 32, 64, 64]])
        best, index = (pairwise_iou(cells.expand(len(images), 4, 4), targets.boxes) * targets.valid[:, None]).max(2)
        labels = torch.where(best > 0.05, targets.labels.gather(1, index), BACKGROUND)
        boxes = targets.boxes.gather(1, index[..., None].expand(-1, -1, 4))
        match = Assignment(labels, index, boxes, best, targets)
        off = (raw[..., :4] - boxes / 64).abs().sum(2)
        cls = nn.functional.binary_cross_entropy_with_logits(raw[..., 4], match.positive.float(), reduction="none")
        return {"cls": cls.sum() / match.num_positive, "box": (off * match.positive).sum() / match.num_positive}


def real_detector():
    """IoU-aware RetinaNet whose norms see one picture at a time, so that batches can be split."""
    torch.manual_seed(0)
    detector = get_model("iou_aware_retinanet", num_classes=len(SCENES.classes), backbone="tiny")
    for module in list(detector.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(8, child.num_features))
    return detector


MODELS = {"toy": Toy, "real": real_detector}


def loader(batch_size=4, *, rank=0, world_size=1):
    """Four batches of 4, or as many of the shares that several processes have of them."""
    options = {"batch_size": batch_size, "shuffle": True, "seed": 3, "drop_last": True}
    return make_loader(SCENES, None, rank=rank, world_size=world_size, **options)


def config(out, **changes):
    """Short, but with all that has a state: momentum, warm-up, the average, a falling rate."""
    settings = {"epochs": 2, "lr": 0.01, "warmup_steps": 3, "schedule": "cosine", "ema_decay": 0.9, "log_every": 3}
    settings |= {"device": "cpu", "precision": "fp32", "output_dir": out, "checkpoint_every_steps": 2}
    return TrainConfig(**{**settings, **changes})


def run_until_killed(out, name):
    """The last checkpoint is at step 6, the death at step 7, the end of the epoch would be 8."""

    def die(step):
        if step.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    train(MODELS[name](), loader(), config(out), on_step=die)


def run_shared(out):
    """Each process its half of every batch."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name, make in MODELS.items():
        model = make() if name == "real" else make(dropout=0.0)
        settings = config(pathlib.Path(out) / name, log_every=1)
        train(
            model,
            loader(4 // world_size, rank=rank, world_size=world_size),
            settings,
            validate=lambda m, e: {"AP": e + 1},
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "killed":
        run_until_killed(*sys.argv[2:])
    else:
        run_shared(*sys.argv[2:])
