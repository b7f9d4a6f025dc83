"""The growth benchmark: every point once, memory above what was held, both sides at each."""

import json
import platform
import shutil
import subprocess
import sys

import pytest

from benchmarks import growth
from benchmarks.growth import Point, points
from benchmarks.timing import ROOT

SMALL = Point(batch=2, objects=3, size=(96, 96))


def test_points_leave_one_base_along_one_axis_at_a_time():
    base = Point(4, 7, (320, 320))
    made = points({"batch": (1, 4), "objects": (7, 100), "size": ((320, 320), (512, 512))}, base)
    assert made == [Point(1, 7, base.size), base, Point(4, 100, base.size), Point(4, 7, (512, 512))]
    assert all(sum(getattr(p, name) != getattr(base, name) for name in growth.AXES) <= 1 for p in made)


def test_the_axes_reach_what_they_are_to_show():
    ends = [(values[0], values[-1]) for values in growth.AXES.values()]
    assert ends == [(1, 16), (1, 100), ((320, 320), (800, 1333))]


@pytest.mark.skipif(platform.system() != "Linux", reason="the peak of memory starts anew on Linux only")
def test_memory_counts_what_is_held_at_once():
    """In a process of its own: other tests leave the allocator in other states."""
    script = """if True:
        import torch
        from benchmarks.growth import used_by
        used_by(lambda: torch.ones(100 << 18).sum())  # an earlier peak, which must not count
        print(used_by(lambda: torch.ones(40 << 18)))
        print(used_by(lambda: torch.ones(40 << 18) + torch.ones(1)))
        print(used_by(lambda: [torch.ones(40 << 18).sum() for _ in range(3)]))
        print(used_by(int))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    one, both_at_once, one_after_another, nothing = map(float, done.stdout.split())
    assert 38 < one < 50
    assert 78 < both_at_once < 90
    assert 38 < one_after_another < 50
    assert nothing < 5


def test_both_sides_take_memory_at_a_point():
    [(theirs, ours)] = growth.memory([SMALL], 8)
    assert theirs > 0
    assert ours > 0
    row = growth.row_at(SMALL, 8)
    row.check()
    assert row.name == "B=2, M=3, 96 x 96 px"


def test_a_failed_measurement_is_an_error(monkeypatch):
    monkeypatch.setattr(growth.sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="memory must be measured in another process; got"):
        growth.memory_in_a_process([SMALL], -1)


@pytest.mark.slow
def test_growth_benchmark_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(growth, "AXES", {"batch": (1, 2)})
    monkeypatch.setattr(growth, "Point", lambda **fields: Point(**{"objects": 3, "size": (96, 96), **fields}))
    output = tmp_path / "growth.json"
    grown = growth.main(["--repeats", "3", "--budget", "0", "--classes", "8", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == len(grown) >= 2
    assert {"ratio", "theirs_peak_mb", "ours_peak_mb", "batch", "objects", "size"} <= set(rows[0])
    assert "above inputs" in capsys.readouterr().out
