from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from detcore.coders import DeltaCoder
from detcore.scoring import class_score, conf_powers, fuse, fused_score, iou_aware_powers
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
        (lambda: fused_score(predictions(), quality="cc"), KeyError, r"must have the extra map 'cc'; it has \['iou'\]"),
    ],
)
def test_scoring_names_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()
