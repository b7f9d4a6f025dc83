"""From predictions to what detections are ranked by.

The scorers here judge each prior by itself, so their scores wait until they are read: see
:class:`~detcore.scores.RowScores`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from detcore.scores import Scorer, Scores, by_rows
from detcore.structures import Predictions

__all__ = ["Scorer", "Scores", "class_score", "conf_powers", "fuse", "fused_score", "iou_aware_powers", "softmax_score"]


def fuse(
    class_score: Float[Tensor, "*#n"], quality: Float[Tensor, "*#n"], *, class_power: float, quality_power: float
) -> Float[Tensor, "*#n"]:
    r"""Weighted geometric mean of class score and quality.

    .. math:: s = p^{u}\, q^{v}

    With :math:`u + v = 1` the result lies between its factors. Equal powers rank like the product:
    only where a fixed threshold cuts differs.

    Args:
        class_score: :math:`p`, in [0, 1].
        quality: :math:`q`, in [0, 1].
        class_power: :math:`u`, >= 0; 0 leaves the class score out exactly.
        quality_power: :math:`v`, >= 0; 0 leaves the quality out exactly.

    Raises:
        ValueError: if a power is negative.

    Example:
        >>> p, q = torch.tensor(0.2), torch.tensor(0.9)
        >>> fuse(p, q, class_power=0.4, quality_power=0.6)  # IoU-aware, alpha = 0.4
        tensor(0.4931)
        >>> fuse(p, q, class_power=0.6, quality_power=0.4)  # RetinaNet-Conf, alpha = 0.4
        tensor(0.3650)

    Reference: Wu et al., IoU-aware single-stage detector, 2020, Eq. (5), arXiv:1912.05992;
    RetinaNet-Conf, 2020, Eq. (11).
    """
    if class_power < 0 or quality_power < 0:
        raise ValueError(f"fuse: powers must be >= 0; got class_power={class_power}, quality_power={quality_power}.")
    return class_score**class_power * quality**quality_power


def iou_aware_powers(alpha: float) -> tuple[float, float]:
    r"""(class power, quality power) of the IoU-aware paper, where :math:`\alpha` belongs to the class.

    Raises:
        ValueError: if ``alpha`` is outside [0, 1].

    Example:
        >>> iou_aware_powers(0.75)
        (0.75, 0.25)

    Reference: Wu et al., IoU-aware single-stage detector, 2020, Eq. (5). arXiv:1912.05992
    """
    _check_alpha("iou_aware_powers", alpha)
    return alpha, 1 - alpha


def conf_powers(alpha: float) -> tuple[float, float]:
    r"""(class power, quality power) of RetinaNet-Conf, where :math:`\alpha` belongs to the quality.

    Raises:
        ValueError: if ``alpha`` is outside [0, 1].

    Example:
        >>> conf_powers(0.25)
        (0.75, 0.25)

    Reference: Wu et al., RetinaNet-Conf, 2020, Eq. (11).
    """
    _check_alpha("conf_powers", alpha)
    return 1 - alpha, alpha


def _check_alpha(where: str, alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"{where}: alpha must be in [0, 1]; got {alpha}.")


@by_rows()
def class_score(pred: Predictions) -> Scores:
    """Independent sigmoids, one a class.

    Example:
        >>> from detcore.models import get_model
        >>> get_model("retinanet", num_classes=20, backbone="tiny").score.__name__
        'class_score'
    """
    scores = _sigmoid(pred.logits)
    return Scores(scores, scores)


@by_rows(has_background=True)
def softmax_score(pred: Predictions) -> Scores:
    """One softmax over classes and background, which is the last channel and is left out.

    Example:
        >>> from detcore.structures import Priors
        >>> box, logits = torch.tensor([[[0.0, 0, 8, 8]]]), torch.tensor([[[2.0, 1.0, 2.0]]]).log()
        >>> softmax_score(Predictions(logits, box, box, Priors(box, (1,)))).ranking
        tensor([[[0.4000, 0.2000]]])
    """
    logits = pred.logits.float() if pred.logits.element_size() < 4 else pred.logits
    scores = logits.softmax(dim=-1)[..., :-1]
    return Scores(scores, scores)


@by_rows()
def fused_score(
    pred: Predictions,
    *,
    quality: str = "iou",
    class_power: float = 0.5,
    quality_power: float = 0.5,
    min_quality: float | None = None,
) -> Scores:
    """Class score fused with a quality map, on every level.

    Args:
        pred: ``pred.extras[quality]`` holds logits, one a prior, shared by its classes.
        quality: name of the map.
        class_power: of :func:`fuse`.
        quality_power: of :func:`fuse`.
        min_quality: priors at or below this quality score 0 in every class, ``ranking`` and
            ``classes`` alike, so that they take no candidate's place and pass no threshold; in
            [0, 1], ``None`` filters nothing.

    Raises:
        KeyError: if the head has no such map.
        ValueError: if a power is negative or ``min_quality`` is outside [0, 1].

    Example:
        >>> from functools import partial
        >>> u, v = iou_aware_powers(0.4)
        >>> score = partial(fused_score, class_power=u, quality_power=v)

    Reference: Wu et al., IoU-aware single-stage detector, 2020, Eq. (5), arXiv:1912.05992;
    RetinaNet-Conf, 2020, Eq. (11) and Table 4 (the filter).
    """
    if min_quality is not None and not 0 <= min_quality <= 1:
        raise ValueError(f"fused_score: min_quality must be None or in [0, 1]; got {min_quality}.")
    if quality not in pred.extras:
        raise KeyError(f"fused_score: the head must have the extra map {quality!r}; it has {sorted(pred.extras)}.")
    classes = _sigmoid(pred.logits)
    predicted = _sigmoid(pred.extras[quality][..., 0])
    ranking = fuse(classes, predicted[..., None], class_power=class_power, quality_power=quality_power)
    if min_quality is not None:  # after fuse: with a power of 0 a score of 0 would count as 1
        enough = predicted[..., None] > min_quality
        ranking, classes = torch.where(enough, ranking, 0.0), torch.where(enough, classes, 0.0)
    return Scores(ranking, classes, predicted)


def _sigmoid(logits: Tensor) -> Tensor:
    return (logits.float() if logits.element_size() < 4 else logits).sigmoid()
