"""Convolutions that a processor computes the fastest way it has; elsewhere they are torch's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detcore.kernels import enabled
from detcore.kernels.halves import in_float32, multiplied_as
from detcore.kernels.winograd import best_form, winograd_convolution, winograd_weights

__all__ = ["FastConv2d", "FastConvTranspose2d", "use_fast_convolutions"]


class FastConv2d(nn.Conv2d):
    """``nn.Conv2d``, on a processor the fastest way there is.

    3 x 3 with fewer multiplications where :func:`detcore.kernels.winograd.best_form` knows that to pay. Half precision
    in float32 where the processor has none (:mod:`detcore.kernels.halves`). Otherwise, and under
    :func:`detcore.kernels.disable`, it is ``nn.Conv2d``.

    Example:
        >>> conv, x = FastConv2d(128, 128, 3, padding=1), torch.rand(1, 128, 40, 40)
        >>> last = x.to(memory_format=torch.channels_last)
        >>> bool((conv(last) - conv(x)).abs().max() < 1e-4)
        True
    """

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x."""
        if not _may_choose(x):
            return super().forward(x)
        if _is_widened(x, self.weight):
            return in_float32(self._convolve, x, self.weight, self.bias, _computed_in(x))
        return self._convolve(x, self.weight, self.bias)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = _computed_in(x)
        form = self._best_form(x, dtype)
        if form is None:
            return self._conv_forward(x, weight, bias)
        weights = winograd_weights(weight, form).to(dtype)
        return winograd_convolution(x.to(dtype), weights, None if bias is None else bias.to(dtype))

    def _best_form(self, x: Tensor, dtype: torch.dtype, *, is_ready: bool = False) -> int | None:
        return best_form(x, self.weight, dtype, is_ready=is_ready) if self._keeps_size() else None

    def _keeps_size(self) -> bool:
        numbers = (self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        return numbers == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


class FastConvTranspose2d(nn.ConvTranspose2d):
    """``nn.ConvTranspose2d``, half precision in float32 where the processor has none.

    Example:
        >>> FastConvTranspose2d(2, 3, 2, stride=2)(torch.rand(1, 2, 4, 4)).shape
        torch.Size([1, 3, 8, 8])
    """

    padding: tuple[int, ...]  # torch allows "same" and "valid" for the other direction only

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The transposed convolution of x."""
        if output_size is not None or not _may_choose(x) or not _is_widened(x, self.weight):
            return super().forward(x, output_size)
        return in_float32(self._convolve, x, self.weight, self.bias, _computed_in(x))

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv_transpose2d(
            x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )


FAST = {nn.Conv2d: FastConv2d, nn.ConvTranspose2d: FastConvTranspose2d}
"""What becomes of a convolution."""


def use_fast_convolutions(module: nn.Module) -> None:
    """Let every convolution in a module be its fast form; weights, names and state stay.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(128, 256, 3, padding=1), nn.ReLU())
        >>> use_fast_convolutions(net)
        >>> [type(m).__name__ for m in net]
        ['FastConv2d', 'ReLU']
    """
    for part in module.modules():
        part.__class__ = FAST.get(type(part), type(part))


def _may_choose(x: Tensor) -> bool:
    return isinstance(x, Tensor) and enabled() and x.device.type == "cpu"  # what is no tensor is torch's to refuse


def _computed_in(x: Tensor) -> torch.dtype:
    """The type of the result: that of autocast, if it is on."""
    is_cast = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if is_cast else x.dtype


def _is_widened(x: Tensor, weight: Tensor) -> bool:
    """Whether to work in float32. Types that do not go together stay torch's to refuse."""
    dtype = _computed_in(x)
    goes_together = weight.dtype == x.dtype or torch.is_autocast_enabled("cpu")
    return multiplied_as(dtype) != dtype and goes_together
