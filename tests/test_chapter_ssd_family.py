"""What the primer on the SSD family says of the papers and of the code that carried them on, number by number."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from detcore.boxes import pairwise_iou
from detcore.default_boxes import LAYOUTS, DefaultBoxGenerator, DefaultBoxLayout
from detcore.evaluation.voc import eleven_point_ap
from detcore.losses.refine import odm_class_term, surely_background
from detcore.models import get_model
from detcore.ssd_assigner import num_matched, ssd_assign
from detcore.structures import BACKGROUND, Assignment, Predictions, Priors, Targets

VOC = json.loads((Path(__file__).parents[1] / "results/voc_matching.json").read_text(encoding="utf-8"))["voc07"]


def all_boxes(name, clip=None):
    layout = LAYOUTS[name]
    maps = [torch.zeros(1, 1, f, f) for f in layout.maps]
    return DefaultBoxGenerator(layout, clip=clip)(maps, (layout.size, layout.size))


# --- the idea: default boxes, matching, what a fine cell sees


def test_only_dssd_has_a_long_box_on_every_level():
    def levels(name):
        return [k for k, ratios in enumerate(LAYOUTS[name].ratios) if 3.0 in ratios]

    assert levels("ssd300_voc") == [1, 2, 3]
    assert levels("ssd512_coco") == [1, 2, 3, 4]
    assert levels("dssd320") == [0, 1, 2, 3, 4, 5]
    assert levels("refinedet320") == []


@pytest.mark.parametrize(
    ("distance", "rule", "owned"),
    [
        (0, "override", [0, 1]),
        (3, "override", [0, 1]),
        (6, "override", [1, 1]),
        (0, "bipartite", [1, 1]),
        (3, "bipartite", [1, 1]),
        (24, "bipartite", [1, 1]),
    ],
)
def test_two_flat_neighbours_fight_for_one_default_box(distance, rule, owned):
    boxes = torch.tensor([[[131.0, 142, 165, 154], [131.0 + distance, 142, 165 + distance, 154]]])
    two = Targets(boxes, torch.tensor([[0, 1]]), torch.tensor([[True, True]]))
    match = ssd_assign(all_boxes("ssd300_voc"), two, rule=rule)
    assert num_matched(match)[0].tolist() == owned
    assert_close(pairwise_iou(all_boxes("ssd300_voc").boxes[0], boxes[0])[:, 0].max().item(), 34 * 12 / 900)


def test_voc_has_objects_without_a_default_box_under_override_only():
    assert VOC["override, unclipped"]["all"]["histogram"][0] == 58
    assert VOC["bipartite, unclipped"]["all"]["histogram"][0] == 0


@pytest.mark.parametrize(("name", "low", "high"), [("ssd300", 0.0, 0.5), ("fssd300", 0.95, 1), ("dssd320", 0.95, 1)])
def test_only_plain_ssd_has_a_finest_cell_that_sees_little(name, low, high):
    torch.manual_seed(0)
    net = get_model(name, num_classes=1, backbone="tiny").eval()
    pixels = torch.rand(2, 3, 128, 128, requires_grad=True)
    net.body(pixels)[0][:, :, 8, 8].sum().backward()
    assert low < (pixels.grad.abs().sum((0, 1)) > 0).double().mean() <= high


# --- C1: ssd.pytorch


def port_refuses(overlap, least, most=math.inf):
    return bool(overlap.min() < least and most < overlap.max())


def test_the_ports_crop_refuses_nothing():
    overlaps = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
    for least in (0.1, 0.3, 0.7, 0.9):
        assert not any(port_refuses(row, least) for row in overlaps)
        assert (overlaps < least).all(1).any() or least == 0.1  # "some" does refuse
    assert port_refuses(torch.tensor([0.0, 0.8]), 0.5, 0.7)  # it would, had it a largest overlap to compare with


def port_top_k(scores, k, *, effective):
    flat = scores.clone().view(1, -1)
    rank = flat.sort(1, descending=True)[1].sort(1)[1]
    if effective:
        flat[rank < k] = 0
    else:
        flat[rank < k].fill_(0)
    return flat.view(scores.shape)


def test_the_ports_top_k_does_nothing_and_would_delete_the_best():
    slots = torch.tensor([[[0.9, 0.2, 0.0], [0.7, 0.6, 0.1]]])
    assert_close(port_top_k(slots, 2, effective=False), slots)
    assert port_top_k(slots, 2, effective=True).flatten().tolist() == pytest.approx([0, 0.2, 0, 0, 0.6, 0.1])


def test_the_ports_mining_line_fails_on_todays_torch():
    flat, mask = torch.rand(2 * 5, 1), torch.zeros(2, 5, dtype=torch.bool)
    with pytest.raises(IndexError, match="shape of the mask"):
        flat[mask] = 0


# --- C2: RefineDet.PyTorch


def six_priors():
    """Two positives, of which the first step believes in one, and four negatives, two of them surely empty."""
    p_object = torch.tensor([0.5, 0.005, 0.5, 0.005, 0.3, 0.005])
    p_class = torch.tensor([0.6, 0.1, 0.3, 0.9, 0.2, 0.05])
    label = torch.tensor([0, 0, BACKGROUND, BACKGROUND, BACKGROUND, BACKGROUND])
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(1, 6, 1)
    logits, objectness = (torch.stack([p, 1 - p], dim=-1).log()[None] for p in (p_class, p_object))
    thing = Targets(boxes[:, :1], torch.tensor([[0]]), torch.tensor([[True]]))
    match = Assignment(label[None], torch.zeros(1, 6, dtype=torch.int64), boxes, torch.ones(1, 6), thing)
    pred = Predictions(logits, torch.zeros(1, 6, 4), boxes, Priors(boxes[:1], (6,)), {"objectness": objectness})
    return pred, match, -torch.where(label == 0, p_class, 1 - p_class).log()


def test_filter_never_takes_a_positive():
    pred, match, entropy = six_priors()
    assert surely_background(pred)[0].tolist() == [False, True, False, True, False, True]
    found = odm_class_term(pred, match, ratio=1.0)
    assert_close(found, entropy[[0, 1, 2, 4]].sum() / 2)  # both positives; of the negatives 3 and 5 are out
    assert_close(odm_class_term(pred, match, ratio=1.0, least=0.0), entropy[[0, 1, 3, 2]].sum() / 2)


def test_the_ports_filter_drops_a_positive_and_mines_it():
    pred, match, entropy = six_priors()
    believed = match.positive[0] & ~surely_background(pred)[0]
    drawn = entropy.masked_fill(believed, 0).argsort(descending=True)[: int(believed.sum())]
    assert believed.tolist() == [True, False, False, False, False, False]
    assert drawn.tolist() == [1]  # a positive, with its own class as label


# --- C3 and C4: DSSD's offsets, FSSD's totals


def test_dssds_offsets_leave_the_picture():
    layout, offsets = LAYOUTS["dssd321"], (2.5, 2.5, 10.5, 26.5, 90.5, 160.5)
    first = [offset * layout.size / f for offset, f in zip(offsets, layout.maps, strict=True)]
    assert first[0] == pytest.approx(20.06, abs=0.01)
    assert first[-1] == pytest.approx(51_520.5)
    assert all_boxes("dssd321").boxes[0, -1, [0, 2]].mean().item() == pytest.approx(160.5, abs=1e-3)


@pytest.mark.parametrize(
    ("ratios", "total"),
    [((1, 2, 2, 2, 1, 1), 8732), ((1, 2, 2, 1, 1, 1), 8682), ((2, 2, 2, 2, 1, 1), 11620)],
)
def test_fssd_has_three_totals(ratios, total):
    layout = replace(LAYOUTS["fssd300_voc"], ratios=tuple((2.0, 3.0)[:n] for n in ratios))
    assert layout.total == total


# --- C5: clipping


@pytest.mark.parametrize(("clip", "moved"), [("cxcywh", 134), ("sizes", 20), ("corners", 2869)])
def test_clipping_moves_few_boxes_or_many(clip, moved):
    plain = all_boxes("ssd300_voc").boxes
    assert int(((all_boxes("ssd300_voc", clip).boxes - plain).abs().amax(-1) > 1e-3).sum()) == moved


def test_clipped_corners_make_half_as_many_positives_again():
    count = {clip: VOC[f"override, {clip}"]["all"]["positives"] for clip in ("unclipped", "cxcywh", "corners")}
    assert count["unclipped"] == 125_664
    assert 1.0 < count["cxcywh"] / count["unclipped"] < 1.02
    assert 1.45 < count["corners"] / count["unclipped"] < 1.55


# --- C6: eleven points


def test_floats_deny_a_point_at_three_recalls():
    def by_floats(correct, objects):
        found = np.cumsum(correct)
        precision, recall = found / np.arange(1, len(found) + 1), found / objects
        return np.mean([precision[recall >= t].max(initial=0) for t in np.arange(0, 1.1, 0.1)])

    denied = [k for k in range(1, 11) if by_floats(np.full(k, True), 10) < eleven_point_ap(np.full(k, True), 10)]
    assert denied == [3, 6, 7]
    assert eleven_point_ap(np.full(3, True), 10) - by_floats(np.full(3, True), 10) == pytest.approx(1 / 11)


# --- the first exercise


def test_ssd300_on_400_pixels():
    maps = (50, 25, 13, 7, 5, 3)
    layout = DefaultBoxLayout(400, maps, (40.0,) * 6, 400.0, LAYOUTS["ssd300_voc"].ratios)
    assert layout.total == 15_194
    assert DefaultBoxGenerator(LAYOUTS["ssd300_voc"])([torch.zeros(1, 1, f, f) for f in maps], (400, 400)).boxes[
        0, 0
    ].tolist() == pytest.approx([-16, -16, 24, 24])
