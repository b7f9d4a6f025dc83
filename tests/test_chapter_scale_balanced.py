"""What the chapter on the scale-balanced loss says of the paper, number by number."""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from detcore.boxes import pairwise_iou
from detcore.default_boxes import LAYOUTS, DefaultBoxGenerator
from detcore.losses.scale_balanced import scale_balanced_weight
from detcore.models import get_model
from detcore.models.scale_balanced import scale_balanced
from detcore.ssd_assigner import num_matched, ssd_assign
from detcore.structures import Targets, pad_targets

ROOT = Path(__file__).parents[1]
SIZES = ("small", "medium", "large")
THRESHOLDS = (0.01, 0.1, 0.3)
TABLE_1 = {"const": 77.2, "inv_log": 77.8, "inv_sqrt": 78.1, "inv": 76.8, "scb": 78.2}
TABLE_2 = {"SSD300": (77.2, 78.2), "FSSD300": (78.8, 79.5), "RefineDet320": (80.0, 80.4)}
# Tables 3 and 4: recall on VOC by threshold, small, medium, large, without and with
VOC_RECALL = {
    "SSD300": (
        ((73.06, 92.29, 96.57), (80.03, 92.76, 96.25)),
        ((43.02, 78.94, 91.89), (61.43, 83.11, 91.91)),
        ((17.44, 62.65, 87.90), (42.83, 69.81, 88.21)),
    ),
    "FSSD300": (
        ((69.57, 89.17, 95.55), (78.88, 90.24, 95.82)),
        ((41.08, 77.39, 90.83), (60.27, 79.67, 91.30)),
        ((18.99, 67.26, 87.74), (40.69, 71.02, 88.20)),
    ),
}
# Table 5: AP, AP_S, AP_M, AP_L, AR_S, AR_M, AR_L on COCO
TABLE_5 = {
    "SSD300": ((25.1, 6.6, 25.9, 41.4, 11.2, 40.4, 58.4), (26.6, 8.3, 28.1, 40.8, 13.7, 41.5, 56.9)),
    "FSSD300": ((27.1, 8.7, 29.2, 42.2, 15.9, 44.2, 58.6), (29.3, 11.5, 31.1, 42.5, 19.2, 45.9, 57.9)),
    "DSSD321": ((28.0, 7.4, 28.1, 47.6, 12.7, 42.0, 62.6), (29.5, 10.5, 30.0, 47.6, 16.2, 43.1, 61.9)),
    "SSD512": ((28.8, 10.9, 31.8, 43.5, 16.5, 46.6, 60.8), (30.4, 13.0, 34.5, 42.3, 17.7, 48.6, 58.6)),
    "FSSD512": ((31.8, 14.2, 35.1, 45.0, 22.3, 49.9, 62.0), (33.3, 17.9, 35.2, 43.8, 27.7, 49.7, 59.6)),
    "DSSD513": ((33.2, 13.0, 35.4, 51.1, 21.8, 49.1, 66.4), (34.4, 16.5, 35.7, 49.9, 26.6, 49.2, 64.7)),
}
# Tables 6 to 9: recall on COCO
COCO_RECALL = {
    "SSD300": (
        ((38.93, 83.40, 95.20), (46.42, 84.66, 95.17)),
        ((27.32, 71.75, 88.90), (41.39, 79.71, 91.09)),
        ((8.40, 45.27, 78.34), (22.52, 58.91, 81.50)),
    ),
    "SSD512": (
        ((47.30, 88.47, 95.55), (56.25, 89.17, 95.36)),
        ((34.13, 79.06, 90.36), (47.50, 82.64, 90.35)),
        ((11.65, 54.54, 81.30), (22.68, 61.12, 79.51)),
    ),
    "FSSD300": (
        ((46.52, 85.85, 94.59), (51.69, 86.67, 95.02)),
        ((35.26, 75.26, 88.05), (47.47, 81.36, 90.44)),
        ((14.14, 52.42, 78.42), (30.95, 65.03, 82.07)),
    ),
    "FSSD512": (
        ((62.05, 88.22, 95.36), (66.20, 88.76, 95.31)),
        ((49.55, 79.01, 90.49), (58.16, 81.60, 89.82)),
        ((23.44, 58.18, 82.12), (35.77, 65.10, 81.84)),
    ),
}


@cache
def voc():
    return json.loads((ROOT / "results/voc_matching.json").read_text(encoding="utf-8"))


@cache
def default_boxes():
    generator = DefaultBoxGenerator(LAYOUTS["ssd300_voc"])
    return generator([torch.zeros(1, 1, f, f) for f in generator.layout.maps], (300, 300))


@cache
def many_places(width, height):
    """M of one box at 31 x 31 places inside the picture; alone, it owns what it overlaps by half, or one."""
    x, y = np.meshgrid(np.linspace(0, 300 - width, 31), np.linspace(0, 300 - height, 31))
    boxes = np.stack([x.ravel(), y.ravel(), x.ravel() + width, y.ravel() + height], 1)
    overlap = pairwise_iou(torch.from_numpy(boxes).float(), default_boxes().boxes[0])
    return (overlap >= 0.5).sum(1).clamp(min=1).numpy()


def match_at(x, y, side):
    box = torch.tensor([[[x - side / 2, y - side / 2, x + side / 2, y + side / 2]]])
    return ssd_assign(default_boxes(), Targets(box, torch.tensor([[0]]), torch.tensor([[True]])))


def weights(*matched, **options):
    return scale_balanced_weight(torch.tensor(matched, dtype=torch.float64), **options)


def gains(tables, size):
    k = SIZES.index(size)
    return {
        (name, t): round(after[k] - before[k], 2)
        for name, rows in tables.items()
        for t, (before, after) in zip(THRESHOLDS, rows, strict=True)
    }


def change(column):
    return [round(after[column] - before[column], 1) for before, after in TABLE_5.values()]


# --- the three squares, the explorer and the curve


def test_the_three_squares_at_the_head():
    m20, m48, m96 = (num_matched(match_at(150.0, 150.0, side)).item() for side in (20, 48, 96))
    assert m20 == 1
    assert min(m48, m96) >= 10


def test_below_30_by_root_2_no_square_reaches_a_half():
    assert match_at(152.0, 152.0, 21.0).iou.max() < 0.5  # not even with a shared centre
    centre = match_at(12.0, 12.0, 21.3)  # of a cell
    assert centre.iou.max() > 0.5
    assert math.isclose((30 / math.sqrt(2)) ** 2 / 30**2, 0.5)


def test_a_square_of_24_owns_three_to_eight_at_whole_pixels():
    found = {
        (x, y): num_matched(match_at(float(x), float(y), 24.0)).item() for x in range(148, 153) for y in range(150, 153)
    }
    assert (min(found.values()), max(found.values())) == (3, 8) == (found[151, 151], found[148, 150])


def test_alone_in_its_picture_an_object_owns_what_it_overlaps_or_one():
    boxes = torch.tensor([[10.0, 10, 26, 26], [40, 60, 140, 120], [3, 5, 290, 280], [100, 100, 124, 124]])
    for box in boxes:
        one = Targets(box.view(1, 1, 4), torch.tensor([[0]]), torch.tensor([[True]]))
        for least in (0.3, 0.5, 0.7):
            match = ssd_assign(default_boxes(), one, positive_iou=least)
            everywhere = ssd_assign(default_boxes(), one, positive_iou=1e-3).iou[0]
            assert num_matched(match).item() == max(1, int((everywhere >= least).sum()))


# --- claims: the formula


def test_b1_weight_is_no_function_of_e():
    assert math.isclose(math.log(2) / 2, math.log(4) / 4)
    assert_close(weights(2, 4), torch.tensor([2.540, 1.790], dtype=torch.float64), rtol=0, atol=5e-4)
    for m in (1, 2, 4, 9):
        assert_close(weights(m).item(), 3 * (math.log(m) / m + 1 / m))


def test_b2_object_totals_and_where_they_pass_one():
    m = torch.tensor([1.0, 2, 5, 10, 24], dtype=torch.float64)
    total = m * weights(1, 2, 5, 10, 24)
    assert_close(total, torch.tensor([3.0, 5.08, 7.83, 9.91, 12.53], dtype=torch.float64), rtol=0, atol=5e-3)
    assert_close(total, 3 * (m.log() + 1))
    assert weights(9).item() > 1 > weights(10).item()


@pytest.mark.parametrize(
    ("alpha", "falls"), [(0.0, False), (0.5, False), (0.69, False), (math.log(2), True), (1.0, True)]
)
def test_b3_weight_falls_only_from_ln_2_on(alpha, falls):
    w = weights(*range(1, 40), alpha=alpha, beta=1.0)
    assert bool((w.diff() <= 1e-12).all()) is falls
    if alpha == 0:
        assert w.argmax() == 2  # M = 3
        assert_close(w[:4], torch.tensor([0, 0.347, 0.366, 0.347], dtype=torch.float64), rtol=0, atol=5e-4)
    if alpha == 0.5:
        assert_close(w[:3], torch.tensor([0.5, 0.597, 0.533], dtype=torch.float64), rtol=0, atol=5e-4)


def test_b4_printed_vote_of_a_guessing_classifier_is_not_zero():
    for classes, printed in ((3, 0.347), (10, 1.099)):
        e = (classes - 1) / classes
        odds, more = math.log((1 - e) / e), math.log(classes - 1)
        assert math.isclose(odds + more, 0, abs_tol=1e-12)
        assert_close(odds / 2 + more, printed, rtol=0, atol=5e-4)


def test_another_base_is_another_alpha_and_beta():
    m, unit = torch.arange(1.0, 30, dtype=torch.float64), math.log(10)
    assert_close(3 * (m.log10() + 1) / m, scale_balanced_weight(m, alpha=unit, beta=3 / unit))


# --- claims: what M knows


def test_b5_shape_and_place_matter():
    means = [many_places(96 * r**0.5, 96 / r**0.5).mean() for r in (1, 2, 3, 5)]
    assert np.allclose(means, [14.4, 11.1, 4.6, 2.1], atol=0.06)
    small = many_places(24, 24)
    assert (small.min(), small.max()) == (3, 9)
    assert math.isclose(small.mean(), 5.06, abs_tol=0.06)
    group = voc()["voc07"]["override, unclipped"]["all"]["elongated"]["above 4"]
    assert math.isclose(group["mean"], 3.8, abs_tol=0.05)
    assert math.isclose(group["objects_by_m"][0] / group["objects"], 0.785, abs_tol=0.01)


def test_b6_medium_and_large_match_alike():
    means = [many_places(side, side).mean() for side in (64, 96, 240)]
    assert np.allclose(means, [13.3, 14.4, 10.1], atol=0.06)
    usual = voc()["voc07"]["override, unclipped"]["all"]["by_size"]["at 300"]
    augmented = voc()["augmented"][0]["voc07"]["by_size"]["at 300"]
    assert np.allclose([usual[s]["mean"] for s in SIZES], [2.7, 8.8, 9.8], atol=0.05)
    small, medium, large = (augmented[s]["mean"] for s in SIZES)
    assert small < 3
    assert abs(large - medium) < 0.5


# --- claims: the tables


def test_b7_gains_in_recall_are_not_up_to_15():
    assert max(gains(VOC_RECALL, "small").values()) == 25.39
    assert gains(VOC_RECALL, "small")["FSSD300", 0.3] == 21.70
    assert gains(VOC_RECALL, "small")["SSD300", 0.1] == 18.41
    assert max(gains(COCO_RECALL, "small").values()) == gains(COCO_RECALL, "small")["FSSD300", 0.3] == 16.81
    assert max(gains(COCO_RECALL, "medium").values()) == 13.64
    assert max(gains(VOC_RECALL, "medium").values()) == 7.16
    at_001 = [g for tables in (VOC_RECALL, COCO_RECALL) for (_, t), g in gains(tables, "small").items() if t == 0.01]
    assert (min(at_001), max(at_001)) == (4.15, 9.31)


def test_b8_gains_in_ap():
    assert change(0) == [1.5, 2.2, 1.5, 1.6, 1.5, 1.2]
    assert sum(gain > 1.5 for gain in change(0)) == 2
    assert [round(after - before, 1) for before, after in TABLE_2.values()] == [1.0, 0.7, 0.4]
    assert max(TABLE_1, key=TABLE_1.__getitem__) == "scb"
    assert min(TABLE_1, key=TABLE_1.__getitem__) == "inv"


def test_b9_large_objects_lose():
    assert change(3) == [-0.6, 0.3, 0.0, -1.2, -1.2, -1.2]
    assert sum(c < 0 for c in change(3)) == 4
    assert sum(c < 0 for c in change(6)) == 6
    assert (min(change(6)), max(change(6))) == (-2.4, -0.7)
    assert [c for c in change(5) if c < 0] == [-0.2]
    assert min(change(1)) > max(change(3))  # small objects gain more than large ones, in every pair


def test_b10_larger_input_helps_large_objects_without_weights():
    for t, row, big in zip(THRESHOLDS, COCO_RECALL["SSD300"], COCO_RECALL["SSD512"], strict=True):
        before, after = (b[2] - a[2] for a, b in zip(row, big, strict=True))
        assert before > 0
        assert (after < 0) is (t > 0.01)
    below = [f[0][2] < s[0][2] for f, s in zip(COCO_RECALL["FSSD300"], COCO_RECALL["SSD300"], strict=True)]
    assert below == [True, True, False]


def how_written(percent, total):
    near = [n for n in range(total + 1) if abs(100 * n / total - percent) < 0.011]
    if any(round(10_000 * n / total) == round(100 * percent) for n in near):
        return "rounded"
    return "cut off" if any(10_000 * n // total == round(100 * percent) for n in near) else "impossible"


def test_b13_percentages_are_fractions_of_the_original_pixel_classes():
    counts = voc()["objects_by_size"]
    assert counts["original pixels"] == [516, 3813, 7703]
    assert counts["original pixels, without the last"] == [566, 3823, 7643]
    assert counts["warped to 300 x 300"] == [1297, 4619, 6116]
    cells = [
        (percent, total)
        for rows in VOC_RECALL.values()
        for pair in rows
        for row in pair
        for percent, total in zip(row, counts["original pixels"], strict=True)
    ]
    written = {cell: how_written(*cell) for cell in cells}
    assert len(cells) == 36
    assert "impossible" not in written.values()
    assert sorted(p for (p, _), how in written.items() if how == "cut off") == [40.69, 41.08, 67.26, 80.03, 87.74]
    by_the_wrong_class = [how_written(p, 1297) for p, total in cells if total == 516]
    assert "impossible" in by_the_wrong_class


# --- claims: code and counts


def test_b14_terms_of_the_equation_and_of_the_code():
    torch.manual_seed(0)
    options = {"num_classes": 2, "backbone": "tiny"}
    plain = get_model("ssd300", **options).eval()
    boxes = torch.tensor([[4.0, 4, 20, 20], [30, 30, 90, 80]])
    with torch.no_grad():
        pred = plain.predict(torch.rand(1, 3, 96, 96))
        match = plain.match(pred.priors, pad_targets([{"boxes": boxes, "labels": torch.tensor([0, 1])}]))
        values = {name: term(pred, match) for name, (_, term) in plain.losses.items()}
        for terms, same in (("both", set()), ("cls", {"box"}), ("loc", {"cls"})):
            other = scale_balanced(get_model("ssd300", **options), terms=terms)
            assert {n for n, (_, term) in other.losses.items() if torch.equal(term(pred, match), values[n])} == same


def test_b15_counts_that_hold():
    usual = voc()["voc07"]["override, unclipped"]["all"]
    assert (usual["objects"], sum(usual["histogram"])) == (15_662, 15_662)
    few = [usual["by_size"][p]["small"]["objects_by_m"][0] / usual["by_size"][p]["small"]["objects"] for p in PIXELS]
    assert np.allclose(few, [0.996, 0.855], atol=0.001)
    both = voc()["voc0712"]["override, unclipped"]["all"]
    assert both["objects"] == 47_223
    assert math.isclose(both["share_above_10"], 0.338, abs_tol=0.001)
    for run in voc()["augmented"]:
        assert 0.27 < run["voc0712"]["share_above_10"] < 0.32
        assert 7000 < run["voc0712"]["histogram"][1] < 9100
    assert voc()["voc07"]["bipartite, unclipped"]["all"]["histogram"][0] == 0
    unmatched = [row["unmatched"] for row in voc()["ties"].values()]
    assert 30 < min(unmatched) <= max(unmatched) < 80


PIXELS = ("original", "at 300")


def mean_weight(form, histogram, beta=3.0):
    m = torch.arange(1.0, len(histogram), dtype=torch.float64)
    n = torch.tensor(histogram[1:], dtype=torch.float64)
    return ((n * m * scale_balanced_weight(m, form=form, beta=beta)).sum() / (n * m).sum()).item()


def test_beta_3_keeps_the_balance_on_voc_and_only_for_some_forms():
    histogram = voc()["voc0712"]["override, unclipped"]["all"]["histogram"]
    need = {form: 3 / mean_weight(form, histogram) for form in TABLE_1}
    assert 2.8 < need["scb"] < 2.92
    assert need["const"] == pytest.approx(1)
    assert 7.6 < need["inv"] < 8.6
    assert 2.9 < need["inv_sqrt"] < 3.1
    assert 3.1 < need["inv_log"] < 3.2


def test_share_of_the_loss_of_objects_with_few_default_boxes():
    histogram = voc()["voc0712"]["override, unclipped"]["all"]["histogram"]
    m = torch.arange(1.0, len(histogram), dtype=torch.float64)
    n = torch.tensor(histogram[1:], dtype=torch.float64)
    for form, share in (("const", 0.092), ("scb", 0.180), ("inv", 0.300)):
        load = n * m * scale_balanced_weight(m, form=form)
        assert math.isclose(load[:5].sum() / load.sum(), share, abs_tol=1e-3)


def test_clipping_corners_and_augmentation_do_what_the_chapter_says():
    runs = voc()["voc07"]
    usual, corners, centred = (runs[f"override, {c}"]["all"] for c in ("unclipped", "corners", "cxcywh"))
    assert 1.45 < corners["positives"] / usual["positives"] < 1.55
    assert centred["positives"] / usual["positives"] < 1.02
    epoch = voc()["augmented"][0]["voc07"]
    assert epoch["mean"] < usual["mean"]
    assert epoch["histogram"][1] > usual["histogram"][1]
    assert epoch["by_size"]["original"]["small"]["mean"] > usual["by_size"]["original"]["small"]["mean"]


def test_weighing_positives_shifts_the_best_logit_by_the_logarithm_of_the_weight():
    # the argument behind the control: w p-weighted cross-entropy is least at odds w times as large
    share, w = 0.2, 2.5
    logit = torch.linspace(-4, 4, 80_001, dtype=torch.float64)

    def rest(weight):
        loss = -weight * share * logit.sigmoid().log() - (1 - share) * (-logit).sigmoid().log()
        return logit[loss.argmin()].item()

    assert math.isclose(rest(w) - rest(1.0), math.log(w), abs_tol=2e-4)


# --- by hand


def test_exercise_by_hand():
    total = torch.tensor([1.0, 8.0]) * scale_balanced_weight(torch.tensor([1, 8]), beta=1.0)
    assert math.isclose(total[0] / total.sum(), 0.245, abs_tol=1e-3)
    assert math.isclose(9 / total.sum(), 2.2, abs_tol=0.01)


# --- our own runs, as the page reads them


@cache
def ours():
    runs = {}
    for run in json.loads((ROOT / "results/scale_balanced_scenes.json").read_text(encoding="utf-8"))["runs"]:
        runs.setdefault(run["variant"], {})[run["seed"]] = run
    return runs


def differences(metric, after, before="plain"):
    """By seed, in points; "small" is recall of small objects at a score of 0.3."""

    def value(run):
        if metric != "small":
            return run["metrics"][metric]
        counts = run["recall"]
        return counts["found"]["small"][counts["score_thresholds"].index(0.3)] / counts["objects"]["small"]

    a, b = ours()[after], ours()[before]
    return 100 * np.array([value(a[seed]) - value(b[seed]) for seed in sorted({*a} & {*b})])


@pytest.mark.parametrize("loud", ["scb", "const_b3", "inv_b3", "inv_sqrt_b3", "inv_log_b3"])
def test_on_scenes_loudness_raises_recall_at_a_threshold_and_costs_ap(loud):
    assert (differences("small", loud) > 0).all()
    assert (differences("AP", loud) < 0).all()


@pytest.mark.parametrize("form", ["scb_mean", "inv_mean", "inv_sqrt_mean", "inv_log_mean"])
def test_on_scenes_forms_are_close_at_mean_weight_1(form):
    gain = differences("AP", form)
    assert len(gain) >= 3
    assert abs(gain.mean()) < abs(differences("AP", "const_b3").mean()) / 3
    if form == "scb_mean":
        assert abs(gain.mean()) <= 2 * gain.std(ddof=1)
    assert differences("small", form).mean() < 2  # the rise of recall is gone
