"""Selection that reads the scores of the best priors only, and of more if these do not suffice.

Which pairs come through greedy suppression depends, from the best down, on better pairs alone. So the best few are
enough as soon as ``max_detections`` of them survive, and they are found from a bound on each prior's scores,
:meth:`detcore.scores.Scores.bound`, which costs one pass over the logits. The results are those of
:mod:`detcore.postprocess`, ties included: of equal scores the earlier prior goes first, then the lower class.

A GPU begins with :mod:`detcore.kernels.fixed_rounds`; what is here is its second try, and the way of processors.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision.ops import nms

from detcore.boxes import clip_boxes
from detcore.kernels.fixed_rounds import select_in_fixed_rounds
from detcore.kernels.selection import SLACK, Rule, is_sound, open_priors
from detcore.scores import Scores
from detcore.structures import BACKGROUND, Detections, Predictions

__all__ = ["applies", "best_by_class", "best_by_pair", "best_by_prior"]

_ROWS, _PAIRS = 1024, 4096  # priors and pairs of an image that are tried first
_VECTOR = 64


def applies(
    scores: Scores,
    pred: Predictions,
    sizes: Tensor,
    *,
    score_threshold: float = 0.0,
    threshold_on: str = "ranking",
    candidates: int = 1,
    nms_iou: float | None = None,
    max_detections: int = 1,
) -> bool:
    """Whether the forms here apply: without gradients, to options that are in range.

    Example:
        >>> from detcore.structures import Priors
        >>> box = torch.zeros(1, 1, 4)
        >>> pred, sizes = Predictions(box, box, box, Priors(box, (1,))), torch.ones(1, 2)
        >>> applies(Scores(box, box), pred, sizes), applies(Scores(box, box), pred, sizes, candidates=0)
        (True, False)
    """
    is_wanted = is_sound(score_threshold, threshold_on, candidates, nms_iou, max_detections)
    return is_wanted and pred.boxes.device.type in ("cpu", "cuda") and not pred.boxes.requires_grad


def best_by_prior(
    scores: Scores,
    pred: Predictions,
    sizes: Int[Tensor, "B 2"],
    *,
    score_threshold: float = 0.05,
    threshold_on: Literal["ranking", "classes"] = "ranking",
    candidates: int = 1000,
    nms_iou: float | None = 0.5,
    max_detections: int = 100,
) -> Detections:
    """See :func:`detcore.postprocess.select_by_prior`.

    Example:
        >>> from detcore.structures import Priors
        >>> box, scores = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 8, 9]]]), torch.tensor([[[0.6], [0.7]]])
        >>> pred = Predictions(scores, box, box, Priors(box, (2,)))
        >>> best_by_prior(Scores(scores, scores), pred, torch.tensor([[9, 9]]), max_detections=2).prior
        tensor([[1, 0]])
    """
    rule = Rule("prior", score_threshold, threshold_on, candidates, nms_iou, max_detections)
    return _select(scores, pred, sizes, rule)


def best_by_pair(
    scores: Scores,
    pred: Predictions,
    sizes: Int[Tensor, "B 2"],
    *,
    score_threshold: float = 0.05,
    threshold_on: Literal["ranking", "classes"] = "ranking",
    candidates: int = 1000,
    nms_iou: float | None = 0.5,
    max_detections: int = 100,
) -> Detections:
    """See :func:`detcore.postprocess.select_by_pair`.

    Example:
        >>> from detcore.structures import Priors
        >>> box, scores = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 8, 9]]]), torch.tensor([[[0.6], [0.7]]])
        >>> pred = Predictions(scores, box, box, Priors(box, (2,)))
        >>> best_by_pair(Scores(scores, scores), pred, torch.tensor([[9, 9]]), max_detections=2).labels
        tensor([[ 0, -1]])
    """
    rule = Rule("pair", score_threshold, threshold_on, candidates, nms_iou, max_detections)
    return _select(scores, pred, sizes, rule)


def best_by_class(
    scores: Scores,
    pred: Predictions,
    sizes: Int[Tensor, "B 2"],
    *,
    score_threshold: float = 0.01,
    threshold_on: Literal["ranking", "classes"] = "ranking",
    candidates: int = 400,
    nms_iou: float | None = 0.45,
    max_detections: int = 200,
) -> Detections:
    """See :func:`detcore.postprocess.select_by_class`.

    Example:
        >>> from detcore.structures import Priors
        >>> box, scores = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 8, 9]]]), torch.tensor([[[0.6], [0.7]]])
        >>> pred = Predictions(scores, box, box, Priors(box, (2,)))
        >>> best_by_class(Scores(scores, scores), pred, torch.tensor([[9, 9]]), max_detections=2).labels
        tensor([[ 0, -1]])
    """
    rule = Rule("class", score_threshold, threshold_on, candidates, nms_iou, max_detections)
    return _select(scores, pred, sizes, rule)


@dataclass(frozen=True)
class _Pairs:
    """Pairs of one image, by falling score."""

    prior: Int[Tensor, " P"]
    label: Int[Tensor, " P"]
    ranking: Float[Tensor, " P"]
    classes: Float[Tensor, " P"]
    quality: Float[Tensor, " P"] | None

    def __getitem__(self, index: Tensor | slice) -> "_Pairs":
        quality = None if self.quality is None else self.quality[index]
        return _Pairs(self.prior[index], self.label[index], self.ranking[index], self.classes[index], quality)


def _select(scores: Scores, pred: Predictions, sizes: Tensor, rule: Rule) -> Detections:
    if _is_on_gpu(pred):
        found, is_exact = select_in_fixed_rounds(scores, pred, sizes, rule)
        if is_exact:  # the only number that the host waits for
            return found
    return _select_by_image(scores, pred, sizes, rule)


def _is_on_gpu(pred: Predictions) -> bool:
    return pred.boxes.is_cuda


def _select_by_image(scores: Scores, pred: Predictions, sizes: Tensor, rule: Rule) -> Detections:
    bound = scores.bound()
    best, open_ = bound.ranking[..., 0], open_priors(bound, rule)  # B N
    found = [_best_of_image(scores, pred, sizes, b, open_[b], best[b], rule) for b in range(len(best))]

    def padded(rows: list[Tensor], empty: int = 0) -> Tensor:
        slots = rows[0].new_full((len(rows), rule.max_detections), empty)
        for slot, row in zip(slots, rows, strict=True):
            slot[: len(row)] = row
        return slots

    prior, label = padded([p.prior for p in found]), padded([p.label for p in found], BACKGROUND)
    valid = label != BACKGROUND
    quality = [p.quality for p in found if p.quality is not None]  # of every image or of none
    image = torch.arange(len(prior), device=prior.device)[:, None]
    boxes = clip_boxes(pred.boxes[image, prior], sizes)
    return Detections(
        boxes=torch.where(valid[..., None], boxes, 0.0),
        scores=padded([p.ranking for p in found]),
        labels=label,
        valid=valid,
        class_scores=padded([p.classes for p in found]),
        quality=padded(quality) if quality else None,
        prior=prior,
    )


def _best_of_image(
    scores: Scores,
    pred: Predictions,
    sizes: Tensor,
    image: int,
    open_: Bool[Tensor, " N"],
    best: Float[Tensor, " N"],
    rule: Rule,
) -> _Pairs:
    rows = open_.nonzero()[:, 0]
    best = best[rows]
    for most_rows, most_pairs in ((_ROWS, _PAIRS), (len(rows), _PAIRS), (len(rows), None)):
        floor, chosen = -math.inf, rows
        if len(rows) > most_rows:
            floor = float(best.topk(most_rows).values[-1])
            chosen = rows[best >= floor]
            floor *= 1 + SLACK
        pairs, floor = _pairs_above(scores, pred, image, chosen, floor, most_pairs, rule)
        kept = pairs[_survivors(pairs, pred, sizes, image, rule)]
        if len(kept.prior) == rule.max_detections or floor == -math.inf:
            break
    return kept


def _pairs_above(
    scores: Scores,
    pred: Predictions,
    image: int,
    rows: Int[Tensor, " R"],
    floor: float,
    most_pairs: int | None,
    rule: Rule,
) -> tuple[_Pairs, float]:
    """All candidates with a score above ``floor``; if that is too many, above a higher one, which is returned."""
    # whole vectors only: torch rounds the last few numbers of a tensor in another way than those before
    whole = torch.cat([rows, rows[-1:].expand(-len(rows) % _VECTOR)])[None]
    some = scores.of(torch.full_like(whole, image), whole)
    ranking = some.ranking[0, : len(rows)]
    likely = rule.passing(some)[0, : len(rows)] > rule.score_threshold
    if floor > -math.inf:
        likely &= ranking > floor
    if rule.by == "prior" and len(rows) > rule.candidates:
        order = ranking.amax(dim=-1).argsort(descending=True, stable=True)
        taken = order[_rank_in_group(_level(rows[order], pred)) < rule.candidates]
        likely &= torch.zeros_like(likely[:, :1]).index_fill(0, taken, True)
    row, label = likely.nonzero(as_tuple=True)
    values = ranking[row, label]
    if most_pairs and len(row) > most_pairs:
        floor = float(values.topk(most_pairs).values[-1])
        above = values > floor
        row, label, values = row[above], label[above], values[above]
    order = values.argsort(descending=True, stable=True)
    row, label = row[order], label[order]
    if rule.by != "prior" and len(row) > rule.candidates:
        group = label if rule.by == "class" else _level(rows[row], pred)
        taken = _rank_in_group(group) < rule.candidates
        row, label = row[taken], label[taken]
    quality = None if some.quality is None else some.quality[0, row]
    return _Pairs(rows[row], label, ranking[row, label], some.classes[0, row, label], quality), floor


def _level(prior: Int[Tensor, " P"], pred: Predictions) -> Int[Tensor, " P"]:
    return pred.priors.level[prior]


def _rank_in_group(group: Int[Tensor, " P"]) -> Int[Tensor, " P"]:
    """How many earlier entries have the same group."""
    order = group.argsort(stable=True)
    first = torch.searchsorted(group[order], group[order])
    return torch.empty_like(group).scatter(0, order, torch.arange(len(group), device=group.device) - first)


def _survivors(pairs: _Pairs, pred: Predictions, sizes: Tensor, image: int, rule: Rule) -> Int[Tensor, " S"] | slice:
    """The best ``max_detections`` that suppression leaves; only as many pairs are compared as that takes."""
    if rule.nms_iou is None or not len(pairs.prior):
        return slice(rule.max_detections)
    boxes = clip_boxes(pred.boxes[image, pairs.prior][None], sizes[image : image + 1])[0].double()
    boxes[:, ::2] += (pairs.label * (sizes[image, 1] + 1))[:, None]  # classes side by side do not overlap
    every = torch.arange(len(boxes), device=boxes.device)
    falling = -every.double()
    kept = pairs.prior[:0]
    for tried in every.split(max(rule.max_detections, 128)):
        tried = torch.cat([kept, tried])  # noqa: PLW2901
        kept = tried[nms(boxes[tried], falling[tried], rule.nms_iou)]
        if len(kept) >= rule.max_detections:
            break
    return kept[: rule.max_detections]
