"""One-stage detectors that read like their papers, and tools to see why they rank and localise badly.

>>> import detcore
>>> detector = detcore.get_model("iou_aware_retinanet", num_classes=20, backbone="tiny")
"""

from detcore.checkpoint import package_version
from detcore.detector import DenseDetector, Detector
from detcore.models import get_model, list_models
from detcore.structures import (
    BACKGROUND,
    IGNORE,
    Assignment,
    Detections,
    Predictions,
    Priors,
    Targets,
    pad_targets,
    to_dicts,
)

__version__ = package_version()

__all__ = [
    "BACKGROUND",
    "IGNORE",
    "Assignment",
    "DenseDetector",
    "Detections",
    "Detector",
    "Predictions",
    "Priors",
    "Targets",
    "__version__",
    "get_model",
    "list_models",
    "pad_targets",
    "to_dicts",
]
