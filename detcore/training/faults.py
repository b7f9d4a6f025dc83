"""What to say when a loss is no number any more: which step, images, terms, and the box to look at."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detcore.training.history import Step

__all__ = ["NonFiniteLossError", "worst_box"]


class NonFiniteLossError(FloatingPointError):
    """A loss or the gradient became infinite or not a number; the weights are not spoiled by it."""


@dataclass
class Pending:
    """A step that the device may still be working on.

    What is to be told about it is copied as soon as it is there, without the host waiting for it.
    On a GPU it is read one step later, so that the host always runs ahead.

    Args:
        step: steps done, this one included.
        epoch: from 0.
        lr: that was used.
        names: of the loss terms.
        numbers: the terms, then the norm of the gradient.
        images: as given to the model; kept for the replay file.
        targets: likewise.
        image_ids: one an image; on the device if the batch was made there.
    """

    step: int
    epoch: int
    lr: float
    names: list[str]
    numbers: Tensor
    images: Any
    targets: Any
    image_ids: Tensor

    def __post_init__(self) -> None:
        """Start the copies to the host."""
        is_cuda = self.numbers.is_cuda
        self.numbers = self.numbers.to("cpu", non_blocking=True)
        self.image_ids = self.image_ids.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if is_cuda else None
        if self.arrived:
            self.arrived.record()

    def read(self) -> Step:
        """The numbers, waited for if need be."""
        if self.arrived:
            self.arrived.synchronize()
        *values, norm = self.numbers.tolist()
        losses = dict(zip(self.names, values, strict=True))
        return Step(self.step, self.epoch, losses, self.lr, norm, tuple(self.image_ids.tolist()))


def faulty_terms(step: Step, *, gradient_may_overflow: bool) -> list[str]:
    """Names of what is not finite; float16's loss scaling lives on overflowing gradients, so they may."""
    bad = [name for name, value in step.losses.items() if not math.isfinite(value)]
    if not bad and not math.isfinite(step.grad_norm) and not gradient_may_overflow:
        bad = ["gradient"]
    return bad


def describe_fault(step: Step, bad: Sequence[str], targets: Any) -> str:
    """The message of a :class:`NonFiniteLossError`."""
    shown = ", ".join(f"{name} = {value:g}" for name, value in step.losses.items())
    return (
        f"train: every loss and the gradient must be finite; got a non-finite {' and '.join(bad)} at step "
        f"{step.step} (epoch {step.epoch}, lr {step.lr:g}): {shown}, gradient norm = {step.grad_norm:g}. "
        f"Images: {list(step.image_ids)}. Worst box: {worst_box(targets, step.image_ids)}. "
        "Look at that box first; if it is sound, lower lr or lengthen warmup_steps."
    )


def worst_box(targets: Any, image_ids: Sequence[int]) -> str:
    """The object most likely to have broken a loss, in words.

    A box that is not finite or has no area comes first, then the largest long side / short side
    squared: thin and tiny boxes have the largest encoded targets and the steepest IoU.

    Args:
        targets: :class:`~detcore.structures.Targets`, or torchvision's list of dicts.
        image_ids: one an image.

    Example:
        >>> worst_box([{"boxes": torch.tensor([[0.0, 0, 9, 9], [5, 5, 25, 6]])}], [42])
        '[5, 5, 25, 6] (20 x 1 px) in image 42'
    """
    if isinstance(targets, list | tuple):
        pairs = [(i, box) for i, target in enumerate(targets) for box in target["boxes"].detach().float().cpu()]
    else:
        boxes = targets.boxes.detach().float().cpu()
        pairs = [(i, boxes[i, j]) for i, j in targets.valid.cpu().nonzero().tolist()]
    if not pairs:
        return "none, there are no objects"

    def badness(pair: tuple[int, Tensor]) -> float:
        x1, y1, x2, y2 = pair[1].tolist()
        long, short = max(x2 - x1, y2 - y1), min(x2 - x1, y2 - y1)
        return long / short**2 if math.isfinite(x1 + y1 + x2 + y2) and short > 0 else math.inf

    i, box = max(pairs, key=badness)
    x1, y1, x2, y2 = box.tolist()
    return f"[{x1:g}, {y1:g}, {x2:g}, {y2:g}] ({x2 - x1:g} x {y2 - y1:g} px) in image {image_ids[i]}"
