"""How the cost of RetinaNet's assignment and loss grows with batch, objects and picture size, beside torchvision's.

``python -m benchmarks.growth`` makes sure that both sides compute the same, then takes the time of both by turns, and,
in a process of its own where memory is handled as everywhere, how much each takes above what it was given.
Pictures are squares, and at last 800 x 1333.
"""

import argparse
import ctypes
import gc
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from benchmarks.cases import CASES
from benchmarks.synthetic import Shape
from benchmarks.timing import ROOT, Row, Timing, keep_memory, measure, peak_memory, table, write
from benchmarks.torchvision import Setting, loss_row

OUTPUT = ROOT / "results" / "benchmarks" / "growth.json"


@dataclass(frozen=True)
class Point:
    """What both sides are given: pictures a batch, objects a picture, height and width of a picture in pixels."""

    batch: int = 4
    objects: int = 7
    size: Shape = (320, 320)


@dataclass(frozen=True)
class Growth(Timing):
    """A timing with memory, above inputs, and its point.

    Args:
        theirs_peak_mb: megabytes.
        ours_peak_mb: the same of ours.
        batch: pictures.
        objects: of a picture.
        size: height and width of a picture in pixels.
    """

    theirs_peak_mb: float
    ours_peak_mb: float
    batch: int
    objects: int
    size: Shape


AXES = {
    "batch": (1, 2, 4, 8, 16),
    "objects": (1, 7, 30, 100),
    "size": ((320, 320), (512, 512), (768, 768), (800, 1333)),
}
QUICK = {"batch": (1, 2), "objects": (1, 7), "size": ((96, 96), (128, 128))}


def points(axes: dict[str, tuple], base: Point) -> list[Point]:
    """One axis at a time from the same base, each point once."""
    fields = asdict(base)
    made = [Point(**{**fields, axis: value}) for axis, values in axes.items() for value in values]
    return list(dict.fromkeys(made))


def row_at(point: Point, num_classes: int) -> Row:
    """Both sides at one point."""
    setting = Setting(size=point.size, num_classes=num_classes, objects=point.objects, batch=point.batch)
    row = loss_row(CASES["retinanet"], setting)
    name = f"B={point.batch}, M={point.objects}, {point.size[0]} x {point.size[1]} px"
    return Row(name, row.check, row.theirs, row.ours)


# --- memory


def used_by(work: Callable[[], object]) -> float:
    """The most megabytes that ``work`` holds at once, above what the process held before."""
    gc.collect()
    if platform.system() == "Linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew from here
    before = peak_memory()
    result = work()
    del result
    return peak_memory() - before


def memory(at: list[Point], num_classes: int) -> list[tuple[float, float]]:
    """Megabytes of both sides, theirs first, at every point; ours goes first."""
    found = []
    for point in at:
        row = row_at(point, num_classes)
        ours = used_by(row.ours)
        found.append((used_by(row.theirs), ours))
    return found


def memory_in_a_process(at: list[Point], num_classes: int) -> list[tuple[float, float]]:
    """:func:`memory` in a new process, whose allocator nobody has touched."""
    command = [sys.executable, "-m", "benchmarks.growth", "--memory", json.dumps([asdict(point) for point in at])]
    done = subprocess.run(
        [*command, "--classes", str(num_classes)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"benchmarks.growth: memory must be measured in another process; got {done.stderr}")
    return [tuple(pair) for pair in json.loads(done.stdout.splitlines()[-1])]


# --- the command


def main(arguments: list[str] | None = None) -> list[Growth]:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small points an axis: does it run? not a result")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each side, at most")
    parser.add_argument(
        "--budget", type=float, default=8.0, help="processor seconds a point, once it has three repeats"
    )
    parser.add_argument("--classes", type=int, default=80, help="logits a prior")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help="JSON file; not written by --quick")
    parser.add_argument("--memory", type=json.loads, metavar="POINTS", help="print the memory at these points as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.memory is not None:
        at = [Point(**{**fields, "size": tuple(fields["size"])}) for fields in options.memory]
        print(json.dumps(memory(at, options.classes)))
        return []

    axes = QUICK if options.quick else AXES
    at = points(axes, Point(batch=2, size=(96, 96)) if options.quick else Point())
    held = memory_in_a_process(at, options.classes)
    keeps = keep_memory()
    command = " ".join(["python -m benchmarks.growth", *(sys.argv[1:] if arguments is None else arguments)])
    allocator = "time: keeps freed memory; memory: system's default" if keeps else "system's default"
    grown: list[Growth] = []
    for point, (theirs_mb, ours_mb) in zip(at, held, strict=True):
        row = row_at(point, options.classes)
        row.check()
        timing = measure(row, repeats=3 if options.quick else options.repeats, budget=options.budget)
        grown.append(Growth(**asdict(timing), theirs_peak_mb=theirs_mb, ours_peak_mb=ours_mb, **asdict(point)))
        print(f"{row.name}: {timing.ratio:.2f}", file=sys.stderr, flush=True)
        if not options.quick:  # after each point: a run that is cut short keeps what it has
            setting = {"classes": options.classes, "axes": axes, "base": asdict(Point())}
            write(options.output, grown, command=command, allocator=allocator, setting=setting)
    print(table(grown, "torchvision"))
    for each in grown:
        print(f"{each.name}: torchvision {each.theirs_peak_mb:.0f} MB, detcore {each.ours_peak_mb:.0f} MB above inputs")
    return grown


if __name__ == "__main__":
    main()
