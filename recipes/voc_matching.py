"""How many default boxes of SSD300 each object of PASCAL VOC is matched with: from annotations alone.

Command:  DETCORE_DATA=FOLDER python -m recipes.voc_matching
Data:     FOLDER/voc_annotations: the official annotations of VOC 2007 trainval and test and VOC 2012 trainval as
          COCO JSON, gzipped; no pictures
Hardware: one core of an AMD EPYC, about two and a half minutes
Result:   results/voc_matching.json

Boxes are matched as shares of the picture, which SSD warps to 300 x 300, in float64 and ssd.pytorch's order
of operations. M is the number of default boxes that own an object, forced ones included. An augmented epoch
passes every picture's boxes once through SSD's zoom, crop and mirror; only its size is needed for that.

How many objects end without a default box (M = 0) depends on rounding: small objects lie inside several
default boxes of one size, all with the same IoU, and which of those equals is "the best" decides whether two
objects collide. ``ties`` counts it in four arithmetics, the detector's own among them.
"""

import gzip
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import tyro

from detcore import ssd_assigner
from detcore.boxes import cxcywh_to_xyxy, iou, pairwise_iou, xyxy_to_cxcywh
from detcore.data.ssd_crop import SsdCrop
from detcore.default_boxes import LAYOUTS, Clip, DefaultBoxGenerator
from detcore.evaluation import SIZES, correlate, count_matches, match_histogram, match_table, size_classes
from detcore.provenance import provenance
from detcore.ssd_assigner import ssd_assign
from detcore.structures import Assignment, Priors, Targets

SIDE = 300
LAYOUT = LAYOUTS["ssd300_voc"]
LAST_SIDE = 315.0


@dataclass(frozen=True)
class Recipe:
    """What is counted; the defaults are the claim.

    Args:
        seeds: of the augmented epochs.
        output: the result file.
    """

    seeds: tuple[int, ...] = (0, 1)
    output: Path = Path("results/voc_matching.json")


@dataclass(frozen=True)
class Objects:
    """Objects of some pictures, in continuous corners.

    Args:
        boxes: (M, 4) in original pixels.
        image: (M,) picture of each object, ascending.
        difficult: (M,).
        sizes: (N, 2) (height, width) of each picture.
    """

    boxes: np.ndarray
    image: np.ndarray
    difficult: np.ndarray
    sizes: np.ndarray

    def shares(self) -> np.ndarray:
        """The boxes as shares of their pictures."""
        height, width = self.sizes[self.image].T
        return self.boxes / np.stack([width, height, width, height], 1)


def main(recipe: Recipe) -> None:
    """Count, compare, write."""
    data = os.environ.get("DETCORE_DATA")
    if data is None:
        raise SystemExit("recipes.voc_matching: set DETCORE_DATA to the folder that holds voc_annotations.")
    started = time.process_time()
    folder = Path(data) / "voc_annotations"
    voc07 = read(folder, "train2007", "val2007")
    both = read(folder, "train2007", "val2007", "train2012", "val2012")
    test = read(folder, "test2007")
    results: dict[str, Any] = {
        "layout": "ssd300_voc",
        "objects_by_size": objects_by_size(test),
        "voc07": {
            f"{rule}, {clip or 'unclipped'}": describe(voc07, counted(voc07, rule=rule, clip=clip))
            for rule in ("override", "bipartite")
            for clip in (None, "cxcywh", "corners")
        },
        "voc0712": {
            f"{rule}, unclipped": describe(both, counted(both, rule=rule)) for rule in ("override", "bipartite")
        },
        "augmented": [
            {"rule": rule, "seed": seed, **augmented(both, rule, seed, of_2007=len(voc07.sizes))}
            for rule, seed in [*(("some", seed) for seed in recipe.seeds), ("all", recipe.seeds[0])]
        ],
        "ties": ties(voc07),
        "shapes": shapes(),
        "positives": positives(voc07),
    }
    results["seconds"] = round(time.process_time() - started, 1)
    results["provenance"] = provenance()
    recipe.output.parent.mkdir(parents=True, exist_ok=True)
    part = recipe.output.with_suffix(".part")
    part.write_text(json.dumps(rounded(results), indent=1) + "\n")
    part.replace(recipe.output)


def read(folder: Path, *names: str) -> Objects:
    """Objects of some of the annotation files, their pictures counted on."""
    sizes, counts, boxes, difficult = [], [], [], []
    for name in names:
        content = json.loads(gzip.decompress((folder / f"pascal_{name}.json.gz").read_bytes()))
        own: dict[int, list[Any]] = {picture["id"]: [] for picture in content["images"]}
        for row in content["annotations"]:
            own[row["image_id"]].append(row)
        for picture in content["images"]:
            rows = own[picture["id"]]
            sizes.append((picture["height"], picture["width"]))
            counts.append(len(rows))
            boxes += [row["bbox"] for row in rows]
            difficult += [row["ignore"] == 1 for row in rows]
    xywh = np.array(boxes, dtype=np.float64)
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
    return Objects(corners, np.repeat(np.arange(len(sizes)), counts), np.array(difficult), np.array(sizes))


def priors_of(clip: Clip | None = None) -> Priors:
    """SSD300's default boxes as shares of the picture in float64, rounded as ssd.pytorch rounds them."""
    unit = replace(LAYOUT, sides=tuple(side / SIDE for side in LAYOUT.sides), last_side=LAST_SIDE / SIDE)
    rows = []
    for level, (cells, step) in enumerate(zip(LAYOUT.maps, LAYOUT.steps or (), strict=True)):
        centres = [(cell + 0.5) / (SIDE / step) for cell in range(cells)]
        rows += [(x, y, *shape) for y, x, shape in product(centres, centres, unit.shapes(level))]
    centred = torch.tensor(rows, dtype=torch.float64)
    corners = cxcywh_to_xyxy(centred.clamp(0, 1) if clip == "cxcywh" else centred)
    return Priors((corners.clamp(0, 1) if clip == "corners" else corners)[None], (len(rows),))


def counted(objects: Objects, *, rule: Any = "override", clip: Clip | None = None) -> np.ndarray:
    """M of every object."""
    return count_matches(objects.shares(), objects.image, priors_of(clip), partial(ssd_assign, rule=rule))


def area(boxes: np.ndarray) -> np.ndarray:
    """Square pixels."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def objects_by_size(test: Objects) -> dict[str, list[int]]:
    """Objects of VOC 2007 test that are not difficult: small, medium, large, by three definitions of a pixel."""
    easy = ~test.difficult
    measures = {
        "original pixels": area(test.boxes),
        "original pixels, without the last": area(test.boxes - [0, 0, 1, 1]),
        "warped to 300 x 300": area(test.shares() * SIDE),
    }
    return {name: np.bincount(size_classes(values[easy]), minlength=3).tolist() for name, values in measures.items()}


def describe(objects: Objects, counts: np.ndarray) -> dict[str, Any]:
    """What there is to say of M, with difficult objects and without."""
    at_input = objects.shares() * SIDE
    return {
        name: summary(counts[rows], {"original": area(objects.boxes)[rows], "at 300": area(at_input)[rows]})
        | {"elongated": elongated(counts[rows], at_input[rows])}
        for name, rows in {"all": objects.difficult | True, "not difficult": ~objects.difficult}.items()
    }


def summary(counts: np.ndarray, areas: dict[str, np.ndarray]) -> dict[str, Any]:
    """Histogram, mean, shares by size, and what the five weights make of them."""
    owned = counts[counts > 0]
    loads = {"const": owned, "inv_log": owned / (np.log(owned) + 1), "inv_sqrt": owned**0.5,
             "inv": np.ones(len(owned)), "scb": np.log(owned) + 1}  # fmt: skip
    return {
        "objects": len(counts),
        "positives": int(counts.sum()),
        "mean": counts.mean(),
        "histogram": match_histogram(counts, last=60).tolist(),
        "share_above_10": (counts > 10).mean(),
        "by_size": {name: match_table(counts, size_classes(values), SIZES) for name, values in areas.items()},
        # the weight of a whole object is M times that of one of its priors
        "mean_weight": {form: load.sum() / owned.sum() for form, load in loads.items()},
        "loss_share_up_to_5": {form: load[owned <= 5].sum() / load.sum() for form, load in loads.items()},
    }


def elongated(counts: np.ndarray, at_input: np.ndarray) -> dict[str, Any]:
    """M of large objects by how many times their long side is their short side, warped."""
    sides = at_input[:, 2:] - at_input[:, :2]
    large = size_classes(area(at_input)) == 2
    aspect = sides.max(1) / sides.min(1)
    groups = np.searchsorted([1.5, 2.5, 4.0], aspect[large], side="right")
    return match_table(counts[large], groups, ("to 1.5", "to 2.5", "to 4", "above 4"))


def augmented(objects: Objects, rule: str, seed: int, *, of_2007: int) -> dict[str, Any]:
    """One epoch of zoom, crop and mirror; objects that are lost or under a pixel wide are not counted."""
    crop = SsdCrop(SIDE, rule=rule)
    torch.manual_seed(seed)
    bounds = np.searchsorted(objects.image, np.arange(len(objects.sizes) + 1))
    kept, boxes = [], []
    for i, size in enumerate(objects.sizes.tolist()):
        rows = np.arange(bounds[i], bounds[i + 1])
        target = {"boxes": torch.from_numpy(objects.boxes[rows]), "labels": torch.from_numpy(rows)}
        moved = crop.move_boxes(target, tuple(size))
        corners = moved["boxes"].as_subclass(torch.Tensor).clamp(0, SIDE).numpy()
        if torch.rand(()).item() < 0.5:
            corners = np.stack([SIDE - corners[:, 2], corners[:, 1], SIDE - corners[:, 0], corners[:, 3]], 1)
        sound = (corners[:, 2:] - corners[:, :2] >= 1).all(1)
        kept.append(moved["labels"].numpy()[sound])
        boxes.append(corners[sound].astype(np.float64))
    rows, corners = np.concatenate(kept), np.concatenate(boxes)
    image = objects.image[rows]
    counts = count_matches(corners / SIDE, image, priors_of(), ssd_assign)
    areas = {"original": area(objects.boxes)[rows], "at 300": area(corners)}
    first = image < of_2007
    return {
        "voc0712": summary(counts, areas),
        "voc07": summary(counts[first], {name: values[first] for name, values in areas.items()}),
    }


def ties(objects: Objects) -> dict[str, dict[str, int]]:
    """Positives, and objects with M = 0 and 1, where equal overlaps are told apart by rounding and where not."""
    shares, image = objects.shares(), objects.image
    maps = [torch.zeros(1, 1, f, f) for f in LAYOUT.maps]
    pixels = DefaultBoxGenerator(LAYOUT)(maps, (SIDE, SIDE))  # float32, as in the detector
    double = priors_of()
    single = Priors(double.boxes.float(), double.counts)

    def to_nine_digits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return pairwise_iou(a, b).mul(1e9).round().div(1e9)

    found = {
        "float64 shares of the picture": count_matches(shares, image, double, ssd_assign),
        "float32 shares of the picture": count_matches(shares, image, single, ssd_assign),
        "float32 pixels": count_matches(shares * SIDE, image, pixels, ssd_assign),
    }
    with mock.patch.object(ssd_assigner, "pairwise_iou", to_nine_digits):
        found["equal overlaps to the first"] = count_matches(shares, image, double, ssd_assign)
    return {
        name: {"positives": int(m.sum()), "unmatched": int((m == 0).sum()), "one": int((m == 1).sum())}
        for name, m in found.items()
    }


def shapes() -> dict[str, dict[str, float]]:
    """M of one box at 31 x 31 places inside the picture: squares of some sides, shapes of area 96 x 96."""
    boxes = {f"square {side}": (side, side) for side in (16, 21, 24, 32, 48, 64, 96, 128, 192, 240)}
    boxes |= {f"area 96 x 96, {ratio}:1": (96 * ratio**0.5, 96 / ratio**0.5) for ratio in (1, 2, 3, 4, 5)}
    return {name: at_many_places(width, height) for name, (width, height) in boxes.items()}


def at_many_places(width: float, height: float) -> dict[str, float]:
    """Mean, smallest and largest M of a box of this size."""
    x, y = np.meshgrid(np.linspace(0, SIDE - width, 31), np.linspace(0, SIDE - height, 31))
    x, y = x.ravel(), y.ravel()
    boxes = np.stack([x, y, x + width, y + height], 1) / SIDE
    counts = count_matches(boxes, np.arange(len(x)), priors_of(), ssd_assign)
    return {"mean": counts.mean(), "min": int(counts.min()), "max": int(counts.max())}


def matched_boxes(objects: Objects) -> tuple[torch.Tensor, torch.Tensor]:
    """Default boxes that own an object, and the boxes of these objects, as shares of the picture."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def matcher(priors: Priors, targets: Targets) -> Assignment:
        match = ssd_assign(priors, targets)
        seen.append((priors.boxes.expand_as(match.boxes)[match.positive], match.boxes[match.positive]))
        return match

    count_matches(objects.shares(), objects.image, priors_of(), matcher)
    mine, theirs = (torch.cat(side) for side in zip(*seen, strict=True))
    return mine, theirs


def positives(objects: Objects) -> dict[str, Any]:
    """IoU of default boxes with their objects, and what squeezing both boxes does to it."""
    mine, theirs = matched_boxes(objects)
    plain = iou(mine, theirs)
    bins = np.searchsorted([0.5, 0.6, 0.7, 0.8], plain.numpy(), side="right")
    squeezed = {beta: iou(squeeze(mine, beta), squeeze(theirs, beta)) for beta in (0.8, 0.6)}
    excess = ((1 - squeezed[0.8]) / (1 - plain).clamp(min=1e-12) - 1).numpy()
    edges = np.searchsorted([0.5, 0.6, 0.7, 0.8, 0.9], plain.numpy(), side="right")
    return {
        "positives": len(plain),
        "share_by_iou": dict(
            zip(("below 0.5", "0.5-0.6", "0.6-0.7", "0.7-0.8", "above 0.8"), shares(bins, 5), strict=True)
        ),
        "without_gradient": {str(beta): int((values == 0).sum()) for beta, values in squeezed.items()},
        "excess_by_iou": [excess[edges == k].mean() for k in range(1, 6)],
        "excess_spearman": correlate(
            excess, plain.numpy(), np.zeros(len(excess), dtype=np.int64), bootstrap=0
        ).spearman,
        "share_unchanged": (np.abs(excess) < 1e-6).mean(),
    }


def squeeze(boxes: torch.Tensor, beta: float) -> torch.Tensor:
    """The same centres, sides times ``beta``."""
    return cxcywh_to_xyxy(xyxy_to_cxcywh(boxes) * boxes.new_tensor([1, 1, beta, beta]))


def shares(groups: np.ndarray, number: int) -> Iterable[float]:
    """Share of each group."""
    return (np.bincount(groups, minlength=number) / len(groups)).tolist()


def rounded(value: Any) -> Any:
    """Floats with five digits behind the point, NumPy's among them."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(float(value), 5) if isinstance(value, float | np.floating) else value


if __name__ == "__main__":
    main(tyro.cli(Recipe))
