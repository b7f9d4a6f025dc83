"""RetinaNet-Conf and the quality focal head on scenes: main comparison, quality losses, score fusion.

Command:  python -m recipes.retinanet_conf_scenes
          python -m recipes.retinanet_conf_scenes --table losses
Hardware: one core of an AMD EPYC (bf16 through AVX-512), about 5 minutes a run of the first, 2 of the second
Result:   results/retinanet_conf_scenes.json, results/retinanet_conf_losses.json

How a run is made: :mod:`recipes.scenes`. The first command has the settings of recipes.iou_aware_scenes,
whose RetinaNet and IoU-aware runs stand beside these: every detector here has the smooth L1 box loss
of those (the paper's own is L1), so that heads differ and nothing else. The second trains 12 epochs
each with every quality loss of the paper's Table 2, and once with the quality on the box tower.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

from detcore.scoring import class_score, conf_powers, fused_score
from recipes import scenes


def _conf(**options: Any) -> dict[str, Any]:
    return {"name": "retinanet_conf", "box_loss": "smooth_l1", **options}


VARIANTS: dict[str, dict[str, Any]] = {
    "conf": _conf(),
    "gfl": {"name": "retinanet_gfl"},
    "retinanet": {"name": "retinanet"},
    "box_tower": {"name": "iou_aware_retinanet"},  # the same quality, told from the other tower
    "l1": _conf(quality_loss="l1"),
    "smooth_l1": _conf(quality_loss="smooth_l1"),
    "l2": _conf(quality_loss="l2"),
    "qfl": _conf(quality_loss="qfl"),
    "ce": _conf(),
    "ce_w1e-3": _conf(negative_weight=1e-3),
    "ce_w1e-4": _conf(negative_weight=1e-4),
}
ALPHAS = tuple(round(0.1 * k, 1) for k in range(11))
LOSSES = ("retinanet", "ce", "box_tower", "l1", "smooth_l1", "l2", "qfl", "ce_w1e-3", "ce_w1e-4")
# The rows of the paper's Table 4: powers of class score and confidence, and the filter.
SCORES = {
    "cls": (1.0, 0.0, None),
    "cls, conf > 0.5": (1.0, 0.0, 0.5),
    "cls * conf": (1.0, 1.0, None),
    "cls * conf, conf > 0.5": (1.0, 1.0, 0.5),
    "product 0.4, conf > 0.5": (*conf_powers(0.4), 0.5),
    "product 0.4": (*conf_powers(0.4), None),
}


@dataclass(frozen=True)
class Recipe(scenes.Recipe):
    """The shared settings, and which table is made.

    Args:
        table: ``"main"`` (24 epochs: conf, gfl) or ``"losses"`` (12 epochs: Table 2's quality losses).
    """

    table: Literal["main", "losses"] = "main"
    variants: tuple[str, ...] = ()
    output: Path = Path("results/retinanet_conf_scenes.json")

    def settings(self) -> dict[str, Any]:
        """What a run depends on besides its variant and seed."""
        return {name: value for name, value in super().settings().items() if name != "table"}


def measure(trial: scenes.Trial, *, table: str) -> dict[str, Any]:
    """AP as the paper scores it, with class scores only, the misalignment report, the confidence's error.

    The main table adds the scores of Table 4 and every alpha of Table 5.
    """
    measured = {"metrics": trial.average_precision(), "misalignment": trial.misalignment()}
    quality = next((name for name in ("confidence", "iou") if name in trial.model.head.outputs), None)
    if quality is None:
        return measured
    measured["quality_error"] = trial.quality_error(quality)
    measured["class_score_only"] = trial.average_precision(class_score)
    if table == "losses" or quality == "iou":
        return measured
    scores = {}
    for name, (u, v, least) in SCORES.items():
        scorer = partial(fused_score, quality="confidence", class_power=u, quality_power=v, min_quality=least)
        scores[name] = trial.average_precision(scorer)
    sweep = []
    for alpha in ALPHAS:
        u, v = conf_powers(alpha)
        row = trial.average_precision(partial(fused_score, quality="confidence", class_power=u, quality_power=v))
        sweep.append({"alpha": alpha, "class_power": round(u, 1), "quality_power": v, **row})
    return measured | {"scores": scores, "alpha_sweep": sweep}


def main(recipe: Recipe) -> None:
    """Fill in what the table decides, and run."""
    if recipe.table == "losses":
        recipe = replace(recipe, epochs=12, output=recipe.output.with_name("retinanet_conf_losses.json"))
    if not recipe.variants:
        recipe = replace(recipe, variants=LOSSES if recipe.table == "losses" else ("conf", "gfl"))
    scenes.run_all(recipe, VARIANTS, partial(measure, table=recipe.table))


if __name__ == "__main__":
    main(tyro.cli(Recipe))
