"""From a dataset to batches: order, random augmentation, padding, caches.

Everything random is a function of ``(seed, epoch, index)``. The order of an epoch depends on the
seed and the epoch; the augmentation of a picture on these and its index. So a run that is resumed
in the middle of an epoch sees what an unbroken one would have seen, with any number of workers.
The epoch reaches workers inside the key of each sample, a pair ``(epoch, index)``, hence also
workers that outlive an epoch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from tqdm import tqdm

from detcore.structures import Targets, pad_targets

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

PAD_COLOUR = (124, 116, 104)
"""Red, green and blue of padding: ImageNet's mean, which normalisation turns to about zero."""

Transform = Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]


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
        """The same batch on ``device``."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)})

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to a GPU run beside its work."""
        pinned = {f.name: getattr(self, f.name).pin_memory() for f in fields(self) if f.name != "targets"}
        parts = {f.name: getattr(self.targets, f.name) for f in fields(self.targets)}
        targets = Targets(**{k: None if v is None else v.pin_memory() for k, v in parts.items()})
        return Batch(targets=targets, **pinned)


def collate(samples: Sequence[tuple[Tensor, Mapping[str, Any]]], *, multiple: int = 32) -> Batch:
    """Stack samples of any sizes into one batch.

    Height and width are the largest of the samples, rounded up to ``multiple``. Objects flagged
    ``ignore`` or ``iscrowd`` are left out, as :func:`detcore.structures.pad_targets` does.

    Args:
        samples: pairs (image uint8 (3, h, w), target); the target needs ``boxes``, ``labels``
            and ``image_id``, and may have ``original_size`` and ``index``.
        multiple: of height and width, >= 1; 32 is the stride of a trunk's last level.

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
    height, width = (-(-side // multiple) * multiple for side in sizes.amax(0).tolist())
    canvas = _canvas(len(images), height, width, filled=bool((sizes != torch.tensor([height, width])).any()))
    for slot, image in zip(canvas, images, strict=True):
        slot[:, : image.shape[1], : image.shape[2]] = image
    return Batch(
        images=canvas,
        targets=_pad_named(targets, sizes),
        image_ids=torch.tensor([int(target["image_id"]) for target in targets]),
        sizes=sizes,
        original_sizes=_original_sizes(targets, sizes),
        indices=torch.tensor([int(target.get("index", -1)) for target in targets]),
    )


def _canvas(n: int, height: int, width: int, *, filled: bool) -> Tensor:
    """Room for n pictures; where something is left over it must be padding."""
    canvas = torch.empty(n, 3, height, width, dtype=torch.uint8)
    if filled:
        canvas[:] = torch.tensor(PAD_COLOUR, dtype=torch.uint8)[:, None, None]
    return canvas


def _original_sizes(targets: Sequence[Mapping[str, Any]], sizes: Tensor) -> Tensor:
    sources = [target.get("original_size", size) for target, size in zip(targets, sizes, strict=True)]
    return torch.stack([torch.as_tensor(size).as_subclass(Tensor) for size in sources])


def _pad_named(targets: Sequence[Mapping[str, Any]], sizes: Tensor) -> Targets:
    """``pad_targets`` whose errors say which picture of the dataset is meant."""
    try:
        return pad_targets(targets, sizes=sizes)
    except (KeyError, ValueError) as error:
        for i, target in enumerate(targets):
            try:
                pad_targets([target])
            except (KeyError, ValueError):
                raise ValueError(
                    f"collate: targets[{i}] is that of image id {target.get('image_id')}: {error.args[0]}"
                ) from error
        raise


def _mix(seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
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
    """torch's CPU generator at ``seed`` inside, as it was afterwards.

    ``torch.manual_seed`` would also reset the generators of every GPU.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class TransformedDataset:
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
            with _seeded(int(_mix(self.seed, epoch, np.array([index]))[0] >> np.uint64(1))):
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

    Raises:
        ValueError: if an argument is out of range, or ``drop_last`` would leave no batch.

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
        self.length, self.batch_size, self.shuffle, self.seed = length, batch_size, shuffle, seed
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
        if self.shuffle:
            generator = torch.Generator().manual_seed(
                int(_mix(self.seed, self.epoch, np.array([-1]))[0] >> np.uint64(1))
            )
            order = torch.randperm(self.length, generator=generator).tolist()
        else:
            order = list(range(self.length))
        step, offset = self.batch_size * self.world_size, self.rank * self.batch_size
        batches = [order[k * step + offset : k * step + offset + self.batch_size] for k in range(full)]
        if count:
            batches.append(order[start : start + count])
        epoch = self.epoch
        return iter([[(epoch, index) for index in batch] for batch in batches[self.position :]])

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

    _fixed = ("length", "batch_size", "shuffle", "seed", "world_size", "drop_last")

    def load_state_dict(self, state: Mapping[str, int | bool]) -> None:
        """Go to where :meth:`state_dict` was taken.

        Raises:
            ValueError: if the order would not be that of the interrupted run.
        """
        for name in self._fixed:
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"EpochSampler.load_state_dict: {name} must be {state[name]}, as in the interrupted run; "
                    f"got {getattr(self, name)}. Resume with the same data, batch and number of processes."
                )
        self.epoch, self.position, self._resumed = int(state["epoch"]), int(state["position"]), True


class _Counted:
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


class Loader(_Counted, DataLoader):
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


class CachedDataset:
    """A dataset decoded and resized once, kept as one block of uint8.

    Has what the dataset has (``classes``, ``image_ids``, ``target(i)``...). Give it the part of a
    transform that is the same in every epoch (resize), and the loader the part that is not (flip).

    Args:
        dataset: what to read, once.
        transform: applied once a picture; must not be random. ``None`` changes nothing.
        path: a file to hold the block, mapped into memory, if it is larger than the memory.
        num_threads: that decode and resize side by side; 0 does it in the calling one.
        progress: show a bar, and before it starts how much memory will be taken.

    Example:
        >>> from detcore.data.scenes import Scenes
        >>> from detcore.data.transforms import square_transform
        >>> cached = CachedDataset(Scenes(8), square_transform(64, train=False), progress=False)
        >>> cached.image_size, cached.num_bytes
        ((64, 64), 98304)
    """

    def __init__(
        self,
        dataset: Any,
        transform: Transform | None = None,
        *,
        path: str | Path | None = None,
        num_threads: int = 0,
        progress: bool = True,
    ) -> None:
        self.dataset = dataset
        for name in ("name", "classes", "category_ids", "image_ids", "skipped"):
            if hasattr(dataset, name):
                setattr(self, name, getattr(dataset, name))
        self._targets: list[dict[str, Any]] = []
        self._shapes: list[tuple[int, int]] = []
        self._starts: list[int] = [0]
        self._block = self._fill(TransformedDataset(dataset, transform), path, num_threads, progress)

    def _fill(self, source: TransformedDataset, path: str | Path | None, num_threads: int, progress: bool) -> Tensor:
        first = [source[i] for i in range(min(8, len(source)))]
        expected = sum(image.numel() for image, _ in first) * len(source) // len(first)
        note = f"caching {len(source)} pictures, about {expected / 1e6:.0f} MB" + (f" in {path}" if path else "")
        bar = tqdm(total=len(source), desc=note, disable=not progress)
        block = np.empty(expected, np.uint8) if path is None else None
        with ThreadPoolExecutor(max(num_threads, 1)) as pool, open(path or "/dev/null", "wb") as file:
            # In pieces: threads that ran far ahead would hold the pictures twice.
            step = 16 * max(num_threads, 1)
            for start in range(0, len(source), step):
                indices = range(start, min(start + step, len(source)))
                for image, target in (pool.map if num_threads else map)(source.__getitem__, indices):
                    pixels = image.as_subclass(Tensor).contiguous().numpy().reshape(-1)
                    end = self._starts[-1] + pixels.size
                    if block is None:
                        file.write(pixels.tobytes())
                    else:
                        if end > block.size:  # pictures of unequal sizes, and the first were small
                            block.resize(max(end, block.size + block.size // 8), refcheck=False)
                        block[self._starts[-1] : end] = pixels
                    self._targets.append({k: v for k, v in target.items() if k != "index"})
                    self._shapes.append(tuple(image.shape[-2:]))
                    self._starts.append(end)
                    bar.update()
        bar.close()
        if block is None:
            return torch.from_numpy(np.memmap(path, np.uint8, mode="r+"))
        block.resize(self._starts[-1], refcheck=False)
        return torch.from_numpy(block)

    @property
    def num_bytes(self) -> int:
        """Memory of the pictures."""
        return self._block.numel()

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) if all pictures have one size."""
        return self._shapes[0] if len(set(self._shapes)) == 1 else None

    @property
    def images(self) -> UInt8[Tensor, "N 3 H W"]:
        """All pictures as one tensor, a view of the cache.

        Raises:
            ValueError: if they differ in size.
        """
        if self.image_size is None:
            raise ValueError(
                f"CachedDataset.images: pictures must have one size; got {len(set(self._shapes))} sizes. "
                "Cache with detcore.data.square_transform, or use make_loader."
            )
        return self._block.view(len(self), 3, *self.image_size)

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
        """The transformed sample; the picture is a view of the cache, not to be written to."""
        start, (height, width) = self._starts[index], self._shapes[index]
        pixels = self._block[start : start + 3 * height * width].view(3, height, width)
        return tv_tensors.Image(pixels), dict(self._targets[index])

    def target(self, index: int) -> dict[str, Any]:
        """The dataset's own target, before the transform."""
        return self.dataset.target(index)


class CachedLoader(_Counted):
    """Batches straight out of a cache of equal-sized pictures, on the CPU or on a GPU.

    A batch is one gather and one flip, with no work by picture, and on a GPU no copy of pixels
    from the host. Objects are padded to one number for the whole set, so every full batch has
    the same shapes.

    Args:
        cached: pictures of one size.
        batch_size: pictures a batch and process.
        shuffle: a new order each epoch.
        seed: of the order and of the flips.
        flip: probability of mirroring a picture left to right, in [0, 1].
        device: where pictures are kept and batches made; needs ``cached.num_bytes`` there.
        rank: of this process among ``world_size``.
        world_size: processes that share the data.
        drop_last: leave out the last incomplete batch; see :class:`EpochSampler`.
        multiple: height and width of a batch are multiples of it.

    Raises:
        ValueError: if pictures differ in size, or ``flip`` is not a probability.

    Example:
        >>> from detcore.data.scenes import Scenes
        >>> cached = CachedDataset(Scenes(10, size=64), progress=False)
        >>> loader = CachedLoader(cached, batch_size=4, shuffle=True, seed=0, flip=0.5)
        >>> [tuple(batch.images.shape) for batch in loader]
        [(4, 3, 64, 64), (4, 3, 64, 64), (2, 3, 64, 64)]
    """

    def __init__(
        self,
        cached: CachedDataset,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        flip: float = 0.0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        multiple: int = 32,
    ) -> None:
        if not 0 <= flip <= 1:
            raise ValueError(f"CachedLoader: flip must be a probability in [0, 1]; got {flip}.")
        images = cached.images
        height, width = images.shape[-2:]
        padded = [-(-side // multiple) * multiple for side in (height, width)]
        if padded != [height, width]:
            canvas = _canvas(len(images), *padded, filled=True)
            canvas[:, :, :height, :width] = images
            images = canvas
        sizes = torch.tensor([[height, width]]).repeat(len(cached), 1)
        targets = cached._targets
        self._all = Batch(
            images=images,
            targets=_pad_named(targets, sizes),
            image_ids=torch.tensor([int(target["image_id"]) for target in targets]),
            sizes=sizes,
            original_sizes=_original_sizes(targets, sizes),
            indices=torch.arange(len(cached)),
        ).to(device)
        self.dataset, self.flip, self.seed, self._width = cached, flip, seed, width
        self.batch_sampler = EpochSampler(
            len(cached),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        self.batch_sampler.begin()
        yield from self._count(map(self._gather, self.batch_sampler))

    def _gather(self, keys: list[tuple[int, int]]) -> Batch:
        epoch, indices = keys[0][0], np.array([index for _, index in keys])
        chance = (_mix(self.seed, epoch, indices) >> np.uint64(11)) * 2.0**-53
        device = self._all.images.device
        rows, flips = torch.from_numpy(indices).to(device), torch.from_numpy(chance < self.flip).to(device)

        def pick(value: Tensor) -> Tensor:
            return value.index_select(0, rows)

        known, width = self._all.targets, self._width
        images, boxes, valid = pick(self._all.images), pick(known.boxes), pick(known.valid)
        if self.flip > 0:
            inner = images[..., :width]  # padding stays at the right
            images[..., :width] = torch.where(flips[:, None, None, None], inner.flip(-1), inner)
            x1, y1, x2, y2 = boxes.unbind(-1)
            mirrored = torch.stack([width - x2, y1, width - x1, y2], -1)
            boxes = torch.where((flips[:, None] & valid)[..., None], mirrored, boxes)
        sizes = pick(self._all.sizes)
        return Batch(
            images=images,
            targets=Targets(boxes, pick(known.labels), valid, sizes),
            image_ids=pick(self._all.image_ids),
            sizes=sizes,
            original_sizes=pick(self._all.original_sizes),
            indices=rows,
        )
