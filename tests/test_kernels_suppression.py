"""The fast selections hold what the plain ones find, bit for bit, however few scores they read."""

import dataclasses
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from detcore.kernels import disable, suppression
from detcore.models.refinedet import refined_score
from detcore.postprocess import select_by_class, select_by_pair, select_by_prior
from detcore.scores import RowScores, Scores, by_rows
from detcore.scoring import class_score, fused_score, softmax_score
from detcore.structures import BACKGROUND, Predictions, Priors
from tests.samples import some_boxes
from tests.test_models import redraw
from tests.zoo import EVERY_NETWORK, small

SELECTORS = {"prior": select_by_prior, "pair": select_by_pair, "class": select_by_class}
SCORERS = {
    "sigmoid": class_score,
    "softmax": softmax_score,
    "fused": fused_score,
    "filtered": partial(fused_score, class_power=0.4, quality_power=0.6, min_quality=0.3),
    "refined": refined_score,
}
COUNTS = (300, 80, 20)
BATCH = 4  # so that sizes are multiples of 64: torch rounds the last few numbers of a tensor in another way
EVERY_SELECTOR = pytest.mark.parametrize("name", SELECTORS)
EVERY_SCORER = pytest.mark.parametrize("scorer", SCORERS)


def raw(batch=BATCH, classes=4, counts=COUNTS, *, spread=2.0, shift=-3.0, dtype=torch.float32):
    """What a head says about clusters of boxes, so that there is something to suppress."""
    n = sum(counts)
    boxes = some_boxes(8)[torch.randint(0, 8, (batch, n))] + torch.randn(batch, n, 4).double() * 3
    boxes = torch.cat([torch.minimum(boxes[..., :2], boxes[..., 2:] - 1), boxes[..., 2:]], dim=-1)
    boxes = boxes.to(torch.promote_types(dtype, torch.float32))
    logits = (torch.randn(batch, n, classes) * spread + shift).to(dtype)
    extras = {"iou": torch.randn(batch, n, 1).to(dtype), "objectness": torch.randn(batch, n, 2).to(dtype) * 4}
    return Predictions(logits, torch.zeros_like(boxes), boxes, Priors(boxes[:1], counts), extras)


def sizes_of(pred):
    return torch.tensor([[150, 170], [90, 200], [400, 400], [64, 64]])[: len(pred.boxes)]


def assert_twins(name, scores, pred, *, atol=0.0, **options):
    """Every field of both is the same; the detections."""
    select, sizes = SELECTORS[name], sizes_of(pred)
    assert suppression.applies(scores, pred, sizes, **options)
    found = select(scores, pred, sizes, **options)
    with disable():
        plain = select(scores, pred, sizes, **options)
    for field in dataclasses.fields(plain):
        mine, wanted = getattr(found, field.name), getattr(plain, field.name)
        assert (mine is None) == (wanted is None)
        if wanted is not None:
            assert_close(mine, wanted, rtol=0, atol=atol, msg=lambda text, f=field: f"{f.name}: {text}")
    return found


@pytest.fixture(params=[(1024, 4096), (40, 64), (1, 1)], ids=["enough", "more", "all"])
def first_try(request, monkeypatch):
    """How many priors and pairs are tried first: enough for all, and so few that it must go on."""
    for constant, value in zip(("_ROWS", "_PAIRS"), request.param, strict=True):
        monkeypatch.setattr(suppression, constant, value)


OPTIONS = {
    "defaults": {},
    "few candidates": {"candidates": 7},
    "one candidate": {"candidates": 1, "score_threshold": 0.0},
    "threshold on classes": {"threshold_on": "classes", "score_threshold": 0.2},
    "everything passes": {"score_threshold": 0.0, "candidates": 30},
    "few detections": {"max_detections": 5},
    "strict suppression": {"nms_iou": 0.0},
    "lax suppression": {"nms_iou": 0.9, "max_detections": 3000, "score_threshold": 0.0},
    "no suppression": {"nms_iou": None, "max_detections": 30},
}


@EVERY_SELECTOR
@pytest.mark.parametrize("case", OPTIONS)
def test_twins_find_the_same(name, case, first_try):
    pred = raw()
    assert assert_twins(name, fused_score(pred), pred, **OPTIONS[case]).valid.any()


@EVERY_SELECTOR
@EVERY_SCORER
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["double", "bfloat16"])
def test_twins_find_the_same_in_every_precision(name, scorer, dtype, first_try):
    pred = raw(dtype=dtype)
    assert assert_twins(name, SCORERS[scorer](pred), pred, candidates=50).valid.any()


@EVERY_SELECTOR
@EVERY_SCORER
@pytest.mark.parametrize("steps", [1, 4])
def test_twins_break_ties_alike(name, scorer, steps, first_try):
    pred = raw()
    coarse = {key: (value * steps).round() / steps for key, value in pred.extras.items()}
    pred = dataclasses.replace(pred, logits=(pred.logits * steps).round() / steps, extras=coarse)
    found = assert_twins(name, SCORERS[scorer](pred), pred, candidates=25)
    assert (found.scores.diff(dim=1) == 0)[found.valid[:, 1:]].any()


@EVERY_SELECTOR
@pytest.mark.parametrize("case", ["defaults", "few candidates", "few detections", "no suppression"])
def test_of_equal_scores_the_earlier_prior_goes_first_then_the_lower_class(name, case, first_try):
    pred = raw(batch=1)
    found = assert_twins(
        name, class_score(dataclasses.replace(pred, logits=torch.zeros_like(pred.logits))), pred, **OPTIONS[case]
    )
    place = (found.prior * 4 + found.labels)[found.valid]
    assert (place.diff() > 0).all()
    assert found.prior[0, 0] == found.labels[0, 0] == 0


@EVERY_SELECTOR
def test_second_try_when_the_best_are_all_one_object(name, first_try):
    # the hundred best priors of each image share a box: one of them survives, the others lie far behind
    pred = raw(classes=2)
    pred.logits[:, :100] += 20
    pred.boxes[:, :100] = torch.tensor([20.0, 20, 60, 60])
    found = assert_twins(name, class_score(pred), pred, score_threshold=0.05, max_detections=40)
    assert ((found.prior < 100) & found.valid).sum(1).tolist() == [2] * BATCH  # one a class
    assert found.valid.sum() > 30


@EVERY_SELECTOR
@pytest.mark.parametrize("scorer", ["sigmoid", "fused"])
def test_image_without_candidates_beside_another(name, scorer, first_try):
    pred = raw()
    pred.logits[1] = -torch.inf
    found = assert_twins(name, SCORERS[scorer](pred), pred)
    assert found.valid.any(1).tolist() == [True, False, True, True]
    assert found.labels[1].eq(BACKGROUND).all()


@EVERY_SELECTOR
def test_nothing_at_all(name):
    pred = raw(shift=-40.0)
    found = assert_twins(name, class_score(pred), pred)
    assert not found.valid.any()


@EVERY_SELECTOR
def test_a_score_that_is_not_a_number_costs_only_itself(name, first_try):
    pred = raw()
    pred.logits[0, :3] = torch.nan
    pred.logits[1, ::7, 2] = torch.nan
    found = assert_twins(name, class_score(pred), pred, candidates=25)
    assert found.scores.isfinite().all()
    assert found.valid.any(1).all()


@EVERY_SELECTOR
def test_boxes_of_one_pixel_and_of_none(name):
    pred = raw()
    pred.boxes[:, ::3, 2:] = pred.boxes[:, ::3, :2] + 1
    pred.boxes[:, ::5, 2:] = pred.boxes[:, ::5, :2]
    assert assert_twins(name, class_score(pred), pred).valid.any()


@EVERY_SELECTOR
def test_scores_that_do_not_wait_are_read_too(name, first_try):
    pred = raw()
    ranking, classes = torch.rand(2, BATCH, sum(COUNTS), 4)
    plain = Scores(ranking, classes, torch.rand(BATCH, sum(COUNTS)))  # ranked by something else than the class
    for on in ("ranking", "classes"):
        assert assert_twins(name, plain, pred, candidates=50, threshold_on=on, score_threshold=0.3).valid.any()


@EVERY_SELECTOR
def test_only_the_best_are_scored(name):
    read = []

    @by_rows()
    def counting(pred):
        read.append(tuple(pred.logits.shape))
        return Scores(pred.logits.sigmoid(), pred.logits.sigmoid())

    pred = raw(batch=2, counts=(20_000, 5_000))
    found = SELECTORS[name](counting(pred), pred, sizes_of(pred), score_threshold=0.0, max_detections=20)
    assert found.valid.all()
    assert read[:2] == [(2, 0, 4), (2, 25_000, 1)]  # tried on nobody, then the best class of everybody
    assert len(read) == 4  # then once an image
    assert all(rows == suppression._ROWS for _, rows, _ in read[2:])


@EVERY_SCORER
def test_bound_is_never_below_a_score(scorer):
    scores = SCORERS[scorer](raw(dtype=torch.bfloat16, spread=4.0))
    bound = scores.bound()
    assert bound.ranking.shape == (BATCH, sum(COUNTS), 1)
    for mine, every in ((bound.ranking, scores.ranking), (bound.classes, scores.classes)):
        assert (mine[..., 0] >= every.amax(-1) * (1 - 1e-6)).all()
    if scorer in ("sigmoid", "fused", "filtered"):
        assert_close(bound.ranking[..., 0], scores.ranking.amax(-1), rtol=1e-6, atol=0)


@EVERY_SCORER
def test_scores_of_some_priors_are_those_of_all(scorer):
    pred = raw()
    image, prior = torch.randint(0, BATCH, (2, 32)), torch.randint(0, sum(COUNTS), (2, 32))
    some, every = SCORERS[scorer](pred).of(image, prior), SCORERS[scorer](pred)
    assert some.ranking.equal(every.ranking[image, prior])
    assert some.classes.equal(every.classes[image, prior])
    assert (some.quality is None) == (every.quality is None)
    assert some.quality is None or some.quality.equal(every.quality[image, prior])


@EVERY_SELECTOR
def test_replaced_scores_are_those_given(name, first_try):
    pred = raw()
    waiting = fused_score(pred)
    assert isinstance(waiting, RowScores)
    by_class = dataclasses.replace(waiting, ranking=waiting.classes)
    found = assert_twins(name, by_class, pred)
    assert found.scores.equal(assert_twins(name, class_score(pred), pred).scores)
    assert not found.scores.equal(assert_twins(name, waiting, pred).scores)
    assert by_class.bound().ranking.equal(waiting.classes.amax(-1, keepdim=True))


@EVERY_NETWORK
def test_every_detector_detects_the_same_with_and_without(name):
    detector = redraw(small(name)).eval()
    images, sizes = torch.rand(2, 3, 128, 128), torch.tensor([[128, 128], [100, 90]])
    found = detector.detect(images, sizes)
    with disable():
        plain = detector.detect(images, sizes)
    assert found.valid.any()
    assert found.labels.equal(plain.labels)
    assert found.prior.equal(plain.prior)
    assert_close(found.scores, plain.scores, rtol=1e-6, atol=0)
    assert found.boxes.equal(plain.boxes)


def test_a_wrong_option_of_a_waiting_score_is_refused_at_once():
    with pytest.raises(KeyError, match="extra map 'nothing'"):
        fused_score(raw(), quality="nothing")


@EVERY_SELECTOR
def test_gradients_are_left_to_the_plain_form(name):
    pred = raw()
    boxes = pred.boxes.clone().requires_grad_()
    with_gradient = dataclasses.replace(pred, boxes=boxes)
    assert not suppression.applies(class_score(with_gradient), with_gradient, sizes_of(pred))
    SELECTORS[name](class_score(with_gradient), with_gradient, sizes_of(pred)).boxes.sum().backward()
    assert boxes.grad.abs().sum() > 0


@EVERY_SELECTOR
def test_second_best_class_of_a_good_prior_waits_for_other_priors(name, monkeypatch):
    # four priors are tried first; their second classes would fill the slots of the next four priors
    monkeypatch.setattr(suppression, "_ROWS", 4)
    pred = raw(batch=1, classes=2, counts=(8,))
    left = torch.arange(8.0)[:, None] * 20
    pred.boxes[0] = torch.cat([left, torch.zeros(8, 1), left + 10, torch.full((8, 1), 10.0)], dim=-1)
    pred.logits[0] = torch.tensor([[3.0, -2.0]] * 4 + [[1.0, -9.0]] * 4)
    found = assert_twins(name, class_score(pred), pred, score_threshold=0.0, max_detections=8)
    assert found.prior[0].tolist() == list(range(8))


@EVERY_SELECTOR
def test_candidates_are_counted_among_the_first_tried(name, monkeypatch):
    # three of one group are better than the fourth, which is not wanted any more; the fifth is of another group
    monkeypatch.setattr(suppression, "_ROWS", 5)
    pred = raw(batch=1, classes=2, counts=(4, 6))
    left = torch.arange(10.0)[:, None] * 15
    pred.boxes[0] = torch.cat([left, torch.zeros(10, 1), left + 10, torch.full((10, 1), 10.0)], dim=-1)
    pred.logits[0] = -9.0
    pred.logits[0, :4, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    pred.logits[0, 4:, 1] = torch.linspace(0.5, -1.0, 6)
    found = assert_twins(name, class_score(pred), pred, candidates=3, max_detections=4)
    assert found.prior[0].tolist() == [0, 1, 2, 4]
