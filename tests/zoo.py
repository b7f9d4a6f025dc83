"""What each detector of the package promises: the rows of every test that runs over all of them.

A new detector is one row here; ``test_models``, ``test_launches`` and ``test_compile`` then run it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from detcore.assigners import centerness_target
from detcore.models import get_model
from detcore.nn import TinyTrunk
from detcore.ssd_assigner import ssd_assign
from detcore.structures import Assignment, Predictions, Priors

BY_PRIOR = ({"candidates_by": "prior"}, {"nonzero": 1})  # it waits for how many pairs pass the threshold
BY_PAIR = ({"candidates_by": "pair"}, {"nonzero": 1, "index by mask": 1})  # and how many are among their level's best


@dataclass(frozen=True)
class Row:
    """One detector.

    Args:
        terms: names of its losses.
        parameters: on the small trunk, three classes.
        extras: its further maps: name to components a prior.
        quality: the map that its score uses, ``None`` without one.
        per_cell: priors a cell, one number or one a level.
        sides: of its maps on a picture of 128 pixels.
        small: options that suit pictures of 64 to 128 pixels.
        selects: its ways to choose candidates: options, and what each waits for.
        focal: whether ``cls`` is the focal loss, which starts where every class is answered 0.01.
        softmax: whether its logits have a last channel for background, and hard negatives are mined.
        has_towers: whether its head has towers, of a ``depth``.
        detections: how many it gives at most.
        rounding: how far a loss may be off under autocast, relatively.
        half: how far a logit of the model in bfloat16 may be off.
        slopes: how far a compiled gradient may be off. Where it is more than the default, eager and compiled are
            both about five times as far from float64.
        like: the detector with the same code on another size of pictures, see :data:`EVERY_NETWORK`.
        steps: of training until two pictures are known by heart.
        normalisers: what a term is divided by where that is not the number of positives.
        without_objects: further terms that a picture without objects teaches.
    """

    terms: set[str]
    parameters: int
    extras: Mapping[str, int] = field(default_factory=dict)
    quality: str | None = None
    per_cell: int | tuple[int, ...] = 9
    sides: tuple[int, ...] = (16, 8, 4, 2, 1)
    small: Mapping[str, float] = field(default_factory=lambda: {"anchor_base": 2.0})
    selects: tuple[tuple[dict[str, str], dict[str, int]], ...] = (BY_PRIOR, BY_PAIR)
    focal: bool = True
    softmax: bool = False
    has_towers: bool = True
    detections: int = 100
    rounding: float = 0.02
    half: float = 0.1
    slopes: float = 1e-6
    like: str | None = None
    steps: int = 60
    normalisers: Mapping[str, Callable[[Predictions, Assignment], Tensor]] = field(default_factory=dict)
    without_objects: frozenset[str] = frozenset()

    @property
    def counts(self) -> tuple[int, ...]:
        """Priors a level on a picture of 128 pixels."""
        cells = self.per_cell if isinstance(self.per_cell, tuple) else (self.per_cell,) * len(self.sides)
        return tuple(n * side**2 for n, side in zip(cells, self.sides, strict=True))


def sum_of_centerness(pred: Predictions, match: Assignment) -> Tensor:
    return centerness_target(pred.priors.boxes, match.boxes)[match.positive].sum()


POINTS = {
    "per_cell": 1,
    "small": {"range_base": 4.0},
    "selects": (({}, BY_PAIR[1]),),
    "normalisers": {"box": sum_of_centerness},
}

DEFAULT_BOXES = {
    "small": {},
    "selects": (({}, {"nonzero": 1, "_local_scalar_dense": 1}),),
    "focal": False,
    "softmax": True,
    "has_towers": False,
    "detections": 200,
}


def arm_positives(pred: Predictions, match: Assignment) -> Tensor:
    """Of RefineDet's first step."""
    priors = Priors(pred.extras["arm_priors"], pred.priors.counts, pred.priors.cells)
    return ssd_assign(priors, match.targets).num_positive


REFINED = {
    **DEFAULT_BOXES,
    "extras": {"objectness": 2, "arm_deltas": 4, "arm_priors": 4},
    "per_cell": 3,
    "sides": (16, 8, 4, 2),
    "detections": 500,
    "rounding": 0.1,  # moved priors are matched anew, and some pass or miss the threshold by a hair
    "normalisers": {"arm_cls": arm_positives, "arm_box": arm_positives},
}


def images(pred: Predictions, match: Assignment) -> Tensor:
    return torch.tensor(float(len(pred.logits)))


REFINED_TERMS = {"arm_cls", "arm_box", "cls", "box"}
LEVELS_300 = {"per_cell": (4, 6, 6, 6, 4, 4), "sides": (16, 8, 4, 2, 1, 1), **DEFAULT_BOXES}
LEVELS_512 = {"per_cell": (4, 6, 6, 6, 6, 4, 4), "sides": (16, 8, 4, 2, 1, 1, 1), **DEFAULT_BOXES}

SEGMENTED = {"normalisers": {"scws": images}, "without_objects": frozenset({"scws"})}

ZOO = {
    "retinanet": Row({"cls", "box"}, 912_975),
    "iou_aware_retinanet": Row({"cls", "box", "iou"}, 918_168, {"iou": 1}, "iou"),
    "retinanet_conf": Row({"cls", "box", "confidence"}, 918_168, {"confidence": 1}, "confidence"),
    "retinanet_gfl": Row({"cls", "box"}, 912_975, focal=False),
    "fcos": Row({"cls", "box", "centerness"}, 844_893, {"centerness": 1}, "centerness", steps=150, **POINTS),
    "fcos_improved": Row({"cls", "box", "centerness"}, 844_893, {"centerness": 1}, "centerness", **POINTS),
    "fcos_association": Row({"cls", "box", "association"}, 844_316, steps=120, **{**POINTS, "normalisers": {}}),
    "iou_aware_fcos": Row(
        {"cls", "box", "centerness", "iou"}, 845_470, {"centerness": 1, "iou": 1}, "iou", steps=250, **POINTS
    ),
    "ssd300": Row({"cls", "box"}, 732_576, **LEVELS_300),
    "ssd512": Row({"cls", "box"}, 780_848, like="ssd300", **LEVELS_512),
    "fssd300": Row({"cls", "box"}, 941_568, **LEVELS_300),
    "fssd512": Row({"cls", "box"}, 1_006_192, like="fssd300", **LEVELS_512),
    "dssd320": Row({"cls", "box"}, 1_314_160, **{**LEVELS_300, "per_cell": 8}),
    "dssd321": Row({"cls", "box"}, 1_314_160, like="dssd320", **{**LEVELS_300, "per_cell": 8}),
    "dssd512": Row({"cls", "box"}, 1_448_208, like="dssd320", **{**LEVELS_512, "per_cell": 8}, half=0.25),
    "dssd513": Row({"cls", "box"}, 1_448_208, like="dssd320", **{**LEVELS_512, "per_cell": 8}, half=0.25),
    "refinedet320": Row(REFINED_TERMS, 1_171_832, **REFINED),
    "refinedet512": Row(REFINED_TERMS, 1_171_832, like="refinedet320", **REFINED),
    "scod320": Row({"cls", "box", "scws"}, 1_515_256, **{**LEVELS_300, "per_cell": 8}, half=0.2, **SEGMENTED),
    "scod512": Row(
        {"cls", "box", "scws"},
        1_649_304,
        like="scod320",
        **{**LEVELS_512, "per_cell": 8},
        half=0.2,
        slopes=1e-4,
        **SEGMENTED,
    ),
    "retinanet_scws": Row({"cls", "box", "scws"}, 1_014_175, **SEGMENTED),
}

EVERY_NETWORK = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if row.like else []) for name, row in ZOO.items()]
)
"""For what depends on the code alone: the same network on another size of pictures only in a whole run."""


def small(name, **options):
    """A detector for 64 to 128 pixels on the small trunk."""
    return get_model(name, **{"num_classes": 3, "backbone": "tiny", **ZOO[name].small, **options})


def thin(name, widths, channels):
    """The same, narrower: for training and compiling in seconds."""
    depth = {"depth": 1} if ZOO[name].has_towers else {}
    return small(name, backbone=TinyTrunk(widths), channels=channels, **depth)
