"""Run a detector over a data set and hand its boxes, in original pixels, to an evaluator."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from detcore.structures import to_dicts

__all__ = ["Evaluator", "collect", "evaluate", "rescale_boxes"]


@runtime_checkable
class Evaluator(Protocol):
    """What :func:`evaluate` feeds: see :class:`CocoEvaluator` and :class:`VocEvaluator`."""

    def reset(self) -> None:
        """Forget all images."""

    def update(self, detections: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> None:
        """Add images."""

    def compute(self) -> dict[str, float]:
        """The numbers of all images so far."""
        ...


def evaluate(
    model: nn.Module,
    loader: Iterable,
    dataset: Any,
    evaluator: Evaluator,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """What an evaluator says about a detector on a data set.

    Boxes are compared with the ground truth in the pixels of the original pictures, so the numbers do
    not depend on how the loader resized them.

    Args:
        model: a detector with ``detect(images, sizes) -> Detections``. It runs in evaluation mode and is
            left in the modes it came in, module by module.
        loader: batches with ``images`` (B, 3, H, W), ``sizes`` and ``original_sizes`` (B, 2) as (height,
            width), and ``indices`` (B,) into ``dataset``.
        dataset: ``dataset.target(i)`` is the ground truth of image i in original pixels.
        evaluator: is reset first.
        device: where to run; ``None`` for the device of the model's first parameter.
        progress: show a bar.

    Returns:
        ``evaluator.compute()``.

    Raises:
        ValueError: if a batch does not know the positions of its pictures, or the evaluator finds fault.

    Example:
        >>> from types import SimpleNamespace as Simple
        >>> from detcore.evaluation import CocoEvaluator
        >>> from detcore.structures import Detections
        >>> class Whole(nn.Module):  # answers: one object, as large as the picture
        ...     def detect(self, images, sizes):
        ...         box = torch.cat([torch.zeros_like(sizes), sizes.flip(1)], 1)[:, None].float()
        ...         one = torch.ones(len(images), 1)
        ...         return Detections(box, one, 0 * one.long(), one.bool())
        >>> cat = {"boxes": [[0, 0, 200, 100]], "labels": [0]}
        >>> size, index = torch.tensor([[32, 64]]), torch.tensor([0])
        >>> batch = Simple(
        ...     images=torch.zeros(1, 3, 64, 64), sizes=size, original_sizes=torch.tensor([[100, 200]]), indices=index
        ... )
        >>> result = evaluate(Whole(), [batch], Simple(target=lambda i: cat), CocoEvaluator(1), progress=False)
        >>> round(result["AP"], 6)
        1.0
    """
    evaluator.reset()
    with _evaluation_mode(model):
        for detections, targets in _batches(model, loader, dataset, device=device, progress=progress):
            evaluator.update(detections, targets)
    return evaluator.compute()


def collect(
    model: nn.Module,
    loader: Iterable,
    dataset: Any,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> tuple[list[dict[str, Tensor]], list[Mapping[str, Any]]]:
    """All detections on a data set and its ground truth, as lists of dicts for any measure.

    Args:
        model: as for :func:`evaluate`.
        loader: as for :func:`evaluate`.
        dataset: as for :func:`evaluate`.
        device: where to run; ``None`` for the device of the model's first parameter.
        progress: show a bar.

    Returns:
        Detections on the CPU and targets, one mapping an image, in the loader's order, both in original
        pixels.

    Raises:
        ValueError: if a batch does not know the positions of its pictures.

    Example:
        >>> collect(nn.Identity(), [], dataset=None, progress=False)  # no batch, no image
        ([], [])
    """
    all_detections, all_targets = [], []
    with _evaluation_mode(model):
        for detections, targets in _batches(model, loader, dataset, device=device, progress=progress):
            all_detections += detections
            all_targets += targets
    return all_detections, all_targets


def rescale_boxes(
    boxes: Float[Tensor, "n 4"], size: Int[Tensor, " 2"], original_size: Int[Tensor, " 2"]
) -> Float[Tensor, "n 4"]:
    """Boxes of a resized picture in the pixels of the original.

    Args:
        boxes: corners in pixels of the resized picture.
        size: its (height, width), without padding.
        original_size: (height, width) of the original.

    Example:
        >>> rescale_boxes(torch.tensor([[0.0, 10.0, 20.0, 50.0]]), torch.tensor([50, 100]), torch.tensor([200, 200]))
        tensor([[  0.,  40.,  40., 200.]])
    """
    scale = (original_size.double() / size.double()).flip(0).repeat(2)  # x y x y
    return (boxes.double() * scale).to(boxes.dtype)


def _batches(
    model: Any, loader: Iterable, dataset: Any, *, device: torch.device | str | None, progress: bool
) -> Iterator[tuple[list[dict[str, Tensor]], list[Mapping[str, Any]]]]:
    """Detections and targets, batch by batch."""
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for batch in tqdm(loader, desc="evaluate", unit="batch", disable=not progress, leave=False):
        indices = batch.indices.tolist()
        if min(indices, default=0) < 0:
            raise ValueError(
                f"evaluate: batch.indices must be positions in the dataset; got {indices}. "
                "Load samples with detcore.data.make_loader."
            )
        with torch.no_grad():  # not around the yield: the consumer's code is its own
            found = model.detect(batch.images.to(device, non_blocking=True), batch.sizes.to(device)).to("cpu")
        detections = [
            {**each, "boxes": rescale_boxes(each["boxes"].float(), size, original_size)}
            for each, size, original_size in zip(
                to_dicts(found), batch.sizes.cpu(), batch.original_sizes.cpu(), strict=True
            )
        ]
        yield detections, [dataset.target(i) for i in indices]


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while. Frozen batch norms stay in it; ``model.train()`` would wake them."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
