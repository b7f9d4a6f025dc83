"""What it costs to bring pictures from one loader worker to the training process: ``python -m benchmarks.transport``.

Theirs is what torchvision's reference scripts do: a list of float pictures and a list of dicts. Ours is a
:class:`detcore.data.loader.Batch`: one block of uint8 and padded targets. The pictures lie ready in memory, 300 x 300,
so neither decodes nor augments. The clock counts the processor time of both processes, of starting the worker too.
"""

import argparse
import pathlib
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset

from benchmarks.synthetic import objects
from benchmarks.timing import ROOT, Row, Timing, measure, table, write
from detcore.data.batch import Batch
from detcore.data.loader import make_loader

OUTPUT = ROOT / "results" / "benchmarks" / "transport.json"
SETTING = {"pictures": 1024, "size": 300, "objects": 7, "batch": 32, "workers": 1}
QUICK = SETTING | {"pictures": 64, "size": 96, "batch": 8}


class Ready(Dataset):
    """Pictures with objects that lie in memory: as ours come, uint8, or as theirs do, float in 0..1."""

    def __init__(self, setting: dict[str, int], *, as_float: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (64, 3, setting["size"], setting["size"])  # 64 different ones do
        self.pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        self.targets = objects(64, shape[2:], setting["objects"], 20)
        self.length, self.as_float = setting["pictures"], as_float

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        pixels = self.pixels[index % 64]
        return pixels.float() / 255 if self.as_float else pixels, {**self.targets[index % 64], "image_id": index}


def as_lists(samples: list[tuple[Tensor, dict[str, Any]]]) -> tuple[tuple[Any, ...], ...]:
    """``collate_fn`` of torchvision's references/detection/utils.py."""
    return tuple(zip(*samples, strict=True))


def both_processes() -> float:
    """Processor seconds of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def transport_row(setting: dict[str, int]) -> Row:
    """All pictures through a loader with one worker, which ends with it."""
    floats, bytes_ = (Ready(setting, as_float=as_float) for as_float in (True, False))

    def through(make: Callable[[], Any]) -> list[Any]:
        kept = []
        for batch in make():
            if not kept:  # one batch, to compare
                kept.append(batch)
        return kept

    def their_loader() -> DataLoader:
        return DataLoader(floats, setting["batch"], num_workers=setting["workers"], collate_fn=as_lists)

    def our_loader() -> Any:
        options = {"batch_size": setting["batch"], "shuffle": False, "num_workers": setting["workers"], "multiple": 1}
        return make_loader(bytes_, None, **options)  # its worker ends with it

    def by_torchvision() -> list[Any]:
        return through(their_loader)

    def by_detcore() -> list[Batch]:
        return through(our_loader)

    def check() -> None:
        [(images, targets)], [batch] = by_torchvision(), by_detcore()
        assert batch.images.dtype == torch.uint8
        assert_close(batch.images.float() / 255, torch.stack(images))
        for i, target in enumerate(targets):
            kept = batch.targets.valid[i]
            assert_close(batch.targets.boxes[i][kept], target["boxes"])
            assert_close(batch.targets.labels[i][kept], target["labels"])
        assert batch.image_ids.tolist() == [target["image_id"] for target in targets]

    name = f"{setting['pictures']} pictures of {setting['size']} px through one worker, B={setting['batch']}"
    return Row(name, check, by_torchvision, by_detcore)


def main(arguments: list[str] | None = None) -> list[Timing]:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transport", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few small pictures: does it run? not a result")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each side")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help="JSON file; not written by --quick")
    options = parser.parse_args(arguments)
    setting = QUICK if options.quick else SETTING
    torch.set_num_threads(1)
    row = transport_row(setting)
    row.check()
    timing = measure(row, repeats=3 if options.quick else options.repeats, clock=both_processes)
    print(table([timing], "torchvision"))
    speeds = [1000 * setting["pictures"] / each for each in (timing.theirs_ms, timing.ours_ms)]
    print(f"pictures a processor second: torchvision's way {speeds[0]:.0f}, detcore {speeds[1]:.0f}")
    if not options.quick:
        command = " ".join(["python -m benchmarks.transport", *(sys.argv[1:] if arguments is None else arguments)])
        clock = "CPU time of process and worker, sides interleaved; ratio is the median of paired ratios"
        allocator = "system's default"
        write(options.output, [timing], command=command, allocator=allocator, setting=setting, clock=clock)
    return [timing]


if __name__ == "__main__":
    main()
