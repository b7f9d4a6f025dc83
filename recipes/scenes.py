"""What the recipes on scenes share: train variants of detectors on several seeds, measure, keep every run.

The seed sets the weights, the order of the pictures and their flips; pictures and boxes are the
same for all. A run that stands in the result file with the same configuration is not made again,
so an interrupted command goes on where it was. The last epoch's averaged weights are evaluated
once on pictures of the test split. The settings are not blind: before they were fixed, one trial of
another size (RetinaNet, 128 pixels, 3 epochs) was evaluated on pictures of that split. Nothing else was.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detcore.boxes import iou
from detcore.data import Scenes
from detcore.data.loader import CachedDataset, CachedLoader
from detcore.evaluation import CocoEvaluator, collect, diagnose, threshold_grid
from detcore.models import get_model
from detcore.provenance import provenance
from detcore.training import TrainConfig, train

KEPT = ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90", "AP_small", "AP_medium", "AP_large", "AR100")


@dataclass(frozen=True)
class Recipe:
    """What is run; the defaults are the claim.

    Args:
        variants: which detectors.
        seeds: which seeds.
        epochs: passes over the training pictures.
        images: training pictures.
        test_images: held-out pictures.
        size: side of a picture in pixels.
        noise: annotation noise of the training boxes; test boxes have none.
        batch_size: pictures a step.
        lr: peak learning rate.
        anchor_base: side of the smallest anchor of RetinaNet in strides; FCOS's level ranges are scaled alike.
        threads: processor threads.
        output: the result file.
    """

    variants: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 24
    images: int = 2000
    test_images: int = 500
    size: int = 96
    noise: float = 0.1
    batch_size: int = 16
    lr: float = 2e-3
    anchor_base: float = 1.5
    threads: int = 1
    output: Path = Path("results/scenes.json")

    def settings(self) -> dict[str, Any]:
        """What a run depends on besides its variant and seed."""
        left_out = ("variants", "seeds", "threads", "output")
        return {name: value for name, value in asdict(self).items() if name not in left_out}


@dataclass(frozen=True)
class Trial:
    """A trained detector and the held-out pictures, to be measured."""

    variant: str
    model: nn.Module
    data: CachedDataset
    batch_size: int = 50

    def detections(self, scorer=None, selector=None):
        """Detections and targets of every held-out picture, under another score or selection if given."""
        score, select = self.model.score, self.model.select
        self.model.score, self.model.select = scorer or score, selector or select
        loader = CachedLoader(self.data, batch_size=self.batch_size, shuffle=False)
        found = collect(self.model, loader, self.data, progress=False)
        self.model.score, self.model.select = score, select
        return found

    def average_precision(self, scorer=None, selector=None) -> dict[str, float]:
        """COCO's numbers that are kept, rounded; sizes that no object has are left out."""
        evaluator = CocoEvaluator(len(self.data.classes), iou_thresholds=threshold_grid())
        evaluator.update(*self.detections(scorer, selector))
        numbers = evaluator.compute()
        return {name: round(numbers[name], 5) for name in KEPT if numbers[name] == numbers[name]}

    def misalignment(self) -> dict[str, Any]:
        """The report of :func:`detcore.evaluation.diagnose`, candidates before suppression included."""
        detections, targets = self.detections()
        everything = partial(self.model.select, nms_iou=None, max_detections=1000)
        candidates, _ = self.detections(selector=everything)
        return diagnose(detections, targets, len(self.data.classes), candidates=candidates, bootstrap=200).as_dict()

    @torch.no_grad()
    def quality_error(self, name: str) -> dict[str, float]:
        """How far the quality map ``name`` is from the IoU reached, over the positives of the held-out pictures."""
        said, reached = [], []
        for batch in CachedLoader(self.data, batch_size=self.batch_size, shuffle=False):
            pred = self.model.predict(batch.images)
            match = self.model.match(pred.priors, batch.targets)
            said.append(pred.extras[name][..., 0].sigmoid()[match.positive])
            reached.append(iou(pred.boxes, match.boxes)[match.positive])
        q, t = torch.cat(said).double(), torch.cat(reached).double()
        return {
            "positives": len(q),
            "mean_absolute_error": round((q - t).abs().mean().item(), 5),
            "constant_error": round((t - t.median()).abs().mean().item(), 5),  # of always answering the median
            "bias": round((q - t).mean().item(), 5),
            "pearson": round(torch.corrcoef(torch.stack([q, t]))[0, 1].item(), 5),
        }


def run_all(
    recipe: Recipe, variants: Mapping[str, Mapping[str, Any]], measure: Callable[[Trial], dict[str, Any]]
) -> None:
    """Make every run that is not in the result file yet.

    Args:
        recipe: settings, seeds and which variants.
        variants: options of :func:`detcore.models.get_model` by variant.
        measure: a trained detector to what is written about it.
    """
    torch.set_num_threads(recipe.threads)
    unknown = sorted(set(recipe.variants) - set(variants))
    if unknown:
        raise SystemExit(f"variants must be among {sorted(variants)}; got {unknown}.")
    results = _read(recipe)
    done = {(run["variant"], run["seed"]) for run in results["runs"]}
    missing = [(v, s) for s in recipe.seeds for v in recipe.variants if (v, s) not in done]
    if not missing:
        return
    training = Scenes(recipe.images, size=recipe.size, noise=recipe.noise, split="train")
    test = Scenes(recipe.test_images, size=recipe.size, split="test")
    cached, held_out = CachedDataset(training, progress=False), CachedDataset(test, progress=False)
    for variant, seed in missing:
        print(f"{variant}, seed {seed}", flush=True)
        model, seconds, losses = fit(recipe, variants[variant], seed, cached)
        run = {"variant": variant, "seed": seed, "seconds": seconds, "provenance": provenance()}
        run |= measure(Trial(variant, model, held_out)) | {"losses": losses}
        print(f"  AP {run['metrics']['AP']:.4f} in {run['seconds']:.0f} s", flush=True)
        results["runs"].append(run)
        recipe.output.parent.mkdir(parents=True, exist_ok=True)
        partial_file = recipe.output.with_suffix(".part")
        partial_file.write_text(json.dumps(results, indent=1) + "\n")
        partial_file.replace(recipe.output)


def _read(recipe: Recipe) -> dict[str, Any]:
    if recipe.output.exists():
        results = json.loads(recipe.output.read_text())
        if results["settings"] != json.loads(json.dumps(recipe.settings())):
            raise SystemExit(f"{recipe.output} holds runs of other settings; give another --output.")
        return results
    return {"settings": recipe.settings(), "runs": []}


def fit(recipe: Recipe, options: Mapping[str, Any], seed: int, data: CachedDataset):
    """A detector trained with the recipe's settings, the seconds it took and its losses."""
    torch.manual_seed(seed)
    options = dict(options)
    name = options.pop("name")
    # FCOS has no anchors: its level ranges, 8 strides where anchors have 4, shrink by the same factor. Default
    # boxes of the SSD family are shares of the picture and need no factor.
    scale: dict[str, Any] = {}
    if "fcos" in name:
        scale = {"range_base": 2 * recipe.anchor_base}
    elif "retinanet" in name:
        scale = {"anchor_base": recipe.anchor_base}
    model = get_model(name, num_classes=len(data.classes), backbone="tiny", **scale, **options)
    loader = CachedLoader(data, batch_size=recipe.batch_size, shuffle=True, seed=seed, flip=0.5, drop_last=True)
    config = TrainConfig(
        epochs=recipe.epochs,
        lr=recipe.lr,
        optimizer="adamw",
        weight_decay=0.05,
        decay_norm_and_bias=False,
        schedule="cosine",
        warmup_steps=200,
        clip_norm=10.0,
        ema_decay=0.998,
        precision="bf16",
        seed=seed,
        log_every=50,
        progress=False,
    )
    start = time.perf_counter()
    history = train(model, loader, config)
    seconds = round(time.perf_counter() - start, 1)
    return history.model, seconds, [{"step": row["step"], **row["losses"]} for row in history.steps]
