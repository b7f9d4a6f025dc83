import pickle

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from detcore.boxes import pairwise_iou
from detcore.data import ssd_crop
from detcore.data.batch import PAD_COLOUR
from detcore.data.transforms import (
    PER_OBJECT,
    ResizeShortSide,
    SsdCrop,
    drop_empty,
    learn_difficult,
    retinanet_transform,
    square_transform,
    ssd_transform,
)

# Far apart in colour, so that each rectangle can be found again after any geometry.
CANVAS = torch.tensor([0.0, 0.0, 160.0, 120.0])
COLOURS = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)


def sample(height=120, width=160):
    """Three rectangles on black; every per-object key repeats the rectangle's number."""
    boxes = torch.tensor([[8.0, 10.0, 40.0, 90.0], [50.0, 20.0, 90.0, 50.0], [100.0, 60.0, 150.0, 110.0]])
    boxes = boxes * torch.tensor([width / 160, height / 120] * 2)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for (x1, y1, x2, y2), colour in zip(boxes.int().tolist(), COLOURS, strict=True):
        image[:, y1:y2, x1:x2] = colour[:, None, None]
    numbers = torch.arange(3)
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": numbers,
        "area": numbers.float(),
        "iscrowd": numbers % 2,
        "ignore": numbers == 2,
        "image_id": 41,
        "original_size": torch.tensor([height, width]),
    }
    return tv_tensors.Image(image), target


def empty_sample():
    image, target = sample()
    rows = {key: target[key][:0] for key in PER_OBJECT}
    return image, {**target, **rows, "boxes": tv_tensors.wrap(target["boxes"][:0], like=target["boxes"])}


def find(image, number):
    """Box of the pixels that are mostly of this rectangle's colour."""
    other = [c for c in range(3) if c != number]
    shown = (image[number] > 127) & (image[other[0]] < 100) & (image[other[1]] < 100)
    rows, columns = shown.any(1).nonzero()[:, 0], shown.any(0).nonzero()[:, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


TRAINING = {
    "retinanet": retinanet_transform(90, 200, train=True),
    "square": square_transform(96, train=True),
    "ssd": ssd_transform(160, train=True, colours=False),  # colours kept, to find them again
    "ssd all": ssd_transform(160, train=True, colours=False, rule="all"),
    "ssd torchvision": ssd_transform(160, train=True, colours=False, rule="torchvision"),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_transforms_keep_boxes_on_their_objects(name):
    checked, flipped = 0, 0
    for seed in range(60):
        torch.manual_seed(seed)
        image, target = TRAINING[name](*sample())
        assert image.dtype == torch.uint8
        assert target["boxes"].canvas_size == tuple(image.shape[-2:])
        for number, box in zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True):
            if min(box[2] - box[0], box[3] - box[1]) < 6:
                continue  # a sliver, whose colour is mixed with what is around it
            np.testing.assert_allclose(find(image, number), box, atol=1.5)
            checked += 1
        boxes = dict(zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True))
        flipped += 0 in boxes and 2 in boxes and boxes[0][0] > boxes[2][0]
    assert checked > 60
    assert 5 < flipped < 55


@pytest.mark.parametrize("name", TRAINING)
def test_training_transforms_keep_every_key_in_step(name):
    kept = set()
    for seed in range(40):
        torch.manual_seed(seed)
        _, target = TRAINING[name](*sample())
        numbers = target["labels"]
        assert target["area"].tolist() == numbers.tolist()
        assert target["iscrowd"].tolist() == (numbers % 2).tolist()
        assert target["ignore"].tolist() == (numbers == 2).tolist()
        assert len(target["boxes"]) == len(numbers)
        assert target["image_id"] == 41
        assert target["original_size"].tolist() == [120, 160]
        kept.add(len(numbers))
    assert kept == ({1, 2, 3} if "ssd" in name else {3})


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("factory", [lambda train: retinanet_transform(90, 200, train=train),
                                     lambda train: square_transform(96, train=train),
                                     lambda train: ssd_transform(96, train=train)])  # fmt: skip
def test_transforms_accept_pictures_without_objects(factory, train):
    for _ in range(10):
        image, target = factory(train)(*empty_sample())
        assert image.dtype == torch.uint8
        assert tuple(target["boxes"].shape) == (0, 4)
        assert [len(target[key]) for key in PER_OBJECT] == [0] * 4


@pytest.mark.parametrize(
    ("factory", "size"),
    [
        (retinanet_transform(90, 200, train=False), (90, 120)),
        (square_transform(96, train=False), (96, 96)),
        (ssd_transform(96, train=False), (96, 96)),
    ],
)
def test_evaluation_transforms_only_resize(factory, size):
    image, target = factory(*sample())
    again, _ = factory(*sample())
    torch.testing.assert_close(image, again, rtol=0, atol=0)
    assert tuple(image.shape[-2:]) == size
    scale = torch.tensor([size[1] / 160, size[0] / 120] * 2)
    expected = sample()[1]["boxes"].as_subclass(torch.Tensor) * scale
    torch.testing.assert_close(target["boxes"].as_subclass(torch.Tensor), expected)


def test_transforms_can_be_sent_to_workers():
    for transform in (retinanet_transform(90, 200, train=True), ssd_transform(96, train=True)):
        torch.manual_seed(3)
        expected, _ = transform(*sample())
        torch.manual_seed(3)
        image, _ = pickle.loads(pickle.dumps(transform))(*sample())
        torch.testing.assert_close(image, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),  # 640 * 800/480 = 1066.7
        ((640, 480), (1067, 800)),
        ((300, 900), (444, 1333)),  # the long side limits: 1333/900 = 1.481
        ((2000, 10), (1333, 7)),  # 10 * 1333/2000 = 6.7
        ((5000, 1), (1333, 1)),  # never 0
    ],
)
def test_resize_short_side_sizes(size, expected):
    assert ResizeShortSide(800, 1333).size(*size) == expected


def test_resize_short_side_rejects_impossible_sides():
    with pytest.raises(ValueError, match=r"short_side must be in \[1, long_side\]; got 400 with 300"):
        retinanet_transform(400, 300, train=True)
    assert ResizeShortSide(300, 300).size(10, 20) == (150, 300)


def test_drop_empty_clips_and_drops():
    image, target = sample()
    boxes = torch.tensor([[-5.0, -5.0, 0.9, 50.0], [100.0, 100.0, 300.0, 300.0], [10.0, 10.0, 11.0, 11.0]])
    image, target = drop_empty(image, {**target, "boxes": boxes})
    # The first keeps 0.9 pixels of width; the last is exactly a pixel large and stays.
    assert target["boxes"].tolist() == [[100, 100, 160, 120], [10, 10, 11, 11]]
    assert target["labels"].tolist() == [1, 2]
    assert target["area"].tolist() == [1, 2]
    _, target = drop_empty(image, target, min_side=2.0)
    assert target["labels"].tolist() == [1]


def test_drop_empty_leaves_its_input_alone():
    image, target = sample()
    boxes = target["boxes"].clone()
    boxes[0, 0] = -20
    _, clipped = drop_empty(image, {**target, "boxes": boxes})
    assert boxes[0, 0] == -20
    assert clipped["boxes"][0, 0] == 0


def test_ssd_crop_zooms_out_onto_the_mean_colour():
    torch.manual_seed(0)
    crop = SsdCrop(100, zoom=1.0)
    mean = torch.tensor(PAD_COLOUR, dtype=torch.uint8)
    shares = []
    for _ in range(80):
        image, _ = crop(*sample())
        shares.append((image == mean[:, None, None]).all(0).float().mean())
    assert max(shares) > 0.8  # the canvas is up to 16 times the picture
    assert 0.2 < torch.stack(shares).mean() < 0.8


def test_ssd_crop_never_shows_the_mean_colour_without_zoom():
    torch.manual_seed(0)
    crop = SsdCrop(100, zoom=0.0)
    mean = torch.tensor(PAD_COLOUR, dtype=torch.uint8)
    for _ in range(40):
        image, _ = crop(*sample())
        assert not (image == mean[:, None, None]).all(0).any()


def test_ssd_crop_distorts_the_picture_and_not_the_mean_colour():
    image, target = sample()
    crop = SsdCrop(64, zoom=1.0, distort=lambda pixels: torch.full_like(pixels, 255))
    seen = set()
    for _ in range(10):
        seen |= set(map(tuple, crop(image, target)[0].flatten(1).T.tolist()))
    assert seen == {PAD_COLOUR, (255, 255, 255)}


def test_ssd_crop_window_beside_the_picture_shows_the_mean_colour():
    crop = SsdCrop(64, zoom=1.0)
    crop.window = lambda boxes, canvas: torch.tensor([170.0, 0.0, 200.0, 30.0])
    image, target = crop(*empty_sample())
    assert (image == torch.tensor(PAD_COLOUR)[:, None, None]).all()
    assert tuple(target["boxes"].shape) == (0, 4)


def test_ssd_crop_of_the_whole_canvas_equals_a_plain_resize():
    image, target = sample()
    crop = SsdCrop(80, zoom=0.0)
    crop.window = lambda boxes, canvas: canvas
    result, cropped = crop(image, target)
    expected, resized = square_transform(80, train=False)(image, target)
    torch.testing.assert_close(result, expected, atol=0, rtol=0)
    torch.testing.assert_close(cropped["boxes"], resized["boxes"])


@pytest.mark.parametrize(("rule", "reduce"), [("some", "max"), ("all", "min")])
def test_ssd_windows_obey_their_rule(rule, reduce):
    boxes = sample()[1]["boxes"].as_subclass(torch.Tensor)
    crop = SsdCrop(100, rule=rule)
    reached, whole = [], 0
    for _ in range(400):
        window = crop.window(boxes, CANVAS)[None]
        x1, y1, x2, y2 = window[0].tolist()
        assert 0 <= x1 < x2 <= 160.001
        assert 0 <= y1 < y2 <= 120.001
        assert 0.49 < ((x2 - x1) / 160) / ((y2 - y1) / 120) < 2.01
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        assert ((centres > window[:, :2]) & (centres < window[:, 2:])).all(1).any()
        reached.append(float(getattr(pairwise_iou(window, boxes), reduce)()))
        whole += [x1, y1, x2, y2] == [0, 0, 160, 120]
    reached = np.array(reached)
    if rule == "some":
        # The largest IoU any of these windows can have is limited by the 0.3 smallest side.
        assert (reached >= 0.3).mean() > 0.3
        assert 0.1 < whole / 400 < 0.5
    else:
        # Three objects far apart: no window overlaps all by 0.3, so the whole canvas comes often.
        assert whole / 400 > 0.3


def test_ssd_crop_rules_differ():
    # One object that many windows fit, a small one in a corner: any window has IoU <= 400/1728 with it.
    boxes = torch.tensor([[30.0, 20.0, 130.0, 100.0], [140.0, 100.0, 160.0, 120.0]])
    shares = {}
    for rule in ("some", "all"):
        torch.manual_seed(0)
        windows = torch.stack([SsdCrop(100, rule=rule).window(boxes, CANVAS) for _ in range(200)])
        shares[rule] = float((pairwise_iou(windows, boxes).amax(1) >= 0.5).float().mean())
    assert shares["some"] > 0.45
    assert shares["all"] < 0.4


def test_ssd_crop_draws_evenly_among_the_ways_that_can_be_gone():
    # No window of at least 0.3 x 0.3 overlaps so small an object by 0.1: only "whole" and "free" are left.
    boxes = torch.tensor([[80.0, 60.0, 84.0, 63.0]])
    windows = [SsdCrop(100).window(boxes, CANVAS).tolist() for _ in range(300)]
    assert 0.4 < sum(window == CANVAS.tolist() for window in windows) / 300 < 0.6


def test_ssd_crop_asks_for_the_published_overlaps(monkeypatch):
    # One object as large as the canvas: the IoU of a window is its area. Way by way, the least area drawn.
    boxes, least = CANVAS[None], {}
    for way in range(1, 7):
        monkeypatch.setattr(torch, "randperm", lambda n, way=way: torch.tensor([way]))
        areas = []
        for _ in range(150):
            x1, y1, x2, y2 = SsdCrop(100).window(boxes, CANVAS).tolist()
            areas.append((x2 - x1) * (y2 - y1) / (160 * 120))
        least[way] = min(areas)
    bounds = {1: 0.09, 2: 0.1, 3: 0.3, 4: 0.5, 5: 0.7, 6: 0.9}  # 0.09: sides of 0.3
    for way, bound in bounds.items():
        assert bound - 1e-5 <= least[way] < bound + 0.1


def test_ssd_windows_have_the_published_shapes():
    windows = torch.from_numpy(ssd_crop._caffe_windows(np.array([0.0, 0.0, 1.0, 1.0]), 4000))
    wide, tall = (windows[:, 2:] - windows[:, :2]).unbind(1)
    side, ratio = (wide * tall).sqrt(), wide / tall
    assert 0.3 - 1e-5 <= side.min() < 0.32
    assert 0.98 < side.max() <= 1
    assert (ratio >= (side * side).clamp(min=0.5) - 1e-4).all()
    assert (ratio <= (1 / (side * side)).clamp(max=2) + 1e-3).all()
    assert ratio.min() < 0.55
    assert ratio.max() > 1.9
    assert windows.min() >= 0
    assert windows.max() <= 1 + 1e-6
    assert windows[:, 0].max() > 0.6  # anywhere


def test_ssd_crop_zooms_out_to_four_times_the_side():
    seen = []
    crop = SsdCrop(50)
    crop.window = lambda boxes, canvas: seen.append(canvas) or canvas
    for _ in range(300):
        crop.move_boxes({"boxes": torch.zeros(0, 4)}, (120, 160))
    canvases = torch.stack(seen)
    ratio = (canvases[:, 2] - canvases[:, 0]) / 160
    torch.testing.assert_close(ratio, (canvases[:, 3] - canvases[:, 1]) / 120, rtol=0, atol=1 / 120)  # whole pixels
    zoomed = ratio > 1
    assert 0.4 < zoomed.float().mean() < 0.6
    assert 1 < ratio[zoomed].min() < 1.2
    assert 3.8 < ratio.max() <= 4
    assert 2.3 < ratio[zoomed].mean() < 2.7
    assert (canvases[:, :2] <= 0).all()  # the picture is on it whole
    assert (canvases[:, 2:] >= torch.tensor([160.0, 120.0]) - 0.51).all()


def test_ssd_crop_moves_boxes_without_a_picture():
    crop, (image, target) = SsdCrop(90), sample()
    for seed in range(20):
        torch.manual_seed(seed)
        _, with_picture = crop(image, target)
        torch.manual_seed(seed)
        alone = crop.move_boxes(target, (120, 160))
        torch.testing.assert_close(alone["boxes"], with_picture["boxes"], rtol=0, atol=0)
        assert alone["labels"].tolist() == with_picture["labels"].tolist()
        assert alone["boxes"].canvas_size == (90, 90)


def test_ssd_transform_mirrors_half_of_the_pictures_and_changes_their_colours():
    crop, last = ssd_transform(96, train=True).transforms
    assert (crop.flip, type(crop.distort).__name__, last) == (0.5, "PhotometricDistort", drop_empty)
    assert ssd_transform(96, train=True, colours=False).transforms[0].distort is None


def test_learn_difficult_keeps_crowds_out():
    image, target = sample()
    before = target["ignore"].tolist()
    same, learnt = learn_difficult(image, target)
    assert same is image
    assert before == [False, False, True]
    assert learnt["ignore"].tolist() == [False, True, False]  # the second one is a crowd
    assert target["ignore"].tolist() == before
    assert learnt["labels"] is target["labels"]


def test_ssd_crop_rejects_an_unknown_rule():
    with pytest.raises(ValueError, match='rule must be "some", "all" or "torchvision"; got \'any\''):
        ssd_transform(300, train=True, rule="any")


# --- beside torchvision's chain


def chain():
    """``RandomZoomOut`` to ``SanitizeBoundingBoxes`` as in torchvision's references, without colours."""
    fill = {tv_tensors.Image: PAD_COLOUR}
    return v2.Compose(
        [
            v2.RandomZoomOut(fill=fill),
            v2.RandomIoUCrop(),
            v2.RandomHorizontalFlip(0.5),
            v2.Resize((300, 300)),
            v2.SanitizeBoundingBoxes(),
        ]
    )


def box_traits(transform, boxes, count):
    """Of many augmentations of one picture: objects left, and means over them of place, side and ratio."""
    image = tv_tensors.Image(torch.zeros(3, 48, 64, dtype=torch.uint8))
    traits = []
    for _ in range(count):
        given = tv_tensors.BoundingBoxes(boxes.clone(), format="XYXY", canvas_size=(48, 64))
        _, target = transform(image, {"boxes": given, "labels": torch.arange(len(boxes))})
        x1, y1, x2, y2 = target["boxes"].as_subclass(torch.Tensor).double().T
        wide, tall = x2 - x1, y2 - y1
        inside = [x1 + x2, y1 + y2, (wide * tall).sqrt(), wide, tall, (wide / tall).log()]
        means = [each.mean() if len(each) else torch.tensor(0.0) for each in inside]
        traits.append([float(len(wide)), *map(float, means), float(0 in target["labels"])])
    return np.array(traits)


def moments(traits):
    """Means of the traits and of their squares, and the standard errors of these."""
    both = np.concatenate([traits, traits * traits], axis=1)
    return both.mean(0), both.std(0) / len(both) ** 0.5


def worst_difference(mine, theirs):
    """The largest difference of two moments, in its standard errors."""
    (a, a_error), (b, b_error) = mine, theirs
    error = np.hypot(a_error, b_error)
    return (np.abs(a - b)[error > 0] / error[error > 0]).max()


PICTURES = {
    "one large": torch.tensor([[6.0, 4.0, 58.0, 45.0]]),
    "large and small": torch.tensor([[20.0, 10.0, 60.0, 40.0], [3.0, 5.0, 9.0, 11.0]]),
    "three": torch.tensor([[2.0, 2.0, 30.0, 46.0], [28.0, 20.0, 44.0, 30.0], [50.0, 8.0, 63.0, 40.0]]),
}
# 16 numbers a picture: all stay below 4 standard errors but once in a thousand tests. Seeds are fixed.
LIMIT = 4.0
# Moments and their standard errors, 8000 times each, from torchvision 0.29.2.
GOLDEN = {
    "large and small": """
        1.4759 299.2 270.3 150.71 154.73 148.84 -0.022536 0.973 2.4276 97933 81523 30577 32841 29847 0.065494 0.973
        0.0056 1.0 1.0 0.99 1.1 0.98 0.0029 0.0018 0.017 630 580 320 360 320 0.0012 0.0018
    """,
    "three": """
        2.2539 300.25 304.58 133.0 115.98 162.24 -0.33239 0.90025 5.7214 97611 99586 23101 19231 31937 0.23573 0.90025
        0.009 0.97 0.92 0.82 0.85 0.84 0.004 0.0034 0.037 590 570 280 270 300 0.0027 0.0034
    """,
}


def golden(name):
    return np.array(GOLDEN[name].split(), dtype=float).reshape(2, 16)


def moments_of_ours(rule, name, count):
    """Of the boxes alone: the same random numbers would give the same with pixels."""
    torch.manual_seed(0)
    crop, canvas = SsdCrop(300, rule=rule, flip=0.5), torch.empty(3, 300, 300)

    def transform(image, target):
        return drop_empty(canvas, crop.move_boxes(target, (48, 64)))

    return moments(box_traits(transform, PICTURES[name], count))


@pytest.mark.parametrize("name", GOLDEN)
def test_boxes_are_distributed_as_those_of_torchvision(name):
    assert worst_difference(moments_of_ours("torchvision", name, 2500), golden(name)) < LIMIT


@pytest.mark.parametrize("name", GOLDEN)
def test_the_comparison_tells_another_rule_apart(name):
    # Caffe's windows are squarer, and an object that they leave out can hold them up.
    assert worst_difference(moments_of_ours("some", name, 1000), golden(name)) > LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_boxes_are_distributed_as_those_of_the_torchvision_at_hand(name):
    torch.manual_seed(1)
    theirs = moments(box_traits(chain(), PICTURES[name], 4000))
    assert worst_difference(moments_of_ours("torchvision", name, 5000), theirs) < LIMIT
    if name in GOLDEN:
        assert worst_difference(theirs, golden(name)) < LIMIT


def test_only_objects_that_are_kept_hold_a_window_of_torchvision():
    # IoU 1/4 with the window, centre outside; and a small one inside
    boxes, window = np.array([[60.0, 0.0, 120.0, 100.0], [10.0, 10.0, 14.0, 14.0]]), np.array([[0.0, 0.0, 80.0, 100.0]])
    assert SsdCrop(96)._good(window, boxes, 0.1).tolist() == [True]
    assert SsdCrop(96, rule="torchvision")._good(window, boxes, 0.1).tolist() == [False]
    assert SsdCrop(96, rule="torchvision")._good(window, boxes, 0.0).tolist() == [True]
    assert SsdCrop(96, rule="torchvision")._good(window, boxes[:1], 0.0).tolist() == [False]


def test_a_way_that_failed_may_be_drawn_again_for_torchvision(monkeypatch):
    drawn = iter([6, 6, 6, 0])  # no window reaches 0.9 of so small an object; then the whole canvas
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor(next(drawn)))
    window = SsdCrop(96, rule="torchvision").window(torch.tensor([[5.0, 5.0, 9.0, 9.0]]), CANVAS)
    assert window.tolist() == CANVAS.tolist()
    assert list(drawn) == []


def smooth_picture():
    torch.manual_seed(0)
    coarse = torch.randint(256, (1, 3, 6, 8)).float()
    return torch.nn.functional.interpolate(coarse, (375, 500), mode="bicubic").clamp(0, 255)[0].to(torch.uint8)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(
    ("ratio", "place", "window"),
    [
        (1.0, (0.0, 0.0), (40, 30, 340, 375)),
        (1.0, (0.0, 0.0), (0, 0, 500, 375)),
        (2.5, (0.3, 0.8), None),  # the whole canvas
        (4.0, (0.0, 0.999), None),
        (1.6, (0.5, 0.5), (100, 60, 620, 470)),
        (3.2, (0.9, 0.1), (700, 0, 1600, 700)),
    ],
)
def test_pixels_are_those_of_torchvision(monkeypatch, ratio, place, window, mirrored):
    image = smooth_picture()
    boxes = torch.tensor([[150.0, 100.0, 300.0, 250.0]])
    canvas_width, canvas_height = int(500 * ratio), int(375 * ratio)
    left, top = int((canvas_width - 500) * place[0]), int((canvas_height - 375) * place[1])
    x1, y1, x2, y2 = window or (0, 0, canvas_width, canvas_height)

    crop = SsdCrop(300, zoom=1.0, flip=0.5)
    drawn = np.array([0.0, (ratio - 1) / 3, *place, 0.0 if mirrored else 0.9])
    monkeypatch.setattr(ssd_crop, "_random", lambda count: drawn)
    crop.window = lambda boxes, canvas: torch.tensor([x1 - left, y1 - top, x2 - left, y2 - top]).float()
    mine, target = crop(tv_tensors.Image(image), {"boxes": boxes, "labels": torch.tensor([0])})

    padding = [left, top, canvas_width - 500 - left, canvas_height - 375 - top]

    def by_torchvision(value, fill):
        value = F.crop(F.pad(value, padding, fill=fill), y1, x1, y2 - y1, x2 - x1)
        return F.resize(F.horizontal_flip(value) if mirrored else value, [300, 300], antialias=True)

    moved = by_torchvision(tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(375, 500)), 0)
    torch.testing.assert_close(target["boxes"], moved, rtol=0, atol=1.0)  # ours begins at whole pixels of the result
    wanted, pixels = by_torchvision(image, PAD_COLOUR), mine.as_subclass(torch.Tensor)
    if ratio == 1.0:
        torch.testing.assert_close(pixels, wanted, rtol=0, atol=0)
        return
    # Where picture and mean colour meet, theirs mixes the two and ours does not. Two pixels aside nothing is mixed.
    shown = by_torchvision(torch.full((1, 375, 500), 255, dtype=torch.uint8), 0)
    assert (pixels[:, highest(shown, 5)[0] == 0] == torch.tensor(PAD_COLOUR)[:, None]).all()
    core = -highest(-shown.float(), 5)[0] == 255
    assert core.sum() > 500
    low, high = -highest(-wanted.float(), 3), highest(wanted, 3)  # ours lies at most a pixel aside
    assert ((pixels >= low - 1) & (pixels <= high + 1))[:, core].all()
    assert (pixels.float() - wanted).abs()[:, core].mean() < 0.3 * (high - low)[:, core].mean() + 0.5


def highest(values, side):
    return torch.nn.functional.max_pool2d(values[None].float(), side, 1, side // 2)[0]
