"""Ours in bfloat16 beside torchvision's in float32: ``python -m benchmarks.mixed``.

Where a processor multiplies bfloat16, this is what it wins together with the rest. Where it does not, torch is slowest
in bfloat16, so a ratio there flatters; float32 is the best that torchvision can do.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable
from dataclasses import asdict

from benchmarks.cases import CASES
from benchmarks.timing import ROOT, Row, Timing, time_all
from benchmarks.torchvision import QUICK, Setting, inference_row, step_row

OUTPUT = ROOT / "results" / "benchmarks" / "mixed.json"


def rows(setting: Setting) -> dict[str, Callable[[], Row]]:
    """Training steps and inference, one picture at a time."""
    made: dict[str, Callable[[], Row]] = {}
    for key, case in CASES.items():
        made[f"{key}-step"] = functools.partial(step_row, case, setting, "bf16", theirs_in="fp32")
    for key, case in CASES.items():
        made[f"{key}-inference"] = functools.partial(inference_row, case, setting, 1, "bf16", theirs_in="fp32")
    made["retinanet-inference-compiled"] = functools.partial(
        inference_row, CASES["retinanet"], setting, 1, "bf16", theirs_in="fp32", compiled=True
    )
    return made


def main(arguments: list[str] | None = None) -> list[Timing]:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixed", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small pictures and 3 repeats: does it run? not a result")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains TEXT; not written")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help="JSON file; not written by --quick")
    options = parser.parse_args(arguments)
    setting = QUICK if options.quick else Setting()
    return time_all(
        functools.partial(rows, setting),
        "torchvision",
        module="mixed",
        arguments=arguments,
        output=None if options.quick or options.only else options.output,
        setting=asdict(setting),
        repeats=setting.repeats,
        budget=setting.budget,
        only=options.only,
        is_apart=True,
    )


if __name__ == "__main__":
    main()
