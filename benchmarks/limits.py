"""What a training step costs over its network alone: ``python -m benchmarks.limits``.

The network alone is pictures to predictions, backwards from slopes that are given, and the optimiser: everything of
a step but assignment and loss. With these convolutions no step is faster. The last column, alone over step, is the
share of a step that the network has: 1 at best.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import Tensor

from benchmarks.cases import CASES, Case
from benchmarks.synthetic import objects, pictures
from benchmarks.timing import ROOT, Row, Timing, time_all
from benchmarks.torchvision import QUICK, Setting, running
from detcore.structures import pad_targets

OUTPUT = ROOT / "results" / "benchmarks" / "limits.json"


def limit_row(case: Case, setting: Setting, precision: str) -> Row:
    """Both on one padded batch, as a loader hands it over, in channels_last and with the fused optimiser."""
    shape = case.shape(setting.size)
    _, ours = case.both(shape, setting.num_classes, setting.backbone)
    ours = ours.to(memory_format=torch.channels_last).train()
    images = torch.stack(pictures(setting.batch, shape))
    targets = pad_targets(objects(setting.batch, shape, setting.objects, ours.num_classes))
    optimiser = torch.optim.SGD(ours.parameters(), lr=1e-5, momentum=0.9, weight_decay=1e-4, fused=True)
    slopes: list[Tensor] = []

    def outputs() -> list[Tensor]:
        with running(precision):
            pred = ours.predict(images)
        return [pred.logits, pred.deltas, *pred.extras.values()]

    def alone() -> None:
        maps = outputs()
        slopes.extend(1e-6 * torch.randn_like(each) for each in maps[len(slopes) :])
        torch.autograd.backward(maps, slopes)
        optimiser.step()
        optimiser.zero_grad()

    def step() -> None:
        with running(precision):
            loss = sum(ours.loss(images, targets).values())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    def check() -> None:
        for side in (alone, step):
            optimiser.state.clear()
            side()
            reached = [bool(optimiser.state[p]["momentum_buffer"].any()) for p in ours.parameters()]
            assert all(reached), f"{side.__name__} reached only {sum(reached)} of {len(reached)} parameters"

    return Row(f"{case.title}: network alone over step, {precision}, B={setting.batch}", check, alone, step)


def rows(setting: Setting) -> dict[str, Callable[[], Row]]:
    """Every detector in both precisions."""
    return {
        f"{key}-limit-{precision}": functools.partial(limit_row, case, setting, precision)
        for key, case in CASES.items()
        for precision in ("fp32", "bf16")
    }


def main(arguments: list[str] | None = None) -> list[Timing]:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small pictures and 3 repeats: does it run? not a result")
    parser.add_argument("--budget", type=float, default=24.0, help="processor seconds a row, once it has three repeats")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help="JSON file; not written by --quick")
    options = parser.parse_args(arguments)
    setting = replace(QUICK if options.quick else Setting(), budget=options.budget)
    return time_all(
        functools.partial(rows, setting),
        "alone",
        module="limits",
        arguments=arguments,
        output=None if options.quick else options.output,
        setting=asdict(setting),
        repeats=setting.repeats,
        budget=setting.budget,
    )


if __name__ == "__main__":
    main()
