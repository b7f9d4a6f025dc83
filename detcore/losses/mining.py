"""Softmax over classes and background, with hard negative mining: the class term of the SSD family."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from detcore.kernels import accelerated, mining
from detcore.losses.weighting import PriorWeight, prior_shares
from detcore.structures import BACKGROUND, Assignment, Predictions

__all__ = ["hard_negative_mask", "mined_entropy_sum", "softmax_mining_term"]


@accelerated(mining.hard_negative_mask, when=mining.mining_applies)
def hard_negative_mask(
    losses: Float[Tensor, "B N"],
    positive: Bool[Tensor, "B N"],
    negative: Bool[Tensor, "B N"],
    *,
    ratio: float = 3.0,
) -> Bool[Tensor, "B N"]:
    """The negatives of highest loss, ``ratio`` for each positive of the same image.

    An image keeps min(floor(ratio * positives), negatives) of them, exactly: of equal losses the
    first prior goes first. Without positives it keeps none.

    Args:
        losses: what negatives are ranked by; a constant, no gradient comes back.
        positive: counted.
        negative: eligible.
        ratio: negatives a positive, >= 0.

    Raises:
        ValueError: if ``ratio`` is negative.

    Example:
        >>> losses, positive = (
        ...     torch.tensor([[9.0, 2.0, 5.0, 1.0, 5.0]]),
        ...     torch.tensor([[True, False, False, False, False]]),
        ... )
        >>> hard_negative_mask(losses, positive, ~positive, ratio=2.0)
        tensor([[False, False,  True, False,  True]])

    Reference: Liu et al., SSD, ECCV 2016, section 2.2. arXiv:1512.02325
    """
    if ratio < 0:
        raise ValueError(f"hard_negative_mask: ratio must be >= 0; got {ratio}.")
    ranked = torch.where(negative, losses.detach(), -torch.inf)
    order = ranked.argsort(dim=1, descending=True, stable=True)
    wanted = (ratio * positive.sum(1, keepdim=True)).floor()  # B 1
    place = torch.arange(losses.shape[1], device=losses.device)
    hardest = torch.zeros_like(negative).scatter(1, order, place < wanted)
    return hardest & negative


@accelerated(mining.mined_entropy_sum, when=mining.mining_applies)
def mined_entropy_sum(
    logits: Float[Tensor, "B N K"],
    labels: Int[Tensor, "B N"],
    weights: Float[Tensor, "B N"],
    *,
    ratio: float = 3.0,
) -> Float[Tensor, ""]:
    """Cross-entropy of positives and of each image's hardest negatives, each prior's times its weight.

    Args:
        logits: of C classes and background, the last.
        labels: class of each prior, ``BACKGROUND`` or ``IGNORE``.
        weights: constants; they count in the sum, not in the ranking.
        ratio: of :func:`hard_negative_mask`.

    Raises:
        ValueError: if ``ratio`` is negative.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [5.0, -5.0], [0.0, 0.0]]])  # the second is a false alarm
        >>> mined_entropy_sum(logits, torch.tensor([[0, -1, -1]]), torch.ones(1, 3), ratio=1.0)
        tensor(10.6932)
    """
    logits = logits if logits.element_size() >= 4 else logits.float()
    positive = labels >= 0
    wanted = torch.where(positive, labels, logits.shape[-1] - 1)
    entropy = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
    hard = hard_negative_mask(entropy, positive, labels == BACKGROUND, ratio=ratio)
    return (torch.where(positive | hard, entropy, 0.0) * weights).sum()


def softmax_mining_term(
    pred: Predictions, match: Assignment, *, ratio: float = 3.0, weight: PriorWeight | None = None
) -> Float[Tensor, ""]:
    r"""Cross-entropy of positives and of each image's hardest negatives, per positive prior of the batch.

    .. math:: L_{cls} = -\frac{1}{N_{pos}} \Bigl( \sum_{i \in pos} w_i \ln p_i^{c_i}
        + \sum_{i \in hard} \ln p_i^{background} \Bigr)

    Negatives are ranked by :math:`-\ln p^{background}`; ignored priors take no part.

    Args:
        pred: logits of C classes and background, which is the **last** channel.
        match: objects of the same priors.
        ratio: of :func:`hard_negative_mask`.
        weight: :math:`w`, see :mod:`detcore.losses.weighting`; neither ranking, number of negatives nor
            normaliser know of it.

    Example:
        >>> from functools import partial
        >>> term = partial(softmax_mining_term, ratio=3.0)  # the "cls" of any detector with C + 1 logits

    Reference: Liu et al., SSD, ECCV 2016, Eq. (3). arXiv:1512.02325
    """
    return mined_entropy_sum(pred.logits, match.labels, prior_shares(match, weight, like=pred.logits), ratio=ratio)
