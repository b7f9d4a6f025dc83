"""Raw outputs of a trained detector in a small file, to be scored, suppressed and evaluated again and again.

Training takes minutes, a new score takes none: whoever asks what an exponent or a threshold does needs
what the head said, once. A file holds that for the held-out pictures, without what no threshold in
use lets through, and goes through the same :mod:`detcore.scoring` and :mod:`detcore.postprocess` as the
detector itself.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from detcore.boxes import clip_boxes
from detcore.postprocess import Selector
from detcore.scoring import Scorer
from detcore.structures import Predictions, Priors, to_dicts

__all__ = ["StoredOutputs", "load_outputs", "prune", "save_outputs"]

_STEPS = 1 << 16
_LOGIT_RANGE = 32.0  # logits are stored in steps of 1/1024 in [-32, 32)
_PER_PIXEL = 128  # boxes in 1/128 of a pixel, coarser in pictures of 512 pixels and more


@dataclass(frozen=True)
class StoredOutputs:
    """What a detector said about pictures, and what is really in them.

    Args:
        pred: raw outputs of every prior that is left; a slot that pads a picture has no class and no box.
        sizes: (height, width) in pixels of each picture.
        targets: ``boxes``, ``labels`` and ``ignore`` of each picture.
        about: where the outputs came from, as JSON types.
    """

    pred: Predictions
    sizes: Int[Tensor, "B 2"]
    targets: Sequence[Mapping[str, Any]]
    about: Mapping[str, Any]

    def detect(self, score: Scorer, select: Selector) -> list[dict[str, Tensor]]:
        """What the detector would find with another score and another selection, best first.

        Args:
            score: such as a ``functools.partial`` of :func:`detcore.scoring.fused_score`.
            select: such as a ``functools.partial`` of :func:`detcore.postprocess.select_by_prior`.

        Returns:
            One dict a picture, as :func:`detcore.structures.to_dicts` makes them.
        """
        return to_dicts(select(score(self.pred), self.pred, self.sizes))


def prune(pred: Predictions, floor: float) -> Predictions:
    """Only the priors with a class above a probability, and of these only such classes.

    Nothing changes for a selection whose threshold lets no pair at or below ``floor`` through. With a
    fused score :math:`p^u q^v` and threshold :math:`t` that is certain if ``floor`` is at most
    :math:`t^{1/u}`, for :math:`q` is at most 1.

    Args:
        pred: of any detector whose classes are sigmoids.
        floor: class probability, in [0, 1).

    Returns:
        As many slots a level as the fullest picture needs, in the order of the priors. What is left out,
        pair or slot, has a logit of minus infinity in every map.

    Raises:
        ValueError: if ``floor`` is outside [0, 1).

    Example:
        >>> boxes = torch.tensor([[[0.0, 0, 4, 4], [2.0, 2, 6, 6], [0.0, 0, 9, 9]]])
        >>> logits = torch.tensor([[[-9.0, -9.0], [2.0, -9.0], [-9.0, 1.0]]])
        >>> left = prune(Predictions(logits, torch.zeros(1, 3, 4), boxes, Priors(boxes, (2, 1))), 0.01)
        >>> left.priors.counts, left.logits.tolist()
        ((1, 1), [[[2.0, -inf], [-inf, 1.0]]])
    """
    if not 0 <= floor < 1:
        raise ValueError(f"prune: floor must be in [0, 1); got {floor}.")
    likely = pred.logits.sigmoid() > floor
    rows, counts, start = [], [], 0
    for level in likely.any(dim=-1).split(pred.priors.counts, dim=1):
        counts.append(int(level.sum(dim=1).max()))
        rows.append(start + level.byte().argsort(dim=1, descending=True, stable=True)[:, : counts[-1]])
        start += level.shape[1]
    row = torch.cat(rows, dim=1)

    def taken(values: Tensor) -> Tensor:
        values = values.expand(len(row), -1, -1)
        return values.gather(1, row[..., None].expand(-1, -1, values.shape[-1]))

    left = taken(likely)
    used = left.any(dim=-1, keepdim=True)
    return Predictions(
        logits=torch.where(left, taken(pred.logits), -math.inf),
        deltas=torch.where(used, taken(pred.deltas), 0.0),
        boxes=torch.where(used, taken(pred.boxes), 0.0),
        priors=Priors(torch.where(used, taken(pred.priors.boxes), 0.0), tuple(counts)),
        extras={name: torch.where(used, taken(values), -math.inf) for name, values in pred.extras.items()},
    )


def save_outputs(path: str | Path, outputs: StoredOutputs) -> None:
    """Write a file: boxes in 1/128 of a pixel, logits in steps of 1/1024, left-out pairs not at all.

    Boxes are clipped to their picture, as selections do anyway. Deltas and the priors' own boxes are not
    kept: a file is for scoring, not for training. The name appears when the file is whole.

    Args:
        path: of the file, ``.npz``.
        outputs: what :func:`prune` left; every map of ``pred.extras`` has one number a prior.

    Raises:
        ValueError: if a map has several numbers a prior, or a logit is outside [-32, 32).

    Example:
        >>> import tempfile
        >>> boxes = torch.tensor([[[1.0, 2, 30, 40]]])
        >>> pred = Predictions(torch.tensor([[[0.5]]]), torch.zeros(1, 1, 4), boxes, Priors(boxes, (1,)))
        >>> dog = {"boxes": torch.tensor([[1.0, 1, 30, 40]]), "labels": torch.tensor([0])}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_outputs(f"{folder}/one.npz", StoredOutputs(pred, torch.tensor([[48, 48]]), [dog], {"seed": 0}))
        ...     again = load_outputs(f"{folder}/one.npz")
        >>> again.pred.logits.tolist(), again.pred.boxes.tolist(), again.about
        ([[[0.5]]], [[[1.0, 2.0, 30.0, 40.0]]], {'seed': 0})
    """
    pred = outputs.pred
    used = pred.logits.isfinite().any(dim=-1)
    counts = np.stack([level.sum(dim=1).numpy() for level in used.split(pred.priors.counts, dim=1)], axis=1)
    per_pixel = min(_PER_PIXEL, (_STEPS - 1) // int(outputs.sizes.max()))
    boxes = (clip_boxes(pred.boxes, outputs.sizes)[used].double() * per_pixel).round()
    logits = pred.logits[used]
    prior, label = logits.isfinite().nonzero(as_tuple=True)
    targets = [_target(target) for target in outputs.targets]
    arrays = {
        "about": np.array(json.dumps(dict(outputs.about))),
        "sizes": outputs.sizes.numpy().astype(np.uint16),
        "num_classes": np.array(logits.shape[1]),
        "per_pixel": np.array(per_pixel),
        "counts": counts.astype(np.uint16),
        "boxes": _planes(boxes.T.contiguous()),
        "classes": prior.bincount(minlength=len(logits)).numpy().astype(np.uint8),
        "labels": label.numpy().astype(np.uint8),
        "logits": _steps(logits[prior, label], "logits"),
        "objects": np.array([len(target["labels"]) for target in targets], np.uint16),
        **{f"extra_{name}": _steps(values[used], name) for name, values in pred.extras.items()},
        **{f"target_{name}": np.concatenate([t[name] for t in targets]) for name in ("boxes", "labels", "ignore")},
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    with draft.open("wb") as file:
        np.savez_compressed(file, **arrays)
    draft.replace(path)


def load_outputs(file: str | Path | BufferedIOBase) -> StoredOutputs:
    """Read what :func:`save_outputs` wrote; nothing in the file is run.

    Args:
        file: its path, or the file itself, opened or downloaded.

    Returns:
        The outputs. Their ``pred.deltas`` are zeros and their priors stand where the boxes do.

    Example:
        >>> import io
        >>> load_outputs(io.BytesIO(b"something else"))
        Traceback (most recent call last):
        ValueError: load_outputs: file must be one that save_outputs wrote; got another.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            stored = dict(archive)
            about = json.loads(str(stored["about"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("load_outputs: file must be one that save_outputs wrote; got another.") from None
    counts, sizes = stored["counts"].astype(np.int64), torch.from_numpy(stored["sizes"].astype(np.int64))
    widths = counts.max(axis=0)
    # rows lie picture by picture, in each level by level; a level's slots begin where the ones before it end
    begin = np.cumsum(widths) - widths
    image = np.repeat(np.arange(len(counts)), counts.sum(axis=1))
    first = np.cumsum(counts.ravel()) - counts.ravel()
    within = np.arange(counts.sum()) - np.repeat(first, counts.ravel())
    place = (image, np.repeat(np.tile(begin, len(counts)), counts.ravel()) + within)
    shape = (len(counts), int(widths.sum()))

    boxes = np.zeros((*shape, 4), np.float32)
    boxes[place] = _whole(stored["boxes"]).T / stored["per_pixel"]
    rows = np.full((len(image), int(stored["num_classes"])), -np.inf, np.float32)
    rows[np.repeat(np.arange(len(image)), stored["classes"]), stored["labels"]] = _numbers(stored["logits"])
    logits = np.full((*shape, rows.shape[1]), -np.inf, np.float32)
    logits[place] = rows
    extras = {}
    for name, steps in stored.items():
        if name.startswith("extra_"):
            values = np.full((*shape, 1), -np.inf, np.float32)
            values[place] = _numbers(steps)[:, None]
            extras[name.removeprefix("extra_")] = torch.from_numpy(values)
    decoded = torch.from_numpy(boxes)
    priors = Priors(decoded, tuple(widths.tolist()))
    pred = Predictions(torch.from_numpy(logits), torch.zeros_like(decoded), decoded, priors, extras)
    ends = np.cumsum(stored["objects"].astype(np.int64))[:-1]
    parts = {name: np.split(stored[f"target_{name}"], ends) for name in ("boxes", "labels", "ignore")}
    targets = [
        {"boxes": torch.from_numpy(b), "labels": torch.from_numpy(k.astype(np.int64)), "ignore": torch.from_numpy(i)}
        for b, k, i in zip(*parts.values(), strict=True)
    ]
    return StoredOutputs(pred, sizes, targets, about)


def _target(target: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The columns of one picture that are kept."""
    plain = {name: torch.as_tensor(values).as_subclass(Tensor).cpu() for name, values in target.items()}
    labels = plain["labels"]
    return {
        "boxes": plain["boxes"].float().reshape(-1, 4).numpy(),
        "labels": labels.numpy().astype(np.uint8),
        "ignore": plain.get("ignore", torch.zeros(len(labels))).bool().numpy(),
    }


def _steps(values: Tensor, name: str) -> np.ndarray:
    """Logits as whole numbers of steps."""
    if values.ndim == 2 and values.shape[1] != 1:
        raise ValueError(f"save_outputs: extras[{name!r}] must have one number a prior; got {values.shape[1]}.")
    whole = ((values.flatten().double() + _LOGIT_RANGE) * (_STEPS / (2 * _LOGIT_RANGE))).round()
    if not ((whole >= 0) & (whole < _STEPS)).all():
        raise ValueError(f"save_outputs: {name} must be in [-{_LOGIT_RANGE:g}, {_LOGIT_RANGE:g}); some are not.")
    return _planes(whole)


def _numbers(planes: np.ndarray) -> np.ndarray:
    return (_whole(planes) * (2 * _LOGIT_RANGE / _STEPS) - _LOGIT_RANGE).astype(np.float32)


def _planes(whole: Tensor) -> np.ndarray:
    """Low bytes and high bytes apart: the high ones repeat and shrink when packed, mixed with the low they do not."""
    values = whole.numpy().astype(np.uint16)
    return np.stack([values & 255, values >> 8]).astype(np.uint8)


def _whole(planes: np.ndarray) -> np.ndarray:
    low, high = planes.astype(np.int64)
    return low + 256 * high
