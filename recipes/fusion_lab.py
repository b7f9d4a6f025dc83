"""What one trained RetinaNet-Conf says of held-out scenes, for the book's score-fusion laboratory.

Command:  python -m recipes.fusion_lab
Hardware: one core of an AMD EPYC (bf16 through AVX-512), about 5 minutes
Result:   results/fusion_lab.npz

The detector is the first run of recipes.retinanet_conf_scenes: variant conf, seed 0, the settings of
:mod:`recipes.scenes`. They were fixed beforehand and nothing was tuned on the test pictures, of which
the first ``stored_images`` go into the file. Stored is every pair of prior and class with a class
probability above ``floor``: 0.05, the papers' threshold, laid on the class score. So the file is the whole
truth on the detector with ``threshold_on="classes"``, whatever the exponents. By default the same 0.05
cuts the fused score; that lets through boxes down to p = 0.007, ten times as many and too many for a small file.
Floor and number of pictures were chosen for the size of the file, not for average precision. Beside it
stand the detector's own numbers, without pruning and rounding, so that the file can be held to them.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

from detcore.data import Scenes
from detcore.data.loader import CachedDataset, CachedLoader
from detcore.evaluation import CocoEvaluator
from detcore.postprocess import ThresholdOn, select_by_prior
from detcore.provenance import provenance
from detcore.scoring import fused_score
from detcore.stored import StoredOutputs, prune, save_outputs
from detcore.structures import Predictions, Priors
from recipes import scenes
from recipes.retinanet_conf_scenes import VARIANTS

# Powers of class score and confidence, score threshold and what it cuts, NMS IoU: what the file is held to.
# The last is the detector as it comes; there the file lacks boxes.
REFERENCES = (
    (0.6, 0.4, 0.05, "classes", 0.5),
    (1.0, 0.0, 0.05, "classes", 0.5),
    (0.2, 0.8, 0.05, "classes", 0.5),
    (1.0, 1.0, 0.05, "ranking", 0.5),
    (0.6, 0.4, 0.3, "ranking", 0.7),
    (0.6, 0.4, 0.05, "ranking", 0.5),
)


@dataclass(frozen=True)
class Recipe(scenes.Recipe):
    """The shared settings, and what is stored.

    Args:
        variant: which detector of recipes.retinanet_conf_scenes.
        seed: of its training.
        stored_images: held-out pictures, the first ones.
        floor: class probability above which a pair of prior and class is stored.
    """

    variant: str = "conf"
    seed: int = 0
    stored_images: int = 200
    floor: float = 0.05
    output: Path = Path("results/fusion_lab.npz")

    def settings(self) -> dict[str, Any]:
        """What the run depends on."""
        left_out = ("seeds", "test_images")
        return {name: value for name, value in super().settings().items() if name not in left_out}


@torch.no_grad()
def predict(model: nn.Module, data: CachedDataset) -> Predictions:
    """The raw outputs for all pictures as one batch."""
    parts = [model.eval().predict(batch.images) for batch in CachedLoader(data, batch_size=50, shuffle=False)]
    return Predictions(
        logits=torch.cat([part.logits for part in parts]),
        deltas=torch.cat([part.deltas for part in parts]),
        boxes=torch.cat([part.boxes for part in parts]),
        priors=Priors(parts[0].priors.boxes, parts[0].priors.counts),
        extras={name: torch.cat([part.extras[name] for part in parts]) for name in parts[0].extras},
    )


def measure(
    outputs: StoredOutputs, u: float, v: float, threshold: float, threshold_on: ThresholdOn, nms_iou: float
) -> dict[str, Any]:
    """What the detector finds with these settings, in numbers."""
    found = outputs.detect(
        partial(fused_score, quality="confidence", class_power=u, quality_power=v),
        partial(select_by_prior, score_threshold=threshold, threshold_on=threshold_on, nms_iou=nms_iou),
    )
    evaluator = CocoEvaluator(len(outputs.about["classes"]), by_size=False)
    evaluator.update(found, outputs.targets)
    numbers = evaluator.compute()
    given = {"class_power": u, "quality_power": v, "score_threshold": threshold, "threshold_on": threshold_on}
    given["nms_iou"] = nms_iou
    kept = {name: round(numbers[name], 6) for name in ("AP", "AP50", "AP75", "AP90")}
    return given | kept | {"boxes": sum(len(each["labels"]) for each in found)}


def main(recipe: Recipe) -> None:
    """Train, look at the held-out pictures once, store."""
    torch.set_num_threads(recipe.threads)
    training = Scenes(recipe.images, size=recipe.size, noise=recipe.noise, split="train")
    data = CachedDataset(training, progress=False)
    model, seconds, _ = scenes.fit(recipe, VARIANTS[recipe.variant], recipe.seed, data)
    held_out = Scenes(recipe.stored_images, size=recipe.size, split="test")
    pred = predict(model, CachedDataset(held_out, progress=False))
    sizes = torch.full((recipe.stored_images, 2), recipe.size)
    targets = [held_out.target(i) for i in range(recipe.stored_images)]
    about = {
        "detector": VARIANTS[recipe.variant],
        "classes": list(held_out.classes),
        "pictures": {"num_images": recipe.stored_images, "size": recipe.size, "split": "test", "seed": 0},
        "settings": recipe.settings(),
        "training_seconds": seconds,
        "provenance": provenance(),
    }
    whole = StoredOutputs(pred, sizes, targets, about)
    about["detector_says"] = [measure(whole, *setting) for setting in REFERENCES]
    save_outputs(recipe.output, StoredOutputs(prune(pred, recipe.floor), sizes, targets, about))
    print(f"{recipe.output}: {recipe.output.stat().st_size / 1000:.0f} kB, trained in {seconds:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Recipe))
