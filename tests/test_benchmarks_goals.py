"""Goals: what they read from the stored results, and when they say that they are met."""

import json

import pytest

from benchmarks import __main__ as command
from benchmarks.goals import GOALS, Goal, faster, less_memory, measured, over_network, report
from benchmarks.timing import ROOT

ROW = {"name": "x", "ratio": 0.8, "ratio_low": 0.5, "ratio_high": 1.0, "ours_peak_mb": 30.0, "theirs_peak_mb": 120.0}


@pytest.mark.parametrize(
    ("must", "stretch", "value", "word"),
    [
        (0.9, 1.0, faster, "missed"),
        (0.8, 1.0, faster, "must"),
        (0.5, 0.8, faster, "stretch"),
        (1.2, 1.1, over_network, "missed"),
        (1.25, 1.2, over_network, "must"),
        (1.3, 1.25, over_network, "stretch"),
        (0.2, 0.1, less_memory, "missed"),
        (0.25, 0.2, less_memory, "must"),
        (0.5, 0.3, less_memory, "stretch"),
    ],
)
def test_a_goal_is_reached_from_its_own_side(must, stretch, value, word, tmp_path):
    goal = Goal("what", "a.json", "x", must, stretch, value)
    (tmp_path / "a.json").write_text(json.dumps({"rows": [{"name": "other"}, ROW]}), encoding="utf-8")
    [(median, low, high)] = measured([goal], tmp_path).values()
    assert low <= median <= high
    assert goal.reached(median) == word


def test_a_row_that_is_not_there_is_not_measured(tmp_path):
    assert measured([Goal("what", "a.json", "x", 1, 2)], tmp_path) == {}
    assert report(tmp_path).count(" -") == len(GOALS)


def test_every_goal_is_of_a_row_of_its_own():
    assert len({(goal.file, goal.row) for goal in GOALS}) == len(GOALS) == 22
    for goal in GOALS:
        assert (goal.stretch < goal.must) if goal.is_at_most else (goal.stretch > goal.must)


def test_report_names_goal_value_and_word(capsys):
    command.main(["--report"])
    printed = capsys.readouterr().out
    assert "RetinaNet: step over its network, fp32" in printed
    assert "<= 1.08" in printed
    assert all(goal.what in printed for goal in GOALS)


def test_parts_run_in_processes_of_one_thread(monkeypatch, capsys):
    runs = []
    monkeypatch.setattr(command.subprocess, "run", lambda argv, **options: runs.append((argv[1:], options)))
    command.main(["malloc", "growth"])
    assert [argv[1] for argv, _ in runs] == ["benchmarks.torchvision", "benchmarks.growth"]
    assert "--malloc" in runs[0][0]
    for _, options in runs:
        assert options["cwd"] == ROOT
        assert options["env"]["OMP_NUM_THREADS"] == "1"
        assert options["check"]


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["speed"])
    assert "parts must be of torchvision, malloc, mixed, limits, growth, evaluation, convolutions; got speed" in (
        capsys.readouterr().err
    )
