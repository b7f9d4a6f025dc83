"""FCOS, with centre-ness, and with the association losses, on scenes.

Command:  python -m recipes.association_scenes
          python -m recipes.association_scenes --table beta_k
Hardware: one core of an AMD EPYC (bf16 through AVX-512)
Result:   results/association_scenes.json, results/association_beta_k.json

How a run is made: :mod:`recipes.scenes`. The second command trains 8 epochs each with every beta and k
of the paper's Table III.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from recipes import scenes


def _pse(**options: Any) -> dict[str, Any]:
    return {"name": "fcos_association", "association": "pse", **options}


VARIANTS: dict[str, dict[str, Any]] = {
    "fcos": {"name": "fcos", "centerness": None},
    "centerness": {"name": "fcos"},
    "pse": _pse(),
    "pce": {"name": "fcos_association", "association": "pce"},
    "pse_max": _pse(association_score="max"),
    "k0.8": _pse(k=0.8),
    "k1.25": _pse(k=1.25),
    "k1.5": _pse(k=1.5),
    "beta0.25": _pse(beta=0.25),
    "beta0.8": _pse(beta=0.8),
    "beta1.25": _pse(beta=1.25),
    "beta4": _pse(beta=4.0),
}
BETA_K = ("fcos", "pse", "k0.8", "k1.25", "k1.5", "beta0.25", "beta0.8", "beta1.25", "beta4")


@dataclass(frozen=True)
class Recipe(scenes.Recipe):
    """The shared settings, and which table is made.

    Args:
        table: ``"main"`` (24 epochs) or ``"beta_k"`` (8 epochs: Table III).
    """

    table: Literal["main", "beta_k"] = "main"
    variants: tuple[str, ...] = ()
    output: Path = Path("results/association_scenes.json")

    def settings(self) -> dict[str, Any]:
        """What a run depends on besides its variant and seed."""
        return {name: value for name, value in super().settings().items() if name != "table"}


def measure(trial: scenes.Trial) -> dict[str, Any]:
    """AP and the misalignment report."""
    return {"metrics": trial.average_precision(), "misalignment": trial.misalignment()}


def main(recipe: Recipe) -> None:
    """Fill in what the table decides, and run."""
    if recipe.table == "beta_k":
        recipe = replace(recipe, epochs=8, output=recipe.output.with_name("association_beta_k.json"))
    if not recipe.variants:
        recipe = replace(recipe, variants=BETA_K if recipe.table == "beta_k" else ("fcos", "centerness", "pse", "pce"))
    scenes.run_all(recipe, VARIANTS, measure)


if __name__ == "__main__":
    main(tyro.cli(Recipe))
