"""How many priors each object is matched with, from boxes alone: no picture is read and no network runs.

A detector learns an object from the priors matched with it, so their number M says how much it is heard.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from detcore.structures import Assignment, Priors, Targets

__all__ = ["Matcher", "count_matches", "match_histogram", "match_table"]

Matcher = Callable[[Priors, Targets], Assignment]
"""Which object each prior has to predict, such as ``ssd_assign``."""

OVERLAPS_AT_ONCE = 1 << 21


def count_matches(
    boxes: Float[np.ndarray, "M 4"], image: Int[np.ndarray, " M"], priors: Priors, matcher: Matcher
) -> Int[np.ndarray, " M"]:
    """Number of priors that each object of a data set owns, priors that it was forced upon included.

    Pictures with as many objects as each other are matched together, so no slot is padding.

    Args:
        boxes: corners of the objects of all pictures, in pixels of the detector's input, with sides > 0.
        image: number of the picture each object is in, ascending, as in ``PooledTargets.image``.
        priors: one set for all pictures.
        matcher: what assigns objects to priors.

    Returns:
        M, in the order of ``boxes``.

    Raises:
        ValueError: if ``image`` does not ascend, or a box has no area.

    Example:
        >>> from functools import partial
        >>> from detcore.assigners import max_iou_assign
        >>> priors = Priors(torch.tensor([[[0.0, 0, 8, 8], [2, 0, 10, 8], [50, 50, 58, 58]]]), (3,))
        >>> boxes, image = np.array([[1.0, 0, 9, 8], [50, 50, 90, 90]]), np.array([0, 4])
        >>> count_matches(boxes, image, priors, partial(max_iou_assign, force_match="off")).tolist()
        [2, 0]

    Reference: Shi et al., Scale-balanced loss for object detection, Pattern Recognition 2021, Fig. 1.
    """
    if (np.diff(image) < 0).any():
        raise ValueError("count_matches: image must ascend, the objects of a picture side by side; got a step down.")
    if not (boxes[:, 2:] > boxes[:, :2]).all():
        row = int(np.flatnonzero(~(boxes[:, 2:] > boxes[:, :2]).all(1))[0])
        raise ValueError(f"count_matches: boxes must have x1 < x2 and y1 < y2; got {boxes[row].tolist()} in row {row}.")
    counts = np.zeros(len(boxes), dtype=np.int64)
    _, first, number = np.unique(image, return_index=True, return_counts=True)
    for objects in np.unique(number).tolist():
        rows = first[number == objects][:, None] + np.arange(objects)  # pictures x objects
        at_once = max(1, OVERLAPS_AT_ONCE // (objects * priors.boxes.shape[1]))
        for part in np.split(rows, range(at_once, len(rows), at_once)):
            labels = torch.zeros(part.shape, dtype=torch.int64)
            corners = torch.from_numpy(boxes[part]).to(priors.boxes.dtype)
            match = matcher(priors, Targets(corners, labels, labels == 0))
            owned = torch.zeros_like(labels).scatter_add(1, match.index, match.positive.long())
            counts[part] = owned.numpy()
    return counts


def match_histogram(counts: Int[np.ndarray, " M"], *, last: int = 25) -> Int[np.ndarray, " bins"]:
    """Number of objects with M = 0, 1, ..., ``last``, and in one more place those with M above.

    Args:
        counts: M of every object.
        last: >= 0.

    Example:
        >>> match_histogram(np.array([0, 1, 1, 3, 9]), last=3).tolist()
        [1, 2, 0, 1, 1]
    """
    if last < 0:
        raise ValueError(f"match_histogram: last must be >= 0; got {last}.")
    return np.bincount(np.minimum(counts, last + 1), minlength=last + 2)


def match_table(
    counts: Int[np.ndarray, " M"],
    groups: Int[np.ndarray, " M"],
    names: Sequence[str],
    *,
    edges: Sequence[int] = (5, 10),
) -> dict[str, dict[str, Any]]:
    """Mean M and shares of M in each group of objects: by size, by aspect, whatever ``groups`` says.

    Args:
        counts: M of every object.
        groups: number of the group each object is in, such as :func:`detcore.evaluation.size_classes` gives.
        names: of the groups, from group 0 on.
        edges: last M of each class but the last one, ascending.

    Returns:
        For each name ``objects``, their number; ``mean`` of M, ``None`` without objects; and ``objects_by_m``,
        the number of objects with M = 0..5, 6..10 and above 10, or as ``edges`` say.

    Raises:
        ValueError: if a group has no name, or ``edges`` do not ascend.

    Example:
        >>> table = match_table(np.array([1, 4, 6, 20]), np.array([0, 0, 1, 1]), ["small", "large"])
        >>> table["large"]
        {'objects': 2, 'mean': 13.0, 'objects_by_m': [0, 1, 1]}
    """
    if groups.min(initial=0) < 0 or groups.max(initial=0) >= len(names):
        raise ValueError(
            f"match_table: groups must be in 0..{len(names) - 1}, one a name; got {groups.min()}..{groups.max()}."
        )
    if any(b <= a for a, b in pairwise(edges)):
        raise ValueError(f"match_table: edges must ascend; got {list(edges)}.")
    classes = np.searchsorted(np.asarray(edges), counts, side="left")  # M = edge is still below it
    table = {}
    for group, name in enumerate(names):
        inside = groups == group
        table[name] = {
            "objects": int(inside.sum()),
            "mean": float(counts[inside].mean()) if inside.any() else None,
            "objects_by_m": np.bincount(classes[inside], minlength=len(edges) + 1).tolist(),
        }
    return table
