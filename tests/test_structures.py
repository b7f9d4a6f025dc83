import pytest
import torch
from torch.testing import assert_close
from torchvision import tv_tensors

from detcore.structures import (
    BACKGROUND,
    IGNORE,
    Assignment,
    Detections,
    Priors,
    Targets,
    pad_targets,
    to_dicts,
)


def target(boxes, labels, **more):
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64), **more}


BOX = [1.0, 2.0, 5.0, 9.0]


def test_pad_targets_keeps_objects_in_order_and_fills_the_rest():
    batch = pad_targets([target([BOX, [0.0, 0.0, 1.0, 1.0]], [3, 0]), target([], [])])
    assert batch.boxes.shape == (2, 8, 4)
    assert batch.boxes.dtype == torch.float32
    assert batch.boxes[0, :2].tolist() == [BOX, [0.0, 0.0, 1.0, 1.0]]
    assert batch.boxes[0, 2:].abs().sum() + batch.boxes[1].abs().sum() == 0
    assert batch.labels.tolist() == [[3, 0] + [BACKGROUND] * 6, [BACKGROUND] * 8]
    assert batch.valid.tolist() == [[True, True] + [False] * 6, [False] * 8]
    assert batch.sizes is None


@pytest.mark.parametrize(("objects", "multiple", "slots"), [(0, 8, 8), (8, 8, 8), (9, 8, 16), (0, 1, 1), (3, 1, 3)])
def test_pad_targets_rounds_slots_up(objects, multiple, slots):
    batch = pad_targets([target([BOX] * objects, [0] * objects)], multiple=multiple)
    assert batch.boxes.shape[1] == slots
    assert batch.valid.sum() == objects


@pytest.mark.parametrize("key", ["ignore", "iscrowd"])
def test_pad_targets_leaves_flagged_objects_out(key):
    boxes = [BOX, [0.0, 0.0, 0.0, 0.0], [2.0, 2.0, 4.0, 4.0]]  # the crowd's own box is not even looked at
    batch = pad_targets([target(boxes, [5, 99, 7], **{key: torch.tensor([0, 1, 0])})], num_classes=10)
    assert batch.labels[0, :3].tolist() == [5, 7, BACKGROUND]
    assert batch.boxes[0, 1].tolist() == [2.0, 2.0, 4.0, 4.0]


def test_pad_targets_leaves_its_input_alone_and_takes_subclasses():
    boxes = tv_tensors.BoundingBoxes([BOX], format="XYXY", canvas_size=(20, 20), dtype=torch.float64)
    batch = pad_targets([{"boxes": boxes, "labels": torch.tensor([1], dtype=torch.int32)}])
    assert type(batch.boxes) is torch.Tensor
    batch.boxes.zero_()
    assert boxes.tolist() == [BOX]


BAD = {
    "no boxes": ({"labels": torch.tensor([1])}, KeyError, r'targets\[1\] must have the key "boxes"; got \[.*labels'),
    "no labels": ({"boxes": torch.zeros(0, 4)}, KeyError, r'targets\[1\] must have the key "labels"'),
    "flat boxes": (
        {"boxes": torch.tensor(BOX), "labels": torch.tensor([1])},
        ValueError,
        r"must have shape \(n, 4\); got \(4,\)",
    ),
    "flat empty": (
        {"boxes": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)},
        ValueError,
        r"needs torch.zeros\(0, 4\)",
    ),
    "label missing": (target([BOX, BOX], [1]), ValueError, r"must have shape \(2,\), one label a box; got \(1,\)"),
    "inverted": (
        target([BOX, [5.0, 2.0, 1.0, 9.0]], [1, 1]),
        ValueError,
        r'targets\[1\]\["boxes"\] must be finite xyxy.*got \[5.0, 2.0, 1.0, 9.0\] in row 1',
    ),
    "flat": (target([[1.0, 2.0, 1.0, 9.0]], [1]), ValueError, r"x1 < x2 and y1 < y2; got \[1.0, 2.0, 1.0, 9.0\]"),
    "nan": (target([[1.0, float("nan"), 3.0, 9.0]], [1]), ValueError, "must be finite"),
    "infinite": (target([[1.0, 2.0, float("inf"), 9.0]], [1]), ValueError, "must be finite"),
    "too high": (
        target([BOX, BOX], [2, 3]),
        ValueError,
        r'\["labels"\] must be >= 0 and < num_classes = 3; got 3 in row 1.*Labels count from 0',
    ),
    "negative": (target([BOX], [-1]), ValueError, "must be >= 0.*got -1 in row 0"),
    "crowd flags": (
        target([BOX], [1], iscrowd=torch.tensor([0, 1])),
        ValueError,
        r'\["iscrowd"\] must have shape \(1,\); got \(2,\)',
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_pad_targets_names_what_is_wrong(case):
    bad, error, message = BAD[case]
    with pytest.raises(error, match=message):
        pad_targets([target([BOX], [0]), bad], num_classes=3)


def test_pad_targets_counts_rows_as_the_caller_does():
    crowd_first = target([BOX, [3.0, 3.0, 3.0, 4.0]], [0, 0], iscrowd=torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="in row 1"):
        pad_targets([crowd_first])


def test_pad_targets_refuses_no_images_and_no_slots():
    with pytest.raises(ValueError, match="must hold one mapping an image; got an empty sequence"):
        pad_targets([])
    with pytest.raises(ValueError, match="multiple must be >= 1; got 0"):
        pad_targets([target([BOX], [0])], multiple=0)


def test_to_moves_every_tensor_and_keeps_the_rest():
    batch = pad_targets([target([BOX], [0])], sizes=torch.tensor([[20, 30]]))
    moved = batch.to("meta")
    assert {moved.boxes.device.type, moved.labels.device.type, moved.valid.device.type, moved.sizes.device.type} == {
        "meta"
    }
    assert pad_targets([target([BOX], [0])]).to("cpu").sizes is None
    assert Priors(torch.zeros(1, 5, 4), (3, 2)).to("meta").counts == (3, 2)


def test_priors_level_follows_the_counts():
    assert Priors(torch.zeros(1, 6, 4), (3, 0, 1, 2)).level.tolist() == [0, 0, 0, 2, 3, 3]


def assignment(labels):
    labels = torch.tensor(labels)
    shape = labels.shape
    targets = Targets(
        torch.zeros(shape[0], 1, 4), torch.zeros(shape[0], 1, dtype=torch.int64), torch.ones(shape[0], 1) > 0
    )
    return Assignment(labels, torch.zeros_like(labels), torch.zeros(*shape, 4), torch.zeros(shape), targets)


def test_assignment_splits_priors_in_three():
    match = assignment([[0, 4, BACKGROUND, IGNORE]])
    assert match.positive.tolist() == [[True, True, False, False]]
    assert match.negative.tolist() == [[False, False, True, False]]
    assert match.ignored.tolist() == [[False, False, False, True]]


@pytest.mark.parametrize(
    ("labels", "count"), [([[0, 4], [2, -1]], 3.0), ([[0, -1], [-2, -1]], 1.0), ([[-1], [-2]], 1.0)]
)
def test_num_positive_counts_the_batch_and_never_gives_zero(labels, count):
    number = assignment(labels).num_positive
    assert_close(number, torch.tensor(count))


@pytest.mark.parametrize(
    ("mine", "others", "expected"),
    [(3, 2, 2.5), (0, 6, 3.0), (1, 0, 0.5), (0, 0, 0.5)],  # (1, 0): jointly 1, so half a positive a worker
)
def test_num_positive_under_two_workers_is_the_joint_number_halved(monkeypatch, mine, others, expected):
    # Each worker divides its sum by this; the mean of the two gradients is then (s1 + s2) / max(1, joint).
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda count: count.add_(others))
    assert_close(assignment([[0] * mine + [-1]]).num_positive, torch.tensor(expected))


def test_to_dicts_drops_padding_and_absent_fields():
    found = Detections(
        boxes=torch.arange(16.0).view(2, 2, 4),
        scores=torch.tensor([[0.9, 0.4], [0.0, 0.0]]),
        labels=torch.tensor([[2, 1], [BACKGROUND, BACKGROUND]]),
        valid=torch.tensor([[True, True], [False, False]]),
        quality=torch.tensor([[0.3, 0.6], [0.0, 0.0]]),
    )
    first, second = to_dicts(found)
    assert list(first) == ["boxes", "scores", "labels", "quality"]
    assert first["labels"].tolist() == [2, 1]
    assert_close(first["quality"], torch.tensor([0.3, 0.6]))
    assert {name: tuple(value.shape) for name, value in second.items()} == {
        "boxes": (0, 4),
        "scores": (0,),
        "labels": (0,),
        "quality": (0,),
    }
