"""Small layers that several detectors share."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Exp", "FixedBatchNorm2d", "Scale", "init_conv", "prior_probability_bias"]

_Conv = TypeVar("_Conv", nn.Conv2d, nn.ConvTranspose2d)


class FixedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that always uses its stored statistics; scale and shift can still be trained.

    With a few images on each GPU, batch statistics are too noisy to fine-tune from ImageNet weights.

    Example:
        >>> FixedBatchNorm2d(8).train().training
        False
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.training = False

    def train(self, mode: bool = True) -> "FixedBatchNorm2d":
        """Stay in evaluation mode whatever is asked."""
        return super().train(False)


class Scale(nn.Module):
    """A number to learn, times the input.

    One a level lets a head whose weights all levels share answer in another unit on each.

    Example:
        >>> Scale(2.0)(torch.ones(2)).tolist()
        [2.0, 2.0]

    Reference: Tian et al., FCOS, ICCV 2019, section 3.2. arXiv:1904.01355
    """

    def __init__(self, initial: float = 1.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(initial))

    def forward(self, x: Tensor) -> Tensor:
        """The input times the number."""
        return x * self.factor


class Exp(nn.Module):
    """The exponential, in float32 or wider: in bfloat16 a distance of 300 would move in steps of 2.

    Example:
        >>> Exp()(torch.zeros(1, dtype=torch.bfloat16))
        tensor([1.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """The exponential of the input."""
        return x.to(torch.promote_types(x.dtype, torch.float32)).exp()


def init_conv(conv: nn.Conv2d, *, std: float = 0.01, bias: float = 0.0) -> nn.Conv2d:
    """Weights from N(0, std^2) and a constant bias, as every layer of RetinaNet's heads.

    Example:
        >>> init_conv(nn.Conv2d(1, 2, 3), bias=-1.0).bias.tolist()
        [-1.0, -1.0]
    """
    nn.init.normal_(conv.weight, std=std)
    if conv.bias is not None:
        nn.init.constant_(conv.bias, bias)
    return conv


def _xavier(conv: _Conv) -> _Conv:
    """Xavier's weights and no bias at the start, as every new layer of the SSD family and of the pyramids."""
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def prior_probability_bias(probability: float) -> float:
    """The bias at which a sigmoid answers ``probability``, in (0, 1).

    Without it the first batches are drowned by a hundred thousand negatives at 0.5: about 12 000
    in the focal loss of one 608 x 1024 image, against 8 with it.

    Raises:
        ValueError: if ``probability`` is not between 0 and 1.

    Example:
        >>> round(prior_probability_bias(0.01), 4)
        -4.5951

    Reference: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, section 4.1. arXiv:1708.02002
    """
    if not 0 < probability < 1:
        raise ValueError(f"prior_probability_bias: probability must be in (0, 1); got {probability}.")
    return -math.log((1 - probability) / probability)
