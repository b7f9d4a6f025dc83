"""What a run tells: ``metrics.jsonl``, TensorBoard, a progress bar, and the History it returns."""

import importlib.util
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from detcore.training.config import TrainConfig

__all__ = ["History", "Step"]

logger = logging.getLogger("detcore")


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


class RunLog:
    """Writes all of it, on the first process only; the others keep their share of the means.

    Args:
        config: of the run.
        accelerator: knows the processes.
        header: facts about the run for the first line of the file.
        steps: already done, and in the whole run.
        resumed: what :meth:`state` gave when the checkpoint was written.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        header: Mapping[str, Any],
        steps: tuple[int, int],
        resumed: Mapping[str, Any] | None,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.history = History(precision=header["precision"])
        self.window: list[list[float]] = list(resumed["windows"][accelerator.process_index]) if resumed else []
        self.images = 0  # since the last line, for the speed
        self.since = self.epoch_since = time.perf_counter()
        self.file = self.board = None
        is_main = accelerator.is_main_process
        if is_main and config.output_dir is not None:
            self._open(Path(config.output_dir), steps[0], resumed)
        is_shown = is_main and _show_progress(config)
        self.bar = tqdm(total=steps[1], initial=steps[0], unit="step", disable=not is_shown)
        if resumed is None:
            self._write({"kind": "run", **header})
        if is_main:
            start = f"resuming after step {steps[0]}" if resumed else "starting"
            logger.info("training: %s of %d, on %s in %s", start, steps[1], accelerator.device, header["precision"])

    def _open(self, folder: Path, step: int, resumed: Mapping[str, Any] | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if resumed and path.exists():
            with path.open("r+b") as file:  # what came after the checkpoint will be written again
                file.truncate(min(resumed["bytes"], path.stat().st_size))
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            self.history.steps = [row for row in rows if row["kind"] == "step"]
            self.history.epochs = [row for row in rows if row["kind"] == "epoch"]
        self.file = path.open("a" if resumed else "w", encoding="utf-8")
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

            self.board = SummaryWriter(str(folder), purge_step=step + 1 if resumed else None)

    def bytes_written(self) -> int:
        """Length of ``metrics.jsonl`` now; a resumed run cuts it there."""
        return self.file.tell() if self.file else 0

    def step(self, step: Step) -> None:
        """Count a step; every ``log_every`` steps, write the means over all processes."""
        self.window.append([*step.losses.values(), step.grad_norm])
        self.images += len(step.image_ids)
        self.bar.update(1)
        if step.step % self.config.log_every:
            return
        here = torch.tensor(self.window).mean(0).to(self.accelerator.device)
        everywhere: Any = self.accelerator.reduce(here, "mean")
        *means, norm = everywhere.tolist()
        losses = dict(zip(step.losses, means, strict=True))
        now = time.perf_counter()
        speed = round(self.images * self.accelerator.num_processes / (now - self.since), 2)
        self.window, self.images, self.since = [], 0, now
        row: dict[str, Any] = {"kind": "step", "step": step.step, "epoch": step.epoch, "loss": sum(means)}
        row |= {"losses": losses, "lr": step.lr, "grad_norm": norm, "images_per_second": speed}
        self.history.steps.append(row)
        self._write(row)
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed:.0f} images/s", refresh=False)

    def epoch(self, step: int, epoch: int, metrics: Mapping[str, Any]) -> None:
        """Write an epoch's line: what validation said, how long it took, how much memory."""
        now = time.perf_counter()
        row: dict[str, Any] = {"kind": "epoch", "step": step, "epoch": epoch, "metrics": dict(metrics)}
        row["seconds"] = round(now - self.epoch_since, 3)
        if self.accelerator.device.type == "cuda":
            row["max_memory_bytes"] = torch.cuda.max_memory_allocated(self.accelerator.device)
        self.since = self.epoch_since = now
        self.images = 0
        self.history.epochs.append(row)
        self._write(row)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if isinstance(value, float))
        logger.info("training: epoch %d of %d is done. %s", epoch + 1, self.config.epochs, shown)

    def _write(self, row: dict[str, Any]) -> None:
        row = _json_ready(row)
        if self.file:
            self.file.write(json.dumps(row, allow_nan=False) + "\n")
            self.file.flush()
        if self.board and row["kind"] != "run":
            part = "train" if row["kind"] == "step" else "validate"
            numbers = {name: row[name] for name in ("loss", "lr", "grad_norm", "images_per_second") if name in row}
            for name, value in {**numbers, **row.get("losses", {}), **row.get("metrics", {})}.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(f"{part}/{name}", value, row["step"])

    def close(self) -> None:
        """End the bar and close the files."""
        self.bar.close()
        for sink in (self.file, self.board):
            if sink:
                sink.close()


def _show_progress(config: TrainConfig) -> bool:
    if config.progress is not None:
        return config.progress
    return not os.environ.get("DETCORE_STATIC") and (sys.stderr.isatty() or "ipykernel" in sys.modules)


def _json_ready(value: Any) -> Any:
    """JSON has no infinity, and no tensors: numbers that are not finite become null."""
    if hasattr(value, "tolist"):  # tensors, numpy's arrays and numbers
        return _json_ready(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
