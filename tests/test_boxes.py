import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision import ops

from detcore import boxes as box
from tests import reference
from tests.samples import FAST, any_box, some_boxes

TOLERANCE = 1e-9

MEASURES = {
    "iou": (box.iou, reference.iou),
    "giou": (box.giou, reference.giou),
    "diou": (box.diou, reference.diou),
    "ciou": (box.ciou, reference.ciou),
}


# wide and tall cross at one square of the 4 + 4 - 1 = 7 they cover. Hull 4 x 4 = 16, nine of it bare.
# Centres (2, .5) and (.5, 2): 1.5^2 + 1.5^2 = 4.5 over the diagonal 4^2 + 4^2 = 32.
WIDE, TALL = [0.0, 0.0, 4.0, 1.0], [0.0, 0.0, 1.0, 4.0]
V = 4 / math.pi**2 * (math.atan(1 / 4) - math.atan(4)) ** 2
BY_HAND = {
    "iou": 1 / 7,
    "giou": 1 / 7 - 9 / 16,
    "diou": 1 / 7 - 4.5 / 32,
    "ciou": 1 / 7 - 4.5 / 32 - V**2 / (1 - 1 / 7 + V),
}


@pytest.mark.parametrize("name", MEASURES)
def test_measure_of_crossing_bars_by_hand(name):
    value = MEASURES[name][0](torch.tensor(WIDE).double(), torch.tensor(TALL).double())
    assert_close(value.item(), BY_HAND[name], rtol=0, atol=TOLERANCE)


def test_crossing_bars_tell_the_four_measures_apart():
    values = sorted(BY_HAND.values())
    assert min(b - a for a, b in itertools.pairwise(values)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", MEASURES)
def test_measure_equals_its_loop(name):
    fast, slow = MEASURES[name]
    a, b = some_boxes(200), some_boxes(200)
    b[::5] = a[::5]  # equal boxes
    b[1::5] += 1000.0  # far apart
    b[2::5] = torch.cat([a[2::5, 2:], a[2::5, 2:] + 3], dim=-1)  # touching at a corner
    assert_close(fast(a, b), reference.elementwise(slow, a, b), rtol=1e-10, atol=1e-10)


THEIRS = {
    "giou": ops.generalized_box_iou_loss,
    "diou": ops.distance_box_iou_loss,
    "ciou": ops.complete_box_iou_loss,
}


@pytest.mark.parametrize("name", THEIRS)
def test_measure_equals_torchvision(name):
    a, b = some_boxes(200), some_boxes(200)
    # theirs adds eps = 1e-7 to denominators of up to 1e4
    assert_close(
        1 - MEASURES[name][0](a, b), THEIRS[name](a, b, eps=0.0 if name != "ciou" else 1e-12), rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("name", THEIRS)
def test_measure_gradient_equals_torchvision(name):
    a, b = some_boxes(200).requires_grad_(), some_boxes(200)
    [mine] = torch.autograd.grad((1 - MEASURES[name][0](a, b)).sum(), a)
    [theirs] = torch.autograd.grad(THEIRS[name](a, b, eps=1e-12).sum(), a)
    assert_close(mine, theirs, rtol=0, atol=1e-7)


def test_random_boxes_tell_the_four_measures_apart():
    a, b = some_boxes(200), some_boxes(200)
    values = torch.stack([fast(a, b) for fast, _ in MEASURES.values()])
    for i in range(4):
        for j in range(i):
            assert (values[i] - values[j]).abs().median() > 100 * 1e-8


def test_pairwise_iou_equals_torchvision_and_its_loop():
    a, b = some_boxes(30), some_boxes(20)
    found = box.pairwise_iou(a, b)
    assert_close(found, ops.box_iou(a, b), rtol=0, atol=1e-12)
    assert_close(found, reference.pairwise_iou(a, b), rtol=0, atol=1e-12)
    assert_close(found[3], box.iou(a[3], b), rtol=0, atol=0)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (3, 0), (1, 1)])
def test_pairwise_iou_of_few_boxes(n, m):
    assert box.pairwise_iou(some_boxes(n), some_boxes(m)).shape == (n, m)


def test_pairwise_iou_broadcasts_priors_over_images():
    priors, objects = some_boxes(6)[None], some_boxes(8).view(2, 4, 4)
    both = box.pairwise_iou(priors, objects)
    assert both.shape == (2, 6, 4)
    assert_close(both[1], box.pairwise_iou(priors[0], objects[1]), rtol=0, atol=0)


@pytest.mark.parametrize("name", MEASURES)
def test_measures_of_empty_boxes_are_finite(name):
    # torchvision's box_iou is NaN here; padded slots hold such boxes
    point, far, real = torch.zeros(4), torch.full((4,), 9.0), torch.tensor([0.0, 0.0, 5.0, 5.0])
    for a, b in [(point, point), (point, far), (point, real), (real, far)]:
        assert MEASURES[name][0](a, b).isfinite()
    assert box.iou(point, point) == 0


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_measures_of_short_floats_are_computed_in_float32(name, dtype):
    # 300 x 300 pixels overflow float16, and bfloat16 has 8 bits of mantissa
    a, b = torch.tensor([0.0, 0, 300, 300]).to(dtype), torch.tensor([4.0, 0, 304, 300]).to(dtype)
    assert MEASURES[name][0](a, b).dtype == torch.float32
    assert_close(MEASURES[name][0](a, b), MEASURES[name][0](a.float(), b.float()), rtol=0, atol=0)


@FAST
@given(any_box(), any_box())
def test_measures_are_symmetric_ordered_and_in_range(a, b):
    plain, general, distance, complete = (fast(a, b) for fast, _ in MEASURES.values())
    for fast, _ in MEASURES.values():
        assert_close(fast(a, b), fast(b, a), rtol=0, atol=1e-12)
        assert_close(fast(a, a).item(), 1.0, rtol=0, atol=1e-12)
    assert 0 <= plain <= 1
    assert -1 <= general <= plain + 1e-12
    assert -1 <= distance <= plain + 1e-12
    assert complete <= distance + 1e-12
    assert (plain > 0) == (reference.intersection(a.tolist(), b.tolist()) > 0)


@FAST
@given(any_box(), any_box(), st.floats(-500, 500), st.floats(0.25, 8))
def test_measures_are_unmoved_by_shift_and_scale(a, b, shift, scale):
    for fast, _ in MEASURES.values():
        assert_close(fast(a * scale + shift, b * scale + shift), fast(a, b), rtol=0, atol=1e-9)


@FAST
@given(any_box())
def test_centre_form_and_back(a):
    assert_close(box.cxcywh_to_xyxy(box.xyxy_to_cxcywh(a)), a, rtol=0, atol=0)


def test_centre_form_equals_torchvision():
    a = some_boxes(50)
    assert_close(box.xyxy_to_cxcywh(a), ops.box_convert(a, "xyxy", "cxcywh"), rtol=0, atol=1e-12)
    assert_close(box.cxcywh_to_xyxy(a), ops.box_convert(a, "cxcywh", "xyxy"), rtol=0, atol=1e-12)


def test_area_of_inverted_boxes_is_zero():
    # both sides inverted must not multiply to a positive area
    a = torch.tensor([[0.0, 0.0, 4.0, 3.0], [4.0, 3.0, 0.0, 0.0], [4.0, 0.0, 0.0, 3.0]])
    assert box.area(a).tolist() == [12.0, 0.0, 0.0]


def test_clip_boxes_uses_each_image_own_height_and_width():
    outside = torch.tensor([-3.0, -4.0, 90.0, 80.0])
    boxes = torch.stack([outside, torch.tensor([1.0, 2.0, 3.0, 4.0])]).expand(2, 2, 4).clone()
    clipped = box.clip_boxes(boxes, torch.tensor([[20, 40], [50, 30]]))
    assert clipped[:, 0].tolist() == [[0.0, 0.0, 40.0, 20.0], [0.0, 0.0, 30.0, 50.0]]
    assert clipped[0, 1].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert boxes[0, 0].tolist() == outside.tolist()  # the input is left alone


def test_clip_boxes_equals_torchvision():
    boxes = some_boxes(40) * 2 - 60
    assert_close(
        box.clip_boxes(boxes[None], torch.tensor([[70, 45]]))[0],
        ops.clip_boxes_to_image(boxes, (70, 45)),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("name", MEASURES)
def test_measure_passes_gradcheck(name):
    a, b = some_boxes(12).requires_grad_(), some_boxes(12).requires_grad_()
    measure = MEASURES[name][0]
    if name == "ciou":  # its trade-off is a constant by definition: check the sum with the factor frozen
        a_fixed, b_fixed = a.detach(), b.detach()
        v = lambda a, b: 4 / math.pi**2 * (_angle(b) - _angle(a)) ** 2  # noqa: E731
        fixed = v(a_fixed, b_fixed)
        trade_off = fixed / (1 - box.iou(a_fixed, b_fixed) + fixed)
        [mine] = torch.autograd.grad(measure(a, b).sum(), a, retain_graph=True)
        [frozen] = torch.autograd.grad((box.diou(a, b) - trade_off * v(a, b)).sum(), a)
        assert_close(mine, frozen, rtol=1e-9, atol=1e-12)
        assert (trade_off > 0.01).any()
        return
    assert torch.autograd.gradcheck(measure, (a, b))


def _angle(a):
    return torch.atan((a[..., 2] - a[..., 0]) / (a[..., 3] - a[..., 1]))
