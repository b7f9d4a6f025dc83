"""The comparisons of :mod:`benchmarks.torchvision` on a GPU, in at most ten minutes: ``python -m benchmarks.gpu``.

Wall time between synchronisations, sides in turns. Beside it what decides it on a GPU: how many kernels each side
starts, how often the processor waits for the GPU, and the peak of its memory. Rows come in order of interest and each
is written as soon as it is measured, so a run that is cut short is worth what it has.

Reasoned beforehand for an H200 (x over torchvision): training step of RetinaNet on ResNet-50 at 320 pixels, B=16, at
least 2.5; at about 1.1 megapixels 1.3; FCOS 1.8, SSD300 at B=32 1.3; loss alone 20; post-processing of RetinaNet 10,
of SSD300 20.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks import torchvision
from benchmarks.timing import ROOT, Row, Timing, measure, table, write
from benchmarks.torchvision import QUICK, Setting

OUTPUT = ROOT / "results" / "benchmarks" / "gpu.json"
LARGE = (800, 1333)


@dataclass(frozen=True)
class Side:
    """What one run of a side asks of the GPU.

    Args:
        kernels: how many it starts, graphs counted as one.
        waits: how often the processor waits for it.
        peak_mb: most memory held at once, in MiB.
    """

    kernels: int
    waits: int
    peak_mb: float


def plan() -> Iterator[tuple[str, Callable[[], Row]]]:
    """Name and maker of every row, the most telling first."""
    usual = replace(Setting(), backbone="resnet50", batch=16, detect_batches=(8, 1))
    small, large = torchvision.rows(usual), torchvision.rows(replace(usual, size=LARGE, batch=8, detect_batches=(8,)))
    many = torchvision.rows(replace(usual, batch=32))
    first = ("retinanet-step-bf16", "retinanet-loss", "retinanet-postprocess-8", "fcos-step-bf16")
    for key in first:
        yield f"{key}-320", small.pop(key)
    yield "ssd300-step-bf16-32", many["ssd300-step-bf16"]
    for key in ("retinanet-step-bf16", "retinanet-loss", "retinanet-postprocess-8"):
        yield f"{key}-800x1333", large[key]
    retinanet = torchvision.CASES["retinanet"]
    yield (
        "retinanet-step-bf16-320-graphs",
        partial(torchvision.step_row, retinanet, usual, "bf16", graphed=True),
    )
    for batch in usual.detect_batches:
        build = partial(torchvision.inference_row, retinanet, usual, batch, "bf16", compiled=True)
        yield f"retinanet-inference-bf16-{batch}-320-graphs", build
    for key, build in small.items():
        if "augmentation" not in key and key != "retinanet-inference-compiled":
            yield f"{key}-320", build


def quick_plan() -> Iterator[tuple[str, Callable[[], Row]]]:
    """One row of each kind, small."""
    made = torchvision.rows(replace(QUICK, size=(96, 96), num_classes=5, detect_batches=(2,), per_level=50))
    for key in ("retinanet-loss", "retinanet-postprocess-2", "retinanet-step-fp32", "retinanet-inference-fp32-2"):
        yield key, made[key]


def synchronised(device: torch.device) -> Callable[[], float]:
    """Wall time at which everything asked of ``device`` is done."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def inspect(run: Callable[[], object], device: torch.device) -> Side:
    """One run under the profiler, and one for its memory; zeros where there is no GPU."""
    if device.type != "cuda":
        return Side(0, 0, 0.0)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) / 2**20
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        run()
    counts = {event.key: event.count for event in profile.key_averages()}
    kernels = sum(n for key, n in counts.items() if "LaunchKernel" in key or "GraphLaunch" in key)
    # the profiler's own synchronisation at the end is one of DeviceSynchronize
    waits = sum(n for key, n in counts.items() if "StreamSynchronize" in key or "EventSynchronize" in key)
    return Side(kernels, waits, peak)


def described(timing: Timing, row: Row, device: torch.device) -> dict[str, Any]:
    """The row as it is written."""
    theirs, ours = (inspect(run, device) for run in (row.theirs, row.ours))
    return asdict(timing) | {"theirs": asdict(theirs), "ours": asdict(ours)}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Check, time, inspect, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cpu shows that it runs, nothing more")
    parser.add_argument("--minutes", type=float, default=9.0, help="no further row starts after so many")
    parser.add_argument("--quick", action="store_true", help="small pictures and 3 repeats: does it run? not a result")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help="JSON file; not written by --quick")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: there is no GPU here; --device cpu --quick shows that the rows run.")
    record = {
        "command": " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)]),
        "allocator": "torch's own",
        "setting": {
            "minutes": options.minutes,
            "backbone": "resnet50",
            "batches": [8, 16, 32],
            "sizes": [Setting().size, LARGE],
        },
        "clock": "wall time between synchronisations, sides interleaved; ratio is the median of paired ratios",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    clock, end = synchronised(device), time.perf_counter() + 60 * options.minutes
    timings, found = [], []
    with device:
        for name, build in quick_plan() if options.quick else plan():
            if time.perf_counter() > end:
                print(f"{name}: no time left", file=sys.stderr, flush=True)
                continue
            row = build()
            row.check()
            timing = replace(measure(row, repeats=3 if options.quick else 20, budget=20.0, clock=clock), name=name)
            timings.append(timing)
            found.append(described(timing, row, device))
            print(
                f"{name}: {timing.ratio:.2f}  {found[-1]['theirs']}  {found[-1]['ours']}", file=sys.stderr, flush=True
            )
            if not options.quick:
                write(options.output, found, **record)
    print(table(timings, "torchvision"))
    return found


if __name__ == "__main__":
    main()
