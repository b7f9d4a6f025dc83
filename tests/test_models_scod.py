"""SCOD: its blocks one by one, its limits, what it adds to DSSD and to RetinaNet. The rest: test_models."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from benchmarks.scod import QUICK, rows
from detcore.checkpoint import load_checkpoint
from detcore.cli import main
from detcore.losses.segmentation import weak_segmentation_labels
from detcore.models import get_model
from detcore.nn import TinyTrunk
from detcore.nn.deconvolution import group_norm
from detcore.nn.scws import SegmentationBlock, SegmentationBlocks
from recipes.scod_scenes import TABLES
from tests.samples import no_hook, targets_of
from tests.test_models import calm, count, redraw, two_pictures
from tests.zoo import small, thin

EVERY_RIDE = pytest.mark.parametrize(("name", "plain"), [("scod320", "dssd320"), ("retinanet_scws", "retinanet")])


def built(name, **options):
    torch.manual_seed(0)
    return small(name, **options)


# --- the block


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("side", [1, 2, 5, 8])
def test_block_by_hand(attention, side):
    block = SegmentationBlock(8, 4, attention=attention, norm=group_norm).eval()
    nn.init.normal_(block.classify.weight, std=0.3)
    x = torch.randn(2, 8, side, side)
    refined, logits = block(x)
    said = nn.functional.conv2d(x, block.classify.weight, block.classify.bias, padding=1)
    assert_close(logits, said)
    assert_close(said.softmax(1).sum(1), torch.ones(2, side, side))
    joined = torch.cat([x, said.exp() / said.exp().sum(1, keepdim=True)], dim=1)
    weight = block.restore[0].weight[..., 0, 0]
    restored = block.restore[1](torch.einsum("oc,bchw->bohw", weight, joined)).clamp(min=0)
    if attention:
        half = nn.functional.conv2d(
            restored, block.attention.down.weight, block.attention.down.bias, stride=2, padding=1
        ).clamp(min=0)
        assert half.shape[-1] == -(-side // 2)  # 5 to 3
        out = nn.functional.conv2d(half, block.attention.out.weight, block.attention.out.bias, padding=1)
        mask = nn.functional.interpolate(out, size=(side, side), mode="bilinear").sigmoid()
        restored = restored * (1 + mask)
    assert refined.shape == x.shape
    assert_close(refined, restored, rtol=1e-4, atol=1e-5)


def test_block_begins_undecided_and_its_answer_is_no_constant():
    block = SegmentationBlock(16, 4, norm=group_norm)
    x = torch.randn(2, 16, 6, 6)
    refined, logits = block(x)
    assert_close(logits.softmax(1), torch.full((2, 4, 6, 6), 0.25), rtol=0, atol=0.15)
    refined.square().sum().backward()  # the detection loss alone
    assert block.classify.weight.grad.abs().sum() > 0


def test_blocks_want_a_range_each():
    for channels, ranges in (({}, {}), ({0: 8}, {1: (0.0, 1.0)})):
        with pytest.raises(ValueError, match="channels and ranges must be given for the same maps, one at least"):
            SegmentationBlocks(channels, 4, ranges)


# --- limits


@EVERY_RIDE
def test_without_blocks_it_is_the_plain_detector_bit_for_bit(name, plain):
    options = {"box_loss": "smooth_l1"}
    ours, theirs = built(name, blocks=(), **options), built(plain, **options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    images, targets = two_pictures()
    for detector in (ours, theirs):
        sum(detector.loss(images, targets).values()).backward()
    a, b = (detector.loss(images, targets) for detector in (ours, theirs))
    assert list(a) == list(b) == ["cls", "box"]
    assert all(a[term].equal(b[term]) for term in b)
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.equal(other), key
        assert mine.grad.equal(other.grad), key
    sizes = torch.full((2, 2), 128)
    found = [redraw_alike(detector).eval().detect(images, sizes) for detector in (ours, theirs)]
    assert found[1].valid.sum() > 20
    assert found[0].boxes.equal(found[1].boxes)
    assert found[0].scores.equal(found[1].scores)
    assert not ours.predict(images).aside


def redraw_alike(detector):
    torch.manual_seed(5)
    return redraw(detector)


def test_scod_without_blocks_differs_from_dssd_in_the_box_loss_only():
    images, targets = two_pictures()
    ours, theirs = (d.loss(images, targets) for d in (built("scod320", blocks=()), built("dssd320")))
    assert ours["cls"].equal(theirs["cls"])
    assert not ours["box"].equal(theirs["box"])


@EVERY_RIDE
def test_weights_before_the_blocks_are_the_plain_detectors(name, plain):
    ours, theirs = built(name), built(plain)
    inner = ours.body.pyramid if name == "scod320" else ours.body.body
    assert all(a.equal(b) for a, b in zip(inner.parameters(), theirs.body.parameters(), strict=True))


# --- parameters


def block_parameters(channels, classes, *, attention=True):
    logits, middle = classes + 1, channels // 4
    classify = 9 * channels * logits + logits
    restore = (channels + logits) * channels + 2 * channels  # no bias: a norm follows
    attend = 9 * channels * middle + middle + 9 * middle * channels + channels
    return classify + restore + (attend if attention else 0)


WIDTHS = {
    ("scod320", "backbone"): (64, 96, 128, 64),
    ("scod320", "decoder"): (32, 32, 32, 32),
    ("retinanet_scws", "backbone"): (64, 64, 64, 64),
}


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize(("name", "position"), WIDTHS)
def test_each_block_alone_adds_exactly_its_parameters(name, position, attention):
    placed = {"position": position} if name == "scod320" else {}
    plain = count(small(name, blocks=()))
    for chosen in [(), (1,), (2,), (3,), (4,), (1, 2), (1, 2, 3), (4, 2), (1, 2, 3, 4)]:
        detector = small(name, blocks=chosen, attention=attention, **placed)
        added = sum(block_parameters(WIDTHS[name, position][n - 1], 3, attention=attention) for n in chosen)
        assert count(detector) - plain == added, chosen


@pytest.mark.parametrize(("name", "plain"), [("scod320", 153_388_784), ("scod512", 156_294_584)])
def test_scod_at_full_size(name, plain):
    with torch.device("meta"):
        detector = get_model(name, num_classes=20).eval()
        side = detector.priors.layout.size
        pred = detector.predict(torch.zeros(1, 3, side, side))
    assert count(detector) == plain + sum(block_parameters(width, 20) for width in (512, 2048, 1024, 1024))
    assert detector.inputs.warp_side == side
    cells = {320: (40, 20, 10, 5), 512: (64, 32, 16, 8)}[side]
    assert pred.aside["segmentation"].shape == (1, sum(n * n for n in cells), 21)
    assert pred.logits.shape[1] == {320: 17080, 512: 43688}[side]


def test_scod_takes_resnet101():
    with torch.device("meta"):
        fifty, hundred = (get_model("scod320", num_classes=80, backbone=f"resnet{n}") for n in (50, 101))
        dssds = [get_model("dssd320", num_classes=80, backbone=f"resnet{n}") for n in (50, 101)]
    assert count(hundred) - count(fifty) == count(dssds[1]) - count(dssds[0]) == 18_992_128


# --- ranges and labels


def ranges_of(detector):
    return list(detector.body.blocks.ranges.values())


def test_ranges_come_from_the_detectors_own_priors():
    highs = [high for _, high in ranges_of(small("scod320"))]
    assert_close(highs, [3072.0, 11284.48, 26951.68, math.inf])
    strict = ranges_of(small("scod320", open_top=False))
    assert_close(strict[3], (26951.68, 49254.4))
    assert_close(ranges_of(small("scod512"))[0], (0.0, 1835.008))
    base4 = ranges_of(small("retinanet_scws", anchor_base=4.0))
    assert_close(base4[0][1], 4 * ranges_of(small("retinanet_scws", anchor_base=2.0))[0][1])


def test_a_block_answers_for_the_same_objects_whatever_others_there_are():
    whole = ranges_of(small("scod320"))
    for chosen in itertools.chain.from_iterable(itertools.combinations((1, 2, 3, 4), n) for n in (1, 2, 3)):
        assert ranges_of(small("scod320", blocks=chosen)) == [whole[n - 1] for n in chosen]


def test_ranges_scale_with_the_picture_as_default_boxes_do_and_anchors_do_not():
    for name, scale in (("scod320", 0.16), ("retinanet_scws", 1.0)):
        detector = small(name).eval()
        with torch.no_grad():
            aside = detector.predict(torch.zeros(1, 3, 128, 128)).aside
        wanted = [(low * scale, high * scale) for low, high in ranges_of(detector)]
        sides = (16, 8, 4, 2)
        rows = [pair for pair, side in zip(wanted, sides, strict=True) for _ in range(side * side)]
        assert_close(aside["segmentation_areas"][0], torch.tensor(rows), rtol=1e-6, atol=0)
        assert aside["segmentation_cells"][0, 256].tolist() == [0.0, 0.0, 16.0, 16.0]


def test_model_keeps_its_cells_in_float32_in_half_precision():
    detector = small("scod320").eval()
    images, _ = two_pictures()
    wide, narrow = (d.predict(images).aside for d in (detector, copy.deepcopy(detector).bfloat16()))
    assert narrow["segmentation"].dtype == torch.bfloat16
    for key in ("segmentation_cells", "segmentation_areas"):
        assert narrow[key].equal(wide[key])


def test_strict_top_turns_the_largest_object_into_background():
    images = torch.rand(1, 3, 320, 320)
    targets = targets_of(([[5.0, 5, 315, 315]], [1]), dtype=torch.float32)
    for open_top, cells in ((True, 25), (False, 0)):
        detector = small("scod320", backbone=TinyTrunk((4, 8, 8, 8, 8)), channels=8, open_top=open_top)
        aside = detector.predict(images).aside
        labels = weak_segmentation_labels(aside["segmentation_cells"], aside["segmentation_areas"], targets)
        assert int((labels == 1).sum()) == cells


# --- switches


def test_switches_reach_the_losses():
    images, targets = two_pictures()
    plain = calm(built("scod320")).loss(images, targets)
    found = calm(built("scod320", seg_weight=0.5, box_weight=1.25)).loss(images, targets)
    assert_close(found["scws"], 0.5 * plain["scws"])
    assert_close(found["box"], 1.25 * plain["box"])
    assert found["cls"].equal(plain["cls"])
    assert_close(plain["scws"].item(), 4 * math.log(4), rtol=0.1, atol=0)  # undecided blocks, three classes
    assert built("scod320", closed="right").losses["scws"][1].keywords == {"closed": "right"}
    assert built("scod320", aiou_beta=0.6).losses["box"][1].keywords["measure"].keywords == {"beta": 0.6}
    assert built("retinanet_scws", seg_weight=0.0).losses["scws"][0] == 0.0


@pytest.mark.parametrize("position", ["backbone", "decoder"])
def test_every_position_trains_every_weight(position):
    detector = built("scod320", position=position, blocks=(1, 3))
    images, targets = two_pictures()
    losses = detector.loss(images, targets)
    assert_close(losses["scws"].item(), 2 * math.log(4), rtol=0.1, atol=0)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


def test_segmentation_teaches_the_maps_before_the_blocks_only():
    detector = built("scod320", blocks=(1,))
    images, targets = two_pictures()
    detector.loss(images, targets)["scws"].backward()
    taught = {
        ".".join(name.split(".")[1:4]) for name, p in detector.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert {"blocks.blocks.0", "pyramid.trunk.stem"} < taught
    assert not any(part.startswith(("pyramid.deconv", "pyramid.pred", "pyramid.stages")) for part in taught)
    assert detector.head.outputs["deltas"][0].weight.grad is None


def test_blocks_learn_to_segment():
    torch.manual_seed(0)
    detector = thin("scod320", (8, 16, 32, 32, 32), channels=32)
    images, targets = two_pictures()
    optimizer = torch.optim.AdamW(detector.parameters(), 4e-3)
    for _ in range(40):
        optimizer.zero_grad()
        detector.loss(images, targets)["scws"].backward()
        optimizer.step()
    aside = detector.predict(images).aside
    labels = weak_segmentation_labels(aside["segmentation_cells"], aside["segmentation_areas"], targets)
    said = aside["segmentation"].argmax(-1)
    foreground = labels >= 0
    assert foreground.sum() > 10
    assert (said == labels)[foreground].double().mean() > 0.9
    assert (said == 3)[~foreground].double().mean() > 0.95  # background is the last


def test_bodies_of_your_own_may_say_something_aside():
    class Talker(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, images):
            return self.body(images), {"mean": images.mean((1, 2, 3))}

    detector = small("retinanet").eval()
    images, _ = two_pictures()
    plain = detector.predict(images)
    detector.body = Talker(detector.body)
    pred = detector.predict(images)
    assert pred.logits.equal(plain.logits)
    assert pred.aside["mean"].shape == (2,)
    assert plain.aside == {}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("scod320", {"blocks": (0,)}, r"scod: blocks must be different numbers of 1 to 4; got \(0,\)"),
        ("scod320", {"blocks": (1, 1)}, r"blocks must be different numbers of 1 to 4; got \(1, 1\)"),
        ("retinanet_scws", {"blocks": (5,)}, r"retinanet_scws: blocks must be different numbers"),
        ("scod320", {"position": "head"}, 'position must be "backbone" or "decoder"; got .head'),
        ("scod320", {"seg_weight": -1.0}, "scod: seg_weight must be >= 0; got -1.0"),
        ("scod320", {"box_weight": -1.0}, "scod: box_weight must be >= 0; got -1.0"),
        ("retinanet_scws", {"seg_weight": -1.0}, "retinanet_scws: seg_weight must be >= 0"),
        ("scod320", {"closed": "left"}, 'closed must be "right" or None; got .left'),
        ("scod320", {"aiou_beta": 0.0}, r"beta must be in \(0, 1\]; got 0.0"),
        ("scod320", {"box_loss": "l1"}, "box_loss must be .*; got .l1"),
    ],
)
def test_wrong_options_are_refused_when_the_model_is_built(name, options, message):
    with no_hook(), pytest.raises(ValueError, match=message):
        get_model(name, num_classes=2, **{"backbone": TinyTrunk((4, 8, 8, 8, 8)), "channels": 8, **options})


def test_lists_from_a_file_are_as_good_as_tuples():
    assert ranges_of(small("scod320", blocks=[1, 2])) == ranges_of(small("scod320"))[:2]


# --- from outside


def test_command_line_trains_evaluates_and_goes_on(tmp_path, capsys):
    data = "scenes:size=64,images=8,test_images=4,seed=3"
    plain = ["--workers", "0", "--device", "cpu", "--threads", "1"]
    words = ["train", "--model", "scod320", "--backbone", "tiny", "--data", data, "--size", "64", "--batch-size", "4"]
    words += [*plain, "--precision", "fp32", "--output", str(tmp_path), "blocks=(1,3)", "aiou_beta=0.7"]
    assert main([*words, "--epochs", "1"]) == 0
    assert main([*words, "--epochs", "2", "--resume", "auto"]) == 0
    capsys.readouterr()
    assert main(["eval", "--checkpoint", str(tmp_path), "--data", data, "--device", "cpu", "--workers", "0"]) == 0
    assert "AP50" in capsys.readouterr().out
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    assert tuple(checkpoint["spec"]["blocks"]) == (1, 3)
    assert {name.split(".")[3] for name in checkpoint["model"] if name.startswith("body.blocks.blocks")} == {"0", "2"}


@pytest.mark.parametrize("name", ["labels", "term", "loop"])
def test_benchmark_compares_equals(name):
    rows(QUICK)[name]().check()


def test_recipe_names_detectors_that_exist():
    for table in TABLES.values():
        for variant, options in table.items():
            with torch.device("meta"):
                assert get_model(num_classes=6, backbone="tiny", **options).losses, variant
    # the sweep leaves out 1 and 0.8, because the main table has them under other names
    assert TABLES["main"]["scod"].get("aiou_beta", 0.8) == 0.8
    beta = TABLES["beta"]["beta0.9"] | {"aiou_beta": 1.0}
    found = [built(**{**options, "num_classes": 3}) for options in (beta, TABLES["main"]["iou"])]
    images, targets = two_pictures()
    assert found[0].loss(images, targets)["box"].equal(found[1].loss(images, targets)["box"])
