"""What the chapter on SCOD says of the paper, number by number."""

import itertools
import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.testing import assert_close

from detcore.boxes import adaptive_iou, cxcywh_to_xyxy, iou, xyxy_to_cxcywh
from detcore.default_boxes import LAYOUTS
from detcore.losses.aiou import aiou_loss
from detcore.losses.segmentation import area_ranges, segmentation_cells, weak_segmentation_labels
from detcore.structures import pad_targets
from recipes import scod_voc, voc_matching
from recipes.scod_scenes import OUTPUTS, TABLES, THRESHOLDS

ROOT = Path(__file__).parents[1]
UNIT = torch.tensor([[-0.5, -0.5, 0.5, 0.5]], dtype=torch.float64)
# Table 1: AP, AP50, AP70, AP90 on VOC 2007
TABLE_1 = {
    "SSD300": (52.7, 77.6, 61.0, 11.4),
    "DSSD320": (56.1, 79.6, 64.1, 16.0),
    "RefineDet320": (54.7, 80.0, 63.5, 12.2),
    "DAFS320": (58.7, 81.0, 66.9, 20.0),
    "SCOD320": (59.0, 80.5, 67.2, 20.2),
    "SSD512": (57.5, 79.8, 66.7, 15.2),
    "DSSD512": (58.5, 81.5, 67.6, 15.8),
    "RefineDet512": (58.4, 81.8, 67.2, 15.6),
    "RetinaNet": (59.3, 81.1, 67.5, 20.1),
    "DAFS512": (59.4, 82.4, 67.6, 18.0),
    "SCOD512": (60.0, 82.1, 68.2, 20.2),
    "Faster R-CNN": (52.9, 79.8, 61.7, 8.8),
    "Cascade R-CNN": (58.5, 80.0, 65.8, 21.5),
}
# Table 2: DSSD, one to four blocks, AIoU
TABLE_2 = (
    (56.1, 79.6, 64.1, 16.0),
    (56.5, 80.0, 64.7, 16.4),
    (57.1, 80.4, 65.3, 17.0),
    (57.5, 80.5, 66.0, 17.6),
    (57.7, 80.7, 66.2, 17.9),
    (59.0, 80.5, 67.2, 20.2),
)
TABLE_3 = {1.0: 57.9, 0.9: 58.6, 0.8: 59.0, 0.7: 58.6, 0.6: 58.0}
# Table 4: AP, AP50, AP75, AP_S, AP_M, AP_L on COCO
TABLE_4 = {
    "DSSD321": (28.0, 46.1, 29.2, 7.4, 28.1, 47.6),
    "RefineDet320": (32.0, 51.4, 34.2, 10.5, 34.7, 50.4),
    "DAFS320": (33.2, 52.7, 35.7, 10.9, 35.1, 52.0),
    "SCOD320": (34.0, 53.0, 36.0, 13.4, 36.6, 50.2),
}


@cache
def stored(name):
    return json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))


def gradients():
    return stored("scod_voc.json")["box_gradients"]


def boxes_at(*rows):
    """From centre x and y, width, height."""
    return cxcywh_to_xyxy(torch.tensor(rows, dtype=torch.float64))


def added(boxes, beta=0.8):
    """Delta': what AIoU adds to the loss, as a share of the IoU loss."""
    return aiou_loss(boxes, UNIT, beta=beta) / (1 - iou(boxes, UNIT)).clamp(min=1e-12) - 1


def sampled(kind, number=20_000, seed=0):
    draws = torch.rand(number, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    angle, far = 2 * torch.pi * draws[:, 0], 0.8 * draws[:, 1]
    centre = torch.stack([far * angle.cos(), far * angle.sin()], dim=1) * (kind != "size only")
    sides = ((draws[:, 2:] - 0.5) * (kind != "offset only")).exp()
    return cxcywh_to_xyxy(torch.cat([centre, sides], dim=1))


def rank(kind):
    boxes = sampled(kind)
    return spearmanr(iou(boxes, UNIT), added(boxes)).statistic


# --- the idea and the figures


def test_shrinking_is_moving_the_centres_apart():
    a, b = boxes_at((0, 0, 1, 1)), boxes_at((0.3, 0.1, 0.8, 0.8), (0.9, 0.4, 0.5, 0.7), (0.2, 0.0, 0.5, 0.5))
    for beta in (0.8, 0.5):
        centre, sides = xyxy_to_cxcywh(b).split(2, dim=1)
        apart = cxcywh_to_xyxy(torch.cat([centre / beta, sides], dim=1))
        assert_close(adaptive_iou(a, b, beta=beta), iou(a, apart), rtol=0, atol=1e-14)


def test_twins_that_the_answer_names():
    inside, far = boxes_at((0.2, 0, 0.5, 0.5)), boxes_at((0.8, 0, 1, 1))
    assert_close(adaptive_iou(inside, UNIT), iou(inside, UNIT))
    assert iou(far, UNIT).item() > 0.1
    assert_close(adaptive_iou(far, UNIT).item(), 0.0, rtol=0, atol=1e-12)


def test_sheets_of_dssd320_end_at_these_sides():
    ends = [high**0.5 for _, high in area_ranges(LAYOUTS["dssd320"].side_ranges[:4], open_top=False)]
    assert_close(ends, [55.4, 106.2, 164.2, 221.9], rtol=0, atol=0.05)
    assert_close(ends[0] * 96 / 320, 16.6, rtol=0, atol=0.05)
    assert 40**2 + 20**2 + 10**2 + 5**2 == 2125


def test_strict_top_leaves_the_largest_object_on_no_sheet():
    cells = segmentation_cells([(5, 5)], (320, 320), area_ranges(LAYOUTS["dssd320"].side_ranges[:4])[-1:])
    strict = segmentation_cells(
        [(5, 5)], (320, 320), area_ranges(LAYOUTS["dssd320"].side_ranges[:4], open_top=False)[-1:]
    )
    targets = pad_targets([{"boxes": torch.tensor([[10.0, 10, 250, 250]]), "labels": torch.tensor([0])}])
    assert (weak_segmentation_labels(*cells, targets) >= 0).any()
    assert not (weak_segmentation_labels(*strict, targets) >= 0).any()


# --- claims and errata, by number


def test_a1_never_above_iou_and_often_equal():
    draws = torch.Generator().manual_seed(1)
    corner, side = (torch.rand(2, 200_000, 2, dtype=torch.float64, generator=draws) for _ in range(2))
    one, two = (torch.cat([c, c + 0.05 + s], dim=1) for c, s in zip(corner, side, strict=True))
    for beta in (0.9, 0.8, 0.6):
        assert (adaptive_iou(one, two, beta=beta) - iou(one, two)).max() < 3e-15
    cases = boxes_at((0, 0, 0.8, 1.3), (0.15, 0, 0.5, 0.5), (0.24, 0, 0.5, 0.5))
    assert_close(iou(cases, UNIT).tolist(), [0.645161, 0.25, 0.25], rtol=0, atol=1e-6)
    assert_close(adaptive_iou(cases, UNIT).tolist(), [0.645161, 0.25, 0.219512], rtol=0, atol=1e-6)


def test_a2_dead_zone():
    draws = torch.rand(2, 100_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    thrown = [cxcywh_to_xyxy(torch.cat([d[:, :2], (math.log(0.05) * (1 - d[:, 2:])).exp()], dim=1)) for d in draws]
    meet = iou(*thrown) > 0
    dead = [(adaptive_iou(*thrown, beta=beta) == 0)[meet].double().mean().item() for beta in (0.8, 0.6)]
    assert 0.2 < dead[0] < 0.35
    assert 0.45 < dead[1] < 0.65
    assert stored("voc_matching.json")["positives"]["without_gradient"] == {"0.8": 0, "0.6": 32}
    for beta, least in ((0.8, 1 / 9), (0.6, 1 / 4)):
        assert math.isclose((1 - beta) / (1 + beta), least)


def test_a3_added_share_rises_with_iou_for_offsets_only():
    moved = boxes_at((0.8, 0, 1, 1), (0.2, 0, 1, 1), (0.001, 0, 1, 1))
    assert_close(added(moved).tolist(), [0.125, 0.2, 0.2 / 0.801], rtol=1e-6, atol=0)
    assert added(boxes_at((0, 0, 0.6, 1))).abs().item() < 1e-12
    mixed = boxes_at((0.08, 0, 0.8, 1), (0.10, 0, 0.8, 1), (0.15, 0, 0.8, 1))
    assert_close(iou(mixed, UNIT).tolist(), [0.8, 0.8, 0.7143], rtol=0, atol=1e-4)
    assert_close(added(mixed).tolist(), [0.0, 0.2195, 0.2069], rtol=0, atol=1e-4)
    assert rank("offset only") > 0.9
    assert abs(rank("mixed")) < 0.15
    assert added(sampled("size only")).abs().max() < 1e-9
    found = stored("voc_matching.json")["positives"]
    assert [round(v, 3) for v in found["excess_by_iou"]] == [0.09, 0.098, 0.105, 0.112, 0.088]
    assert (round(found["excess_spearman"], 2), round(found["share_unchanged"], 3)) == (0.12, 0.195)


def test_a4_slopes_by_the_box():
    for beta, want in ((1.0, (2.0, 1.125, 0.692)), (0.8, (2.5, 1.246, 0.711))):
        t = torch.tensor([1e-9, 1 / 3, 0.7], dtype=torch.float64, requires_grad=True)
        moved = UNIT + torch.stack([t, 0 * t, t, 0 * t], dim=1)
        slope = torch.autograd.grad(aiou_loss(moved, UNIT, beta=beta).sum(), t)[0]
        assert_close(slope.tolist(), list(want), rtol=0, atol=5e-4)
        assert_close(slope, 2 * beta / (beta + t.detach()).square())


def test_a5_balance_moves_little_and_centres_gain():
    found = gradients()
    assert found["positives"] == 125_664
    easy = {name: 100 * sum(found[name]["share_by_iou"][3:]) for name in ("smooth_l1", "iou", "aiou0.8", "aiou0.6")}
    assert easy == pytest.approx({"smooth_l1": 5.6, "iou": 10.9, "aiou0.8": 11.1, "aiou0.6": 11.6}, abs=0.06)
    assert 100 * sum(found["share_of_positives"][3:]) == pytest.approx(8.3, abs=0.06)
    ratio = {part: found["aiou0.8"][part] / found["iou"][part] for part in ("mean", "centres", "sides")}
    assert ratio == pytest.approx({"mean": 1.09, "centres": 1.39, "sides": 0.85}, abs=0.006)
    for name in ("smooth_l1", "iou", "aiou0.9", "aiou0.8", "aiou0.7", "aiou0.6"):
        assert found[name]["centres"] + found[name]["sides"] == pytest.approx(found[name]["mean"], abs=2e-5)
    centres = [found[f"aiou{beta}"]["centres"] / found[f"aiou{beta}"]["mean"] for beta in scod_voc.BETAS]
    assert (np.diff(centres) > 0.04).all()


def test_a6_loss_is_concave_over_iou():
    overlap = torch.tensor([1 / 9, 0.3, 0.5, 0.7, 0.9, 1.0], dtype=torch.float64)
    slope = 3.2 / (0.8 * (1 + overlap) + 1 - overlap) ** 2
    assert_close([slope[0].item(), slope[-1].item()], [1.0125, 1.25], rtol=1e-9, atol=0)
    t = (1 - overlap) / (1 + overlap)
    loss = aiou_loss(boxes_at(*((v, 0, 1, 1) for v in t.tolist())), UNIT)
    chord = loss[0] + (loss[-1] - loss[0]) * (overlap - overlap[0]) / (overlap[-1] - overlap[0])
    assert (loss - chord)[1:-1].min() > 0.01


def test_a7_low_iou_dominates():
    shares = stored("voc_matching.json")["positives"]["share_by_iou"]
    assert [round(100 * v, 1) for v in shares.values()] == pytest.approx([1.5, 67.9, 22.4, 6.6, 1.7], abs=0.06)
    ours = gradients()["share_of_positives"]
    assert ours[:4] == pytest.approx(list(shares.values())[:4], abs=1e-5)
    assert sum(ours[4:]) == pytest.approx(shares["above 0.8"], abs=2e-5)


def test_a8_ranges_lose_objects():
    layers = stored("scod_voc.json")["layers"]
    above = [100 * layers[name]["share_above_strict_top"] for name in ("dssd320", "dssd512")]
    assert above == pytest.approx([15.5, 25.2], abs=0.06)
    shares = layers["dssd320"]["share_of_objects"]
    assert [100 * v for v in shares] == pytest.approx([26.1, 24.0, 19.9, 30.0], abs=0.06)
    assert sum(shares) == pytest.approx(1, abs=1e-4)  # but for exact ties
    on = layers["dssd320"]["cells_on_an_object"]
    assert [100 * v for v in on] == pytest.approx([0.9, 3.8, 8.2, 34.2], abs=0.06)
    assert max(layers["dssd320"]["objects_without_a_cell"]) <= 0.006
    entropy = -(on[0] * math.log(on[0]) + (1 - on[0]) * math.log(1 - on[0]))
    assert 0.05 < entropy < entropy + on[0] * math.log(20) < 0.081
    cells, areas = segmentation_cells([(4, 4), (4, 4)], (32, 32), [(0.0, 256.0), (256.0, 1024.0)])
    exact = pad_targets([{"boxes": torch.tensor([[0.0, 0, 16, 16]]), "labels": torch.tensor([0])}])
    for closed, want in ((None, [0, 0]), ("right", [4, 0])):
        labels = weak_segmentation_labels(cells, areas, exact, closed=closed)[0].view(2, -1)
        assert (labels >= 0).sum(1).tolist() == want


def test_a9_what_is_compared_with_what():
    assert round(TABLE_1["SCOD320"][0] - TABLE_1["DSSD320"][0], 1) == 2.9
    assert round(TABLE_4["SCOD320"][0] - TABLE_4["DSSD321"][0], 1) == 6.0
    assert TABLE_4["DSSD321"] == (28.0, 46.1, 29.2, 7.4, 28.1, 47.6)  # as published in 2017
    assert TABLE_1["DSSD320"][1] > 78.6  # DSSD321, ResNet-101, released
    assert TABLE_1["DSSD512"][1] == 81.5  # DSSD513, ResNet-101, published
    assert TABLE_4["SCOD320"][5] < TABLE_4["RefineDet320"][5] < TABLE_4["DAFS320"][5]
    assert TABLE_2[-1][1] < TABLE_2[-2][1]
    assert round(TABLE_2[-1][3] - TABLE_2[-2][3], 1) == 2.3
    assert (TABLE_2[0], TABLE_2[-1]) == (TABLE_1["DSSD320"], TABLE_1["SCOD320"])
    assert max(TABLE_3, key=TABLE_3.__getitem__) == 0.8
    assert TABLE_3[0.8] == TABLE_1["SCOD320"][0]


def test_a10_ap_is_over_five_thresholds():
    assert THRESHOLDS == (0.5, 0.6, 0.7, 0.8, 0.9)
    rest = {name: round(5 * ap - a50 - a70 - a90, 1) for name, (ap, a50, a70, a90) in TABLE_1.items()}
    assert (rest["DSSD320"], rest["SCOD320"]) == (120.8, 127.1)
    for row, (_, a50, a70, a90) in zip((*rest.values(),), TABLE_1.values(), strict=True):
        assert a70 + a90 <= row <= a50 + a70
    for _, a50, a70, a90 in TABLE_1.values():  # as a mean of COCO's ten it could not be: six of them are 0.70 or less
        assert a50 > a70 > a90


# --- what is stored, and what is counted again


def test_stored_pairs_are_default_boxes_that_own_an_object():
    pairs = torch.tensor(stored("scod_voc.json")["pairs"], dtype=torch.float64)
    assert pairs.shape == (240, 4)
    assert (iou(cxcywh_to_xyxy(pairs), UNIT) > 0.5).double().mean() > 0.95


@pytest.mark.parametrize("table", [table for table in TABLES if (ROOT / "results" / OUTPUTS[table]).exists()])
def test_stored_runs_are_those_of_the_recipe_and_their_ap_the_mean_of_five(table):
    runs = stored(OUTPUTS[table])["runs"]
    assert {run["variant"] for run in runs} <= set(TABLES[table])
    for run in runs:
        assert {"AP", "AP50", "AP70", "AP90"} <= set(run["voc"]["11point"]) & set(run["voc"]["area"])
        values = [run["voc"]["area"][f"AP{100 * t:g}"] for t in THRESHOLDS]
        assert sum(values) / 5 == pytest.approx(run["voc"]["area"]["AP"], abs=2e-5)
        assert values == sorted(values, reverse=True)


def test_gradients_by_hand():
    shifted = boxes_at((0.25, 0, 1, 1))
    for loss, want in ((None, 1.0), (scod_voc.losses_of(None), 0.1 * 2 / 1.25**2)):
        slopes = scod_voc.gradient(shifted, UNIT, loss)
        assert_close(slopes[0, 0].abs().item(), want)  # smooth L1: 2.5 away, beyond its corner


@pytest.mark.slow
def test_voc_is_counted_again(data_root):
    folder = data_root / "voc_annotations"
    if not folder.is_dir():
        pytest.skip(f"needs the complete VOC annotations, {folder}")
    voc07 = voc_matching.read(folder, "train2007", "val2007")
    both = voc_matching.read(folder, "train2007", "val2007", "train2012", "val2012")
    found = scod_voc.box_gradients(*voc_matching.matched_boxes(voc07))
    assert found["iou"]["share_by_iou"] == pytest.approx(gradients()["iou"]["share_by_iou"], abs=1e-5)
    again = voc_matching.rounded(scod_voc.layers("dssd320", both, voc07))
    assert again["share_above_strict_top"] == stored("scod_voc.json")["layers"]["dssd320"]["share_above_strict_top"]
    assert again["cells_on_an_object"] == pytest.approx(
        stored("scod_voc.json")["layers"]["dssd320"]["cells_on_an_object"], abs=1e-5
    )


# --- what the text says of the verdicts


def advantage(after, before, metric="AP"):
    """What one variant has over another: mean over the seeds, in standard deviations of the differences."""
    runs = {}
    for name in OUTPUTS.values():
        for run in stored(name)["runs"]:
            runs.setdefault(run["variant"], {})[run["seed"]] = 100 * run["voc"]["11point"][metric]
    assert set(runs[after]) == set(runs[before]) == {0, 1, 2}
    differences = np.array([runs[after][seed] - runs[before][seed] for seed in (0, 1, 2)])
    return differences.mean() / differences.std(ddof=1)


LADDER = ("dssd", "blocks1", "blocks12", "blocks123", "blocks1234")


def test_text_on_the_blocks():
    steps = [advantage(after, before) for before, after in itertools.pairwise(LADDER)]
    assert [step > 2 for step in steps] == [False, False, True, False]
    assert 0 < advantage("blocks1234", "dssd") < 2
    assert -2 < advantage("scod", "blocks1234") < 0


def test_losses_made_as_strong_have_the_measured_weights():
    strength, smooth_l1 = TABLES["strength"], gradients()["smooth_l1"]["mean"]
    assert strength["iou_x12.9"]["box_weight"] == round(smooth_l1 / gradients()["iou"]["mean"], 1)
    # the quotient is 11.85, and the recipe was run with 11.9
    assert strength["aiou_x11.9"]["box_weight"] == pytest.approx(smooth_l1 / gradients()["aiou0.8"]["mean"], rel=0.005)


def test_text_on_strength():
    assert advantage("iou", "blocks1234") < -2
    for metric in ("AP", "AP90"):
        for after, before in (
            ("iou_x12.9", "blocks1234"),
            ("scod", "iou"),
            ("aiou_x11.9", "iou_x12.9"),
            ("scod", "iou_x1.25"),
        ):
            assert abs(advantage(after, before, metric)) < 2
    assert 0 < advantage("iou_x12.9", "iou") < 2


def test_text_on_beta_and_retinanet():
    for beta in ("iou", "beta0.9", "beta0.7", "beta0.6"):
        assert abs(advantage("scod", beta)) < 2
    assert abs(advantage("retinanet_aiou", "retinanet_iou")) < 2
    assert -2 < advantage("retinanet_scws", "retinanet_giou") < 0
    assert advantage("retinanet_scws_aiou", "retinanet_aiou") < -2
    runs = {}
    for name in ("scod_scenes.json", "scod_beta.json", "scod_retinanet.json"):
        for run in stored(name)["runs"]:
            runs.setdefault(run["variant"], []).append(100 * run["voc"]["11point"]["AP"])
    for after, before in (("retinanet_scws", "retinanet_giou"), ("retinanet_scws_aiou", "retinanet_aiou")):
        assert -3 < np.mean(runs[after]) - np.mean(runs[before]) < -2.7  # "nearly three points"
    spans = [np.ptp(runs[beta]) for beta in ("iou", "beta0.9", "scod", "beta0.7", "beta0.6")]
    assert 0.8 < np.mean(spans) < 1.4  # "about as much" as 1.1
    assert round(max(TABLE_3.values()) - min(TABLE_3.values()), 1) == 1.1
