"""Pictures of boxes, priors, assignments and measures. Every function draws on an Axes and returns it.

Nothing is shown or saved here. Text takes matplotlib's current colours, so a style for dark pages
reaches it; series have colours of medium lightness that stand out on light and on dark ground and
for readers with any colour vision, and each has a line style or marker of its own besides.
"""

from detcore.viz.draw import COLOURS, draw_assignment, draw_boxes, draw_priors
from detcore.viz.plot import plot_best_iou, plot_curves, plot_misalignment, plot_score_bins, plot_score_iou

__all__ = [
    "COLOURS",
    "draw_assignment",
    "draw_boxes",
    "draw_priors",
    "plot_best_iou",
    "plot_curves",
    "plot_misalignment",
    "plot_score_bins",
    "plot_score_iou",
]
