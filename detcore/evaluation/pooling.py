"""Lists of dicts pooled into flat arrays.

Every measure starts here. :func:`pool_detections` and :func:`pool_targets` are the outer door:
they check what they are given, once, and lay all images end to end, so that nothing behind
them loops over images or boxes. Letters: D detections, M objects, all of them pooled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "PooledDetections",
    "PooledTargets",
    "join",
    "pool_detections",
    "pool_targets",
]

SCORE_KINDS = ("scores", "class_scores", "quality")


@dataclass(frozen=True)
class PooledDetections:
    """The detections of all images, end to end, in the order they were given.

    Args:
        image: position of the detection's image in the list, ascending.
        boxes: corners in pixels of the image.
        labels: class index 0..C-1.
        scores: what the detector ranked by.
        class_scores: class probability alone; ``None`` if the detector gives none.
        quality: predicted localisation quality; ``None`` if the detector gives none.
        num_images: length of the list, images without detections included.
    """

    image: Int[np.ndarray, " D"]
    boxes: Float[np.ndarray, "D 4"]
    labels: Int[np.ndarray, " D"]
    scores: Float[np.ndarray, " D"]
    class_scores: Float[np.ndarray, " D"] | None
    quality: Float[np.ndarray, " D"] | None
    num_images: int

    def score_kinds(self) -> dict[str, Float[np.ndarray, " D"]]:
        """The kinds of score there are, by their key in the dicts; ``"scores"`` is always one."""
        return {kind: value for kind in SCORE_KINDS if (value := getattr(self, kind)) is not None}


@dataclass(frozen=True)
class PooledTargets:
    """The objects of all images, end to end, in the order they were given.

    Args:
        image: position of the object's image in the list, ascending.
        boxes: corners in pixels of the image.
        labels: class index 0..C-1.
        area: square pixels, by which COCO calls an object small, medium or large.
        crowd: true where a box encloses many objects that nobody separated.
        ignore: true where finding the object is neither rewarded nor punished: crowds, and
            the objects that PASCAL VOC calls difficult.
        num_images: length of the list, images without objects included.
    """

    image: Int[np.ndarray, " M"]
    boxes: Float[np.ndarray, "M 4"]
    labels: Int[np.ndarray, " M"]
    area: Float[np.ndarray, " M"]
    crowd: Bool[np.ndarray, " M"]
    ignore: Bool[np.ndarray, " M"]
    num_images: int


_Pooled = TypeVar("_Pooled", PooledDetections, PooledTargets)


def pool_detections(
    detections: Sequence[Mapping[str, Any]], *, num_classes: int | None = None, caller: str = "pool_detections"
) -> PooledDetections:
    """Check the detections of every image and lay them end to end.

    Args:
        detections: one mapping an image, with ``boxes`` (n, 4) corners in pixels, ``scores`` (n,)
            and ``labels`` (n,) in 0..C-1; n may be 0. ``class_scores`` and ``quality`` (n,) are
            taken along if every image has them. Tensors on any device, arrays or lists.
        num_classes: if given, labels must be below it.
        caller: name that error messages begin with.

    Returns:
        The arrays, float64.

    Raises:
        KeyError: if a mapping lacks a key.
        ValueError: if shapes disagree, a value is not finite, a box is inverted, or a label is
            out of range; the message names image and row.

    Example:
        >>> one = {"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "scores": [0.5], "labels": [2]}
        >>> none = {"boxes": torch.zeros(0, 4), "scores": [], "labels": []}
        >>> pooled = pool_detections([none, one])
        >>> pooled.image.tolist(), pooled.num_images
        ([1], 2)
    """
    counts = _door(detections, "detections", ("boxes", "scores", "labels"), num_classes, caller)
    columns = {}
    for kind in SCORE_KINDS:
        have = [kind in entry for entry in detections]
        if any(have) and not all(have):
            raise ValueError(
                f'{caller}: detections must have the key "{kind}" in every image or in none; '
                f"got none in detections[{have.index(False)}]."
            )
        columns[kind] = _column(detections, "detections", kind, counts, caller) if all(have) and have else None
    image, boxes, labels = _common(detections, "detections", counts)
    scores = columns["scores"] if columns["scores"] is not None else np.zeros(0)
    return PooledDetections(image, boxes, labels, scores, columns["class_scores"], columns["quality"], len(detections))


def pool_targets(
    targets: Sequence[Mapping[str, Any]], *, num_classes: int | None = None, caller: str = "pool_targets"
) -> PooledTargets:
    """Check the objects of every image and lay them end to end.

    Args:
        targets: one mapping an image, with ``boxes`` (n, 4) corners in pixels and ``labels`` (n,)
            in 0..C-1; n may be 0. Optional, of n each: ``area`` in square pixels (else the box's
            own), ``iscrowd`` and ``ignore`` (else false). A crowd is ignored, said or not.
        num_classes: if given, labels must be below it.
        caller: name that error messages begin with.

    Returns:
        The arrays, float64.

    Raises:
        KeyError: if a mapping lacks a key.
        ValueError: if shapes disagree, a value is not finite, a box is inverted, or a label is
            out of range; the message names image and row.

    Example:
        >>> dog = {"boxes": torch.tensor([[0.0, 0.0, 4.0, 5.0]]), "labels": torch.tensor([7])}
        >>> pool_targets([dog]).area.tolist()
        [20.0]
    """
    counts = _door(targets, "targets", ("boxes", "labels"), num_classes, caller)
    image, boxes, labels = _common(targets, "targets", counts)
    own_area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    area = _column(targets, "targets", "area", counts, caller, default=own_area)
    none = np.zeros(len(image))
    crowd = _column(targets, "targets", "iscrowd", counts, caller, default=none) != 0
    ignore = crowd | (_column(targets, "targets", "ignore", counts, caller, default=none) != 0)
    return PooledTargets(image, boxes, labels, area, crowd, ignore, len(targets))


def join(parts: Sequence[_Pooled]) -> _Pooled:
    """Several pooled lists as one; their images are counted on. What one lacks, the whole lacks.

    Example:
        >>> part = pool_detections([{"boxes": [[0, 0, 1, 1]], "labels": [0], "scores": [0.5]}])
        >>> join([part, part]).image.tolist()
        [0, 1]
    """
    num_images = [part.num_images for part in parts]
    columns = {}
    for field in fields(parts[0]):
        values = [getattr(part, field.name) for part in parts]
        columns[field.name] = None if any(v is None for v in values) else values
    offsets = np.cumsum([0, *num_images[:-1]])
    columns["image"] = [image + offset for image, offset in zip(columns["image"], offsets, strict=True)]
    del columns["num_images"]
    joined: dict[str, Any] = {
        name: None if values is None else np.concatenate(values) for name, values in columns.items()
    }
    return type(parts[0])(**joined, num_images=sum(num_images))


def xywh(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
    """Corners to COCO's (x, y, width, height), x and y of the upper left corner."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def check_num_classes(num_classes: int, *, caller: str) -> int:
    """The number itself, or ``ValueError`` if there is no class."""
    if num_classes < 1:
        raise ValueError(f"{caller}: num_classes must be >= 1; got {num_classes}.")
    return num_classes


def check_thresholds(thresholds: float | Sequence[float], *, caller: str) -> tuple[float, ...]:
    """IoU thresholds as an ascending tuple, or ``ValueError``."""
    values = tuple(np.atleast_1d(np.asarray(thresholds, dtype=np.float64)).tolist())
    if not values or any(not 0 < t <= 1 for t in values) or any(b - a < 1e-6 for a, b in pairwise(values)):
        raise ValueError(f"{caller}: IoU thresholds must be ascending numbers in (0, 1]; got {list(values)}.")
    return values


def mean_present(values: Float[np.ndarray, "..."]) -> float:
    """Mean of what is not nan; nan if nothing is."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")


def check_same_images(detections: PooledDetections, targets: PooledTargets, *, caller: str) -> None:
    """Raise ``ValueError`` unless both lists hold the same number of images."""
    if detections.num_images != targets.num_images:
        raise ValueError(
            f"{caller}: detections and targets must hold one mapping an image, in the same order; got "
            f"{detections.num_images} and {targets.num_images}. An image without boxes needs empty ones."
        )


def _door(
    entries: Sequence[Mapping[str, Any]], name: str, keys: tuple[str, ...], num_classes: int | None, caller: str
) -> list[int]:
    """Check boxes and labels of every image; the number of boxes in each."""
    counts = []
    for i, entry in enumerate(entries):
        for key in keys:
            if key not in entry:
                raise KeyError(f'{caller}: {name}[{i}] must have the key "{key}"; got {sorted(entry)}.')
        where = f'{caller}: {name}[{i}]["boxes"]'
        boxes = _array(entry["boxes"])
        if boxes.ndim != 2 or boxes.shape[-1] != 4:
            hint = " An image without boxes needs torch.zeros(0, 4)." if boxes.size == 0 else ""
            raise ValueError(f"{where} must have shape (n, 4); got {boxes.shape}.{hint}")
        wrong = ~(np.isfinite(boxes).all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1))
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"{where} must be finite xyxy with x1 <= x2 and y1 <= y2; got "
                f"{[round(v, 3) for v in boxes[row].tolist()]} in row {row}. Convert xywh boxes first."
            )
        labels = _array(entry["labels"])
        if labels.shape != boxes.shape[:1]:
            raise ValueError(
                f'{caller}: {name}[{i}]["labels"] must have shape ({len(boxes)},), one label a box; got {labels.shape}.'
            )
        out = (labels < 0) | (labels >= (np.inf if num_classes is None else num_classes)) | (labels != labels.round())
        if out.any():
            row = int(np.flatnonzero(out)[0])
            limit = "" if num_classes is None else f" and < num_classes = {num_classes}"
            raise ValueError(
                f'{caller}: {name}[{i}]["labels"] must be whole, >= 0{limit}; got {labels[row]:g} in row {row}. '
                "Labels count from 0 and background has none: subtract 1 from torchvision's."
            )
        counts.append(len(boxes))
    return counts


def _common(entries: Sequence[Mapping[str, Any]], name: str, counts: list[int]) -> tuple[np.ndarray, ...]:
    image = np.repeat(np.arange(len(entries)), counts)
    boxes = np.concatenate([np.zeros((0, 4)), *(_array(entry["boxes"]) for entry in entries)])
    labels = np.concatenate([np.zeros(0), *(_array(entry["labels"]) for entry in entries)]).astype(np.int64)
    assert len(boxes) == len(labels) == len(image), name
    return image, boxes, labels


def _column(
    entries: Sequence[Mapping[str, Any]],
    name: str,
    key: str,
    counts: list[int],
    caller: str,
    default: np.ndarray | None = None,
) -> np.ndarray:
    """One number a box, end to end; images without the key take theirs from ``default``."""
    parts = [np.zeros(0)]
    offsets = np.cumsum([0, *counts])
    for i, (entry, count) in enumerate(zip(entries, counts, strict=True)):
        if default is not None and key not in entry:
            parts.append(default[offsets[i] : offsets[i + 1]])
            continue
        values = _array(entry[key])
        if values.shape != (count,):
            raise ValueError(
                f'{caller}: {name}[{i}]["{key}"] must have shape ({count},), one a box; got {values.shape}.'
            )
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f'{caller}: {name}[{i}]["{key}"] must be finite; got {values[row]} in row {row}.')
        parts.append(values)
    return np.concatenate(parts)


def _array(values: Any) -> np.ndarray:
    """Tensors (any device and type, tv_tensors too), arrays and lists as float64 on the host."""
    if isinstance(values, Tensor):
        return values.detach().as_subclass(Tensor).to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)
