import dataclasses
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from detcore.coders import DeltaCoder
from detcore.postprocess import select_by_pair, select_by_prior
from detcore.scoring import class_score, conf_powers, fuse, fused_score, iou_aware_powers, softmax_score
from detcore.structures import Predictions, Priors
from tests.samples import FAST, some_predictions, some_priors

share = st.floats(0, 1)
inside = st.floats(0.001, 0.999)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def fuse_001(p, q, alpha):
    class_power, quality_power = iou_aware_powers(alpha)
    return fuse(p, q, class_power=class_power, quality_power=quality_power)


def fuse_003(p, q, alpha):
    class_power, quality_power = conf_powers(alpha)
    return fuse(p, q, class_power=class_power, quality_power=quality_power)


def predictions():
    return some_predictions(some_priors(12), 2, 3, DeltaCoder())


def test_fuse_by_hand():
    p, q = scalar(0.2), scalar(0.9)
    assert_close(fuse_001(p, q, 0.4).item(), 0.493, rtol=0, atol=5e-4)  # .2^.4 * .9^.6
    assert_close(fuse_003(p, q, 0.4).item(), 0.365, rtol=0, atol=5e-4)  # .9^.4 * .2^.6
    assert_close(fuse(scalar(0.25), scalar(0.04), class_power=0.5, quality_power=0.5).item(), 0.1)
    assert_close(fuse(scalar(0.5), scalar(0.5), class_power=2.0, quality_power=1.0).item(), 0.125)


@FAST
@given(share, share, share)
def test_the_papers_alphas_are_each_others_complement(p, q, alpha):
    assert_close(
        fuse_001(scalar(p), scalar(q), alpha), fuse_003(scalar(p), scalar(q), 1 - alpha), rtol=1e-9, atol=1e-12
    )


@FAST
@given(share)
def test_powers_of_the_papers_are_each_others_mirror(alpha):
    assert conf_powers(alpha) == iou_aware_powers(alpha)[::-1]
    assert conf_powers(alpha) == pytest.approx(iou_aware_powers(1 - alpha), abs=1e-12)
    assert sum(conf_powers(alpha)) == pytest.approx(1)


@FAST
@given(share, share)
def test_endpoints_give_a_factor_exactly(p, q):
    p, q = scalar(p), scalar(q)
    assert fuse_001(p, q, 1.0) == p
    assert fuse_001(p, q, 0.0) == q
    assert fuse_003(p, q, 0.0) == p
    assert fuse_003(p, q, 1.0) == q


@FAST
@given(inside, inside, share)
def test_fused_score_lies_between_its_factors(p, q, alpha):
    fused = fuse_001(scalar(p), scalar(q), alpha)
    assert min(p, q) - 1e-12 <= fused <= max(p, q) + 1e-12


@FAST
@given(inside, inside, inside, inside)
def test_equal_powers_rank_like_the_product(p1, q1, p2, q2):
    root = [fuse_001(scalar(p), scalar(q), 0.5) for p, q in ((p1, q1), (p2, q2))]
    product = [fuse(scalar(p), scalar(q), class_power=1.0, quality_power=1.0) for p, q in ((p1, q1), (p2, q2))]
    if abs(product[0] - product[1]) > 1e-12:
        assert (root[0] > root[1]) == (product[0] > product[1])


def test_class_score_is_a_sigmoid_a_class():
    pred = predictions()
    scores = class_score(pred)
    assert_close(scores.ranking, pred.logits.sigmoid(), rtol=0, atol=0)
    assert scores.classes is scores.ranking
    assert scores.quality is None


def test_softmax_score_leaves_background_out():
    # odds 6 : 3 : 1, background last
    box = torch.tensor([[[0.0, 0, 8, 8]]])
    logits = torch.tensor([[[6.0, 3.0, 1.0]]]).log()
    pred = Predictions(logits, box, box, Priors(box, (1,)))
    scores = softmax_score(pred)
    assert_close(scores.ranking, torch.tensor([[[0.6, 0.3]]]))
    assert scores.classes is scores.ranking
    narrow = softmax_score(dataclasses.replace(pred, logits=logits.bfloat16()))
    assert narrow.ranking.dtype == torch.float32


@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.5, 1.0])
def test_fused_score_shares_one_quality_among_the_classes(alpha):
    pred = predictions()
    u, v = iou_aware_powers(alpha)
    scores = fused_score(pred, class_power=u, quality_power=v)
    for b, n, c in [(0, 0, 0), (1, 11, 2), (0, 5, 1)]:
        p, q = pred.logits[b, n, c].sigmoid(), pred.extras["iou"][b, n, 0].sigmoid()
        assert_close(scores.ranking[b, n, c], p**alpha * q ** (1 - alpha), rtol=1e-12, atol=0)
    assert_close(scores.classes, pred.logits.sigmoid(), rtol=0, atol=0)
    assert_close(scores.quality, pred.extras["iou"][..., 0].sigmoid(), rtol=0, atol=0)


def test_fused_score_at_alpha_one_is_the_class_score():
    pred = predictions()
    u, v = iou_aware_powers(1.0)
    assert fused_score(pred, class_power=u, quality_power=v).ranking.equal(class_score(pred).ranking)


def test_quality_alone_ties_all_classes_of_a_box():
    u, v = iou_aware_powers(0.0)
    ranking = fused_score(predictions(), class_power=u, quality_power=v).ranking
    assert ranking.std(dim=-1).max() == 0


@pytest.mark.parametrize("score", [class_score, partial(fused_score, class_power=0.5, quality_power=0.5)])
def test_scores_of_short_floats_are_computed_in_float32(score):
    # bfloat16 has 8 bits: 1000 candidates would share some 50 scores near 1
    pred = predictions()
    pred.logits.copy_(pred.logits.bfloat16())
    short = type(pred)(
        pred.logits.bfloat16(), pred.deltas, pred.boxes, pred.priors, {"iou": pred.extras["iou"].bfloat16()}
    )
    assert score(short).ranking.dtype == torch.float32
    assert_close(score(short).classes.double(), pred.logits.sigmoid(), rtol=1e-5, atol=1e-6)


# --- the scores of RetinaNet-Conf's Table 4


def hand_made(classes, quality, counts, *, name="iou"):
    """Predictions of one picture and disjoint boxes: (N, C) class scores, N qualities."""
    classes, quality = torch.tensor([classes]).double(), torch.tensor([quality]).double()
    left = torch.arange(classes.shape[1]).double() * 20
    boxes = torch.stack([left, torch.zeros_like(left), left + 10, torch.full_like(left, 10)], dim=-1)[None]
    priors = Priors(boxes, counts)
    return Predictions(classes.logit(), torch.zeros_like(boxes), boxes, priors, {name: quality.logit()[..., None]})


def detect(pred, score, select=select_by_prior, **options):
    sizes = torch.full((len(pred.logits), 2), 10_000)
    return select(score(pred), pred, sizes, **options)


# p = (.2, .6; .5, .1), q = (.9, .4): .6 of cls and .4 of the confidence, as alpha = .4
ROWS = {
    "cls": (1.0, 0.0, None, [[0.2, 0.6], [0.5, 0.1]]),
    "cls, filtered": (1.0, 0.0, 0.5, [[0.2, 0.6], [0.0, 0.0]]),
    "product": (1.0, 1.0, None, [[0.18, 0.54], [0.2, 0.04]]),
    "product, filtered": (1.0, 1.0, 0.5, [[0.18, 0.54], [0.0, 0.0]]),
    "alpha, filtered": (0.6, 0.4, 0.5, [[0.365020, 0.705647], [0.0, 0.0]]),
    "alpha": (0.6, 0.4, None, [[0.365020, 0.705647], [0.457305, 0.174110]]),
}


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_table_4_by_hand(row):
    u, v, least, expected = ROWS[row]
    pred = hand_made([[0.2, 0.6], [0.5, 0.1]], [0.9, 0.4], (2,))
    scores = fused_score(pred, class_power=u, quality_power=v, min_quality=least)
    assert_close(scores.ranking[0], torch.tensor(expected).double(), rtol=1e-5, atol=1e-12)
    kept = [[0.2, 0.6], [0.5, 0.1] if least is None else [0.0, 0.0]]
    assert_close(scores.classes[0], torch.tensor(kept).double())
    assert_close(scores.quality[0], torch.tensor([0.9, 0.4]).double())


def test_filter_keeps_what_is_above_it_only():
    pred = hand_made([[0.5]] * 3, [0.5, 0.499999, 0.500001], (3,))
    pred.extras["iou"][0, 0] = 0.0  # sigmoid(0) is .5 to the last bit
    ranking = fused_score(pred, min_quality=0.5).ranking[0, :, 0]
    assert (ranking > 0).tolist() == [False, False, True]


@pytest.mark.parametrize("select", [select_by_prior, select_by_pair])
@pytest.mark.parametrize("powers", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.5)])
@pytest.mark.parametrize("threshold_on", ["ranking", "classes"])
def test_filter_acts_before_candidates_are_chosen(select, powers, threshold_on):
    # one candidate: the first prior has the highest score and too little quality, and would leave nothing behind it
    pred = hand_made([[0.99], [0.6]], [0.45, 0.55], (2,))
    u, v = powers
    options = {"candidates": 1, "threshold_on": threshold_on}
    found = detect(pred, partial(fused_score, class_power=u, quality_power=v, min_quality=0.5), select, **options)
    assert found.prior[found.valid].tolist() == [1]
    if u and u > v:
        found = detect(pred, partial(fused_score, class_power=u, quality_power=v), select, **options)
        assert found.prior[found.valid].tolist() == [0]


@pytest.mark.parametrize("select", [select_by_prior, select_by_pair])
def test_no_threshold_lets_filtered_boxes_through(select):
    pred = hand_made([[0.99, 0.9], [0.6, 0.7]], [0.45, 0.55], (2,))
    found = detect(pred, partial(fused_score, class_power=0.0, quality_power=0.0, min_quality=0.5), select,
                   score_threshold=0.0)  # fmt: skip
    assert found.prior[found.valid].tolist() == [1, 1]


@pytest.mark.parametrize("select", [select_by_prior, select_by_pair])
def test_scores_are_fused_on_small_levels_too(select):
    # dense.md 8: RetinaNet-Conf's released code leaves cls^.6 = .486 where a level has fewer anchors than candidates
    pred = hand_made([[0.3]] * 8, [0.6] * 8, (5, 2, 1))
    u, v = conf_powers(0.4)
    found = detect(pred, partial(fused_score, class_power=u, quality_power=v), select, candidates=3)
    assert sorted(found.prior[found.valid].tolist())[-3:] == [5, 6, 7]  # both small levels, whole
    assert found.valid.sum() == 3 + 2 + 1
    assert_close(found.scores[found.valid], torch.full((6,), 0.396).double(), rtol=0, atol=5e-4)
    assert_close(0.3**0.6, 0.486, rtol=0, atol=5e-4)  # what it would be there


def crowded():
    """400 boxes of all sizes in one picture, of three classes: many overlap."""
    priors = some_priors(400)
    return some_predictions(priors, 2, 3, DeltaCoder(), spread=0.05)


@pytest.mark.parametrize("select", [select_by_prior, select_by_pair])
def test_root_and_product_give_the_same_detections_at_the_mapped_threshold(select):
    # .05 on the root is .0025 on the product
    pred = crowded()
    root, product = (partial(fused_score, class_power=x, quality_power=x) for x in (0.5, 1.0))
    options = {"candidates": 50, "max_detections": 60}
    a = detect(pred, root, select, score_threshold=0.05, **options)
    b = detect(pred, product, select, score_threshold=0.0025, **options)
    assert a.valid.sum() > 50
    for name in ("boxes", "labels", "valid", "prior", "class_scores", "quality"):
        assert getattr(a, name).equal(getattr(b, name)), name
    assert_close(a.scores**2, b.scores, rtol=1e-9, atol=0)


def test_root_and_product_differ_at_one_threshold():
    pred = crowded()
    root, product = (partial(fused_score, class_power=x, quality_power=x) for x in (0.5, 1.0))
    a, b = (detect(pred, score, nms_iou=None, max_detections=2400).valid.sum() for score in (root, product))
    assert a > 1.05 * b


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: iou_aware_powers(1.5), ValueError, r"iou_aware_powers: alpha must be in \[0, 1\]; got 1.5"),
        (lambda: conf_powers(-0.5), ValueError, r"conf_powers: alpha must be in \[0, 1\]; got -0.5"),
        (
            lambda: fuse(scalar(0.5), scalar(0.5), class_power=-1.0, quality_power=0.5),
            ValueError,
            "powers must be >= 0; got class_power=-1.0, quality_power=0.5",
        ),
        (
            lambda: fused_score(predictions(), min_quality=1.5),
            ValueError,
            r"fused_score: min_quality must be None or in \[0, 1\]; got 1.5",
        ),
        (lambda: fused_score(predictions(), quality_power=-0.5), ValueError, "powers must be >= 0; .*-0.5"),
        (lambda: fused_score(predictions(), quality="cc"), KeyError, r"must have the extra map 'cc'; it has \['iou'\]"),
    ],
)
def test_scoring_names_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()
