"""The goals that were set before anything was measured, and where each stands in the stored results.

They were set on a processor with AMX, where multiplying bfloat16 costs little and the rest weighs more. Large pictures
are 800 x 1333 (1344 with padding) and have the system's allocator; memory is counted above the inputs.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.timing import ROOT

RESULTS = ROOT / "results" / "benchmarks"
TORCHVISION, MALLOC, EVALUATION = "torchvision.json", "torchvision_malloc.json", "evaluation.json"

Measured = tuple[float, float, float]
"""Median, and the middle half from low to high."""


def faster(row: Mapping[str, Any]) -> Measured:
    """How many times faster ours is."""
    return row["ratio"], row["ratio_low"], row["ratio_high"]


def over_network(row: Mapping[str, Any]) -> Measured:
    """A whole step's time over its network's alone."""
    return 1 / row["ratio"], 1 / row["ratio_high"], 1 / row["ratio_low"]


def less_memory(row: Mapping[str, Any]) -> Measured:
    """Our memory over theirs, above the inputs; measured once."""
    share = row["ours_peak_mb"] / row["theirs_peak_mb"]
    return share, share, share


@dataclass(frozen=True)
class Goal:
    """What is wanted of one row of one file.

    Args:
        what: is measured, in words.
        file: in ``results/benchmarks``.
        row: name of the row.
        must: the least that was asked for; the most where ``value`` is better small.
        stretch: what was hoped for.
        value: of the row.
    """

    what: str
    file: str
    row: str
    must: float
    stretch: float
    value: Callable[[Mapping[str, Any]], Measured] = faster

    @property
    def is_at_most(self) -> bool:
        """Whether less is better."""
        return self.value is not faster

    def reached(self, measured: float) -> str:
        """The word for it: ``stretch``, ``must`` or ``missed``."""
        sign = -1 if self.is_at_most else 1
        for word, goal in (("stretch", self.stretch), ("must", self.must)):
            if sign * measured >= sign * goal:
                return word
        return "missed"


_LOSS = "RetinaNet: assignment + loss, forward and backward"
GOALS = (
    Goal("RetinaNet: assignment + loss", TORCHVISION, f"{_LOSS}, B=4", 3.5, 5),
    Goal("RetinaNet: assignment + loss, compiled", TORCHVISION, f"{_LOSS}, compiled kernels, B=4", 6, 10),
    Goal("RetinaNet: assignment + loss, large pictures", MALLOC, f"{_LOSS}, large pictures, B=4", 8, 17),
    Goal("RetinaNet: memory of these over theirs", "growth.json", "B=4, M=7, 800 x 1333 px", 0.45, 0.4, less_memory),
    Goal("RetinaNet: matching, 320 px", TORCHVISION, "RetinaNet: matching, 320 x 320, 50 objects, B=4", 4, 6),
    Goal("RetinaNet: matching, 800 x 1344", TORCHVISION, "RetinaNet: matching, 800 x 1344, 50 objects, B=4", 12, 24),
    Goal("RetinaNet: post-processing", TORCHVISION, "RetinaNet: post-processing, B=8", 2.5, 4),
    Goal(
        "RetinaNet: post-processing, large pictures",
        MALLOC,
        "RetinaNet: post-processing, large pictures, B=1",
        4.5,
        6,
    ),
    Goal("SSD300: post-processing", TORCHVISION, "SSD300: post-processing, B=8", 2.5, 4),
    Goal("RetinaNet: step, fp32", TORCHVISION, "RetinaNet: training step, fp32, B=4", 1.10, 1.23),
    Goal("RetinaNet: step, bf16", TORCHVISION, "RetinaNet: training step, bf16, B=4", 1.15, 1.35),
    Goal("FCOS: step, fp32", TORCHVISION, "FCOS: training step, fp32, B=4", 1.0, 1.1),
    Goal("SSD300: step, fp32", TORCHVISION, "SSD300: training step, fp32, B=4", 1.0, 1.1),
    Goal("RetinaNet: inference, fp32", TORCHVISION, "RetinaNet: inference, fp32, B=1", 1.08, 1.2),
    Goal("RetinaNet: inference, bf16", TORCHVISION, "RetinaNet: inference, bf16, B=1", 1.35, 1.6),
    Goal("RetinaNet: inference, bf16, compiled", TORCHVISION, "RetinaNet: inference, compiled, bf16, B=1", 1.5, 2),
    Goal(
        "RetinaNet: step over its network, fp32",
        "limits.json",
        "RetinaNet: network alone over step, fp32, B=4",
        1.08,
        1.05,
        over_network,
    ),
    Goal(
        "RetinaNet: step over its network, bf16",
        "limits.json",
        "RetinaNet: network alone over step, bf16, B=4",
        1.15,
        1.10,
        over_network,
    ),
    Goal("COCO evaluation over pycocotools", EVALUATION, "5000 pictures: evaluate + accumulate, pycocotools", 25, 40),
    Goal(
        "COCO evaluation over faster-coco-eval",
        EVALUATION,
        "5000 pictures: evaluate + accumulate, faster-coco-eval",
        3,
        5,
    ),
    Goal(
        "SSD300: augmentation without colours",
        TORCHVISION,
        "SSD300: augmentation without colours, theirs on uint8, 16 pictures",
        8,
        14,
    ),
    Goal("SSD300: augmentation", TORCHVISION, "SSD300: augmentation, theirs on uint8, 16 pictures", 8, 19),
)

BESIDE_FLOAT32 = tuple(
    replace(
        goal,
        what=f"{goal.what}, theirs in fp32",
        file="mixed.json",
        row=goal.row.replace("bf16", "bf16 beside fp32"),
    )
    for goal in GOALS
    if goal.file == TORCHVISION and "bf16" in goal.row
)
"""The same asked of ours in bfloat16 beside theirs in float32: where a processor has no bfloat16, torch works it out in
slow loops, and to be ahead of those says little."""


def measured(goals: Sequence[Goal] = GOALS, folder: pathlib.Path = RESULTS) -> dict[Goal, Measured]:
    """What the files in a folder say of those goals whose row they have."""
    found = {}
    for goal in goals:
        path = folder / goal.file
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []:
            if row["name"] == goal.row:
                found[goal] = goal.value(row)
    return found


def report(folder: pathlib.Path = RESULTS) -> str:
    """Lines to print: every goal, what was measured, and which of the two it reaches."""
    found = measured(GOALS + BESIDE_FLOAT32, folder)
    wide = max(len(goal.what) for goal in found or GOALS)
    lines = [f"{'':{wide}}  {'must':>8}  {'stretch':>8}  {'measured':>8}  (middle half)"]
    for goal in (*GOALS, *(goal for goal in BESIDE_FLOAT32 if goal in found)):
        sign = "<=" if goal.is_at_most else ">="
        wanted = f"{goal.what:{wide}}  {f'{sign} {goal.must:g}':>8}  {goal.stretch:>8g}"
        if goal not in found:
            lines.append(f"{wanted}  {'-':>8}")
            continue
        value, low, high = found[goal]
        lines.append(f"{wanted}  {value:8.2f}  ({low:.2f} to {high:.2f})  {goal.reached(value)}")
    return "\n".join(lines)
