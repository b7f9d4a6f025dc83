"""Figures as files: no window, no global state, one size with the picture."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

__all__: list[str] = []

LEAST_SIDE = 640
"""Pixels of a drawn picture's longer side: labels would cover a smaller one."""


def picture_figure(image: Tensor, *, title: bool = False) -> tuple[Figure, Axes]:
    """A figure that the picture (3, H, W) fills, but for a line of ``title`` on top."""
    height, width = image.shape[-2:]
    scale = max(1.0, LEAST_SIDE / max(height, width))
    head = 28.0 if title else 0.0
    figure = Figure(figsize=(width * scale / 100, (height * scale + head) / 100), dpi=100)
    FigureCanvasAgg(figure)
    return figure, figure.add_axes((0.0, 0.0, 1.0, height * scale / (height * scale + head)))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG file, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def source_name(dataset: Any, index: int) -> str:
    """Name of the file that a picture comes from; where it comes from none, one made of its id."""
    if hasattr(dataset, "path"):
        return Path(dataset.path(index)).name
    return f"{dataset.image_ids[index]:06d}.png"


def drawn_name(dataset: Any, index: int) -> str:
    """Stem of the files drawn from a picture: its id, and what its own file is called if that says more."""
    number, stem = dataset.image_ids[index], Path(source_name(dataset, index)).stem
    return f"{number:06d}" if stem.isdecimal() and int(stem) == number else f"{number:06d}_{stem}"
