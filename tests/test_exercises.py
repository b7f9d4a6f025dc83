"""Every checker is checked: the solution passes, each wrong answer fails with a message of its own."""

import pytest

from detcore.exercises import EXERCISES, Wrong, check, solution


@pytest.mark.parametrize("name", EXERCISES)
def test_solution_passes(name):
    assert check(name, solution(name)).passed


@pytest.mark.parametrize("name", EXERCISES)
def test_three_or_more_wrong_answers_fail_each_with_its_own_message(name):
    verdicts = [check(name, answer) for answer in EXERCISES[name].wrong.values()]
    assert not any(verdict.passed for verdict in verdicts)
    headlines = {verdict.message.partition(":")[0] for verdict in verdicts}
    assert len(headlines) == len(verdicts) >= 3, headlines


@pytest.mark.parametrize("name", EXERCISES)
def test_a_stub_is_not_yet_right(name):
    verdict = check(name, lambda *args, **kwargs: None)
    assert not verdict.passed
    assert repr(verdict).startswith(f"{name}: not yet.")


def test_strict_raises_and_unknown_names_list_the_known():
    name = next(iter(EXERCISES))
    with pytest.raises(Wrong):
        check(name, next(iter(EXERCISES[name].wrong.values())), strict=True)
    with pytest.raises(KeyError, match=name):
        check("no such exercise", solution(name))
