"""The parts of a detector that hold weights: trunks, necks, heads."""

from detcore.nn.backbones import ResNetTrunk, TinyTrunk, build_trunk
from detcore.nn.heads import DenseHead
from detcore.nn.inputs import ImageInput
from detcore.nn.layers import Exp, FixedBatchNorm2d, Scale
from detcore.nn.level_head import LevelHead
from detcore.nn.necks import FPN
from detcore.nn.pyramids import L2Norm, SSDPyramid
from detcore.nn.vgg import VGGTrunk

__all__ = [
    "FPN",
    "DenseHead",
    "Exp",
    "FixedBatchNorm2d",
    "ImageInput",
    "L2Norm",
    "LevelHead",
    "ResNetTrunk",
    "SSDPyramid",
    "Scale",
    "TinyTrunk",
    "VGGTrunk",
    "build_trunk",
]
