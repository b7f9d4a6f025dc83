r"""RefineDet's terms: object or not on the priors (ARM), then which object on the refined priors (ODM).

Zhang et al., Single-Shot Refinement Neural Network for Object Detection, CVPR 2018. arXiv:1711.06897

.. math:: L = \underbrace{L_b + L_r}_{\text{ARM}} / N_{arm} + \underbrace{L_m + L_r}_{\text{ODM}} / N_{odm}

A head for these terms gives ``Predictions`` of the ODM (``logits`` of C + 1 classes, ``deltas`` and
``boxes`` relative to the refined priors), whose ``priors`` are :func:`refine_priors` of the ARM's, and
these ``extras``:

============== =========== ===========================================================
name           shape       what
============== =========== ===========================================================
``objectness`` B N 2       ARM's logits: object, background (last, as everywhere)
``arm_deltas`` B N 4       ARM's deltas, relative to ``arm_priors``
``arm_priors`` 1 N 4       the generator's own priors, corners in pixels (or B N 4)
============== =========== ===========================================================

The detector's ``assign`` then matches the refined priors, and ``match`` below is the ODM's; the ARM terms
match the original ones themselves, with the ``assign`` they are given. The ODM's box term is
:func:`~detcore.losses.terms.box_delta_term` as it is.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from detcore.coders import BoxCoder
from detcore.losses.mining import softmax_mining_term
from detcore.losses.terms import box_delta_term
from detcore.losses.weighting import PriorWeight
from detcore.structures import IGNORE, Assignment, Predictions, Priors, Targets

__all__ = ["arm_box_term", "arm_class_term", "odm_class_term", "refine_priors", "surely_background"]

Assign = Callable[[Priors, Targets], Assignment]


def refine_priors(priors: Priors, deltas: Float[Tensor, "B N 4"], *, coder: BoxCoder) -> Priors:
    """The priors of the second step: each moved by its deltas, one set an image, not clipped.

    They are constants: the second step's losses do not teach the first step's boxes.

    Args:
        priors: of the first step.
        deltas: relative to them.
        coder: the head's own coder.

    Example:
        >>> from detcore.coders import DeltaCoder
        >>> priors = Priors(torch.tensor([[[0.0, 0.0, 10.0, 20.0]]]), (1,))
        >>> refine_priors(priors, torch.tensor([[[1.0, 0, 0, 0]]]), coder=DeltaCoder((10.0, 10.0, 5.0, 5.0))).boxes
        tensor([[[ 1.,  0., 11., 20.]]])
    """
    return replace(priors, boxes=coder.decode(deltas.detach(), priors.boxes.expand(len(deltas), -1, -1)))


def surely_background(pred: Predictions, *, least: float = 0.01) -> Bool[Tensor, "B N"]:
    """Priors whose objectness is below ``least``: RefineDet's negative anchor filter.

    In training they are no negatives for the ODM's mining; in detection their class scores are 0.

    Args:
        pred: ``extras["objectness"]`` is used.
        least: probability, in [0, 1]; one exactly as large passes.

    Raises:
        ValueError: if ``least`` is not a probability.

    Example:
        >>> logits = torch.log(torch.tensor([[[0.02, 0.98], [0.001, 0.999]]]))
        >>> boxes = torch.zeros(1, 2, 4)
        >>> pred = Predictions(logits, boxes, boxes, Priors(boxes, (2,)), {"objectness": logits})
        >>> surely_background(pred)
        tensor([[False,  True]])

    Reference: Zhang et al., RefineDet, CVPR 2018, section 3.3 (negative anchor filtering, theta = 0.99).
    """
    if not 0 <= least <= 1:
        raise ValueError(f"surely_background: least must be in [0, 1]; got {least}.")
    logits = _extra(pred, "objectness").detach()
    return (logits if logits.element_size() >= 4 else logits.float()).softmax(-1)[..., 0] < least


def arm_class_term(
    pred: Predictions, match: Assignment, *, assign: Assign, ratio: float = 3.0, weight: PriorWeight | None = None
) -> Float[Tensor, ""]:
    """Cross-entropy of object against background on the original priors, hard negatives mined.

    Args:
        pred: see the table above.
        match: its objects are matched anew.
        assign: how, e.g. :func:`detcore.ssd_assigner.ssd_assign`.
        ratio: of :func:`~detcore.losses.mining.softmax_mining_term`.
        weight: of the ARM's positives, see :mod:`detcore.losses.weighting`.

    Raises:
        KeyError: if the head lacks one of the extras.

    Example:
        >>> from functools import partial
        >>> from detcore.ssd_assigner import ssd_assign
        >>> term = partial(arm_class_term, assign=ssd_assign)
    """
    return softmax_mining_term(*_arm(pred, match, assign), ratio=ratio, weight=weight)


def arm_box_term(
    pred: Predictions,
    match: Assignment,
    *,
    assign: Assign,
    coder: BoxCoder,
    beta: float = 1.0,
    weight: PriorWeight | None = None,
) -> Float[Tensor, ""]:
    """Smooth L1 of the ARM's deltas, per positive original prior.

    Args:
        pred: see the table above.
        match: its objects are matched anew.
        assign: as in :func:`arm_class_term`.
        coder: the head's own coder.
        beta: of :func:`~detcore.losses.functional.smooth_l1_loss`.
        weight: as in :func:`arm_class_term`.

    Raises:
        KeyError: if the head lacks one of the extras.

    Example:
        >>> from functools import partial
        >>> from detcore.coders import DeltaCoder
        >>> from detcore.ssd_assigner import ssd_assign
        >>> term = partial(arm_box_term, assign=ssd_assign, coder=DeltaCoder((10.0, 10.0, 5.0, 5.0)))
    """
    return box_delta_term(*_arm(pred, match, assign), coder=coder, beta=beta, weight=weight)


def odm_class_term(
    pred: Predictions, match: Assignment, *, ratio: float = 3.0, least: float = 0.01, weight: PriorWeight | None = None
) -> Float[Tensor, ""]:
    """Cross-entropy over classes on the refined priors; the easiest negatives are not mined.

    A negative that the ARM is sure of takes no part. A positive always does, whatever the ARM says.

    Args:
        pred: see the table above.
        match: of the refined priors.
        ratio: of :func:`~detcore.losses.mining.softmax_mining_term`.
        least: of :func:`surely_background`; 0 filters nothing.
        weight: of positives, see :mod:`detcore.losses.weighting`; the scale-balanced paper weighs the
            ARM only.

    Raises:
        KeyError: if the head has no objectness.
        ValueError: if ``least`` or ``ratio`` is out of range.

    Example:
        >>> from functools import partial
        >>> unfiltered = partial(odm_class_term, least=0.0)
    """
    dropped = match.negative & surely_background(pred, least=least)
    return softmax_mining_term(
        pred, replace(match, labels=torch.where(dropped, IGNORE, match.labels)), ratio=ratio, weight=weight
    )


def _arm(pred: Predictions, match: Assignment, assign: Assign) -> tuple[Predictions, Assignment]:
    """The first step as predictions and assignment of its own: one class, on the original priors."""
    logits, deltas, boxes = (_extra(pred, name) for name in ("objectness", "arm_deltas", "arm_priors"))
    priors = replace(pred.priors, boxes=boxes)
    with torch.no_grad():
        own = assign(priors, match.targets)
    own = replace(own, labels=torch.where(own.positive, 0, own.labels))
    return Predictions(logits, deltas, pred.priors.boxes, priors), own


def _extra(pred: Predictions, name: str) -> Tensor:
    if name not in pred.extras:
        raise KeyError(f"refine: the head must have the extra map {name!r}; it has {sorted(pred.extras)}.")
    return pred.extras[name]
