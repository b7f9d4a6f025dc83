"""Products of half-precision numbers on processors that have no instruction for them: worked out in float32.

A processor that multiplies bfloat16 adds the products in float32 and rounds the sum once. One that cannot is left to
loops over single numbers, 7 to 9 times slower than float32 forwards, 12 to 25 times forwards and back
(``results/benchmarks/convolutions.json``). To widen the numbers, multiply them as float32 and round the result is the
same arithmetic at the speed of float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["in_float32", "multiplied_as"]


def _has(probe: str) -> bool:
    """Whether oneDNN has convolutions of this type for this processor."""
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, probe)())


HAS = {torch.bfloat16: _has("_is_mkldnn_bf16_supported"), torch.float16: _has("_is_mkldnn_fp16_supported")}
"""By type, whether this processor has convolutions of it."""


def multiplied_as(dtype: torch.dtype) -> torch.dtype:
    """The type in which processors like this one multiply numbers of a type fastest: itself or float32.

    Example:
        >>> multiplied_as(torch.float64)
        torch.float64
    """
    return dtype if HAS.get(dtype, True) else torch.float32


def in_float32(
    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """What ``convolve`` makes of maps, weights and bias of a type, its sums in float32.

    Args:
        convolve: computes in the type of what it is given.
        x: maps.
        weight: filters.
        bias: of the outputs.
        dtype: what all three are rounded to first, and the result at last.

    Example:
        >>> filters, x = torch.ones(1, 1, 1, 1), torch.tensor([[[[1.001]]]])
        >>> in_float32(torch.conv2d, x, filters, torch.tensor([2.0]), torch.bfloat16).item()
        3.0
    """
    x, weight = x.to(dtype).float(), weight.to(dtype).float()
    bias = None if bias is None else bias.to(dtype).float()
    with torch.autocast("cpu", enabled=False):
        return convolve(x, weight, bias).to(dtype)
