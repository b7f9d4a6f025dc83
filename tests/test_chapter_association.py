"""What the chapter on the association loss says of the paper, number by number."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from detcore.assigners import fcos_assign
from detcore.boxes import iou
from detcore.losses import association_term, pce_loss, pse_loss, sigmoid_focal_loss
from detcore.priors import PointGenerator
from detcore.structures import BACKGROUND, Assignment, Predictions, Priors, Targets

# The paper's Table I: AP, AP50, AP75, AP90, AP_S, AP_M, AP_L, AR1, AR10, AR100 in percent
COLUMNS = ("AP", "AP50", "AP75", "AP90", "AP_S", "AP_M", "AP_L", "AR1", "AR10", "AR100")
TABLE_1 = {
    "focal": (33.8, 52.8, 35.4, 12.1, 19.6, 38.7, 44.2, 30.2, 47.9, 52.1),
    "PCE": (35.0, 53.1, 37.4, 13.4, 19.4, 39.4, 47.3, 30.3, 47.9, 51.5),
    "PSE": (35.4, 53.7, 37.8, 13.6, 20.2, 39.8, 47.1, 30.9, 48.8, 52.7),
}
# Table II: Pearson, Spearman, Kendall without and with PSE
TABLE_2 = ((0.528, 0.433, 0.294), (0.534, 0.438, 0.298))
# Table III: AP, AP50, AP75 by k (at beta = 1) and by beta (at k = 1)
BY_K = {0.8: (35.1, 53.9, 37.2), 1.0: (35.4, 53.7, 37.8), 1.25: (34.8, 53.2, 37.1), 1.5: (34.4, 52.9, 36.5)}
BY_BETA = {0.25: (34.4, 53.1, 36.6), 0.8: (35.1, 53.5, 37.4), 1.0: (35.4, 53.7, 37.8), 1.25: (35.3, 53.5, 37.6)}

TIES = {"pse": pse_loss, "pce": pce_loss}


def wide(*values):
    return torch.tensor(values, dtype=torch.float64)


def slope(p, reached, tie="pse", *, alpha=0.25, gamma=2.0, beta=1.0, k=1.0, by="o"):
    """d/do or d/dp of focal loss plus the association loss at a positive, by autograd; no tie: of focal loss."""
    p, reached = torch.broadcast_tensors(*(torch.as_tensor(v, dtype=torch.float64) for v in (p, reached)))
    logits = torch.logit(p).requires_grad_()
    score = logits.sigmoid()
    loss = sigmoid_focal_loss(logits, torch.ones_like(p, dtype=torch.bool), alpha=alpha, gamma=gamma)
    if tie:
        loss = loss + TIES[tie](score, reached, beta=beta, k=k)
    by_logit = torch.autograd.grad(loss.sum(), logits)[0]
    return by_logit if by == "o" else by_logit / (p * (1 - p))


def valley(reached, tie="pse", **options):
    """The score at which the slope changes its sign, by bisection."""
    low, high = torch.full_like(reached, 1e-9), torch.full_like(reached, 1 - 1e-12)
    for _ in range(80):
        middle = (low + high) / 2
        falls = slope(middle, reached, tie, **options) < 0
        low, high = torch.where(falls, middle, low), torch.where(falls, high, middle)
    return low


def closed(reached, *, alpha=0.25, beta=1.0, k=1.0):
    return (k * reached + ((k * reached) ** 2 + 2 * alpha / beta).sqrt()) / 2


# --- E2.1: the sign in Eq. (11)


@pytest.mark.parametrize(("p", "reached", "true", "printed"), [(0.9, 0.5, 0.047, -0.097), (0.5, 0.9, -0.325, 0.075)])
def test_eq_11_has_the_wrong_sign(p, reached, true, printed):
    spring = 2 * p**2 - 2 * reached * p  # beta = k = 1
    by_autograd = slope(p, reached, gamma=0.0).item()
    assert_close(by_autograd, (p - 1) * (0.25 - spring))
    assert_close((p - 1) * (0.25 + spring), printed, rtol=0, atol=5e-4)
    assert_close(by_autograd, true, rtol=0, atol=5e-4)
    assert_close(by_autograd - printed, 4 * p * (1 - p) * (p - reached), rtol=0, atol=5e-4)


def test_slope_of_pse_flips_where_the_score_passes_k_times_iou():
    p = wide(0.39, 0.41, 0.59, 0.61)
    at = p.clone().requires_grad_()
    ties = pse_loss(at, wide(0.5, 0.5, 0.5, 0.5), k=0.8).sum() + pse_loss(at, wide(0.5, 0.5, 0.5, 0.5), k=1.2).sum()
    assert_close(torch.autograd.grad(ties, at)[0], 2 * (p - 0.4) + 2 * (p - 0.6))
    for k, goal in ((0.8, 0.4), (1.2, 0.6)):
        for side in (-0.01, 0.01):
            score = wide(goal + side).requires_grad_()
            pull = torch.autograd.grad(pse_loss(score, wide(0.5), k=k).sum(), score)[0]
            assert math.copysign(1, pull.item()) == math.copysign(1, side)


# --- E2.2: the valley at gamma = 0


def test_valley_without_focusing_is_the_corrected_closed_form():
    reached = wide(0.0, 0.25, 0.5, 0.75)
    found = valley(reached, gamma=0.0)
    assert_close(found, closed(reached), rtol=0, atol=1e-9)
    assert_close(found, wide(0.354, 0.500, 0.683, 0.890), rtol=0, atol=5e-4)
    assert_close(found - 0.25 / (2 * found), reached, rtol=0, atol=1e-9)  # p - a / (2 beta p) = kI
    assert (found > reached).all()


@pytest.mark.parametrize(("beta", "least"), [(1.0, 0.707), (0.25, 1.414)])
def test_printed_valley_has_no_solution_where_it_is_needed(beta, least):
    p = torch.linspace(1e-4, 1, 100_000, dtype=torch.float64)
    printed = p + 0.25 / (2 * beta * p)  # is to equal kI
    assert_close(printed.min().item(), least, rtol=0, atol=1e-3)
    if beta < 1:
        assert printed.min() > 1  # no IoU at all


@pytest.mark.parametrize(("beta", "bound"), [(1.0, 0.875), (0.25, 0.5)])
def test_valley_without_focusing_ends_before_iou_1(beta, bound):
    below, above = valley(wide(bound - 1e-3, bound + 1e-3), gamma=0.0, beta=beta)
    assert below < 0.9995
    assert above > 1 - 1e-9
    assert (slope(torch.linspace(0.01, 0.99, 99), bound + 1e-3, gamma=0.0, beta=beta) < 0).all()


# --- E2.3: the gap


@pytest.mark.parametrize(("beta", "bound"), [(1.0, 0.354), (0.25, 0.707)])
def test_gap_shrinks_as_the_iou_grows(beta, bound):
    reached = torch.linspace(0, 0.45, 46, dtype=torch.float64)
    gap = valley(reached, gamma=0.0, beta=beta) - reached
    assert (gap.diff() < 0).all()
    assert_close(gap[0].item(), bound, rtol=0, atol=5e-4)


@pytest.mark.parametrize(("beta", "at_half", "mean"), [(0.25, 0.188, 0.073), (1.0, 0.090, 0.031), (4.0, 0.031, 0.010)])
def test_gap_of_the_trained_loss(beta, at_half, mean):
    reached = torch.linspace(0.5, 0.99, 491, dtype=torch.float64)
    found = valley(reached, beta=beta)
    gap = found - reached
    assert_close(gap[0].item(), at_half, rtol=0, atol=5e-4)
    assert_close(gap.mean().item(), mean, rtol=0, atol=1e-3)
    assert (gap > 0).all()
    assert (gap < closed(reached, beta=beta).clamp(max=1) - reached).all()  # g = 0 overstates it from IoU 0.5 on
    right = 0.25 * (1 - found) * (1 - found - 2 * found * found.log())
    assert_close(2 * beta * found * gap, right, rtol=1e-6, atol=1e-9)


def test_focusing_widens_the_gap_of_poor_boxes_under_a_stiff_spring():
    poor = wide(0.0, 0.1)
    assert (valley(poor, beta=4.0) > closed(poor, beta=4.0)).all()
    assert (valley(poor, beta=1.0) < closed(poor, beta=1.0)).all()


def test_trained_loss_has_one_valley():
    p = torch.linspace(1e-5, 1 - 1e-5, 20_001, dtype=torch.float64)
    for alpha in (0.1, 0.25, 0.5, 0.75):
        for beta in (0.25, 0.5, 1.0, 2.0, 4.0):
            for goal in torch.linspace(0, 0.99, 10).tolist():
                signs = (slope(p, goal, alpha=alpha, beta=beta) > 0).int()
                assert signs.diff().abs().sum() == 1, (alpha, beta, goal)
                assert signs[-1] == 1


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_pce_has_no_gap_for_boxes_that_fit_at_all(gamma):
    reached = torch.linspace(0.3, 0.97, 68, dtype=torch.float64)
    assert_close(valley(reached, "pce", gamma=gamma), reached, rtol=0, atol=1e-9)


# --- E2.4: where a cell of the map looks


@pytest.mark.parametrize("stride", [8, 16])
def test_printed_mapping_is_off_by_half_a_cell_and_by_a_whole_one_from_the_corner(stride):
    true = PointGenerator([stride])([torch.zeros(1, 1, 2, 2)], (2 * stride, 2 * stride)).boxes[0]
    centres = (true[:, :2] + true[:, 2:]) / 2
    cells = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    assert_close(centres, (stride // 2 + cells * stride).float())
    printed = (stride + cells * stride).float()
    assert_close(printed - centres, torch.full_like(centres, stride / 2))
    assert printed.amax() == 2 * stride  # the last point lies on the border of the picture


# --- E2.5: the maximum over the classes


def one_positive(logits):
    """A positive prior of class 0 whose box has IoU 0.6 with its object."""
    boxes, own = wide(0, 0, 10, 6).view(1, 1, 4), wide(0, 0, 10, 10).view(1, 1, 4)
    one = Targets(own, torch.tensor([[0]]), torch.tensor([[True]]))
    match = Assignment(torch.tensor([[0]]), torch.tensor([[0]]), own, wide(1.0).view(1, 1), one)
    return Predictions(logits.view(1, 1, -1), torch.zeros_like(boxes), boxes, Priors(own, (1,)), {}), match


@pytest.mark.parametrize(("score", "pulls"), [("max", (0.0, -0.128)), ("label", (-0.090, 0.0))])
def test_maximum_over_classes_pushes_the_wrong_class_up(score, pulls):
    logits = torch.logit(wide(0.10, 0.20)).requires_grad_()
    pred, match = one_positive(logits)
    term = association_term(pred, match, score=score)
    assert_close(torch.autograd.grad(term, logits)[0], wide(*pulls))


def test_focal_loss_pushes_the_leading_wrong_class_down_far_less():
    logits = torch.logit(wide(0.20)).requires_grad_()
    down = torch.autograd.grad(sigmoid_focal_loss(logits, torch.tensor([False])).sum(), logits)[0].item()
    assert_close(down, 0.017, rtol=0, atol=5e-4)


# --- E2.6: negatives


def test_a_negative_point_may_predict_a_box_that_fits():
    point = Priors(torch.tensor([[[0.0, 0, 8, 8]]]), (1,))  # looks at (4, 4)
    thing = Targets(torch.tensor([[[10.0, 10, 30, 30]]]), torch.tensor([[0]]), torch.tensor([[True]]))
    assert fcos_assign(point, thing, ranges=[64.0]).labels.item() == BACKGROUND
    assert_close(iou(wide(2, 2, 30, 30), wide(10, 10, 30, 30)).item(), 400 / 784)
    assert round(400 / 784, 2) == 0.51


def test_a_point_inside_is_negative_on_the_wrong_level():
    grid = [torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 16, 16)]
    points = PointGenerator([8, 16])(grid, (256, 256))
    small = Targets(torch.tensor([[[96.0, 96, 160, 160]]]), torch.tensor([[0]]), torch.tensor([[True]]))
    on_p3, on_p4 = fcos_assign(points, small, ranges=[64.0, 128.0]).positive[0].split(points.counts)
    assert on_p3.sum() == 64  # a side of 64 pixels, eight points along it
    assert on_p4.sum() == 0  # sixteen points inside, none of them 64 away from a side


def test_association_adds_nothing_for_negatives():
    logits = wide(2.0, -1.0).requires_grad_()
    pred, match = one_positive(logits)
    nothing = Assignment(torch.tensor([[BACKGROUND]]), match.index, match.boxes, match.iou, match.targets)
    for kind in TIES:
        term = association_term(pred, nothing, kind=kind)
        assert term.item() == 0
        assert torch.autograd.grad(term, logits)[0].abs().sum() == 0


# --- E2.7: where PCE is not defined


def test_pce_as_printed_takes_the_logarithm_of_a_negative_number():
    assert_close(1 - abs(0.3 - 1.5 * 1.0), -0.2)
    assert (1 - (wide(0.3) - 1.5 * 1.0).abs()).log().isnan().all()
    score = wide(0.3).requires_grad_()
    held = pce_loss(score, wide(1.0), k=1.5)
    assert_close(held, wide(-math.log(1e-6)))
    assert torch.autograd.grad(held.sum(), score)[0].item() == 0  # where it is held nothing pulls
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert (
        pce_loss(*torch.broadcast_tensors(grid[1:-1, None], grid)) < 5
    ).all()  # with k <= 1 it is defined wherever 0 < p < 1


def test_slope_of_pce_jumps_at_its_goal():
    score = wide(0.5 - 1e-7, 0.5 + 1e-7).requires_grad_()
    pull = torch.autograd.grad(pce_loss(score, wide(0.5, 0.5)).sum(), score)[0]
    assert_close(pull, wide(-1.0, 1.0), rtol=0, atol=1e-6)


# --- E2.8: by the logit or by the score


def test_gradient_vanishes_at_score_1_only_by_the_logit():
    p = wide(0.9, 0.99, 0.999)
    assert_close(slope(p, 0.6), wide(0.053, 0.0077, 0.0008), rtol=0, atol=5e-4)
    assert_close(slope(p, 0.6, by="p"), wide(0.592, 0.780, 0.798), rtol=0, atol=5e-4)


@pytest.mark.parametrize("by", ["o", "p"])
def test_slopes_have_opposite_signs_on_both_sides_of_the_valley(by):
    bottom = valley(wide(0.6))
    assert slope(bottom - 0.01, 0.6, by=by) < 0 < slope(bottom + 0.01, 0.6, by=by)


# --- E2.9: focal loss without focusing; who pulls at the start


def test_focal_loss_at_gamma_0_is_weighted_cross_entropy():
    logits, yes = torch.linspace(-4, 4, 9, dtype=torch.float64), torch.ones(9, dtype=torch.bool)
    plain = F.binary_cross_entropy_with_logits(logits, yes.double(), reduction="none")
    assert_close(sigmoid_focal_loss(logits, yes, alpha=0.25, gamma=0.0), plain / 4)


def test_association_is_slack_at_the_start():
    focal = slope(0.01, 0.5, tie=None).item()
    ties = [slope(0.01, 0.5, tie).item() - focal for tie in ("pse", "pce")]
    assert_close(focal, -0.265, rtol=0, atol=5e-4)
    assert_close(ties, [-0.0097, -0.0194], rtol=0, atol=5e-5)
    p = 0.01
    assert_close(focal, 0.25 * (1 - p) ** 2 * (2 * p * math.log(p) + p - 1))
    assert_close(ties[0], 2 * (p - 0.5) * p * (1 - p))
    assert_close(ties[1], -p * (1 - p) / (1 - abs(p - 0.5)))


# --- E2.10: "k = 1 is best", and what PCE is best at


def best(table, place):
    return max(table, key=lambda value: table[value][place])


def test_k_of_1_is_best_but_for_ap50():
    assert [best(BY_K, place) for place in range(3)] == [1.0, 0.8, 1.0]
    assert BY_K[0.8][1] == 53.9
    assert [best(BY_BETA, place) for place in range(3)] == [1.0, 1.0, 1.0]


def test_pce_beats_pse_on_large_objects_and_loses_to_focal_on_small_ones():
    row = {name: dict(zip(COLUMNS, values, strict=True)) for name, values in TABLE_1.items()}
    assert best(TABLE_1, COLUMNS.index("AP_L")) == "PCE"
    for metric in ("AP_S", "AR100"):
        assert row["PCE"][metric] < row["focal"][metric] < row["PSE"][metric]


# --- E2.11: how sure one may be of a difference in the third digit


def test_difference_of_the_correlations_in_standard_errors_of_independent_pairs():
    (before, *_), (after, *_) = TABLE_2
    gains = [round(b - a, 3) for a, b in zip(*TABLE_2, strict=True)]
    assert gains == [0.006, 0.005, 0.004]
    assert_close((math.atanh(after) - math.atanh(before)) / math.sqrt(2 / (250_000 - 3)), 2.95, rtol=0, atol=0.01)


# --- E2.12: k above 1


def test_k_above_1_gives_good_boxes_one_minimiser():
    p = torch.linspace(0.01, 1 - 1e-6, 500, dtype=torch.float64)
    for reached in (0.8, 0.9, 1.0):  # 1.25 times these is 1 or more
        assert (slope(p, reached, k=1.25) < 0).all()
    low, high = valley(wide(0.8, 0.9), k=1.25)
    assert low == high > 1 - 1e-6
    low, high = valley(wide(0.8, 0.9), k=1.0)
    assert high - low > 0.08


@pytest.mark.parametrize(("p", "moves"), [(0.3, -1), (0.9, 1)])
def test_an_attached_iou_would_be_lowered_where_the_score_is_low(p, moves):
    reached = wide(0.6).requires_grad_()
    pull = torch.autograd.grad(pse_loss(wide(p), reached).sum(), reached)[0]
    assert_close(pull, wide(-2 * (p - 0.6)))
    assert math.copysign(1, -pull.item()) == moves  # descent moves the IoU this way


def test_boxes_feel_nothing_of_the_association():
    logits = wide(0.5, -0.5)
    pred, match = one_positive(logits)
    boxes = pred.boxes.clone().requires_grad_()
    pred = Predictions(pred.logits.clone().requires_grad_(), pred.deltas, boxes, pred.priors, {})
    for kind in TIES:
        term = partial(association_term, kind=kind)(pred, match)
        assert torch.autograd.grad(term, [pred.logits, boxes], allow_unused=True)[1] is None


# --- what is true as printed


def test_the_deltas_of_table_1_follow_from_it():
    def gains(name):
        return [round(a - b, 1) for a, b in zip(TABLE_1[name], TABLE_1["focal"], strict=True)]

    assert gains("PSE")[:4] == [1.6, 0.9, 2.4, 1.5]
    assert gains("PCE")[0] == 1.2
    assert gains("PSE")[4:7] == [0.6, 1.1, 2.9]


# --- FCOS's points


def test_a_distance_of_exactly_64_is_positive_on_two_levels_or_on_none():
    grid = [torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 16, 16)]
    points = PointGenerator([8, 16])(grid, (256, 256))
    # seen from (68, 68) on P3 the left side is 64 away; seen from (56, 56) on P4 the right side is
    thing = Targets(torch.tensor([[[4.0, 4, 120, 120]]]), torch.tensor([[0]]), torch.tensor([[True]]))
    middle = (points.boxes[0, :, :2] + points.boxes[0, :, 2:]) / 2
    where = [torch.where((middle == at).all(-1))[0][level].item() for level, at in enumerate([68.0, 56.0], start=-1)]
    for closed_ends, both in ((True, True), (False, False)):
        found = fcos_assign(points, thing, ranges=[64.0, 128.0], closed=closed_ends).positive[0]
        assert found[where].tolist() == [both, both]


def test_positives_fall_where_an_object_leaves_a_level():
    grid = [torch.zeros(1, 1, 256 // s, 256 // s) for s in (8, 16, 32)]
    points = PointGenerator([8, 16, 32])(grid, (256, 256))

    def count(side):
        low, high = 128 - side / 2, 128 + side / 2
        thing = Targets(torch.tensor([[[low, low, high, high]]]), torch.tensor([[0]]), torch.tensor([[True]]))
        found = fcos_assign(points, thing, ranges=[64.0, 128.0, 256.0]).positive[0]
        return [int(part.sum()) for part in found.split(points.counts)]

    assert count(32) == [16, 0, 0]
    assert count(64) == [64, 0, 0]
    assert count(120) == [4, 64, 0]
    assert count(128) == [0, 64, 0]
    assert sum(count(32)) < sum(count(64))
