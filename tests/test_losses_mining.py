from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.models.detection.ssd import SSD

from detcore.coders import DeltaCoder
from detcore.kernels import disable
from detcore.losses.mining import hard_negative_mask, softmax_mining_term
from detcore.losses.terms import box_delta_term
from detcore.losses.weighting import weigh_positives
from detcore.ssd_assigner import ssd_assign
from detcore.structures import BACKGROUND, IGNORE, Assignment, Predictions, Priors, Targets
from tests import reference
from tests.counting import LaunchCounter
from tests.samples import no_hook, some_boxes, some_predictions, some_priors, targets_of

CODER = DeltaCoder((10.0, 10.0, 5.0, 5.0))


def kept(losses, labels, **options):
    """Priors that are kept, image by image."""
    losses, labels = torch.tensor(losses), torch.tensor(labels)
    mask = hard_negative_mask(losses, labels >= 0, labels == BACKGROUND, **options)
    return [row.nonzero().flatten().tolist() for row in mask]


# --- mining by hand


def test_hard_negatives_of_a_plain_an_exhausted_and_an_empty_image():
    losses = [
        [9.0, 1.0, 4.0, 2.0, 3.0, 0.5],  # one positive: the three highest of five negatives
        [1.0, 1.0, 4.0, 2.0, 3.0, 0.5],  # four positives would take twelve: there are two
        [9.0, 8.0, 7.0, 6.0, 5.0, 4.0],  # nothing to find: none, however wrong they are
    ]
    labels = [[0, -1, -1, -1, -1, -1], [2, 0, 1, -1, 0, -1], [-1] * 6]
    assert kept(losses, labels) == [[2, 3, 4], [3, 5], []]


def test_ties_go_to_the_first_priors_and_the_count_is_exact():
    losses = [[5.0] * 9, [1.0, 2.0, 2.0, 7.0, 2.0, 2.0, 2.0, 0.0, 9.0]]
    labels = [[-1, -1, -1, 3, -1, -1, -1, -1, -1], [-1] * 8 + [1]]
    assert kept(losses, labels) == [[0, 1, 2], [1, 2, 3]]


def test_ignored_priors_are_neither_counted_nor_kept():
    assert kept([[1.0, 9.0, 3.0, 2.0, 8.0]], [[0, IGNORE, -1, -1, IGNORE]], ratio=1.0) == [[2]]


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 0), (0.5, 1), (1.5, 3), (3.0, 6), (100.0, 7)])
def test_ratio_is_rounded_down(ratio, count):
    labels = [[0, 1, *[-1] * 7]]
    assert len(kept([[float(n) for n in range(9)]], labels, ratio=ratio)[0]) == count
    assert len(kept([[0.0] * 9], labels, ratio=ratio)[0]) == count


def test_infinite_losses_come_first():
    assert kept([[0.0, 1.0, float("inf"), 2.0]], [[0, -1, -1, -1]], ratio=1.0) == [[2]]
    assert kept([[0.0, -5.0, -7.0, -6.0]], [[0, -1, -1, -1]], ratio=2.0) == [[1, 3]]  # any sign will do


def test_tensors_may_be_given_by_name():
    losses, positive = torch.tensor([[9.0, 2.0, 5.0]]), torch.tensor([[True, False, False]])
    mask = hard_negative_mask(losses=losses, positive=positive, negative=~positive, ratio=1.0)
    assert mask.tolist() == [[False, False, True]]


def test_hard_negative_mask_names_what_is_wrong():
    with no_hook(), pytest.raises(ValueError, match=r"ratio must be >= 0; got -1.0"):
        kept([[1.0]], [[0]], ratio=-1.0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), ratio=st.sampled_from([0.0, 1.0, 2.5, 3.0, 20.0]))
def test_hard_negatives_equal_their_loop(seed, ratio):
    torch.manual_seed(seed)
    losses = torch.randint(0, 6, (3, 30)).double()  # many ties
    labels = torch.randint(-4, 2, (3, 30)).clamp(min=-2)
    labels[1] = labels[1].clamp(max=-1)
    mask = hard_negative_mask(losses, labels >= 0, labels == BACKGROUND, ratio=ratio)
    for b in range(3):
        positive, negative = (labels[b] >= 0).tolist(), (labels[b] == BACKGROUND).tolist()
        expected = reference.hard_negatives(losses[b].tolist(), positive, negative, ratio)
        assert set(mask[b].nonzero().flatten().tolist()) == expected
        assert mask[b].sum() == min(int(ratio * sum(positive)), sum(negative))


# --- the term


def a_batch(*, count=40, images=2, classes=4, requires_grad=False):
    """Priors, objects that lie on some of them, and random predictions; the last image has no object."""
    priors = some_priors(count)
    shift = 2 * torch.rand(images, 1, 2).repeat(1, 1, 2).double()
    objects = [(priors.boxes[0, [i, i + 7]] + shift[i], torch.arange(2)) for i in range(images)]
    targets = targets_of(*objects, ([], []), slots=8)
    pred = some_predictions(priors, images + 1, classes, CODER, requires_grad=requires_grad)
    return priors, targets, pred, ssd_assign(priors, targets)


def test_softmax_mining_term_by_hand():
    # three classes and background; two images of four priors
    third = torch.zeros(4)
    rows = [
        [third, torch.tensor([0.0, 0, 0, 9]), torch.tensor([3.0, 0, 0, 0]), torch.tensor([0.0, 0, 0, 1])],
        [torch.tensor([9.0, 9, 9, 0])] * 4,
    ]
    logits = torch.stack([torch.stack(row) for row in rows]).double()
    labels = torch.tensor([[1, -1, -1, -1], [-1] * 4])
    zero = torch.zeros(2, 4, 4).double()
    nobody = targets_of(([], []), ([], []))
    match = Assignment(labels, torch.zeros_like(labels), zero, zero[..., 0], nobody)
    pred = Predictions(logits, zero, zero, Priors(zero[:1], (4,)))
    # positive ln 4; negatives by ln(3 + e^3), ln(3 + e) - 1, ln(3 + e^9) - 9; the second image adds nothing
    hardest = torch.tensor([3.0]).exp().add(3).log().item()
    second = torch.tensor([1.0]).exp().add(3).log().item() - 1
    assert_close(softmax_mining_term(pred, match, ratio=0.0).item(), 1.3862944)
    assert_close(softmax_mining_term(pred, match, ratio=1.0).item(), 1.3862944 + hardest)
    assert_close(softmax_mining_term(pred, match, ratio=2.0).item(), 1.3862944 + hardest + second)
    thrice = lambda match: torch.full(match.labels.shape, 3.0)  # noqa: E731
    assert_close(softmax_mining_term(pred, match, ratio=1.0, weight=thrice).item(), 3 * 1.3862944 + hardest)


@pytest.mark.parametrize("ratio", [0.0, 3.0, 50.0])
def test_softmax_mining_term_equals_its_loop(ratio):
    _, _, pred, match = a_batch()
    assert match.positive.sum() >= 4
    found = softmax_mining_term(pred, match, ratio=ratio)
    assert_close(found.item(), reference.softmax_mining_term(pred.logits, match, ratio), rtol=1e-9, atol=0)


def test_softmax_mining_term_and_boxes_equal_torchvision():
    _, _, pred, match = a_batch()
    # theirs: background is label and channel 0, targets are one dict an image, indices -1 where there is none
    index = [torch.where(p, i, -1) for p, i in zip(match.positive, match.index, strict=True)]
    targets = [
        {"boxes": b[v], "labels": t[v] + 1}
        for b, t, v in zip(match.targets.boxes, match.targets.labels, match.targets.valid, strict=True)
    ]
    outputs = {"cls_logits": pred.logits.roll(1, dims=-1), "bbox_regression": pred.deltas}
    theirs = SSD.compute_loss(_TorchvisionSSD(), targets, outputs, [pred.priors.boxes[0]] * 3, index)
    assert_close(softmax_mining_term(pred, match), theirs["classification"], rtol=1e-9, atol=0)
    boxes = box_delta_term(pred, match, coder=CODER, beta=1.0)
    assert_close(boxes, theirs["bbox_regression"], rtol=1e-9, atol=0)


class _TorchvisionSSD:
    """What torchvision's loss reads of its detector."""

    neg_to_pos_ratio = 3

    class box_coder:
        @staticmethod
        def encode_single(boxes, priors):
            return CODER.encode(boxes, priors)


def test_gradient_reaches_positives_and_kept_negatives_only():
    _, _, pred, match = a_batch(requires_grad=True)
    [gradient] = torch.autograd.grad(softmax_mining_term(pred, match), pred.logits)
    touched = gradient.ne(0).any(-1)
    assert touched[match.positive].all()
    counts = [min(3 * int(p), 40 - int(p)) for p in match.positive.sum(1)]
    assert (touched & match.negative).sum(1).tolist() == counts
    assert touched[2].sum() == 0
    # and what is not touched lost no contest: its background loss is below every kept one's
    away = -pred.logits.log_softmax(-1)[..., -1]
    for b in range(2):
        assert away[b][touched[b] & match.negative[b]].min() > away[b][~touched[b] & match.negative[b]].max()


def test_background_is_the_last_channel():
    _, _, pred, match = a_batch()
    sure = torch.zeros_like(pred.logits)
    sure[..., -1] = 60.0
    nothing = replace(match, labels=torch.where(match.positive, BACKGROUND, match.labels))
    assert_close(softmax_mining_term(replace(pred, logits=sure), nothing).item(), 0.0)
    assert softmax_mining_term(replace(pred, logits=sure), match) > 59
    right = torch.where(
        torch.arange(4) == match.labels[..., None], 60.0, torch.where(match.positive[..., None], 0, sure)
    )
    assert_close(softmax_mining_term(replace(pred, logits=right), match).item(), 0.0)


def test_softmax_mining_term_passes_gradcheck():
    _, _, pred, match = a_batch(count=14, images=1)
    weigh = lambda match: torch.rand(match.labels.shape, generator=torch.Generator().manual_seed(3)) + 0.5  # noqa: E731
    for weight in (None, weigh):
        term = lambda logits, weight=weight: softmax_mining_term(replace(pred, logits=logits), match, weight=weight)  # noqa: E731
        assert torch.autograd.gradcheck(term, [pred.logits.detach().requires_grad_()], fast_mode=True)


def test_ranking_does_not_know_the_weights():
    # weights of 0 take the positives away and leave every negative as it was
    _, _, pred, match = a_batch()
    plain = softmax_mining_term(pred, match)
    alone = softmax_mining_term(pred, match, ratio=0.0)
    nothing = softmax_mining_term(pred, match, weight=lambda match: torch.zeros(match.labels.shape))
    assert_close(nothing, plain - alone, rtol=1e-9, atol=0)
    tenfold = softmax_mining_term(pred, match, weight=lambda match: torch.full(match.labels.shape, 10.0))
    assert_close(tenfold, plain + 9 * alone, rtol=1e-9, atol=0)


def test_weight_of_one_is_the_plain_term_bit_for_bit():
    _, _, pred, match = a_batch()
    one = softmax_mining_term(pred, match, weight=lambda match: torch.ones(match.labels.shape))
    assert one.equal(softmax_mining_term(pred, match))


def test_weights_of_negatives_are_never_looked_at():
    match = a_batch()[3]
    wild = torch.where(match.positive, 2.0, float("nan"))
    losses = torch.ones(match.labels.shape)
    assert weigh_positives(losses, match, lambda match: wild).tolist() == torch.where(match.positive, 2.0, 1.0).tolist()


def test_weights_are_constants():
    match = a_batch()[3]
    learnt = torch.ones(match.labels.shape, requires_grad=True)
    assert not weigh_positives(torch.ones(match.labels.shape), match, lambda match: learnt * 2).requires_grad


def test_batch_is_the_sum_of_its_images_over_the_joint_number():
    _, _, pred, match = a_batch()
    whole = softmax_mining_term(pred, match) * match.num_positive
    parts = 0.0
    for i in range(3):
        own = slice(i, i + 1)
        targets = Targets(match.targets.boxes[own], match.targets.labels[own], match.targets.valid[own])
        one = Assignment(match.labels[own], match.index[own], match.boxes[own], match.iou[own], targets)
        image = Predictions(pred.logits[own], pred.deltas[own], pred.boxes[own], pred.priors)
        parts += softmax_mining_term(image, one) * one.num_positive
    assert_close(whole, parts, rtol=1e-9, atol=0)


def test_batch_without_objects_is_zero_with_a_gradient():
    priors = some_priors(20)
    pred = some_predictions(priors, 2, 4, CODER, requires_grad=True)
    match = ssd_assign(priors, targets_of(([], []), ([], []), slots=8))
    loss = softmax_mining_term(pred, match)
    assert loss == 0
    [gradient] = torch.autograd.grad(loss, pred.logits)
    assert gradient.eq(0).all()


def test_half_precision_is_computed_in_float32():
    _, _, pred, match = a_batch()
    rounded = pred.logits.bfloat16()
    low = softmax_mining_term(replace(pred, logits=rounded), match)
    assert low.dtype == torch.float32
    assert_close(low, softmax_mining_term(replace(pred, logits=rounded.float()), match), rtol=0, atol=0)


def test_huge_logits_stay_finite():
    _, _, pred, match = a_batch(requires_grad=True)
    loss = softmax_mining_term(replace(pred, logits=pred.logits * 1e4), match)
    [gradient] = torch.autograd.grad(loss, pred.logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_launches_do_not_grow_with_the_batch_and_nothing_waits():
    counts = []
    for batch, slots in ((1, 8), (8, 24)):
        priors = some_priors(40, dtype=torch.float32)
        objects = [(some_boxes(5), torch.arange(5) % 3)] * batch
        match = ssd_assign(priors, targets_of(*objects, slots=slots, dtype=torch.float32))
        pred = some_predictions(priors, batch, 4, CODER, requires_grad=True)
        with disable(), LaunchCounter() as counter:  # counted is what a GPU runs
            partial(softmax_mining_term, ratio=3.0)(pred, match).backward()
        assert not counter.syncs
        counts.append(counter.launches)
    assert counts[0] == counts[1]
