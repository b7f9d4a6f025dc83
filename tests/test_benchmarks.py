"""The benchmarks compare equals: their checks pass on small inputs, and fail where the two sides differ."""

import dataclasses
import json

import pytest
import torch

from benchmarks import convolutions, gpu, limits, mixed, timing
from benchmarks.augmentation import assert_alike, reference_chain, samples
from benchmarks.cases import CASES
from benchmarks.timing import measure
from benchmarks.torchvision import (
    QUICK,
    assert_same_detections,
    assert_similar_detections,
    objects,
    rows,
    step_row,
)
from detcore.data.transforms import ssd_transform
from detcore.kernels import halves
from detcore.kernels.winograd import winograd_convolution

# Not below 65 pixels: there P7 is made from a map of one cell, and the weight gradient of that convolution in
# bfloat16 reads memory that nobody wrote (torch 2.15 on processors with AVX512-BF16).
SMALL = dataclasses.replace(QUICK, size=(96, 128), num_classes=5, detect_batches=(2,), per_level=50)
ROWS = rows(SMALL)
# SSD300 has no smaller sister: its networks take seconds, and so do pictures enough to compare on average
SLOW_PARTS = ("ssd300-step", "ssd300-inference", "augmentation", "compiled")
SLOW = [name for name in ROWS if any(part in name for part in SLOW_PARTS)]


# The shape hook breaks a compiled detector's graph: these run with `make compile`, where it is off.
COMPILED = ("retinanet-inference-compiled",)


def mark(name):
    if name in COMPILED:
        # torch's own compiler warns about its own code
        ignored = [pytest.mark.filterwarnings(f"ignore::{w}:torch.*") for w in ("DeprecationWarning", "FutureWarning")]
        return [pytest.mark.compile, *ignored]
    return [pytest.mark.slow] if name in SLOW else []


@pytest.mark.parametrize("name", [pytest.param(n, marks=mark(n)) for n in ROWS])
def test_torchvision_and_detcore_agree(name):
    ROWS[name]().check()


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*", "ignore::FutureWarning:torch.*")
def test_graphed_step_is_torchvisions_and_trains():
    row = step_row(CASES["retinanet"], SMALL, "fp32", graphed=True)
    row.check()
    first = float(row.ours())
    assert min(float(row.ours()) for _ in range(3)) < first


def test_augmentation_check_notices_a_chain_that_never_zooms_out():
    mine, theirs = ssd_transform(300, train=True), reference_chain(pil=False)
    mine.transforms[0].zoom = 0.0
    given = samples(5)
    torch.manual_seed(0)
    sides = [lambda t=t: [t(image, dict(target)) for image, target in given] for t in (mine, theirs)]
    with pytest.raises(AssertionError, match="Greatest relative difference"):
        assert_alike(*sides, rounds=8)


@pytest.mark.parametrize("name", ["retinanet-loss", "fcos-loss"])
def test_loss_check_notices_another_loss(name):
    row = rows(SMALL)[name]()
    *_, ours = [cell.cell_contents for cell in row.ours.__closure__ if hasattr(cell.cell_contents, "losses")]
    ours.losses["cls"] = (1.001, ours.losses["cls"][1])
    with pytest.raises(AssertionError):
        row.check()


@pytest.mark.parametrize("compare", [assert_same_detections, assert_similar_detections])
def test_detection_checks_notice_a_moved_box(compare):
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    one = {"boxes": boxes, "scores": torch.tensor([0.9]), "labels": torch.tensor([1])}
    compare([one], [one])
    with pytest.raises(AssertionError):
        compare([one | {"boxes": boxes + 5}], [one])
    with pytest.raises(AssertionError):
        compare([one | {"labels": torch.tensor([2])}], [one])


def test_objects_are_sound_boxes():
    for target in objects(3, (64, 96), 7, 5):
        boxes = target["boxes"]
        assert ((boxes[:, 2:] - boxes[:, :2]) >= 8).all()
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([96, 64, 96, 64])).all()


def test_measure_takes_the_median_of_paired_ratios():
    now, cost = [0.0], iter([9.0, 9.0, 9.0, 9.0, 2.0, 1.0, 4.0, 8.0, 3.0, 1.0])  # 4 warm up; pairs swap

    def work():
        now[0] += next(cost)

    row = timing.Row("a row", check=work, theirs=work, ours=work)
    measured = timing.measure(row, repeats=3, clock=lambda: now[0])
    assert measured.ratio == 2.0  # of 2 / 1, 8 / 4 and 3 / 1
    assert (measured.theirs_ms, measured.ours_ms, measured.repeats) == (3000.0, 1000.0, 3)
    assert "2.00" in timing.table([measured], "torchvision")


@pytest.mark.parametrize(("budget", "runs"), [(7.9, 1 + 3), (8.0, 2 + 3)])
def test_measure_warms_up_once_where_that_takes_the_budget(budget, runs):
    now, sides = [0.0], []

    def work(side):
        now[0] += 4.0
        sides.append(side)

    row = timing.Row("a row", check=int, theirs=lambda: work("theirs"), ours=lambda: work("ours"))
    assert timing.measure(row, repeats=20, budget=budget, clock=lambda: now[0]).repeats == 3
    assert [sides.count("theirs"), sides.count("ours")] == [runs, runs]


def test_measure_stops_when_its_budget_is_spent():
    row = timing.Row("a row", check=int, theirs=lambda: sum(range(1000)), ours=lambda: sum(range(1000)))
    assert timing.measure(row, repeats=20, budget=0.0).repeats == 3


def test_write_keeps_what_repeats_the_run(tmp_path):
    path = tmp_path / "deep" / "result.json"
    row = timing.Timing("a row", 3.0, 1.0, 3.0, 2.9, 3.1, 5)
    timing.write(path, [row], command="python -m benchmarks.torchvision", allocator="default", setting={"size": 320})
    record = json.loads(path.read_text())
    assert record["rows"] == [dataclasses.asdict(row)]
    assert {"command", "commit", "date", "device", "versions", "setting", "allocator"} <= set(record)
    assert record["device"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("name", ["fcos-step", "retinanet-inference"])
def test_bfloat16_and_float32_agree(name):
    row = mixed.rows(SMALL)[name]()
    row.check()
    assert "bf16 beside fp32" in row.name


@pytest.mark.parametrize("name", ["retinanet-limit-fp32", "fcos-limit-bf16"])
def test_network_alone_teaches_every_weight_as_a_step_does(name):
    limits.rows(SMALL)[name]().check()


@pytest.mark.parametrize(("precision", "has_bf16"), [("fp32", True), ("bf16", True), ("bf16", False)])
@pytest.mark.parametrize("is_ready", [True, False])
def test_both_ways_to_convolve_agree(precision, has_bf16, is_ready, monkeypatch):
    monkeypatch.setitem(halves.HAS, torch.bfloat16, has_bf16)
    row = convolutions.convolution_row((2, 8, 12, 9), precision, is_ready=is_ready)
    assert row.name.endswith(precision if has_bf16 else "bf16 in float32")
    row.check()
    assert measure(row, repeats=2).repeats == 2


def test_convolutions_are_timed_and_written(monkeypatch, tmp_path):
    monkeypatch.setattr(convolutions, "MAPS", ((1, 4, 4, 8),))
    monkeypatch.setattr(timing, "keep_memory", lambda: False)  # it would hold for all tests after this one
    timings = convolutions.main(["--output", str(tmp_path / "convolutions.json")])
    record = json.loads((tmp_path / "convolutions.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in record["rows"]] == [timing.name for timing in timings]
    assert len(timings) == 4
    assert record["setting"] == {"repeats": 25, "budget": 8.0}


def test_no_row_of_that_name_is_said_so():
    with pytest.raises(SystemExit, match=r"--only must be part of a row's name; got 'ssd', of .*256-256-40-4-fp32"):
        convolutions.main(["--only", "ssd"])


def test_a_convolution_that_is_wrong_is_noticed(monkeypatch):
    row = convolutions.convolution_row((2, 8, 12, 9), "fp32", is_ready=False)
    monkeypatch.setattr(convolutions, "winograd_convolution", lambda x, w: 1.001 * winograd_convolution(x, w))
    with pytest.raises(AssertionError, match="error"):
        row.check()


def test_gpu_plan_begins_with_what_matters_and_names_each_row_once():
    names = [name for name, _ in gpu.plan()]
    assert names[0] == "retinanet-step-bf16-320"
    assert len(set(names)) == len(names)
    assert {name.split("-")[0] for name in names} == {"retinanet", "fcos", "ssd300"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_benchmark_says_that_there_is_no_gpu():
    with pytest.raises(SystemExit, match="no GPU here"):
        gpu.main([])


@pytest.mark.slow
def test_gpu_benchmark_runs_on_a_processor():
    found = gpu.main(["--device", "cpu", "--quick"])
    assert [row["name"] for row in found] == [name for name, _ in gpu.quick_plan()]
    assert all(row["ours"]["kernels"] == 0 < row["ratio"] for row in found)
