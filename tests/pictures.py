"""A small data set with crowds, ties, all sizes and more than ten boxes of a class, made by integer arithmetic.

It is the same on every machine, so the numbers that other people's code gives for it can be frozen.
"""

import numpy as np


def boxes_at(seeds, largest):
    s = np.asarray(seeds, dtype=float)
    x, y = s * 37 % 211, s * 53 % 173
    return np.stack([x, y, x + 6 + s * 29 % largest, y + 6 + s * 41 % largest], axis=1)


def pictures():
    detections, targets = [], []
    for i in range(14):
        n = i * 3 % 7  # objects; none in pictures 0 and 7
        seeds = np.arange(n) * 7 + i * 13
        boxes = boxes_at(seeds, 130)
        area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        targets.append(
            {
                "boxes": boxes,
                "labels": seeds % 3,
                "iscrowd": (seeds % 11 == 3).astype(int),
                "area": area * (0.5 + seeds % 4 / 8),
            }
        )
        k = np.arange(6 * n)  # six boxes around each object, and nine anywhere
        near = boxes[k // 6] + np.stack([k * 5 % 19, k * 7 % 23, k * 3 % 17, k * 11 % 21], axis=1) - 9
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        far = np.arange(9) * 17 + i * 5
        detections.append(
            {
                "boxes": np.concatenate([near, boxes_at(far, 70)]),
                "labels": np.concatenate([(seeds % 3)[k // 6], far % 3]),
                "scores": np.concatenate([k * 13 % 17 / 25 + 0.1, far * 7 % 19 / 22]),
            }
        )
    return detections, targets


def as_coco_json(detections, targets, image_ids, category_ids):
    """The fixture as COCO's two files, written down box by box."""
    annotations, results = [], []
    for image_id, found, truth in zip(image_ids, detections, targets, strict=True):
        columns = (truth[key].tolist() for key in ("boxes", "labels", "area", "iscrowd"))
        for (x1, y1, x2, y2), label, area, iscrowd in zip(*columns, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": iscrowd,
                }
            )
        columns = (found[key].tolist() for key in ("boxes", "labels", "scores"))
        for (x1, y1, x2, y2), label, score in zip(*columns, strict=True):
            box = [x1, y1, x2 - x1, y2 - y1]
            results.append({"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score})
    truth = {
        "images": [{"id": i} for i in image_ids],
        "categories": [{"id": c, "name": f"class {c}"} for c in category_ids],
        "annotations": annotations,
    }
    return truth, results
