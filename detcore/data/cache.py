"""Decode and resize once: a data set as one block of uint8, and batches straight out of it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor
from torchvision import tv_tensors
from tqdm import tqdm

from detcore.data.batch import Batch, empty_canvas, pad_named, stack_original_sizes
from detcore.data.sampling import Counted, EpochSampler, Transform, TransformedDataset, mix
from detcore.structures import Targets

__all__ = ["CachedDataset", "CachedLoader"]


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
        first = [source[i][0] for i in range(min(8, len(source)))]
        expected = sum(image.numel() for image in first) * len(source) // len(first)
        where = "memory" if path is None else str(path)
        note = f"caching {len(source)} pictures, about {expected / 1e6:.0f} MB in {where}"
        with tqdm(total=len(source), desc=note, disable=not progress) as bar:
            block = _Block(expected) if path is None else _File(path)
            for image, target in _side_by_side(source, num_threads):
                block.append(image.as_subclass(Tensor).contiguous().numpy().reshape(-1))
                self._targets.append({k: v for k, v in target.items() if k != "index"})
                self._shapes.append(tuple(image.shape[-2:]))
                self._starts.append(self._starts[-1] + image.numel())
                bar.update()
            return torch.from_numpy(block.finish())

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


def _side_by_side(source: TransformedDataset, num_threads: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The samples in order, each made once, by ``num_threads`` threads."""
    if num_threads == 0:
        yield from map(source.__getitem__, range(len(source)))
        return
    # In pieces: threads that ran far ahead would hold all pictures a second time.
    step = 16 * num_threads
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, len(source), step):
            yield from pool.map(source.__getitem__, range(start, min(start + step, len(source))))


class _Block:
    """Pixels one after another in memory; grows if pictures are larger than the first ones."""

    def __init__(self, expected: int) -> None:
        self._pixels, self._end = np.empty(expected, np.uint8), 0

    def append(self, pixels: np.ndarray) -> None:
        end = self._end + pixels.size
        if end > self._pixels.size:
            self._pixels.resize(max(end, self._pixels.size + self._pixels.size // 8), refcheck=False)
        self._pixels[self._end : end] = pixels
        self._end = end

    def finish(self) -> np.ndarray:
        self._pixels.resize(self._end, refcheck=False)
        return self._pixels


class _File:
    """The same in a file, mapped into memory at the end."""

    def __init__(self, path: str | Path) -> None:
        self._path, self._file = path, open(path, "wb")  # noqa: SIM115 - finish closes it

    def append(self, pixels: np.ndarray) -> None:
        self._file.write(pixels.tobytes())

    def finish(self) -> np.ndarray:
        self._file.close()
        # Writable, or torch would warn; nobody writes.
        return np.memmap(self._path, np.uint8, mode="r+")


class CachedLoader(Counted):
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
            canvas = empty_canvas(len(images), *padded, filled=True)
            canvas[:, :, :height, :width] = images
            images = canvas
        sizes = torch.tensor([[height, width]]).repeat(len(cached), 1)
        targets = cached._targets
        self._all = Batch(
            images=images,
            targets=pad_named(targets, sizes),
            image_ids=torch.tensor([int(target["image_id"]) for target in targets]),
            sizes=sizes,
            original_sizes=stack_original_sizes(targets, sizes),
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
        yield from self._count(self._batches())

    def _batches(self) -> Iterator[Batch]:
        batches = list(self.batch_sampler)
        if not batches:  # resumed at the very end of an epoch
            return
        epoch, indices = batches[0][0][0], np.array([index for batch in batches for _, index in batch])
        chance = (mix(self.seed, epoch, indices) >> np.uint64(11)) * 2.0**-53
        # One copy to the device an epoch: one a batch would make the host wait for the GPU each time.
        on_host, device = torch.from_numpy(indices), self._all.images.device
        rows, flips = on_host.to(device), torch.from_numpy(chance < self.flip).to(device)
        counts = [len(batch) for batch in batches]
        yield from map(self._gather, on_host.split(counts), rows.split(counts), flips.split(counts))

    def _gather(self, indices: Int[Tensor, " B"], rows: Int[Tensor, " B"], flips: Bool[Tensor, " B"]) -> Batch:
        """The batch of pictures ``rows``; ``indices`` are the same numbers on the host."""

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
            image_ids=self._all.image_ids[indices],
            sizes=sizes,
            original_sizes=self._all.original_sizes[indices],
            indices=indices,
        )
