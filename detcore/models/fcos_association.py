"""FCOS with the association loss: class scores learn to say how well their boxes fit.

Xu et al., association loss for one-stage detectors, 2020. What the paper changes in FCOS: the
centre-ness branch goes, one loss term comes (Eq. 12); nothing is added to inference.
"""

from functools import partial
from typing import Any, Literal

import torch

from detcore.detector import DenseDetector
from detcore.losses.association import Association, association_term
from detcore.losses.terms import LossTerm
from detcore.models.fcos import Tower, fcos
from detcore.structures import BACKGROUND, Assignment, Predictions, Priors, Targets

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
    r"""FCOS without centre-ness, with PSE or PCE.

    .. math:: L = L_{cls} + L_{loc} + L_{as}

    Args:
        num_classes: C, >= 1.
        association: ``"pse"`` or ``"pce"``, see :func:`detcore.losses.association.association_term`.
        association_weight: of the term, >= 0; at 0 this is FCOS.
        beta: see there.
        k: see there.
        association_score: see there.
        centerness: none in the paper; with a tower's name FCOS keeps its branch beside the term.
        **options: of :func:`detcore.models.fcos.fcos`.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> list(fcos_association(num_classes=20, backbone="tiny").losses)
        ['cls', 'box', 'association']
    """
    if association_weight < 0:
        raise ValueError(f"fcos_association: association_weight must be >= 0; got {association_weight}.")
    term = partial(association_term, kind=association, beta=beta, k=k, score=association_score)
    _try(term)
    detector = fcos(num_classes=num_classes, centerness=centerness, **options)
    detector.losses["association"] = (association_weight, term)
    return detector


def _try(term: LossTerm) -> None:
    """On a prior that owns nothing, so that a wrong option is refused when the detector is built."""
    nothing = torch.zeros(1, 1, 4, device="cpu")  # also where models are built on the meta device
    nobody = torch.full((1, 1), BACKGROUND, device="cpu")
    match = Assignment(nobody, nobody, nothing, nothing[..., 0], Targets(nothing, nobody, nobody >= 0))
    term(Predictions(nothing[..., :1], nothing, nothing, Priors(nothing, (1,))), match)
