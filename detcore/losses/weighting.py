"""Weights of positive priors inside a term: how a paper reweighs any detector's loss without a copy of its terms.

A term that takes ``weight`` multiplies the loss of each positive prior by it. Negatives keep weight 1, and
nothing else of the term changes: neither which negatives are mined nor what the sum is divided by.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from detcore.structures import Assignment

__all__ = ["PriorWeight", "weigh_positives"]

PriorWeight = Callable[[Assignment], Tensor]
"""Weight of every prior, (B, N); only the positives' are looked at. No gradient comes back."""


def weigh_positives(
    losses: Float[Tensor, "B N"], match: Assignment, weight: PriorWeight | None
) -> Float[Tensor, "B N"]:
    """Losses of priors, each positive one times its weight; ``None`` changes nothing.

    Example:
        >>> from detcore.structures import Targets
        >>> nobody = Targets(torch.zeros(1, 1, 4), torch.tensor([[-1]]), torch.tensor([[False]]))
        >>> labels, index = torch.tensor([[4, -1]]), torch.zeros(1, 2, dtype=torch.int64)
        >>> match = Assignment(labels, index, torch.zeros(1, 2, 4), torch.zeros(1, 2), nobody)
        >>> weigh_positives(torch.ones(1, 2), match, lambda match: torch.full((1, 2), 3.0))
        tensor([[3., 1.]])
    """
    if weight is None:
        return losses
    with torch.no_grad():
        factor = torch.where(match.positive, weight(match), 1.0)
    return losses * factor.to(losses.dtype)
