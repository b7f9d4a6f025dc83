r"""Focal losses with their gradient in one sweep over the logits.

A wrong class with logit :math:`x` costs :math:`p^\gamma s` with :math:`p = \sigma(x)` and
:math:`s = \ln(1 + e^x)`, and its slope is :math:`p^\gamma (\gamma (1 - p) s + p)`. All of it follows from one
exponential, so value and slope are worked out together, in pieces small enough to stay in the cache, and the
gradient is all that is kept. The few entries of the positives' own classes, where focal loss and quality focal loss
differ, are put in afterwards.

Under :func:`detcore.kernels.compiled` all steps become one loop, which is faster still.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

from detcore.kernels import uses_compiled
from detcore.kernels._autograd import refuse_second_derivative
from detcore.structures import IGNORE

__all__ = ["focal_sum", "focal_sum_applies", "quality_focal_sum", "quality_focal_sum_applies"]

PIECE = 262144
"""Logits a piece and thread: four arrays of them stay in the cache, and calls are few."""

ARTANH: list[float] = (
    Chebyshev.interpolate(lambda square: np.arctanh(square**0.5) / square**0.5, 4, domain=[0, 1 / 9])
    .convert(kind=Polynomial)
    .coef.tolist()
)
"""artanh(t) / t as a polynomial of t^2, for t up to 1/3: wrong by 4e-9 at most."""

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
        row = ((labels >= 0) & (labels < x.shape[1])).nonzero()[:, 0]
        entry = row, labels[row]
        gradient = torch.empty_like(x, memory_format=torch.contiguous_format) if with_gradient else None
        if gradient is not None and uses_compiled():
            sums = _compiled(power)(x, labels.int(), weights * factor, gradient)  # int32 is compared twice as fast
        else:
            sums = _in_pieces(x, entry, weights * factor, power, gradient)
        loss, slope = own(x[entry].to(wide), row)
        total = sums.sum(dtype=torch.float64) + (loss * weights[row]).sum(dtype=torch.float64)
        if gradient is not None:
            gradient[entry] = (slope * weights[row]).to(x.dtype)
            ctx.save_for_backward(gradient.view(logits.shape))
        return total.to(wide)

    @staticmethod
    def backward(ctx, by):
        refuse_second_derivative("focal loss")
        (gradient,) = ctx.saved_tensors
        # nothing to multiply by, as a rule: the weights hold the normaliser
        return gradient if by == 1 else gradient * by, *[None] * 6


def _in_pieces(x: Tensor, own: tuple[Tensor, Tensor], weights: Tensor, power: float, gradient: Tensor | None) -> Tensor:
    """Sum of each row without the positives' own entries; fills ``gradient`` likewise."""
    if x.numel() == 0:
        return torch.zeros_like(weights)
    count = max(1, PIECE * torch.get_num_threads() // x.shape[1])
    starts = torch.arange(0, len(x) + count, count)
    of_piece = torch.searchsorted(own[0], starts).tolist()
    sums = torch.empty_like(weights)
    pieces = [tensor.split(count) for tensor in (x, weights[:, None], sums)]
    gradients = gradient.split(count) if gradient is not None else [None] * len(starts)
    for i, (piece, weight, into, slopes) in enumerate(zip(*pieces, gradients, strict=False)):
        wide = piece.to(weights.dtype)
        p = wide.sigmoid()
        rest = 1 - p
        minus_surprise = _minus_surprise(wide, p, rest)
        factor = _weighted_power(p, weight, power)
        mine = slice(of_piece[i], of_piece[i + 1])
        if mine.start < mine.stop:
            factor[own[0][mine] - i * count, own[1][mine]] = 0
        torch.sum(factor * minus_surprise, 1, out=into)
        if slopes is not None:
            torch.mul(p.sub_(rest.mul_(minus_surprise), alpha=power), factor, out=slopes)
    return sums.neg_()


def _minus_surprise(x: Tensor, p: Tensor, rest: Tensor) -> Tensor:
    """-ln(1 + e^x) = ln(1 - p), where no p is so near 1 that 1 - p has few digits left.

    What 1 - p has lost by rounding is added as far as it is linear, so a small p keeps its digits. log1p does all that
    at once, in half the time in some processes and in three times as long in others on the same machine.
    """
    if p.amax() > 0.9975:  # 6 as a logit: 2e-6 of the surprise would be lost
        return F.softplus(x, threshold=80.0).neg_()
    lost = (rest - 1).add_(p)  # both exact
    return torch.log(rest).addcdiv_(lost, rest, value=-1)


def _weighted_power(p: Tensor, weights: Tensor, power: float) -> Tensor:
    if power == 0:
        return weights.expand_as(p).clone()
    return (p * weights).mul_(p) if power == 2 else p.pow(power).mul_(weights)


@functools.cache
def _compiled(power: float) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """What :func:`_in_pieces` does, as one loop."""

    def sweep(x, labels, weights, gradient):
        wide = x.to(weights.dtype)
        grown = torch.exp(-wide.abs())  # never overflows
        larger = 1 / (1 + grown)
        p = torch.where(wide >= 0, larger, grown * larger)
        surprise = torch.relu(wide) + _log1p(grown)
        own = labels[:, None] == torch.arange(x.shape[1], dtype=labels.dtype)
        factor = torch.where(own, 0.0, weights[:, None] * (p * p if power == 2 else p**power))
        gradient.copy_(factor * (p + power * (1 - p) * surprise))
        return (factor * surprise).sum(1)

    return torch.compile(sweep)


def _log1p(z: Tensor) -> Tensor:
    """ln(1 + z) of 0 to 1, in float32 by a few multiplications: a compiled loop takes them twice as fast as a log.

    ln(1 + z) = 2 artanh(t) with t = z / (2 + z), at most 1/3, so artanh(t) / t is short as a polynomial of t^2.
    """
    if z.dtype == torch.float64:
        return z.log1p()
    t = z / (2 + z)
    square, total = t * t, ARTANH[-1]
    for coefficient in ARTANH[-2::-1]:
        total = total * square + coefficient
    return 2 * t * total
