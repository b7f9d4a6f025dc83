"""What the chapter on IoU-aware RetinaNet says of the paper, number by number."""

from itertools import pairwise

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.models.resnet import Bottleneck, ResNet

from detcore.boxes import iou
from detcore.data import VocDetection
from detcore.losses import iou_quality_term, quality_loss
from detcore.postprocess import select_by_prior
from detcore.scoring import conf_powers, fuse, fused_score, iou_aware_powers
from detcore.structures import BACKGROUND, Assignment, Predictions, Priors, Targets

# The paper's Table 4: alpha (exponent of the class score) to AP, AP50, AP60, AP70, AP75, AP80, AP90 in percent
COLUMNS = ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90")
TABLE_4 = {
    1.0: (34.5, 54.1, 49.5, 42.0, 36.7, 30.1, 11.0),
    0.9: (34.8, 54.3, 49.7, 42.4, 37.1, 30.4, 11.2),
    0.8: (35.0, 54.4, 49.9, 42.6, 37.4, 30.7, 11.4),
    0.7: (35.2, 54.4, 50.1, 43.0, 37.7, 31.2, 11.7),
    0.6: (35.4, 54.3, 50.2, 43.2, 38.0, 31.5, 12.0),
    0.5: (35.5, 54.1, 50.0, 43.3, 38.2, 31.9, 12.2),
    0.4: (35.5, 53.7, 49.8, 43.3, 38.4, 32.5, 12.5),
    0.3: (35.4, 53.0, 49.3, 43.2, 38.5, 32.8, 12.8),
    0.2: (34.8, 51.3, 48.0, 42.5, 38.4, 32.9, 13.1),
    0.1: (32.5, 46.4, 43.7, 39.4, 36.2, 31.7, 13.3),
}
BASELINE_4 = (34.3, 54.5, 49.2, 41.3, 36.4, 29.8, 10.9)
PRODUCT_4 = (35.4, 54.1, 50.0, 43.3, 38.2, 31.9, 12.2)
# Table 1, AP and AP75 of RetinaNet and of IoU-aware RetinaNet, for three trunks
TABLE_1 = (((35.9, 38.4), (36.9, 40.1)), ((38.1, 40.8), (39.2, 42.9)), ((39.0, 41.9), (40.6, 44.2)))
# Table 5, VOC: AP, AP70, AP80, AP90
TABLE_5 = (
    ((51.4, 63.6, 44.9, 15.2), (53.6, 66.1, 48.7, 19.4)),
    ((55.1, 67.5, 50.4, 20.1), (56.2, 68.5, 52.4, 22.8)),
)
FALLING = sorted(TABLE_4, reverse=True)


def column(metric, alphas=FALLING):
    return [TABLE_4[alpha][COLUMNS.index(metric)] for alpha in alphas]


def steps(values):
    return ["up" if b > a else "down" if b < a else "flat" for a, b in pairwise(values)]


def gains(pairs, place):
    return [round(after[place] - before[place], 1) for before, after in pairs]


def wide(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- the two conventions


def test_one_alpha_means_two_scores():
    p, q = wide(0.2), wide(0.9)
    scores = [fuse(p, q, class_power=u, quality_power=v).item() for u, v in (iou_aware_powers(0.4), conf_powers(0.4))]
    assert [round(score, 3) for score in scores] == [0.493, 0.365]


@pytest.mark.parametrize("u", [0.0, 0.2, 0.6, 1.0])
def test_fused_beats_the_class_score_where_the_head_believes_more_in_the_box(u):
    p, q = torch.rand(2, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lifted = fuse(p, q, class_power=u, quality_power=1 - u) > p
    if u < 1:
        assert lifted.equal(q > p)
    else:
        assert not lifted.any()
    assert not (fuse(p, q, class_power=1.0, quality_power=1.0) > p).any()  # the plain product lifts nothing


@pytest.mark.parametrize(
    ("alpha", "survivor"), [(1.0, "A"), (0.75, "A"), (0.7, "B"), (0.35, "B"), (0.3, "C"), (0.1, "C"), (0.05, "D")]
)
def test_survivor_of_the_four_boxes(alpha, survivor):
    boxes = {"A": (0.90, 0.45), "B": (0.75, 0.70), "C": (0.50, 0.86), "D": (0.20, 0.93)}
    assert max(boxes, key=lambda name: boxes[name][0] ** alpha * boxes[name][1] ** (1 - alpha)) == survivor


def test_the_best_of_the_four_boxes_is_c():
    goal = wide(20, 20, 80, 70)
    boxes = {"A": (33, 14, 92, 60), "B": (26, 17, 86, 66), "C": (19, 22, 81, 73), "D": (14, 24, 76, 76)}
    fits = {name: iou(wide(*corners), goal).item() for name, corners in boxes.items()}
    assert max(fits, key=fits.__getitem__) == "C"
    assert fits["D"] < fits["B"]  # D, of which the head is most sure, fits worse than B


# --- erratum 1: the attached target


def test_gradient_of_the_target_is_minus_the_logit():
    o, t = wide(1.5, -1.0, 0.0), torch.full((3,), 0.7, dtype=torch.float64).requires_grad_()
    quality_loss(o, t).sum().backward()
    assert_close(t.grad, wide(-1.5, 1.0, 0.0))


@pytest.mark.parametrize(("logit", "slope"), [(2.0, 2.56), (-2.0, -2.56), (0.0, 0.0)])
def test_attached_target_pushes_the_box_by_the_heads_opinion(logit, slope):
    # a box shifted by d of its width has IoU (1 - d) / (1 + d): .6 at d = 1/4, with slope -2 / (1 + d)^2 = -1.28
    thing = wide(0, 0, 10, 10)

    def loss_at(shift):
        return quality_loss(wide(logit), iou(thing + wide(10, 0, 10, 0) * shift, thing)[None]).item()

    assert_close(iou(thing + wide(2.5, 0, 2.5, 0), thing).item(), 0.6)
    assert_close((loss_at(0.25 + 1e-6) - loss_at(0.25 - 1e-6)) / 2e-6, slope, rtol=0, atol=5e-3)


# --- erratum 2: "as alpha decreases, AP50 falls while AP70 and AP80 rise"


def test_the_sentence_on_alpha_holds_between_0_7_and_0_4():
    middle = [0.7, 0.6, 0.5, 0.4]
    assert steps(column("AP50", middle)) == ["down"] * 3
    assert steps(column("AP70", middle)) == ["up", "up", "flat"]
    assert steps(column("AP80", middle)) == ["up"] * 3


@pytest.mark.parametrize(
    ("metric", "best", "where"),
    [("AP50", 54.4, [0.8, 0.7]), ("AP70", 43.3, [0.5, 0.4]), ("AP80", 32.9, [0.2]), ("AP90", 13.3, [0.1])],
)
def test_stricter_thresholds_peak_at_smaller_alphas(metric, best, where):
    assert max(column(metric)) == best
    assert [alpha for alpha in FALLING if TABLE_4[alpha][COLUMNS.index(metric)] == best] == where


def test_the_sentence_on_alpha_fails_over_the_whole_table():
    assert steps(column("AP50"))[0] == "up"
    assert steps(column("AP70"))[-1] == steps(column("AP80"))[-1] == "down"
    assert steps(column("AP90")) == ["up"] * 9


# --- erratum 3: "no alpha" is alpha = 0.5 with another threshold


def test_product_with_the_mapped_threshold_keeps_the_boxes_of_the_root():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(2, 400, 2, dtype=torch.float64, generator=generator) * 80
    side = torch.rand(2, 400, 2, dtype=torch.float64, generator=generator) * 20 + 4
    boxes = torch.cat([corner, corner + side], dim=-1)
    logits = torch.randn(2, 400, 5, dtype=torch.float64, generator=generator) * 2 - 2
    quality = {"iou": torch.randn(2, 400, 1, dtype=torch.float64, generator=generator)}
    pred = Predictions(logits, torch.zeros_like(boxes), boxes, Priors(boxes, (300, 100)), quality)
    sizes = torch.tensor([[100, 100], [90, 100]])
    root = fused_score(pred, class_power=0.5, quality_power=0.5)
    product = fused_score(pred, class_power=1.0, quality_power=1.0)
    kept = select_by_prior(root, pred, sizes, score_threshold=0.05, max_detections=1000)
    mapped = select_by_prior(product, pred, sizes, score_threshold=0.05**2, max_detections=1000)
    fixed = select_by_prior(product, pred, sizes, score_threshold=0.05, max_detections=1000)
    assert kept.prior.equal(mapped.prior)
    assert kept.labels.equal(mapped.labels)
    assert 0 < fixed.valid.sum() < kept.valid.sum()


def test_no_alpha_and_one_half_agree_in_the_paper_but_for_the_average():
    assert PRODUCT_4[1:] == TABLE_4[0.5][1:]
    assert (PRODUCT_4[0], TABLE_4[0.5][0]) == (35.4, 35.5)


# --- errata 4 to 6


def test_the_abstracts_coco_range_is_the_gain_at_one_threshold():
    assert gains(TABLE_1, 1) == [1.7, 2.1, 2.3]
    voc = [gain for place in (1, 2, 3) for gain in gains(TABLE_5, place)]
    assert (min(voc), max(voc)) == (1.0, 4.2)


def test_resnext_32x8d_has_twice_the_parameters_of_32x4d():
    def millions(width):
        with torch.device("meta"):
            net = ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=width)
        return round(sum(p.numel() for p in net.parameters()) / 1e6, 1)

    assert (millions(4), millions(8)) == (44.2, 88.8)


def test_voc_trains_on_the_list_and_not_on_the_folder(tmp_path):
    year = tmp_path / "VOC2012"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (year / name).mkdir(parents=True)
    for k in range(3):
        Image.new("RGB", (60, 40)).save(year / f"JPEGImages/2008_00000{k}.jpg")
        size = "<size><width>60</width><height>40</height><depth>3</depth></size>"
        (year / f"Annotations/2008_00000{k}.xml").write_text(f"<annotation>{size}</annotation>")
    (year / "ImageSets/Main/trainval.txt").write_text("2008_000000\n2008_000002\n")
    assert len(VocDetection(tmp_path, "2012", "trainval")) == 2


# --- what is true as printed


def test_the_papers_gains_follow_from_its_tables():
    assert gains(TABLE_1, 0) == [1.0, 1.1, 1.6]
    assert round(TABLE_4[1.0][0] - BASELINE_4[0], 1) == 0.2  # training the branch, no fusion
    assert round(max(column("AP")) - BASELINE_4[0], 1) == 1.2
    against = {alpha: gains([(BASELINE_4, TABLE_4[alpha])], COLUMNS.index("AP50")) for alpha in (0.5, 0.4)}
    assert against == {0.5: [-0.4], 0.4: [-0.8]}
    strict = [gains([(BASELINE_4, TABLE_4[a])], COLUMNS.index(m))[0] for a in (0.5, 0.4) for m in ("AP70", "AP80")]
    assert (min(strict), max(strict)) == (2.0, 2.7)
    assert gains(TABLE_5, 0) == [2.2, 1.1]


# --- alpha = 0, and the questions of users


def test_quality_alone_fills_the_slots_with_copies_of_one_box():
    corner = torch.arange(40.0)[:, None] * 50
    apart = torch.cat([corner, corner, corner + 30, corner + 30], dim=1)[None]
    generator = torch.Generator().manual_seed(0)
    logits, quality = torch.randn(1, 40, 80, generator=generator), torch.randn(1, 40, 1, generator=generator)
    pred = Predictions(logits, torch.zeros(1, 40, 4), apart, Priors(apart, (40,)), {"iou": quality})
    scores = fused_score(pred, class_power=0.0, quality_power=1.0)
    found = select_by_prior(scores, pred, torch.tensor([[2000, 2000]]))
    best, second = quality[0, :, 0].argsort(descending=True)[:2].tolist()
    assert found.prior[0, :80].eq(best).all()
    assert found.prior[0, 80:].eq(second).all()
    assert found.labels[0, :80].unique().numel() == 80


def test_a_fixed_threshold_stops_filtering_under_the_root():
    assert round(fuse(wide(0.01), wide(0.5), class_power=0.5, quality_power=0.5).item(), 3) == 0.071


@pytest.mark.parametrize("of_the_negative", [-3.0, 3.0])
def test_the_term_asks_positives_only_and_rates_the_regressed_box(of_the_negative):
    priors = torch.tensor([[[0.0, 0, 10, 10], [0.0, 0, 10, 10]]])
    boxes = torch.tensor([[[0.0, 0, 10, 8], [0.0, 0, 10, 8]]])  # IoU 1 with the object, the priors' is .8
    one = Targets(boxes[:, :1], torch.tensor([[0]]), torch.tensor([[True]]))
    slots = torch.zeros(1, 2, dtype=torch.int64)
    match = Assignment(torch.tensor([[0, BACKGROUND]]), slots, boxes, torch.tensor([[0.8, 0.8]]), one)
    logits = torch.tensor([[[3.0], [of_the_negative]]])
    pred = Predictions(torch.zeros(1, 2, 1), torch.zeros(1, 2, 4), boxes, Priors(priors, (2,)), {"iou": logits})
    assert_close(iou_quality_term(pred, match), quality_loss(logits[0, :1, 0], torch.ones(1)).sum())
