"""Convolutions of 3 x 3 that a processor computes Winograd's way where that pays."""

import torch
from torch import Tensor, nn

from detcore.kernels import enabled
from detcore.kernels.winograd import best_form, winograd_convolution, winograd_weights

__all__ = ["Conv3x3", "use_winograd"]


class Conv3x3(nn.Conv2d):
    """``nn.Conv2d`` of 3 x 3, its maps kept their size: on a processor with fewer multiplications.

    Only where that is faster, which :func:`detcore.kernels.winograd.best_form` knows; otherwise, and under
    :func:`detcore.kernels.disable`, it is ``nn.Conv2d``.

    Example:
        >>> conv, x = Conv3x3(128, 128, 3, padding=1), torch.rand(1, 128, 40, 40)
        >>> last = x.to(memory_format=torch.channels_last)
        >>> bool((conv(last) - conv(x)).abs().max() < 1e-4)
        True
    """

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x."""
        is_tried = enabled() and x.device.type == "cpu"
        dtype = torch.get_autocast_dtype("cpu") if is_tried and torch.is_autocast_enabled("cpu") else x.dtype
        form = best_form(x, self.weight, dtype) if is_tried else None
        if form is None:
            return super().forward(x)
        weights = winograd_weights(self.weight, form).to(dtype)
        return winograd_convolution(x.to(dtype), weights, None if self.bias is None else self.bias.to(dtype))


def use_winograd(module: nn.Module) -> None:
    """Let every ``nn.Conv2d`` in a module that can be a :class:`Conv3x3` be one; its weights and state stay.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(128, 256, 3, padding=1), nn.Conv2d(3, 64, 3, padding=1))
        >>> use_winograd(net)
        >>> [type(m).__name__ for m in net]
        ['Conv3x3', 'Conv2d']
    """
    for part in module.modules():
        if type(part) is nn.Conv2d and _keeps_size(part) and min(part.weight.shape[:2]) >= 128:
            part.__class__ = Conv3x3


def _keeps_size(conv: nn.Conv2d) -> bool:
    numbers = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return numbers == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
