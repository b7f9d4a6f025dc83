"""The numbers that the chapter on RetinaNet states, made by the chapter's own cells."""

import functools
import json
import pathlib

import pytest
import torch
from torch.testing import assert_close

from detcore.losses import sigmoid_focal_loss

NOTEBOOK = pathlib.Path(__file__).parents[1] / "notebooks" / "retinanet.ipynb"
# what the chapter has imported by the time of these cells
IMPORTS = """
import statistics
import torch
from detcore.boxes import pairwise_iou
from detcore.losses import sigmoid_focal_loss
"""


@functools.cache
def sources():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}


@functools.cache
def chapter(*names):
    """What the cells of these names define."""
    scope = {}
    for text in (IMPORTS, *(sources()[name] for name in names)):
        exec(text, scope)  # the book's own code
    return scope


def test_start_loss_with_and_without_the_prior_probability():
    cells = chapter("count-priors", "start-loss")
    assert cells["priors"] == 116_712
    setting = {"priors": cells["priors"], "classes": 80, "positives": 100}
    noes, yes, loss = cells["start_loss"](cells["prior_probability_bias"](0.01), **setting)
    assert_close([noes, yes, loss], [7.04, 1.128, 1.199], rtol=0, atol=5e-3)
    assert_close(cells["start_loss"](0.0, **setting)[2], 12_135.0, rtol=0, atol=1.0)


def test_pulls_balance_at_alpha_without_focus_and_at_two_fifths_with_it():
    balance = chapter("focal-figure")["balance"]
    assert_close([balance(0.25, 0.0), balance(0.25, 2.0), balance(0.25, 5.0)], [0.25, 0.40, 0.45], rtol=0, atol=0.005)
    assert_close([balance(0.5, gamma) for gamma in (0.0, 2.0, 5.0)], [0.5] * 3, rtol=0, atol=0.005)


def test_printed_drops_belong_to_the_second_image():
    # Erratum: "drops 31.5% in Image1".
    drops = chapter("paper-table")["drops"]
    iou, score = drops("IoU"), drops("score")
    assert_close(iou[:2].tolist(), [11.34, 31.50], rtol=0, atol=0.005)
    assert iou.argmax() == 5
    assert_close([iou[5].item(), iou.mean().item(), score.mean().item()], [39.84, 19.52, 1.09], rtol=0, atol=0.005)
    assert (iou > 0).all()  # the observation itself is right


@pytest.mark.parametrize(
    ("size", "priors"),
    [((608, 608), 69_354), ((640, 640), 76_725), ((640, 768), 92_070), ((384, 1280), 92_070)],
)
def test_printed_prior_counts_are_those_of_pictures_padded_to_640(size, priors):
    assert chapter("count-priors")["count_priors"](*size) == priors


@pytest.mark.parametrize("scattered", [250, 1000, 2000])
def test_share_of_good_boxes_falls_most_under_the_perfect_score(scattered):
    # Erratum: "the fall of the IoU > .5 share shows that NMS hurts localisation".
    cells = chapter("crowd", "under-nms")
    shares, best = {}, {}
    for ranking in cells["RANKINGS"]:
        shares[ranking], best[ranking] = cells["under_nms"](scattered, ranking)
    before, after = best["true IoU"]
    assert_close(after, before, rtol=0, atol=0)  # nothing is lost ...
    falls = {ranking: share[0] - share[1] for ranking, share in shares.items()}
    for worse in ("a coin", "true IoU reversed"):
        assert (best[worse][1] < best[worse][0]).all()  # ... where these lose every best box ...
        assert falls["true IoU"] > falls[worse] > 0  # ... and the share falls most where nothing is lost


def test_share_of_good_boxes_by_the_numbers():
    under_nms = chapter("crowd", "under-nms")["under_nms"]
    assert_close(under_nms(1000, "true IoU")[0], [0.485, 0.015], rtol=0, atol=0.002)
    assert_close(under_nms(1000, "true IoU reversed")[0], [0.485, 0.038], rtol=0, atol=0.002)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [0.1, 0.25, 0.5])
def test_score_of_one_half_means_one_minus_alpha(alpha, gamma):
    best_score = chapter("expected-loss")["best_score"]
    assert_close(best_score(1 - alpha, alpha=alpha, gamma=gamma), 0.5, rtol=0, atol=2e-3)


def test_best_scores_by_the_numbers():
    best_score = chapter("expected-loss")["best_score"]
    assert_close([best_score(t) for t in (0.5, 0.75, 0.9, 0.95)], [0.40, 0.50, 0.60, 0.67], rtol=0, atol=0.005)
    assert_close(best_score(0.9, alpha=0.5, gamma=0.0), 0.9, rtol=0, atol=1e-3)  # cross-entropy is calibrated


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 1.0), (0.9, 3.0)])
def test_curve_of_posteriors_undoes_the_best_score(alpha, gamma):
    cells = chapter("focal-figure", "expected-loss", "posterior")
    curve = cells["posterior"](alpha=alpha, gamma=gamma)
    assert (curve.diff() > 0).all()  # rising: reading the posterior off the score changes no order
    for k in (100, 200, 300):
        found = cells["best_score"](curve[k].item(), alpha=alpha, gamma=gamma)
        assert_close(found, cells["p"][k].item(), rtol=0, atol=1e-3)


def test_easy_and_hard():
    logits = torch.logit(torch.tensor([0.01, 0.9], dtype=torch.float64))
    sides = torch.tensor([False, False])
    easy, hard = sigmoid_focal_loss(logits, sides)
    # .75 * .9^2 * -ln .1 over .75 * .01^2 * -ln .99
    assert_close((hard / easy).item(), 1_855_752.0, rtol=1e-3, atol=0)


def test_verdict_needs_seeds_and_two_standard_deviations():
    verdict = chapter("verdict")["verdict"]
    assert "too few" in verdict([0.3, 0.3])
    assert verdict([0.30, 0.31, 0.29]) == "holds"
    assert verdict([-0.30, -0.31, -0.29]) == "does not hold"
    assert "not distinguishable" in verdict([0.01, -0.02, 0.02])


def test_scores_and_ious_of_the_recipe_are_positively_correlated():
    # Erratum: "no positive correlation".
    path = NOTEBOOK.parents[1] / "results" / "iou_aware_scenes.json"
    runs = [run for run in json.loads(path.read_text())["runs"] if run["variant"] == "retinanet"]
    assert runs
    for run in runs:
        for boxes in ("scores, all boxes", "scores, IoU >= 0.5", "scores, before NMS"):
            found = run["misalignment"]["correlations"][boxes]
            assert min(found[name] for name in ("pearson", "spearman", "kendall")) > 0
