"""Small layers that several detectors share."""

import math

from torch import nn

__all__ = ["FixedBatchNorm2d", "init_conv", "prior_probability_bias"]


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
