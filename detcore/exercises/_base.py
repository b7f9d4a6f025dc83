"""What an exercise is made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Exercise", "Verdict", "Wrong"]


class Wrong(Exception):
    """Raised by a checker: the violated property, and the numbers that show it."""


@dataclass(frozen=True)
class Verdict:
    """What a checker says about an answer; shown by a notebook as one line.

    Args:
        name: of the exercise.
        passed: whether every property holds.
        message: the first property that does not hold, with numbers, or what was shown.
    """

    name: str
    passed: bool
    message: str

    def __repr__(self) -> str:
        return f"{self.name}: {'right' if self.passed else 'not yet'}. {self.message}"


@dataclass(frozen=True)
class Exercise:
    """A task for a reader, its checker, and what tests the checker.

    Args:
        name: what :func:`detcore.exercises.check` calls it.
        task: signature and meaning in one or two sentences.
        checker: raises :class:`Wrong` naming the violated property; calls the answer it is given.
        solution: passes.
        wrong: plausible wrong answers by the mistake they make; each fails with another message.
    """

    name: str
    task: str
    checker: Callable[[Callable[..., Any]], None]
    solution: Callable[..., Any]
    wrong: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
