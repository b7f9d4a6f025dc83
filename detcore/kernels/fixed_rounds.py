"""Selection for a GPU: fixed shapes, a fixed number of rounds, and one flag that says whether that was enough.

Greedy suppression goes box by box. But "a box stays if no better one that stays overlaps it" can be worked out for
all boxes at once, again and again from the last answer. After k rounds the answer is right for every box that ends
a chain of fewer than k overlapping ones; when a round changes nothing it is right for all, and it is the greedy one.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from detcore.boxes import clip_boxes
from detcore.kernels.selection import SLACK, Rule, open_priors
from detcore.scores import Scores
from detcore.structures import BACKGROUND, Detections, Predictions

__all__ = ["select_in_fixed_rounds", "stays"]

_ROWS, _PAIRS, _ROUNDS = 1024, 1024, 12


def select_in_fixed_rounds(
    scores: Scores, pred: Predictions, sizes: Int[Tensor, "B 2"], rule: Rule
) -> tuple[Detections, Bool[Tensor, ""]]:
    """Detections by the rule, and whether they are certainly those of :mod:`detcore.postprocess`.

    They are not certain if too few of the best 1024 pairs of an image survive, or 12 rounds do not settle it. No
    number is read by the host.

    Example:
        >>> from detcore.structures import Priors
        >>> box, scores = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 8, 9]]]), torch.tensor([[[0.6], [0.7]]])
        >>> pred, rule = Predictions(scores, box, box, Priors(box, (2,))), Rule("pair", 0.05, "ranking", 1000, 0.5, 2)
        >>> found, is_exact = select_in_fixed_rounds(Scores(scores, scores), pred, torch.tensor([[9, 9]]), rule)
        >>> found.prior.tolist(), found.valid.tolist(), bool(is_exact)
        ([[1, 0]], [[True, False]], True)
    """
    rows, some, likely, has_rows = _best_rows(scores, pred, rule)
    image = torch.arange(len(rows), device=rows.device)[:, None]
    ranking = torch.where(likely, some.ranking, -1.0).flatten(1)  # B m*C
    ranking, place, has_pairs = _best_pairs(ranking, min(_PAIRS, ranking.shape[1]))
    row, label = place // likely.shape[-1], place % likely.shape[-1]  # B n
    prior = rows.gather(1, row)
    valid = ranking >= 0
    if rule.by != "prior":
        group = label if rule.by == "class" else pred.priors.level[prior]
        better = (group[:, :, None] == group[:, None, :]).triu(1)
        valid &= better.sum(dim=1) < rule.candidates
    boxes = clip_boxes(pred.boxes[image, prior], sizes)
    kept, is_settled = valid, torch.ones_like(has_pairs)
    if rule.nms_iou is not None:
        kept, is_settled = stays(boxes, label, valid, rule.nms_iou, rounds=_ROUNDS)
    is_enough = (has_rows & has_pairs) | (kept.sum(dim=1) >= rule.max_detections)

    slot = torch.where(kept, kept.cumsum(dim=1) - 1, rule.max_detections).clamp(max=rule.max_detections)

    def slotted(values: Tensor, empty: int = 0) -> Tensor:
        slots = values.new_full((len(values), rule.max_detections + 1, *values.shape[2:]), empty)
        index = slot if values.ndim == 2 else slot[..., None].expand_as(values)
        # whatever else the last slot is given is cut off
        return slots.scatter(1, index, values)[:, :-1]

    labels = slotted(label, BACKGROUND)
    found = Detections(
        boxes=slotted(boxes),
        scores=slotted(some.ranking[image, row, label]),
        labels=labels,
        valid=labels != BACKGROUND,
        class_scores=slotted(some.classes[image, row, label]),
        quality=None if some.quality is None else slotted(some.quality.gather(1, row)),
        prior=slotted(prior),
    )
    return found, (is_settled & is_enough).all()


def _best_rows(
    scores: Scores, pred: Predictions, rule: Rule
) -> tuple[Int[Tensor, "B m"], Scores, Bool[Tensor, "B m C"], Bool[Tensor, " B"]]:
    """The most promising priors in their own order, their scores, their candidates, and whether nobody else has any.

    A candidate that another prior's pair may outrank is left out.
    """
    bound = scores.bound()
    key = torch.where(open_priors(bound, rule), bound.ranking[..., 0].nan_to_num(2.0), -1.0)
    top = key.topk(min(_ROWS, key.shape[1]), dim=1)
    rows = top.indices.sort(dim=1).values
    some = scores.of(torch.arange(len(rows), device=rows.device)[:, None].expand_as(rows), rows)
    likely = rule.passing(some) > rule.score_threshold
    has_all = torch.full_like(top.values[:, 0], key.shape[1] <= _ROWS, dtype=torch.bool)
    if key.shape[1] > _ROWS:
        floor = top.values[:, -1]
        has_all |= floor < 0
        likely &= has_all[:, None, None] | (some.ranking > (floor * (1 + SLACK))[:, None, None])
    if rule.by == "prior":
        order = some.ranking.amax(dim=-1).argsort(dim=1, descending=True, stable=True)
        level = pred.priors.level[rows.gather(1, order)]
        before = (level[:, :, None] == level[:, None, :]).triu(1).sum(dim=1)
        likely &= torch.zeros_like(rows, dtype=torch.bool).scatter(1, order, before < rule.candidates)[..., None]
    return rows, some, likely, has_all


def _best_pairs(
    ranking: Float[Tensor, "B P"], count: int
) -> tuple[Float[Tensor, "B n"], Int[Tensor, "B n"], Bool[Tensor, " B"]]:
    """The best by falling score, the earlier of equals first; -1 fills up. And whether that is all above -1."""
    top = ranking.topk(count, dim=1)
    least = top.values[:, -1:]
    has_all = (least < 0) | (count == ranking.shape[1])
    place = top.indices.sort(dim=1).values
    values = ranking.gather(1, place)
    values = torch.where(has_all | (values > least), values, -1.0)  # of several as good as the last not all are here
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, place.gather(1, order), has_all[:, 0]


def stays(
    boxes: Float[Tensor, "B n 4"], label: Int[Tensor, "B n"], valid: Bool[Tensor, "B n"], nms_iou: float, *, rounds: int
) -> tuple[Bool[Tensor, "B n"], Bool[Tensor, " B"]]:
    """Which boxes greedy suppression within each class leaves, if so many rounds settle it.

    Args:
        boxes: of each image, best first.
        label: their classes.
        valid: the others neither stay nor suppress.
        nms_iou: of two boxes that overlap more, the later goes.
        rounds: >= 1.

    Returns:
        Which stay, and for which images that is settled.

    Example:
        >>> boxes = torch.tensor([[[0.0, 0, 4, 4], [1, 0, 5, 4], [2, 0, 6, 4]]])  # each overlaps the next by 3/5
        >>> label, valid = torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool)
        >>> stays(boxes, label, valid, 0.5, rounds=1)  # as if the second could suppress the third
        (tensor([[ True, False, False]]), tensor([False]))
        >>> stays(boxes, label, valid, 0.5, rounds=3)
        (tensor([[ True, False,  True]]), tensor([True]))
    """
    x1, y1, x2, y2 = boxes.double().unbind(-1)
    area = (x2 - x1) * (y2 - y1)
    width = torch.minimum(x2[:, :, None], x2[:, None, :]) - torch.maximum(x1[:, :, None], x1[:, None, :])
    height = torch.minimum(y2[:, :, None], y2[:, None, :]) - torch.maximum(y1[:, :, None], y1[:, None, :])
    inter = width.clamp(min=0) * height.clamp(min=0)
    overlap = inter / (area[:, :, None] + area[:, None, :] - inter) > nms_iou
    suppresses = (overlap & (label[:, :, None] == label[:, None, :])).triu(1)  # B, better one, worse one
    kept = before = valid
    for _ in range(rounds):
        before, kept = kept, valid & ~(suppresses & kept[:, :, None]).any(dim=1)
    return kept, (kept == before).all(dim=1)
