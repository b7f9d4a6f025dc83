"""Suppression in fixed rounds is greedy suppression, or says that it may not be. On a processor, for want of a GPU."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import nms

from detcore.kernels import disable, fixed_rounds, suppression
from detcore.kernels.fixed_rounds import select_in_fixed_rounds, stays
from detcore.kernels.selection import Rule
from detcore.scoring import class_score, fused_score
from tests.counting import LaunchCounter
from tests.samples import some_boxes
from tests.test_kernels_suppression import (
    BATCH,
    COUNTS,
    EVERY_SCORER,
    EVERY_SELECTOR,
    OPTIONS,
    SCORERS,
    SELECTORS,
    assert_twins,
    raw,
    sizes_of,
)

DEFAULTS = {
    "score_threshold": 0.05,
    "threshold_on": "ranking",
    "candidates": 1000,
    "nms_iou": 0.5,
    "max_detections": 100,
}


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Fixed rounds first, as on a GPU; a list of whether they were enough."""
    enough = []

    def noted(*args):
        found, is_exact = select_in_fixed_rounds(*args)
        enough.append(bool(is_exact))
        return found, is_exact

    monkeypatch.setattr(suppression, "_is_on_gpu", lambda pred: True)
    monkeypatch.setattr(suppression, "select_in_fixed_rounds", noted)
    return enough


@pytest.fixture(autouse=True)
def little_work(monkeypatch):
    """A thousand pairs against a thousand are for a GPU."""
    monkeypatch.setattr(fixed_rounds, "_PAIRS", 300)


@pytest.fixture(params=[(400, 300), (100, 60), (2, 2)], ids=["enough", "less", "too few"])
def sizes_tried(request, little_work, monkeypatch):
    for constant, value in zip(("_ROWS", "_PAIRS"), request.param, strict=True):
        monkeypatch.setattr(fixed_rounds, constant, value)


@EVERY_SELECTOR
@pytest.mark.parametrize("case", OPTIONS)
def test_both_tries_together_find_what_the_plain_form_finds(name, case, sizes_tried, as_on_gpu):
    pred = raw(dtype=torch.float64)
    assert assert_twins(name, fused_score(pred), pred, atol=1e-12, **OPTIONS[case]).valid.any()
    assert len(as_on_gpu) == 1


@EVERY_SELECTOR
@EVERY_SCORER
def test_first_try_finds_what_the_plain_form_finds_when_it_says_so(name, scorer, as_on_gpu):
    pred = raw(dtype=torch.float64)
    assert assert_twins(name, SCORERS[scorer](pred), pred, atol=1e-12, max_detections=30).valid.any()
    assert as_on_gpu == [True]


@EVERY_SELECTOR
def test_ties_and_bfloat16(name, sizes_tried, as_on_gpu):
    pred = raw(dtype=torch.bfloat16)
    pred = dataclasses.replace(pred, logits=(pred.logits * 2).round() / 2)
    assert assert_twins(name, class_score(pred), pred, candidates=40).valid.any()


@EVERY_SELECTOR
def test_images_without_candidates(name, as_on_gpu):
    pred = raw()
    pred.logits[1] = -torch.inf
    found = assert_twins(name, class_score(pred), pred, atol=1e-6, max_detections=30)
    assert found.valid.any(1).tolist() == [True, False, True, True]
    pred.logits.fill_(-torch.inf)
    assert not assert_twins(name, class_score(pred), pred).valid.any()
    assert as_on_gpu == [True, True]


@EVERY_SELECTOR
def test_too_few_survivors_are_noticed(name, monkeypatch, as_on_gpu):
    monkeypatch.setattr(fixed_rounds, "_PAIRS", 50)
    pred = raw(classes=1)
    pred.logits[:, :100] += 20
    pred.boxes[:, :100] = torch.tensor([20.0, 20, 60, 60])  # the fifty best are one object
    found = assert_twins(name, class_score(pred), pred, atol=1e-6, max_detections=40)
    assert found.valid.sum(1).gt(1).all()
    assert as_on_gpu == [False]


@EVERY_SELECTOR
def test_equal_scores_at_the_edge_are_left_to_the_second_try(name, monkeypatch, as_on_gpu):
    monkeypatch.setattr(fixed_rounds, "_PAIRS", 10)
    pred = raw(batch=1)
    pred.logits.zero_()
    assert_twins(name, class_score(pred), pred, max_detections=5)
    assert as_on_gpu == [False]  # any ten of all could be the best ten


@EVERY_SELECTOR
def test_too_few_rounds_are_noticed(name, as_on_gpu):
    # forty boxes in a row, each overlapping the next alone: every second one stays, and that takes a round each
    pred = raw(batch=1, classes=1, counts=(40,))
    left = torch.arange(40.0) * 4
    pred.boxes[0] = torch.stack([left, torch.zeros(40), left + 10, torch.full((40,), 10.0)], dim=-1)
    pred.logits[0, :, 0] = torch.linspace(3, -1, 40)
    options = {"nms_iou": 0.4, "score_threshold": 0.0}
    found = assert_twins(name, class_score(pred), pred, atol=1e-6, **options)
    assert found.prior[0, : int(found.valid.sum())].tolist() == list(range(0, 40, 2))
    assert as_on_gpu == [False]
    early, is_exact = select_in_fixed_rounds(
        class_score(pred), pred, sizes_of(pred), Rule(name, **{**DEFAULTS, **options})
    )
    assert not is_exact
    assert not early.valid.equal(found.valid)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_fixed_rounds_are_greedy_suppression(classes, threshold):
    boxes = some_boxes(6)[torch.randint(0, 6, (5, 200))] + torch.randn(5, 200, 4).double() * 4
    boxes = torch.cat([torch.minimum(boxes[..., :2], boxes[..., 2:] - 1), boxes[..., 2:]], dim=-1)
    label, valid = torch.randint(0, classes, (5, 200)), torch.rand(5, 200) < 0.9
    kept, is_settled = stays(boxes, label, valid, threshold, rounds=200)
    assert is_settled.all()
    for b in range(5):
        for c in range(classes):
            own = ((label[b] == c) & valid[b]).nonzero()[:, 0]
            expected = own[nms(boxes[b, own], -torch.arange(len(own)).double(), threshold)]
            assert (kept[b] & (label[b] == c)).nonzero()[:, 0].tolist() == sorted(expected.tolist())


def test_an_answer_that_no_round_changes_is_final():
    boxes = some_boxes(12).repeat(1, 20).view(1, 240, 4)
    label, valid = torch.zeros(1, 240, dtype=torch.int64), torch.ones(1, 240, dtype=torch.bool)
    answers = [stays(boxes, label, valid, 0.5, rounds=rounds) for rounds in range(1, 30)]
    settled = [kept for kept, is_settled in answers if is_settled]
    assert 1 <= len(settled) < 29
    assert all(kept.equal(answers[-1][0]) for kept in settled)


def test_an_overlap_at_the_threshold_stays():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 5]]])
    label, valid = torch.tensor([[0, 0, 1]]), torch.ones(1, 3, dtype=torch.bool)
    assert stays(boxes, label, valid, 0.5, rounds=3)[0].all()
    assert stays(boxes, label, valid, 0.49, rounds=3)[0].tolist() == [[True, False, True]]


def counts(name, batch):
    pred = raw(batch=batch)
    rule = Rule(name, **{**DEFAULTS, "candidates": 60})
    with LaunchCounter() as counter:
        found, _ = select_in_fixed_rounds(fused_score(pred), pred, torch.full((batch, 2), 200), rule)
    assert found.valid.any()
    return counter


@EVERY_SELECTOR
def test_launches_do_not_grow_with_the_batch_and_nothing_waits(name):
    one, many = counts(name, 1), counts(name, 8)
    assert many.launches == one.launches
    assert not many.syncs
    assert one.total < 180


@EVERY_SELECTOR
def test_the_flag_is_the_only_number_read(name, monkeypatch):
    monkeypatch.setattr(suppression, "_is_on_gpu", lambda pred: True)
    pred = raw()
    sizes = sizes_of(pred)
    with LaunchCounter() as counter:
        assert SELECTORS[name](class_score(pred), pred, sizes, max_detections=30).valid.any()
    assert sum(counter.syncs.values()) == 1 + 1  # and the assertion's own


@pytest.mark.gpu
@EVERY_SELECTOR
@EVERY_SCORER
def test_on_a_real_gpu_it_finds_what_the_plain_form_finds(name, scorer, gpu):
    pred = raw(dtype=torch.float64)
    on_gpu = dataclasses.replace(
        pred,
        logits=pred.logits.to(gpu),
        deltas=pred.deltas.to(gpu),
        boxes=pred.boxes.to(gpu),
        priors=pred.priors.to(gpu),
        extras={key: value.to(gpu) for key, value in pred.extras.items()},
    )
    sizes = sizes_of(pred)
    found = SELECTORS[name](SCORERS[scorer](on_gpu), on_gpu, sizes.to(gpu)).to("cpu")
    with disable():
        plain = SELECTORS[name](SCORERS[scorer](pred), pred, sizes)
    assert found.prior.equal(plain.prior)
    assert found.labels.equal(plain.labels)
    assert_close(found.scores, plain.scores)
    assert len(found.scores) == BATCH
    assert sum(COUNTS) == pred.logits.shape[1]
