"""FCOS's terms; the others are in ``test_losses_terms.py``."""

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from detcore.assigners import centerness_target, fcos_assign
from detcore.coders import DistanceCoder
from detcore.losses.functional import giou_loss, log_iou_loss
from detcore.losses.terms import box_loss_term, centerness_box_term, centerness_term
from detcore.priors import PointGenerator
from detcore.structures import BACKGROUND, Assignment, Predictions, Priors, joint_total
from tests import reference
from tests.samples import image_of, targets_of

CODER = DistanceCoder()
LOSSES = {
    "log_iou": (log_iou_loss, reference.log_iou),
    "plus one": (partial(log_iou_loss, added=1.0), partial(reference.log_iou, added=1.0)),
    "giou": (giou_loss, lambda a, b: 1 - reference.giou(a, b)),
}
TERMS = {
    **{f"box {name}": partial(box_loss_term, loss=loss) for name, (loss, _) in LOSSES.items()},
    **{f"weighted box {name}": partial(centerness_box_term, loss=loss) for name, (loss, _) in LOSSES.items()},
    "centerness": centerness_term,
}
OBJECTS = [
    ([[4.0, 6, 30, 41], [2, 2, 61, 60], [20, 30, 50, 62]], [0, 1, 2]),
    ([], []),  # an image without objects
    ([[11.0, 5, 33, 22]], [1]),
]
assign = partial(fcos_assign, ranges=(24.0, 48.0, math.inf))


def predictions_of(priors, distances, quality):
    boxes = CODER.decode(distances, priors.boxes.expand(len(distances), -1, -1))
    logits = torch.zeros(*distances.shape[:2], 1).to(distances)
    return Predictions(logits, distances, boxes, priors, {"centerness": quality})


def a_batch(*, objects=OBJECTS, size=64, requires_grad=False):
    """Points of a square of ``size`` pixels, objects, predictions that contain their points, and their assignment."""
    maps = [torch.zeros(1, 1, size // stride, size // stride) for stride in (8, 16, 32)]
    priors = PointGenerator([8, 16, 32])(maps, (size, size))
    priors = Priors(priors.boxes.double(), priors.counts, priors.cells)
    shape = (len(objects), priors.boxes.shape[1])
    distances = (torch.rand(*shape, 4).double() * 30 + 0.5).requires_grad_(requires_grad)
    quality = torch.randn(*shape, 1).double().requires_grad_(requires_grad)
    targets = targets_of(*objects, slots=4)
    return priors, targets, predictions_of(priors, distances, quality), assign(priors, targets)


@pytest.mark.parametrize("name", LOSSES)
def test_box_terms_equal_their_loops_also_where_an_image_is_empty(name):
    _, _, pred, match = a_batch()
    fast, slow = LOSSES[name]
    assert match.positive.any(dim=1).tolist() == [True, False, True]
    plain, weighted = box_loss_term(pred, match, loss=fast), centerness_box_term(pred, match, loss=fast)
    assert_close(plain.item(), reference.box_loss_term(pred, match, slow), rtol=1e-6, atol=0)
    assert_close(weighted.item(), reference.centerness_box_term(pred, match, slow), rtol=1e-6, atol=0)
    assert abs(plain - weighted) > 100 * 1e-6


def test_centerness_term_equals_its_loop():
    _, _, pred, match = a_batch()
    assert_close(centerness_term(pred, match).item(), reference.centerness_term(pred, match), rtol=1e-6, atol=0)


def test_terms_by_hand():
    # points (4, 4) and (12, 4) of stride 8 in the object [0, 0, 16, 8]: l, r = 4, 12 and 12, 4; t = b = 4
    priors = Priors(torch.tensor([[[0.0, 0, 8, 8], [8, 0, 16, 8], [80, 0, 88, 8]]]).double(), (3,))
    match = fcos_assign(priors, targets_of(([[0.0, 0, 16, 8]], [0])), ranges=[64.0])
    assert match.labels.tolist() == [[0, 0, BACKGROUND]]
    distances = torch.tensor([[[4.0, 4, 12, 4], [4, 4, 4, 4], [1, 1, 1, 1]]]).double()  # IoU 1 and 1/2
    pred = predictions_of(priors, distances, torch.zeros(1, 3, 1).double())
    c = math.sqrt(4 / 12)
    assert_close(centerness_target(priors.boxes, match.boxes)[0, :2], torch.full((2,), c).double())
    assert_close(box_loss_term(pred, match).item(), math.log(2) / 2)
    assert_close(centerness_box_term(pred, match).item(), math.log(2) / 2)  # both weigh the same
    assert_close(box_loss_term(pred, match, loss=giou_loss).item(), (0 + 1 / 2) / 2)
    assert_close(centerness_term(pred, match).item(), math.log(2))  # logit 0, whatever the target


def test_the_weights_are_divided_out_but_not_their_ratio():
    # the centre (8, 8) of [0, 0, 16, 16] weighs 1; (4, 8) weighs sqrt(4 / 12) = .577; IoU 1 and 1/2
    priors = Priors(torch.tensor([[[4.0, 4, 12, 12], [0, 4, 8, 12]]]).double(), (2,))
    match = fcos_assign(priors, targets_of(([[0.0, 0, 16, 16]], [0])), ranges=[64.0])
    right, half = [8.0, 8, 8, 8], [4.0, 8, 4, 8]
    pred = predictions_of(priors, torch.tensor([[right, half]]).double(), torch.zeros(1, 2, 1).double())
    c = math.sqrt(1 / 3)
    assert_close(centerness_box_term(pred, match).item(), c * math.log(2) / (1 + c))


@pytest.mark.parametrize("name", TERMS)
def test_term_passes_gradcheck(name):
    priors, _, pred, match = a_batch(objects=OBJECTS[2:], size=32)
    assert match.positive.sum() > 3

    def term(distances, quality):
        return TERMS[name](predictions_of(priors, distances, quality), match)

    inputs = [x.detach().requires_grad_() for x in (pred.deltas, pred.extras["centerness"])]
    assert torch.autograd.gradcheck(term, inputs)


@pytest.mark.parametrize("name", TERMS)
def test_terms_see_positives_only(name):
    _, _, pred, match = a_batch(requires_grad=True)
    inputs = [pred.deltas, pred.extras["centerness"]]
    gradients = torch.autograd.grad(TERMS[name](pred, match), inputs, allow_unused=True)
    assert [g is not None for g in gradients] == ([False, True] if name == "centerness" else [True, False])
    for gradient in (g for g in gradients if g is not None):
        assert gradient[~match.positive].eq(0).all()
        assert gradient[match.positive].ne(0).any()


@pytest.mark.parametrize("name", TERMS)
def test_batch_without_objects_costs_nothing_and_has_gradients(name):
    _, _, pred, match = a_batch(objects=[([], []), ([], [])], requires_grad=True)
    loss = TERMS[name](pred, match)
    gradients = torch.autograd.grad(loss, [pred.deltas, pred.extras["centerness"]], allow_unused=True)
    assert loss == 0
    assert [g.eq(0).all().item() for g in gradients if g is not None] == [True]


@pytest.mark.parametrize("name", TERMS)
def test_batch_is_the_sum_of_its_images_over_the_joint_normaliser(name):
    _, targets, pred, match = a_batch()

    def normaliser(match):
        if name.startswith("weighted"):
            return centerness_target(pred.priors.boxes, match.boxes)[match.positive].sum()
        return match.num_positive

    parts = 0.0
    for i in (0, 2):
        one = predictions_of(pred.priors, pred.deltas[i : i + 1], pred.extras["centerness"][i : i + 1])
        own = assign(pred.priors, image_of(targets, i))
        parts += TERMS[name](one, own) * normaliser(own)
    assert_close(TERMS[name](pred, match) * normaliser(match), parts, rtol=1e-6, atol=0)


def test_weights_of_a_paper_multiply_above_and_not_below():
    _, _, pred, match = a_batch()
    for term in TERMS.values():
        three = partial(term, weight=lambda match: torch.full(match.labels.shape, 3.0))
        assert_close(three(pred, match), 3 * term(pred, match), rtol=1e-6, atol=0)


def test_log_iou_of_boxes_that_barely_hold_their_point_still_has_a_gradient():
    # a point predicts .01 pixels to each side of a 1000-pixel object: IoU 4e-10, below log_iou_loss's own floor
    from detcore.models import get_model

    weight, term = get_model("fcos", num_classes=1, backbone="tiny").losses["box"]
    priors = Priors(torch.tensor([[[496.0, 496, 504, 504]]]), (1,))
    match = fcos_assign(priors, targets_of(([[0.0, 0, 1000, 1000]], [0]), dtype=torch.float32), ranges=[math.inf])
    distances = torch.full((1, 1, 4), 0.01).requires_grad_()
    loss = weight * term(predictions_of(priors, distances, torch.zeros(1, 1, 1)), match)
    [gradient] = torch.autograd.grad(loss, distances)
    assert_close(loss.item(), -math.log(4e-10), rtol=1e-2, atol=0)
    assert (gradient < -1).all()  # outwards


@pytest.mark.parametrize(("mine", "others", "expected"), [(1.5, 0.5, 1.0), (0.0, 3.0, 1.5), (0.0, 0.0, 5e-7)])
def test_joint_total_under_two_workers_is_shared(monkeypatch, mine, others, expected):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda total: total.add_(others))
    own = torch.tensor(mine)
    assert_close(joint_total(own, least=1e-6), torch.tensor(expected), rtol=1e-6, atol=0)
    assert own == mine  # not written on


def test_centerness_term_names_the_missing_map():
    nothing = torch.zeros(1, 1, 4)
    match = Assignment(torch.tensor([[-1]]), torch.tensor([[0]]), nothing, nothing[..., 0], targets_of(([], [])))
    pred = Predictions(nothing[..., :1], nothing, nothing, Priors(nothing, (1,)), {"iou": nothing[..., :1]})
    with pytest.raises(KeyError, match=r"centerness_term: the head must have the extra map 'centerness'; it has"):
        centerness_term(pred, match)
