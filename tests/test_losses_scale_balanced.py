import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from detcore.assigners import fcos_assign, max_iou_assign
from detcore.coders import DeltaCoder, DistanceCoder
from detcore.losses.mining import softmax_mining_term
from detcore.losses.scale_balanced import scale_balance, scale_balanced_weight
from detcore.losses.terms import (
    box_delta_term,
    box_iou_term,
    box_loss_term,
    centerness_box_term,
    focal_term,
    quality_focal_term,
)
from detcore.models import get_model
from detcore.models.scale_balanced import scale_balanced
from detcore.priors import PointGenerator
from detcore.ssd_assigner import num_matched, ssd_assign
from detcore.structures import Assignment, Targets
from tests import reference
from tests.counting import LaunchCounter
from tests.samples import no_hook, some_boxes, some_predictions, some_priors, targets_of

FORMS = ["scb", "const", "inv", "inv_sqrt", "inv_log"]
CODER = DeltaCoder((10.0, 10.0, 5.0, 5.0))


def weights_of(*matched, **options):
    return scale_balanced_weight(torch.tensor(matched, dtype=torch.float64), **options)


# --- the weight, by hand


def test_one_prior_weighs_alpha_beta():
    for alpha, beta in ((1.0, 3.0), (0.5, 2.0), (2.0, 0.25), (0.0, 3.0)):
        assert weights_of(1, alpha=alpha, beta=beta).item() == alpha * beta


def test_totals_of_objects():
    # 3 (ln M + 1), section 5 of the paper's notes
    totals = torch.tensor([1, 2, 5, 10, 24]).double() * weights_of(1, 2, 5, 10, 24)
    assert_close(totals, torch.tensor([3.00, 5.08, 7.83, 9.91, 12.53]).double(), rtol=0, atol=5e-3)
    exact = [3 * (math.log(m) + 1) for m in (1, 2, 5, 10, 24)]
    assert_close(totals, torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=0)


def test_logarithm_is_natural():
    # with log2 or log10 it would be 1.297 or .600
    assert_close(weights_of(10).item(), 0.9908, rtol=0, atol=5e-5)


def test_objects_with_nine_priors_gain_and_with_ten_lose():
    assert weights_of(9).item() > 1 > weights_of(10).item()
    assert_close(weights_of(9.868).item(), 1.0, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("scb", [2.0, 2 * (math.log(4) + 1) / 4]),
        ("const", [2.0, 2.0]),
        ("inv", [2.0, 0.5]),
        ("inv_sqrt", [2.0, 1.0]),
        ("inv_log", [2.0, 2 / (math.log(4) + 1)]),
    ],
)
def test_five_forms_at_one_and_four(form, expected):
    assert_close(weights_of(1, 4, form=form, beta=2.0).tolist(), expected)


def test_weight_is_no_function_of_its_slope():
    # E = ln M / M is the same at 2 and 4; the weights are not
    assert_close(math.log(2) / 2, math.log(4) / 4)
    assert_close(weights_of(2, 4).tolist(), [2.540, 1.790], rtol=0, atol=5e-4)


def test_object_weight_has_alpha_and_beta_where_the_paper_has_ln_m():
    # R(1) = ln 1 = 0, but an object of one prior weighs 3
    assert weights_of(1).item() == 3.0
    assert_close((2 * weights_of(2) - weights_of(1)).item(), 3 * math.log(2))


def test_weight_falls_from_one_to_two_only_from_alpha_ln_2_on():
    assert_close(weights_of(1, 2, 3, 4, alpha=0.0, beta=1.0).tolist(), [0.0, 0.347, 0.366, 0.347], rtol=0, atol=5e-4)
    assert_close(weights_of(1, 2, 3, alpha=0.5, beta=1.0).tolist(), [0.5, 0.597, 0.533], rtol=0, atol=5e-4)
    at = weights_of(1, 2, alpha=math.log(2))
    assert_close(at[0], at[1])
    above = weights_of(*range(1, 200), alpha=math.log(2) + 1e-6)
    assert (above.diff() < 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalise", [None, "mean"])
def test_object_without_priors_weighs_nothing(form, normalise):
    found = scale_balanced_weight(torch.tensor([[0, 3], [0, 1]]), form=form, normalise=normalise)
    assert found.dtype == torch.float32
    assert found[:, 0].eq(0).all()
    assert found.isfinite().all()
    alone = scale_balanced_weight(torch.zeros(2, 4, dtype=torch.int64), form=form, normalise=normalise)
    assert alone.eq(0).all()


@pytest.mark.parametrize("form", FORMS)
def test_mean_over_priors_is_one_and_beta_and_empty_slots_do_not_matter(form):
    matched = torch.tensor([[1, 2, 24, 0], [7, 0, 0, 0]])
    found = scale_balanced_weight(matched.double(), form=form, normalise="mean")
    assert_close((found * matched).sum() / matched.sum(), torch.ones(()).double())
    plain = scale_balanced_weight(matched.double(), form=form)
    assert_close(found / found[0, 0], plain / plain[0, 0])
    assert found.equal(scale_balanced_weight(matched.double(), form=form, normalise="mean", beta=0.1))
    # a second, equal batch beside the first changes nothing
    assert_close(scale_balanced_weight(matched.double().repeat(2, 2), form=form, normalise="mean")[:2, :4], found)


def test_forms_tell_themselves_apart_once_normalised():
    rows = torch.stack([weights_of(1, 2, 5, 12, 24, form=form, normalise="mean") for form in FORMS])
    gaps = (rows[:, None] - rows[None]).abs().amax(-1) + torch.eye(5)
    assert gaps.min() > 0.05


def test_mean_of_weights_that_are_all_zero():
    assert weights_of(1, 1, alpha=0.0, normalise="mean").tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "log"}, "form must be one of .*; got 'log'"),
        ({"alpha": -1.0}, "alpha must be >= 0 and beta > 0; got -1.0 and 3.0"),
        ({"beta": 0.0}, "got 1.0 and 0.0"),
        ({"normalise": "sum"}, "normalise must be None or \"mean\"; got 'sum'"),
    ],
)
def test_scale_balanced_weight_names_what_is_wrong(options, message):
    with no_hook(), pytest.raises(ValueError, match=message):
        weights_of(1, 2, **options)
    with no_hook(), pytest.raises(ValueError, match=message):
        scale_balanced(get_model("retinanet", num_classes=2, backbone="tiny"), **options)


# --- on priors, and inside terms


def a_batch(*, classes=4, count=60, requires_grad=False):
    """Two images whose objects own 1 to several priors, an image without objects, and random predictions."""
    priors = some_priors(count)
    near = priors.boxes[0, 2] + torch.randn(10, 4).double()
    priors.boxes[0, 20:30] = near  # a crowd around one object
    objects = [(priors.boxes[0, [2, 40 + i, 50]] + 0.5, torch.tensor([0, 1, 2])) for i in range(2)]
    targets = targets_of(*objects, ([], []), slots=8)
    pred = some_predictions(priors, 3, classes, CODER, requires_grad=requires_grad)
    return priors, targets, pred, ssd_assign(priors, targets)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("normalise", [None, "mean"])
def test_scale_balance_equals_its_loop(form, normalise):
    *_, match = a_batch()
    matched = num_matched(match)[match.targets.valid]
    assert matched.min() <= 2
    assert matched.max() >= 8
    found = scale_balance(match, form=form, normalise=normalise)
    weights = reference.scale_weights(match, form=form, normalise=normalise)
    for b, n in match.positive.nonzero().tolist():
        assert_close(found[b, n].item(), weights[b][int(match.index[b, n])], rtol=1e-5, atol=0)


def test_weighted_mining_equals_its_loop():
    _, _, pred, match = a_batch()
    found = softmax_mining_term(pred, match, weight=scale_balance)
    expected = reference.softmax_mining_term(pred.logits, match, weights=reference.scale_weights(match))
    assert_close(found.item(), expected, rtol=1e-6, atol=0)
    plain = softmax_mining_term(pred, match).item()
    assert abs(found.item() - plain) > 0.1


def points_batch():
    points = PointGenerator([8, 16])([torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)], (64, 64))
    boxes = torch.tensor([[2.0, 2, 30, 30], [30, 30, 62, 60], [40, 4, 50, 14]])
    targets = targets_of((boxes, [0, 1, 2]), (boxes[:1], [1]), slots=8, dtype=torch.float32)
    match = fcos_assign(points, targets, ranges=[24.0, math.inf])
    return some_predictions(points, 2, 3, DistanceCoder(), spread=5.0), match


def retinanet_batch():
    priors, targets, pred, _ = a_batch(classes=3)
    return pred, max_iou_assign(priors, targets)


def ssd_batch():
    return a_batch()[2:]


TERMS = {
    "ssd cls": (ssd_batch, softmax_mining_term),
    "ssd box": (ssd_batch, partial(box_delta_term, coder=CODER, beta=1.0)),
    "retinanet cls": (retinanet_batch, focal_term),
    "retinanet box": (retinanet_batch, partial(box_delta_term, coder=CODER)),
    "gfl cls": (retinanet_batch, quality_focal_term),
    "giou": (retinanet_batch, box_iou_term),
    "fcos cls": (points_batch, focal_term),
    "fcos box": (points_batch, box_loss_term),
    "fcos weighted box": (points_batch, centerness_box_term),
}
EVERY_TERM = pytest.mark.parametrize("name", TERMS)


@EVERY_TERM
def test_const_form_is_the_plain_term_bit_for_bit(name):
    batch, term = TERMS[name]
    pred, match = batch()
    plain = term(pred, match)
    assert plain > 0
    assert term(pred, match, weight=partial(scale_balance, form="const", beta=1.0)).equal(plain)
    assert term(pred, match, weight=partial(scale_balance, form="const", beta=3.0, normalise="mean")).equal(plain)


@EVERY_TERM
def test_term_is_linear_in_the_weights_of_positives_and_blind_to_negatives(name):
    # the term with weights = the plain one + the sum over objects of (W - 1) times what that object's priors add
    batch, term = TERMS[name]
    pred, match = batch()
    weights = scale_balanced_weight(num_matched(match))
    total = term(pred, match).double()
    for b, slot in match.targets.valid.nonzero().tolist():
        own = match.positive & (match.index == slot) & (torch.arange(len(match.labels)) == b)[:, None]
        doubled = term(pred, match, weight=lambda match, own=own: 1.0 + own)
        total += (weights[b, slot] - 1) * (doubled - term(pred, match)) if own.any() else 0.0
    assert_close(term(pred, match, weight=scale_balance).double(), total, rtol=1e-4, atol=0)


@EVERY_TERM
def test_image_without_objects_keeps_its_plain_loss(name):
    batch, term = TERMS[name]
    pred, match = batch()
    nobody = targets_of(*[([], [])] * len(match.labels), slots=8, dtype=match.boxes.dtype)
    empty = Assignment(torch.full_like(match.labels, -1), match.index, match.boxes, match.iou * 0, nobody)
    for normalise in (None, "mean"):
        weight = partial(scale_balance, normalise=normalise)
        assert term(pred, empty, weight=weight).equal(term(pred, empty))


def test_forced_positives_count_and_images_are_counted_apart():
    # an object of 4 pixels in a prior of 100: forced, M = 1, in an image; the same slot owns 2 in the next
    priors = some_priors(4)
    priors.boxes[0] = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60], [0, 90, 5, 95]]).double()
    match = ssd_assign(priors, targets_of(([[52.0, 52, 54, 54]], [0]), ([[0.0, 0, 10, 10]], [0])))
    assert num_matched(match).tolist() == [[1], [2]]
    found = scale_balance(match)
    assert found[0, 2].item() == 3.0
    assert_close(found[1, :2].tolist(), [3 * (math.log(2) + 1) / 2] * 2)


@pytest.mark.parametrize("term", [softmax_mining_term, partial(box_delta_term, coder=CODER, beta=1.0)])
def test_weighted_terms_pass_gradcheck(term):
    priors, _, pred, match = a_batch(count=60)
    few = [*match.positive.any(0).nonzero().flatten()[:8].tolist(), 5, 6]
    priors = type(priors)(priors.boxes[:, few], (len(few),))
    match = Assignment(match.labels[:, few], match.index[:, few], match.boxes[:, few], match.iou[:, few], match.targets)

    def value(logits, deltas):
        return term(type(pred)(logits, deltas, deltas, priors), match, weight=scale_balance)

    inputs = [x[:, few].detach().requires_grad_() for x in (pred.logits, pred.deltas)]
    assert torch.autograd.gradcheck(value, inputs, fast_mode=True)


# --- on detectors

SIZE = 64


def step(detector):
    """Named losses of one seeded batch."""
    torch.manual_seed(1)
    corner, side = torch.rand(2, 4, 2) * 30, 6 + torch.rand(2, 4, 2) * 25
    labels = torch.randint(0, 3, (2, 4))
    targets = Targets(torch.cat([corner, corner + side], dim=-1), labels, labels >= 0)
    return detector.loss(torch.rand(2, 3, SIZE, SIZE), targets)


def fresh(name):
    torch.manual_seed(0)
    return get_model(name, num_classes=3, backbone="tiny")


@pytest.mark.parametrize("name", ["retinanet", "fcos", "iou_aware_retinanet"])
def test_terms_say_which_losses_change(name):
    plain = step(fresh(name))
    for terms, changed in (("both", {"cls", "box"}), ("cls", {"cls"}), ("loc", {"box"})):
        found = step(scale_balanced(fresh(name), terms=terms))
        assert set(found) == set(plain)
        assert {key for key in plain if not found[key].equal(plain[key])} == changed, terms
    same = step(scale_balanced(fresh(name), form="const", beta=1.0))
    assert all(same[key].equal(plain[key]) for key in plain)


def test_weight_of_a_term_in_the_sum_is_kept():
    detector = fresh("retinanet")
    detector.losses["box"] = (0.5, detector.losses["box"][1])
    assert scale_balanced(detector) is detector
    assert detector.losses["box"][0] == 0.5


def test_scale_balanced_balances_the_first_step_of_two():
    detector = fresh("retinanet")
    plain = dict(detector.losses)
    detector.losses = {"arm_cls": plain["cls"], "arm_box": plain["box"], **plain}
    scale_balanced(detector)
    assert set(weights_in(detector)) == {"arm_cls", "arm_box"}


def test_scale_balanced_names_what_is_wrong():
    with no_hook(), pytest.raises(ValueError, match=r'terms must be "both", "cls" or "loc"; got \'box\''):
        scale_balanced(fresh("retinanet"), terms="box")
    twice = scale_balanced(fresh("retinanet"), terms="cls")
    with pytest.raises(TypeError, match="the term 'cls' has a weight already"):
        scale_balanced(twice)
    assert set(weights_in(twice)) == {"cls"}  # all or nothing
    stubborn = fresh("retinanet")
    stubborn.losses["box"] = (1.0, lambda pred, match: pred.deltas.sum())
    with pytest.raises(TypeError, match=r"the term 'box' must take a weight; it takes \['match', 'pred'\]"):
        scale_balanced(stubborn)
    del stubborn.losses["box"]
    with pytest.raises(ValueError, match=r"detector must have the terms \['cls', 'box'\]; it has \['cls'\]"):
        scale_balanced(stubborn)


def weights_in(detector):
    """Weight of every term that has one."""
    bound = {name: getattr(term, "keywords", {}) for name, (_, term) in detector.losses.items()}
    return {name: keywords["weight"] for name, keywords in bound.items() if "weight" in keywords}


@pytest.mark.parametrize("name", ["retinanet", "fcos", "ssd300", "refinedet320"])
def test_get_model_balances_any_detector_and_remembers(name):
    options = {"balance": "inv_sqrt", "balance_terms": "cls", "balance_beta": 2.0, "balance_normalise": "mean"}
    detector = get_model(name, num_classes=3, backbone="tiny", **options)
    assert options.items() <= detector.spec.items()
    [(term, weight)] = weights_in(detector).items()
    assert term == ("arm_cls" if name.startswith("refinedet") else "cls")
    assert weight.keywords == {"form": "inv_sqrt", "alpha": 1.0, "beta": 2.0, "normalise": "mean"}
    assert get_model(**detector.spec).losses.keys() == detector.losses.keys()
    assert not weights_in(get_model(name, num_classes=3, backbone="tiny"))


def test_launches_do_not_grow_with_batch_or_objects_and_nothing_waits():
    counts = []
    for batch, slots in ((1, 8), (8, 24)):
        priors = some_priors(40, dtype=torch.float32)
        objects = [(some_boxes(5), torch.arange(5) % 3)] * batch
        match = ssd_assign(priors, targets_of(*objects, slots=slots, dtype=torch.float32))
        with LaunchCounter() as counter:
            scale_balance(match, normalise="mean")
        assert not counter.syncs
        counts.append(counter.launches)
    assert counts[0] == counts[1]
