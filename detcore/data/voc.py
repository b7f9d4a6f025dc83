"""PASCAL VOC: one XML file a picture, official lists of names, difficult objects.

Reference: Everingham et al., The PASCAL Visual Object Classes (VOC) Challenge, IJCV 2010.
"""

import difflib
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from detcore.data.dataset import DataError
from detcore.data.pictures import AnnotatedPictures
from detcore.data.records import Faults, Records, check_boxes, list_files

__all__ = ["VOC_CLASSES", "VocDetection"]

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""The 20 classes in their official, alphabetical order; the index is the label."""


class VocDetection(AnnotatedPictures):
    """A list of pictures out of VOC2007, VOC2012 or both, or out of any folder laid out like them.

    VOC counts pixels from 1 and both corners of a box are inside it: a box over the whole of a
    500 x 375 picture reads 1, 1, 500, 375. Here corners are continuous, so that box becomes
    0, 0, 500, 375: ``x1 = xmin - 1, y1 = ymin - 1, x2 = xmax, y2 = ymax``. A box of one pixel
    (``xmin = xmax``) has width 1.

    ``image_id`` is the digits of the file name (``2008_000009`` becomes 2008000009), or
    the position in the list, from 1, where names are not numbers. ``category_ids`` are 1..20 in the
    official order. Difficult objects are kept with ``ignore`` true. A list of one class
    (``cat_trainval``) gives the pictures it does not mark with -1.

    Args:
        root: the folder that holds ``VOCdevkit``, or ``VOCdevkit`` itself, or one ``VOC<year>``.
        year: "2007", "2012", or several.
        image_set: name of the list in ``ImageSets/Main``; one for all years, or one a year.
        skip_bad: leave bad objects and pictures out, and say so in :attr:`skipped`.
        classes: names of the classes to keep, relabelled 0.. in this order; ``None`` keeps all.
        only_with_objects: keep only pictures with at least one object that is not difficult.
        names: all legal class names, in label order, for data laid out like VOC with other classes.

    Raises:
        DataError: for a missing folder, list, XML file or picture, a malformed XML file, an unknown class, or
            a box that is empty, inverted or outside its picture; names the file and the line.
    """

    def __init__(
        self,
        root: str | Path,
        year: str | Sequence[str] = "2007",
        image_set: str | Sequence[str] = "trainval",
        *,
        skip_bad: bool = False,
        classes: Sequence[str] | None = None,
        only_with_objects: bool = False,
        names: Sequence[str] = VOC_CLASSES,
    ) -> None:
        years = (year,) if isinstance(year, str) else tuple(year)
        sets = (image_set,) * len(years) if isinstance(image_set, str) else tuple(image_set)
        if not years or len(sets) != len(years):
            raise DataError(
                f"VocDetection: image_set must be one list, or one for each of the {len(years)} years; got {sets}."
            )
        faults = Faults("VocDetection", skip=skip_bad)
        found = _Found({name: label for label, name in enumerate(names)})
        for one_year, one_set in zip(years, sets, strict=True):
            _read_list(_year_folder(Path(root), one_year), one_set, found, faults)
        records = found.records(faults)
        super().__init__(
            records,
            name="+".join(f"voc{y}-{s}" for y, s in zip(years, sets, strict=True)),
            classes=names,
            category_ids=range(1, len(names) + 1),
            wanted=classes,
            only_with_objects=only_with_objects,
            skipped=faults.settle(),
            skip_bad=skip_bad,
        )


@dataclass
class _Found:
    """Rows as they are read; :meth:`records` turns them into arrays."""

    labels_by_name: dict[str, int]
    files: list[str] = field(default_factory=list)
    stems: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    objects: list[tuple[int, float, float, float, float, int, bool]] = field(default_factory=list)
    places: list[tuple[Path, int]] = field(default_factory=list)

    def records(self, faults: Faults) -> Records:
        table = np.array(self.objects, dtype=np.float64).reshape(-1, 7)
        sizes = np.array(self.sizes, dtype=np.int64).reshape(-1, 2)
        picture = table[:, 0].astype(np.int64)
        # 1-based pixels, both corners inside -> continuous corners
        boxes = (table[:, 1:5] - np.array([1.0, 1.0, 0.0, 0.0])).astype(np.float32)
        empty, outside = check_boxes(boxes, sizes[picture])
        for row in np.flatnonzero(empty | outside):
            file, number = self.places[row]
            xyxy = table[row, 1:5].tolist()
            height, width = self.sizes[picture[row]]
            rule = (
                "have xmin <= xmax and ymin <= ymax"
                if empty[row]
                else f"lie inside the picture, 1..{width} by 1..{height}"
            )
            faults.add(
                f"{file} line {_line_of_object(file, number)}: bndbox of object {number} must {rule}; got "
                f"xmin, ymin, xmax, ymax = {xyxy}. Correct the box or remove the object."
            )
        good = ~(empty | outside)
        ids = [int(stem) if re.fullmatch(r"\d+(_\d+)?", stem) else -1 for stem in self.stems]
        if -1 in ids or len(set(ids)) != len(ids):
            ids = list(range(1, len(ids) + 1))
        records = Records(
            tuple(self.files),
            np.array(ids, dtype=np.int64),
            sizes,
            picture,
            boxes,
            table[:, 5].astype(np.int64),
            ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])),
            np.zeros(len(table), dtype=bool),
            table[:, 6].astype(bool),
        )
        return records.keep_objects(good)


def _year_folder(root: Path, year: str) -> Path:
    tried = [root / "VOCdevkit" / f"VOC{year}", root / f"VOC{year}"]
    if root.name == f"VOC{year}":
        tried.append(root)
    for folder in tried:
        if (folder / "ImageSets" / "Main").is_dir():
            return folder
    raise DataError(
        f"VocDetection: root must hold a folder VOC{year} with ImageSets/Main, Annotations and JPEGImages; got {root} "
        f"(looked for {', '.join(str(t) for t in tried)}). Fetch it with: detcore data download voc{year}"
    )


def _read_list(folder: Path, image_set: str, found: _Found, faults: Faults) -> None:
    list_file = folder / "ImageSets" / "Main" / f"{image_set}.txt"
    if not list_file.is_file():
        there = sorted(p.stem for p in list_file.parent.glob("*.txt") if "_" not in p.stem)
        raise DataError(
            f"VocDetection: image_set must be one of {', '.join(there)} in {list_file.parent}; got {image_set!r}."
        )
    pictures = {name.rpartition(".")[0]: name for name in sorted(list_files(folder / "JPEGImages"))}
    annotations = list_files(folder / "Annotations")
    seen: dict[str, int] = {}
    for number, line in enumerate(list_file.read_text(encoding="utf-8").splitlines(), start=1):
        words = line.split()
        if not words or words[1:] == ["-1"]:
            continue
        stem, where = words[0], f"{list_file} line {number}"
        if stem in seen:
            faults.add(f"{where}: names must be different; got {stem}, as in line {seen[stem]}. Remove the line.")
            continue
        seen[stem] = number
        missing = []
        if stem not in pictures:
            missing.append(str(folder / "JPEGImages" / f"{stem}.jpg"))
        if f"{stem}.xml" not in annotations:
            missing.append(str(folder / "Annotations" / f"{stem}.xml"))
        if missing:
            faults.add(
                f"{where}: {stem} must have a picture and an XML file; {' and '.join(missing)} not found. "
                "Restore it, or remove the line."
            )
            continue
        _read_xml(folder / "Annotations" / f"{stem}.xml", folder / "JPEGImages" / pictures[stem], found, faults)


def _read_xml(file: Path, picture: Path, found: _Found, faults: Faults) -> None:
    try:
        root = ET.parse(file).getroot()
    except ET.ParseError as error:
        faults.add(f"{file} line {error.position[0]}: must be well-formed XML; got: {error}. Restore the file.")
        return
    try:
        height, width = (int(float(root.findtext(f"size/{side}", ""))) for side in ("height", "width"))
    except ValueError:
        height = width = 0
    if height <= 0 or width <= 0:
        faults.add(
            f"{file}: annotation/size must hold width and height > 0; got width "
            f"{root.findtext('size/width')}, height {root.findtext('size/height')}. Write the picture's size there."
        )
        return
    index = len(found.files)
    found.files.append(str(picture))
    found.stems.append(file.stem)
    found.sizes.append((height, width))
    for number, item in enumerate(root.iterfind("object"), start=1):
        name = item.findtext("name", "").strip()
        if name not in found.labels_by_name:
            near = difflib.get_close_matches(name, found.labels_by_name, n=1, cutoff=0.65)
            hint = f"Did you mean {near[0]}?" if near else "Pass names=(...) for other classes than VOC's."
            faults.add(
                f"{file} line {_line_of_object(file, number)}: name of object {number} must be one of the "
                f"{len(found.labels_by_name)} classes; got {name!r}. {hint}"
            )
            continue
        # direct children only: a person's parts (head, hand, foot) carry boxes of their own
        corners = [item.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = (float(c) for c in corners if c is not None)
        except ValueError:
            faults.add(
                f"{file} line {_line_of_object(file, number)}: bndbox of object {number} must hold the numbers xmin, "
                f"ymin, xmax, ymax; got {corners}. Complete the box or remove the object."
            )
            continue
        difficult = item.findtext("difficult", "0").strip() == "1"
        found.objects.append((index, x1, y1, x2, y2, found.labels_by_name[name], difficult))
        found.places.append((file, number))


def _line_of_object(file: Path, number: int) -> int:
    """Line where the number-th <object> starts; read again, as only messages need it."""
    text = file.read_text(encoding="utf-8", errors="replace")
    starts = [match.start() for match in re.finditer(r"<object[\s>]", text)]
    return text.count("\n", 0, starts[number - 1]) + 1
