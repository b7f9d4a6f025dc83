"""Every detector of the package by name. Each file is a paper and holds what that paper adds."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from detcore.detector import DenseDetector
from detcore.models import (
    dssd,
    fcos,
    fcos_association,
    fssd,
    gfl,
    iou_aware,
    refinedet,
    retinanet,
    retinanet_conf,
    scod,
    ssd,
)
from detcore.models.scale_balanced import balanced

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
    "ssd300": ssd.ssd300,
    "ssd512": ssd.ssd512,
    "fssd300": fssd.fssd300,
    "fssd512": fssd.fssd512,
    "dssd320": dssd.dssd320,
    "dssd321": dssd.dssd321,
    "dssd512": dssd.dssd512,
    "dssd513": dssd.dssd513,
    "refinedet320": refinedet.refinedet320,
    "refinedet512": refinedet.refinedet512,
    "scod320": scod.scod320,
    "scod512": scod.scod512,
    "retinanet_scws": scod.retinanet_scws,
}
"""Name to factory."""

_PASSES_ON_TO: dict[Callable[..., DenseDetector], Callable[..., DenseDetector]] = {
    iou_aware.iou_aware_retinanet: retinanet.retinanet,
    retinanet_conf.retinanet_conf: retinanet.retinanet,
    gfl.retinanet_gfl: retinanet.retinanet,
    fcos.fcos_improved: fcos.fcos,
    fcos_association.fcos_association: fcos.fcos,
    iou_aware.iou_aware_fcos: fcos.fcos,
    ssd.ssd300: ssd.ssd,
    ssd.ssd512: ssd.ssd,
    ssd.ssd: ssd.ssd_detector,
    fssd.fssd300: fssd.fssd,
    fssd.fssd512: fssd.fssd,
    fssd.fssd: ssd.ssd_detector,
    dssd.dssd320: dssd.dssd,
    dssd.dssd321: dssd.dssd,
    dssd.dssd512: dssd.dssd,
    dssd.dssd513: dssd.dssd,
    dssd.dssd: ssd.ssd_detector,
    refinedet.refinedet320: refinedet.refinedet,
    refinedet.refinedet512: refinedet.refinedet,
    refinedet.refinedet: ssd.ssd_detector,
    scod.scod320: scod.scod,
    scod.scod512: scod.scod,
    scod.scod: dssd.dssd,
    scod.retinanet_scws: retinanet.retinanet,
}
"""Factory to the function that its ``**options`` go to."""


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
    backbone: str | nn.Module | None = None,
    weights_backbone: Any = None,
    **options: Any,
) -> DenseDetector:
    """Build a detector.

    Args:
        name: one of :func:`list_models`.
        num_classes: C, >= 1, background not counted.
        backbone: ``"tiny"`` (for processors without a GPU), a trunk of your own, or a name that the
            factory knows: ``"resnet18"``, ``"resnet34"``, ``"resnet50"``, ``"resnet101"``; ``"vgg16"``,
            ``"vgg16_bn"`` in the SSD family. ``None``: the factory's default.
        weights_backbone: ImageNet weights for the trunk, as in torchvision: an enum or
            ``"DEFAULT"``; ``None`` starts from random weights.
        **options: of the factory, e.g. ``detach_iou_target=False``; see its documentation. And for any
            detector ``balance="scb"`` and its companions, see
            :func:`detcore.models.scale_balanced.balanced`.

    Raises:
        KeyError: if the name is unknown.
        TypeError: if the factory has no such option.
        ValueError: if an option is out of range.

    Example:
        >>> detector = get_model("iou_aware_retinanet", num_classes=20, backbone="tiny")
        >>> detector.num_classes
        20
    """
    if name not in MODELS:
        raise KeyError(f"get_model: name must be one of {list_models()}; got {name!r}.")
    factory, balance = MODELS[name], _options(balanced)
    known = _options(factory) | balance
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"get_model: {name} has no option {', '.join(unknown)}; it has {sorted(known)}.")
    backbone = known["backbone"] if backbone is None else backbone
    own = {key: value for key, value in options.items() if key not in balance}
    detector = factory(num_classes=num_classes, backbone=backbone, weights_backbone=weights_backbone, **own)
    detector = balanced(detector, **{key: value for key, value in options.items() if key in balance})
    # a checkpoint brings its own weights: rebuilding from it must not download ImageNet's again, but what
    # follows from having had them (see ResNetTrunk) has to be said
    trunk: dict[str, Any] = {"backbone": backbone} if isinstance(backbone, str) else {}
    if weights_backbone is not None:
        trunk |= {key: value for key, value in _FINE_TUNED.items() if key in known}
    chosen = {key: value for key, value in options.items() if value is not None or key not in trunk}
    detector.spec = {"name": name, "num_classes": num_classes, **trunk, **chosen}
    return detector


_FINE_TUNED: dict[str, Any] = {"norm": "fixed", "trainable_stages": 3}


def _options(factory: Callable[..., DenseDetector]) -> dict[str, Any]:
    """What a factory can be asked for, and its defaults; those of the functions it passes options on to as well."""
    passed_on = _PASSES_ON_TO.get(factory)
    given = _options(passed_on) if passed_on else {}
    parameters = inspect.signature(factory).parameters.values()
    return given | {p.name: p.default for p in parameters if p.default is not p.empty}
