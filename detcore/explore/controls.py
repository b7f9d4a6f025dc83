"""What a reader can move: sliders and lists, each a few stops."""

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Control", "choice", "slider"]


@dataclass(frozen=True)
class Control:
    """One thing the reader can move, as made by :func:`slider` and :func:`choice`.

    Args:
        values: the stops; the drawing function gets one of them.
        start: index of the stop shown first.
        label: text beside the control; ``None`` takes the keyword's name.
        kind: how it looks.
    """

    values: tuple[Any, ...]
    start: int
    label: str | None = None
    kind: Literal["slider", "choice"] = "slider"

    @property
    def texts(self) -> tuple[str, ...]:
        """What is shown for each stop."""
        return tuple(f"{v:g}" if isinstance(v, float) else str(v) for v in self.values)


def slider(
    lo: int | float, hi: int | float, n: int = 21, *, start: int | float | None = None, label: str | None = None
) -> Control:
    """A slider with evenly spaced stops, both ends among them.

    Args:
        lo: first stop.
        hi: last stop, > ``lo``.
        n: number of stops, >= 2. Each is a frame of the page: 10 to 30 is plenty.
        start: value shown first, in [lo, hi]; the nearest stop is taken, by default the first.
        label: text beside the slider; by default the keyword's name.

    Returns:
        The control. Its stops are whole numbers if ``lo``, ``hi`` and the step are.

    Raises:
        ValueError: if ``hi`` is not above ``lo``, ``n`` is below 2, or ``start`` lies outside.

    Example:
        >>> slider(0.0, 1.0, 5, start=0.3).values
        (0.0, 0.25, 0.5, 0.75, 1.0)
        >>> slider(1, 4, 4).values
        (1, 2, 3, 4)
    """
    if not hi > lo:
        raise ValueError(f"slider: hi must be above lo; got lo = {lo}, hi = {hi}.")
    if n < 2:
        raise ValueError(f"slider: n must be >= 2; got {n}.")
    first = lo if start is None else start
    if not lo <= first <= hi:
        raise ValueError(f"slider: start must be in [{lo}, {hi}]; got {start}.")
    whole = isinstance(lo, int) and isinstance(hi, int) and (hi - lo) % (n - 1) == 0
    # rounded, so that a stop shown as 0.3 is 0.3 and not 0.30000000000000004
    values = tuple(lo + (hi - lo) // (n - 1) * i if whole else round(lo + (hi - lo) * i / (n - 1), 9) for i in range(n))
    return Control(values, min(range(n), key=lambda i: abs(values[i] - first)), label)


def choice(*values: Any, start: Any = None, label: str | None = None) -> Control:
    """A drop-down list.

    Args:
        values: two or more things to choose from; ``str`` of each is shown.
        start: the one shown first; by default the first.
        label: text beside the list; by default the keyword's name.

    Returns:
        The control.

    Raises:
        ValueError: if there are fewer than two values, two look alike, or ``start`` is not among them.

    Example:
        >>> choice("square", "flat", "tall", start="flat").start
        1
    """
    if len(values) < 2:
        raise ValueError(f"choice: values must be two or more; got {len(values)}.")
    if len({str(v) for v in values}) < len(values):
        raise ValueError(f"choice: values must look different from each other; got {[str(v) for v in values]}.")
    if start is not None and start not in values:
        raise ValueError(f"choice: start must be one of {list(values)}; got {start!r}.")
    return Control(tuple(values), 0 if start is None else values.index(start), label, "choice")
