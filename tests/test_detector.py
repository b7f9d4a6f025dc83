import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import tv_tensors

from detcore.boxes import area
from detcore.detector import DenseDetector, Detector
from detcore.kernels import disable
from detcore.losses.terms import focal_term
from detcore.models import MODELS, get_model
from detcore.structures import Targets, pad_targets
from tests.test_models import calm, redraw, small, two_pictures

EVERY_MODEL = pytest.mark.parametrize("name", sorted(MODELS))


def target(*boxes, label=0):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.full((len(boxes),), label, dtype=torch.int64),
    }


def parts(**changes):
    """The parts of a small detector, to put together otherwise."""
    made = small("retinanet")
    return {
        "body": made.body,
        "priors": made.priors,
        "head": made.head,
        "num_classes": 3,
        "assign": made.assign,
        "losses": made.losses,
        "score": made.score,
        "select": made.select,
        **changes,
    }


# --- torchvision's convention


@EVERY_MODEL
def test_training_takes_lists_and_gives_named_losses(name):
    detector = small(name)
    losses = detector([torch.rand(3, 70, 90), torch.rand(3, 64, 40)], [target([5, 5, 60, 50]), target()])
    assert list(losses) == list(detector.losses)
    assert all(value.requires_grad and value.isfinite() for value in losses.values())


@EVERY_MODEL
def test_evaluation_gives_one_dict_a_picture(name):
    detector = redraw(small(name)).eval()
    pictures = [torch.rand(3, 70, 90), torch.rand(3, 128, 40)]
    found = detector(pictures)
    assert len(found) == 2
    for own, picture in zip(found, pictures, strict=True):
        assert len(own["boxes"]) > 0
        assert len({len(value) for value in own.values()}) == 1
        x1, y1, x2, y2 = own["boxes"].unbind(-1)
        assert (x1 >= 0).all()
        assert (y1 >= 0).all()
        assert (x2 <= picture.shape[2]).all()
        assert (y2 <= picture.shape[1]).all()
        assert (own["scores"].diff() <= 0).all()
        assert own["labels"].min() >= 0
        assert own["labels"].max() < 3
        assert not own["boxes"].requires_grad


def test_evaluation_ignores_targets_and_needs_none():
    detector = redraw(small("retinanet")).eval()
    picture = torch.rand(3, 64, 64)
    with_targets, without = detector([picture], [target([1, 1, 9, 9])]), detector([picture])
    assert with_targets[0]["boxes"].equal(without[0]["boxes"])


def test_a_tensor_of_pictures_is_a_list_of_pictures():
    detector = redraw(small("retinanet")).eval()
    pictures = torch.rand(2, 3, 64, 64)
    for a, b in zip(detector(pictures), detector(list(pictures)), strict=True):
        assert a["boxes"].equal(b["boxes"])


def test_forward_is_pad_then_detect():
    detector = redraw(small("retinanet")).eval()
    pictures = [torch.rand(3, 70, 90), torch.rand(3, 96, 40)]
    batch = detector.inputs.batch(pictures)
    assert batch.images.shape == (2, 3, 96, 96)
    found = detector.detect(batch.images, batch.sizes)
    for i, own in enumerate(detector(pictures)):
        assert own["boxes"].equal(found.boxes[i][found.valid[i]])


def test_forward_is_pad_then_loss():
    detector = calm(small("retinanet"))
    pictures, targets = [torch.rand(3, 70, 90), torch.rand(3, 96, 40)], [target([5, 5, 60, 50]), target([1, 1, 30, 90])]
    batch = detector.inputs.batch(pictures)
    expected = detector.loss(batch.images, pad_targets(targets, sizes=batch.sizes))
    for term, value in detector(pictures, targets).items():
        assert_close(value, expected[term], rtol=0, atol=0)


def test_boxes_come_back_in_the_pixels_of_the_picture():
    # resized to a half or to a double, every corner must be scaled back by the same factors
    plain = redraw(small("retinanet")).eval()
    resizing = copy.deepcopy(plain)
    resizing.inputs.short_side, resizing.inputs.long_side = 64, 128
    tall = torch.rand(3, 256, 128)
    batch = resizing.inputs.batch([tall])
    assert batch.images.shape[-2:] == (128, 64)
    expected = plain.detect(batch.images, batch.sizes)
    [found] = resizing([tall])
    assert len(found["boxes"]) > 5
    assert_close(found["boxes"], 2 * expected.boxes[0][expected.valid[0]], rtol=0, atol=1e-4)


def test_boxes_go_in_with_the_picture():
    # one picture resized in the door, the other by hand: the same losses
    detector = calm(small("retinanet"))
    resizing = copy.deepcopy(detector)
    resizing.inputs.short_side, resizing.inputs.long_side = 96, 1000
    picture, own = torch.rand(3, 48, 70), target([3, 4, 40, 44], label=2)
    found = resizing([picture], [own])
    batch = resizing.inputs.batch([picture])
    width, height = batch.images.shape[-1], 96
    assert batch.sizes.tolist() == [[height, 140]]
    assert width == 160
    expected = detector([batch.images[0, :, :96, :140]], [target([6, 8, 80, 88], label=2)])
    for term, value in found.items():
        assert_close(value, expected[term], rtol=1e-5, atol=1e-6)


def test_bytes_floats_and_image_subclasses_are_alike():
    detector = redraw(small("retinanet")).eval()
    pixels = torch.randint(0, 256, (3, 70, 64), dtype=torch.uint8)
    expected = detector([pixels.float() / 255])[0]
    for picture in (pixels, tv_tensors.Image(pixels)):
        found = detector([picture])[0]
        assert type(found["boxes"]) is torch.Tensor
        assert_close(found["boxes"], expected["boxes"], rtol=1e-4, atol=1e-3)


def test_mixed_sizes_ignore_what_only_the_larger_picture_has():
    detector = small("retinanet")
    batch = detector.inputs.batch([torch.rand(3, 64, 64), torch.rand(3, 128, 128)])
    targets = pad_targets([target([5, 5, 50, 50]), target([5, 5, 50, 50])], sizes=batch.sizes)
    pred = detector.predict(batch.images)
    match = detector.match(pred.priors, targets)
    cells = 8**2 + 4**2 + 2**2 + 1 + 1
    beyond = 9 * (16**2 + 8**2 + 4**2 + 2**2 + 1 - cells)
    assert (match.ignored[0] & (pred.priors.cells >= 64).any(-1)).sum() == beyond
    assert not (~match.ignored[0] & (pred.priors.cells >= 64).any(-1)).any()


@pytest.mark.parametrize(
    ("images", "targets", "error", "message"),
    [
        ([torch.rand(3, 64, 64)], None, ValueError, r"targets must be given in training mode; call .eval\(\)"),
        ([torch.rand(3, 64, 64)] * 2, [target()], ValueError, "2 images need as many targets; got 1"),
        ([], [], ValueError, "images must hold at least one picture"),
        ([torch.rand(1, 64, 64)], [target()], ValueError, r"images\[0\] must have shape \(3, h, w\)"),
        ([torch.rand(3, 64, 64)], [target([1, 1, 9, 9], label=3)], ValueError, "< num_classes = 3; got 3 in row 0"),
        ([torch.rand(3, 64, 64)], [target([1, 1, 9, 9], label=-1)], ValueError, "must be >= 0.*got -1"),
        (
            [torch.rand(3, 64, 64)],
            [target([9, 1, 1, 9])],
            ValueError,
            r"x1 < x2 and y1 < y2; got \[9.0, 1.0, 1.0, 9.0\]",
        ),
        ([torch.rand(3, 64, 64)], [{"boxes": torch.zeros(0, 4)}], KeyError, 'must have the key "labels"'),
    ],
)
def test_training_names_what_is_wrong(images, targets, error, message):
    with pytest.raises(error, match=message):
        small("retinanet")(images, targets)


# --- made of parts


def test_detector_is_made_of_its_parts():
    def brightness(pred, match):
        return pred.boxes.mean() * 0 + 2.0

    detector = DenseDetector(**parts(losses={"cls": focal_term, "mine": (0.5, brightness)}))
    assert isinstance(detector, Detector)
    images, targets = two_pictures()
    losses = detector.loss(images, targets)
    assert set(losses) == {"cls", "mine"}
    assert losses["mine"] == 1.0  # 0.5 * 2


def test_weight_multiplies_its_term_only():
    images, targets = two_pictures()
    plain = calm(DenseDetector(**parts(losses={"cls": focal_term})))
    double = copy.deepcopy(plain)
    double.losses = {"cls": (2.0, focal_term)}
    assert_close(double.loss(images, targets)["cls"], 2 * plain.loss(images, targets)["cls"])


def test_select_is_given_scores_predictions_and_sizes():
    seen = {}

    def select(scores, pred, sizes, *, inner):
        seen.update(scores=scores, pred=pred, sizes=sizes)
        return inner(scores, pred, sizes)

    made = parts()
    detector = DenseDetector(**{**made, "select": partial(select, inner=made["select"])}).eval()
    detector.detect(torch.rand(1, 3, 64, 64), torch.tensor([[60, 50]]))
    assert seen["sizes"].tolist() == [[60, 50]]
    assert_close(seen["scores"].ranking, seen["pred"].logits.sigmoid())


@pytest.mark.parametrize("losses", [{}, {"cls": (-1.0, focal_term)}])
def test_detector_refuses_no_losses_and_negative_weights(losses):
    with pytest.raises(ValueError, match="losses must be named terms of weight >= 0; got"):
        DenseDetector(**parts(losses=losses))


def test_matching_has_no_gradient():
    detector = small("retinanet")
    images, targets = two_pictures()
    match = detector.match(detector.predict(images).priors, targets)
    assert not match.boxes.requires_grad
    assert not match.iou.requires_grad


def test_one_pixel_objects_train():
    detector = small("retinanet")
    losses = detector([torch.rand(3, 64, 64)], [target([30, 30, 31, 31], [0, 0, 1, 1], [63, 63, 64, 64])])
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert detector.head.outputs["deltas"].weight.grad.abs().sum() > 0


def test_objects_beyond_the_picture_train():
    # a box far outside overlaps no prior: it must neither be matched nor break anything
    detector = calm(small("retinanet"))
    picture = torch.rand(3, 64, 64)
    with_stray = detector([picture], [target([5, 5, 40, 40], [5000, 5000, 5010, 5010])])
    without = detector([picture], [target([5, 5, 40, 40])])
    for term, value in with_stray.items():
        assert value.equal(without[term])


def test_more_padding_slots_change_no_loss():
    detector = calm(small("iou_aware_retinanet"))
    images, _ = two_pictures()
    few, many = (
        detector.loss(images, pad_targets([target([10, 10, 60, 60]), target([5, 70, 30, 120])], multiple=m))
        for m in (1, 40)
    )
    for term, value in few.items():
        assert_close(value, many[term], rtol=0, atol=0)


@EVERY_MODEL
def test_duplicating_the_batch_changes_no_loss(name):
    detector = calm(small(name))
    images, targets = two_pictures()
    twice = Targets(targets.boxes.repeat(2, 1, 1), targets.labels.repeat(2, 1), targets.valid.repeat(2, 1))
    once = detector.loss(images, targets)
    for term, value in detector.loss(images.repeat(2, 1, 1, 1), twice).items():
        assert_close(value, once[term], rtol=1e-5, atol=1e-6)


def test_detections_of_a_black_picture_are_sound():
    detector = redraw(small("iou_aware_retinanet")).eval()
    [found] = detector([torch.zeros(3, 64, 64)])
    assert area(found["boxes"]).isfinite().all()
    assert set(found) == {"boxes", "scores", "labels", "class_scores", "quality"}


# --- what runs on the device


class Operations(TorchDispatchMode):
    """Counts operations; one that hands a number to the host, or whose result's size depends on values, is refused."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "equal.default")

    def __init__(self):
        super().__init__()
        self.count, self.waiting = 0, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        if any(word in str(operation) for word in self.WAITING) or (
            "index.Tensor" in str(operation) and any(i is not None and i.dtype == torch.bool for i in args[1])
        ):
            self.waiting.append(str(operation))
        return operation(*args, **(kwargs or {}))


def batch_of(count, objects):
    boxes = torch.rand(objects, 4) * 20 + torch.tensor([0.0, 0, 40, 40])
    own = {"boxes": boxes, "labels": torch.arange(objects) % 3}
    return torch.rand(count, 3, 64, 64), pad_targets([own] * count, sizes=torch.full((count, 2), 64))


@EVERY_MODEL
def test_training_step_never_waits_for_the_device_and_does_not_grow_with_the_batch(name):
    detector = small(name)
    counts = []
    for count, objects in ((1, 2), (1, 2), (4, 7)):  # the first also makes the priors, which are kept
        images, targets = batch_of(count, objects)
        # a GPU runs the plain functions; the fast forms are a processor's, which waits for nobody
        with disable(), Operations() as operations:
            sum(detector.loss(images, targets).values()).backward()
        assert operations.waiting == []
        counts.append(operations.count)
        detector.zero_grad()
    assert counts[0] > counts[1] == counts[2]


def test_operations_notices_what_waits():
    x = torch.rand(4)
    for call in (lambda: x.sum().item(), lambda: x[x > 0.5], x.nonzero, lambda: bool(x[0] > 0)):
        with Operations() as operations:
            call()
        assert operations.waiting


def test_detector_moves_as_a_whole():
    detector = small("retinanet").to("meta")
    assert {t.device.type for t in (*detector.parameters(), *detector.buffers())} == {"meta"}
    assert isinstance(detector.head, nn.Module)


def test_get_model_remembers_how_it_was_asked():
    detector = get_model("iou_aware_retinanet", num_classes=5, backbone="tiny", fusion_alpha=0.4)
    assert detector.spec == {"name": "iou_aware_retinanet", "num_classes": 5, "backbone": "tiny", "fusion_alpha": 0.4}
