"""The evaluation benchmark compares equals: same numbers first, and other numbers are refused."""

import subprocess
import sys

import pytest

from benchmarks import evaluation, timing, transport


@pytest.mark.parametrize("engine", evaluation.ENGINES)
def test_engines_give_the_same_twelve_numbers(engine):
    if engine not in evaluation.available()[0]:
        pytest.skip(evaluation.available()[1][engine])
    ours, theirs = (evaluation.run_engine(name, 12) for name in ("detcore", engine))
    assert ours["numbers"] == pytest.approx(theirs["numbers"], rel=0, abs=evaluation.TOLERANCE.get(engine, 0.0))
    assert 0.2 < ours["numbers"][0] < 0.9
    assert min(theirs[span] for span in ("ready", "evaluate")) > 0


def test_made_up_pictures_hold_what_they_should():
    detections, targets = evaluation.made_up(300)
    assert {len(found["boxes"]) for found in detections} == {100}
    assert 6 < sum(len(target["boxes"]) for target in targets) / 300 < 9
    assert sum(int(target["iscrowd"].sum()) for target in targets) > 5
    assert {len(target["boxes"]) for target in targets} > {0, 1, 2, 20}
    for sample in (*detections[:50], *targets[:50]):
        boxes = sample["boxes"]
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes * 4 == (boxes * 4).round()).all()
        assert ((sample["labels"] >= 0) & (sample["labels"] < evaluation.CLASSES)).all()


def made_run(seconds, **other):
    return {"ready": seconds / 10, "evaluate": seconds, "peak_mb": 100 * seconds, "numbers": [0.5] * 12, **other}


def test_comparison_pairs_the_rounds():
    seconds = {"pycocotools": iter([60.0, 40.0, 30.0]), "detcore": iter([2.0, 2.0, 1.0])}
    timings = evaluation.compare(9, 3, ["pycocotools", "detcore"], lambda name, _: made_run(next(seconds[name])))
    assert [timing.ratio for timing in timings] == [30.0, 30.0]  # of 30, 20 and 30
    assert (timings[0].theirs_ms, timings[0].ours_ms) == (40000.0, 2000.0)
    assert (timings[0].theirs_peak_mb, timings[0].ours_peak_mb, timings[0].pictures) == (4000.0, 200.0, 9)


@pytest.mark.parametrize(("name", "error"), [("pycocotools", 1e-16), ("faster-coco-eval", 1e-9)])
def test_comparison_refuses_other_numbers(name, error):
    numbers = {name: [0.5 + error] * 12 if error > 1e-12 else [0.5000000000000001] * 12, "detcore": [0.5] * 12}
    with pytest.raises(AssertionError, match=f"{name} must give the numbers of detcore"):
        evaluation.compare(9, 2, [name, "detcore"], lambda name, _: made_run(1.0, numbers=numbers[name]))


def test_an_engine_that_is_not_installed_is_left_out_with_a_reason(monkeypatch):
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)
    engines, left_out = evaluation.available()
    assert engines == ["pycocotools", "detcore"]
    assert "not installed" in left_out["faster-coco-eval"]


@pytest.mark.slow
def test_evaluation_benchmark_runs(capsys):
    timings = evaluation.main(["--quick", "--pictures", "8"])
    assert {timing.pictures for timing in timings} == {8}
    assert all(timing.ours_peak_mb > 0 for timing in timings)
    assert "equal to the last bit" in capsys.readouterr().out


def test_peak_memory_grows_with_what_is_held_and_does_not_fall():
    # in a process of its own: here an earlier test may have held more
    code = """
import torch
from benchmarks.timing import peak_memory
print(peak_memory())
block = torch.ones(300 << 18)  # 300 MB
print(peak_memory())
del block
print(peak_memory())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=timing.ROOT, capture_output=True, text=True, check=True)
    before, peak, after = map(float, done.stdout.split())
    assert 270 < peak - before < 330
    assert after > peak - 5  # Linux counts in batches of pages


# --- transport


def test_both_ways_through_a_loader_bring_the_same_pictures():
    setting = {"pictures": 10, "size": 32, "objects": 3, "batch": 4, "workers": 0}
    transport.transport_row(setting).check()
    before = transport.both_processes()
    assert sum(range(10**6)) > 0
    assert transport.both_processes() > before
