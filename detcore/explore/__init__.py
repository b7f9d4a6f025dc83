"""Figures that a reader moves: live where there is a kernel, pre-drawn where there is none.

One call serves both. In a notebook :func:`explore` shows widgets and calls the drawing function
again at every move. In the book (``DETCORE_STATIC=1``, set by the book's build) it draws every
combination once, packs the frames into the page and leaves the switching to a kilobyte of
script: no library, no network, and the start frame shows even without the script.

All figures are SVG whose ink is the page's text colour, on a transparent ground, so the same
picture reads on light and on dark. Series colours come from :data:`PALETTE`, chosen for both.
"""

from detcore.explore.code import source
from detcore.explore.controls import Control, choice, slider
from detcore.explore.figures import explore, is_static, show
from detcore.explore.look import PALETTE, STYLE, style

__all__ = [
    "PALETTE",
    "STYLE",
    "Control",
    "choice",
    "explore",
    "is_static",
    "show",
    "slider",
    "source",
    "style",
]
