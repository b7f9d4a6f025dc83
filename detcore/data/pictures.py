"""The part that all annotation formats share: checked records in, pictures and targets out."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from tqdm import tqdm

from detcore.data.dataset import DataError
from detcore.data.records import Records, read_picture

__all__ = ["AnnotatedPictures"]

MEAN_COLOUR = (124, 116, 104)
"""ImageNet's mean in uint8: what stands in for a picture that cannot be decoded."""


class AnnotatedPictures(Dataset):
    """Pictures on disk with the boxes of a :class:`Records`; see :class:`DetectionDataset`.

    A picture that cannot be decoded is found when it is asked for, and raises. With
    ``skip_bad`` truncated pictures are looked for at once, by their last bytes, and left out.
    One that fails later all the same (it was deleted, or damaged in a way the last bytes do not show)
    must not stop a loader: it is replaced by a picture of the mean colour with an empty
    target, with a warning, and noted in :attr:`skipped`.

    Args:
        records: pictures and objects, already checked.
        name: what was opened, in a few words.
        classes: class names; the index is the label.
        category_ids: the source's id of each label.
        wanted: names of the classes to keep, relabelled 0.. in this order; ``None`` keeps all.
        only_with_objects: keep only pictures with at least one object that is not ignored.
        skipped: messages of what the reader left out.
        skip_bad: go on without pictures that cannot be decoded.

    Raises:
        DataError: if ``wanted`` names an unknown class, or names one twice.
    """

    def __init__(
        self,
        records: Records,
        *,
        name: str,
        classes: Sequence[str],
        category_ids: Sequence[int],
        wanted: Sequence[str] | None = None,
        only_with_objects: bool = False,
        skipped: Sequence[str] = (),
        skip_bad: bool = False,
    ) -> None:
        self._name = name
        self._classes = tuple(classes)
        self._category_ids = tuple(int(c) for c in category_ids)
        self._skipped = list(skipped)
        self._skip_bad = skip_bad
        self._broken: set[int] = set()
        if wanted is not None:
            records = self._select_classes(records, wanted)
        if only_with_objects:
            has_object = np.zeros(len(records.files), dtype=bool)
            has_object[records.picture[~records.ignore]] = True
            records = records.keep_pictures(has_object)
        if skip_bad:
            records = self._without_truncated(records)
        self._records = records
        self._image_ids = tuple(records.image_ids.tolist())
        self._start = np.searchsorted(records.picture, np.arange(len(records.files) + 1))

    def _select_classes(self, records: Records, wanted: Sequence[str]) -> Records:
        unknown = [name for name in wanted if name not in self._classes]
        if unknown or len(set(wanted)) != len(wanted) or isinstance(wanted, str):
            raise DataError(
                f"{type(self).__name__}: classes must be different names out of {', '.join(self._classes)}; "
                f"got {wanted!r}."
            )
        new_labels = np.full(len(self._classes), -1, dtype=np.int64)
        for label, name in enumerate(wanted):
            new_labels[self._classes.index(name)] = label
        self._category_ids = tuple(self._category_ids[self._classes.index(name)] for name in wanted)
        self._classes = tuple(wanted)
        return records.relabel(new_labels)

    def _without_truncated(self, records: Records) -> Records:
        keep = np.ones(len(records.files), dtype=bool)
        num_objects = np.bincount(records.picture, minlength=len(keep))
        for i, file in enumerate(records.files):
            if _ends_as_it_should(file):
                continue
            try:
                read_picture(file, image_id=int(records.image_ids[i]), size=tuple(records.sizes[i].tolist()))
            except DataError as error:
                keep[i] = False
                self._skipped.append(f"{error} Left out with its {num_objects[i]} objects.")
        return records if keep.all() else records.keep_pictures(keep)

    @property
    def name(self) -> str:
        """What was opened, in a few words."""
        return self._name

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; the index is the label."""
        return self._classes

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The source's id of each label: how to go back, for instance to write COCO results."""
        return self._category_ids

    @property
    def image_ids(self) -> tuple[int, ...]:
        """The source's id of each picture, in the order of the data set."""
        return self._image_ids

    @property
    def skipped(self) -> tuple[str, ...]:
        """One message for each object or picture that was left out."""
        return tuple(self._skipped)

    @property
    def records(self) -> Records:
        """All annotations at once, for statistics."""
        return self._records

    def path(self, index: int) -> Path:
        """Where picture ``index`` lies."""
        return Path(self._records.files[self._checked(index)])

    def __len__(self) -> int:
        return len(self._records.files)

    def __repr__(self) -> str:
        left_out = f", {len(self._skipped)} left out" if self._skipped else ""
        objects = len(self._records.labels)
        return f"<{self.name}: {len(self)} pictures, {objects} objects, {len(self.classes)} classes{left_out}>"

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
        """Picture and target ``index``.

        Raises:
            IndexError: if ``index`` is not in [-len, len).
            DataError: if the picture cannot be decoded or has not the annotated size; names file
                and image id. Not raised with ``skip_bad``.
        """
        index = self._checked(index)
        height, width = self._records.sizes[index].tolist()
        try:
            pixels = read_picture(self._records.files[index], image_id=self._image_ids[index], size=(height, width))
        except DataError as error:
            if not self._skip_bad:
                raise
            if index not in self._broken:
                self._broken.add(index)
                self._skipped.append(str(error))
                warnings.warn(f"{error} An empty picture takes its place.", RuntimeWarning, stacklevel=2)
            pixels = torch.tensor(MEAN_COLOUR, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
        return tv_tensors.Image(pixels), self.target(index)

    def target(self, index: int) -> dict[str, Any]:
        """The target of picture ``index`` in original pixels, as :class:`DetectionDataset` says."""
        index = self._checked(index)
        r = self._records
        first, last = int(self._start[index]), int(self._start[index + 1])
        objects = slice(first, first if index in self._broken else last)
        height, width = r.sizes[index].tolist()
        boxes = torch.from_numpy(r.boxes[objects].copy())  # copies: transforms may write in place
        return {
            "boxes": tv_tensors.BoundingBoxes(  # pyright: ignore[reportCallIssue]  # torchvision's overloads
                boxes, format="XYXY", canvas_size=(height, width)
            ),
            "labels": torch.from_numpy(r.labels[objects].copy()),
            "image_id": self._image_ids[index],
            "area": torch.from_numpy(r.areas[objects].copy()),
            "iscrowd": torch.from_numpy(r.crowd[objects].astype(np.int64)),
            "ignore": torch.from_numpy(r.ignore[objects].copy()),
            "original_size": torch.tensor([height, width]),
        }

    def verify(self, *, progress: bool = True) -> tuple[str, ...]:
        """Decodes every picture once and says which cannot be.

        Args:
            progress: show a bar.

        Returns:
            One message for each picture that fails, naming file and image id; empty if all are sound.
        """
        messages = []
        r = self._records
        for i in tqdm(range(len(self)), desc=f"verify {self.name}", unit="picture", disable=not progress):
            try:
                read_picture(r.files[i], image_id=self._image_ids[i], size=tuple(r.sizes[i].tolist()))
            except DataError as error:
                messages.append(str(error))
        return tuple(messages)

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: index must be below {len(self)}, the number of pictures; got {index}.")
        return int(index) % len(self)


def _ends_as_it_should(file: str) -> bool:
    """Whether the last bytes close a JPEG or PNG; false only means that decoding must decide."""
    with open(file, "rb") as stream:
        head = stream.read(4)
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - 16))
        tail = stream.read()
    return (head[:2] == b"\xff\xd8" and b"\xff\xd9" in tail) or (head == b"\x89PNG" and b"IEND" in tail)
