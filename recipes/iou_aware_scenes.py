"""RetinaNet against IoU-aware RetinaNet on scenes, several seeds each; AP against alpha.

Command:  python -m recipes.iou_aware_scenes
Hardware: one core of an AMD EPYC (bf16 through AVX-512), about 5 minutes a run
Result:   results/iou_aware_scenes.json

How a run is made: :mod:`recipes.scenes`.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from detcore.scoring import class_score, fused_score, iou_aware_powers
from recipes import scenes

VARIANTS: dict[str, dict[str, Any]] = {
    "retinanet": {"name": "retinanet"},
    "iou_aware": {"name": "iou_aware_retinanet"},
    "iou_aware_attached": {"name": "iou_aware_retinanet", "detach_iou_target": False},
    "iou_aware_l2": {"name": "iou_aware_retinanet", "quality_loss": "l2"},
}
ALPHAS = tuple(round(0.1 * k, 1) for k in range(11))


@dataclass(frozen=True)
class Recipe(scenes.Recipe):
    """The shared settings with this recipe's variants."""

    variants: tuple[str, ...] = ("retinanet", "iou_aware", "iou_aware_attached")
    output: Path = Path("results/iou_aware_scenes.json")


def measure(trial: scenes.Trial) -> dict[str, Any]:
    """AP as the paper scores it and for every alpha of its Eq. (5), and the misalignment report."""
    measured = {"metrics": trial.average_precision(), "misalignment": trial.misalignment()}
    if trial.variant == "retinanet":
        return measured
    measured["class_score_only"] = trial.average_precision(class_score)
    measured["alpha_sweep"] = []
    for alpha in ALPHAS:
        u, v = iou_aware_powers(alpha)
        row = trial.average_precision(partial(fused_score, class_power=u, quality_power=v))
        measured["alpha_sweep"].append({"alpha": alpha, "class_power": u, "quality_power": round(v, 1), **row})
    measured["product"] = trial.average_precision(partial(fused_score, class_power=1.0, quality_power=1.0))
    return measured


if __name__ == "__main__":
    scenes.run_all(tyro.cli(Recipe), VARIANTS, measure)
