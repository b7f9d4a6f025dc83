"""The score-fusion laboratory: its file is what the recipe says, and what its page says of it holds."""

from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from detcore.data import Scenes
from detcore.evaluation import CocoEvaluator, correlate, suppress, with_true_iou
from detcore.evaluation.matching import best_matches
from detcore.evaluation.pooling import pool_detections, pool_targets
from detcore.postprocess import select_by_prior
from detcore.scoring import fuse, fused_score
from detcore.stored import load_outputs

FILE = Path(__file__).parent.parent / "results/fusion_lab.npz"


@cache
def lab():
    return load_outputs(FILE)


def detect(u, v, threshold=0.05, nms_iou=0.5, **options):
    score = partial(fused_score, quality="confidence", class_power=u, quality_power=v)
    return lab().detect(score, partial(select_by_prior, score_threshold=threshold, nms_iou=nms_iou, **options))


def evaluate(found):
    evaluator = CocoEvaluator(len(lab().about["classes"]), by_size=False)
    evaluator.update(found, lab().targets)
    return evaluator.compute()


@cache
def precision(u, v, threshold=0.05, nms_iou=0.5):
    return evaluate(detect(u, v, threshold, nms_iou))


# --- the file


def test_the_file_is_small_and_says_where_it_came_from():
    assert FILE.stat().st_size < 400_000
    about = lab().about
    made = about["provenance"]
    assert made["command"] == "python -m recipes.fusion_lab"
    assert made["commit"]
    assert not made["commit"].endswith("+")
    assert {"date", "device", "torch", "threads"} <= set(made)
    assert about["training_seconds"] > 60
    assert about["settings"] == {
        "epochs": 24, "images": 2000, "size": 96, "noise": 0.1, "batch_size": 16, "lr": 0.002, "anchor_base": 1.5,
        "variant": "conf", "seed": 0, "stored_images": 200, "floor": 0.05,
    }  # fmt: skip


def test_the_objects_are_those_of_the_pictures_it_names():
    scenes = Scenes(**lab().about["pictures"])
    assert len(lab().targets) == len(scenes) == len(lab().sizes) == 200
    for i in (0, 17, 199):
        stored, real = lab().targets[i], scenes.target(i)
        assert stored["boxes"].equal(real["boxes"].as_subclass(torch.Tensor))
        assert stored["labels"].equal(real["labels"])
        assert stored["ignore"].equal(real["ignore"])


def test_every_stored_pair_is_above_the_floor():
    logits = lab().pred.logits
    pairs = logits[logits.isfinite()].sigmoid()
    assert len(pairs) > 10_000
    assert pairs.min() > lab().about["settings"]["floor"] - 1e-4


def test_the_file_gives_the_detectors_own_numbers():
    rows = lab().about["detector_says"]
    assert {row["threshold_on"] for row in rows} == {"classes", "ranking"}
    for row in rows[:-1]:
        # what is stored has p > 0.05: a cut there is in the file already
        threshold = 0.0 if row["threshold_on"] == "classes" else row["score_threshold"]
        found = detect(row["class_power"], row["quality_power"], threshold, row["nms_iou"])
        assert sum(len(each["labels"]) for each in found) == pytest.approx(row["boxes"], rel=2e-3)
        ours = evaluate(found)
        for name in ("AP", "AP50", "AP75", "AP90"):
            # one prior in 25 ties with another once logits come in steps of 1/1024, and then the earlier one goes first
            assert ours[name] == pytest.approx(row[name], abs=2e-3), (row, name)


def test_what_the_floor_leaves_out_of_the_default_detector_is_little():
    row = lab().about["detector_says"][-1]
    assert (row["class_power"], row["threshold_on"], row["score_threshold"]) == (0.6, "ranking", 0.05)
    found = detect(0.6, 0.4)
    assert sum(len(each["labels"]) for each in found) < 0.6 * row["boxes"]
    assert abs(evaluate(found)["AP"] - row["AP"]) < 1e-3


# --- what holds by arithmetic


@pytest.mark.parametrize("threshold", [0.05, 0.3])
def test_root_and_product_keep_the_same_boxes_with_the_threshold_mapped(threshold):
    root, product = detect(0.5, 0.5, threshold), detect(1.0, 1.0, threshold**2)
    for a, b in zip(root, product, strict=True):
        assert a["labels"].equal(b["labels"])
        assert a["boxes"].equal(b["boxes"])
    assert sum(len(a["labels"]) for a in root) > sum(len(a["labels"]) for a in detect(1.0, 1.0, threshold))


def test_a_ray_of_exponents_has_one_precision_without_threshold_and_several_with():
    ray = [(0.2, 0.2), (0.6, 0.6), (1.0, 1.0)]
    free = [precision(u, v, 0.0)["AP"] for u, v in ray]
    cut = [precision(u, v, 0.3)["AP"] for u, v in ray]
    assert np.ptp(free) < 1e-6  # float32 may swap boxes whose scores agree to seven digits
    assert cut[0] > cut[1] + 0.003
    assert cut[1] > cut[2] + 0.03


# --- what the page says of this detector


def test_the_oracle_is_above_the_fused_score_at_every_setting():
    # corners and the middle of the page's grid; the page itself asserts the rest when it is built
    for u, v, threshold, nms_iou in ((0.6, 0.4, 0.05, 0.5), (1.0, 0.0, 0.05, 0.8), (0.6, 0.4, 0.45, 0.3)):
        fused, judged = (
            precision(u, v, threshold, nms_iou),
            evaluate(with_true_iou(detect(u, v, threshold, nms_iou), lab().targets)),
        )
        assert judged["AP"] > fused["AP"], (u, v, threshold, nms_iou)
        assert judged["AP75"] > fused["AP75"], (u, v, threshold, nms_iou)


def test_judging_before_suppression_is_worth_more_than_after():
    everything = detect(1.0, 0.0, 0.0, None, max_detections=2000)
    assert max(len(each["labels"]) for each in everything) < 2000  # none was left out
    ranked = with_true_iou(everything, lab().targets)
    before = evaluate(suppress(ranked))
    after = evaluate(with_true_iou(detect(0.6, 0.4), lab().targets))
    assert before["AP"] > after["AP"] + 0.1


def test_a_threshold_does_not_raise_precision():
    for nms_iou in (0.5, 0.8):
        values = [precision(0.6, 0.4, t, nms_iou)["AP"] for t in (0.05, 0.2, 0.45)]
        assert all(b <= a + 1e-6 for a, b in pairwise(values)), values


def test_a_mixture_beats_both_ends_a_little():
    alone, mixed, mostly_quality = (precision(u, v)["AP"] for u, v in ((1.0, 0.0), (0.6, 0.4), (0.1, 0.9)))
    assert 0.002 < mixed - alone < 0.01
    assert mixed - mostly_quality > 0.015


def test_the_top_is_a_plateau():
    numbers = [precision(u, round(1 - u, 1))["AP"] for u in (0.7, 0.4, 0.3)]
    assert np.ptp(numbers) < 0.005
    assert max(numbers) == numbers[1]


def test_stricter_evaluation_wants_more_lenient_suppression():
    grid = {k: precision(0.6, 0.4, 0.05, k) for k in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)}
    best = {name: max(grid, key=lambda k: grid[k][name]) for name in ("AP50", "AP75")}
    assert best == {"AP50": 0.4, "AP75": 0.7}


def test_at_its_lowest_stop_the_threshold_cuts_nothing_and_quality_exceeds_the_class_score():
    pred = lab().pred
    used = pred.logits.isfinite()
    quality = pred.extras["confidence"].sigmoid().expand_as(pred.logits)[used]
    classes = pred.logits[used].sigmoid()
    assert (quality > classes).double().mean() > 0.999
    assert (quality > 0.6).double().mean() > 0.95
    assert (classes**0.6 * quality**0.4 > 0.05).all()


def test_correlation_is_best_at_small_class_exponents_on_objects_and_at_large_ones_elsewhere():
    truth = pool_targets(lab().targets)
    everywhere, on_object = {}, {}
    for u in (0.0, 0.2, 1.0):
        found = pool_detections(detect(u, 1 - u, 0.0))
        reached = best_matches(found, truth).iou
        on = reached >= 0.5
        everywhere[u] = correlate(found.scores, reached, found.image, bootstrap=0).spearman
        on_object[u] = correlate(found.scores[on], reached[on], found.image[on], bootstrap=0).spearman
    assert max(everywhere, key=everywhere.get) == 1.0
    assert max(on_object, key=on_object.get) == 0.2


def test_a_perfect_quality_gains_less_than_a_judge_who_knows_the_class():
    everything = detect(1.0, 0.0, 0.0, None, max_detections=2000)
    fits = with_true_iou(everything, lab().targets, class_aware=False)
    gains = {}
    for u in (0.6, 0.2):
        scored = [
            {**box, "scores": fuse(box["class_scores"].double(), t["scores"], class_power=u, quality_power=1 - u)}
            for box, t in zip(everything, fits, strict=True)
        ]
        gains[u] = evaluate(suppress(scored))["AP"]
    judged = evaluate(with_true_iou(detect(0.6, 0.4), lab().targets))["AP"]
    assert precision(0.6, 0.4)["AP"] + 0.03 < gains[0.6] < gains[0.2] < judged - 0.1
