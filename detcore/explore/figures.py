"""One call for a figure that the reader moves, whether there is a kernel or not."""

import itertools
import os
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from detcore.explore.controls import Control
from detcore.explore.look import STYLE, checked, draw
from detcore.explore.page import moving, still

__all__ = ["explore", "is_static", "show"]


def is_static() -> bool:
    """Whether figures are made for a page without a kernel: the variable ``DETCORE_STATIC`` is set and not 0.

    Example:
        >>> os.environ["DETCORE_STATIC"] = "1"
        >>> is_static()
        True
        >>> del os.environ["DETCORE_STATIC"]
    """
    return os.environ.get("DETCORE_STATIC", "") not in ("", "0")


def explore(
    fn: Callable[..., Any],
    *,
    alt: str | Callable[..., str],
    title: str | None = None,
    fmt: str = "svg",
    pack: bool = True,
    max_frames: int = 150,
    static: bool | None = None,
    **controls: Control,
) -> None:
    """Show ``fn(**values)`` under controls that the reader moves.

    With a kernel the controls are ipywidgets and ``fn`` runs at every move; without one all
    combinations are drawn now and the page switches between them. Frames multiply: two sliders of
    10 and 3 stops make 30. ``fn`` runs under :data:`STYLE`.

    Args:
        fn: takes one keyword a control, returns a matplotlib figure of at most 6.4 inches' width.
        alt: what is to be seen, for readers who do not see it; or a function of the same keywords
            that says it for each frame.
        title: a line above the controls: the question that the reader answers by moving them.
        fmt: ``"svg"``, or ``"webp"`` for heat maps and pictures, which SVG makes large.
        pack: compress the frames; needs a browser of 2023 or later (else the start frame stands still).
        max_frames: most frames that may be drawn.
        static: choose with or without a kernel; by default :func:`is_static` does.
        controls: from :func:`slider` or :func:`choice`.

    Raises:
        ValueError: if ``alt`` is empty, ``fmt`` unknown, there is no control, there would be more
            than ``max_frames`` frames, or a figure is too wide.
        TypeError: if a control is something else, or ``fn`` does not return a figure.

    Example:
        >>> from detcore.explore import slider
        >>> def rise(slope):
        ...     fig = Figure()
        ...     fig.subplots().plot([0, 1], [0, slope])
        ...     return fig
        >>> explore(rise, slope=slider(0.0, 2.0, 5), alt="A rising line.", static=True)
        A rising line.

    The example printed ``alt``, as a terminal does; a page shows the figure.
    """
    _check_request("explore", alt, fmt)
    if not controls:
        raise ValueError("explore: controls must be one or more; got none. A still figure is for show.")
    for name, control in controls.items():
        if not isinstance(control, Control):
            raise TypeError(f"explore: {name} must be made by slider or choice; got {type(control).__name__}.")
    say = alt if callable(alt) else lambda **_: alt
    if is_static() if static is None else static:
        _explore_static(fn, say, title, fmt, pack, max_frames, controls)
    else:
        _explore_live(fn, say, title, fmt, controls)


def show(fig: Any, *, alt: str, fmt: str = "svg") -> None:
    """Show a figure that stands still, with a text for readers who do not see it.

    Make the figure after :func:`style`, else its ink and ground will not follow the page.

    Args:
        fig: a matplotlib figure, at most 6.4 inches wide; it is closed, so that the notebook does
            not show it again.
        alt: what is to be seen.
        fmt: ``"svg"``, or ``"webp"`` for heat maps, pictures and thousands of points.

    Raises:
        ValueError: if ``alt`` is empty, ``fmt`` unknown, or the figure too wide.
        TypeError: if ``fig`` is not a figure.

    Example:
        >>> show(Figure(), alt="An empty sheet.")
        An empty sheet.

    The example printed ``alt``, as a terminal does; a page shows the figure.
    """
    _check_request("show", alt, fmt)
    _display(_still(fig, "show: fig", alt, fmt), alt)


def _check_request(who: str, alt: str | Callable[..., str], fmt: str) -> None:
    if not callable(alt) and not alt.strip():
        raise ValueError(f"{who}: alt must say what the figure shows; got an empty text.")
    if fmt not in ("svg", "webp"):
        raise ValueError(f'{who}: fmt must be "svg" or "webp"; got {fmt!r}.')


def _still(fig: Any, what: str, alt: str, fmt: str) -> str:
    drawn = draw(checked(fig, what), fmt)
    _close(fig)
    return still(drawn, fmt, alt, fig.get_figwidth())


def _close(fig: Figure) -> None:
    import matplotlib.pyplot as plt  # chooses a backend, so only when there is something to close

    plt.close(fig)


class _Picture:
    """A page shows the HTML; a terminal, and a reader without eyes on it, gets the text."""

    def __init__(self, html: str, alt: str):
        self.html, self.alt = html, alt

    def __repr__(self) -> str:
        return self.alt

    def _repr_html_(self) -> str:
        return self.html


def _display(html: str, alt: str) -> None:
    from IPython.display import display

    display(_Picture(html, alt))


def _explore_live(
    fn: Callable[..., Figure], say: Callable[..., str], title: str | None, fmt: str, controls: Mapping[str, Control]
) -> None:
    import ipywidgets
    from IPython.display import display

    widgets = {}
    for name, control in controls.items():
        # the widget's value is the stop's index, so that a stop may be anything, hashable or not
        options = [(text, i) for i, text in enumerate(control.texts)]
        kind = ipywidgets.SelectionSlider if control.kind == "slider" else ipywidgets.Dropdown
        extra = {"continuous_update": False} if control.kind == "slider" else {}
        widgets[name] = kind(
            options=options,
            value=control.start,
            description=control.label or name,
            style={"description_width": "initial"},
            layout={"width": "min(100%, 28rem)"},
            **extra,
        )

    def draw(**stops: int) -> None:
        values = {name: controls[name].values[stop] for name, stop in stops.items()}
        with rc_context(dict(STYLE)):
            html = _still(fn(**values), "explore: what fn returns", say(**values), fmt)
        _display(html, say(**values))

    head = [ipywidgets.HTML(f"<b>{escape(title)}</b>")] if title else []
    display(ipywidgets.VBox([*head, *widgets.values(), ipywidgets.interactive_output(draw, widgets)]))


def _explore_static(
    fn: Callable[..., Any],
    say: Callable[..., str],
    title: str | None,
    fmt: str,
    pack: bool,
    max_frames: int,
    controls: Mapping[str, Control],
) -> None:
    stops = [len(control.values) for control in controls.values()]
    combinations = list(itertools.product(*(control.values for control in controls.values())))
    if len(combinations) > max_frames:
        raise ValueError(
            f"explore: frames must be at most max_frames = {max_frames}; got {' x '.join(map(str, stops))} = "
            f"{len(combinations)}. Give the controls fewer stops."
        )
    frames, alts, width = [], [], 0.0
    for combination in combinations:
        values = dict(zip(controls, combination, strict=True))
        with rc_context(dict(STYLE)):
            fig = checked(fn(**values), "explore: what fn returns")
            frames.append(draw(fig, fmt))
        alts.append(say(**values))
        width = max(width, fig.get_figwidth())
        _close(fig)
    start = [control.values[control.start] for control in controls.values()]
    _display(
        moving(frames, fmt, alts, width, controls, title=title, pack=pack),
        say(**dict(zip(controls, start, strict=True))),
    )
