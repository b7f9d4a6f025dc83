"""MS COCO instances JSON, and any JSON written in its format.

Reference: Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014; the format: https://cocodataset.org/#format-data
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detcore.data.dataset import DataError
from detcore.data.pictures import AnnotatedPictures
from detcore.data.records import Faults, Records, check_boxes, list_files

__all__ = ["CocoDetection"]

KNOWN_EMPTY = {(200365, (296.65, 388.33, 1.03, 0.0)), (550395, (9.98, 188.56, 5.54, 0.0))}
"""The two boxes without height in the official instances_train2017.json (cocodataset/cocoapi issue 355).

They are left out, and reported in ``skipped``, without ``skip_bad``: the official file must open.
"""


class CocoDetection(AnnotatedPictures):
    """Pictures and boxes of a COCO instances file.

    COCO writes ``x, y, width, height`` from the top left corner of the picture; boxes become
    ``x, y, x + width, y + height``. Category ids have gaps (1..90 for 80 classes): labels are their rank,
    0..C-1, and ``category_ids[label]`` goes back. Crowds, and objects with ``"ignore": 1``, are kept with
    ``ignore`` true. Pictures without objects are kept. ``area`` is the file's (the mask's, in the
    official files), or the box's if there is none.

    Args:
        images_dir: the folder that ``file_name`` is relative to; ``None`` looks for it near the file.
        annotation_json: the instances file.
        skip_bad: leave bad objects and pictures out, and say so in :attr:`skipped`.
        classes: names of the classes to keep, relabelled 0.. in this order; ``None`` keeps all.
        only_with_objects: keep only pictures with at least one object that is not ignored.

    Raises:
        DataError: for a missing or malformed file, a missing key, an unknown image or category id, a missing picture,
            or a box that is empty, inverted or outside its picture; names the file and the id.
    """

    def __init__(
        self,
        images_dir: str | Path | None,
        annotation_json: str | Path,
        *,
        skip_bad: bool = False,
        classes: Sequence[str] | None = None,
        only_with_objects: bool = False,
    ) -> None:
        file = Path(annotation_json)
        content = _load(file)
        faults = Faults("CocoDetection", skip=skip_bad)
        known: list[str] = []
        names, category_ids = _read_categories(content["categories"], file, faults)
        images, left_out = _read_images(content["images"], file, faults)
        objects = _read_objects(content["annotations"], images, left_out, category_ids, file, faults, known)
        if images_dir is None:
            images_dir = _find_pictures(file, [im["file_name"] for im in images[:16]])
        del content  # the polygons of the official training set take gigabytes
        records = _pack(images, objects, Path(images_dir), file, faults)
        super().__init__(
            records,
            name=_short_name(file),
            classes=names,
            category_ids=category_ids.tolist(),
            wanted=classes,
            only_with_objects=only_with_objects,
            skipped=(*known, *faults.settle()),
            skip_bad=skip_bad,
        )


def _short_name(file: Path) -> str:
    """``annotations/instances_val2017.json`` -> ``coco-val2017``; ``voc20/instances_test.json`` -> ``voc20-test``."""
    folder = file.resolve().parent.name
    return f"{'coco' if folder == 'annotations' else folder}-{file.stem.removeprefix('instances_')}"


def _load(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"CocoDetection: annotation_json must be a file; {file} does not exist. "
            "To fetch it: detcore data download coco2017"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"CocoDetection: {file} must be JSON; got: {error}. The file may be cut short: fetch it again."
        ) from error
    keys = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(k), list) for k in keys):
        got = sorted(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise DataError(
            f"CocoDetection: {file} must be an object with the lists images, annotations and categories; got {got}. "
            "Results files and files of test sets have no annotations to train on."
        )
    return content


Rule = tuple[Callable[[Any], bool], str]
"""Test of a value, and what it must be. Lambdas, as the hook that checks types in tests is slow on so many calls."""

INTEGER: Rule = (lambda value: type(value) is int, "an integer")
SIDE: Rule = (lambda v: type(v) in (int, float) and v >= 1 and v % 1 == 0, "a whole number of pixels >= 1")
TEXT: Rule = (lambda value: isinstance(value, str) and value != "", "a text")
BBOX: Rule = (
    lambda v: type(v) is list and len(v) == 4 and all(type(x) in (int, float) for x in v),
    "[x, y, width, height]",
)


def _complete(rows: list[Any], rules: Mapping[str, Rule], kind: str, file: Path, faults: Faults) -> list[Any]:
    """The rows whose keys exist and pass their rules; notes the others by id or position."""
    tests = [(key, test) for key, (test, _) in rules.items()]
    good = []
    for position, row in enumerate(rows):
        here = row if type(row) is dict else {}
        key = next((key for key, test in tests if key not in here or not test(here[key])), None)
        if key is None:
            good.append(row)
            continue
        name = f"{kind} id {here['id']}" if "id" in here else f"{kind} number {position} (from 0, without id)"
        got = f"got {here[key]!r}" if key in here else f"the key is missing, got {sorted(here)}"
        faults.add(f'{file}: {name}: "{key}" must be {rules[key][1]}; {got}. Complete or remove the entry.')
    return good


def _read_categories(rows: list[Any], file: Path, faults: Faults) -> tuple[list[str], np.ndarray]:
    rules = {"id": INTEGER, "name": TEXT}
    rows = sorted(_complete(rows, rules, "category", file, faults), key=lambda row: row["id"])
    names, ids = [row["name"] for row in rows], [row["id"] for row in rows]
    if not rows or len(set(ids)) != len(ids) or len(set(names)) != len(names):
        raise DataError(
            f"CocoDetection: {file}: categories must have different ids and names, at least one; got ids {ids}, "
            f"names {names}. Give each class one entry."
        )
    return names, np.array(ids, dtype=np.int64)


def _read_images(rows: list[Any], file: Path, faults: Faults) -> tuple[list[Any], set[Any]]:
    """The sound entries, and the ids of the others."""
    rules = {
        "id": INTEGER,
        "file_name": TEXT,
        "width": SIDE,
        "height": SIDE,
    }
    good, seen = [], {}
    for row in _complete(rows, rules, "image", file, faults):
        if row["id"] in seen:
            faults.add(
                f"{file}: image id {row['id']} must be unique; got it for {seen[row['id']]} and {row['file_name']}. "
                "Renumber one of them."
            )
            continue
        seen[row["id"]] = row["file_name"]
        good.append(row)
    left_out = {row["id"] for row in rows if isinstance(row, dict) and type(row.get("id")) is int} - seen.keys()
    return good, left_out


def _read_objects(
    rows: list[Any],
    images: list[Any],
    left_out: set[Any],
    category_ids: np.ndarray,
    file: Path,
    faults: Faults,
    known: list[str],
) -> dict[str, np.ndarray]:
    """Arrays of the sound objects; ``picture`` indexes ``images``."""
    rules = {
        "image_id": INTEGER,
        "category_id": INTEGER,
        "bbox": BBOX,
    }
    rows = _complete(rows, rules, "annotation", file, faults)
    rows = [row for row in rows if row["image_id"] not in left_out]  # they went with their picture
    image_ids = np.array([row["id"] for row in images], dtype=np.int64)
    sizes = np.array([(row["height"], row["width"]) for row in images], dtype=np.int64).reshape(-1, 2)
    picture, image_known = _look_up(np.array([row["image_id"] for row in rows], dtype=np.int64), image_ids)
    label, label_known = _look_up(np.array([row["category_id"] for row in rows], dtype=np.int64), category_ids)
    xywh = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1).astype(np.float32)
    bounds = sizes[picture] if len(sizes) else np.zeros((len(rows), 2), dtype=np.int64)
    empty, outside = check_boxes(boxes, bounds)
    bad = ~image_known | ~label_known | empty | outside
    for i in np.flatnonzero(bad).tolist():
        row = rows[i]
        who = f"{file}: annotation id {row.get('id', f'missing (number {i} from 0)')} (image id {row['image_id']})"
        if (row["image_id"], tuple(row["bbox"])) in KNOWN_EMPTY:
            known.append(f"{who}: bbox {row['bbox']} has no height; a known slip of the official file, left out.")
        elif not image_known[i]:
            faults.add(
                f"{who}: image_id must be an id in images; no image has it. Remove the annotation, or add the image."
            )
        elif not label_known[i]:
            faults.add(
                f"{who}: category_id must be one of the {len(category_ids)} in categories; got {row['category_id']}. "
                "Correct it, or add the category."
            )
        elif empty[i]:
            faults.add(
                f"{who}: bbox must be finite [x, y, width, height] with width > 0 and height > 0; got {row['bbox']}. "
                "Correct or remove the annotation."
            )
        else:
            height, width = sizes[picture[i]].tolist()
            faults.add(
                f"{who}: bbox must lie inside its picture of {width} x {height} pixels; got [x, y, width, height] = "
                f"{row['bbox']}. Were corners written in place of width and height?"
            )
    crowd = np.array([row.get("iscrowd", 0) == 1 for row in rows], dtype=bool)
    ignore = np.array([row.get("ignore", 0) == 1 for row in rows], dtype=bool)
    areas = np.array([row.get("area", np.nan) for row in rows], dtype=np.float32)
    areas = np.where(np.isnan(areas), (xywh[:, 2] * xywh[:, 3]).astype(np.float32), areas)
    columns = {"picture": picture, "boxes": boxes, "labels": label, "areas": areas}
    columns |= {"crowd": crowd, "ignore": crowd | ignore}
    return {key: column[~bad] for key, column in columns.items()}


def _look_up(wanted: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index into ``ids`` of each wanted id (0 where there is none), and whether there is one."""
    if len(ids) == 0:
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    order = np.argsort(ids, kind="stable")
    slot = np.minimum(np.searchsorted(ids[order], wanted), len(ids) - 1)
    there = ids[order][slot] == wanted
    return np.where(there, order[slot], 0), there


def _find_pictures(file: Path, some_names: list[str]) -> Path:
    """The folder near ``file`` that the names are relative to; the file's own folder if none fits."""
    split = file.stem.removeprefix("instances_")
    candidates = [file.parent, file.parent.parent]
    candidates += [base / folder for base in candidates[:2] for folder in ("images", split, f"images/{split}")]
    for folder in candidates:
        if any((folder / name).is_file() for name in some_names):
            return folder
    return file.parent


def _pack(images: list[Any], objects: dict[str, np.ndarray], folder: Path, file: Path, faults: Faults) -> Records:
    """Checks that the pictures exist, one sweep a folder, and sorts the objects by picture."""
    names = [row["file_name"] for row in images]
    there: dict[str, frozenset[str]] = {}
    exists = np.zeros(len(images), dtype=bool)
    for i, name in enumerate(names):
        sub, _, leaf = name.rpartition("/")
        if sub not in there:
            there[sub] = list_files(folder / sub)
        exists[i] = leaf in there[sub]
    num_objects = np.bincount(objects["picture"], minlength=len(images))
    for i in np.flatnonzero(~exists).tolist():
        faults.add(
            f"{file}: image id {images[i]['id']}: file_name must be a picture below {folder}; {names[i]} is not there "
            f"({num_objects[i]} objects). Fetch the picture, or pass the folder that holds it."
        )
    order = np.argsort(objects["picture"], kind="stable")
    records = Records(
        tuple(os.path.join(folder, name) for name in names),
        np.array([row["id"] for row in images], dtype=np.int64),
        np.array([(row["height"], row["width"]) for row in images], dtype=np.int64).reshape(-1, 2),
        **{key: column[order] for key, column in objects.items()},
    )
    return records if exists.all() else records.keep_pictures(exists)
