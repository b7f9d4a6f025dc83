"""Everything that a run consists of besides its steps: what is trained, and how it is saved and found again."""

import platform
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor, nn

from detcore.checkpoint import REPLAY_FORMAT, package_version, random_state, save_checkpoint, set_random_state
from detcore.training.config import TrainConfig, best_precision
from detcore.training.faults import NonFiniteLossError, Pending, describe_fault, faulty_terms
from detcore.training.history import RunLog, Step
from detcore.training.parts import (
    Average,
    LossModule,
    checked_length,
    find_checkpoint,
    identity,
    make_optimizer,
    plain_config,
    seed_everything,
    unpack,
)

__all__: list[str] = []


@dataclass
class Position:
    """How far a run is: steps ever done, the epoch, batches done in it, the best AP so far."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float = float("-inf")


class Run:
    """The model, what trains it, and where the run is; new, or as a checkpoint left it.

    Args:
        model: to train, in place.
        loader: batches.
        config: of the run.
        on_step: told every step.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        config: TrainConfig,
        on_step: Callable[[Step], None] | None,
    ) -> None:
        # Precision is handled in the loop, in sight. Validation may keep the other processes waiting for long.
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))
        self.accelerator = Accelerator(cpu=config.device == "cpu", mixed_precision="no", kwargs_handlers=[patience])
        self.device, self.rank = self.accelerator.device, self.accelerator.process_index
        self.model, self.loader, self.config, self.on_step = model, loader, config, on_step
        self.precision = best_precision(self.device) if config.precision == "auto" else config.precision
        if self.precision == "fp16" and self.device.type == "cpu":
            raise ValueError("train: config.precision must be fp32 or bf16 on a CPU; got fp16.")
        if config.cuda_graphs and self.device.type != "cuda":
            raise ValueError(f"train: config.cuda_graphs must be False without a GPU; got True on {self.device}.")
        self.half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        self.steps_per_epoch = checked_length(loader, self.accelerator.num_processes)
        self.identity = identity(model, loader)
        self.resumed = find_checkpoint(config, self.accelerator.num_processes)
        seed_everything(config.seed + self.rank)

        model.to(self.device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)
        if self.resumed:
            model.load_state_dict(self.resumed["model"])
        self.ema = None if config.ema_decay is None else Average(model, config.ema_decay)
        self.optimizer: Any = make_optimizer(model, config, is_fused=self.precision != "fp16")
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.network = self.accelerator.prepare(
            LossModule(model, is_compiled=config.compile, is_graphed=config.cuda_graphs)
        )
        self.at = Position()
        if self.resumed:
            self._restore(self.resumed)
        self.epoch_random = random_state()
        self.waiting: deque[Pending] = deque()
        total = config.epochs * self.steps_per_epoch
        resumed_log = self.resumed["log"] if self.resumed else None
        self.log = RunLog(config, self.accelerator, self._header(), (self.at.step, total), resumed_log)
        self.log.history.model = self.ema.module if self.ema else model

    def _header(self) -> dict[str, Any]:
        is_gpu = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if is_gpu else platform.processor() or platform.machine(),
            "processes": self.accelerator.num_processes,
            "precision": self.precision,
            "detcore": package_version(),
            "torch": str(torch.__version__),
            "steps_per_epoch": self.steps_per_epoch,
            "config": plain_config(self.config),
        }

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        self.at = Position(**checkpoint["position"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():  # the fused step wants them laid out in memory as the weights are
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter).copy_(value)
        self.scaler.load_state_dict(checkpoint["scaler"])
        if self.ema and checkpoint["ema"]:
            self.ema.load(checkpoint["ema"])
        if hasattr(self.loader, "load_state_dict") and checkpoint["loader"]:
            self.loader.load_state_dict(checkpoint["loader"])

    def batches(self) -> Iterator[Any]:
        """What is still to do of this epoch, moved to the device: images, targets, image ids.

        A loader that cannot find its place is led there: the epoch is begun with the random state it
        began with, and what was done is skipped.
        """
        resumed, self.resumed = self.resumed, None
        can_seek = hasattr(self.loader, "load_state_dict")
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(self.at.epoch)
        if resumed and self.at.batch and not can_seek:
            set_random_state(resumed["random"][self.rank]["epoch"])
        self.epoch_random = random_state()
        batches = iter(self.loader)
        if resumed:
            for _ in range(0 if can_seek else self.at.batch):
                next(batches)
            set_random_state(resumed["random"][self.rank]["now"])
        return (unpack(batch, self.device, is_channels_last=self.config.channels_last) for batch in batches)

    def report(
        self, losses: dict[str, Tensor], numbers: Tensor, lr: float, images: Any, targets: Any, ids: Tensor
    ) -> None:
        """Count the step; tell it at once on a CPU, one step later on a GPU so that the host need not wait."""
        self.at.step, self.at.batch = self.at.step + 1, self.at.batch + 1
        self.waiting.append(Pending(self.at.step, self.at.epoch, lr, list(losses), numbers, images, targets, ids))
        self.settle(keep=1 if self.device.type == "cuda" else 0)
        every = self.config.checkpoint_every_steps
        if every and self.at.step % every == 0 and self.at.batch < self.steps_per_epoch:
            self.save("last.pt")

    def settle(self, keep: int = 0) -> None:
        """Read, check and log the steps that wait, but for the last ``keep``.

        Raises:
            NonFiniteLossError: if one of their numbers is not finite.
        """
        while len(self.waiting) > keep:
            pending = self.waiting.popleft()
            step = pending.read()
            bad = faulty_terms(step, gradient_may_overflow=self.scaler.is_enabled())
            if bad:
                message = describe_fault(step, bad, pending.targets)
                raise NonFiniteLossError(message + self.save_replay(pending))
            self.log.step(step)
            if self.on_step:
                self.on_step(step)

    def validate(self, judge: Callable[[nn.Module, int], dict[str, Any]] | None) -> dict[str, Any]:
        """What ``judge`` says of the model to detect with; nothing on all but the first process."""
        self.settle()
        metrics: dict[str, Any] = {}
        model = self.log.history.model
        if judge and model and self.accelerator.is_main_process:
            model.eval()
            with torch.no_grad():
                metrics = judge(model, self.at.epoch)
        self.accelerator.wait_for_everyone()
        return metrics

    def end_epoch(self, metrics: dict[str, Any]) -> None:
        """Log it, go to the start of the next one and save."""
        self.log.epoch(self.at.step, self.at.epoch, metrics)
        self.at.epoch, self.at.batch = self.at.epoch + 1, 0
        is_best = metrics.get("AP", float("-inf")) > self.at.best
        self.at.best = float(metrics["AP"]) if is_best else self.at.best
        self.save("last.pt", *(["best.pt"] if is_best else []))

    def save(self, *names: str) -> None:
        """Write the whole run under these names in ``output_dir``; every process must call it."""
        if self.config.output_dir is None:
            return
        self.settle()
        # Every process draws its own random numbers and has its own share of the means.
        shares = gather_object([({"now": random_state(), "epoch": self.epoch_random}, self.log.window)])
        if self.accelerator.is_main_process:
            loader = self.loader.state_dict() if hasattr(self.loader, "state_dict") else None
            # The loader counts what it handed out; what counts here is what was trained on.
            here = {"epoch": self.at.epoch, "position": self.at.batch}
            checkpoint = {
                **self.identity,
                "model": self.model.state_dict(),
                "ema": self.ema.state() if self.ema else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "position": asdict(self.at),
                "loader": loader and {**loader, **here},
                "random": [randoms for randoms, _ in shares],
                "log": {"windows": [window for _, window in shares], "bytes": self.log.bytes_written()},
                "config": plain_config(self.config),
            }
            for name in names:
                save_checkpoint(Path(self.config.output_dir) / name, checkpoint)
        self.accelerator.wait_for_everyone()

    def save_replay(self, pending: Pending) -> str:
        """Keep the batch and the weights that gave a non-finite loss; says where."""
        if self.config.output_dir is None:
            return ""
        path = Path(self.config.output_dir) / f"nonfinite_step{pending.step}_process{self.rank}.pt"
        targets = pending.targets if isinstance(pending.targets, list | tuple) else vars(pending.targets)
        content = {
            **self.identity,
            "format": REPLAY_FORMAT,
            "model": self.model.state_dict(),
            "images": pending.images,
            "targets": targets,
            "image_ids": pending.image_ids,
            "step": pending.step,
        }
        save_checkpoint(path, content)
        return f" The batch and the weights are in {path}, for load_checkpoint."
