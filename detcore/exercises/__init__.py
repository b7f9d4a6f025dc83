"""Exercises of the book: ``check(name, answer)`` runs in one cell and names the violated property."""

from collections.abc import Callable
from typing import Any

from detcore.exercises import (
    association,
    fusion_lab,
    iou_aware,
    matching,
    retinanet,
    retinanet_conf,
    scale_balanced,
    scod,
    ssd_family,
    start,
)
from detcore.exercises._base import Exercise, Verdict, Wrong

__all__ = ["EXERCISES", "Exercise", "Verdict", "Wrong", "check", "solution"]

EXERCISES: dict[str, Exercise] = {
    exercise.name: exercise
    for chapter in (
        start,
        matching,
        retinanet,
        iou_aware,
        retinanet_conf,
        association,
        ssd_family,
        scale_balanced,
        scod,
        fusion_lab,
    )
    for exercise in chapter.EXERCISES
}
"""Every exercise with code, by name."""


def check(name: str, answer: Callable[..., Any], *, strict: bool = False) -> Verdict:
    """Try an answer to an exercise.

    Args:
        name: one of :data:`EXERCISES`.
        answer: your function.
        strict: raise instead of returning a verdict that did not pass (for graders).

    Returns:
        A verdict, which a notebook shows as one line.

    Raises:
        KeyError: if there is no such exercise.
        Wrong: if ``strict`` and a property does not hold.

    Example:
        >>> check("iou", lambda a, b: 0.0).passed
        False
    """
    exercise = _find(name)
    try:
        exercise.checker(answer)
    except Wrong as finding:
        if strict:
            raise
        return Verdict(name, False, str(finding))
    except Exception as error:  # the answer is anybody's code: say what it raised, whatever that is
        if strict:
            raise
        return Verdict(name, False, f"your function raised {type(error).__name__}: {error}")
    return Verdict(name, True, "Every property holds.")


def solution(name: str) -> Callable[..., Any]:
    """The book's own answer to an exercise, to be looked at afterwards.

    Raises:
        KeyError: if there is no such exercise.

    Example:
        >>> check("iou", solution("iou"))
        iou: right. Every property holds.
    """
    return _find(name).solution


def _find(name: str) -> Exercise:
    if name not in EXERCISES:
        raise KeyError(f"check: name must be one of {sorted(EXERCISES)}; got {name!r}.")
    return EXERCISES[name]
