"""One visible training loop: every step of it can be read in :func:`train`, from top to bottom.

Device placement and several processes are accelerate's; the rest is plain PyTorch. Start it with
``python``, ``torchrun`` or ``accelerate launch``: the code is the same.
"""

import copy
import importlib.util
import json
import logging
import math
import os
import platform
import random
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor, nn
from tqdm import tqdm

from detcore.checkpoint import (
    REPLAY_FORMAT,
    load_checkpoint,
    package_version,
    random_state,
    save_checkpoint,
    set_random_state,
)

__all__ = [
    "History",
    "NonFiniteLossError",
    "Step",
    "TrainConfig",
    "best_precision",
    "learning_rate",
    "train",
    "worst_box",
]

logger = logging.getLogger("detcore")


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are IoU-aware RetinaNet's on COCO with 16 images a step.

    Args:
        epochs: passes over the data, >= 1.
        lr: learning rate after warm-up, > 0. Papers give it for 16 images a step; scale it with the batch.
        momentum: of SGD, in [0, 1); AdamW uses it as its first beta.
        weight_decay: pull of the weights towards zero, >= 0.
        decay_norm_and_bias: whether that pull acts on biases and normalisation weights too, as in the papers.
        optimizer: ``sgd`` or ``adamw``.
        warmup_steps: steps over which the rate rises linearly to ``lr``, >= 0.
        warmup_factor: share of ``lr`` at the first step, in (0, 1].
        schedule: after warm-up: ``step`` drops at the milestones, ``cosine`` falls to 0, ``constant`` stays.
        milestones: epochs, counted from 0, at whose start ``step`` multiplies the rate by ``gamma``.
        gamma: factor of each drop, in (0, 1].
        clip_norm: longest gradient, as a Euclidean norm over all weights, > 0; ``None`` does not clip.
        precision: ``fp32``, ``bf16``, ``fp16`` (needs a GPU), or ``auto``: see :func:`best_precision`.
        channels_last: keep images and weights channel by channel for each pixel, which convolutions like.
        ema_decay: keep a running average of the weights with this decay, in (0, 1); validation then uses it.
        seed: of dropout and whatever else draws during training; the loader has its own.
        output_dir: folder for checkpoints, ``metrics.jsonl`` and TensorBoard; ``None`` writes nothing.
        checkpoint_every_steps: also write ``last.pt`` this often, besides each epoch's end.
        log_every: steps between two lines of ``metrics.jsonl``, each the mean over the steps since the last.
        resume: checkpoint to go on from; ``auto`` takes ``last.pt`` in ``output_dir`` if there is one.
        compile: run the loss through ``torch.compile``.
        progress: show a progress bar; ``None`` shows it on terminals and in live notebooks, and not where
            the environment variable ``DETCORE_STATIC`` is set.
        device: ``auto`` takes a GPU if there is one.

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
    progress: bool | None = None
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        """Check every value at the door."""
        every, average = self.checkpoint_every_steps, self.ema_decay
        rules: list[tuple[str, bool, str]] = [
            ("epochs", self.epochs >= 1, ">= 1"),
            ("lr", 0 < self.lr < math.inf, "> 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, ">= 0"),
            ("optimizer", self.optimizer in ("sgd", "adamw"), "sgd or adamw"),
            ("warmup_steps", self.warmup_steps >= 0, ">= 0"),
            ("warmup_factor", 0 < self.warmup_factor <= 1, "in (0, 1]"),
            ("schedule", self.schedule in ("step", "cosine", "constant"), "step, cosine or constant"),
            ("milestones", list(self.milestones) == sorted({m for m in self.milestones if m > 0}), "rising epochs > 0"),
            ("gamma", 0 < self.gamma <= 1, "in (0, 1]"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "> 0 or None"),
            ("precision", self.precision in ("auto", "fp32", "bf16", "fp16"), "auto, fp32, bf16 or fp16"),
            ("ema_decay", average is None or 0 < average < 1, "in (0, 1) or None"),
            ("seed", 0 <= self.seed < 2**32, "in [0, 2**32)"),
            ("checkpoint_every_steps", every is None or every >= 1, ">= 1 or None"),
            ("log_every", self.log_every >= 1, ">= 1"),
            ("device", self.device in ("auto", "cpu"), "auto or cpu"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"TrainConfig: {name} must be {rule}; got {getattr(self, name)!r}.")
        if self.output_dir is None and (every is not None or str(self.resume) == "auto"):
            raise ValueError(
                "TrainConfig: output_dir must be a folder when checkpoint_every_steps is given or resume is auto; "
                "got None."
            )


@dataclass(frozen=True)
class Step:
    """What one step of training did, as plain numbers.

    Args:
        step: steps done, this one included.
        epoch: which pass over the data, from 0.
        losses: every term as the detector gave it, on this process.
        lr: learning rate that was used.
        grad_norm: Euclidean norm of the gradient before clipping.
        image_ids: ids of the images it saw, on this process.
    """

    step: int
    epoch: int
    losses: dict[str, float]
    lr: float
    grad_norm: float
    image_ids: tuple[int, ...]


@dataclass
class History:
    """What happened in a run.

    Args:
        steps: the "step" lines of ``metrics.jsonl``.
        epochs: its "epoch" lines, with what ``validate`` returned under ``metrics``.
        model: the module to detect with: the averaged copy under ``ema_decay``, else the trained model.
        precision: the one that was used.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    model: nn.Module | None = None
    precision: str = "fp32"

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one number: a loss term, a metric, ``loss``, ``lr``, ``grad_norm``...

        Raises:
            KeyError: if no line has it.

        Example:
            >>> History(steps=[{"step": 20, "losses": {"box": 0.5}}]).curve("box")
            ([20], [0.5])
        """
        rows = [{**row, **row.get("losses", {}), **row.get("metrics", {})} for row in self.steps + self.epochs]
        found = [(row["step"], row[name]) for row in rows if name in row]
        if not found:
            known = sorted({key for row in rows for key in row} - {"kind", "losses", "metrics"})
            raise KeyError(f"History.curve: name must be one of {known}; got {name!r}.")
        return [step for step, _ in found], [value for _, value in found]


class NonFiniteLossError(FloatingPointError):
    """A loss or the gradient became infinite or not a number; the weights are those before that step."""


def train(
    model: nn.Module,
    loader: Iterable[Any],
    config: TrainConfig,
    *,
    validate: Callable[[nn.Module, int], dict[str, Any]] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> History:
    """Train ``model`` in place.

    With several processes every process calls this with its own share of the data. Gradients are
    averaged, and the losses divide by the mean number of positives, so W processes with b images
    each do what one does with W*b.

    Args:
        model: anything with ``loss(images, targets) -> {name: scalar}``; a module without it, such as
            torchvision's detectors, is called as ``model(images, targets)``.
        loader: batches, as :class:`detcore.data.loader.Batch` or as (images, targets); it has a length.
            Its order may depend on nothing but its seed and the epoch, for an exact resume.
        config: how to train.
        validate: called after each epoch, on the first process only, with the module to judge (in
            eval mode) and the epoch; what it returns is logged, and ``best.pt`` is kept by its ``AP``.
        on_step: called after each step; on a GPU one step late, so that the host need not wait.

    Raises:
        NonFiniteLossError: names step, images, terms and the worst box. The weights are unspoiled.
        ValueError: if the loader is empty or not shared out over the processes.
        CheckpointError: if ``config.resume`` is not a usable checkpoint.
        FileExistsError: if ``output_dir`` holds another run and ``resume`` is not given.
        KeyboardInterrupt: on Ctrl-C, after ``last.pt`` is written (with one process).
    """
    # Precision is handled below, in sight, so accelerate is told "no". Validation can keep the others waiting long.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(cpu=config.device == "cpu", mixed_precision="no", kwargs_handlers=[patience])
    device = accelerator.device
    precision = best_precision(device) if config.precision == "auto" else config.precision
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("train: config.precision must be fp32 or bf16 on a CPU; got fp16.")
    steps_per_epoch = _checked_length(loader, accelerator.num_processes)
    resumed = _find_checkpoint(config, accelerator.num_processes)
    _seed(config.seed + accelerator.process_index)

    memory_format = torch.channels_last if config.channels_last else torch.preserve_format
    model.to(device, memory_format=memory_format)
    if resumed:
        model.load_state_dict(resumed["model"])
    ema = None if config.ema_decay is None else _Average(model, config.ema_decay)
    optimizer = _optimizer(model, config, fused=precision != "fp16")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    network = accelerator.prepare(_LossModule(model, compiled=config.compile))

    at = _Position()
    if resumed:
        at = _Position(**resumed["position"])
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])
        if ema and resumed["ema"]:
            ema.load(resumed["ema"])
    log = _Log(config, accelerator, steps_per_epoch, at, resumed, precision)
    log.history.model = ema.module if ema else model
    run = _Run(model, ema, optimizer, scaler, config, accelerator, at, log)
    waiting: deque[_Pending] = deque()
    lag = 1 if device.type == "cuda" else 0

    def settle(keep: int) -> None:
        while len(waiting) > keep:
            step = waiting.popleft().settle(run, gradient_may_overflow=scaler.is_enabled())
            log.step(step, at)
            if on_step:
                on_step(step)

    try:
        for epoch in range(at.epoch, config.epochs):
            network.train()
            for batch in _epoch_batches(loader, at, resumed):
                with _interrupt_at_the_end():
                    images, targets, image_ids = _unpack(batch, device, config.channels_last)
                    lr = learning_rate(config, at.step, steps_per_epoch)
                    for group in optimizer.param_groups:
                        group["lr"] = lr

                    with torch.autocast(device.type, dtype=half, enabled=half is not None):
                        losses = network(images, targets)
                    scaler.scale(sum(losses.values())).backward()
                    scaler.unscale_(optimizer)
                    norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)

                    numbers = torch.stack([*(term.detach().float() for term in losses.values()), norm.float()])
                    if not scaler.is_enabled():
                        # The fused step reads this on the device and leaves the weights alone if it is 1:
                        # a non-finite gradient spoils nothing, and the host need not wait to see it.
                        optimizer.found_inf = 1.0 - numbers.isfinite().all().float()
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                    if ema:
                        ema.update(model)

                    at.step, at.batch = at.step + 1, at.batch + 1
                    waiting.append(_Pending(at.step, epoch, lr, list(losses), numbers, images, targets, image_ids))
                settle(keep=lag)
                every = config.checkpoint_every_steps
                if every and at.step % every == 0 and at.batch < steps_per_epoch:
                    settle(keep=0)
                    run.save("last.pt")

            settle(keep=0)
            metrics = _validate(validate, log.history.model, epoch, accelerator)
            log.epoch(at, epoch, metrics)
            at.epoch, at.batch = epoch + 1, 0
            is_best = "AP" in metrics and metrics["AP"] > at.best
            at.best = metrics["AP"] if is_best else at.best
            run.save("last.pt", *(["best.pt"] if is_best else []))
    except KeyboardInterrupt:
        if accelerator.num_processes == 1:  # others may be elsewhere in their epoch and would be waited for
            settle(keep=0)
            run.save("last.pt")
        raise
    finally:
        log.close()
    return log.history


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of one step; a pure function, so that there is no state to lose.

    Args:
        config: of the run.
        step: steps done before this one, >= 0.
        steps_per_epoch: >= 1.

    Example:
        >>> config = TrainConfig(lr=1.0, warmup_steps=2, warmup_factor=0.5, milestones=(8, 11))
        >>> [round(learning_rate(config, s, 10), 3) for s in (0, 1, 2, 79, 80, 110)]
        [0.5, 0.75, 1.0, 1.0, 0.1, 0.01]
    """
    lr, warm = config.lr, config.warmup_steps
    if step < warm:
        lr *= config.warmup_factor + (1 - config.warmup_factor) * step / warm
    if config.schedule == "step":
        lr *= config.gamma ** sum(step >= epoch * steps_per_epoch for epoch in config.milestones)
    elif config.schedule == "cosine" and step >= warm:
        total = max(config.epochs * steps_per_epoch - warm, 1)
        lr *= 0.5 * (1 + math.cos(math.pi * min((step - warm) / total, 1.0)))
    return lr


def best_precision(device: torch.device | str = "cpu") -> str:
    """The precision that ``auto`` stands for on a device.

    Returns:
        ``bf16`` on GPUs that have it and on CPUs with AMX tiles (about 3 times faster than float32
        there, channels last), else ``fp32``. CPUs with AVX-512 bf16 only are not faster with it.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if kind == "cpu" and _cpu_has_amx() else "fp32"


def worst_box(targets: Any, image_ids: Sequence[int]) -> str:
    """The object most likely to have broken a loss, told in words.

    Not finite comes first, then by long side / short side squared: thin and tiny boxes have the
    largest encoded targets and the steepest IoU.

    Args:
        targets: :class:`~detcore.structures.Targets`, or torchvision's list of dicts.
        image_ids: one an image.
    """
    if isinstance(targets, list | tuple):
        pairs = [(i, box) for i, target in enumerate(targets) for box in target["boxes"].detach().float().cpu()]
    else:
        valid, boxes = targets.valid.cpu(), targets.boxes.detach().float().cpu()
        pairs = [(i, boxes[i, j]) for i, j in valid.nonzero().tolist()]
    if not pairs:
        return "no box at all in the batch"

    def badness(pair: tuple[int, Tensor]) -> float:
        x1, y1, x2, y2 = pair[1].tolist()
        long, short = max(x2 - x1, y2 - y1), min(x2 - x1, y2 - y1)
        return long / short**2 if math.isfinite(x1 + y1 + x2 + y2) and short > 0 else math.inf

    i, box = max(pairs, key=badness)
    x1, y1, x2, y2 = box.tolist()
    return f"[{x1:g}, {y1:g}, {x2:g}, {y2:g}] ({x2 - x1:g} x {y2 - y1:g} px) in image {image_ids[i]}"


# What the loop is made of -----------------------------------------------------------------------


class _LossModule(nn.Module):
    """A detector whose ``forward`` is its loss: data parallelism averages the gradients of ``forward`` only."""

    def __init__(self, detector: nn.Module, *, compiled: bool) -> None:
        super().__init__()
        self.detector = detector
        loss = detector.loss if hasattr(detector, "loss") else detector.forward
        self.loss = torch.compile(loss) if compiled else loss

    def forward(self, images: Any, targets: Any) -> dict[str, Tensor]:
        return self.loss(images, targets)


class _Average:
    """Exponential moving average of the weights; early steps count more, or the start would linger."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        # All on the device in a few launches; torch's AveragedModel copies its counter there, which waits.
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - decay)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)  # running statistics are averages already
        self.updates += 1

    def state(self) -> dict[str, Any]:
        return {"weights": self.module.state_dict(), "updates": self.updates}

    def load(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["weights"])
        self.updates = state["updates"]


@dataclass
class _Position:
    """How far a run is: steps ever done, the epoch, batches done in it, the best AP so far."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float = -math.inf


@dataclass
class _Pending:
    """A step whose numbers are still on their way from the device."""

    step: int
    epoch: int
    lr: float
    names: list[str]
    numbers: Tensor
    images: Any
    targets: Any
    image_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        self.numbers = self.numbers.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if self.arrived:
            self.arrived.record()

    def settle(self, run: "_Run", *, gradient_may_overflow: bool) -> Step:
        if self.arrived:
            self.arrived.synchronize()
        *values, norm = self.numbers.tolist()
        losses = dict(zip(self.names, values, strict=True))
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if not bad and not math.isfinite(norm) and not gradient_may_overflow:  # fp16's scaler lives on overflows
            bad = ["gradient"]
        if bad:
            shown = ", ".join(f"{name} = {value:g}" for name, value in losses.items())
            replay = run.save_replay(self)
            raise NonFiniteLossError(
                f"train: every loss and the gradient must be finite; got a non-finite {' and '.join(bad)} at step "
                f"{self.step} (epoch {self.epoch}, lr {self.lr:g}): {shown}, gradient norm = {norm:g}. "
                f"Images: {list(self.image_ids)}. Worst box: {worst_box(self.targets, self.image_ids)}. "
                f"{replay}Look at that box first; if it is sound, lower lr or lengthen warmup_steps."
            )
        return Step(self.step, self.epoch, losses, self.lr, norm, self.image_ids)


@dataclass
class _Run:
    """Everything that a checkpoint is made of."""

    model: nn.Module
    ema: _Average | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    config: TrainConfig
    accelerator: Accelerator
    at: _Position
    log: "_Log"

    def save(self, *names: str) -> None:
        if self.config.output_dir is None:
            return
        randoms = gather_object([random_state()])  # every process draws its own
        if self.accelerator.is_main_process:
            config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self.config).items()}
            checkpoint = {
                **_identity(self.model),
                "model": self.model.state_dict(),
                "ema": self.ema.state() if self.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "position": asdict(self.at),
                "random": randoms,
                "log": self.log.state(),
                "config": config,
            }
            for name in names:
                save_checkpoint(Path(self.config.output_dir) / name, checkpoint)
        self.accelerator.wait_for_everyone()

    def save_replay(self, pending: _Pending) -> str:
        if self.config.output_dir is None:
            return ""
        path = Path(self.config.output_dir) / f"nonfinite_step{pending.step}_rank{self.accelerator.process_index}.pt"
        targets = pending.targets if isinstance(pending.targets, list | tuple) else vars(pending.targets)
        content = {
            "format": REPLAY_FORMAT,
            **_identity(self.model),
            "model": self.model.state_dict(),
            "images": pending.images,
            "targets": targets,
            "image_ids": list(pending.image_ids),
            "step": pending.step,
        }
        save_checkpoint(path, content)
        return f"Batch and weights are in {path} (load_checkpoint reads it). "


class _Log:
    """``metrics.jsonl``, TensorBoard, the progress bar and the History, on the first process."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        steps_per_epoch: int,
        at: _Position,
        resumed: dict[str, Any] | None,
        precision: str,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.history = History(precision=precision)
        self.window: list[list[float]] = resumed["log"]["window"] if resumed else []
        self.images = 0
        self.since = self.epoch_since = time.perf_counter()
        self.file = self.board = None
        is_main = accelerator.is_main_process
        if is_main and config.output_dir is not None:
            self._open(Path(config.output_dir), at, resumed)
        total = config.epochs * steps_per_epoch
        self.bar = tqdm(total=total, initial=at.step, unit="step", disable=not (is_main and _show_progress(config)))
        if resumed is None:
            device = accelerator.device
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
            self._write(
                {
                    "kind": "run",
                    "device": name,
                    "processes": accelerator.num_processes,
                    "precision": precision,
                    "detcore": package_version(),
                    "torch": str(torch.__version__),
                    "steps_per_epoch": steps_per_epoch,
                    "config": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
                }
            )
        start = f"resuming after step {at.step}" if resumed else "starting"
        if is_main:
            logger.info("training: %s, %s, %s, %d steps", start, accelerator.device, precision, total)

    def _open(self, folder: Path, at: _Position, resumed: dict[str, Any] | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if resumed and path.exists():  # lines written after the checkpoint will be written again
            with path.open("r+b") as file:
                file.truncate(min(resumed["log"]["bytes"], path.stat().st_size))
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self.history.steps = [row for row in rows if row["kind"] == "step"]
            self.history.epochs = [row for row in rows if row["kind"] == "epoch"]
        self.file = path.open("a" if resumed else "w", encoding="utf-8")
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional and slow to import

            self.board = SummaryWriter(str(folder), purge_step=at.step + 1 if resumed else None)

    def state(self) -> dict[str, Any]:
        if self.file:
            self.file.flush()
        return {"window": self.window, "bytes": self.file.tell() if self.file else 0}

    def step(self, step: Step, at: _Position) -> None:
        self.window.append([*step.losses.values(), step.grad_norm])
        self.images += len(step.image_ids)
        self.bar.update(1)
        if step.step % self.config.log_every:
            return
        window = torch.tensor(self.window, dtype=torch.float64 if self.accelerator.device.type == "cpu" else None)
        mean = self.accelerator.reduce(window.mean(0).to(self.accelerator.device), "mean").tolist()
        losses = dict(zip(step.losses, mean[:-1], strict=True))
        now = time.perf_counter()
        row = {
            "kind": "step",
            "step": step.step,
            "epoch": step.epoch,
            "loss": sum(losses.values()),
            "losses": losses,
            "lr": step.lr,
            "grad_norm": mean[-1],
            "images_per_second": round(self.images * self.accelerator.num_processes / (now - self.since), 2),
        }
        self.window, self.images, self.since = [], 0, now
        self.history.steps.append(row)
        self._write(row)
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['images_per_second']:.0f} images/s", refresh=False)

    def epoch(self, at: _Position, epoch: int, metrics: dict[str, Any]) -> None:
        now = time.perf_counter()
        row = {"kind": "epoch", "step": at.step, "epoch": epoch, "metrics": metrics}
        row["seconds"] = round(now - self.epoch_since, 3)
        if self.accelerator.device.type == "cuda":
            row["max_memory_bytes"] = torch.cuda.max_memory_allocated(self.accelerator.device)
        self.epoch_since = self.since = now
        self.images = 0
        self.history.epochs.append(row)
        self._write(row)
        shown = ", ".join(f"{k} {v:.3f}" for k, v in metrics.items() if isinstance(v, float))
        logger.info("epoch %d of %d done. %s", epoch + 1, self.config.epochs, shown)

    def _write(self, row: dict[str, Any]) -> None:
        if self.file:
            self.file.write(json.dumps(_json_ready(row), allow_nan=False) + "\n")
            self.file.flush()
        if self.board and row["kind"] != "run":
            numbers = {k: v for k, v in row.items() if k in ("loss", "lr", "grad_norm", "images_per_second")}
            for name, value in {**numbers, **row.get("losses", {}), **row.get("metrics", {})}.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(
                        f"{'train' if row['kind'] == 'step' else 'validate'}/{name}", value, row["step"]
                    )

    def close(self) -> None:
        self.bar.close()
        for sink in (self.file, self.board):
            if sink:
                sink.close()


def _optimizer(model: nn.Module, config: TrainConfig, *, fused: bool) -> torch.optim.Optimizer:
    # Fused: one launch, and it knows how to skip a step on the device. Under fp16 the scaler skips, on the
    # host: fused SGD would keep an unset momentum if the very first step is skipped.
    spared, pulled = [], []
    for module in model.modules():
        is_norm = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and not any(parameter is p for p in spared + pulled):
                spare = not config.decay_norm_and_bias and (is_norm or name == "bias")
                (spared if spare else pulled).append(parameter)
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((pulled, config.weight_decay), (spared, 0.0))
        if parameters
    ]
    if not groups:
        raise ValueError("train: model must have at least one parameter that requires a gradient; got none.")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=fused)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=fused)


def _checked_length(loader: Iterable[Any], num_processes: int) -> int:
    if not hasattr(loader, "__len__"):
        raise ValueError(f"train: loader must have a length (batches in an epoch); got {type(loader).__name__}.")
    if len(loader) == 0:
        raise ValueError("train: loader must hold at least one batch; got none. Is batch_size larger than the data?")
    shares = getattr(_sampler(loader), "world_size", 1)
    if shares != num_processes:
        raise ValueError(
            f"train: loader must be shared out over all {num_processes} processes; got one made for {shares}. "
            "Pass rank and world_size to detcore.data.make_loader."
        )
    return len(loader)


def _sampler(loader: Any) -> Any:
    """The part of a loader that knows the order: the first that can be told the epoch."""
    for sampler in (getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None), loader):
        if hasattr(sampler, "set_epoch"):
            return sampler
    return None


def _epoch_batches(loader: Any, at: _Position, resumed: dict[str, Any] | None) -> Iterator[Any]:
    """Batches still to do in the current epoch."""
    sampler = _sampler(loader)
    if sampler is not None:
        sampler.set_epoch(at.epoch)
    batches = iter(islice(loader, at.batch, None))
    if resumed and at.step == resumed["position"]["step"]:
        set_random_state(resumed["random"][int(os.environ.get("RANK", "0"))])
    return batches


def _find_checkpoint(config: TrainConfig, num_processes: int) -> dict[str, Any] | None:
    last = Path(config.output_dir) / "last.pt" if config.output_dir is not None else None
    if config.resume is None:
        if last is not None and last.exists():
            raise FileExistsError(
                f"train: config.output_dir must not hold another run; got {last.parent}, which has last.pt. "
                'Go on from it with resume="auto", or choose another folder.'
            )
        return None
    path = last if str(config.resume) == "auto" else Path(config.resume)
    if path is None or (str(config.resume) == "auto" and not path.exists()):
        return None
    checkpoint = load_checkpoint(path)
    if len(checkpoint["random"]) != num_processes:
        raise ValueError(
            f"train: config.resume must be continued by as many processes as wrote it; got {path} of "
            f"{len(checkpoint['random'])} for {num_processes}."
        )
    return checkpoint


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _identity(model: nn.Module) -> dict[str, Any]:
    """How to build the model again: what :func:`detcore.models.get_model` was asked for."""
    classes = getattr(model, "classes", None)
    return {"spec": getattr(model, "spec", None), "classes": None if classes is None else list(classes)}


def _unpack(batch: Any, device: torch.device, channels_last: bool) -> tuple[Any, Any, tuple[int, ...]]:
    if isinstance(batch, tuple | list):  # torchvision's references: images and targets, one an image
        images, targets = batch
        images = [image.to(device, non_blocking=True) for image in images]
        targets = [
            {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in t.items()} for t in targets
        ]
        return images, targets, tuple(int(t.get("image_id", i)) for i, t in enumerate(targets))
    image_ids = tuple(batch.image_ids.tolist())  # before the move: reading them there would wait
    batch = batch.to(device)
    images = batch.images.contiguous(memory_format=torch.channels_last) if channels_last else batch.images
    return images, batch.targets, image_ids


def _validate(
    validate: Callable[[nn.Module, int], dict[str, Any]] | None,
    model: nn.Module,
    epoch: int,
    accelerator: Accelerator,
) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    if validate and accelerator.is_main_process:
        was_training = model.training
        model.eval()
        with torch.no_grad():
            metrics = validate(model, epoch)
        model.train(was_training)
    accelerator.wait_for_everyone()
    return metrics


@contextmanager
def _interrupt_at_the_end() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done, so that no step is left half taken; a second one is heard at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []

    def hear(number: int, frame: Any) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(number)

    previous = signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if heard:
        raise KeyboardInterrupt


def _show_progress(config: TrainConfig) -> bool:
    if config.progress is not None:
        return config.progress
    return not os.environ.get("DETCORE_STATIC") and (sys.stderr.isatty() or "ipykernel" in sys.modules)


def _cpu_has_amx() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    flags = Path("/proc/cpuinfo")  # older torch, Linux only
    return flags.exists() and " amx_bf16" in flags.read_text(encoding="utf-8")


def _json_ready(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _json_ready(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(v) for v in value]
    if isinstance(value, Tensor | np.generic):
        value = value.item() if getattr(value, "ndim", 0) == 0 else value.tolist()
    return None if isinstance(value, float) and not math.isfinite(value) else value
