"""The rows of a target: what belongs to a box goes with it."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor
from torchvision import tv_tensors

PER_OBJECT = ("labels", "area", "iscrowd", "ignore")
"""Target keys with one row a box."""


def keep_rows(
    target: Mapping[str, Any], boxes: Float[Tensor, "n 4"], keep: Bool[Tensor, " n"], size: tuple[int, int]
) -> dict[str, Any]:
    """The target with new boxes on a canvas of ``size``, rows of all per-object keys chosen."""
    rows = {key: target[key][keep] for key in PER_OBJECT if key in target}
    chosen = tv_tensors.BoundingBoxes(  # pyright: ignore[reportCallIssue]  # torchvision's overloads
        boxes[keep], format="XYXY", canvas_size=size
    )
    return {**target, **rows, "boxes": chosen}
