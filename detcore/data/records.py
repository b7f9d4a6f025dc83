"""Checked annotations in a few arrays, and what every reader of annotations needs on the way there.

Boxes are kept in original pixels, in a frame where (0, 0) is the top left corner of the first
pixel and (width, height) the bottom right corner of the last one.
"""

import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from detcore.data.dataset import DataError

__all__ = ["Faults", "Records", "check_boxes", "list_files", "read_picture"]

SHOWN_FAULTS = 10
FRAME_TOLERANCE = 1.0
"""Pixels by which an annotated box may leave its picture; official COCO boxes do so by hundredths."""


class Faults:
    """Collects what is wrong in some files, to report it together.

    Args:
        reader: name of the function or class that reads, the start of every message.
        skip: leave bad entries out and remember them, instead of raising.
    """

    def __init__(self, reader: str, *, skip: bool) -> None:
        self.reader = reader
        self.skip = skip
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Notes a fault; ``message`` names file and line or id, what is wrong, and the fix."""
        self.messages.append(message)

    def settle(self) -> tuple[str, ...]:
        """Raises if there was a fault and none may be skipped.

        Returns:
            The messages of what was left out, in the order found.

        Raises:
            DataError: lists the first faults and counts the rest.
        """
        if self.messages and not self.skip:
            shown = "\n  ".join(self.messages[:SHOWN_FAULTS])
            more = len(self.messages) - SHOWN_FAULTS
            more = f"\n  ... and {more} more" if more > 0 else ""
            count = f"{len(self.messages)} faults:\n  " if len(self.messages) > 1 else ""
            raise DataError(
                f"{self.reader}: {count}{shown}{more}\nTo leave bad entries out, pass skip_bad=True (--skip-bad)."
            )
        return tuple(self.messages)


@dataclass(frozen=True)
class Records:
    """The annotations of a whole data set in a few arrays: N pictures, A objects.

    Arrays, not lists of objects: they cost little memory, and forked loader workers share them.

    Args:
        files: path of each picture.
        image_ids: (N,) int64, unique.
        sizes: (N, 2) int64, (height, width) in pixels.
        picture: (A,) int64, index of the picture an object is in, ascending.
        boxes: (A, 4) float32, corners in pixels.
        labels: (A,) int64, in 0..C-1.
        areas: (A,) float32, square pixels.
        crowd: (A,) bool.
        ignore: (A,) bool, not to be trained on; true for every crowd.
    """

    files: tuple[str, ...]
    image_ids: np.ndarray
    sizes: np.ndarray
    picture: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    ignore: np.ndarray

    def keep_objects(self, keep: np.ndarray) -> "Records":
        """Records with the objects where ``keep`` (A,) is true."""
        columns = ("picture", "boxes", "labels", "areas", "crowd", "ignore")
        return replace(self, **{name: getattr(self, name)[keep] for name in columns})

    def keep_pictures(self, keep: np.ndarray) -> "Records":
        """Records with the pictures where ``keep`` (N,) is true, and their objects."""
        inside = self.keep_objects(keep[self.picture])
        return replace(
            inside,
            files=tuple(f for f, k in zip(self.files, keep, strict=True) if k),
            image_ids=self.image_ids[keep],
            sizes=self.sizes[keep],
            picture=(np.cumsum(keep) - 1)[inside.picture],
        )

    def relabel(self, new_labels: np.ndarray) -> "Records":
        """Records whose labels are ``new_labels[label]``; objects given a negative one are left out."""
        inside = self.keep_objects(new_labels[self.labels] >= 0)
        return replace(inside, labels=new_labels[inside.labels])


def read_picture(
    file: str | Path, *, image_id: int | None = None, size: tuple[int, int] | None = None
) -> UInt8[Tensor, "3 H W"]:
    """Decodes a picture to RGB, bit for bit as libjpeg-turbo gives it.

    Pillow does it: ``torchvision.io.decode_image`` gives the same bits from the same library, but is
    deprecated since torchvision 0.29. EXIF orientation is not applied, as the boxes of VOC and COCO were drawn on
    the stored rows and columns. Of an animation the first frame counts.

    Args:
        file: path of a JPEG, PNG, or whatever else Pillow reads.
        image_id: named in the error.
        size: (height, width) in pixels that the annotations claim, checked if given.

    Returns:
        Values 0..255; channels lie last in memory, which is what resizing is fastest on.

    Raises:
        DataError: if the file is missing, truncated, no picture, or of another size.

    Example:
        >>> read_picture("nowhere.jpg", image_id=7)
        Traceback (most recent call last):
        detcore.data.dataset.DataError: read_picture: nowhere.jpg (image id 7) must be a whole picture; ...
    """
    who = f"{file}" if image_id is None else f"{file} (image id {image_id})"
    try:
        with Image.open(file) as picture:
            pixels = np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))  # H W 3
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(
            f"read_picture: {who} must be a whole picture; got {type(error).__name__}: {error}. Fetch it again."
        ) from error
    found = pixels.shape[:2]
    if size is not None and found != size:
        hint = " It is turned: annotate pictures as stored, without EXIF rotation." if found[::-1] == size else ""
        raise DataError(
            f"read_picture: {who} must be {size[1]} x {size[0]} pixels (width x height), as annotated; got "
            f"{found[1]} x {found[0]}.{hint} Correct the annotation, or fetch the picture again."
        )
    return torch.from_numpy(pixels).permute(2, 0, 1)


def list_files(folder: str | Path) -> frozenset[str]:
    """Names in a folder, read in one sweep: asking for 118,000 files one by one is slow on network disks.

    Example:
        >>> list_files("no such folder")
        frozenset()
    """
    if not os.path.isdir(folder):
        return frozenset()
    with os.scandir(folder) as entries:
        return frozenset(entry.name for entry in entries)


def check_boxes(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which boxes are empty, and which leave their pictures.

    Args:
        boxes: (A, 4) float32 corners in pixels.
        sizes: (A, 2) (height, width) of the picture of each.

    Returns:
        Two (A,) masks: not finite or not x1 < x2 and y1 < y2; more than 1 px outside.

    Example:
        >>> boxes = np.array([[5, 5, 5, 9], [0, 0, 30, 9]], np.float32)  # no width; 10 px too wide
        >>> [mask.tolist() for mask in check_boxes(boxes, np.array([[20, 20], [20, 20]]))]
        [[True, False], [False, True]]
    """
    with np.errstate(invalid="ignore"):  # NaN compares as false, which is what is wanted
        sound = np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        inside = (boxes[:, :2] >= -FRAME_TOLERANCE).all(1) & (boxes[:, 2:] <= sizes[:, ::-1] + FRAME_TOLERANCE).all(1)
    return np.asarray(~sound), np.asarray(sound & ~inside)
