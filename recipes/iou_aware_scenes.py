"""RetinaNet against IoU-aware RetinaNet on scenes, several seeds each; AP against alpha.

Command:  python -m recipes.iou_aware_scenes
Hardware: one core of an AMD EPYC (bf16 through AVX-512), about 5 minutes a run
Result:   results/iou_aware_scenes.json

The seed sets the weights, the order of the pictures and their flips; pictures and boxes are the
same for all. A run that stands in the result file with the same configuration is not made again,
so an interrupted command goes on where it was. The last
epoch's averaged weights are evaluated once. The settings are not blind: before they were fixed, one trial
of another size (128 pixels, 3 epochs) was evaluated on pictures of the test split.
"""

import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from detcore.data import Scenes
from detcore.data.loader import CachedDataset, CachedLoader
from detcore.evaluation import CocoEvaluator, collect, diagnose, threshold_grid
from detcore.models import get_model
from detcore.provenance import provenance
from detcore.scoring import class_score, fused_score, iou_aware_powers
from detcore.training import TrainConfig, train

VARIANTS: dict[str, dict[str, Any]] = {
    "retinanet": {"name": "retinanet"},
    "iou_aware": {"name": "iou_aware_retinanet"},
    "iou_aware_attached": {"name": "iou_aware_retinanet", "detach_iou_target": False},
    "iou_aware_l2": {"name": "iou_aware_retinanet", "quality_loss": "l2"},
}
ALPHAS = tuple(round(0.1 * k, 1) for k in range(11))
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
        anchor_base: side of the smallest anchor in strides.
        threads: processor threads.
        output: the result file.
    """

    variants: tuple[str, ...] = ("retinanet", "iou_aware", "iou_aware_attached")
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
    output: Path = Path("results/iou_aware_scenes.json")

    def settings(self) -> dict[str, Any]:
        """What a run depends on besides its variant and seed."""
        left_out = ("variants", "seeds", "threads", "output")
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def main(recipe: Recipe) -> None:
    """Make every run that is not in the result file yet."""
    torch.set_num_threads(recipe.threads)
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
        run = _run(recipe, variant, seed, cached, held_out)
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


def _run(recipe: Recipe, variant: str, seed: int, cached: CachedDataset, held_out: CachedDataset) -> dict[str, Any]:
    torch.manual_seed(seed)
    options = dict(VARIANTS[variant])
    model = get_model(
        options.pop("name"),
        num_classes=len(cached.classes),
        backbone="tiny",
        anchor_base=recipe.anchor_base,
        **options,
    )
    loader = CachedLoader(cached, batch_size=recipe.batch_size, shuffle=True, seed=seed, flip=0.5, drop_last=True)
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
    seconds = time.perf_counter() - start
    loader = CachedLoader(held_out, batch_size=50, shuffle=False)
    measured = _measure(history.model, loader, held_out, fused=variant != "retinanet")
    losses = [{"step": row["step"], **row["losses"]} for row in history.steps]
    where = provenance()
    return {"variant": variant, "seed": seed, "seconds": round(seconds, 1), "provenance": where, **measured} | {
        "losses": losses
    }


def _measure(model: torch.nn.Module, loader: CachedLoader, data: CachedDataset, *, fused: bool) -> dict[str, Any]:
    """AP as the paper scores it and for every alpha of its Eq. (5), and the misalignment report."""
    num_classes = len(data.classes)
    select, score = model.select, model.score

    def found(scorer, selector=select):
        model.score, model.select = scorer, selector
        detections, targets = collect(model, loader, data, progress=False)
        model.score, model.select = score, select
        return detections, targets

    def average_precision(scorer) -> dict[str, float]:
        evaluator = CocoEvaluator(num_classes, iou_thresholds=threshold_grid())
        evaluator.update(*found(scorer))
        numbers = evaluator.compute()
        return {name: round(numbers[name], 5) for name in KEPT if numbers[name] == numbers[name]}  # nan: no such size

    detections, targets = found(score)
    candidates, _ = found(score, partial(select, nms_iou=None, max_detections=1000))
    report = diagnose(detections, targets, num_classes, candidates=candidates, bootstrap=200)
    measured = {"metrics": average_precision(score), "misalignment": report.as_dict()}
    if not fused:
        return measured
    measured["class_score_only"] = average_precision(class_score)
    sweep = []
    for alpha in ALPHAS:
        u, v = iou_aware_powers(alpha)
        row = average_precision(partial(fused_score, class_power=u, quality_power=v))
        sweep.append({"alpha": alpha, "class_power": u, "quality_power": round(v, 1), **row})
    measured["alpha_sweep"] = sweep
    measured["product"] = average_precision(partial(fused_score, class_power=1.0, quality_power=1.0))
    return measured


if __name__ == "__main__":
    main(tyro.cli(Recipe))
