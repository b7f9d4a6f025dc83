"""What SCOD's two parts make of PASCAL VOC before any training: from annotations alone.

Command:  DETCORE_DATA=FOLDER python -m recipes.scod_voc
Data:     FOLDER/voc_annotations, as for :mod:`recipes.voc_matching`
Hardware: one core of an AMD EPYC, a quarter of a minute
Result:   results/scod_voc.json

``box_gradients``: SSD300's default boxes that own an object of VOC 2007 trainval, at the start of training, when the
predicted box is the default box. Of each box loss the size of the gradient by the four encoded offsets (variances 0.1
and 0.2), which is the sum of the four absolute values, and what share of it all the boxes of each IoU carry.
``centres`` is the part by the two offsets of the centre, ``sides`` the rest.

``pairs``: some of these default boxes as seen from their object, whose centre is 0 and whose sides are 1: centre x and
y, width, height.

``layers``: which block of SCOD answers for which objects of VOC 2007 and 2012 trainval, after the picture was warped;
and what share of each block's cells is on an object, in the pictures of VOC 2007 trainval. Without difficult objects.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from detcore.boxes import adaptive_iou, iou, xyxy_to_cxcywh
from detcore.default_boxes import LAYOUTS
from detcore.losses.functional import smooth_l1_loss
from detcore.losses.segmentation import area_ranges, segmentation_cells, weak_segmentation_labels
from detcore.models.ssd import SSD_CODER
from detcore.provenance import provenance
from detcore.structures import BACKGROUND, pad_targets
from recipes.voc_matching import Objects, area, matched_boxes, read, rounded

EDGES = (0.5, 0.6, 0.7, 0.8, 0.9)
BINS = ("below 0.5", "0.5-0.6", "0.6-0.7", "0.7-0.8", "0.8-0.9", "above 0.9")
BETAS = (0.9, 0.8, 0.7, 0.6)
BLOCKS = 4


@dataclass(frozen=True)
class Recipe:
    """Where the counts go.

    Args:
        output: the result file.
    """

    output: Path = Path("results/scod_voc.json")


def main(recipe: Recipe) -> None:
    """Count and write."""
    data = os.environ.get("DETCORE_DATA")
    if data is None:
        raise SystemExit("recipes.scod_voc: set DETCORE_DATA to the folder that holds voc_annotations.")
    started = time.process_time()
    folder = Path(data) / "voc_annotations"
    voc07 = read(folder, "train2007", "val2007")
    both = read(folder, "train2007", "val2007", "train2012", "val2012")
    matched = matched_boxes(voc07)
    results: dict[str, Any] = {
        "box_gradients": box_gradients(*matched),
        "pairs": pairs(*matched),
        "layers": {name: layers(name, both, voc07) for name in ("dssd320", "dssd512")},
    }
    results["seconds"] = round(time.process_time() - started, 1)
    results["provenance"] = provenance()
    recipe.output.parent.mkdir(parents=True, exist_ok=True)
    part = recipe.output.with_suffix(".part")
    part.write_text(json.dumps(rounded(results), indent=1) + "\n")
    part.replace(recipe.output)


def losses_of(beta: float | None) -> Callable[[Tensor, Tensor], Tensor]:
    """1 - AIoU; without a beta 1 - IoU."""
    if beta is None:
        return lambda boxes, wanted: 1 - iou(boxes, wanted)
    return lambda boxes, wanted: 1 - adaptive_iou(boxes, wanted, beta=beta)


def gradient(priors: Tensor, wanted: Tensor, loss: Callable[[Tensor, Tensor], Tensor] | None) -> Tensor:
    """By the four encoded offsets, where they are 0; ``None`` is smooth L1 on them."""
    offsets = torch.zeros_like(priors, requires_grad=True)
    if loss is None:
        value = smooth_l1_loss(offsets, SSD_CODER.encode(wanted, priors), beta=1.0)
    else:
        value = loss(SSD_CODER.decode(offsets, priors), wanted)
    return torch.autograd.grad(value.sum(), offsets)[0]


def box_gradients(priors: Tensor, wanted: Tensor) -> dict[str, Any]:
    """Of each box loss: mean size of the gradient in each bin of IoU, and the share that the bin carries."""
    bins = np.searchsorted(EDGES, iou(priors, wanted).numpy(), side="right")
    found: dict[str, Any] = {
        "bins": list(BINS),
        "positives": len(bins),
        "share_of_positives": (np.bincount(bins, minlength=len(BINS)) / len(bins)).tolist(),
    }
    kinds = {"smooth_l1": None, "iou": losses_of(None), **{f"aiou{beta}": losses_of(beta) for beta in BETAS}}
    for name, loss in kinds.items():
        slopes = gradient(priors, wanted, loss)
        size = slopes.abs().sum(1).numpy()
        carried = np.bincount(bins, size, minlength=len(BINS))
        found[name] = {
            "mean": size.mean(),
            "mean_by_iou": (carried / np.bincount(bins, minlength=len(BINS)).clip(min=1)).tolist(),
            "share_by_iou": (carried / size.sum()).tolist(),
            "centres": slopes[:, :2].abs().sum(1).mean().item(),
            "sides": slopes[:, 2:].abs().sum(1).mean().item(),
        }
    return found


def pairs(priors: Tensor, wanted: Tensor, *, number: int = 240) -> list[list[float]]:
    """Every so many-th default box, seen from its object."""
    every = len(priors) // number
    mine, theirs = (xyxy_to_cxcywh(boxes[::every][:number]) for boxes in (priors, wanted))
    seen = torch.cat([(mine[:, :2] - theirs[:, :2]) / theirs[:, 2:], mine[:, 2:] / theirs[:, 2:]], dim=1)
    return [[round(value, 3) for value in row] for row in seen.tolist()]


def layers(name: str, both: Objects, voc07: Objects) -> dict[str, Any]:
    """Objects of each block, and share of its cells that are on one."""
    layout = LAYOUTS[name]
    ranges = area_ranges(layout.side_ranges[:BLOCKS])
    top = area_ranges(layout.side_ranges[:BLOCKS], open_top=False)[-1][1]
    sizes = area(both.shares() * layout.size)[~both.difficult]
    share = [((sizes > low) & (sizes < high)).mean() for low, high in ranges]
    return {
        "upper_bounds": [high for _, high in ranges[:-1]] + [top],
        "share_of_objects": share,
        "share_above_strict_top": (sizes >= top).mean(),
    } | cells(layout.size, layout.maps[:BLOCKS], ranges, voc07)


def cells(size: int, maps: tuple[int, ...], ranges: tuple[tuple[float, float], ...], voc07: Objects) -> dict[str, Any]:
    """Over all pictures: cells on an object, and objects of a block whose box holds no cell's centre."""
    where, areas = segmentation_cells([(side, side) for side in maps], (size, size), ranges)
    counts = [side * side for side in maps]
    easy = ~voc07.difficult
    boxes = torch.from_numpy(voc07.shares()[easy] * size).float()
    bounds = np.searchsorted(voc07.image[easy], np.arange(len(voc07.sizes) + 1)).tolist()
    on_object = np.zeros(len(maps))
    for first in range(0, len(voc07.sizes), 64):
        own = [boxes[bounds[i] : bounds[i + 1]] for i in range(first, min(first + 64, len(voc07.sizes)))]
        targets = pad_targets([{"boxes": b, "labels": torch.zeros(len(b), dtype=torch.int64)} for b in own])
        labels = weak_segmentation_labels(where, areas, targets)
        on_object += [int((part != BACKGROUND).sum()) for part in labels.split(counts, dim=1)]
    without, centres = [], ((where[0, :, :2] + where[0, :, 2:]) / 2).split(counts)
    extent = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for (low, high), points in zip(ranges, centres, strict=True):
        mine = boxes[(extent > low) & (extent < high), None]
        held = ((points >= mine[..., :2]) & (points < mine[..., 2:])).all(-1).any(-1)
        without.append((~held).double().mean().item())
    return {
        "cells_on_an_object": (on_object / len(voc07.sizes) / counts).tolist(),
        "objects_without_a_cell": without,
    }


if __name__ == "__main__":
    main(tyro.cli(Recipe))
