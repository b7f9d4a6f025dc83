"""The parts of a detector that hold weights: trunks, necks, heads."""

from detcore.nn.backbones import ResNetTrunk, TinyTrunk, build_trunk
from detcore.nn.heads import DenseHead
from detcore.nn.inputs import ImageInput
from detcore.nn.layers import Exp, FixedBatchNorm2d, Scale
from detcore.nn.necks import FPN

__all__ = [
    "FPN",
    "DenseHead",
    "Exp",
    "FixedBatchNorm2d",
    "ImageInput",
    "ResNetTrunk",
    "Scale",
    "TinyTrunk",
    "build_trunk",
]
