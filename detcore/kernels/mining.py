"""Softmax with hard negatives: every row is read once, only the chosen ones are ever differentiated."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from detcore.kernels._autograd import refuse_second_derivative
from detcore.structures import BACKGROUND

__all__ = ["hard_negative_mask", "mined_entropy_sum", "mining_applies"]

PIECE = 65536
"""Logits a piece and thread, read and reduced while they are in the cache."""


def mining_applies(*tensors: Tensor, ratio: float = 3.0, **named: Tensor) -> bool:
    """Whether the functions of this file can stand in for those of :mod:`detcore.losses.mining`.

    Example:
        >>> mining_applies(torch.zeros(1, 2), ratio=-1.0)
        False
    """
    return all(x.device.type == "cpu" for x in (*tensors, *named.values())) and ratio >= 0


def hard_negative_mask(
    losses: Float[Tensor, "B N"],
    positive: Bool[Tensor, "B N"],
    negative: Bool[Tensor, "B N"],
    *,
    ratio: float = 3.0,
) -> Bool[Tensor, "B N"]:
    """Fast form of :func:`detcore.losses.mining.hard_negative_mask`: finds the last one in, sorts nothing else.

    Example:
        >>> losses, positive = torch.tensor([[9.0, 2.0, 2.0]]), torch.tensor([[True, False, False]])
        >>> hard_negative_mask(losses, positive, ~positive, ratio=1.0)
        tensor([[False,  True, False]])
    """
    ranked = torch.where(negative, losses.detach(), -torch.inf)
    ranked = torch.where(ranked.isnan(), torch.inf, ranked)
    wanted = (ratio * positive.sum(1, keepdim=True)).floor().clamp(max=negative.sum(1, keepdim=True)).long()
    most = int(wanted.max()) if wanted.numel() else 0
    if most == 0:
        return torch.zeros_like(negative)
    least = ranked.topk(most, dim=1).values.gather(1, (wanted - 1).clamp(min=0))
    above = ranked > least
    level = (ranked == least) & negative
    return above | (level & (level.cumsum(1) <= wanted - above.sum(1, keepdim=True)))


def mined_entropy_sum(
    logits: Float[Tensor, "B N K"],
    labels: Int[Tensor, "B N"],
    weights: Float[Tensor, "B N"],
    *,
    ratio: float = 3.0,
) -> Float[Tensor, ""]:
    """Fast form of :func:`detcore.losses.mining.mined_entropy_sum`. Its gradient cannot be differentiated again.

    Example:
        >>> mined_entropy_sum(torch.zeros(1, 3, 2), torch.tensor([[0, -1, -1]]), torch.ones(1, 3), ratio=1.0)
        tensor(1.3863)
    """
    return _Chosen.apply(logits, labels, weights, ratio, logits.requires_grad and torch.is_grad_enabled())


class _Chosen(torch.autograd.Function):
    """The weighted entropy of the chosen rows. Kept for the way back: these rows' gradient."""

    @staticmethod
    def forward(ctx, logits, labels, weights, ratio, with_gradient):
        x = logits.detach().flatten(0, 1)
        wide = torch.promote_types(x.dtype, torch.float32)
        wanted = torch.where(labels >= 0, labels, x.shape[1] - 1).flatten()
        count = max(1, PIECE * torch.get_num_threads() // max(1, x.shape[1]))
        entropy = torch.empty(len(x), dtype=wide)
        for start in range(0, len(x), count):
            rows = slice(start, start + count)
            entropy[rows] = F.cross_entropy(x[rows].to(wide), wanted[rows], reduction="none")
        positive = labels >= 0
        hard = hard_negative_mask(entropy.view(labels.shape), positive, labels == BACKGROUND, ratio=ratio)
        chosen = (positive | hard).flatten().nonzero()[:, 0]
        share = weights.detach().flatten()[chosen]
        if with_gradient:
            slope = x[chosen].to(wide).softmax(1)
            slope[torch.arange(len(chosen)), wanted[chosen]] -= 1
            ctx.save_for_backward(chosen, slope.mul_(share[:, None]))
            ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return (entropy[chosen] * share).sum(dtype=torch.float64).to(wide)

    @staticmethod
    def backward(ctx, by):
        refuse_second_derivative("mined_entropy_sum")
        chosen, slope = ctx.saved_tensors
        gradient = torch.zeros(ctx.shape, dtype=ctx.dtype)
        gradient.flatten(0, 1)[chosen] = (slope * by).to(ctx.dtype)
        return gradient, *[None] * 4
