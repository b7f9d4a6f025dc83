r"""Focal losses with their gradient in one sweep over the logits.

A wrong class with logit :math:`x` costs :math:`p^\gamma s` with :math:`p = \sigma(x)` and
:math:`s = \ln(1 + e^x)`, and its slope is :math:`p^\gamma (\gamma (1 - p) s + p)`. All of it follows from one
exponential, so value and slope are worked out together, in pieces small enough to stay in the cache, and the
gradient is all that is kept. The few entries of the positives' own classes, where focal loss and quality focal loss
differ, are put in afterwards.

Under :func:`detcore.kernels.compiled` all steps become one loop, which is faster still.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from detcore.kernels import uses_compiled
from detcore.kernels._autograd import refuse_second_derivative
from detcore.structures import IGNORE

__all__ = ["focal_sum", "focal_sum_applies", "quality_focal_sum", "quality_focal_sum_applies"]

PIECE = 32768
"""Logits a piece and thread: six arrays of that size stay in a cache of 1 MiB, and torch splits no smaller ones."""

Own = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Loss and slope of the positives' own entries, of their logits and the numbers of these positives."""


def focal_sum(
    logits: Float[Tensor, "B N C"],
    labels: Int[Tensor, "B N"],
    weights: Float[Tensor, "B N"],
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
) -> Float[Tensor, ""]:
    """Fast form of :func:`detcore.losses.dense.focal_sum`. Its gradient cannot be differentiated again.

    Example:
        >>> focal_sum(torch.zeros(1, 1, 2), torch.tensor([[-1]]), torch.ones(1, 1), alpha=None)
        tensor(0.3466)
    """
    of_own, of_others = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)

    def own(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        wrong, far = x.sigmoid(), (-x).sigmoid()
        surprise = F.softplus(-x, threshold=80.0)
        factor = of_own * far**gamma
        return factor * surprise, -factor * (gamma * wrong * surprise + far)

    return _total(logits, labels, weights, own, power=gamma, factor=of_others)


def focal_sum_applies(
    logits: Tensor, labels: Tensor, weights: Tensor, *, alpha: float | None = 0.25, gamma: float = 2.0
) -> bool:
    """Whether :func:`focal_sum` can stand in.

    Example:
        >>> focal_sum_applies(torch.zeros(1, 1, 2), torch.zeros(1, 1), torch.zeros(1, 1), gamma=-1.0)
        False
    """
    return logits.device.type == "cpu" and gamma >= 0 and (alpha is None or 0 <= alpha <= 1)


def quality_focal_sum(
    logits: Float[Tensor, "B N C"],
    labels: Int[Tensor, "B N"],
    quality: Float[Tensor, "B N"],
    weights: Float[Tensor, "B N"],
    *,
    beta: float = 2.0,
) -> Float[Tensor, ""]:
    """Fast form of :func:`detcore.losses.dense.quality_focal_sum`. Its gradient cannot be differentiated again.

    Example:
        >>> quality_focal_sum(torch.zeros(1, 1, 2), torch.tensor([[0]]), torch.ones(1, 1) / 2, torch.ones(1, 1))
        tensor(0.1733)
    """

    def own(x: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        wanted = quality.detach().flatten()[which].to(x.dtype)
        entropy = F.binary_cross_entropy_with_logits(x, wanted, reduction="none")
        p = x.sigmoid()
        error = p - wanted
        if beta == 0:
            return entropy, error
        gap = torch.where(error == 0, 1.0, error.abs())  # at 0 there is neither loss nor slope
        slope = gap**beta * error + beta * gap ** (beta - 1) * error.sign() * p * (1 - p) * entropy
        return torch.where(error == 0, 0.0, gap**beta * entropy), torch.where(error == 0, 0.0, slope)

    return _total(logits, labels, weights, own, power=beta, factor=1.0)


def quality_focal_sum_applies(
    logits: Tensor, labels: Tensor, quality: Tensor, weights: Tensor, *, beta: float = 2.0
) -> bool:
    """Whether :func:`quality_focal_sum` can stand in.

    Example:
        >>> quality_focal_sum_applies(torch.zeros(1, 1, 2), *3 * [torch.zeros(1, 1)], beta=1.5)
        True
    """
    return logits.device.type == "cpu" and beta >= 0


def _total(logits: Tensor, labels: Tensor, weights: Tensor, own: Own, *, power: float, factor: float) -> Tensor:
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    return _Sweep.apply(logits, labels, weights, own, power, factor, with_gradient)


class _Sweep(torch.autograd.Function):
    """The weighted sum of all entries. Kept for the way back: its gradient, in the logits' type."""

    @staticmethod
    def forward(ctx, logits, labels, weights, own, power, factor, with_gradient):
        x, labels = logits.detach().flatten(0, 1), labels.flatten()
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = torch.where(labels == IGNORE, 0.0, weights.detach().flatten()).to(wide)
        if with_gradient and uses_compiled():
            total, gradient = _compiled(power)(x, labels, weights * factor)
        else:
            total, gradient = _in_pieces(x, labels, weights * factor, power, with_gradient=with_gradient)
        entry = _own_entries(x, labels)
        loss, slope = own(x[entry].to(wide), entry[0])
        total = total + (loss * weights[entry[0]]).sum(dtype=torch.float64)
        if with_gradient:
            gradient[entry] = (slope * weights[entry[0]]).to(x.dtype)
            ctx.save_for_backward(gradient.view(logits.shape))
        return total.to(wide)

    @staticmethod
    def backward(ctx, by):
        refuse_second_derivative("focal loss")
        (gradient,) = ctx.saved_tensors
        # nothing to multiply by, as a rule: the weights hold the normaliser
        return gradient if by == 1 else gradient * by, *[None] * 6


def _own_entries(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Row and class of each positive."""
    row = ((labels >= 0) & (labels < x.shape[1])).nonzero()[:, 0]
    return row, labels[row]


def _in_pieces(
    x: Tensor, labels: Tensor, weights: Tensor, power: float, *, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum in float64 and gradient of all entries but the positives' own."""
    gradient = torch.empty_like(x, memory_format=torch.contiguous_format) if with_gradient else None
    count = max(1, PIECE * torch.get_num_threads() // max(1, x.shape[1]))
    sums = [torch.zeros((), dtype=torch.float64)]
    for start in range(0, len(x), count):
        rows = slice(start, start + count)
        piece = x[rows], labels[rows], weights[rows], gradient[rows] if with_gradient else None, power
        total = _piece(*piece)
        sums.append(total if total.isfinite() else _piece(*piece, large=True))
    return torch.stack(sums).sum(), gradient


def _piece(
    x: Tensor, labels: Tensor, weights: Tensor, gradient: Tensor | None, power: float, *, large: bool = False
) -> Tensor:
    """The sum over a few rows; their ``gradient`` is filled in. Logits above 88 (709 in float64) need ``large``."""
    x = x.to(weights.dtype)
    grown = (x.clamp(max=0.9 * math.log(torch.finfo(x.dtype).max)) if large else x).exp()
    surprise = grown.log1p()
    if large:
        surprise = surprise.maximum(x)
    rest = (grown + 1).reciprocal_()  # 1 - p
    p = grown.mul_(rest)
    factor = _weighted_power(p, weights[:, None], power)
    factor[_own_entries(x, labels)] = 0
    if gradient is not None:
        torch.mul(torch.addcmul(p, rest, surprise, value=power), factor, out=gradient)
    return surprise.mul_(factor).sum(1).sum(dtype=torch.float64)


def _weighted_power(p: Tensor, weights: Tensor, power: float) -> Tensor:
    if power == 0:
        return weights.expand_as(p).clone()
    return (p * weights).mul_(p) if power == 2 else p.pow(power).mul_(weights)


@functools.cache
def _compiled(power: float) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What :func:`_in_pieces` does, as one loop."""

    def sweep(x, labels, weights):
        own = labels[:, None] == torch.arange(x.shape[1], device=x.device)
        wide = x.to(weights.dtype)
        grown = torch.exp(-wide.abs())  # never overflows
        larger = 1 / (1 + grown)
        smaller = grown * larger
        p, rest = torch.where(wide >= 0, larger, smaller), torch.where(wide >= 0, smaller, larger)
        # ln(1 + grown), with what the addition rounds away; log1p takes twice as long
        log = torch.log(1 + grown) + (grown - ((1 + grown) - 1)) * larger
        surprise = wide.clamp(min=0) + log
        factor = torch.where(own, 0.0, weights[:, None] * (p * p if power == 2 else p**power))
        return (factor * surprise).sum(1), (factor * (p + power * rest * surprise)).to(x.dtype)

    once = torch.compile(sweep)

    def run(x, labels, weights):
        rows, gradient = once(x, labels, weights)
        return rows.sum(dtype=torch.float64), gradient

    return run
