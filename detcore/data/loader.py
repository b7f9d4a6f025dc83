"""From a dataset to batches that are reproducible and resumable.

The order of an epoch is a function of ``(seed, epoch)`` and the augmentation of a picture one of
``(seed, epoch, index)``. So a run that is resumed in the middle of an epoch sees what an unbroken
one would have seen, with any number of workers.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader

from detcore.data.batch import PAD_COLOUR, Batch, collate
from detcore.data.buckets import Buckets
from detcore.data.cache import CachedDataset, CachedLoader
from detcore.data.colours import change_colours, draw_colours
from detcore.data.sampling import Counted, EpochSampler, Transform, TransformedDataset, mix

__all__ = [
    "PAD_COLOUR",
    "Batch",
    "CachedDataset",
    "CachedLoader",
    "EpochSampler",
    "Loader",
    "Recoloured",
    "TransformedDataset",
    "collate",
    "make_loader",
]

COLOURS = 0x436F6C6F7572  # what tells these random numbers from those of the order and the flips


class Loader(Counted, DataLoader):
    """A ``DataLoader`` whose place in the data can be saved and loaded; :func:`make_loader` makes it."""

    def __iter__(self) -> Iterator[Batch]:
        self.batch_sampler.begin()
        yield from self._count(super().__iter__())


def make_loader(
    dataset: Any,
    transform: Transform | None,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
    multiple: int = 32,
    buckets: Buckets | None = None,
) -> Loader:
    """Batches of a dataset, reproducible and resumable.

    Args:
        dataset: anything with ``len`` and ``[i] -> (image, target)``.
        transform: from :mod:`detcore.data.transforms`; ``None`` if the dataset's pictures do.
        batch_size: pictures a batch and process.
        shuffle: a new order each epoch.
        seed: of the order and of the augmentation.
        num_workers: processes that decode and transform; 0 does it in this one.
        rank: of this process among ``world_size``.
        world_size: processes that share the data.
        drop_last: leave out the last incomplete batch; see :class:`EpochSampler`.
        multiple: height and width of a batch are multiples of it.
        buckets: pictures of one canvas share a batch, which has its size; see
            :func:`detcore.data.buckets.size_buckets`.

    Example:
        >>> from detcore.data.scenes import Scenes
        >>> loader = make_loader(Scenes(6, size=64), None, batch_size=4, shuffle=True)
        >>> [len(batch) for batch in loader]
        [4, 2]
    """
    return Loader(
        TransformedDataset(dataset, transform, seed=seed),
        batch_sampler=EpochSampler(
            len(dataset),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
            groups=None if buckets is None else buckets.groups.tolist(),
        ),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=partial(collate, multiple=multiple, canvases=buckets.canvases if buckets else ()),
        pin_memory=torch.cuda.is_available(),
        # Workers' seeds would otherwise be drawn from the global generator, one draw a pass, and
        # a resumed run would make one draw more than an unbroken one.
        generator=torch.Generator(),
    )


class Recoloured:
    """The batches of a loader on a device, SSD's change of colours made there for a whole batch at once.

    The change of a picture follows from ``(seed, epoch, index)``. Pixels of the padding's colour stay as they are,
    so what lies around a zoomed-out picture is still the mean colour. Whatever else is asked of it, the loader answers.

    Args:
        loader: gives :class:`Batch`, its pictures' colours unchanged so far.
        device: of the batches.
        seed: of the changes, >= 0.

    Example:
        >>> from detcore.data.scenes import Scenes
        >>> plain = make_loader(Scenes(6, size=64), None, batch_size=4, shuffle=False)
        >>> loader = Recoloured(plain, device="cpu")
        >>> [len(batch) for batch in loader], loader.state_dict()["epoch"]
        ([4, 2], 1)

    Reference: Liu et al., SSD, ECCV 2016, section 2.2.
    """

    def __init__(self, loader: Loader | CachedLoader, *, device: torch.device | str, seed: int = 0) -> None:
        self.loader, self.device, self.seed = loader, torch.device(device), seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            changes = draw_colours(self._chance(batch.indices))
            if self.device.type == "cuda":  # from other memory the copy would wait for the GPU
                changes = changes.pin_memory()
            moved = batch.to(self.device, non_blocking=True)
            changes = changes.to(self.device, non_blocking=True)
            yield replace(moved, images=change_colours(moved.images, changes, spare=PAD_COLOUR))

    def _chance(self, indices: Tensor) -> Float[Tensor, "B 9"]:
        """Nine numbers a picture, uniform in [0, 1)."""
        keys = (9 * indices[:, None] + torch.arange(9)).flatten().numpy()
        words = mix(self.seed ^ COLOURS, self.loader.batch_sampler.epoch, keys)
        return torch.from_numpy((words >> np.uint64(40)).astype(np.float32) * 2.0**-24).view(-1, 9)
