"""What SCOD's labels and their loss cost beside a training step: ``python -m benchmarks.scod``.

Sides are timed in turns, as in :mod:`benchmarks.timing`; the number to look at is how many times longer a step takes.
The trunk is the small one: on a ResNet the step is longer and the labels cost the same.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks.synthetic import objects
from benchmarks.timing import ROOT, Row, Timing, time_all
from detcore.losses.segmentation import weak_segmentation_labels, weak_segmentation_term
from detcore.models import get_model
from detcore.structures import BACKGROUND, Targets, pad_targets

OUTPUT = ROOT / "results" / "benchmarks" / "scod.json"
SETTING = {"batch": 8, "objects": 40, "size": 320, "num_classes": 20, "backbone": "tiny", "limit": 0.02}
QUICK = SETTING | {"batch": 2, "objects": 5, "size": 128}


def by_loop(cells: Tensor, areas: Tensor, targets: Targets) -> Tensor:
    """The labels, one picture and one object after another, largest first."""
    x, y = ((cells[0, :, :2] + cells[0, :, 2:]) / 2).unbind(-1)
    low, high = areas[0].unbind(-1)
    labels = torch.full((len(targets.boxes), cells.shape[1]), BACKGROUND)
    for row, boxes, classes, valid in zip(labels, targets.boxes, targets.labels, targets.valid, strict=True):
        own = [((b[2] - b[0]) * (b[3] - b[1]), b, c) for b, c in zip(boxes[valid], classes[valid], strict=True)]
        for size, (x1, y1, x2, y2), label in sorted(own, key=lambda each: -each[0]):
            row[(x >= x1) & (x < x2) & (y >= y1) & (y < y2) & (size > low) & (size < high)] = label
    return labels


def rows(setting: dict) -> dict[str, Callable[[], Row]]:
    """A training step, and the labels' whole loss, beside the labels alone."""
    torch.manual_seed(0)
    detector = get_model("scod320", num_classes=setting["num_classes"], backbone=setting["backbone"]).train()
    images = torch.rand(setting["batch"], 3, setting["size"], setting["size"])
    targets = pad_targets(objects(setting["batch"], images.shape[2:], setting["objects"], setting["num_classes"]))
    optimiser = torch.optim.SGD(detector.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
    with torch.no_grad():
        pred = detector.predict(images)
        match = detector.match(pred.priors, targets)
    cells, areas = pred.aside["segmentation_cells"], pred.aside["segmentation_areas"]

    def step() -> Tensor:
        loss = sum(detector.loss(images, targets).values())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    def labels() -> Tensor:
        return weak_segmentation_labels(cells, areas, targets)

    def check() -> None:
        found = labels()
        assert (found >= 0).sum() > 10
        assert_close(found, by_loop(cells, areas, targets))

    title = f"B={setting['batch']}, {setting['objects']} objects, {setting['size']} px"
    return {
        "labels": lambda: Row(f"training step over labels: {title}", check, step, labels),
        "term": lambda: Row(
            f"training step over labels and loss: {title}", check, step, lambda: weak_segmentation_term(pred, match)
        ),
        "loop": lambda: Row(
            f"labels in a loop over labels: {title}", check, lambda: by_loop(cells, areas, targets), labels
        ),
    }


def main(arguments: list[str] | None = None) -> list[Timing]:
    """Check, time, print, write; fail where the labels cost more than the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scod", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small pictures and 3 repeats: does it run? not a result")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help="JSON file; not written by --quick")
    options = parser.parse_args(arguments)
    setting = QUICK if options.quick else SETTING
    timings = time_all(
        functools.partial(rows, setting),
        "other",
        module="scod",
        arguments=arguments,
        output=None if options.quick else options.output,
        setting=setting,
        repeats=3 if options.quick else 15,
        budget=60.0,
    )
    cost = timings[0].ours_ms / timings[0].theirs_ms
    print(f"labels: {100 * cost:.2f} % of a step")
    if not options.quick and cost > setting["limit"]:
        raise SystemExit(f"benchmarks.scod: labels must cost at most {setting['limit']:.0%} of a step.")
    return timings


if __name__ == "__main__":
    main()
