"""From scored predictions to detections: candidates, suppression, the best of each image. Batched.

Of equal scores the earlier prior goes first, then the lower class.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.ops import batched_nms, nms

from detcore.boxes import clip_boxes
from detcore.kernels import accelerated, suppression
from detcore.scores import Scores
from detcore.structures import BACKGROUND, Detections, Predictions

__all__ = ["Selector", "ThresholdOn", "select_by_class", "select_by_pair", "select_by_prior"]

Selector = Callable[[Scores, Predictions, Tensor], Detections]
"""What a detector accepts as ``select``; the tensor holds image sizes (B, 2)."""

ThresholdOn = Literal["ranking", "classes"]


@accelerated(suppression.best_by_prior, when=suppression.applies)
def select_by_prior(
    scores: Scores,
    pred: Predictions,
    sizes: Int[Tensor, "B 2"],
    *,
    score_threshold: float = 0.05,
    threshold_on: ThresholdOn = "ranking",
    candidates: int = 1000,
    nms_iou: float | None = 0.5,
    max_detections: int = 100,
) -> Detections:
    """Best priors of each level, every class of them above the threshold, class-wise NMS, best overall.

    Args:
        scores: of every (prior, class) pair.
        pred: boxes and priors.
        sizes: (height, width) in pixels; boxes are clipped to it before suppression.
        score_threshold: pairs at or below it are dropped, in [0, 1].
        threshold_on: whether it cuts the ``"ranking"`` score or the ``"classes"`` score.
        candidates: priors kept a level, by their best class's ranking score, >= 1.
        nms_iou: of two boxes of one class and image that overlap more, the lower-ranked goes;
            ``None`` suppresses nothing: what NMS would have to choose from.
        max_detections: kept an image, >= 1.

    Returns:
        Detections, best first, in slots (B, ``max_detections``).

    Raises:
        ValueError: if a number is out of range or ``threshold_on`` is unknown.

    Example:
        >>> from detcore.models import get_model
        >>> detector = get_model("retinanet", num_classes=3, backbone="tiny", max_detections=20).eval()
        >>> found = detector.detect(torch.zeros(2, 3, 64, 64), torch.tensor([[64, 64], [48, 64]]))
        >>> tuple(found.boxes.shape)
        (2, 20, 4)

    Reference: MMDetection 2.4's RetinaNet, which the IoU-aware paper and RetinaNet-Conf use.
    """
    _check("select_by_prior", score_threshold, candidates, nms_iou, max_detections, threshold_on)
    best = scores.ranking.amax(dim=-1)  # B N
    index, start = [], 0
    for level in best.split(pred.priors.counts, dim=1):
        index.append(level.argsort(dim=1, descending=True, stable=True)[:, :candidates] + start)
        start += level.shape[1]
    prior = torch.cat(index, dim=1).sort(dim=1).values  # B K
    rows = prior[..., None].expand(-1, -1, scores.ranking.shape[-1])
    ranking = scores.ranking.gather(1, rows)  # B K C
    cut = ranking if threshold_on == "ranking" else scores.classes.gather(1, rows)
    image, row, label = (cut > score_threshold).nonzero(as_tuple=True)  # pairs
    return _suppress(
        scores, pred, sizes, image, prior[image, row], label, nms_iou=nms_iou, max_detections=max_detections
    )


@accelerated(suppression.best_by_pair, when=suppression.applies)
def select_by_pair(
    scores: Scores,
    pred: Predictions,
    sizes: Int[Tensor, "B 2"],
    *,
    score_threshold: float = 0.05,
    threshold_on: ThresholdOn = "ranking",
    candidates: int = 1000,
    nms_iou: float | None = 0.5,
    max_detections: int = 100,
) -> Detections:
    """Best (prior, class) pairs of each level above the threshold, class-wise NMS, best overall.

    Differs from :func:`select_by_prior` only where a level has more than ``candidates`` pairs above
    the threshold: here they compete pair by pair.

    Args:
        scores: as there, like the other arguments.
        pred: as there.
        sizes: as there.
        score_threshold: as there.
        threshold_on: as there.
        candidates: pairs kept a level, by ranking score, >= 1.
        nms_iou: as there.
        max_detections: as there.

    Raises:
        ValueError: if a number is out of range or ``threshold_on`` is unknown.

    Example:
        >>> from functools import partial
        >>> select = partial(select_by_pair, max_detections=300)  # torchvision's RetinaNet

    Reference: Tian et al., FCOS, ICCV 2019 (released code); torchvision's RetinaNet.
    """
    _check("select_by_pair", score_threshold, candidates, nms_iou, max_detections, threshold_on)
    cut = scores.ranking if threshold_on == "ranking" else scores.classes
    image, prior, label = (cut > score_threshold).nonzero(as_tuple=True)
    group = image * len(pred.priors.counts) + pred.priors.level[prior]
    order = scores.ranking[image, prior, label].argsort(descending=True, stable=True)
    kept = order[_rank_in_group(group[order]) < candidates]
    return _suppress(
        scores, pred, sizes, image[kept], prior[kept], label[kept], nms_iou=nms_iou, max_detections=max_detections
    )


@accelerated(suppression.best_by_class, when=suppression.applies)
def select_by_class(
    scores: Scores,
    pred: Predictions,
    sizes: Int[Tensor, "B 2"],
    *,
    score_threshold: float = 0.01,
    threshold_on: ThresholdOn = "ranking",
    candidates: int = 400,
    nms_iou: float | None = 0.45,
    max_detections: int = 200,
) -> Detections:
    """Best priors of each class, all levels together, above the threshold, class-wise NMS, best overall.

    Args:
        scores: as in :func:`select_by_prior`, like the other arguments.
        pred: as there.
        sizes: as there.
        score_threshold: as there.
        threshold_on: as there.
        candidates: priors kept a class and image, by ranking score, >= 1.
        nms_iou: as there.
        max_detections: as there.

    Raises:
        ValueError: if a number is out of range or ``threshold_on`` is unknown.

    Example:
        >>> from functools import partial
        >>> select = partial(select_by_class, candidates=1000, max_detections=500)  # RefineDet

    Reference: Liu et al., SSD, ECCV 2016, section 3.5 (0.01, 0.45, 200; 400 in the released code).
    """
    _check("select_by_class", score_threshold, candidates, nms_iou, max_detections, threshold_on)
    above = (scores.ranking if threshold_on == "ranking" else scores.classes) > score_threshold  # B N C
    batch, _, num_classes = above.shape
    image, prior, label = above.nonzero(as_tuple=True)
    group = image * num_classes + label
    per_class = group.new_zeros(batch * num_classes).scatter_add(0, group, torch.ones_like(group))
    if (per_class > candidates).any():  # hardly ever after training, so ranking every class would be for nothing
        ranking = torch.where(above, scores.ranking, -1.0)
        best = ranking.argsort(dim=1, descending=True, stable=True)[:, :candidates]  # B K C
        image, prior, label = (above & torch.zeros_like(above).scatter(1, best, True)).nonzero(as_tuple=True)
    return _suppress(scores, pred, sizes, image, prior, label, nms_iou=nms_iou, max_detections=max_detections)


def _suppress(
    scores: Scores,
    pred: Predictions,
    sizes: Tensor,
    image: Int[Tensor, " P"],
    prior: Int[Tensor, " P"],
    label: Int[Tensor, " P"],
    *,
    nms_iou: float | None,
    max_detections: int,
) -> Detections:
    batch, _, num_classes = scores.ranking.shape
    ranking = scores.ranking[image, prior, label]
    if nms_iou is None:
        kept = ranking.argsort(descending=True, stable=True)
    else:
        boxes = clip_boxes(pred.boxes[image, prior][:, None], sizes[image])[:, 0]
        kept = _nms_in_groups(boxes, ranking, image * num_classes + label, nms_iou)
    rank = _rank_in_group(image[kept])
    # static shapes: one slot more than wanted takes all that come too late, and is cut off
    slots = (image[kept], rank.clamp(max=max_detections))
    prior = prior.new_zeros(batch, max_detections + 1).index_put(slots, prior[kept])[:, :-1]
    label = label.new_full((batch, max_detections + 1), BACKGROUND).index_put(slots, label[kept])[:, :-1]
    valid = label != BACKGROUND
    row = torch.arange(batch, device=prior.device)[:, None]
    pair = (row, prior, label.clamp(min=0))  # B D
    return Detections(
        boxes=torch.where(valid[..., None], clip_boxes(pred.boxes[row, prior], sizes), 0.0),
        scores=torch.where(valid, scores.ranking[pair], 0.0),
        labels=label,
        valid=valid,
        class_scores=torch.where(valid, scores.classes[pair], 0.0),
        quality=None if scores.quality is None else torch.where(valid, scores.quality[row, prior], 0.0),
        prior=prior,
    )


def _nms_in_groups(
    boxes: Float[Tensor, "P 4"], ranking: Float[Tensor, " P"], group: Int[Tensor, " P"], nms_iou: float
) -> Int[Tensor, " S"]:
    """Greedy suppression inside each group. Indices of the survivors of all groups, best first."""
    boxes, ranking = boxes.double(), ranking.double()  # float32 boxes that are shifted apart lose pixels
    if boxes.is_cuda:  # a call costs more than its boxes
        return batched_nms(boxes, ranking, group, nms_iou)
    # on a processor a call costs the square of its boxes, and picking each group out of all costs groups x boxes
    order = group.argsort(stable=True)
    sizes = group[order].unique_consecutive(return_counts=True)[1].tolist()
    parts = zip(order.split(sizes), boxes[order].split(sizes), ranking[order].split(sizes), strict=True)
    survivors = torch.cat([order[:0], *(index[nms(box, score, nms_iou)] for index, box, score in parts)]).sort().values
    return survivors[ranking[survivors].argsort(descending=True, stable=True)]


def _rank_in_group(group: Int[Tensor, " P"]) -> Int[Tensor, " P"]:
    """How many earlier entries have the same group."""
    order = group.argsort(stable=True)
    sorted_group = group[order]
    position = torch.arange(len(group), device=group.device)
    first = torch.searchsorted(sorted_group, sorted_group)  # where each one's group begins
    return torch.empty_like(group).scatter(0, order, position - first)


def _check(
    where: str, threshold: float, candidates: int, nms_iou: float | None, max_detections: int, threshold_on: str
) -> None:
    if not 0 <= threshold <= 1 or not (nms_iou is None or 0 <= nms_iou <= 1):
        raise ValueError(
            f"{where}: score_threshold must be in [0, 1], nms_iou too or None; got {threshold} and {nms_iou}."
        )
    if candidates < 1 or max_detections < 1:
        raise ValueError(f"{where}: candidates and max_detections must be >= 1; got {candidates} and {max_detections}.")
    if threshold_on not in ("ranking", "classes"):
        raise ValueError(f'{where}: threshold_on must be "ranking" or "classes"; got {threshold_on!r}.')
