"""How to train, and the two settings that are computed from it: learning rate and precision."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from detcore.inference import best_precision

__all__ = ["TrainConfig", "best_precision", "learning_rate"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are IoU-aware RetinaNet's on COCO with 16 images a step.

    Args:
        epochs: passes over the data, >= 1.
        lr: learning rate after warm-up, > 0. Papers give it for 16 images a step; scale it with the batch.
        momentum: of SGD, in [0, 1); AdamW uses it as its first beta.
        weight_decay: pull of the weights towards zero, >= 0.
        decay_norm_and_bias: whether that pull acts on biases and normalisation weights too, as in the papers.
        optimizer: sgd or adamw.
        warmup_steps: steps over which the rate rises linearly to lr, >= 0.
        warmup_factor: share of lr at the first step, in (0, 1].
        schedule: after warm-up, "step" drops at the milestones, "cosine" falls to 0, "constant" stays.
        milestones: epochs, counted from 0, at whose start "step" multiplies the rate by gamma.
        gamma: factor of each drop, in (0, 1].
        clip_norm: longest gradient, as a Euclidean norm over all weights, > 0; None does not clip.
        precision: fp32, bf16, fp16 (needs a GPU), or auto: bf16 where it is fast, else fp32.
        channels_last: keep the channels of a pixel side by side in memory, which fast convolutions like.
        ema_decay: keep a running average of the weights with this decay, in (0, 1); validation then uses it.
        seed: of dropout and whatever else draws during training; the loader has its own.
        output_dir: folder for checkpoints, metrics.jsonl and TensorBoard; None writes nothing.
        checkpoint_every_steps: also write last.pt this often, besides each epoch's end.
        log_every: steps between two lines of metrics.jsonl, each the mean over the steps since the last.
        resume: checkpoint to go on from; auto takes last.pt in output_dir if there is one.
        compile: run the loss through torch.compile.
        cuda_graphs: with it, on a GPU, also record each batch shape's launches once and replay them; pays where
            pictures are small or the batches have few shapes.
        progress: show a progress bar; None shows it on terminals and in live notebooks, and not where the
            environment variable DETCORE_STATIC is set.
        device: auto takes a GPU if there is one.

    Raises:
        ValueError: if a value is outside its range.

    Example:
        >>> TrainConfig(lr=-1.0)
        Traceback (most recent call last):
        ValueError: TrainConfig: lr must be > 0; got -1.0.
    """

    epochs: int = 12
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_norm_and_bias: bool = True
    optimizer: Literal["sgd", "adamw"] = "sgd"
    warmup_steps: int = 500
    warmup_factor: float = 0.001
    schedule: Literal["step", "cosine", "constant"] = "step"
    milestones: tuple[int, ...] = (8, 11)
    gamma: float = 0.1
    clip_norm: float | None = 35.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: bool = True
    ema_decay: float | None = None
    seed: int = 0
    output_dir: Path | str | None = None
    checkpoint_every_steps: int | None = None
    log_every: int = 20
    resume: Path | str | None = None
    compile: bool = False
    cuda_graphs: bool = False
    progress: bool | None = None
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        """Check every value at the door."""
        every, decay = self.checkpoint_every_steps, self.ema_decay
        rising = list(self.milestones) == sorted({m for m in self.milestones if m > 0})
        rules = {
            "epochs": (self.epochs >= 1, ">= 1"),
            "lr": (0 < self.lr < math.inf, "> 0"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < math.inf, ">= 0"),
            "optimizer": (self.optimizer in {"sgd", "adamw"}, "sgd or adamw"),
            "warmup_steps": (self.warmup_steps >= 0, ">= 0"),
            "warmup_factor": (0 < self.warmup_factor <= 1, "in (0, 1]"),
            "schedule": (self.schedule in {"step", "cosine", "constant"}, "step, cosine or constant"),
            "milestones": (rising, "epochs > 0, rising"),
            "gamma": (0 < self.gamma <= 1, "in (0, 1]"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "> 0 or None"),
            "precision": (self.precision in {"auto", "fp32", "bf16", "fp16"}, "auto, fp32, bf16 or fp16"),
            "ema_decay": (decay is None or 0 < decay < 1, "in (0, 1) or None"),
            "seed": (0 <= self.seed < 2**32, "in [0, 2**32)"),
            "checkpoint_every_steps": (every is None or every >= 1, ">= 1 or None"),
            "log_every": (self.log_every >= 1, ">= 1"),
            "device": (self.device in {"auto", "cpu"}, "auto or cpu"),
            "cuda_graphs": (self.compile or not self.cuda_graphs, "False without compile"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"TrainConfig: {name} must be {rule}; got {getattr(self, name)!r}.")
        if self.output_dir is None and (every is not None or str(self.resume) == "auto"):
            raise ValueError(
                "TrainConfig: output_dir must be a folder with checkpoint_every_steps or resume=auto; got None."
            )


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of one step; a pure function, so that there is no state to lose.

    Args:
        config: of the run.
        step: steps done before this one, >= 0.
        steps_per_epoch: >= 1.

    Example:
        >>> config = TrainConfig(lr=1.0, warmup_steps=2, warmup_factor=0.5, milestones=(8, 11))
        >>> [round(learning_rate(config, step, 10), 3) for step in (0, 1, 2, 79, 80, 110)]
        [0.5, 0.75, 1.0, 1.0, 0.1, 0.01]
    """
    lr, warm = config.lr, config.warmup_steps
    if step < warm:
        lr *= config.warmup_factor + (1 - config.warmup_factor) * step / warm
    if config.schedule == "step":
        lr *= config.gamma ** sum(step >= epoch * steps_per_epoch for epoch in config.milestones)
    elif config.schedule == "cosine" and step >= warm:
        falling = max(config.epochs * steps_per_epoch - warm, 1)
        lr *= 0.5 * (1 + math.cos(math.pi * min((step - warm) / falling, 1.0)))
    return lr
