"""DSSD, SCOD's blocks one by one, and the AIoU loss beside the IoU loss made stronger, on scenes.

Command:  python -m recipes.scod_scenes
          python -m recipes.scod_scenes --table beta
          python -m recipes.scod_scenes --table retinanet
          python -m recipes.scod_scenes --table strength
Hardware: one core of an AMD EPYC (bf16 through AVX-512)
Result:   results/scod_scenes.json, results/scod_beta.json, results/scod_retinanet.json, results/scod_strength.json

How a run is made: :mod:`recipes.scenes`; half as many epochs. The first command is the paper's Table 2 and a control
that it lacks. Near the object the AIoU loss is the IoU loss times 1/beta = 1.25, and its gradient on SSD300's
anchors at the start of training 1.09 times that of the IoU loss: is a stronger IoU loss as good? The second is the
rest of Table 3, whose beta 0.8 is the first's ``scod`` and whose beta 1 its ``iou``, bit for bit. The third takes
both ideas to RetinaNet. The fourth asks of the shape of the losses alone: smooth L1's gradient on SSD300's anchors at
the start is 12.9 times that of the IoU loss and 11.9 times that of the AIoU loss (``box_gradients`` of
results/scod_voc.json), so each is made as strong.

``voc`` is the paper's AP on VOC, mean over IoU 0.5 to 0.9 in steps of 0.1, by the 11 points of 2007, which its
other rows have, and by area.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from detcore.evaluation import VocEvaluator
from recipes import scenes

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


def _scod(blocks: tuple[int, ...] = (1, 2, 3, 4), box_loss: str = "smooth_l1", **options: Any) -> dict[str, Any]:
    return {"name": "scod320", "blocks": blocks, "box_loss": box_loss, **options}


def _retinanet(name: str = "retinanet", box_loss: str = "giou") -> dict[str, Any]:
    return {"name": name, "box_loss": box_loss}


TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "main": {
        "dssd": {"name": "dssd320"},
        "blocks1": _scod((1,)),
        "blocks12": _scod((1, 2)),
        "blocks123": _scod((1, 2, 3)),
        "blocks1234": _scod(),
        "scod": _scod(box_loss="aiou"),
        "iou": _scod(box_loss="iou"),
        "iou_x1.09": _scod(box_loss="iou", box_weight=1.09),
        "iou_x1.25": _scod(box_loss="iou", box_weight=1.25),
    },
    "beta": {
        "beta0.9": _scod(box_loss="aiou", aiou_beta=0.9),
        "beta0.7": _scod(box_loss="aiou", aiou_beta=0.7),
        "beta0.6": _scod(box_loss="aiou", aiou_beta=0.6),
    },
    "strength": {
        "iou_x12.9": _scod(box_loss="iou", box_weight=12.9),
        "aiou_x11.9": _scod(box_loss="aiou", box_weight=11.9),
    },
    "retinanet": {
        "retinanet_giou": _retinanet(),
        "retinanet_iou": _retinanet(box_loss="iou"),
        "retinanet_aiou": _retinanet(box_loss="aiou"),
        "retinanet_scws": _retinanet("retinanet_scws"),
        "retinanet_scws_aiou": _retinanet("retinanet_scws", "aiou"),
    },
}
OUTPUTS = {"main": "scod_scenes.json"} | {name: f"scod_{name}.json" for name in TABLES if name != "main"}


@dataclass(frozen=True)
class Recipe(scenes.Recipe):
    """The shared settings, half as many epochs, and which table is made.

    Args:
        table: ``"main"`` (Table 2 and the control), ``"beta"`` (Table 3), ``"retinanet"`` or ``"strength"``.
    """

    table: Literal["main", "beta", "retinanet", "strength"] = "main"
    variants: tuple[str, ...] = ()
    epochs: int = 12
    output: Path = Path("results/scod_scenes.json")

    def settings(self) -> dict[str, Any]:
        """What a run depends on besides its variant and seed."""
        return {name: value for name, value in super().settings().items() if name != "table"}


def measure(trial: scenes.Trial) -> dict[str, Any]:
    """COCO's AP, and the paper's on VOC."""
    detections, targets = trial.detections()
    voc = {}
    for interpolation in ("11point", "area"):
        judge = VocEvaluator(len(trial.data.classes), iou_threshold=THRESHOLDS, interpolation=interpolation)
        judge.update(detections, targets)
        voc[interpolation] = {name: round(value, 5) for name, value in judge.compute().items()}
    return {"metrics": trial.average_precision(), "voc": voc}


def main(recipe: Recipe) -> None:
    """Fill in what the table decides, and run."""
    variants = TABLES[recipe.table]
    recipe = replace(
        recipe,
        variants=recipe.variants or tuple(variants),
        output=recipe.output.with_name(OUTPUTS[recipe.table]),
    )
    scenes.run_all(recipe, variants, measure)


if __name__ == "__main__":
    main(tyro.cli(Recipe))
