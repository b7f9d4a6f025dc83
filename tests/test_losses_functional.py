import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision import ops

from detcore.losses import functional as losses
from tests import reference
from tests.samples import FAST, any_box, no_hook, some_boxes

TOLERANCE = 1e-10
KINDS = ["bce", "l1", "smooth_l1", "l2", "qfl"]
GAMMAS = [0.0, 0.5, 1.0, 1.5, 2.0, 5.0]
EXTREMES = torch.tensor([-1000.0, -100.0, -50.0, -20.0, 0.0, 20.0, 50.0, 100.0, 1000.0])

logit = st.floats(-30, 30)
share = st.floats(0, 1)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def by_loop(function, *columns):
    rows = zip(*(column.flatten().tolist() for column in columns), strict=True)
    return torch.tensor([function(*row) for row in rows], dtype=torch.float64).view(columns[0].shape)


# --- focal


def test_focal_by_hand():
    # p = 1/2: (1/2)^2 ln 2 = .1733, times .25 on the positive and .75 on the negative side
    found = losses.sigmoid_focal_loss(torch.zeros(2).double(), torch.tensor([True, False]))
    assert_close(found, torch.tensor([0.25, 0.75]).double() * math.log(2) / 4, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("alpha", [0.25, 0.75, 0.0, None])
def test_focal_equals_torchvision_and_its_loop(alpha, gamma):
    logits, targets = torch.randn(40, 5).double() * 4, torch.rand(40, 5) < 0.3
    found = losses.sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma)
    theirs = ops.sigmoid_focal_loss(logits, targets.double(), alpha=-1 if alpha is None else alpha, gamma=gamma)
    assert_close(found, theirs, rtol=0, atol=1e-9)
    loop = by_loop(lambda o, t: reference.focal(o, t, alpha, gamma), logits, targets)
    assert_close(found, loop, rtol=1e-6 if alpha else 0, atol=TOLERANCE)


def test_random_logits_tell_focal_losses_apart():
    logits, targets = torch.randn(200).double() * 4, torch.rand(200) < 0.3
    values = [
        losses.sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma)
        for alpha in (0.25, 0.75, None)
        for gamma in (1.5, 2.0)
    ]
    for a, b in itertools.combinations(values, 2):
        assert (a - b).abs().max() > 100 * 1e-6


@FAST
@given(logit, st.booleans())
def test_focal_without_focus_is_half_of_cross_entropy(o, t):
    found = losses.sigmoid_focal_loss(scalar(o), torch.tensor(t), alpha=0.5, gamma=0.0)
    expected = F.binary_cross_entropy_with_logits(scalar(o), scalar(float(t)))
    assert_close(found, expected / 2, rtol=1e-9, atol=1e-9)


@FAST
@given(logit, st.sampled_from(GAMMAS))
def test_focal_of_the_two_sides_mirror_each_other(o, gamma):
    # a negative at o is a positive at -o, with 1 - alpha for alpha
    negative = losses.sigmoid_focal_loss(scalar(o), torch.tensor(False), alpha=0.25, gamma=gamma)
    positive = losses.sigmoid_focal_loss(scalar(-o), torch.tensor(True), alpha=0.75, gamma=gamma)
    assert_close(negative, positive, rtol=1e-6, atol=0)


def test_focal_gradient_equals_the_closed_form():
    # dense.md 7: for a positive, d/do = a (1-p)^g (g p ln p + p - 1)
    o = torch.linspace(-8, 8, 33, dtype=torch.float64, requires_grad=True)
    [found] = torch.autograd.grad(losses.sigmoid_focal_loss(o, torch.ones(33) > 0).sum(), o)
    p = o.detach().sigmoid()
    assert_close(found, 0.25 * (1 - p) ** 2 * (2 * p * p.log() + p - 1), rtol=1e-6, atol=1e-12)


def test_initial_focal_loss_of_a_large_picture():
    # dense.md 7: 608 x 1024, 80 classes, p = .01: 7.04 over all negatives, 1.128 a positive; unbiased 12 135
    o = scalar(-math.log(99))
    entries = 116712 * 80
    negative = losses.sigmoid_focal_loss(o, torch.tensor(False)) * entries
    positive = losses.sigmoid_focal_loss(o, torch.tensor(True))
    unbiased = losses.sigmoid_focal_loss(scalar(0.0), torch.tensor(False)) * entries
    assert_close(negative.item(), 7.04, rtol=0, atol=0.005)
    assert_close(positive.item(), 1.128, rtol=0, atol=0.0005)
    assert_close((negative + 100 * positive).item() / 100, 1.20, rtol=0, atol=0.005)
    assert_close(unbiased.item() / 100, 12135.0, rtol=1e-3, atol=0)


# --- quality focal


def test_quality_focal_by_hand():
    # p = 1/2, y = 3/4: (1/4)^2 ln 2
    assert_close(losses.quality_focal_loss(scalar(0.0), scalar(0.75)).item(), math.log(2) / 16)


@pytest.mark.parametrize(("beta", "below", "above"), [(1.0, 0.1732868, 0.0982), (1.5, 0.0866434, 0.0380327),
                                                      (2.0, 0.0433217, 0.0147300)])  # fmt: skip
def test_quality_focal_by_hand_on_both_sides_of_the_target(beta, below, above):
    # y = .75; p = .5: .25^b ln 2; p = .9: .15^b (.75 * .1053605 + .25 * 2.3025851 = .6546667)
    # E3.6: with y - p in place of |y - p| the latter is negative for b = 1 and not a number for b = 1.5
    found = losses.quality_focal_loss(torch.logit(torch.tensor([0.5, 0.9]).double()), scalar([0.75, 0.75]), beta=beta)
    assert_close(found, scalar([below, above]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("beta", GAMMAS)
def test_quality_focal_equals_its_loop(beta):
    logits, targets = torch.randn(200).double() * 4, torch.rand(200).double()
    found = losses.quality_focal_loss(logits, targets, beta=beta)
    loop = by_loop(lambda o, t: reference.quality_focal(o, t, beta), logits, targets)
    assert_close(found, loop, rtol=1e-9, atol=TOLERANCE)


@FAST
@given(st.floats(-15, 15), st.booleans(), st.sampled_from([1.0, 1.5, 2.0, 5.0]))
def test_quality_focal_of_hard_targets_is_focal_without_alpha(o, t, gamma):
    soft = losses.quality_focal_loss(scalar(o), scalar(float(t)), beta=gamma)
    hard = losses.sigmoid_focal_loss(scalar(o), torch.tensor(t), alpha=None, gamma=gamma)
    assert_close(soft, hard, rtol=1e-6, atol=1e-12)


@FAST
@given(logit, st.floats(0.01, 0.99), st.sampled_from([0.5, 1.0, 1.5, 2.0]))
def test_quality_focal_is_zero_exactly_at_its_target(o, t, beta):
    loss = losses.quality_focal_loss(scalar(o), scalar(t), beta=beta)
    assert loss >= 0
    assert (loss == 0) == (scalar(o).sigmoid() == t)
    at_target = scalar(o).sigmoid()
    assert losses.quality_focal_loss(scalar(o), at_target, beta=beta) == 0


# --- the quality losses


QUALITY_BY_HAND = {  # o = 0, t = .75: q = .5, error -.25
    "bce": math.log(2),
    "l1": 0.25,
    "smooth_l1": 0.25 - 1 / 18,  # beyond 1/9
    "l2": 0.25**2 / 2,
    "qfl": math.log(2) / 16,
}


@pytest.mark.parametrize("kind", KINDS)
def test_quality_loss_by_hand(kind):
    assert_close(losses.quality_loss(scalar(0.0), scalar(0.75), kind=kind).item(), QUALITY_BY_HAND[kind])


def test_quality_losses_differ_on_the_hand_example():
    values = sorted(QUALITY_BY_HAND.values())
    assert min(b - a for a, b in itertools.pairwise(values)) > 100 * 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_quality_loss_equals_its_loop(kind):
    logits, targets = torch.randn(200).double() * 3, torch.rand(200).double()
    found = losses.quality_loss(logits, targets, kind=kind)
    assert_close(found, by_loop(lambda o, t: reference.quality(o, t, kind), logits, targets), rtol=1e-9, atol=TOLERANCE)


def test_quality_gradients_at_the_start_of_training():
    # E3.5: o = 0, t = .7: l1 .25, ce .20, qfl .077, l2 .05; smooth l1 is past its bend
    expected = {"l1": 0.25, "smooth_l1": 0.25, "bce": 0.20, "qfl": 0.077, "l2": 0.05}
    assert set(expected) == set(KINDS)
    for kind, size in expected.items():
        o = scalar(0.0).requires_grad_()
        [gradient] = torch.autograd.grad(losses.quality_loss(o, scalar(0.7), kind=kind), o)
        assert_close(-gradient.item(), size, rtol=0, atol=5e-4)


def test_quality_gradients_where_the_sigmoid_is_flat():
    # E3.5: y = 1, o = -6: l1 .00247, l2 .00246, ce .998
    for kind, size in {"l1": 0.00247, "smooth_l1": 0.00247, "l2": 0.00246, "bce": 0.998}.items():
        o = scalar(-6.0).requires_grad_()
        [gradient] = torch.autograd.grad(losses.quality_loss(o, scalar(1.0), kind=kind), o)
        assert_close(-gradient.item(), size, rtol=0, atol=5e-4 if kind == "bce" else 5e-6)


def test_quality_gradients_near_the_goal():
    # E3.5: y = .5001, o = 0: l1 is as steep as ever (.25), ce .0001
    for kind, size in {"l1": 0.25, "bce": 0.0001}.items():
        o = scalar(0.0).requires_grad_()
        [gradient] = torch.autograd.grad(losses.quality_loss(o, scalar(0.5001), kind=kind), o)
        assert_close(-gradient.item(), size, rtol=0, atol=1e-9)


def test_quality_bce_has_a_floor():
    # E3.5: H(.7) = .611, H(.8) = .500; the others end at 0
    t = torch.tensor([0.7, 0.8]).double()
    assert_close(losses.quality_loss(torch.logit(t), t), scalar([0.611, 0.500]), rtol=0, atol=5e-4)
    for kind in set(KINDS) - {"bce"}:
        assert losses.quality_loss(torch.logit(t), t, kind=kind).max() < 1e-12


def test_quality_bce_pushes_its_target_by_minus_the_logit():
    # E1.1: o = (1.5, -1, 0), t = .7: dL/dt = (-1.5, 1, 0)
    t = torch.full((3,), 0.7, dtype=torch.float64, requires_grad=True)
    [gradient] = torch.autograd.grad(losses.quality_loss(torch.tensor([1.5, -1.0, 0.0]).double(), t).sum(), t)
    assert_close(gradient, torch.tensor([-1.5, 1.0, 0.0]).double(), rtol=0, atol=1e-12)


@FAST
@given(logit, share)
def test_smooth_l1_of_probabilities_with_beta_one_would_be_l2(o, t):
    error = scalar(o).sigmoid() - t
    smooth = losses.smooth_l1_loss(error, scalar(0.0), beta=1.0)
    assert_close(smooth, losses.quality_loss(scalar(o), scalar(t), kind="l2"), rtol=1e-12, atol=1e-15)


# --- smooth l1


@pytest.mark.parametrize("beta", [1 / 9, 1.0])
def test_smooth_l1_equals_its_loop(beta):
    error = torch.randn(100).double()
    found = losses.smooth_l1_loss(error, torch.zeros(100).double(), beta=beta)
    assert_close(found, by_loop(lambda e: reference.smooth_l1(e, beta), error), rtol=0, atol=TOLERANCE)


@FAST
@given(st.floats(-10, 10), st.floats(-10, 10))
def test_smooth_l1_of_beta_zero_is_the_absolute_error(a, b):
    assert_close(losses.smooth_l1_loss(scalar(a), scalar(b), beta=0.0).item(), abs(a - b))


# --- boxes


BOX_LOSSES = {
    "iou": (losses.iou_loss, lambda a, b: 1 - reference.iou(a, b)),
    "log_iou": (losses.log_iou_loss, lambda a, b: -math.log(max(reference.iou(a, b), 1e-6))),
    "giou": (losses.giou_loss, lambda a, b: 1 - reference.giou(a, b)),
}


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_box_loss_equals_its_loop(name):
    fast, slow = BOX_LOSSES[name]
    a, b = some_boxes(100), some_boxes(100)
    assert_close(fast(a, b), reference.elementwise(slow, a, b), rtol=1e-9, atol=TOLERANCE)


@FAST
@given(any_box(), any_box())
def test_box_losses_are_zero_only_for_the_box_itself(a, b):
    for name, limit in {"iou": 1.0, "log_iou": -math.log(1e-6), "giou": 2.0}.items():
        assert_close(BOX_LOSSES[name][0](a, a).item(), 0.0, rtol=0, atol=1e-12)
        assert (BOX_LOSSES[name][0](a, b) > 0) == (not a.equal(b))
        assert BOX_LOSSES[name][0](a, b) <= limit + 1e-9


@pytest.mark.parametrize("name", BOX_LOSSES)
@pytest.mark.parametrize("distance", [1e3, 1e6])
def test_box_losses_of_boxes_far_apart_are_finite(name, distance):
    a = torch.tensor([[0.0, 0.0, 4.0, 5.0]], requires_grad=True)
    loss = BOX_LOSSES[name][0](a, torch.tensor([[distance, distance, distance + 3, distance + 1]])).sum()
    [gradient] = torch.autograd.grad(loss, a)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    # only GIoU still knows where the object is
    assert (gradient.abs().sum() > 0) == (name == "giou")


def test_adding_one_matters_most_for_small_boxes():
    # (inter + 1) / (union + 1): 1 of 4 pixels becomes 2/5, 100 of 400 becomes 101/401
    for side, expected in ((1.0, 2 / 5), (10.0, 101 / 401)):
        own, object_ = torch.tensor([0.0, 0, side, side]), torch.tensor([0.0, 0, 2 * side, 2 * side])
        assert_close(losses.log_iou_loss(own, object_, added=1.0).item(), -math.log(expected))
        assert_close(losses.log_iou_loss(own, object_).item(), math.log(4))
    a, b = some_boxes(50), some_boxes(50)
    expected = reference.elementwise(lambda x, y: reference.log_iou(x, y, 1.0), a, b)
    assert_close(losses.log_iou_loss(a, b, added=1.0), expected, rtol=1e-9, atol=TOLERANCE)
    assert torch.autograd.gradcheck(lambda x: losses.log_iou_loss(x, b, added=1.0), a.requires_grad_())
    with pytest.raises(ValueError, match=r"added must be >= 0; got -1.0"):
        losses.log_iou_loss(own, object_, added=-1.0)


# --- all of them


def elementwise_losses():
    for gamma in GAMMAS:
        yield f"focal {gamma}", lambda o, t, g=gamma: losses.sigmoid_focal_loss(o, t > 0.5, gamma=g)
        yield f"qfl {gamma}", lambda o, t, g=gamma: losses.quality_focal_loss(o, t, beta=g)
    for kind in KINDS:
        yield f"quality {kind}", lambda o, t, k=kind: losses.quality_loss(o, t, kind=k)
    for beta in (0.0, 1 / 9, 1.0):
        yield f"smooth_l1 {beta:.2f}", lambda o, t, b=beta: losses.smooth_l1_loss(o, t, beta=b)


ELEMENTWISE = dict(elementwise_losses())


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_loss_passes_gradcheck(name):
    o = (torch.randn(12).double() * 2).requires_grad_()
    t = (torch.rand(12).double() * 0.8 + 0.1).requires_grad_("focal" not in name)
    if name == "quality qfl" or name.startswith("qfl"):
        assert (o.sigmoid() - t).abs().min() > 1e-4  # the kink of |t - q|
    assert torch.autograd.gradcheck(ELEMENTWISE[name], (o, t))


@pytest.mark.parametrize("name", BOX_LOSSES)
def test_box_loss_passes_gradcheck(name):
    a = some_boxes(12)
    b = (a + torch.rand(12, 4).double() * torch.tensor([-0.4, -0.3, 0.2, 0.4])).requires_grad_()
    assert torch.autograd.gradcheck(BOX_LOSSES[name][0], (a.requires_grad_(), b))


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_loss_and_gradient_are_finite_at_extreme_logits(name, target):
    o = EXTREMES.clone().requires_grad_()
    loss = ELEMENTWISE[name](o, torch.full_like(EXTREMES, target))
    [gradient] = torch.autograd.grad(loss.sum(), o)
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_of_a_confident_mistake_grows_with_the_logit(gamma):
    # no clamp anywhere: at o = -100 the loss of a positive is alpha * 100, and it still pulls
    o = torch.tensor(-100.0, requires_grad=True)
    loss = losses.sigmoid_focal_loss(o, torch.tensor(True), gamma=gamma)
    [gradient] = torch.autograd.grad(loss, o)
    assert_close(loss.item(), 25.0)
    assert_close(gradient.item(), -0.25)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_loss_of_nothing_has_a_gradient(name):
    o = torch.zeros(0, 3, requires_grad=True)
    loss = ELEMENTWISE[name](o, torch.zeros(0, 3))
    assert loss.shape == (0, 3)
    [gradient] = torch.autograd.grad(loss.sum(), o)
    assert gradient.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_loss_of_short_floats_is_computed_in_float32(name, dtype):
    o, t = torch.randn(9).to(dtype), torch.rand(9).to(dtype)
    found = ELEMENTWISE[name](o, t)
    assert found.dtype == torch.float32
    assert_close(found, ELEMENTWISE[name](o.float(), t.float()), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: losses.sigmoid_focal_loss(o, o > 0, alpha=1.5), r"alpha must be None or in \[0, 1\]; got 1.5"),
        (lambda o: losses.sigmoid_focal_loss(o, o > 0, alpha=-0.1), "alpha must be .*; got -0.1"),
        (lambda o: losses.sigmoid_focal_loss(o, o > 0, gamma=-1.0), "gamma must be >= 0; got -1.0"),
        (lambda o: losses.quality_focal_loss(o, o, beta=-1.0), "quality_focal_loss: beta must be >= 0; got -1.0"),
        (lambda o: losses.smooth_l1_loss(o, o, beta=-1.0), "smooth_l1_loss: beta must be >= 0; got -1.0"),
        (lambda o: losses.quality_loss(o, o, kind="huber"), 'kind must be "bce", .* got .huber'),
    ],
)
def test_losses_name_what_is_wrong(call, message):
    with no_hook(), pytest.raises(ValueError, match=message):
        call(torch.zeros(3))
