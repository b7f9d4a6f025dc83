"""The batched values that travel between the parts of a detector.

Lists of dicts exist only at the two outer doors, as in torchvision; inside, a batch is a
handful of padded tensors with a ``valid`` mask, so nothing loops over images.
Letters: B images, M objects (padded), N priors, K logit channels, D detections.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "BACKGROUND",
    "IGNORE",
    "Assignment",
    "Detections",
    "Predictions",
    "Priors",
    "Targets",
    "joint_total",
    "pad_targets",
    "to_dicts",
]

BACKGROUND = -1
"""Label of a prior that no object owns."""

IGNORE = -2
"""Label of a prior that takes part in no loss."""


@dataclass(frozen=True)
class _Movable:
    """``.to(device)`` for a frozen dataclass of tensors."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False):
        """The same value with every tensor on ``device``; floating types are kept."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {n: v.to(device, non_blocking=non_blocking) for n, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Targets(_Movable):
    """The objects of a batch, padded to the same number for every image.

    Args:
        boxes: corners (x1, y1, x2, y2) in pixels of the batched image; padded slots hold zeros.
        labels: class index 0..C-1; padded slots hold ``BACKGROUND``.
        valid: true where a slot holds an object.
        sizes: (height, width) in pixels of each image inside the padded batch; ``None`` if every
            image fills it. Priors in the padding beyond an image are then ignored.
    """

    boxes: Float[Tensor, "B M 4"]
    labels: Int[Tensor, "B M"]
    valid: Bool[Tensor, "B M"]
    sizes: Int[Tensor, "B 2"] | None = None


@dataclass(frozen=True)
class Priors(_Movable):
    """Where predictions are made from: anchors, default boxes or points.

    Args:
        boxes: corners in pixels; leading size 1 when every image has the same priors. A point is
            a square of side = its stride around it.
        counts: how many priors each feature level has, in order; plain numbers, known without asking the device.
        cells: (x, y) in pixels at which the cell of each prior begins. A cell that begins beyond an
            image exists only because the batch holds a larger one. ``None``: every image has all.
        maps: (rows, columns) of each level's map, where priors come row by row and cell by cell; else ``None``.
    """

    boxes: Float[Tensor, "#B N 4"]
    counts: tuple[int, ...]
    cells: Float[Tensor, "N 2"] | None = None
    maps: tuple[tuple[int, int], ...] | None = None

    @property
    def level(self) -> Int[Tensor, " N"]:
        """Index of the feature level each prior belongs to."""
        return torch.cat([torch.full((n,), i, device=self.boxes.device) for i, n in enumerate(self.counts)])


@dataclass(frozen=True)
class Predictions:
    """What a head says about every prior.

    Args:
        logits: class scores before the sigmoid (K = C) or softmax (K = C + 1, background last).
        deltas: encoded boxes, relative to ``priors``.
        boxes: ``deltas`` decoded to corners in pixels, float32, not clipped.
        priors: what ``deltas`` are relative to.
        extras: further maps by name, (B, N, n) each: ``iou``, ``confidence``, ``centerness``...
        aside: what parts of the body say that is about no prior; only terms that know it read it.
    """

    logits: Float[Tensor, "B N K"]
    deltas: Float[Tensor, "B N 4"]
    boxes: Float[Tensor, "B N 4"]
    priors: Priors
    extras: dict[str, Tensor] = field(default_factory=dict)
    aside: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Assignment:
    """Which object, if any, each prior has to predict.

    Args:
        labels: class of the object, or ``BACKGROUND``, or ``IGNORE``.
        index: slot of the object in ``targets``; 0 where the prior is not positive.
        boxes: the object's corners in pixels; where there is none the prior's own, so that all stays finite.
        iou: IoU of the prior (not of the prediction) with that object, in [0, 1]; 0 where there is none.
        targets: the objects the priors were matched with.
    """

    labels: Int[Tensor, "B N"]
    index: Int[Tensor, "B N"]
    boxes: Float[Tensor, "B N 4"]
    iou: Float[Tensor, "B N"]
    targets: Targets

    @property
    def positive(self) -> Bool[Tensor, "B N"]:
        """Priors that own an object."""
        return self.labels >= 0

    @property
    def negative(self) -> Bool[Tensor, "B N"]:
        """Priors that must answer "nothing here"."""
        return self.labels == BACKGROUND

    @property
    def ignored(self) -> Bool[Tensor, "B N"]:
        """Priors that take part in no loss."""
        return self.labels == IGNORE

    @property
    def num_positive(self) -> Float[Tensor, ""]:
        """Positives in the batch, at least 1: the losses' normaliser, see :func:`joint_total`."""
        return joint_total(self.positive.sum().float(), least=1.0)


def joint_total(total: Float[Tensor, ""], *, least: float) -> Float[Tensor, ""]:
    """What a sum over the batch is divided by: ``total``, at least ``least``. Stays on the device.

    Under data parallelism it is the joint total, at least ``least``, shared out over the workers, so
    that averaged gradients equal those of one worker with the joint batch.

    Example:
        >>> joint_total(torch.tensor(0.0), least=1.0)
        tensor(1.)
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        total = total.clone()
        dist.all_reduce(total)
        return total.clamp(min=least) / dist.get_world_size()
    return total.clamp(min=least)


@dataclass(frozen=True)
class Detections(_Movable):
    """What a detector found, best first, padded to the same number for every image.

    Args:
        boxes: corners in pixels of the image.
        scores: what they were ranked by, in [0, 1], descending; zeros in padded slots.
        labels: class index; ``BACKGROUND`` in padded slots.
        valid: true where a slot holds a detection.
        class_scores: class probability alone, in [0, 1].
        quality: predicted localisation quality, in [0, 1]; ``None`` if the detector has none.
        prior: index of the prior that made the detection.
    """

    boxes: Float[Tensor, "B D 4"]
    scores: Float[Tensor, "B D"]
    labels: Int[Tensor, "B D"]
    valid: Bool[Tensor, "B D"]
    class_scores: Float[Tensor, "B D"] | None = None
    quality: Float[Tensor, "B D"] | None = None
    prior: Int[Tensor, "B D"] | None = None


def pad_targets(
    targets: Sequence[Mapping[str, Tensor]],
    *,
    multiple: int = 8,
    num_classes: int | None = None,
    sizes: Int[Tensor, "B 2"] | None = None,
) -> Targets:
    """Stack torchvision-style targets into one padded batch, checking them on the way.

    This is the door: everything behind it may assume sound boxes and labels. M is a multiple
    of ``multiple`` (at least one slot) so that few different shapes reach a compiled step.

    Args:
        targets: one mapping an image, with ``boxes`` (n, 4) corners in pixels and ``labels`` (n,)
            in 0..C-1; n may be 0. Objects flagged in an optional ``ignore`` or ``iscrowd`` are
            left out: crowds and difficult objects are not trained on.
        multiple: M is rounded up to a multiple of this, >= 1.
        num_classes: if given, labels must be below it.
        sizes: (height, width) in pixels of each image inside the batch, kept as
            :attr:`Targets.sizes`.

    Raises:
        KeyError: if a target lacks ``boxes`` or ``labels``.
        ValueError: if shapes disagree, a box is not finite or not x1 < x2 and y1 < y2, or a
            label is out of range; the message names image, row and value.

    Example:
        >>> car = {"boxes": torch.tensor([[4.0, 2.0, 9.0, 8.0]]), "labels": torch.tensor([1])}
        >>> empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
        >>> batch = pad_targets([car, empty])
        >>> tuple(batch.boxes.shape), batch.valid.sum(1).tolist()
        ((2, 8, 4), [1, 0])
    """
    if multiple < 1:
        raise ValueError(f"pad_targets: multiple must be >= 1; got {multiple}.")
    if not targets:
        raise ValueError("pad_targets: targets must hold one mapping an image; got an empty sequence.")
    kept = [_checked(i, target, num_classes) for i, target in enumerate(targets)]
    most = max(len(boxes) for boxes, _ in kept)
    slots = max(1, -(-most // multiple)) * multiple
    device = kept[0][0].device
    padded_boxes = torch.zeros(len(kept), slots, 4, device=device)
    padded_labels = torch.full((len(kept), slots), BACKGROUND, dtype=torch.int64, device=device)
    valid = torch.zeros(len(kept), slots, dtype=torch.bool, device=device)
    for i, (boxes, labels) in enumerate(kept):  # at the door, once a batch: the lists end here
        padded_boxes[i, : len(boxes)] = boxes
        padded_labels[i, : len(boxes)] = labels
        valid[i, : len(boxes)] = True
    return Targets(padded_boxes, padded_labels, valid, sizes)


def _checked(i: int, target: Mapping[str, Tensor], num_classes: int | None) -> tuple[Tensor, Tensor]:
    for key in ("boxes", "labels"):
        if key not in target:
            raise KeyError(f'pad_targets: targets[{i}] must have the key "{key}"; got {sorted(target)}.')
    boxes = torch.as_tensor(target["boxes"]).as_subclass(Tensor).float()
    labels = torch.as_tensor(target["labels"]).as_subclass(Tensor).long()
    where = f'pad_targets: targets[{i}]["boxes"]'
    if boxes.ndim != 2 or boxes.shape[-1] != 4:
        hint = " An image without objects needs torch.zeros(0, 4)." if boxes.numel() == 0 else ""
        raise ValueError(f"{where} must have shape (n, 4); got {tuple(boxes.shape)}.{hint}")
    if labels.shape != boxes.shape[:1]:
        wanted = f'targets[{i}]["labels"] must have shape ({len(boxes)},), one label a box'
        raise ValueError(f"pad_targets: {wanted}; got {tuple(labels.shape)}.")
    keep = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    for key in ("ignore", "iscrowd"):
        if key in target:
            flag = torch.as_tensor(target[key], device=boxes.device).as_subclass(Tensor)
            if flag.shape != labels.shape:
                raise ValueError(
                    f'pad_targets: targets[{i}]["{key}"] must have shape ({len(boxes)},); got {tuple(flag.shape)}.'
                )
            keep &= ~flag.bool()
    boxes, labels = boxes[keep], labels[keep]
    wrong = ~((boxes[:, 2:] > boxes[:, :2]).all(1) & boxes.isfinite().all(1))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{where} must be finite xyxy with x1 < x2 and y1 < y2; got "
            f"{[round(v, 3) for v in boxes[row].tolist()]} in row {int(keep.nonzero()[row])}. "
            "Drop empty boxes with detcore.data.drop_empty."
        )
    out = (labels < 0) | (labels >= (num_classes if num_classes is not None else torch.iinfo(torch.int64).max))
    if out.any():
        row = int(out.nonzero()[0])
        limit = "" if num_classes is None else f" and < num_classes = {num_classes}"
        raise ValueError(
            f'pad_targets: targets[{i}]["labels"] must be >= 0{limit}; got {int(labels[row])} in row '
            f"{int(keep.nonzero()[row])}. Labels count from 0 and background has none: subtract 1 from "
            "torchvision's, or map dataset ids with the dataset's category_ids."
        )
    return boxes, labels


def to_dicts(detections: Detections) -> list[dict[str, Tensor]]:
    """Detections as torchvision gives them: one dict an image, no padding.

    Returns:
        ``boxes`` (d, 4), ``scores`` (d,), ``labels`` (d,) a dict, best first, and ``class_scores``
        and ``quality`` (d,) where the detector has them.

    Example:
        >>> found = Detections(
        ...     torch.zeros(1, 2, 4), torch.tensor([[0.9, 0.0]]), torch.tensor([[3, -1]]), torch.tensor([[True, False]])
        ... )
        >>> to_dicts(found)[0]["labels"].tolist()
        [3]
    """
    names = ["boxes", "scores", "labels", "class_scores", "quality"]
    present = [(n, v) for n in names if (v := getattr(detections, n)) is not None]
    return [{n: v[i][keep] for n, v in present} for i, keep in enumerate(detections.valid)]
