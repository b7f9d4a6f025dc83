"""AIoU: values, slopes and limits by hand, by closed form and by a loop; the paper's claims about it, measured."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from torch.testing import assert_close

from detcore.boxes import adaptive_iou, giou, iou
from detcore.coders import DeltaCoder
from detcore.losses.aiou import aiou_loss, overlap_term
from detcore.losses.functional import iou_loss
from detcore.losses.terms import box_iou_term
from detcore.losses.weighting import PriorWeight
from detcore.models import get_model
from detcore.ssd_assigner import ssd_assign
from tests import reference
from tests.samples import FAST, any_box, no_hook, some_predictions, some_priors, targets_of

BETAS = (1.0, 0.9, 0.8, 0.7, 0.6)
EVERY_BETA = pytest.mark.parametrize("beta", BETAS)
UNIT = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)


def box(x1, y1, x2, y2):
    return torch.tensor([x1, y1, x2, y2], dtype=torch.float64)


def about(centre_x, width, height, centre_y=0.5):
    return box(centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2)


def random_pairs(count, seed=0):
    """Pairs of boxes of all shapes, most of which overlap."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(2, count, 2, dtype=torch.float64, generator=generator)
    side = torch.exp(torch.rand(2, count, 2, dtype=torch.float64, generator=generator) * math.log(10)) / 10
    boxes = torch.cat([centre - side / 2, centre + side / 2], dim=-1)
    return boxes[0], boxes[1]


# --- values


# a unit square and itself, moved: (beta - t) / (beta + t)
@pytest.mark.parametrize(
    ("beta", "quarter", "half"),
    [(1.0, 3 / 5, 1 / 3), (0.9, 13 / 23, 2 / 7), (0.8, 11 / 21, 3 / 13), (0.7, 9 / 19, 1 / 6), (0.6, 7 / 17, 1 / 11)],
)
def test_adaptive_iou_of_equal_boxes_at_five_betas(beta, quarter, half):
    for t, expected in ((0.25, quarter), (0.5, half)):
        for moved in (UNIT + box(t, 0, t, 0), UNIT - box(t, 0, t, 0), UNIT + box(0, t, 0, t)):
            assert_close(adaptive_iou(UNIT, moved, beta=beta).item(), expected, rtol=1e-14, atol=0)
            assert_close(aiou_loss(moved, UNIT, beta=beta).item(), 1 - expected, rtol=1e-14, atol=0)


def test_adaptive_iou_of_unlike_boxes_by_hand():
    # sides 4x2 about (2, 1) and 2x4 about (3, 2); at 1/2: 2x1 from (1, .5), 1x2 from (2.5, 1). Common: .5 x .5
    a, b = box(0, 0, 4, 2), box(2, 0, 4, 4)
    assert_close(adaptive_iou(a, b, beta=0.5).item(), 0.25 / 3.75)
    assert_close(adaptive_iou(a, b, beta=1.0).item(), 4 / 12)
    # neighbouring formulas differ: areas scaled by beta, one box shrunk only, the wrong way round
    others = [iou(a, b), giou(a, b), adaptive_iou(a, b, beta=math.sqrt(0.5)), adaptive_iou(a, b, beta=0.5**2)]
    assert all(abs(other.item() - 0.25 / 3.75) > 0.01 for other in others)


@EVERY_BETA
def test_adaptive_iou_is_the_loop_twins(beta):
    a, b = random_pairs(400)
    found = adaptive_iou(a, b, beta=beta)
    assert_close(found, reference.elementwise(partial(reference.adaptive_iou, beta=beta), a, b), rtol=1e-12, atol=1e-14)
    assert 0.1 < (found > 0).double().mean() < 0.9


@EVERY_BETA
@FAST
@given(a=any_box(60), b=any_box(60))
def test_shrinking_is_dividing_the_offset_of_the_centres(beta, a, b):
    offset = (b[:2] + b[2:] - a[:2] - a[2:]) / 2
    apart = b + (offset / beta - offset).repeat(2)
    assert_close(adaptive_iou(a, b, beta=beta), iou(a, apart), rtol=1e-12, atol=1e-13)


def test_beta_1_is_iou_bit_for_bit():
    a, b = random_pairs(1000)
    for dtype in (torch.float32, torch.float64):
        x, y = (800 * boxes.to(dtype) for boxes in (a, b))
        assert adaptive_iou(x, y, beta=1.0).equal(iou(x, y))
        assert aiou_loss(x, y, beta=1.0).equal(iou_loss(x, y))


def test_adaptive_iou_is_computed_in_float32_at_least_and_broadcasts():
    a, b = (64 * boxes for boxes in random_pairs(12))
    narrow = adaptive_iou(a.bfloat16(), b.bfloat16())
    assert narrow.dtype == torch.float32
    assert_close(narrow, adaptive_iou(a.bfloat16().float(), b.bfloat16().float()))
    assert_close(adaptive_iou(a[:, None], b[None])[3, 5], adaptive_iou(a[3], b[5]))


def test_empty_boxes_give_nothing_and_finite_slopes():
    boxes = torch.tensor([[3.0, 3, 3, 3], [0, 0, 4, 4], [5, 5, 2, 2]], requires_grad=True)
    targets = torch.tensor([[3.0, 3, 3, 3], [9, 9, 9, 9], [0, 0, 8, 8]])
    loss = aiou_loss(boxes, targets)
    assert_close(loss, torch.ones(3))
    loss.sum().backward()
    assert boxes.grad.isfinite().all()


@pytest.mark.parametrize("beta", [0.0, -0.5, 1.01, math.nan])
def test_beta_must_be_a_share(beta):
    for function in (adaptive_iou, aiou_loss):
        with pytest.raises(ValueError, match=r"adaptive_iou: beta must be in \(0, 1\]; got"):
            function(UNIT, UNIT, beta=beta)
    with pytest.raises(ValueError, match=r"beta must be in \(0, 1\]"):
        overlap_term("iou", beta=beta)


# --- slopes


@EVERY_BETA
def test_slope_of_equal_boxes_is_the_closed_form(beta):
    for share in (0.01, 0.3, 0.6, 0.99):
        t = torch.tensor(share * beta, dtype=torch.float64, requires_grad=True)
        aiou_loss(UNIT + torch.stack([t, t * 0, t, t * 0]), UNIT, beta=beta).backward()
        assert_close(t.grad.item(), 2 * beta / (beta + t.item()) ** 2, rtol=1e-12, atol=0)


@EVERY_BETA
def test_slopes_are_those_of_finite_differences(beta):
    a, b = random_pairs(60, seed=1)
    touching = adaptive_iou(a, b, beta=beta) > 0.02
    a, b = a[touching], b[touching]
    assert len(a) > 8
    assert torch.autograd.gradcheck(partial(aiou_loss, beta=beta), [a.requires_grad_(), b.requires_grad_()])
    step = 1e-6
    slope = torch.autograd.grad(aiou_loss(a, b, beta=beta).sum(), a)[0]
    for corner in range(4):
        nudge = torch.zeros(4, dtype=torch.float64)
        nudge[corner] = step
        rows = []
        for sign in (1, -1):
            moved = (a + sign * nudge).detach()
            rows.append(reference.elementwise(partial(reference.adaptive_iou, beta=beta), moved, b.detach()))
        assert_close(slope[:, corner], -(rows[0] - rows[1]) / (2 * step), rtol=1e-5, atol=1e-6)


# --- the term


def test_overlap_term_is_the_loop_twins():
    coder = DeltaCoder()
    priors = some_priors(40)
    objects = [(priors.boxes[0, i::13][:3] + 2 * torch.rand(3, 4).double(), torch.arange(3)) for i in range(2)]
    match = ssd_assign(priors, targets_of(*objects, slots=8))
    pred = some_predictions(priors, 2, 4, coder)
    found, wanted = pred.boxes.tolist(), match.boxes.tolist()
    values = {}
    for kind, twin in (("iou", reference.iou), ("giou", reference.giou), ("aiou", reference.adaptive_iou)):
        values[kind] = overlap_term(kind)(pred, match).item()
        expected = reference.over_positives(match, lambda b, n, twin=twin: 1 - twin(found[b][n], wanted[b][n]))
        assert_close(values[kind], expected, rtol=1e-6, atol=0)
    assert abs(values["aiou"] - values["iou"]) > 0.01
    weight: PriorWeight = lambda match: torch.full(match.labels.shape, 2.0)  # noqa: E731
    assert_close(overlap_term("aiou")(pred, match, weight=weight).item(), 2 * values["aiou"])


def test_overlap_term_names_what_is_wrong():
    with no_hook(), pytest.raises(ValueError, match=r"kind must be one of \['aiou', 'giou', 'iou'\]; got 'ciou'"):
        overlap_term("ciou")


@pytest.mark.parametrize("name", ["retinanet", "fcos", "fcos_improved", "ssd300", "fssd300", "dssd320", "refinedet320"])
def test_any_detector_takes_the_loss_and_remembers(name):
    detectors = {}
    for box_loss, options in (("iou", {}), ("aiou", {"aiou_beta": 1.0}), ("aiou", {"aiou_beta": 0.7})):
        torch.manual_seed(0)
        detector = get_model(name, num_classes=3, backbone="tiny", box_loss=box_loss, **options)
        assert detector.spec == {"name": name, "num_classes": 3, "backbone": "tiny", "box_loss": box_loss, **options}
        detectors[box_loss, options.get("aiou_beta")] = detector
    boxes = torch.tensor([[[10.0, 12, 40, 50], [30, 4, 60, 30]]])
    targets = targets_of((boxes[0], [0, 2]), slots=8, dtype=torch.float32)
    images = torch.rand(1, 3, 64, 64)
    plain, same, other = (detector.loss(images, targets) for detector in detectors.values())
    assert same["box"].equal(plain["box"])
    assert 0 < plain["box"] < other["box"] <= 1  # shrunk boxes overlap less
    assert {key for key in plain if not plain[key].equal(other[key])} == {"box"}


@pytest.mark.parametrize("name", ["retinanet", "fcos", "ssd300", "refinedet320"])
def test_wrong_box_losses_are_refused_when_the_model_is_built(name):
    with no_hook(), pytest.raises(ValueError, match=r"box_loss must be .*; got 'l2'"):
        get_model(name, num_classes=3, backbone="tiny", box_loss="l2")
    with pytest.raises(ValueError, match=r"beta must be in \(0, 1\]; got 2.0"):
        get_model(name, num_classes=3, backbone="tiny", box_loss="aiou", aiou_beta=2.0)


def test_refinedet_keeps_smooth_l1_in_its_first_step():
    detector = get_model("refinedet320", num_classes=3, backbone="tiny", box_loss="aiou")
    assert detector.losses["arm_box"][1].keywords["beta"] == 1.0
    assert detector.losses["box"][1].func is box_iou_term


# --- the paper's claims (A1 to A6 of its errata)


@EVERY_BETA
def test_a1_aiou_never_exceeds_iou(beta):
    a, b = random_pairs(100_000, seed=2)
    excess = adaptive_iou(a, b, beta=beta) - iou(a, b)
    assert excess.max() < 3e-15
    assert beta == 1.0 or (excess < -0.01).double().mean() > 0.2


def test_a1_and_may_equal_it():
    concentric = about(0.5, 0.8, 1.3)
    assert_close(iou(UNIT, concentric).item(), 0.8 / (1 + 0.8 * 1.3 - 0.8))  # 0.645161
    assert_close(adaptive_iou(UNIT, concentric), iou(UNIT, concentric), rtol=1e-14, atol=0)
    for offset, expected in (
        (0.15, 0.25),
        (0.2, 0.25),
        (0.24, 9 / 41),
    ):
        nested = about(0.5 + offset, 0.5, 0.5)
        assert_close(iou(UNIT, nested).item(), 0.25, rtol=1e-14, atol=0)
        assert_close(adaptive_iou(UNIT, nested).item(), expected, rtol=1e-12, atol=0)
    assert adaptive_iou(UNIT, UNIT + 3).item() == iou(UNIT, UNIT + 3).item() == 0.0


@pytest.mark.parametrize(("beta", "least"), [(0.8, 1 / 9), (0.6, 0.25)])
def test_a2_far_boxes_that_overlap_have_no_slope(beta, least):
    for t, is_dead in ((beta * 0.999, False), (beta * 1.001, True), (0.99, True)):
        moved = (UNIT + box(t, 0, t, 0)).requires_grad_()
        loss = aiou_loss(moved, UNIT, beta=beta)
        loss.backward()
        overlap = iou(moved, UNIT).item()
        assert (overlap < least) == is_dead
        assert overlap > 0
        assert (loss.item() == 1.0) == is_dead
        assert bool((moved.grad == 0).all()) == is_dead


def gain(a, b, beta=0.8):
    """Delta': by how much AIoU raises the loss, as a share of the IoU loss."""
    return (aiou_loss(a, b, beta=beta) / iou_loss(a, b) - 1).item()


def test_a3_the_gain_grows_with_iou_for_offsets_only():
    shifts = [gain(UNIT + box(t, 0, t, 0), UNIT) for t in (0.8, 0.5, 0.2, 1e-9)]
    assert_close(shifts, [0.125, 0.2 / 1.3, 0.2, 0.25], rtol=1e-6, atol=0)  # (1 - beta) / (beta + t)
    assert all(abs(gain(about(0.5, w, 1.0), UNIT)) < 1e-12 for w in (0.3, 0.6, 0.9))
    mixed = [about(0.5 + t, 0.8, 1.0) for t in (0.08, 0.1, 0.15)]
    assert_close([iou(moved, UNIT).item() for moved in mixed], [0.8, 0.8, 0.714286], rtol=1e-5, atol=0)
    assert_close([gain(moved, UNIT) for moved in mixed], [0.0, 0.2195, 0.2069], rtol=0, atol=1e-4)


def test_a4_easy_samples_have_the_larger_slope_already():
    found = {}
    for beta in (1.0, 0.8):
        t = torch.tensor([1e-9, 1 / 3, 0.7], dtype=torch.float64, requires_grad=True)  # IoU 1, 0.5, 0.18
        moved = UNIT + torch.stack([t, t * 0, t, t * 0], dim=-1)
        found[beta] = torch.autograd.grad(aiou_loss(moved, UNIT, beta=beta).sum(), t)[0].tolist()
    assert_close(found[1.0], [2.0, 1.125, 0.692], rtol=1e-4, atol=0)
    assert_close(found[0.8], [2.5, 1.2457, 0.7111], rtol=1e-4, atol=0)


def test_a6_the_loss_is_a_concave_function_of_iou():
    overlap = torch.linspace(1 / 9 + 1e-6, 1 - 1e-9, 50, dtype=torch.float64, requires_grad=True)
    t = (1 - overlap) / (1 + overlap)
    moved = UNIT + torch.stack([t, t * 0, t, t * 0], dim=-1)
    slope = torch.autograd.grad(adaptive_iou(moved, UNIT).sum(), overlap)[0]
    assert_close(slope, 3.2 / (0.8 * (1 + overlap) + 1 - overlap).square().detach(), rtol=1e-9, atol=0)
    assert_close([slope[0].item(), slope[-1].item()], [1.0125, 1.25], rtol=1e-4, atol=0)
    assert (slope.diff() > 0).all()
