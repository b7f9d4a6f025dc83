"""COCO JSON: the two files in which any framework's detections can be handed over."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detcore.evaluation.pooling import pool_detections, xywh

__all__ = ["from_coco_results", "load_coco_results", "to_coco_results"]


def to_coco_results(
    detections: Sequence[Mapping[str, Any]], image_ids: Sequence[int], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Detections as the list that COCO's server, pycocotools and most frameworks read.

    Args:
        detections: one mapping an image: ``boxes``, ``scores``, ``labels``, optionally
            ``class_scores`` and ``quality``.
        image_ids: the data set's id of each image, in the same order.
        category_ids: the data set's id of each class; index = label.

    Returns:
        One dict a detection: ``image_id``, ``category_id``, ``bbox`` as (x, y, width, height) in
        pixels, ``score``, and ``class_score`` and ``quality`` if the detector has them (others skip
        keys they do not know). Ready for ``json.dump``.

    Raises:
        KeyError: if a mapping lacks a key.
        ValueError: if the lists differ in length or a label has no id.

    Example:
        >>> seen = {"boxes": [[1.0, 2.0, 5.0, 4.0]], "labels": [1], "scores": [0.5]}
        >>> to_coco_results([seen], [42], [3, 17])
        [{'image_id': 42, 'category_id': 17, 'bbox': [1.0, 2.0, 4.0, 2.0], 'score': 0.5}]
    """
    found = pool_detections(detections, num_classes=len(category_ids), caller="to_coco_results")
    if len(image_ids) != found.num_images:
        raise ValueError(
            f"to_coco_results: image_ids must hold one id an image, {found.num_images} of them; got {len(image_ids)}."
        )
    columns: dict[str, list] = {
        "image_id": [int(image_ids[i]) for i in found.image.tolist()],
        "category_id": [int(category_ids[i]) for i in found.labels.tolist()],
        "bbox": xywh(found.boxes).tolist(),
    }
    columns |= {_JSON_KEYS[kind]: values.tolist() for kind, values in found.score_kinds().items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def from_coco_results(
    results: Sequence[Mapping[str, Any]],
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    *,
    name: str = "results",
) -> list[dict[str, Tensor]]:
    """The inverse of :func:`to_coco_results`, for any program's results.

    Args:
        results: one mapping a detection, in any order.
        image_ids: ids of the images wanted, in the order wanted.
        category_ids: id of each class; index = label.
        name: what error messages call ``results``, such as a file name.

    Returns:
        One dict an image, empty ones included: ``boxes`` (n, 4) corners in pixels, ``scores`` (n,)
        and ``labels`` (n,), and ``class_scores`` and ``quality`` if every result has them; float64,
        in the order of ``results``.

    Raises:
        KeyError: if a result lacks a key.
        ValueError: if an id is unknown or a value is malformed; the message names the result.

    Example:
        >>> result = {"image_id": 42, "category_id": 17, "bbox": [1, 2, 4, 2], "score": 0.5}
        >>> from_coco_results([result], [7, 42], [3, 17])[1]["boxes"].tolist()
        [[1.0, 2.0, 5.0, 4.0]]
    """
    image_index = {int(k): i for i, k in enumerate(image_ids)}
    label_index = {int(k): i for i, k in enumerate(category_ids)}
    for i, result in enumerate(results):
        for key in ("image_id", "category_id", "bbox", "score"):
            if key not in result:
                raise KeyError(f'from_coco_results: {name}[{i}] must have the key "{key}"; got {sorted(result)}.')
        for key, known in (("image_id", image_index), ("category_id", label_index)):
            if result[key] not in known:
                raise ValueError(
                    f"from_coco_results: {name}[{i}] has the unknown {key} {result[key]!r}; "
                    f"known are {_some(list(known))}. Do both files belong to the same data set?"
                )
    where = [f"{name}[{i}]" for i in range(len(results))]
    image = np.array([image_index[r["image_id"]] for r in results], dtype=np.int64)
    labels = np.array([label_index[r["category_id"]] for r in results], dtype=np.int64)
    boxes = _corners([r["bbox"] for r in results], where)
    kinds = {
        kind: np.array([r[key] for r in results], dtype=np.float64)
        for kind, key in _JSON_KEYS.items()
        if kind == "scores" or (results and all(key in r for r in results))
    }
    rows = _rows_by_image(image, len(image_ids))
    return [
        {"boxes": torch.from_numpy(boxes[mine]), "labels": torch.from_numpy(labels[mine])}
        | {kind: torch.from_numpy(values[mine]) for kind, values in kinds.items()}
        for mine in rows
    ]


def load_coco_results(
    annotations: str | Path, results: str | Path
) -> tuple[list[dict[str, Tensor]], list[dict[str, Any]], tuple[str, ...]]:
    """Read COCO's two files: the objects of a data set, and what a detector found.

    Args:
        annotations: path of an ``instances_*.json`` with ``images``, ``categories`` and
            ``annotations``; only boxes are read.
        results: path of a list as :func:`to_coco_results` describes it.

    Returns:
        Detections and targets, one dict an image, images in the order of their ids, and the names of
        the classes in the order of theirs (the order of the labels). Targets have ``boxes``,
        ``labels``, ``image_id``, ``area``, ``iscrowd`` and ``ignore`` (crowds, and what the file marks
        ``"ignore"``: pycocotools overlooks that mark, so for files that use it the numbers differ).

    Raises:
        FileNotFoundError: if a file is missing.
        KeyError: if a required key is missing.
        ValueError: if a file is not JSON or not of this form, an id is unknown or given twice, or a
            box is malformed; the message names the file and the entry.

    Example:
        >>> import tempfile
        >>> truth = {
        ...     "images": [{"id": 9}, {"id": 4}],
        ...     "categories": [{"id": 17, "name": "cat"}],
        ...     "annotations": [{"id": 1, "image_id": 9, "category_id": 17, "bbox": [1, 2, 4, 2]}],
        ... }
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "truth.json").write_text(json.dumps(truth))
        ...     _ = Path(folder, "found.json").write_text("[]")
        ...     found, objects, classes = load_coco_results(f"{folder}/truth.json", f"{folder}/found.json")
        >>> [target["image_id"] for target in objects], objects[1]["boxes"].tolist(), classes
        ([4, 9], [[1.0, 2.0, 5.0, 4.0]], ('cat',))
    """
    annotations, results = Path(annotations), Path(results)
    truth = _read_json(annotations, dict)
    for key in ("images", "categories", "annotations"):
        if key not in truth:
            raise KeyError(f'load_coco_results: {annotations.name} must have the key "{key}"; got {sorted(truth)}.')
    image_ids = _ids(truth["images"], f"{annotations.name}: images")
    names = {c["id"]: str(c.get("name", c["id"])) for c in truth["categories"] if "id" in c}
    category_ids = _ids(truth["categories"], f"{annotations.name}: categories")
    image_index = {k: i for i, k in enumerate(image_ids)}
    label_index = {k: i for i, k in enumerate(category_ids)}
    entries = truth["annotations"]
    where = [f"{annotations.name}: annotation {entry.get('id', f'number {i}')}" for i, entry in enumerate(entries)]
    for entry, here in zip(entries, where, strict=True):
        for key in ("image_id", "category_id", "bbox"):
            if key not in entry:
                raise KeyError(f'load_coco_results: {here} must have the key "{key}"; got {sorted(entry)}.')
        for key, known in (("image_id", image_index), ("category_id", label_index)):
            if entry[key] not in known:
                raise ValueError(
                    f"load_coco_results: {here} has the unknown {key} {entry[key]!r}; known are {_some(list(known))}."
                )
    image = np.array([image_index[e["image_id"]] for e in entries], dtype=np.int64)
    labels = np.array([label_index[e["category_id"]] for e in entries], dtype=np.int64)
    boxes = _corners([e["bbox"] for e in entries], where)
    own_area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    area = np.array([e.get("area", own) for e, own in zip(entries, own_area.tolist(), strict=True)], dtype=np.float64)
    crowd = np.array([bool(e.get("iscrowd", 0)) for e in entries], dtype=bool)
    ignore = crowd | np.array([bool(e.get("ignore", 0)) for e in entries], dtype=bool)
    targets = [
        {
            "boxes": torch.from_numpy(boxes[mine]),
            "labels": torch.from_numpy(labels[mine]),
            "image_id": image_ids[i],
            "area": torch.from_numpy(area[mine]),
            "iscrowd": torch.from_numpy(crowd[mine].astype(np.int64)),
            "ignore": torch.from_numpy(ignore[mine]),
        }
        for i, mine in enumerate(_rows_by_image(image, len(image_ids)))
    ]
    detections = from_coco_results(_read_json(results, list), image_ids, category_ids, name=results.name)
    return detections, targets, tuple(names[k] for k in category_ids)


_JSON_KEYS = {"scores": "score", "class_scores": "class_score", "quality": "quality"}


def _corners(boxes: list, where: list[str]) -> np.ndarray:
    """(x, y, width, height) lists as corners, or an error that names the entry."""
    for box, here in zip(boxes, where, strict=True):
        if not (isinstance(box, list | tuple) and len(box) == 4 and all(isinstance(v, int | float) for v in box)):
            raise ValueError(f"load_coco_results: {here} must have a bbox [x, y, width, height]; got {box!r}.")
        if not (np.isfinite(box).all() and box[2] >= 0 and box[3] >= 0):
            raise ValueError(f"load_coco_results: {here} must have a finite bbox of width and height >= 0; got {box}.")
    array = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return np.concatenate([array[:, :2], array[:, :2] + array[:, 2:]], axis=1)


def _rows_by_image(image: np.ndarray, num_images: int) -> list[np.ndarray]:
    """Row indices of each image, in their order."""
    order = np.argsort(image, kind="stable")
    return np.split(order, np.searchsorted(image[order], np.arange(1, num_images)))[:num_images]


def _read_json(path: Path, kind: type) -> Any:
    with path.open(encoding="utf-8") as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"load_coco_results: {path} must be JSON; got {error.msg!r} at line {error.lineno}, "
                f"column {error.colno}. Was it written to the end?"
            ) from error
    if not isinstance(content, kind):
        form = {dict: "an object with images, categories and annotations", list: "a list of results"}[kind]
        raise ValueError(f"load_coco_results: {path} must hold {form}; got a {type(content).__name__}.")
    return content


def _ids(entries: list, name: str) -> list[int]:
    """Ids in ascending order, each once."""
    for i, entry in enumerate(entries):
        if "id" not in entry:
            raise KeyError(f'load_coco_results: {name}[{i}] must have the key "id"; got {sorted(entry)}.')
    ids = sorted(entry["id"] for entry in entries)
    twice = [a for a, b in pairwise(ids) if a == b]
    if twice:
        raise ValueError(f"load_coco_results: {name} must have different ids; got {twice[0]} twice.")
    return ids


def _some(known: list) -> str:
    """The first few of a long list, for a message."""
    return f"{known[:8]}" if len(known) <= 8 else f"{known[:8]} and {len(known) - 8} more"
