"""How every figure looks: colours that read on light and dark, and SVG that takes its ink from the page."""

import base64
import io
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure

__all__ = ["PALETTE", "STYLE", "style"]

_INK = "#010203"  # a black nobody uses: becomes currentColor in the SVG, stays black in a picture
_MAX_WIDTH = 6.4  # inches; a wider figure has letters under 8 px on a phone of 390 px

PALETTE: Mapping[str, str] = MappingProxyType(
    {
        "blue": "#3b7fd4",
        "orange": "#d9660b",
        "green": "#1f9470",
        "pink": "#cf5b9d",
        "gold": "#a58a12",
        "grey": "#808790",
    }
)
"""Series colours by name, in plotting order; each has a contrast of at least 3 with white and with the dark page.

Colour is never the only sign in a figure: vary the line style or the marker too.
"""

# Its keys are str; matplotlib asks for a type of its own that older versions do not have.
STYLE: Mapping[Any, Any] = MappingProxyType(
    {
        "figure.figsize": (4.8, 3.0),
        "figure.facecolor": "none",
        "figure.constrained_layout.use": True,
        "savefig.facecolor": "none",
        "font.size": 10,
        "text.color": _INK,
        "axes.facecolor": "none",
        "axes.edgecolor": _INK,
        "axes.labelcolor": _INK,
        "axes.titlecolor": _INK,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.prop_cycle": f"cycler(color={list(PALETTE.values())!r})",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "axes.axisbelow": True,
        "grid.color": "#80879055",
        "grid.linewidth": 0.6,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "lines.linewidth": 2,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "patch.edgecolor": _INK,
        "hatch.color": _INK,
        "image.cmap": "viridis",
        "svg.fonttype": "path",
    }
)
"""Matplotlib settings of every figure in the book; :func:`style` sets them."""


def style() -> None:
    """Give every matplotlib figure made from here on the book's look.

    Call it once in a notebook's first cell. For a single figure use
    ``with matplotlib.rc_context(STYLE): ...``; :func:`explore` does so by itself.

    Example:
        >>> with rc_context():
        ...     style()
        ...     rcParams["figure.figsize"]
        [4.8, 3.0]
    """
    rcParams.update(STYLE)


def checked(fig: Any, what: str) -> Figure:
    if not isinstance(fig, Figure):
        raise TypeError(f"{what} must be a matplotlib Figure; got {type(fig).__name__}. Return fig, not the axes.")
    if fig.get_figwidth() > _MAX_WIDTH:
        raise ValueError(
            f"{what} must be at most {_MAX_WIDTH} inches wide, to be read on a phone; got {fig.get_figwidth():g}. "
            "Put panels below each other."
        )
    return fig


def draw(fig: Figure, fmt: str) -> str:
    """The picture as SVG text, or as base64 WebP. Byte-identical for the same figure."""
    buffer = io.BytesIO()
    if fmt == "webp":  # lossless as PNG is, at half its size
        fig.savefig(buffer, format="webp", dpi=160, facecolor="white", pil_kwargs={"lossless": True})
        return base64.b64encode(buffer.getvalue()).decode()
    with rc_context({"svg.hashsalt": "detcore", "svg.fonttype": "path"}):
        fig.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return slim(buffer.getvalue().decode())


def slim(svg: str) -> str:
    """An SVG file made fit to stand in a page: no prologue, ink from the page, short coordinates."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    # matplotlib's style element would reach every element of the page: its one rule goes on the root
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    root = r'<svg viewBox="\1" aria-hidden="true" stroke-linejoin="round">'
    svg = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', root, svg)
    # hundredths of a point are enough; numbers in transforms may be tiny scales and stay as they are
    svg = re.sub(
        r' d="[^"]*"', lambda m: re.sub(r"\d+\.\d+", lambda d: f"{float(d[0]):.2f}".rstrip("0").rstrip("."), m[0]), svg
    )
    svg = svg.replace(_INK, "currentColor").replace("xlink:href", "href")
    return re.sub(r"\s+", " ", svg).replace("> <", "><").strip()


def own_ids(svg: str, key: str) -> str:
    """Ids that no other figure of the page has, only where something refers to them."""
    used = {name: f"{key}-{i}" for i, name in enumerate(dict.fromkeys(re.findall(r'(?:url\(#|href="#)([^")]+)', svg)))}
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{used[m[1]]}"' if m[1] in used else "", svg)
    return re.sub(r'(url\(#|href="#)([^")]+)', lambda m: m[1] + used[m[2]], svg)
