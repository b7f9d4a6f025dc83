"""How much of a batch is padding, with and without :mod:`detcore.data.buckets`: ``python -m benchmarks.padding DATA``.

Pictures keep their shapes and are resized to a short side; a batch is as large as its largest. *Mixed* takes them as
they come in a random order, *grouped* lets pictures of like shape share a batch. Nothing is decoded: sizes come from
the annotations.
"""

import argparse
import pathlib
import sys
from typing import Any

import torch

from benchmarks.timing import ROOT, write
from detcore.data import DetectionDataset, EpochSampler, open_dataset, size_buckets
from detcore.data.batch import padded_size
from detcore.data.buckets import Buckets
from detcore.data.transforms import ResizeShortSide

OUTPUT = ROOT / "results" / "benchmarks" / "padding.json"
SIDES = ((600, 1000), (800, 1333))
BATCHES = (2, 8, 16)


def filling(sizes: torch.Tensor, batch: int, buckets: Buckets | None) -> tuple[float, int]:
    """Share of an epoch's pixels that is padding, and how many shapes its batches have."""
    groups, canvases = (None, ()) if buckets is None else (buckets.groups.tolist(), buckets.canvases)
    sampler = EpochSampler(len(sizes), batch_size=batch, shuffle=True, seed=0, groups=groups)
    shapes, pixels = set(), 0
    for keys in sampler:
        largest = sizes[[index for _, index in keys]].amax(0).tolist()
        shape = padded_size(largest, 32, canvases)
        shapes.add(shape)
        pixels += len(keys) * shape[0] * shape[1]
    return 1 - sizes.prod(1).sum().item() / pixels, len(shapes)


def rows_of(dataset: DetectionDataset, name: str) -> list[dict[str, Any]]:
    """One row a short side and size of batch."""
    made = []
    for short, long in SIDES:
        resize, buckets = ResizeShortSide(short, long), size_buckets(dataset, short, long)
        originals = (dataset.target(index)["original_size"].tolist() for index in range(len(dataset)))
        sizes = torch.tensor([resize.size(*size) for size in originals])
        for batch in BATCHES:
            (mixed, shapes), (grouped, canvases) = (filling(sizes, batch, each) for each in (None, buckets))
            made.append(
                {"data": name, "pictures": len(dataset), "short_side": short, "long_side": long, "batch": batch}
                | {"mixed_padding": round(mixed, 4), "grouped_padding": round(grouped, 4)}
                | {"mixed_shapes": shapes, "grouped_shapes": canvases}
                | {"pixels_ratio": round((1 - grouped) / (1 - mixed), 3)}
            )
    return made


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Count, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.padding", description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", metavar="DATA", help="voc:DIR, coco:DIR, coco-json:FILE or :DIR")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help="JSON file")
    options = parser.parse_args(arguments)
    found = []
    for spec in options.data:
        dataset = open_dataset(spec, split="train")
        found += rows_of(dataset, spec.split(":")[0].upper())
        for row in found[-len(SIDES) * len(BATCHES) :]:
            print(
                f"{row['data']}, {row['pictures']} pictures, short side {row['short_side']}, B={row['batch']}: padding "
                f"{row['mixed_padding']:.1%} in {row['mixed_shapes']} shapes, grouped {row['grouped_padding']:.1%} in "
                f"{row['grouped_shapes']}; {row['pixels_ratio']:.2f} times fewer pixels"
            )
    # where the data lies is this machine's business
    kinds = " ".join(f"{spec.partition(':')[0]}:DIR" for spec in options.data)
    write(
        options.output,
        found,
        command=f"python -m benchmarks.padding {kinds}",
        allocator="system's default",
        setting={"sides": SIDES, "batches": BATCHES, "multiple": 32, "seed": 0},
        clock="none: pixels are counted",
    )
    return found


if __name__ == "__main__":
    sys.exit(not main())
