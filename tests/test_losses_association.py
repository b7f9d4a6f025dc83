"""The association losses against hand values, closed forms, loops, and the corrected formulas of their paper.

p is a class score, I the IoU its box reaches, o = logit(p). Numbers named E2.x are errata of the paper.
"""

import dataclasses
import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from detcore.assigners import max_iou_assign
from detcore.coders import DeltaCoder
from detcore.losses.association import association_term, pce_loss, pse_loss
from detcore.losses.functional import sigmoid_focal_loss
from detcore.losses.terms import focal_term
from detcore.structures import IGNORE, Assignment, Predictions, Priors
from tests import reference
from tests.samples import FAST, no_hook, predictions_of, some_predictions, some_priors, targets_of

LOSSES = {"pse": pse_loss, "pce": pce_loss}
CODER = DeltaCoder()
KINDS = pytest.mark.parametrize("kind", LOSSES)
SCORES = pytest.mark.parametrize("score", ["label", "max"])

share = st.floats(0, 1)
inside = st.floats(0.01, 0.99)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def slope(p, i, *, kind=None, beta=1.0, k=1.0, gamma=None):
    """d/do of focal (``gamma`` given) plus association (``kind`` given) of a positive."""
    o = torch.logit(torch.as_tensor(p, dtype=torch.float64)).requires_grad_()
    i = torch.as_tensor(i, dtype=torch.float64).expand_as(o)
    loss = torch.zeros_like(o)
    if gamma is not None:
        loss = loss + sigmoid_focal_loss(o, torch.ones_like(o) > 0, gamma=gamma)
    if kind is not None:
        loss = loss + LOSSES[kind](o.sigmoid(), i, beta=beta, k=k)
    return torch.autograd.grad(loss.sum(), o)[0]


def root(function, low=1e-9, high=1 - 1e-9):
    """Where an increasing function crosses zero."""
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return (low + high) / 2


def valley(i, **options):
    """Where focal + association is lowest, found on the gradient."""
    return root(lambda p: slope(p, i, **options).item())


# --- values


def test_losses_by_hand():
    # |p - kI| = |.9 - .5| = .4: .16 and -ln .6; with k = 1.2: .3: .09 and -ln .7; beta 4
    p, i = scalar(0.9), scalar(0.5)
    assert_close(pse_loss(p, i).item(), 0.16)
    assert_close(pce_loss(p, i).item(), 0.5108256)
    assert_close(pse_loss(p, i, beta=4.0, k=1.2).item(), 0.36)
    assert_close(pce_loss(p, i, beta=4.0, k=1.2).item(), 4 * 0.3566749)
    # k belongs to I: on p it would be 1.08 - .5 = .58 -> .3364
    assert_close(pse_loss(p, i, k=1.2).item(), 0.09)


@KINDS
@pytest.mark.parametrize(("beta", "k"), [(1.0, 1.0), (0.25, 0.8), (4.0, 1.5)])
def test_loss_equals_its_loop(kind, beta, k):
    p, i = torch.rand(20, 10).double(), torch.rand(20, 10).double()
    rows = zip(p.flatten().tolist(), i.flatten().tolist(), strict=True)
    expected = [reference.association(*row, kind, beta, k) for row in rows]
    assert_close(LOSSES[kind](p, i, beta=beta, k=k).flatten(), torch.tensor(expected).double(), rtol=1e-6, atol=1e-12)


@FAST
@given(share, share, st.sampled_from([0.5, 0.8, 1.0]))
def test_losses_are_zero_at_the_goal_and_pce_is_the_steeper(p, i, k):
    pse, pce = (loss(scalar(p), scalar(i), k=k) for loss in (pse_loss, pce_loss))
    assert pce >= pse >= 0  # -ln(1 - x) >= x >= x^2 on [0, 1)
    for loss in LOSSES.values():
        assert loss(scalar(k * i), scalar(i), k=k).abs() < 1e-12


def test_pce_is_held_where_k_pushes_its_logarithm_below_zero():
    # E2.7: k = 1.5, I = 1, p = .3: ln(1 - 1.2) does not exist
    p = scalar([0.3, 0.5, 0.500002, 0.6]).requires_grad_()
    loss = pce_loss(p, torch.ones_like(p), k=1.5)
    [gradient] = torch.autograd.grad(loss.sum(), p)
    held = -math.log(1e-6)
    assert_close(loss, scalar([held, held, -math.log(2e-6), -math.log(0.1)]), rtol=1e-9, atol=0)
    assert gradient[:2].tolist() == [0.0, 0.0]  # nothing pulls there
    assert_close(gradient[3].item(), -1 / 0.1)


@KINDS
def test_loss_of_certain_scores_is_finite(kind):
    o = torch.tensor([-1000.0, -100.0, 0.0, 100.0, 1000.0]).repeat(2, 1).requires_grad_()
    i = torch.tensor([[0.0], [1.0]]).expand(2, 5)
    loss = LOSSES[kind](o.sigmoid(), i)
    [gradient] = torch.autograd.grad(loss.sum(), o)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_of_short_floats_is_computed_in_float32(kind, dtype):
    p, i = torch.rand(50).to(dtype), torch.rand(50).to(dtype)
    found = LOSSES[kind](p, i, beta=0.7, k=0.9)
    assert found.dtype == torch.float32
    assert_close(found, LOSSES[kind](p.float(), i.float(), beta=0.7, k=0.9), rtol=0, atol=0)


@KINDS
def test_loss_of_nothing_has_a_gradient(kind):
    p = torch.zeros(0, 3, requires_grad=True)
    [gradient] = torch.autograd.grad(LOSSES[kind](p, torch.zeros(0, 3)).sum(), p)
    assert gradient.shape == (0, 3)


# --- gradients


@KINDS
@pytest.mark.parametrize(("beta", "k"), [(1.0, 1.0), (0.25, 0.8)])
def test_loss_passes_gradcheck(kind, beta, k):
    p = (torch.rand(12).double() * 0.8 + 0.1).requires_grad_()
    i = (torch.rand(12).double() * 0.8 + 0.1).requires_grad_()
    assert (p - k * i).abs().min() > 1e-4  # the kink of PCE
    assert torch.autograd.gradcheck(partial(LOSSES[kind], beta=beta, k=k), (p, i))


@pytest.mark.parametrize(("beta", "k"), [(1.0, 1.0), (0.25, 0.8), (4.0, 1.1)])
def test_slopes_equal_the_closed_forms(beta, k):
    # dense.md 7: PSE 2 beta (p - kI) p (1 - p); PCE beta sign(p - kI) p (1 - p) / (1 - |p - kI|)
    p, i = (torch.rand(2, 200).double() * 0.98 + 0.01).unbind()
    goal = k * i
    assert_close(slope(p, i, kind="pse", beta=beta, k=k), 2 * beta * (p - goal) * p * (1 - p), rtol=1e-9, atol=1e-14)
    expected = beta * (p - goal).sign() * p * (1 - p) / (1 - (p - goal).abs())
    assert_close(slope(p, i, kind="pce", beta=beta, k=k), expected, rtol=1e-9, atol=1e-14)


@FAST
@given(inside, inside, st.sampled_from([0.8, 1.0, 1.2]), st.sampled_from(list(LOSSES)))
def test_slope_changes_sign_at_the_goal(p, i, k, kind):
    found = slope(p, i, kind=kind, k=k).item()
    if abs(p - k * i) > 1e-9 and k * i - p < 1 - 1e-6:
        assert (found > 0) == (p > k * i)


def test_pce_pulls_up_to_the_goal_where_pse_lets_go():
    # at p = .5: p (1 - p) = .25; a millionth from the goal PSE has 2e-6 of it
    for side in (-1, 1):
        assert_close(slope(0.5 + side * 1e-6, 0.5, kind="pce").item(), side * 0.25, rtol=1e-5, atol=0)
        assert abs(slope(0.5 + side * 1e-6, 0.5, kind="pse").item()) < 1e-6


def test_goals_above_one_pull_to_certainty():
    # E2.12: k = 1.5: every I >= 2/3 wants p = 1
    for i in (0.7, 0.9):
        assert slope(torch.linspace(0.01, 0.999, 50), i, kind="pse", k=1.5).lt(0).all()


# --- beside focal loss


@pytest.mark.parametrize(("p", "i", "expected", "printed"), [(0.9, 0.5, 0.047, -0.097), (0.5, 0.9, -0.325, 0.075)])
def test_slope_beside_unfocused_focal_loss_has_the_other_sign_than_printed(p, i, expected, printed):
    # E2.1: dL/do = (p - 1)(a - 2 beta p^2 + 2 beta k I p); Eq. (11) prints both PSE terms negated
    found = slope(p, i, kind="pse", gamma=0.0).item()
    assert_close(found, (p - 1) * (0.25 - 2 * p**2 + 2 * i * p), rtol=1e-9, atol=0)
    assert_close(found, expected, rtol=0, atol=5e-4)
    assert_close((p - 1) * (0.25 + 2 * p**2 - 2 * i * p), printed, rtol=0, atol=5e-4)


@pytest.mark.parametrize(("i", "expected"), [(0.0, 0.354), (0.25, 0.5), (0.5, 0.683), (0.75, 0.890)])
def test_valley_beside_unfocused_focal_loss(i, expected):
    # E2.2: p* = (kI + sqrt(k^2 I^2 + 2 a / beta)) / 2, above the goal
    closed = (i + math.sqrt(i**2 + 0.5)) / 2
    assert_close(closed, expected, rtol=0, atol=5e-4)
    assert_close(valley(i, kind="pse", gamma=0.0), closed, rtol=0, atol=1e-9)
    assert_close(slope(closed, i, kind="pse", gamma=0.0).item(), 0.0, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("beta", "limit"), [(1.0, 0.875), (0.25, 0.5)])
def test_there_is_no_valley_for_good_boxes_without_focusing(beta, limit):
    # E2.2: only if kI < 1 - a / (2 beta)
    p = torch.linspace(0.01, 0.9999, 2000)
    above, below = (slope(p, limit + step, kind="pse", beta=beta, gamma=0.0) for step in (0.005, -0.005))
    assert above.lt(0).all()
    assert below.gt(0).any()


@pytest.mark.parametrize(("beta", "gap"), [(0.25, 0.188), (1.0, 0.090), (4.0, 0.031)])
def test_valley_beside_focal_loss_lies_above_the_goal(beta, gap):
    # E2.3: 2 beta p (p - kI) = a (1 - p)(1 - p - 2 p ln p), solved here on its own and found on our gradient
    def equation(p):
        return 2 * beta * p * (p - 0.5) - 0.25 * (1 - p) * (1 - p - 2 * p * math.log(p))

    found = valley(0.5, kind="pse", beta=beta, gamma=2.0)
    assert_close(found, root(equation), rtol=0, atol=1e-7)
    assert_close(found - 0.5, gap, rtol=0, atol=5e-4)


def test_pce_comes_to_rest_at_the_goal_itself():
    # its slope jumps from -p (1 - p) to p (1 - p) there; focal's a (1 - p)^2 (1 - p - 2 p ln p) is less from I = .26 on
    least = root(lambda p: p - 0.25 * (1 - p) * (1 - p - 2 * p * math.log(p)))
    assert_close(least, 0.26, rtol=0, atol=0.005)
    for i in (least + 0.01, 0.5, 0.95):
        assert_close(valley(i, kind="pce", gamma=2.0), i, rtol=0, atol=1e-9)
    assert least - 0.01 < valley(least - 0.01, kind="pce", gamma=2.0) < least
    assert valley(0.05, kind="pce", gamma=2.0) > 0.1


@pytest.mark.parametrize("i", [0.05, 0.5, 0.95])
@KINDS
def test_beside_focal_loss_there_is_one_valley(kind, i):
    slopes = slope(torch.linspace(0.0005, 0.9995, 2000), i, kind=kind, gamma=2.0)
    assert slopes.sign().diff().ne(0).sum() == 1
    assert slopes[0] < 0 < slopes[-1]


def test_pull_vanishes_towards_certainty_in_the_logit_not_in_the_score():
    # E2.8: I = .6, gamma 2
    p = torch.tensor([0.9, 0.99, 0.999], dtype=torch.float64)
    by_logit = slope(p, 0.6, kind="pse", gamma=2.0)
    assert_close(by_logit, scalar([0.053, 0.0077, 0.0008]), rtol=0, atol=5e-4)
    assert_close(by_logit / (p * (1 - p)), scalar([0.592, 0.780, 0.798]), rtol=0, atol=5e-4)


def test_association_is_slack_at_the_start_of_training():
    # E2.9: p = .01, I = .5: focal -.265, PSE -.0097, PCE -.019
    assert_close(slope(0.01, 0.5, gamma=2.0).item(), -0.265, rtol=0, atol=5e-4)
    assert_close(slope(0.01, 0.5, kind="pse").item(), -0.0097, rtol=0, atol=5e-5)
    assert_close(slope(0.01, 0.5, kind="pce").item(), -0.019, rtol=0, atol=5e-4)


# --- the term


def a_batch(*, requires_grad=False, count=40):
    priors = some_priors(count)
    objects = [(priors.boxes[0, i:8:3] + 0.5, [0, 1, 2][: len(priors.boxes[0, i:8:3])]) for i in range(2)]
    pred = some_predictions(priors, 2, 3, CODER, requires_grad=requires_grad)
    match = max_iou_assign(priors, targets_of(*objects, slots=8), positive_iou=0.35, negative_iou=0.2)
    assert min(match.positive.sum(), match.negative.sum()) >= 4
    return pred, match


def one_positive(logits, label, *, shift=2.5, boxes_learn=True):
    """One 10 x 10 prior whose box reaches (10 - shift) / (10 + shift) of its object: .6 at 2.5."""
    priors = Priors(torch.tensor([[[0.0, 0, 10, 10]]]).double(), (1,))
    match = max_iou_assign(priors, targets_of(([[shift, 0, 10 + shift, 10]], [label])))
    deltas = torch.zeros(1, 1, 4).double().requires_grad_(boxes_learn)
    logits = scalar([[logits]]).requires_grad_()
    return predictions_of(priors, logits, deltas, torch.zeros(1, 1, 1).double(), CODER), match


@KINDS
@SCORES
def test_term_equals_its_loop(kind, score):
    pred, match = a_batch()
    found = association_term(pred, match, kind=kind, beta=0.7, k=0.9, score=score)
    assert_close(found.item(), reference.association_term(pred, match, kind, 0.7, 0.9, score), rtol=1e-6, atol=0)


def test_terms_differ_on_this_batch():
    pred, match = a_batch()
    values = sorted(association_term(pred, match, kind=k, score=s).item() for k in LOSSES for s in ("label", "max"))
    assert min(b - a for a, b in itertools.pairwise(values)) > 1e-3


@KINDS
@SCORES
def test_term_passes_gradcheck(kind, score):
    pred, match = a_batch(count=16)

    def term(logits):
        return association_term(dataclasses.replace(pred, logits=logits), match, kind=kind, score=score)

    assert torch.autograd.gradcheck(term, [pred.logits.detach().requires_grad_()])


def test_maximum_of_the_classes_pushes_the_wrong_one():
    # E2.5: p_wrong = .2, p_label = .1, I = .6
    logits = torch.logit(torch.tensor([0.2, 0.1])).tolist()
    pred, match = one_positive(logits, 1)
    slopes = {s: torch.autograd.grad(association_term(pred, match, score=s), pred.logits)[0] for s in ("label", "max")}
    assert_close(slopes["max"][0, 0], scalar([-0.128, 0.0]), rtol=0, atol=1e-6)  # 2 (.2 - .6) .2 .8
    assert_close(slopes["label"][0, 0], scalar([0.0, -0.090]), rtol=0, atol=1e-6)  # 2 (.1 - .6) .1 .9
    [focal] = torch.autograd.grad(focal_term(pred, match), pred.logits)
    assert_close(focal[0, 0, 0].item(), 0.017, rtol=0, atol=5e-4)  # downwards, an eighth of the wrong push


def with_background(pred, *, last):
    """The same sigmoids' logits, and one of background after them."""
    logits = torch.cat([pred.logits, torch.full_like(pred.logits[..., :1], last)], dim=-1)
    return dataclasses.replace(pred, logits=logits)


@KINDS
def test_softmax_of_one_class_and_background_is_a_sigmoid(kind):
    # softmax(o, 0) = sigmoid(o)
    pred, match = a_batch()
    alone = dataclasses.replace(pred, logits=pred.logits[..., :1])
    match = dataclasses.replace(match, labels=match.labels.clamp(max=0))
    found = association_term(with_background(alone, last=0.0), match, kind=kind, activation="softmax")
    assert_close(found, association_term(alone, match, kind=kind), rtol=1e-9, atol=0)


def test_softmax_by_hand():
    # weights 1, 3 and background 4: p = .125, .375; I = .6
    pred, match = one_positive([0.0, math.log(3)], 0)
    pred = with_background(pred, last=math.log(4))
    options = {"activation": "softmax"}
    assert_close(association_term(pred, match, **options).item(), (0.125 - 0.6) ** 2)
    assert_close(association_term(pred, match, score="max", **options).item(), (0.375 - 0.6) ** 2)  # not .5, background
    [gradient] = torch.autograd.grad(association_term(pred, match, **options), pred.logits)
    # -.95 p_0 (1 - p_0, -p_1, -p_background)
    expected = -0.95 * 0.125 * scalar([0.875, -0.375, -0.5])
    assert_close(gradient[0, 0], expected)


def test_positives_can_be_weighted():
    pred, match = a_batch()
    everyone = association_term(pred, match)
    assert_close(association_term(pred, match, weight=lambda match: torch.full_like(match.iou, 3.0)), 3 * everyone)
    first = association_term(pred, match, weight=lambda match: (match.labels == 0).double())
    assert 0 < first < everyone


@KINDS
@SCORES
def test_term_leaves_the_boxes_alone(kind, score):
    pred, match = a_batch(requires_grad=True)
    loss = association_term(pred, match, kind=kind, score=score)
    gradients = torch.autograd.grad(loss, [pred.logits, pred.deltas, pred.extras["iou"]], allow_unused=True)
    assert gradients[0][match.positive].ne(0).any()
    assert gradients[1] is None
    assert gradients[2] is None


@KINDS
@SCORES
def test_term_adds_nothing_for_negatives_and_ignored(kind, score):
    pred, match = a_batch(requires_grad=True)
    labels = match.labels.clone()
    labels[:, 20:] = IGNORE
    match = dataclasses.replace(match, labels=labels)
    [gradient] = torch.autograd.grad(association_term(pred, match, kind=kind, score=score), pred.logits)
    assert match.positive.any()
    assert gradient[~match.positive].eq(0).all()
    assert gradient[match.positive].abs().sum(-1).gt(0).all()


def test_label_term_touches_the_own_class_only():
    pred, match = a_batch(requires_grad=True)
    [gradient] = torch.autograd.grad(association_term(pred, match), pred.logits)
    own = match.labels[..., None] == torch.arange(3)
    assert gradient[~own].eq(0).all()
    assert gradient[own].ne(0).all()


@KINDS
@SCORES
def test_pictures_without_objects_cost_nothing(kind, score):
    priors = some_priors(20)
    pred = some_predictions(priors, 2, 3, CODER, requires_grad=True)
    match = max_iou_assign(priors, targets_of(([], []), ([], []), slots=8))
    loss = association_term(pred, match, kind=kind, score=score)
    [gradient] = torch.autograd.grad(loss, pred.logits)
    assert loss == 0
    assert gradient.eq(0).all()


@KINDS
def test_an_empty_picture_beside_a_full_one_changes_nothing(kind):
    pred, match = a_batch()
    priors = pred.priors
    nobody = max_iou_assign(priors, targets_of(([], []), slots=8))
    both = Assignment(
        *(torch.cat([getattr(m, name) for m in (match, nobody)]) for name in ("labels", "index", "boxes", "iou")),
        match.targets,
    )
    three = some_predictions(priors, 1, 3, CODER)
    joint = Predictions(
        *(torch.cat([getattr(p, name) for p in (pred, three)]) for name in ("logits", "deltas", "boxes")), priors
    )
    assert_close(association_term(joint, both, kind=kind), association_term(pred, match, kind=kind))


@KINDS
@SCORES
def test_term_of_bfloat16_logits_is_computed_in_float32(kind, score):
    pred, match = a_batch()
    short = dataclasses.replace(pred, logits=pred.logits.bfloat16().requires_grad_(), boxes=pred.boxes.float())
    wide = dataclasses.replace(short, logits=short.logits.float())
    found = association_term(short, match, kind=kind, score=score)
    assert found.dtype == torch.float32
    assert_close(found, association_term(wide, match, kind=kind, score=score), rtol=0, atol=0)
    assert torch.autograd.grad(found, short.logits)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: pse_loss(x, x, beta=-1.0), r"pse_loss: beta must be >= 0 and k > 0; got -1.0 and 1.0"),
        (lambda x: pse_loss(x, x, k=0.0), r"pse_loss: beta must be >= 0 and k > 0; got 1.0 and 0.0"),
        (lambda x: pce_loss(x, x, beta=-1.0), r"pce_loss: beta must be .*; got -1.0 and 1.0"),
        (lambda x: pce_loss(x, x, k=-0.5), r"pce_loss: .* k > 0; got 1.0 and -0.5"),
        (lambda _: association_term(*a_batch(), kind="mse"), 'association_term: kind must be "pse" or "pce"; got .mse'),
        (lambda _: association_term(*a_batch(), score="own"), 'score must be "label" or "max"; got .own'),
        (
            lambda _: association_term(*a_batch(), activation="exp"),
            "activation must be .*; got .exp",
        ),
        (lambda _: association_term(*a_batch(), beta=-1.0), r"pse_loss: beta must be"),
    ],
)
def test_association_names_what_is_wrong(call, message):
    with no_hook(), pytest.raises(ValueError, match=message):
        call(torch.zeros(3))
