"""One step's pictures and objects in one value, and how samples are stacked into it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from detcore.structures import Targets, pad_targets

__all__ = ["PAD_COLOUR", "Batch", "collate"]

PAD_COLOUR = (124, 116, 104)
"""Red, green and blue of padding: ImageNet's mean, which normalisation turns to about zero."""


@dataclass(frozen=True)
class Batch:
    """Pictures of one step, padded to one size, with their objects.

    Args:
        images: red, green, blue, 0..255, not normalised; padded at the right and the bottom with
            :data:`PAD_COLOUR`.
        targets: the objects in pixels of ``images``, padded; ``targets.sizes`` is ``sizes``.
        image_ids: the dataset's ids.
        sizes: (height, width) in pixels of each picture inside the batch.
        original_sizes: (height, width) in pixels before any transform.
        indices: positions in the dataset; -1 where the sample did not say.
    """

    images: UInt8[Tensor, "B 3 H W"]
    targets: Targets
    image_ids: Int[Tensor, " B"]
    sizes: Int[Tensor, "B 2"]
    original_sizes: Int[Tensor, "B 2"]
    indices: Int[Tensor, " B"]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Batch":
        """Pictures, objects and sizes on ``device``.

        ``image_ids``, ``original_sizes`` and ``indices`` stay where they are: only the host reads
        them, and reading them from a GPU would make it wait.
        """
        moved = {name: getattr(self, name) for name in ("images", "targets", "sizes")}
        return replace(self, **{k: v.to(device, non_blocking=non_blocking) for k, v in moved.items()})

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to a GPU run beside its work."""
        known = self.targets
        sizes = None if known.sizes is None else known.sizes.pin_memory()
        targets = Targets(known.boxes.pin_memory(), known.labels.pin_memory(), known.valid.pin_memory(), sizes)
        pinned = {f.name: getattr(self, f.name).pin_memory() for f in fields(self) if f.name != "targets"}
        return Batch(targets=targets, **pinned)


def collate(
    samples: Sequence[tuple[Tensor, Mapping[str, Any]]],
    *,
    multiple: int = 32,
    canvases: Sequence[tuple[int, int]] = (),
) -> Batch:
    """Stack samples of any sizes into one batch.

    Height and width are those of the smallest of ``canvases`` that holds every sample; where there is none, the
    largest of the samples, rounded up to ``multiple``. Objects flagged
    ``ignore`` or ``iscrowd`` are left out, as :func:`detcore.structures.pad_targets` does.

    Args:
        samples: pairs (image uint8 (3, h, w), target); the target needs ``boxes``, ``labels``
            and ``image_id``, and may have ``original_size`` and ``index``.
        multiple: of height and width, >= 1; 32 is the stride of a trunk's last level.
        canvases: (height, width) in pixels that batches should have, multiples of it.

    Raises:
        ValueError: if there is no sample, or a box or label is wrong; the message names the image id.

    Example:
        >>> target = {"boxes": torch.tensor([[2.0, 2.0, 9.0, 9.0]]), "labels": torch.tensor([0]), "image_id": 7}
        >>> batch = collate([(torch.zeros(3, 20, 40, dtype=torch.uint8), target)])
        >>> tuple(batch.images.shape), batch.sizes.tolist(), batch.image_ids.tolist()
        ((1, 3, 32, 64), [[20, 40]], [7])
    """
    if not samples:
        raise ValueError("collate: samples must hold at least one (image, target); got an empty sequence.")
    images = [image.as_subclass(Tensor) for image, _ in samples]
    targets = [target for _, target in samples]
    sizes = torch.tensor([image.shape[-2:] for image in images])
    height, width = padded_size(sizes.amax(0).tolist(), multiple, canvases)
    canvas = empty_canvas(len(images), height, width, filled=bool((sizes != torch.tensor([height, width])).any()))
    for slot, image in zip(canvas, images, strict=True):
        slot[:, : image.shape[1], : image.shape[2]] = image
    return Batch(
        images=canvas,
        targets=pad_named(targets, sizes),
        image_ids=torch.tensor([int(target["image_id"]) for target in targets]),
        sizes=sizes,
        original_sizes=stack_original_sizes(targets, sizes),
        indices=torch.tensor([int(target.get("index", -1)) for target in targets]),
    )


def padded_size(largest: Sequence[int], multiple: int, canvases: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(height, width) of a batch whose pictures are at most ``largest``: the smallest canvas, or rounded up."""
    fitting = [(h, w) for h, w in canvases if h >= largest[0] and w >= largest[1]]
    height, width = (-(-side // multiple) * multiple for side in largest)
    return min(fitting, key=lambda size: size[0] * size[1], default=(height, width))


def empty_canvas(n: int, height: int, width: int, *, filled: bool) -> Tensor:
    """Room for n pictures; where something is left over it must be padding."""
    canvas = torch.empty(n, 3, height, width, dtype=torch.uint8)
    if filled:
        canvas[:] = torch.tensor(PAD_COLOUR, dtype=torch.uint8)[:, None, None]
    return canvas


def stack_original_sizes(targets: Sequence[Mapping[str, Any]], sizes: Tensor) -> Tensor:
    sources = [target.get("original_size", size) for target, size in zip(targets, sizes, strict=True)]
    return torch.stack([torch.as_tensor(size).as_subclass(Tensor) for size in sources])


def pad_named(targets: Sequence[Mapping[str, Any]], sizes: Tensor) -> Targets:
    """``pad_targets`` whose errors say which picture of the dataset is meant."""
    try:
        return pad_targets(targets, sizes=sizes)
    except (KeyError, ValueError) as error:
        for i, target in enumerate(targets):
            try:
                pad_targets([target])
            except (KeyError, ValueError):
                raise ValueError(
                    f"image id {target.get('image_id')} (number {i} of its batch): {error.args[0]}"
                ) from error
        raise
