"""Which pictures come when, and with which random numbers: both follow from (seed, epoch, index).

The epoch reaches loader workers inside the key of each sample, a pair ``(epoch, index)``, hence
also workers that outlive an epoch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from detcore.data.batch import Batch

__all__ = ["EpochSampler", "Transform", "TransformedDataset"]

Transform = Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]
"""(image, target) -> (image, target), random through torch's generator if at all."""


def mix(seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """64 well-mixed bits for each (seed, epoch, index): the finisher of SplitMix64, thrice.

    Reference: Steele et al., Fast Splittable Pseudorandom Number Generators, OOPSLA 2014, Fig. 17.
    """
    state = np.zeros(len(indices), np.uint64)
    for part in (np.array([seed]), np.array([epoch]), indices):
        state = (state ^ part.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's CPU generator at ``seed`` inside, as it was afterwards.

    ``torch.manual_seed`` would also reset the generators of every GPU.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class TransformedDataset(Dataset):
    """A dataset seen through a transform whose randomness depends on (seed, epoch, index) only.

    Args:
        dataset: anything with ``len`` and ``[i] -> (image, target)``.
        transform: ``(image, target) -> (image, target)``, random through torch's generator;
            ``None`` changes nothing.
        seed: >= 0.

    Example:
        >>> from detcore.data.scenes import Scenes
        >>> from detcore.data.transforms import square_transform
        >>> view = TransformedDataset(Scenes(8), square_transform(64, train=True), seed=1)
        >>> image, target = view[0, 5]  # picture 5 as epoch 0 sees it
        >>> tuple(image.shape), target["index"]
        ((3, 64, 64), 5)
    """

    def __init__(self, dataset: Any, transform: Transform | None = None, *, seed: int = 0) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Any, dict[str, Any]]:
        """The sample of ``index`` or ``(epoch, index)``; its target has ``index`` besides."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, target = self.dataset[index]
        if self.transform is not None:
            with _seeded(int(mix(self.seed, epoch, np.array([index]))[0] >> np.uint64(1))):
                image, target = self.transform(image, target)
        return image, {**target, "index": index}


class EpochSampler:
    """Batches of ``(epoch, index)`` keys; can stop anywhere in an epoch and go on from there.

    One order for all ranks is cut into global batches of ``batch_size * world_size``; each rank
    takes its slice of each. So W processes with batch B see, step by step, what one process with
    batch W * B sees.

    Iterating starts at :attr:`position` and changes nothing: the loader counts the batches that
    it handed out, which workers run ahead of.

    Args:
        length: samples in the dataset, >= 1.
        batch_size: samples a batch and rank, >= 1.
        shuffle: a new random order each epoch, else 0, 1, 2...
        seed: of the order, >= 0.
        rank: of this process, in [0, world_size).
        world_size: processes.
        drop_last: leave out what does not fill the last global batch. Training on several
            processes needs it: without it the rest is shared out evenly, and with fewer samples
            than processes some get one batch less (right for evaluation: no sample comes twice).
        groups: a number each sample; only samples of one number share a batch. Those that fill none with their like
            are mixed, so that small groups are not left out. Batches come in random order.

    Raises:
        ValueError: if an argument is out of range, there are not ``length`` groups, or ``drop_last`` would leave no
            batch.

    Example:
        >>> sampler = EpochSampler(5, batch_size=2, shuffle=False, seed=0)
        >>> list(sampler)
        [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)]]
    """

    def __init__(
        self,
        length: int,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        groups: Sequence[int] | None = None,
    ) -> None:
        for name, value, least in (("length", length, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"EpochSampler: {name} must be >= {least}; got {value}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"EpochSampler: rank must be in [0, world_size = {world_size}); got {rank}.")
        if drop_last and length < batch_size * world_size:
            raise ValueError(
                f"EpochSampler: length must be >= batch_size * world_size = {batch_size * world_size} with "
                f"drop_last; got {length}. Use a smaller batch or drop_last=False."
            )
        if groups is not None and len(groups) != length:
            raise ValueError(f"EpochSampler: groups must be one number a sample, {length}; got {len(groups)}.")
        self.length, self.batch_size, self.shuffle, self.seed = length, batch_size, shuffle, seed
        self.groups = np.zeros(length, np.int64) if groups is None else np.unique(groups, return_inverse=True)[1]
        self.num_groups = int(self.groups.max()) + 1
        self.rank, self.world_size, self.drop_last = rank, world_size, drop_last
        self.epoch = 0
        self.position = 0
        """Batches of this epoch already handed out."""
        self._resumed = False

    def _rest(self) -> tuple[int, int, int]:
        """Full global batches; first place and number of this rank's share of what remains."""
        step = self.batch_size * self.world_size
        full, rest = divmod(self.length, step)
        if self.drop_last:
            return full, 0, 0
        share, more = divmod(rest, self.world_size)
        start = full * step + self.rank * share + min(self.rank, more)
        return full, start, share + (self.rank < more)

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever :attr:`position` is."""
        full, _, count = self._rest()
        return full + (count > 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        full, start, count = self._rest()
        generator = torch.Generator().manual_seed(int(mix(self.seed, self.epoch, np.array([-1]))[0] >> np.uint64(1)))
        order = np.arange(self.length)
        if self.shuffle:
            order = torch.randperm(self.length, generator=generator).numpy()
        step, offset = self.batch_size * self.world_size, self.rank * self.batch_size
        order = self._with_their_like(order, step)
        batches = order[: full * step].reshape(full, step)
        if self.shuffle and self.num_groups > 1:
            batches = batches[torch.randperm(full, generator=generator).numpy()]
        batches = batches[:, offset : offset + self.batch_size].tolist()
        if count:
            batches.append(order[start : start + count].tolist())
        epoch = self.epoch
        return iter([[(epoch, index) for index in batch] for batch in batches[self.position :]])

    def _with_their_like(self, order: np.ndarray, step: int) -> np.ndarray:
        """The same samples, those that fill batches with their group first, the rest in the order they had."""
        group = self.groups[order]
        sorted_by_group = np.argsort(group, kind="stable")
        counts = np.bincount(group)
        place = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)  # within the group
        fills = place < np.repeat(counts // step * step, counts)
        return order[np.concatenate([sorted_by_group[fills], np.sort(sorted_by_group[~fills])])]

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``; a position just loaded in that epoch is kept."""
        if epoch != self.epoch:
            self.epoch, self.position, self._resumed = epoch, 0, False

    def begin(self) -> None:
        """Called by loaders at the start of a pass: from the first batch, unless just loaded."""
        if not self._resumed:
            self.position = 0
        self._resumed = False

    def state_dict(self) -> dict[str, int | bool]:
        """Where in the data a run is, and what that depends on."""
        names = ("epoch", "position", *self._fixed)
        return {name: getattr(self, name) for name in names}

    _fixed = ("length", "batch_size", "shuffle", "seed", "world_size", "drop_last", "num_groups")

    def load_state_dict(self, state: Mapping[str, int | bool]) -> None:
        """Go to where :meth:`state_dict` was taken.

        Raises:
            ValueError: if the order would not be that of the interrupted run.
        """
        state = {"num_groups": 1, **state}  # before there were groups, all were one
        for name in self._fixed:
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"EpochSampler.load_state_dict: {name} must be {state[name]}, as in the interrupted run; "
                    f"got {getattr(self, name)}. Resume with the same data, batch and number of processes."
                )
        self.epoch, self.position, self._resumed = int(state["epoch"]), int(state["position"]), True


class Counted:
    """What both loaders share: they count the batches that they hand out."""

    batch_sampler: EpochSampler

    def _count(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.batch_sampler.position += 1
            yield batch
        # A second pass without set_epoch is the next epoch.
        self.batch_sampler.set_epoch(self.batch_sampler.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next pass."""
        self.batch_sampler.set_epoch(epoch)

    def state_dict(self) -> dict[str, int | bool]:
        """Epoch and position after the batch handed out last; see :class:`EpochSampler`."""
        return self.batch_sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, int | bool]) -> None:
        """The next pass goes on where the state was taken, also in the middle of an epoch."""
        self.batch_sampler.load_state_dict(state)
