"""FCOS with the association loss: the class score of a positive learns to follow the IoU of its box.

Xu et al., association loss for one-stage detectors, 2020. What the paper adds to FCOS: one loss term
(Eq. 8 or 9). What it takes away: the centre-ness branch, whose part the class score takes over.
"""

from functools import partial
from typing import Any, Literal

import torch

from detcore.detector import DenseDetector
from detcore.losses.association import Association, association_term, pse_loss
from detcore.models.fcos import Tower, fcos

__all__ = ["fcos_association"]


def fcos_association(
    *,
    num_classes: int,
    association: Association = "pse",
    association_weight: float = 1.0,
    beta: float = 1.0,
    k: float = 1.0,
    association_score: Literal["label", "max"] = "label",
    centerness: Tower | None = None,
    **options: Any,
) -> DenseDetector:
    r"""FCOS without centre-ness and with the association loss; nothing is added at inference.

    .. math:: L = L_{cls} + L_{loc} + w L_{as}, \qquad S = p

    Args:
        num_classes: C, >= 1.
        association: ``"pse"`` (:func:`~detcore.losses.association.pse_loss`) or ``"pce"``
            (:func:`~detcore.losses.association.pce_loss`).
        association_weight: :math:`w`, >= 0; 1 in the paper, 0 is FCOS without centre-ness.
        beta: of :func:`~detcore.losses.association.pse_loss`, in both kinds a factor like :math:`w`:
            the paper's Table III varies it.
        k: of :func:`~detcore.losses.association.pse_loss`.
        association_score: ``score`` of :func:`~detcore.losses.association.association_term`.
        centerness: of :func:`detcore.models.fcos.fcos`, for a trial of both together.
        **options: of :func:`detcore.models.fcos.fcos`.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> detector = fcos_association(num_classes=80, backbone="tiny", association="pce")
        >>> list(detector.losses), list(detector.head.outputs)
        (['cls', 'box', 'association'], ['logits', 'deltas'])
    """
    if association not in ("pse", "pce"):
        raise ValueError(f'fcos_association: association must be "pse" or "pce"; got {association!r}.')
    if association_score not in ("label", "max"):
        raise ValueError(f'fcos_association: association_score must be "label" or "max"; got {association_score!r}.')
    if association_weight < 0:
        raise ValueError(f"fcos_association: association_weight must be >= 0; got {association_weight}.")
    pse_loss(torch.zeros(0), torch.zeros(0), beta=beta, k=k)  # refuses a wrong beta or k, of both kinds
    detector = fcos(num_classes=num_classes, centerness=centerness, **options)
    term = partial(association_term, kind=association, beta=beta, k=k, score=association_score)
    detector.losses["association"] = (association_weight, term)
    return detector
