"""Small parts of a run: the optimiser, the averaged copy, batches on the device, checks at the door, Ctrl-C."""

import copy
import logging
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detcore.checkpoint import find_not_plain, load_checkpoint
from detcore.training.config import TrainConfig

__all__: list[str] = []

logger = logging.getLogger("detcore")


class LossModule(nn.Module):
    """A detector whose ``forward`` is its loss: data parallelism averages the gradients of ``forward`` only."""

    def __init__(self, detector: nn.Module, *, is_compiled: bool, is_graphed: bool = False) -> None:
        super().__init__()
        self.detector = detector
        loss: Any = getattr(detector, "loss", detector.forward)
        mode = "reduce-overhead" if is_graphed else None  # what torch calls CUDA graphs
        self.loss: Callable[..., dict[str, Tensor]] = torch.compile(loss, mode=mode) if is_compiled else loss

    def forward(self, images: Any, targets: Any) -> dict[str, Tensor]:
        """The loss terms."""
        return self.loss(images, targets)


class Average:
    """Exponential moving average of the weights; early steps count more, or the start would linger."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards ``model``, in a few launches and without the wait that torch's AveragedModel has."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - decay)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)  # running statistics are averages already
        self.updates += 1

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"weights": self.module.state_dict(), "updates": self.updates}

    def load(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.module.load_state_dict(state["weights"])
        self.updates = state["updates"]


def make_optimizer(model: nn.Module, config: TrainConfig, *, is_fused: bool) -> torch.optim.Optimizer:
    """SGD or AdamW over what requires a gradient.

    Args:
        model: on its device.
        config: of the run.
        is_fused: one launch for all weights, which can leave a step out on the device. Not under float16, where
            the scaler leaves steps out: fused SGD would keep an unset momentum if the first step is one of them.

    Raises:
        ValueError: if nothing is to be trained.
    """
    pulled: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    seen: set[int] = set()
    for module in model.modules():
        is_norm = isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                is_spared = not config.decay_norm_and_bias and (is_norm or name == "bias")
                (spared if is_spared else pulled).append(parameter)
    pairs = ((pulled, config.weight_decay), (spared, 0.0))
    groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in pairs if parameters]
    if not groups:
        raise ValueError("train: model must have a parameter that requires a gradient; got none.")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999), fused=is_fused)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=is_fused)


def unpack(batch: Any, device: torch.device, *, is_channels_last: bool) -> tuple[Any, Any, Tensor]:
    """Images, targets and image ids of a batch, on the device (but for the ids)."""
    if isinstance(batch, tuple | list):  # torchvision's way: a list of images, a list of dicts
        images = [image.to(device, non_blocking=True) for image in batch[0]]
        targets = [
            {
                key: value.as_subclass(Tensor).to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for key, value in target.items()
            }
            for target in batch[1]
        ]
        ids = [int(target.get("image_id", i)) for i, target in enumerate(batch[1])]
        return images, targets, torch.tensor(ids)
    image_ids = batch.image_ids
    batch = batch.to(device, non_blocking=True)
    images = batch.images.contiguous(memory_format=torch.channels_last) if is_channels_last else batch.images
    return images, batch.targets, image_ids


def checked_length(loader: Any, num_processes: int) -> int:
    """Batches in an epoch.

    Raises:
        ValueError: if there are none, or the data is not shared out over the processes.
    """
    if not hasattr(loader, "__len__"):
        raise ValueError(f"train: loader must have a length, the batches of an epoch; got {type(loader).__name__}.")
    if len(loader) == 0:
        raise ValueError("train: loader must hold a batch; got none. Is batch_size larger than the data?")
    sampler = getattr(loader, "batch_sampler", None)
    shares = getattr(sampler, "world_size", num_processes)
    if shares != num_processes:
        raise ValueError(
            f"train: loader must be shared out over all {num_processes} processes; got one made for {shares}. "
            "Give rank and world_size to make_loader."
        )
    if num_processes > 1 and not getattr(sampler, "drop_last", True):
        raise ValueError(
            "train: loader must be made with drop_last=True for several processes; got drop_last=False. "
            "The last batch would have another size on each."
        )
    return len(loader)


def find_checkpoint(config: TrainConfig, num_processes: int) -> dict[str, Any] | None:
    """The checkpoint to go on from, if any.

    Raises:
        FileExistsError: if another run would be overwritten.
        ValueError: if another number of processes wrote it.
    """
    last = None if config.output_dir is None else Path(config.output_dir) / "last.pt"
    if config.resume is None:
        if last is not None and last.exists():
            raise FileExistsError(
                f"train: config.output_dir must not hold another run; got {last.parent}, which has last.pt. "
                'Go on from it with resume="auto", or choose another folder.'
            )
        return None
    path = Path(config.resume)
    if last is not None and str(config.resume) == "auto":
        if not last.exists():
            return None
        path = last
    checkpoint = load_checkpoint(path)
    if "position" not in checkpoint:
        raise ValueError(f"train: config.resume must be a checkpoint of a run; got {path}, a replay of a fault.")
    if len(checkpoint["random"]) != num_processes:
        raise ValueError(
            f"train: config.resume must be continued by as many processes as wrote it; got {num_processes} for "
            f"{path}, written by {len(checkpoint['random'])}."
        )
    return checkpoint


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # libraries draw from the global generator
    torch.manual_seed(seed)


def identity(model: nn.Module, loader: Any = None) -> dict[str, Any]:
    """What it takes to build the model again and to name what it finds.

    Returns:
        ``spec``, what :func:`detcore.models.get_model` was asked for, or ``None`` if the model is of another
        kind or was given parts that no file can hold; ``classes``, their names, from the model or the data;
        ``pictures``, the model's attribute of that name if it has one: how pictures are prepared for it.
    """
    spec = dict(getattr(model, "spec", None) or {})
    if find_not_plain(spec):
        logger.warning(
            "training: the checkpoints will not say how to build the model: %s", find_not_plain(spec, "spec")
        )
        spec = {}
    source: Any = model
    while source is not None and not hasattr(source, "classes"):
        source = loader if source is model else getattr(source, "dataset", None)
    classes = None if source is None else [str(name) for name in source.classes]
    return {"spec": spec or None, "classes": classes, "pictures": getattr(model, "pictures", None)}


def plain_config(config: TrainConfig) -> dict[str, Any]:
    """The configuration in values that any file can hold."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}


class ImpatientInterrupt(KeyboardInterrupt):
    """The second Ctrl-C within one step: it is not waited for, and left half done."""


@contextmanager
def interrupt_at_the_end() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done, so that no step is left half taken; a second one is heard at once."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # somebody else decides what Ctrl-C means
        return
    heard: list[int] = []

    def hear(number: int, frame: Any) -> None:
        if heard:
            raise ImpatientInterrupt
        heard.append(number)

    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if heard:
        raise KeyboardInterrupt
