"""Claims of the chapter on boxes, priors and matching: what it says is so, and what it says about others."""

import pytest
import torch
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator as TheirGenerator
from torchvision.models.detection.image_list import ImageList

from detcore.assigners import max_iou_assign
from detcore.boxes import diou, giou, iou, pairwise_iou
from detcore.coders import DeltaCoder
from detcore.data import Scenes
from detcore.priors import AnchorGenerator
from detcore.structures import BACKGROUND, IGNORE, Priors, Targets, pad_targets


def maps_of(*sides):
    return [torch.zeros(1, 1, side, side) for side in sides]


SMALL = maps_of(12, 6, 3, 2, 1)  # 96 x 96 pixels


# --- E0.1: an object out of reach


def on_a_line(*spans):
    return torch.tensor([[start, 0.0, stop, 1.0] for start, stop in spans])


FIVE = on_a_line((1, 11), (-3, 7), (102, 112), (300, 310), (104, 114))
FOUR = on_a_line((0, 10), (5, 16), (100, 110), (900, 910))  # the last one is out of everybody's reach
OVERLAP = pairwise_iou(FIVE, FOUR)


def test_unguarded_rule_gives_all_five_priors_to_the_object_that_none_overlaps():
    best, owner = OVERLAP.max(dim=1)
    owner = torch.where(best >= 0.5, owner, torch.where(best < 0.4, BACKGROUND, IGNORE))
    assert owner.tolist() == [0, 0, 2, BACKGROUND, IGNORE]
    for m, column in enumerate(OVERLAP.T):
        owner[column == column.max()] = m
    assert owner.tolist() == [3, 3, 3, 3, 3]


def test_torchvision_makes_a_negative_and_an_ignored_prior_positive():
    theirs = Matcher(0.5, 0.4, allow_low_quality_matches=True)(OVERLAP.T)
    assert theirs.tolist() == [0, 0, 2, 0, 2]


@pytest.mark.parametrize(("rule", "labels"), [("object", [1, 0, 2, -1, -2]), ("prior", [0, 0, 2, -1, -2])])
def test_guard_leaves_everybody_alone(rule, labels):
    objects = Targets(FOUR[None], torch.arange(4)[None], torch.ones(1, 4, dtype=torch.bool))
    assert max_iou_assign(Priors(FIVE[None], (5,)), objects, force_match=rule).labels[0].tolist() == labels


# --- E0.2: two rules for a forced match


def eight_objects(seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 80, (8, 2), generator=generator)
    sides = torch.randint(8, 48, (8, 2), generator=generator)
    return pad_targets([{"boxes": torch.cat([corner, corner + sides], dim=1), "labels": torch.arange(8)}])


def test_rules_differ_on_few_of_3069_priors():
    anchors = AnchorGenerator()(maps_of(16, 8, 4, 2, 1), (128, 128))
    assert anchors.boxes.shape[1] == 3069
    differing = []
    for seed in range(12):
        found = [max_iou_assign(anchors, eight_objects(seed), force_match=rule) for rule in ("object", "prior")]
        assert found[0].positive.equal(found[1].positive)  # who is positive is not in question, only for whom
        differing.append(int((found[0].labels != found[1].labels).sum()))
    assert 0 in differing
    assert 1 in differing
    assert 10 < max(differing) < 50


# --- three conventions


def test_torchvision_places_p7_at_106_pixels_where_others_have_128():
    large = maps_of(40, 20, 10, 5, 3)
    sides = tuple((s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in (32, 64, 128, 256, 512))
    images = ImageList(torch.zeros(1, 3, 320, 320), [(320, 320)])
    theirs = TheirGenerator(sides, ((0.5, 1.0, 2.0),) * 5)(images, large)[0]
    ours = {s: AnchorGenerator(style=s)(large, (320, 320)).boxes[0] for s in ("exact", "mmdet0", "torchvision")}
    assert ours["torchvision"].equal(theirs)
    p6, p7 = 9 * (1600 + 400 + 100), 9 * (1600 + 400 + 100 + 25)
    steps = {style: [float(b[p + 9, 0] - b[p, 0]) for p in (p6, p7)] for style, b in ours.items()}
    assert steps == {"exact": [64, 128], "mmdet0": [64, 128], "torchvision": [64, 106]}


# --- what the figures show


def test_iou_goes_blind_where_its_relatives_see():
    fixed = torch.tensor([0.0, 0.0, 40.0, 40.0])
    near, far = fixed + torch.tensor([45.0, 0.0, 45.0, 0.0]), fixed + torch.tensor([75.0, 0.0, 75.0, 0.0])
    assert iou(fixed, near) == iou(fixed, far) == 0
    assert giou(fixed, near) > giou(fixed, far) + 0.1
    assert diou(fixed, near) > diou(fixed, far) + 0.1
    middle, aside = torch.tensor([12.0, 12.0, 28.0, 28.0]), torch.tensor([20.0, 12.0, 36.0, 28.0])  # both inside
    assert iou(fixed, middle) == iou(fixed, aside)
    assert giou(fixed, middle) == giou(fixed, aside)
    assert diou(fixed, middle) > diou(fixed, aside) + 0.01


def test_deltas_do_not_depend_on_scale_and_decode_to_at_most_62_5_times_the_prior():
    prior, box = torch.tensor([0.0, 0.0, 20.0, 20.0]), torch.tensor([5.0, 0.0, 25.0, 40.0])
    coder = DeltaCoder()
    assert coder.encode(box, prior).tolist() == pytest.approx(coder.encode(10 * box, 10 * prior).tolist())
    x1, _, x2, _ = coder.decode(torch.tensor([0.0, 0.0, 60.0, -60.0]), prior).tolist()
    assert (x2 - x1) / 20 == pytest.approx(62.5)


@pytest.mark.parametrize(("scales", "worst"), [((1.0,), 0.5), ((1.0, 2 ** (1 / 3), 2 ** (2 / 3)), 2 ** (-1 / 3))])
def test_worst_iou_of_a_centred_square(scales, worst):
    sides = torch.tensor([4 * stride * k for stride in (8, 16, 32, 64) for k in scales])
    objects = torch.linspace(32, 256, 2001)
    ratio = objects[:, None] / sides
    best = torch.minimum(ratio, 1 / ratio).square().amax(1)
    assert best.min().item() == pytest.approx(worst, abs=2e-3)


def best_iou(size, offset, base):
    low, high = 40.0 + offset - size / 2, 40.0 + offset + size / 2
    anchors = AnchorGenerator(base=base)(SMALL, (96, 96)).boxes[0]
    return float(pairwise_iou(anchors, torch.tensor([[low, low, high, high]])).max())


def test_small_base_leaves_gaps_and_large_base_misses_small_sizes():
    assert best_iou(18, 0, 1.5) == pytest.approx(0.89, abs=0.005)
    assert best_iou(18, 4, 1.5) == pytest.approx(0.47, abs=0.005)
    assert best_iou(33, 0, 4.0) == pytest.approx(0.94, abs=0.005)
    assert best_iou(33, 4, 4.0) == pytest.approx(0.65, abs=0.005)
    assert max(best_iou(8, offset, 4.0) for offset in (0, 2, 4)) < 0.07


def test_small_objects_get_few_positives_or_forced_ones():
    scenes = Scenes(100, size=96)
    objects = pad_targets([scenes.target(i) for i in range(len(scenes))])
    side = (objects.boxes[..., 2:] - objects.boxes[..., :2]).prod(-1).sqrt()[objects.valid]
    tiny, middling = side < 12, (side >= 16) & (side < 24)
    counts, reached = {}, {}
    for base in (1.5, 4.0):
        anchors = AnchorGenerator(base=base)(SMALL, (96, 96))
        match = max_iou_assign(anchors, objects)
        slots = range(objects.boxes.shape[1])
        own = torch.stack([(match.positive & (match.index == m)).sum(1) for m in slots], dim=1)
        counts[base] = own[objects.valid].double()
        reached[base] = pairwise_iou(anchors.boxes, objects.boxes).amax(1)[objects.valid]
    assert counts[1.5][tiny].median() < counts[1.5][middling].median()
    # base 4: more positives for the tiny ones than for larger ones, and not one of them a fit
    assert counts[4.0][tiny].median() > counts[4.0][middling].median()
    assert (reached[4.0][tiny] < 0.5).all()
    assert reached[4.0][tiny].mean() < 0.15


def test_cells_beyond_a_picture_padded_to_32_are_ignored():
    priors = AnchorGenerator(base=1.5)(SMALL, (96, 96))
    one = {"boxes": torch.tensor([[10.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([0])}
    match = max_iou_assign(priors, pad_targets([one, one], sizes=torch.tensor([[50, 96], [96, 96]])))
    beyond = priors.cells[:, 1] >= 64
    assert match.ignored[0][beyond].all()
    assert not match.ignored[1][beyond].any()
    assert match.labels[0][~beyond].equal(match.labels[1][~beyond])


def test_counts_of_the_first_exercise():
    cells = sum(h * w for h, w in [(76, 128), (38, 64), (19, 32), (10, 16), (5, 8)])
    assert (cells, 9 * cells) == (12_968, 116_712)
