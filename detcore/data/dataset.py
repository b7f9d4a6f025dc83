"""What every data set of pictures with boxes offers, wherever its pictures come from."""

from typing import Any, Protocol, runtime_checkable

from torchvision import tv_tensors

__all__ = ["DataError", "DetectionDataset"]


class DataError(ValueError):
    """Annotations or a picture that cannot be used; the message names file, line or id, and the fix."""


@runtime_checkable
class DetectionDataset(Protocol):
    """What training, evaluation and figures ask of a data set.

    ``dataset[i]`` is ``(image, target)``: ``image`` a uint8 ``tv_tensors.Image`` (3, H, W), ``target``
    a dict in the pixels of that image with

    - ``boxes``: ``tv_tensors.BoundingBoxes`` (n, 4), XYXY float32; n may be 0,
    - ``labels``: int64 (n,) in 0..C-1,
    - ``image_id``: int, unique in the data set,
    - ``area``: float32 (n,), square pixels (the mask's where the source gives it),
    - ``iscrowd``: int64 (n,), 0 or 1,
    - ``ignore``: bool (n,), VOC's difficult or COCO's crowd: kept for evaluation, not trained on,
    - ``original_size``: int64 (2,), (height, width) before any transform.
    """

    @property
    def name(self) -> str:
        """What was opened, in a few words."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; the index is the label."""
        ...

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The source's id of each label."""
        ...

    @property
    def image_ids(self) -> tuple[int, ...]:
        """The id of each picture, in the order of the data set."""
        ...

    @property
    def skipped(self) -> tuple[str, ...]:
        """One message for each object or picture that was left out."""
        ...

    def __len__(self) -> int:
        """Number of pictures."""
        ...

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
        """Picture and target."""
        ...

    def target(self, index: int) -> dict[str, Any]:
        """The target alone, in original pixels; no picture is decoded."""
        ...
