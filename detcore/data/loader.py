"""From a dataset to batches that are reproducible and resumable.

The order of an epoch is a function of ``(seed, epoch)`` and the augmentation of a picture one of
``(seed, epoch, index)``. So a run that is resumed in the middle of an epoch sees what an unbroken
one would have seen, with any number of workers.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from detcore.data.batch import PAD_COLOUR, Batch, collate
from detcore.data.cache import CachedDataset, CachedLoader
from detcore.data.sampling import Counted, EpochSampler, Transform, TransformedDataset

__all__ = [
    "PAD_COLOUR",
    "Batch",
    "CachedDataset",
    "CachedLoader",
    "EpochSampler",
    "Loader",
    "TransformedDataset",
    "collate",
    "make_loader",
]


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
        ),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=partial(collate, multiple=multiple),
        pin_memory=torch.cuda.is_available(),
        # Workers' seeds would otherwise be drawn from the global generator, one draw a pass, and
        # a resumed run would make one draw more than an unbroken one.
        generator=torch.Generator(),
    )
