"""The measurements that the book shows: goals set before they were made, and where they are missed."""

import json
import re
from pathlib import Path

import pytest
import torch

from detcore.kernels import winograd

RESULTS = Path(__file__).parents[1] / "results" / "benchmarks"


def rows(name):
    return {row["name"]: row for row in json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]}


# part of a row's name -> at least so many times torchvision's speed
GOALS = {
    "RetinaNet: assignment + loss, forward and backward, B=4": 3.5,
    "RetinaNet: assignment + loss, forward and backward, compiled kernels, B=4": 6.0,
    "RetinaNet: matching, 320 x 320, 50 objects, B=4": 4.0,
    "RetinaNet: matching, 800 x 1344, 50 objects, B=4": 12.0,
    "RetinaNet: post-processing, B=8": 2.5,
    "SSD300: post-processing, B=8": 2.5,
    "RetinaNet: training step, fp32, B=4": 1.10,
    "FCOS: training step, fp32, B=4": 1.0,
    "SSD300: training step, fp32, B=4": 1.0,
    "RetinaNet: inference, fp32, B=1": 1.08,
    "SSD300: augmentation, theirs on uint8, 16 pictures": 8.0,
    "SSD300: augmentation without colours, theirs on uint8, 16 pictures": 8.0,
}
# Missed: the goals were set on a processor with AMX.
MISSED = {
    "RetinaNet: training step, bf16, B=4": 1.15,
    "RetinaNet: inference, bf16, B=1": 1.35,
    "RetinaNet: inference, compiled, bf16, B=1": 1.5,
}


@pytest.mark.parametrize(("name", "goal"), GOALS.items())
def test_goals_against_torchvision_are_met(name, goal):
    assert rows("torchvision.json")[name]["ratio"] >= goal


@pytest.mark.parametrize(("name", "goal"), MISSED.items())
def test_goals_that_are_missed_are_named_and_ours_is_not_slower(name, goal):
    """One that is met belongs with the others."""
    assert 1.0 <= rows("torchvision.json")[name]["ratio"] < goal


@pytest.mark.parametrize(
    ("name", "goal"),
    [
        ("RetinaNet: assignment + loss, forward and backward, large pictures, B=4", 8.0),
        ("RetinaNet: post-processing, large pictures, B=1", 4.5),
    ],
)
def test_goals_of_large_pictures_are_met_with_the_systems_allocator(name, goal):
    record = json.loads((RESULTS / "torchvision_malloc.json").read_text(encoding="utf-8"))
    assert record["allocator"].startswith("system's default")
    assert rows("torchvision_malloc.json")[name]["ratio"] >= goal


def test_loss_of_large_pictures_needs_less_than_half_the_memory():
    row = rows("growth.json")["B=4, M=7, 1024 px"]
    assert row["ours_peak_mb"] <= 0.45 * row["theirs_peak_mb"]


def test_a_step_is_hardly_more_than_its_network():
    for precision, most in (("fp32", 1.08), ("bf16", 1.15)):
        assert 1 / rows("limits.json")[f"RetinaNet: network alone over step, {precision}, B=4"]["ratio"] <= most


SIZE = re.compile(r"(\d+) to (\d+) channels, (\d+) x \d+, B=(\d+): (forwards|forwards and back), (fp32|bf16)$")


def test_winograds_way_is_taken_where_it_is_faster(monkeypatch):
    """And left where it is a tenth slower or more."""
    taken = 0
    for name, row in rows("convolutions.json").items():
        inside, outside, side, batch, what, precision = SIZE.match(name).groups()
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        monkeypatch.setitem(winograd.HAS, dtype, True)
        x = torch.empty(int(batch), int(side), int(side), int(inside)).permute(0, 3, 1, 2)
        weight = torch.empty(int(outside), int(inside), 3, 3, device="meta")
        is_taken = winograd.best_form(x, weight, dtype, is_ready=what == "forwards") is not None
        assert row["ratio"] > (1.0 if is_taken else 0.0), name
        assert is_taken or row["ratio"] < 1.1, name
        taken += is_taken
    assert taken > 10


def test_evaluation_is_ahead_of_both():
    found = rows("evaluation.json")
    for engine, goal in (("pycocotools", 25), ("faster-coco-eval", 3)):
        ratios = [row["ratio"] for name, row in found.items() if "evaluate" in name and name.endswith(engine)]
        assert ratios, list(found)
        assert min(ratios) >= goal


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_measurement_says_where_it_comes_from(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert re.fullmatch("[0-9a-f]{40}", record["commit"])
    assert record["modified"] is False
    assert record["command"].startswith("python -m benchmarks.")
    assert {"date", "device", "versions", "clock", "rows"} <= set(record)
