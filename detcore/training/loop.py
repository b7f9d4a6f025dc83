"""The training loop: what happens in a step can be read in :func:`train`, from top to bottom.

accelerate places the model and couples processes; the rest is plain PyTorch. ``python``,
``torchrun`` and ``accelerate launch`` start the same code.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from detcore.training.config import TrainConfig, learning_rate
from detcore.training.history import History, Step
from detcore.training.parts import ImpatientInterrupt, interrupt_at_the_end
from detcore.training.run import Run

__all__ = ["train"]


def train(
    model: nn.Module,
    loader: Iterable[Any],
    config: TrainConfig,
    *,
    validate: Callable[[nn.Module, int], dict[str, Any]] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> History:
    """Train ``model`` in place.

    With several processes each calls this with its own share of the data. Gradients are averaged
    and the losses divide by the mean number of positives, so W processes with b images each do
    what one does with W*b.

    Args:
        model: anything with ``loss(images, targets) -> {name: scalar}``; a module without it, such as
            torchvision's detectors, is called as ``model(images, targets)``.
        loader: has a length and gives :class:`detcore.data.loader.Batch` or pairs (list of images,
            list of dicts). Its randomness may come from its seed and epoch, or from torch's global
            generator; either way a resumed run sees the same batches.
        config: how to train.
        validate: called after each epoch, on the first process only and without gradients, with the
            module to judge (in eval mode) and the epoch; what it returns is logged, and ``best.pt``
            is kept by its ``AP``.
        on_step: called after each step; on a GPU one step late, so that the host need not wait.

    Returns:
        What was logged, and the module to detect with.

    Raises:
        NonFiniteLossError: names step, images, terms and the worst box; no weight is spoiled.
        ValueError: if the loader is empty or not shared out over the processes.
        CheckpointError: if ``config.resume`` is not a usable checkpoint.
        FileExistsError: if ``output_dir`` holds another run and ``resume`` is not given.
        KeyboardInterrupt: on Ctrl-C, once the step is done and, with one process, ``last.pt`` written.

    Example:
        >>> from detcore.structures import Targets
        >>> class Mean(nn.Module):  # learns the mean colour
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.colour = nn.Parameter(torch.zeros(3))
        ...
        ...     def loss(self, images, targets):
        ...         return {"colour": (torch.stack(images).mean((0, 2, 3)) - self.colour).square().sum()}
        >>> batch = [torch.ones(3, 4, 4)], [{"boxes": torch.zeros(0, 4)}]
        >>> config = TrainConfig(epochs=100, lr=0.05, warmup_steps=0, schedule="cosine", device="cpu")
        >>> model = Mean()
        >>> history = train(model, [batch], config)
        >>> [round(value, 1) for value in model.colour.tolist()]
        [1.0, 1.0, 1.0]
    """
    run = Run(model, loader, config, on_step)
    at, optimizer, scaler = run.at, run.optimizer, run.scaler
    try:
        for _ in range(at.epoch, config.epochs):
            run.network.train()
            for images, targets, image_ids in run.batches():
                with interrupt_at_the_end():
                    lr = learning_rate(config, at.step, run.steps_per_epoch)
                    for group in optimizer.param_groups:
                        group["lr"] = lr

                    with torch.autocast(run.device.type, dtype=run.half, enabled=run.half is not None):
                        losses = run.network(images, targets)
                    total = sum(losses.values(), start=torch.zeros((), device=run.device))
                    scaler.scale(total).backward()
                    scaler.unscale_(optimizer)
                    norm = nn.utils.clip_grad_norm_(run.parameters, config.clip_norm or math.inf)

                    numbers = torch.stack([term.detach().float() for term in (*losses.values(), norm)])
                    if not scaler.is_enabled():
                        # The fused step reads this on the device and leaves the weights alone if it is 1:
                        # nothing is spoiled, and the host need not wait for the numbers.
                        optimizer.found_inf = 1.0 - numbers.isfinite().all().float()
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                    if run.ema:
                        run.ema.update(model)
                    run.report(losses, numbers, lr, images, targets, image_ids)
            metrics = run.validate(validate)
            with interrupt_at_the_end():
                run.end_epoch(metrics)
    except ImpatientInterrupt:
        raise
    except KeyboardInterrupt:
        if run.accelerator.num_processes == 1:  # others may be elsewhere and would be waited for
            run.save("last.pt")
        raise
    finally:
        run.log.close()
    return run.log.history
