import dataclasses
import itertools
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from detcore.assigners import max_iou_assign
from detcore.boxes import ciou, diou, giou, iou
from detcore.coders import DeltaCoder
from detcore.losses.association import association_term
from detcore.losses.functional import quality_loss, sigmoid_focal_loss
from detcore.losses.terms import box_delta_term, box_iou_term, focal_term, iou_quality_term, quality_focal_term
from detcore.structures import BACKGROUND, IGNORE, Assignment, Predictions, Priors, Targets
from tests import reference
from tests.samples import image_of, predictions_of, some_boxes, some_predictions, some_priors, targets_of

CODER = DeltaCoder()
KINDS = ["bce", "l1", "smooth_l1", "l2", "qfl"]
MEASURES = {"iou": (iou, reference.iou), "giou": (giou, reference.giou), "diou": (diou, reference.diou)}
TERMS = {
    "focal": focal_term,
    "focal gamma 0.5": partial(focal_term, gamma=0.5, alpha=None),
    "smooth l1": partial(box_delta_term, coder=CODER),
    "l1": partial(box_delta_term, coder=CODER, beta=0.0),
    **{f"box {m.__name__}": partial(box_iou_term, measure=m) for m in (iou, giou, diou, ciou)},
    **{f"quality {kind}": partial(iou_quality_term, kind=kind) for kind in KINDS},
    "quality attached": partial(iou_quality_term, detach=False),
    "quality with negatives": partial(iou_quality_term, negative_weight=0.01),
    "quality focal": quality_focal_term,
    "association pse": association_term,
    "association pce": partial(association_term, kind="pce", beta=0.5),
    "association max": partial(association_term, score="max", k=0.8),
}
# random priors lie far apart: at RetinaNet's thresholds none of them would be ignored
assign = partial(max_iou_assign, positive_iou=0.35, negative_iou=0.2)
POSITIVES_ONLY = [name for name in TERMS if "focal" not in name and "negatives" not in name]


def a_batch(*, count=40, requires_grad=False, images=2, classes=3):
    """Priors, targets that lie on some of them, random predictions, and their assignment."""
    priors = some_priors(count)
    objects = [
        (priors.boxes[0, i::13] + torch.rand(1, 4).double() * 2, torch.arange(3) % classes) for i in range(images)
    ]
    objects = [(boxes[:3], labels[: len(boxes[:3])]) for boxes, labels in objects]
    targets = targets_of(*objects, slots=8)
    pred = some_predictions(priors, images, classes, CODER, requires_grad=requires_grad)
    return priors, targets, pred, assign(priors, targets)


def image(pred, i):
    return Predictions(
        pred.logits[i : i + 1],
        pred.deltas[i : i + 1],
        pred.boxes[i : i + 1],
        pred.priors,
        {name: extra[i : i + 1] for name, extra in pred.extras.items()},
    )


def test_the_batch_holds_all_three_kinds_of_priors():
    match = a_batch()[3]
    assert min(match.positive.sum(), match.negative.sum(), match.ignored.sum()) >= 2


@pytest.mark.parametrize("alpha", [0.25, None])
def test_focal_term_equals_its_loop(alpha):
    _, _, pred, match = a_batch()
    found = focal_term(pred, match, alpha=alpha)
    assert_close(found.item(), reference.focal_term(pred.logits, match, alpha), rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta", [1 / 9, 1.0])
def test_box_delta_term_equals_its_loop(beta):
    _, _, pred, match = a_batch()
    found = box_delta_term(pred, match, coder=CODER, beta=beta)
    assert_close(found.item(), reference.box_delta_term(pred, match, beta), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", MEASURES)
def test_box_iou_term_equals_its_loop(name):
    _, _, pred, match = a_batch()
    fast, slow = MEASURES[name]
    found = box_iou_term(pred, match, measure=fast)
    assert_close(found.item(), reference.box_iou_term(pred, match, slow), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_iou_quality_term_equals_its_loop(kind):
    _, _, pred, match = a_batch()
    found = iou_quality_term(pred, match, kind=kind)
    assert_close(found.item(), reference.iou_quality_term(pred, match, kind), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_iou_quality_term_with_negatives_equals_its_loop(kind):
    _, _, pred, match = a_batch()
    found = iou_quality_term(pred, match, kind=kind, negative_weight=0.3)
    assert_close(found.item(), reference.iou_quality_term(pred, match, kind, 0.3), rtol=1e-6, atol=0)
    assert found > 1.01 * iou_quality_term(pred, match, kind=kind)


@pytest.mark.parametrize("beta", [0.0, 1.0, 1.5, 2.0])
def test_quality_focal_term_equals_its_loop(beta):
    _, _, pred, match = a_batch()
    found = quality_focal_term(pred, match, beta=beta)
    assert_close(found.item(), reference.quality_focal_term(pred, match, beta), rtol=1e-6, atol=0)


def test_terms_differ_from_each_other_on_this_batch():
    _, _, pred, match = a_batch()
    values = sorted(term(pred, match).item() for name, term in TERMS.items() if name != "quality attached")
    assert min(b - a for a, b in itertools.pairwise(values)) > 100 * 1e-6


def test_terms_by_hand():
    # two priors of 10 x 10; the first owns an object moved by 5, the second is a negative; logits all 0
    priors = Priors(torch.tensor([[[0.0, 0, 10, 10], [50, 0, 60, 10]]]).double(), (2,))
    targets = targets_of(([[5.0, 0, 15, 10]], [1]))
    match = max_iou_assign(priors, targets, positive_iou=0.3, negative_iou=0.3)
    zero = torch.zeros(1, 2, 4).double()
    pred = predictions_of(priors, zero[..., :2], zero, zero[..., :1], CODER)
    assert match.labels.tolist() == [[1, BACKGROUND]]
    # one positive entry at .25, three negative ones at .75, each (1/2)^2 ln 2
    assert_close(focal_term(pred, match).item(), (0.25 + 3 * 0.75) * 0.6931472 / 4)
    # deltas wanted (.5, 0, 0, 0): .5 - 1/18
    assert_close(box_delta_term(pred, match, coder=CODER).item(), 0.5 - 1 / 18)
    # IoU 50/150; hull 15 x 10 is filled, so GIoU is the same
    assert_close(box_iou_term(pred, match).item(), 2 / 3)
    assert_close(iou_quality_term(pred, match, kind="l1").item(), 0.5 - 1 / 3)
    # the negative is at .5 from 0
    assert_close(iou_quality_term(pred, match, kind="l1", negative_weight=0.1).item(), 0.5 - 1 / 3 + 0.05)
    # target 1/3 in one entry: (1/6)^2 ln 2; three entries with target 0: (1/2)^2 ln 2
    assert_close(quality_focal_term(pred, match).item(), (1 / 36 + 3 / 4) * 0.6931472)


@pytest.mark.parametrize("term", [focal_term, quality_focal_term])
def test_focal_terms_leave_ignored_priors_out_and_count_negatives(term):
    _, _, pred, match = a_batch(requires_grad=True)
    [gradient] = torch.autograd.grad(term(pred, match), pred.logits)
    assert gradient[match.ignored].eq(0).all()
    assert gradient[match.negative].ne(0).all()


def test_weighted_negatives_leave_ignored_priors_out():
    _, _, pred, match = a_batch(requires_grad=True)
    [gradient] = torch.autograd.grad(iou_quality_term(pred, match, negative_weight=1e-3), pred.extras["iou"])
    assert gradient[match.ignored].eq(0).all()
    assert gradient[match.negative].gt(0).all()  # towards quality 0


def test_a_hundred_thousand_weighted_negatives_outweigh_the_positives():
    # dense.md 7: at q = .5 and w = 1e-4 they add 1e5 * 1e-4 * ln 2 = 6.9 to the sum
    nothing = torch.zeros(1, 100_000, 4)
    labels = torch.full((1, 100_000), BACKGROUND)
    labels[0, :2] = 0
    match = Assignment(labels, labels, nothing, nothing[..., 0], targets_of(([], [])))
    pred = Predictions(nothing[..., :1], nothing, nothing, Priors(nothing, (100_000,)), {"iou": nothing[..., :1]})
    plain, weighted = (iou_quality_term(pred, match, negative_weight=w) for w in (0.0, 1e-4))
    assert_close((weighted - plain).item() * 2, 6.9, rtol=0, atol=0.05)  # two positives divide it


@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0])
def test_quality_focal_term_of_perfect_boxes_is_focal_without_alpha(beta):
    _, _, pred, match = a_batch()
    perfect = dataclasses.replace(pred, boxes=match.boxes)
    found = quality_focal_term(perfect, match, beta=beta)
    assert_close(found, focal_term(pred, match, alpha=None, gamma=beta), rtol=1e-6, atol=0)
    assert abs(found - quality_focal_term(pred, match, beta=beta)) > 0.01


def test_quality_focal_term_does_not_move_boxes():
    _, _, pred, match = a_batch(requires_grad=True)
    [gradient] = torch.autograd.grad(quality_focal_term(pred, match), [pred.deltas], allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize("name", POSITIVES_ONLY)
def test_box_quality_and_association_terms_see_positives_only(name):
    _, _, pred, match = a_batch(requires_grad=True)
    inputs = [pred.logits, pred.deltas, pred.extras["iou"]]
    gradients = torch.autograd.grad(TERMS[name](pred, match), inputs, allow_unused=True)
    for gradient in gradients:
        if gradient is not None:
            assert gradient[~match.positive].eq(0).all()
    # what stands at other priors does not matter, be it as wrong as can be
    wild = (torch.where(match.positive[..., None], x.detach(), 50.0) for x in inputs)
    other = predictions_of(pred.priors, *wild, CODER)
    assert_close(TERMS[name](other, match), TERMS[name](pred, match), rtol=0, atol=0)


@pytest.mark.parametrize("name", TERMS)
def test_term_passes_gradcheck(name):
    priors, _, pred, match = a_batch(images=1, count=12)
    if name == "quality attached":
        assert (pred.extras["iou"].abs() > 1e-3).all()

    def term(logits, deltas, quality):
        return TERMS[name](predictions_of(priors, logits, deltas, quality, CODER), match)

    inputs = [x.detach() for x in (pred.logits, pred.deltas, pred.extras["iou"])]
    # a detached target or trade-off makes numeric and analytic gradients differ in the deltas, as they must
    frozen = name == "box ciou" or (name.startswith(("quality", "association")) and "attached" not in name)
    inputs = [x.requires_grad_(not (frozen and i == 1)) for i, x in enumerate(inputs)]
    assert torch.autograd.gradcheck(term, inputs)


@pytest.mark.parametrize("name", TERMS)
def test_batch_is_the_sum_of_its_images_over_the_joint_number(name):
    _, targets, pred, match = a_batch(images=3)
    whole = TERMS[name](pred, match) * match.num_positive
    parts = 0.0
    for i in range(3):
        one = assign(pred.priors, image_of(targets, i))
        parts += TERMS[name](image(pred, i), one) * one.num_positive
    assert_close(whole, parts, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", TERMS)
def test_duplicating_the_batch_changes_no_term(name):
    priors, targets, pred, match = a_batch()
    maps = (x.repeat(2, 1, 1) for x in (pred.logits, pred.deltas, pred.extras["iou"]))
    objects = Targets(targets.boxes.repeat(2, 1, 1), targets.labels.repeat(2, 1), targets.valid.repeat(2, 1))
    twice = TERMS[name](predictions_of(priors, *maps, CODER), assign(priors, objects))
    assert_close(twice, TERMS[name](pred, match), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", TERMS)
def test_permuting_the_objects_changes_no_term(name):
    priors = some_priors(40)
    boxes = some_boxes(4)
    pred = some_predictions(priors, 1, 3, CODER)
    order = torch.tensor([2, 0, 3, 1])
    labels = torch.tensor([0, 1, 2, 0])
    match = max_iou_assign(priors, targets_of((boxes, labels)))
    again = max_iou_assign(priors, targets_of((boxes[order], labels[order])))
    assert match.positive.any()
    assert_close(TERMS[name](pred, again), TERMS[name](pred, match), rtol=1e-12, atol=0)


def no_objects(requires_grad=True):
    priors = some_priors(40)
    pred = some_predictions(priors, 2, 3, CODER, requires_grad=requires_grad)
    return pred, max_iou_assign(priors, targets_of(([], []), ([], []), slots=8))


@pytest.mark.parametrize("name", TERMS)
def test_image_without_objects(name):
    pred, match = no_objects()
    loss = TERMS[name](pred, match)
    gradients = torch.autograd.grad(loss, [pred.logits, pred.deltas, pred.extras["iou"]], allow_unused=True)
    assert any(g is not None for g in gradients)
    assert all(g.isfinite().all() for g in gradients if g is not None)
    if "focal" in name:
        alpha, gamma = {"focal gamma 0.5": (None, 0.5), "quality focal": (None, 2.0)}.get(name, (0.25, 2.0))
        nothing = torch.zeros_like(pred.logits) > 0
        assert_close(loss, sigmoid_focal_loss(pred.logits, nothing, alpha=alpha, gamma=gamma).sum())  # N = 1
    elif "negatives" in name:
        quality = pred.extras["iou"]
        assert_close(loss, 0.01 * quality_loss(quality, torch.zeros_like(quality)).sum())  # N = 1
    else:
        assert loss == 0


@pytest.mark.parametrize("name", TERMS)
def test_everything_ignored_costs_nothing(name):
    pred, match = no_objects()
    nobody = dataclasses.replace(match, labels=torch.full_like(match.labels, IGNORE))
    assert TERMS[name](pred, nobody) == 0


@pytest.mark.parametrize("size", [100.0, -100.0])
@pytest.mark.parametrize("name", TERMS)
def test_term_and_gradient_are_finite_at_extreme_predictions(name, size):
    priors, _, pred, match = a_batch()
    inputs = [torch.full_like(x, size).float().requires_grad_() for x in (pred.logits, pred.deltas, pred.extras["iou"])]
    loss = TERMS[name](predictions_of(priors, *inputs, CODER), match)
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients if g is not None)


@pytest.mark.parametrize("name", TERMS)
def test_terms_do_not_write_on_their_inputs(name):
    _, _, pred, match = a_batch()
    before = [x.clone() for x in (pred.logits, pred.deltas, pred.boxes, pred.extras["iou"], match.boxes)]
    TERMS[name](pred, match)
    after = [pred.logits, pred.deltas, pred.boxes, pred.extras["iou"], match.boxes]
    for a, b in zip(before, after, strict=True):
        assert_close(a, b, rtol=0, atol=0)


# --- the detach flag


def test_detached_quality_term_leaves_the_boxes_alone():
    _, _, pred, match = a_batch(requires_grad=True)
    found = torch.autograd.grad(iou_quality_term(pred, match), [pred.deltas, pred.extras["iou"]], allow_unused=True)
    assert found[0] is None
    assert found[1][match.positive].ne(0).all()


@pytest.mark.parametrize(("belief", "direction"), [(2.0, 1), (-2.0, -1), (0.0, 0)])
def test_attached_target_improves_only_boxes_that_the_head_believes_in(belief, direction):
    # E1.1: a box of IoU .6 is drawn towards its object at o > 0 and driven away at o < 0
    priors = Priors(torch.tensor([[[0.0, 0, 10, 10]]]).double(), (1,))
    match = max_iou_assign(priors, targets_of(([[2.5, 0, 12.5, 10]], [0])))  # IoU 75/125 = .6
    deltas = torch.zeros(1, 1, 4).double().requires_grad_()
    quality = torch.full((1, 1, 1), belief).double()
    pred = predictions_of(priors, torch.zeros(1, 1, 1).double(), deltas, quality, CODER)
    [gradient] = torch.autograd.grad(iou_quality_term(pred, match, detach=False), deltas)
    # dIoU/d(shift in pixels): overlap 7.5 grows by 1, union shrinks by 1 (x 10): .1 (12.5 + 7.5)... / 12.5^2
    # IoU = (7.5 + s) / (12.5 - s): slope (12.5 + 7.5) / 12.5^2 = .128 a pixel, 1.28 a prior width
    assert_close(gradient[0, 0, 0].item(), -belief * 1.28, rtol=0, atol=1e-9)
    after = CODER.decode(deltas - 0.01 * gradient, priors.boxes)
    change = iou(after, match.boxes) - iou(pred.boxes, match.boxes)
    assert change.sign().item() == direction


def test_iou_quality_term_names_the_missing_map():
    _, _, pred, match = a_batch()
    with pytest.raises(KeyError, match=r"must have the extra map 'centerness'; it has \['iou'\]"):
        iou_quality_term(pred, match, name="centerness")


def test_terms_refuse_wrong_options():
    _, _, pred, match = a_batch()
    with pytest.raises(ValueError, match=r"iou_quality_term: negative_weight must be >= 0; got -0.1"):
        iou_quality_term(pred, match, negative_weight=-0.1)
    with pytest.raises(ValueError, match=r"quality_focal_loss: beta must be >= 0; got -1.0"):
        quality_focal_term(pred, match, beta=-1.0)


def test_terms_of_short_floats_are_close_to_float32():
    priors, _, pred, match = a_batch()
    short = [x.bfloat16() for x in (pred.logits, pred.deltas, pred.extras["iou"])]
    low = predictions_of(priors, *short, CODER)
    wide = predictions_of(priors, *(x.float() for x in short), CODER)
    for term in TERMS.values():
        assert term(low, match).dtype in (torch.float32, torch.float64)
        assert_close(term(low, match), term(wide, match), check_dtype=False)


def test_any_callable_is_a_term():
    _, _, pred, match = a_batch()

    def every_box_wide(pred: Predictions, match: Assignment):
        return (pred.boxes[..., 2] - pred.boxes[..., 0]).mean() / match.num_positive

    assert every_box_wide(pred, match) > 0
