import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from detcore.coders import DeltaCoder
from detcore.kernels import disable
from detcore.losses.mining import softmax_mining_term
from detcore.losses.refine import arm_box_term, arm_class_term, odm_class_term, refine_priors, surely_background
from detcore.losses.scale_balanced import scale_balance
from detcore.losses.terms import box_delta_term
from detcore.ssd_assigner import num_matched, ssd_assign
from detcore.structures import BACKGROUND, IGNORE, Predictions, Priors
from tests import reference
from tests.counting import LaunchCounter
from tests.samples import no_hook, some_boxes, some_priors, targets_of

CODER = DeltaCoder((10.0, 10.0, 5.0, 5.0))  # variances .1 and .2
TERMS = {
    "arm_cls": partial(arm_class_term, assign=ssd_assign),
    "arm_box": partial(arm_box_term, assign=ssd_assign, coder=CODER),
    "cls": odm_class_term,
    "box": partial(box_delta_term, coder=CODER, beta=1.0),
}


def two_step(priors, objectness, arm_deltas, logits, deltas):
    """Predictions as RefineDet's head gives them."""
    refined = refine_priors(priors, arm_deltas, coder=CODER)
    extras = {"objectness": objectness, "arm_deltas": arm_deltas, "arm_priors": priors.boxes}
    return Predictions(logits, deltas, CODER.decode(deltas, refined.boxes), refined, extras)


def some_steps(priors, batch, classes=4, *, requires_grad=False, spread=0.5):
    n, dtype = priors.boxes.shape[1], priors.boxes.dtype
    maps = [torch.randn(batch, n, k, dtype=dtype) for k in (2, 4, classes, 4)]
    maps = [(m * scale).requires_grad_(requires_grad) for m, scale in zip(maps, (3, spread, 2, spread), strict=True)]
    return maps, two_step(priors, *maps)


def a_batch(*, count=40, requires_grad=False, classes=4):
    """Two images with objects on some priors, one without; the ARM moves every prior a little."""
    priors = some_priors(count)
    shift = 2 * torch.rand(2, 1, 2).repeat(1, 1, 2).double()
    objects = [(priors.boxes[0, [i, i + 7]] + shift[i], torch.arange(2)) for i in range(2)]
    targets = targets_of(*objects, ([], []), slots=8)
    maps, pred = some_steps(priors, 3, classes, requires_grad=requires_grad)
    return priors, targets, maps, pred, ssd_assign(pred.priors, targets)


# --- by hand


def test_refined_priors_by_hand():
    priors = Priors(torch.tensor([[[10.0, 10, 30, 50], [0, 0, 8, 8]]]).double(), (2,))
    # centre moves by .1 * 2 * 20 = 4 and -.1 * 1 * 40 = -4, width doubles, height is halved; the second stays
    deltas = torch.tensor([[[2.0, -1.0, 5 * math.log(2), -5 * math.log(2)], [0, 0, 0, 0]]]).double()
    refined = refine_priors(priors, deltas, coder=CODER)
    # centre (20, 30) -> (24, 26), sides 20 x 40 -> 40 x 20
    assert_close(refined.boxes, torch.tensor([[[4.0, 16, 44, 36], [0, 0, 8, 8]]]).double())
    assert refined.counts == priors.counts
    both = refine_priors(priors, torch.cat([deltas, torch.zeros_like(deltas)]), coder=CODER)
    assert_close(both.boxes[1], priors.boxes[0])


def test_second_step_matches_what_the_first_moved():
    # prior 0 lies on the object and is moved away, prior 1 is moved onto it
    priors = Priors(torch.tensor([[[0.0, 0, 10, 10], [20, 0, 30, 10], [60, 0, 70, 10]]]).double(), (3,))
    targets = targets_of(([[0.0, 0, 10, 10]], [2]))
    move = torch.zeros(1, 3, 4).double()
    move[0, 0, 0], move[0, 1, 0] = 40.0, -20.0  # +40 and -20 pixels
    zero = torch.zeros(1, 3, 4).double()
    pred = two_step(priors, zero[..., :2], move, zero, zero)
    match = ssd_assign(pred.priors, targets)
    assert match.labels.tolist() == [[BACKGROUND, 2, BACKGROUND]]
    # ARM: prior 0 is the positive; wanted deltas 0, said (40, 0, 0, 0): 39.5
    assert_close(TERMS["arm_box"](pred, match).item(), 39.5)
    # ODM: prior 1 lies exactly on the object now
    assert_close(TERMS["box"](pred, match).item(), 0.0)
    # one positive and two negatives each, all at ln 2 and at ln 4
    assert_close(TERMS["arm_cls"](pred, match).item(), 3 * math.log(2))
    assert_close(TERMS["cls"](pred, match).item(), 3 * math.log(4))


def logits_of(probability):
    """(object, background) logits of an objectness; float64 holds .01 and .99 to the last bit or so."""
    p = torch.tensor(probability, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], dim=-1)


def boxes_for(count):
    x = torch.arange(count).double() * 100
    return torch.stack([x, x * 0, x + 10, x * 0 + 10], dim=-1)[None]


def filtered_case():
    """One object on prior 0, objectness and background losses such that filter and rank disagree."""
    priors = Priors(boxes_for(7), (7,))
    objectness = logits_of([[0.001, 0.5, 0.009, 0.011, 0.9, 0.0001, 0.02]])
    logits = torch.zeros(1, 7, 3).double()
    logits[0, :, 0] = torch.tensor([0.0, 1.0, 9.0, 4.0, 2.0, 8.0, 3.0])  # how wrong each is about background
    zero = torch.zeros(1, 7, 4).double()
    return two_step(priors, objectness, zero, logits, zero), targets_of(([[0.0, 0, 10, 10]], [1]))


def test_filter_drops_the_hardest_negatives_if_the_first_step_is_sure():
    pred, targets = filtered_case()
    match = ssd_assign(pred.priors, targets)
    assert surely_background(pred).tolist() == [[True, False, True, False, False, True, False]]
    away = [math.log(math.exp(x) + 2) for x in (0, 1, 9, 4, 2, 8, 3)]
    positive = math.log(3)  # kept although its objectness is .001
    # eligible 1, 3, 4, 6: the hardest three are 3, 6, 4
    assert_close(odm_class_term(pred, match).item(), positive + away[3] + away[6] + away[4])
    # without the filter 2, 5 and 3
    assert_close(odm_class_term(pred, match, least=0.0).item(), positive + away[2] + away[5] + away[3])
    assert_close(odm_class_term(pred, match, least=0.0).item(), softmax_mining_term(pred, match).item())
    # ratio 100: all four that are eligible
    everything = positive + away[1] + away[3] + away[4] + away[6]
    assert_close(odm_class_term(pred, match, ratio=100.0).item(), everything)


def test_equality_passes_the_filter():
    # sigmoid(0) is exactly one half
    pred, _ = filtered_case()
    even = replace(pred, extras={**pred.extras, "objectness": torch.zeros(1, 7, 2).double()})
    assert not surely_background(even, least=0.5).any()
    assert surely_background(even, least=0.5 + 1e-9).all()
    assert not surely_background(even, least=0.0).any()


def test_all_negatives_filtered_leaves_the_positives():
    pred, targets = filtered_case()
    sure = replace(pred, extras={**pred.extras, "objectness": logits_of([[1e-4] * 7])})
    match = ssd_assign(pred.priors, targets)
    assert_close(odm_class_term(sure, match).item(), math.log(3))


# --- loops


def arm_match_by_loop(priors, targets):
    rows = [
        reference.ssd_assign(priors.boxes[0].tolist(), boxes[valid].tolist(), labels[valid].tolist())
        for boxes, labels, valid in zip(targets.boxes, targets.labels, targets.valid, strict=True)
    ]
    return torch.tensor([[0 if o >= 0 else BACKGROUND for o in owner] for _, owner in rows]), [o for _, o in rows]


def test_first_step_equals_its_loop():
    priors, targets, maps, pred, match = a_batch()
    labels, owners = arm_match_by_loop(priors, targets)
    own = replace(match, labels=labels, index=torch.tensor(owners).clamp(min=0))
    assert own.positive.ne(match.positive).any()  # the two steps match differently here
    expected = reference.softmax_mining_term(maps[0], own)
    assert_close(TERMS["arm_cls"](pred, match).item(), expected, rtol=1e-9, atol=0)

    total = 0.0
    for b, owner in enumerate(owners):
        for n, j in enumerate(owner):
            if j >= 0:
                box, prior = targets.boxes[b, j].tolist(), priors.boxes[0, n].tolist()
                wanted = reference.encode_deltas(box, prior, (10, 10, 5, 5))
                total += sum(
                    reference.smooth_l1(d - w, 1.0) for d, w in zip(maps[1][b, n].tolist(), wanted, strict=True)
                )
    assert_close(TERMS["arm_box"](pred, match).item(), total / labels.ge(0).sum().item(), rtol=1e-9, atol=0)


def test_second_step_equals_its_loop():
    _, _, maps, pred, match = a_batch()
    labels = match.labels.clone()
    for b, row in enumerate(maps[0].tolist()):
        for n, (yes, no) in enumerate(row):
            if labels[b, n] == BACKGROUND and reference.sigmoid(yes - no) < 0.01:
                labels[b, n] = IGNORE
    dropped = (labels == IGNORE).sum()
    assert 3 < dropped < match.negative.sum()
    found = odm_class_term(pred, match, ratio=8.0)
    expected = reference.softmax_mining_term(maps[2], replace(match, labels=labels), 8.0)
    assert_close(found.item(), expected, rtol=1e-9, atol=0)
    assert abs(found.item() - odm_class_term(pred, match, ratio=8.0, least=0.0).item()) > 1e-3


# --- gradients


def test_second_step_never_teaches_the_first():
    _, _, maps, pred, match = a_batch(requires_grad=True)
    objectness, arm_deltas, logits, deltas = maps
    second = TERMS["cls"](pred, match) + TERMS["box"](pred, match)
    gradients = torch.autograd.grad(second, maps, allow_unused=True, retain_graph=True)
    assert gradients[0] is None
    assert gradients[1] is None
    assert gradients[2].ne(0).any()
    assert gradients[3].ne(0).any()
    # even decoded boxes, which an IoU loss would use, stop at the refined priors
    [through] = torch.autograd.grad(pred.boxes.sum(), [arm_deltas], allow_unused=True, retain_graph=True)
    assert through is None
    first = TERMS["arm_cls"](pred, match) + TERMS["arm_box"](pred, match)
    gradients = torch.autograd.grad(first, [objectness, arm_deltas, logits, deltas], allow_unused=True)
    assert gradients[0].ne(0).any()
    assert gradients[1].ne(0).any()
    assert gradients[2] is None
    assert gradients[3] is None


@pytest.mark.parametrize("name", TERMS)
def test_term_passes_gradcheck(name):
    priors, targets, maps, _, _ = a_batch(count=12)
    _, fixed, *_ = maps

    def term(objectness, arm_deltas, logits, deltas):
        # matching and filter are steps: they stay where they are while the numbers are nudged
        pred = two_step(priors, objectness, arm_deltas, logits, deltas)
        pred = replace(pred, priors=refine_priors(priors, fixed, coder=CODER))
        return TERMS[name](pred, ssd_assign(pred.priors, targets))

    # refined priors are constants, so only the ARM's own terms may be asked about its deltas
    wanted = [True, name.startswith("arm"), True, True]
    inputs = [m.detach().clone().requires_grad_(w) for m, w in zip(maps, wanted, strict=True)]
    assert torch.autograd.gradcheck(term, inputs, fast_mode=True)


@pytest.mark.parametrize("name", TERMS)
def test_batch_without_objects_is_zero(name):
    priors = some_priors(20)
    maps, pred = some_steps(priors, 2, requires_grad=True)
    match = ssd_assign(pred.priors, targets_of(([], []), ([], []), slots=8))
    loss = TERMS[name](pred, match)
    assert loss == 0
    gradients = [g for g in torch.autograd.grad(loss, maps, allow_unused=True) if g is not None]
    assert gradients
    assert all(g.eq(0).all() for g in gradients)


# --- the scale-balanced loss


def test_weights_of_the_first_step_come_from_its_own_matches():
    # the original priors: two on the object; refined: one of them is moved away
    priors = Priors(torch.tensor([[[0.0, 0, 10, 10], [1, 0, 11, 10], [60, 0, 70, 10]]]).double(), (3,))
    targets = targets_of(([[0.0, 0, 10, 10]], [2]))
    move = torch.zeros(1, 3, 4).double()
    move[0, 1, 0] = 40.0
    zero = torch.zeros(1, 3, 4).double()
    pred = two_step(priors, zero[..., :2], move, zero, zero)
    match = ssd_assign(pred.priors, targets)
    assert num_matched(match).tolist() == [[1]]
    w2 = 3 * (math.log(2) + 1) / 2
    # two positives, one negative to mine: (2 W ln 2 + ln 2) / 2
    found = TERMS["arm_cls"](pred, match, weight=scale_balance).item()
    assert_close(found, (2 * w2 + 1) * math.log(2) / 2, rtol=1e-6, atol=0)
    plain = TERMS["arm_box"](pred, match).item()
    assert_close(TERMS["arm_box"](pred, match, weight=scale_balance).item(), w2 * plain, rtol=1e-6, atol=0)
    # the second step, if one weighs it: M = 1, W = 3
    assert_close(TERMS["cls"](pred, match, weight=scale_balance).item(), (3 + 2) * math.log(4), rtol=1e-6, atol=0)


# --- shapes


def test_priors_of_the_first_step_may_be_given_once_or_an_image():
    _, _, _, pred, match = a_batch()
    every = {**pred.extras, "arm_priors": pred.extras["arm_priors"].expand(3, -1, -1)}
    for term in TERMS.values():
        assert_close(term(replace(pred, extras=every), match), term(pred, match), rtol=0, atol=0)


def test_launches_do_not_grow_with_the_batch_and_nothing_waits():
    counts = []
    for batch, slots in ((1, 8), (8, 24)):
        priors = some_priors(40, dtype=torch.float32)
        objects = [(some_boxes(5), torch.arange(5) % 3)] * batch
        targets = targets_of(*objects, slots=slots, dtype=torch.float32)
        _, pred = some_steps(priors, batch, requires_grad=True)
        with disable(), LaunchCounter() as counter:  # counted is what a GPU runs
            match = ssd_assign(pred.priors, targets)
            sum(term(pred, match) for term in TERMS.values()).backward()
        assert not counter.syncs
        counts.append(counter.launches)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["arm_cls", "arm_box", "cls"])
def test_missing_maps_are_named(name):
    _, _, _, pred, match = a_batch()
    with pytest.raises(KeyError, match=r"refine: the head must have the extra map '\w+'; it has \['iou'\]"):
        TERMS[name](replace(pred, extras={"iou": pred.deltas}), match)


def test_filter_names_what_is_wrong():
    _, _, _, pred, match = a_batch()
    with no_hook(), pytest.raises(ValueError, match=r"least must be in \[0, 1\]; got 1.5"):
        odm_class_term(pred, match, least=1.5)
