"""Every detector of the package by name. Each file is a paper and holds what that paper adds."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from detcore.detector import DenseDetector
from detcore.models import fcos, fcos_association, gfl, iou_aware, retinanet, retinanet_conf

__all__ = ["MODELS", "get_model", "list_models"]

MODELS: dict[str, Callable[..., DenseDetector]] = {
    "retinanet": retinanet.retinanet,
    "iou_aware_retinanet": iou_aware.iou_aware_retinanet,
    "retinanet_conf": retinanet_conf.retinanet_conf,
    "retinanet_gfl": gfl.retinanet_gfl,
    "fcos": fcos.fcos,
    "fcos_improved": fcos.fcos_improved,
    "fcos_association": fcos_association.fcos_association,
    "iou_aware_fcos": iou_aware.iou_aware_fcos,
}
"""Name to factory."""

_PASSES_ON_TO: dict[str, Callable[..., DenseDetector]] = {
    "iou_aware_retinanet": retinanet.retinanet,
    "retinanet_conf": retinanet.retinanet,
    "retinanet_gfl": retinanet.retinanet,
    "fcos_improved": fcos.fcos,
    "fcos_association": fcos.fcos,
    "iou_aware_fcos": fcos.fcos,
}
"""Name to the factory that its ``**options`` go to."""


def list_models() -> list[str]:
    """Names that :func:`get_model` knows.

    Example:
        >>> "retinanet" in list_models()
        True
    """
    return sorted(MODELS)


def get_model(
    name: str,
    *,
    num_classes: int,
    backbone: str | nn.Module = "resnet50",
    weights_backbone: Any = None,
    **options: Any,
) -> DenseDetector:
    """Build a detector.

    Args:
        name: one of :func:`list_models`.
        num_classes: C, >= 1, background not counted.
        backbone: ``"resnet18"``, ``"resnet34"``, ``"resnet50"``, ``"resnet101"``, ``"tiny"`` (for
            processors without a GPU), or a trunk of your own.
        weights_backbone: ImageNet weights for the trunk, as in torchvision: an enum or
            ``"DEFAULT"``; ``None`` starts from random weights.
        **options: of the factory, e.g. ``detach_iou_target=False``; see its documentation.

    Raises:
        KeyError: if the name is unknown.
        TypeError: if the factory has no such option.

    Example:
        >>> detector = get_model("iou_aware_retinanet", num_classes=20, backbone="tiny")
        >>> detector.num_classes
        20
    """
    if name not in MODELS:
        raise KeyError(f"get_model: name must be one of {list_models()}; got {name!r}.")
    factory = MODELS[name]
    known = set(inspect.signature(factory).parameters)
    if name in _PASSES_ON_TO:
        known |= set(inspect.signature(_PASSES_ON_TO[name]).parameters)
    unknown = sorted(set(options) - known)
    if unknown:
        raise TypeError(f"get_model: {name} has no option {', '.join(unknown)}; it has {sorted(known - {'options'})}.")
    detector = factory(num_classes=num_classes, backbone=backbone, weights_backbone=weights_backbone, **options)
    # a checkpoint brings its own weights: rebuilding from it must not download ImageNet's again, but what
    # follows from having had them (see ResNetTrunk) has to be said
    trunk: dict[str, Any] = {"backbone": backbone} if isinstance(backbone, str) else {}
    if weights_backbone is not None:
        trunk |= {"norm": "fixed", "trainable_stages": 3}
    chosen = {key: value for key, value in options.items() if value is not None or key not in trunk}
    detector.spec = {"name": name, "num_classes": num_classes, **trunk, **chosen}
    return detector
