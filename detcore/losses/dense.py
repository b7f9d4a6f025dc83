"""Class losses summed over every prior and class: the part of a step that is as large as the logits themselves.

A weight says what each prior counts for, the normaliser included, so that nothing is left to do for whoever comes
after. Fast forms that work out value and gradient together stand behind these functions (:mod:`detcore.kernels`).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from detcore.kernels import accelerated, focal
from detcore.losses.functional import quality_focal_loss, sigmoid_focal_loss
from detcore.structures import IGNORE

__all__ = ["focal_sum", "quality_focal_sum"]


@accelerated(focal.focal_sum, when=focal.focal_sum_applies)
def focal_sum(
    logits: Float[Tensor, "B N C"],
    labels: Int[Tensor, "B N"],
    weights: Float[Tensor, "B N"],
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
) -> Float[Tensor, ""]:
    """Focal loss of all classes of all priors that are not ignored, each prior's times its weight.

    Args:
        logits: class scores before the sigmoid.
        labels: class of each prior, ``BACKGROUND`` or ``IGNORE``.
        weights: constants, no gradient comes back.
        alpha: of :func:`~detcore.losses.functional.sigmoid_focal_loss`.
        gamma: as there.

    Raises:
        ValueError: if ``alpha`` is outside [0, 1] or ``gamma`` is negative.

    Example:
        >>> labels = torch.tensor([[1, -1, -2]])  # class 1, background, ignored
        >>> focal_sum(torch.zeros(1, 3, 2), labels, torch.tensor([[1.0, 10.0, 100.0]]), alpha=None, gamma=0.0)
        tensor(15.2492)
        >>> 22 * torch.log(torch.tensor(2.0))
        tensor(15.2492)
    """
    classes = torch.arange(logits.shape[-1], device=labels.device)
    own = labels[..., None] == classes  # B N C; background and ignored match no class
    losses = sigmoid_focal_loss(logits, own, alpha=alpha, gamma=gamma).sum(-1)
    return (torch.where(labels == IGNORE, 0.0, losses) * weights).sum()


@accelerated(focal.quality_focal_sum, when=focal.quality_focal_sum_applies)
def quality_focal_sum(
    logits: Float[Tensor, "B N C"],
    labels: Int[Tensor, "B N"],
    quality: Float[Tensor, "B N"],
    weights: Float[Tensor, "B N"],
    *,
    beta: float = 2.0,
) -> Float[Tensor, ""]:
    """Quality focal loss of all classes of all priors that are not ignored, each prior's times its weight.

    Args:
        logits: class scores before the sigmoid.
        labels: class of each prior, ``BACKGROUND`` or ``IGNORE``.
        quality: target of a positive's own class, in [0, 1]; every other target is 0. A constant.
        weights: constants too.
        beta: of :func:`~detcore.losses.functional.quality_focal_loss`.

    Raises:
        ValueError: if ``beta`` is negative.

    Example:
        >>> labels, half = torch.tensor([[1, -1]]), torch.tensor([[0.5, 0.5]])
        >>> quality_focal_sum(torch.zeros(1, 2, 2), labels, half, torch.ones(1, 2), beta=1.0)
        tensor(1.0397)
        >>> 3 / 2 * torch.log(torch.tensor(2.0))  # the own class is right, the other three are off by 1/2
        tensor(1.0397)
    """
    classes = torch.arange(logits.shape[-1], device=labels.device)
    own = labels[..., None] == classes  # B N C
    targets = torch.where(own, quality.detach()[..., None], 0.0)
    losses = quality_focal_loss(logits, targets, beta=beta).sum(-1)
    return (torch.where(labels == IGNORE, 0.0, losses) * weights).sum()
