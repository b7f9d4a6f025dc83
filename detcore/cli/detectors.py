"""Detectors out of checkpoints, data sets that fit them, and how pictures are prepared for both.

How pictures are prepared is a small dict in the checkpoint, ``pictures``: ``{"size": 128}`` for a warp
to a square, ``{"short_side": 600, "long_side": 1000}``, or neither for pictures as they are; ``multiple``,
which height and width of a batch are padded to; and the data set's ``category_ids``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torchvision.transforms import v2

from detcore.checkpoint import CheckpointError, load_checkpoint, model_weights
from detcore.cli.options import is_shown
from detcore.data import Buckets, DataError, DetectionDataset, open_dataset, size_buckets
from detcore.data.loader import CachedDataset, CachedLoader, Loader, Recoloured, make_loader
from detcore.data.sampling import Transform
from detcore.data.transforms import learn_difficult, retinanet_transform, square_transform, ssd_transform
from detcore.models import get_model

__all__: list[str] = []

Augment = Literal["flip", "ssd", "none"]
CHANGE_COLOURS = ("cuda",)
"""Kinds of devices that change the colours of a batch; elsewhere workers do it while pictures are small."""


@dataclass(frozen=True)
class Trained:
    """A detector and what it takes to use it.

    Args:
        detector: in evaluation mode, on its device.
        spec: name and options it was built with.
        classes: name of each class.
        category_ids: id of each class in the data it was trained on.
        pictures: how they are prepared; see above.
    """

    detector: nn.Module
    spec: dict[str, Any]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    pictures: dict[str, Any]


def load_detector(path: Path, overrides: Mapping[str, Any], device: torch.device) -> Trained:
    """The detector of a checkpoint, with the averaged weights if the run kept them.

    Args:
        path: the file, or a folder with ``last.pt``.
        overrides: options of the model to change, such as ``nms_iou`` or ``fusion_alpha``; not those
            that change the weights.
        device: where to.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it was not written by ``detcore train``, or ``overrides`` change the weights.
    """
    file = path / "last.pt" if path.is_dir() else path
    checkpoint = load_checkpoint(file, map_location=device)
    spec, classes = checkpoint.get("spec"), checkpoint.get("classes")
    if not spec or not classes:
        missing = "how to build the detector" if not spec else "its classes"
        raise CheckpointError(
            f"load_detector: checkpoint must say how to build the detector and name its classes; {file} does not say "
            f"{missing}. Train with detcore train, or a model of detcore.models.get_model on a data set with classes."
        )
    spec = {**spec, **overrides}
    detector = get_model(**spec).to(device).eval()
    try:
        detector.load_state_dict(model_weights(checkpoint))
    except RuntimeError as error:
        raise CheckpointError(
            f"load_detector: KEY=VALUE must not change the weights; got {dict(overrides)} for {file}. "
            f"torch says: {' '.join(str(error).split())[:300]}"
        ) from error
    pictures = dict(checkpoint.get("pictures") or {})
    category_ids = tuple(pictures.pop("category_ids", range(len(classes))))
    return Trained(detector, spec, tuple(classes), category_ids, pictures)


def open_split(
    data: str, split: str, *, classes: Sequence[str] | None, skip_bad: bool, only_with_objects: bool
) -> DetectionDataset:
    """A split of a data set with at least one picture, restricted to ``classes`` where it has others too.

    Raises:
        DataError: if it has no such picture, or lacks a class.
    """
    is_scenes = data.partition(":")[0] == "scenes"
    wanted = None if is_scenes else classes
    if is_scenes and only_with_objects:
        raise ValueError("detcore: --only-with-objects is for pictures from files; scenes has empty ones on purpose.")
    dataset = open_dataset(data, split, skip_bad, wanted, only_with_objects=only_with_objects)
    if is_scenes and classes is not None and tuple(classes) != dataset.classes:
        raise DataError(
            f"detcore: classes must be those of scenes, {', '.join(dataset.classes)}; got {', '.join(classes)}."
        )
    if not len(dataset):
        hint = " All were left out as bad." if dataset.skipped else ""
        raise DataError(f"detcore: {data} must have a picture to {split} with; got none.{hint}")
    return dataset


def announce(dataset: DetectionDataset, role: str = "data") -> None:
    """Say what was opened, and what was left out of it."""
    left_out = f", {len(dataset.skipped)} faults left out" if dataset.skipped else ""
    # At once: a log file would show it only when the run is over.
    print(f"{role}: {dataset.name}, {len(dataset)} pictures, {len(dataset.classes)} classes{left_out}", flush=True)
    for message in dataset.skipped[:10]:
        print(f"  {message}", flush=True)


def choose_pictures(
    model: str,
    backbone: str | None,
    options: Mapping[str, Any],
    *,
    size: int | None,
    short_side: int | None,
    long_side: int | None,
    as_they_are: bool,
) -> dict[str, Any]:
    """How pictures are to be prepared for training; see above.

    Args:
        model: name of the model.
        backbone: its trunk; ``None`` for the model's own.
        options: of the model.
        size: what was asked for, if anything, as are the next two.
        short_side: see there.
        long_side: see there.
        as_they_are: whether pictures are left alone where nothing was asked for and the model takes any size.

    Raises:
        ValueError: if the model takes squares of one size only, and another was asked for.
    """
    with torch.device("meta"):  # no memory, no arithmetic
        detector: Any = get_model(model, num_classes=1, backbone=backbone, **options)
    side = detector.inputs.warp_side
    if side is not None:
        if short_side is not None or size not in (None, side):
            asked = f"--size {size}" if short_side is None else f"--short-side {short_side}"
            raise ValueError(
                f"detcore: {model} takes squares of {side} pixels; got {asked}. Leave it out, or take "
                "--backbone tiny, which has no size of its own."
            )
        return {"size": side, "multiple": 1}
    if short_side is None and not as_they_are and size is None:
        size = getattr(getattr(detector.priors, "layout", None), "size", None)  # its default boxes were made for it
    if size is not None:
        return {"size": size}
    if short_side is None and as_they_are:
        return {}
    short_side = short_side or 800
    return {"short_side": short_side, "long_side": long_side or round(short_side * 1333 / 800)}


def transform_for(
    pictures: Mapping[str, Any], *, augment: Augment = "none", difficult: bool = False, colours: bool = True
) -> Transform | None:
    """How pictures are prepared, and changed at random in training; ``None`` leaves them as they are.

    Args:
        pictures: see above.
        augment: mirror, SSD's recipe (with ``size`` only), or nothing at random.
        difficult: objects marked difficult are to be learnt too.
        colours: whether SSD's recipe changes them here, or somebody else does later.
    """
    prepare: Transform | None = None
    if augment == "ssd":
        prepare = ssd_transform(pictures["size"], train=True, colours=colours)
    elif "size" in pictures:
        prepare = square_transform(pictures["size"], train=augment == "flip")
    elif "short_side" in pictures:
        prepare = retinanet_transform(pictures["short_side"], pictures["long_side"], train=augment == "flip")
    if not difficult:
        return prepare
    return learn_difficult if prepare is None else v2.Compose([prepare, learn_difficult])


def has_one_size(pictures: Mapping[str, Any]) -> bool:
    """Whether all pictures come out with one size, so that they can be cached."""
    return "short_side" not in pictures


def buckets_for(dataset: DetectionDataset, pictures: Mapping[str, Any]) -> Buckets | None:
    """The sizes of batches, where pictures come out with several."""
    if has_one_size(pictures):
        return None
    short, long = pictures["short_side"], pictures["long_side"]
    return size_buckets(dataset, short, long, multiple=pictures.get("multiple", 32))


def loader_to_train(
    dataset: DetectionDataset,
    pictures: Mapping[str, Any],
    *,
    augment: Augment,
    difficult: bool,
    device: torch.device,
    seed: int,
    **options: Any,
) -> Loader | Recoloured:
    """Batches of pictures decoded and changed anew each epoch; ``options`` as for :func:`make_loader`."""
    later = augment == "ssd" and device.type in CHANGE_COLOURS
    transform = transform_for(pictures, augment=augment, difficult=difficult, colours=not later)
    options |= {"seed": seed, "multiple": pictures.get("multiple", 32)}
    loader = make_loader(dataset, transform, buckets=buckets_for(dataset, pictures), **options)
    return Recoloured(loader, device=device, seed=seed) if later else loader


def loader_to_test(
    dataset: DetectionDataset, pictures: Mapping[str, Any], *, batch_size: int, workers: int, in_order: bool = True
) -> Loader:
    """Batches to detect on, each picture once: in order, or with pictures of like shape in a batch."""
    return make_loader(
        dataset, transform_for(pictures), batch_size=batch_size, shuffle=False, num_workers=workers,
        multiple=pictures.get("multiple", 32), buckets=None if in_order else buckets_for(dataset, pictures),
    )  # fmt: skip


def cached_loader(
    dataset: DetectionDataset,
    pictures: Mapping[str, Any],
    *,
    threads: int,
    difficult: bool = False,
    **options: Any,
) -> CachedLoader:
    """The same out of a cache, for data that is looked at many times; ``options`` as for :class:`CachedLoader`."""
    transform = transform_for(pictures, difficult=difficult)
    cached = CachedDataset(dataset, transform, num_threads=threads, progress=is_shown())
    return CachedLoader(cached, multiple=pictures.get("multiple", 32), **options)
