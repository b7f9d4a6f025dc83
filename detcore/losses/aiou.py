r"""The adaptive IoU loss: an offset weighs more than an error of size, whatever detector it trains.

Layer-wise customized weak segmentation block and AIoU loss, 2021. arXiv:2108.11021
"""

from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from detcore.boxes import adaptive_iou, giou, iou
from detcore.losses.terms import LossTerm, box_iou_term

__all__ = ["Overlap", "aiou_loss", "overlap_term"]

Overlap = Literal["iou", "giou", "aiou"]


def aiou_loss(
    boxes: Float[Tensor, "*#n 4"], targets: Float[Tensor, "*#n 4"], *, beta: float = 0.8
) -> Float[Tensor, "*#n"]:
    r"""1 - AIoU, in [0, 1]. No gradient where the shrunk boxes do not touch.

    Of equal boxes, one moved sideways by :math:`t` of its width:

    .. math:: L = \frac{2t}{\beta + t}, \qquad \frac{dL}{dt} = \frac{2\beta}{(\beta + t)^2}
        \qquad (t \le \beta)

    against :math:`2t/(1 + t)` and :math:`2/(1 + t)^2` of the IoU loss: near the object the slope is
    :math:`1/\beta` times as steep, 1.25 at 0.8. From :math:`t = \beta` on it is 0, which for
    :math:`\beta = 0.8` is below an IoU of 1/9.

    Args:
        boxes: predicted corners in pixels.
        targets: wanted corners.
        beta: of :func:`~detcore.boxes.adaptive_iou`, in (0, 1].

    Raises:
        ValueError: if ``beta`` is outside (0, 1].

    Example:
        >>> still, moved = torch.tensor([0.0, 0.0, 4.0, 4.0]), torch.tensor([1.0, 0.0, 5.0, 4.0])
        >>> [round(aiou_loss(still, moved, beta=beta).item(), 4) for beta in (1.0, 0.8, 0.6)]
        [0.4, 0.4762, 0.5882]

    Reference: SCOD, 2021, section on the AIoU loss. arXiv:2108.11021
    """
    return 1 - adaptive_iou(boxes, targets, beta=beta)


def overlap_term(kind: Overlap, *, beta: float = 0.8) -> LossTerm:
    """1 - overlap of decoded and wanted boxes, per positive prior, by the name of the overlap.

    Args:
        kind: ``"iou"``, ``"giou"`` or ``"aiou"``.
        beta: of :func:`~detcore.boxes.adaptive_iou`; the other two have none.

    Raises:
        ValueError: if ``kind`` is none of these, or ``beta`` is outside (0, 1].

    Example:
        >>> overlap_term("giou").func.__name__
        'box_iou_term'
    """
    measures = {"iou": iou, "giou": giou, "aiou": partial(adaptive_iou, beta=beta)}
    if kind not in measures:
        raise ValueError(f"overlap_term: kind must be one of {sorted(measures)}; got {kind!r}.")
    aiou_loss(torch.zeros(0, 4), torch.zeros(0, 4), beta=beta)  # refuses a wrong beta
    return partial(box_iou_term, measure=measures[kind])
