"""Weights of positive priors inside a term: how a paper reweighs any detector's loss without a copy of its terms.

A term that takes ``weight`` multiplies the loss of each positive prior by it. Negatives keep weight 1, and
nothing else of the term changes: neither which negatives are mined nor what the sum is divided by.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from detcore.structures import Assignment

__all__ = ["PriorWeight", "prior_shares", "weigh_positives"]

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


def prior_shares(match: Assignment, weight: PriorWeight | None, *, like: Float[Tensor, "..."]) -> Float[Tensor, "B N"]:
    """What the loss of each prior counts for in a mean over positives: its weight over their number.

    Args:
        match: whose priors.
        weight: of positives; the others' is 1, the ignored ones' too.
        like: the result has its type, float32 or wider.

    Example:
        >>> from detcore.structures import Targets
        >>> nobody = Targets(torch.zeros(1, 1, 4), torch.tensor([[-1]]), torch.tensor([[False]]))
        >>> labels, index = torch.tensor([[4, 0, -1]]), torch.zeros(1, 3, dtype=torch.int64)
        >>> match = Assignment(labels, index, torch.zeros(1, 3, 4), torch.zeros(1, 3), nobody)
        >>> prior_shares(match, lambda match: torch.full((1, 3), 3.0), like=torch.zeros(()))
        tensor([[1.5000, 1.5000, 0.5000]])
    """
    ones = torch.ones(match.labels.shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return weigh_positives(ones, match, weight) / match.num_positive
