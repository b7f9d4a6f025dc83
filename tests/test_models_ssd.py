"""The SSD family at full size: parameters, maps, other people's weights. What holds for every detector: test_models."""

import functools
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models.detection import ssd as torchvision_ssd
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator as TorchvisionGenerator
from torchvision.models.vgg import cfgs, make_layers

from detcore.coders import DeltaCoder
from detcore.losses.refine import surely_background
from detcore.models.dssd import dssd320, dssd321, dssd512, dssd513
from detcore.models.fssd import FusedPyramid, fssd300, fssd512
from detcore.models.refinedet import RefineHead, refined_score, refinedet320, refinedet512
from detcore.models.ssd import from_torchvision, ssd300, ssd512
from detcore.nn import TinyTrunk
from detcore.nn.level_head import flatten_map
from detcore.nn.transfer import TransferConnections
from detcore.scoring import softmax_score
from detcore.structures import Priors, pad_targets
from tests.samples import no_hook


def count(module):
    return sum(p.numel() for p in module.parameters())


def on_meta(factory, **options):
    with torch.device("meta"):
        return factory(**{"num_classes": 20, **options})


def maps_of(detector, side):
    """(channels, side) of every level's map of a picture, and how many priors there are on them."""
    with torch.device("meta"):
        maps = detector.body(torch.zeros(1, 3, side, side))
        pred = detector.head(maps, detector.priors(maps, (side, side)))
    return [(m.shape[1], m.shape[2]) for m in maps], pred


SSD300_MAPS = [(512, 38), (1024, 19), (512, 10), (256, 5), (256, 3), (256, 1)]
SSD512_MAPS = [(512, 64), (1024, 32), (512, 16), (256, 8), (256, 4), (256, 2), (256, 1)]


FSSD300_MAPS = [(512, 38), (512, 19), (256, 10), (256, 5), (256, 3), (256, 1)]
FSSD512_MAPS = [(512, 64), (512, 32), (256, 16), (256, 8), (256, 4), (256, 2), (256, 1)]
DSSD320_MAPS = [(1024, side) for side in (40, 20, 10, 5, 3, 1)]
DSSD512_MAPS = [(1024, side) for side in (64, 32, 16, 8, 4, 2, 1)]
REFINE320_MAPS = [(512, 40), (512, 20), (1024, 10), (512, 5)]
REFINE512_MAPS = [(512, 64), (512, 32), (1024, 16), (512, 8)]
RESNET320_MAPS = [(512, 40), (1024, 20), (2048, 10), (512, 5)]
RESNET512_MAPS = [(512, 64), (1024, 32), (2048, 16), (512, 8)]


@pytest.mark.parametrize(
    ("factory", "classes", "parameters", "maps", "priors"),
    [
        (ssd300, 20, 26_285_486, SSD300_MAPS, 8732),
        (ssd300, 80, 34_305_206, SSD300_MAPS, 8732),
        (ssd512, 20, 27_188_676, SSD512_MAPS, 24564),
        (ssd512, 80, 36_038_196, SSD512_MAPS, 24564),
        (fssd300, 20, 33_902_510, FSSD300_MAPS, 8732),
        (fssd512, 20, 35_297_092, FSSD512_MAPS, 24564),
        (dssd320, 20, 153_388_784, DSSD320_MAPS, 17080),
        (dssd321, 20, 172_380_912, DSSD320_MAPS, 17080),
        (dssd512, 20, 156_294_584, DSSD512_MAPS, 43688),
        (dssd513, 20, 175_286_712, DSSD512_MAPS, 43688),
        (partial(dssd320, merge=None), 20, 97_534_192, DSSD320_MAPS, 17080),
        (refinedet320, 20, 34_440_884, REFINE320_MAPS, 6375),
        (refinedet512, 20, 34_440_884, REFINE512_MAPS, 16320),
        (refinedet320, 80, 36_100_484, REFINE320_MAPS, 6375),
        (partial(refinedet320, backbone="resnet101"), 80, 82_451_588, RESNET320_MAPS, 6375),
        (partial(refinedet512, backbone="resnet101"), 80, 82_451_588, RESNET512_MAPS, 16320),
    ],
)
def test_detector_has_the_published_size(factory, classes, parameters, maps, priors):
    detector = on_meta(factory, num_classes=classes).eval()
    assert count(detector) == parameters
    found, pred = maps_of(detector, detector.priors.layout.size)
    assert found == maps
    assert pred.logits.shape == (1, priors, classes + 1)
    assert pred.boxes.shape == (1, priors, 4)


def test_ssd_with_batch_norm_adds_only_its_scales():
    assert count(on_meta(ssd300, backbone="vgg16_bn")) == 26_285_486 + 2 * (4224 + 2048)


def test_ssd_normalises_conv4_3_from_20():
    detector = ssd300(num_classes=2, backbone=TinyTrunk((4, 4, 4, 4, 4)))
    assert detector.body.norms["0"].weight.tolist() == [20.0] * 4
    assert list(detector.body.norms) == ["0"]


def test_ssd_takes_pictures_of_its_own_size_on_vgg_and_any_on_a_small_trunk():
    assert on_meta(ssd512).inputs.warp_side == 512
    small = ssd300(num_classes=2, backbone="tiny", channels=8)
    assert small.inputs.warp_side is None
    assert ssd300(num_classes=2, backbone="tiny", warp_side=96).inputs.warp_side == 96


def test_warped_pictures_come_back_in_their_own_pixels():
    detector = ssd300(num_classes=2, backbone=TinyTrunk((4, 4, 4, 4, 4)), channels=8, warp_side=64).eval()
    wide = torch.rand(3, 32, 128)
    inside = detector.inputs.batch([wide])
    assert inside.images.shape == (1, 3, 64, 64)
    own = detector([wide])[0]["boxes"]
    warped = detector(list(inside.images))[0]["boxes"]
    assert len(own) > 5
    assert_close(own, warped * torch.tensor([2.0, 0.5, 2.0, 0.5]))
    assert own[:, 2].max() > 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be >= 1, background not counted; got 0"),
        ({"boxes": "lvis"}, 'boxes must be "voc" or "coco"; got .lvis'),
        ({"clip": "all"}, "clip must be None"),
        ({"backbone": "resnet50"}, 'backbone must be "vgg16", .*; got resnet50'),
        ({"backbone": nn.Identity()}, "a module with a tuple `channels`.*; got Identity"),
        ({"weights_backbone": "DEFAULT"}, 'weights_backbone must be None unless backbone is "vgg16"'),
        ({"positive_iou": 0.0}, r"positive_iou must be in \(0, 1\]"),
        ({"rule": "all"}, "rule must be"),
        ({"mining_ratio": -1.0}, "ratio must be >= 0; got -1.0"),
        ({"score_threshold": 2.0}, r"score_threshold must be in \[0, 1\]"),
        ({"candidates": 0}, "candidates and max_detections must be >= 1"),
        ({"warp_side": -1}, "warp_side must be >= 1"),
    ],
)
def test_ssd_refuses_wrong_options_when_it_is_built(options, message):
    with no_hook(), pytest.raises(ValueError, match=message):
        ssd300(**{"num_classes": 2, "backbone": TinyTrunk((4, 4, 4, 4, 4)), **options})


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (fssd300, {"size": 300}, "multiple values"),
        (fssd300, {"boxes": "lvis"}, 'fssd: boxes must be "voc" or "coco"; got .lvis'),
        (dssd320, {"merge": "max"}, 'merge must be "product" or "sum"; got .max'),
        (dssd320, {"middle_kernel": 2}, "middle_kernel must be 3 or 1; got 2"),
        (dssd320, {"backbone": "vgg16"}, 'dssd: backbone must be "resnet50", .*; got vgg16'),
        (dssd320, {"norm": "fixed"}, "norm only apply to resnet50 and resnet101"),
        (refinedet320, {"min_objectness": 2.0}, r"min_objectness must be in \[0, 1\]; got 2.0"),
        (refinedet320, {"mining_ratio": -1.0}, "ratio must be >= 0"),
    ],
)
def test_family_refuses_wrong_options(factory, options, message):
    with no_hook(), pytest.raises((ValueError, TypeError), match=message):
        factory(**{"num_classes": 2, "backbone": TinyTrunk((4, 4, 4, 4, 4)), "channels": 8, **options})


# --- FSSD


def test_fused_pyramid_by_hand():
    body = FusedPyramid(TinyTrunk((4, 4, 4, 6, 8)), (0, 1, 2), 2, [(5, 3, 1, 1)]).eval()
    images = torch.randn(1, 3, 96, 96)
    fine, middle, coarse = body.body(images)
    reduced = [torch.relu(layer[0](m)) for layer, m in zip(body.reduce, (fine, middle, coarse), strict=True)]
    row = reduced[2][0, 1, 1]  # three cells to twelve: cell i is centred at (i + 1/2) / 4 - 1/2 = -3/8, -1/8, 1/8, ...
    fused = []
    body.norm.register_forward_hook(lambda module, given, result: fused.append(given[0]))
    assert body(images)[0].shape == (1, 5, 12, 12)
    assert fused[0].shape == (1, 6, 12, 12)
    assert_close(fused[0][:, :2], reduced[0])
    enlarged = nn.functional.interpolate(reduced[2][:, 1:2, 1:2], size=(1, 12), mode="bilinear")[0, 0, 0]
    assert_close(enlarged[2], row[0] * 0.875 + row[1] * 0.125)
    expected = nn.functional.interpolate(reduced[2], scale_factor=4, mode="bilinear")
    assert_close(fused[0][:, 4:], expected)


def test_fssd_on_vgg_fuses_conv4_3_fc7_and_conv7_2():
    detector = on_meta(fssd300)
    with torch.device("meta"):
        maps = detector.body.body(torch.zeros(1, 3, 300, 300))
    assert [(m.shape[1], m.shape[2]) for m in maps] == [(512, 38), (1024, 19), (512, 19), (256, 10)]
    assert detector.body.sources == (0, 1, 3)
    assert not detector.body.body.norms


# --- DSSD


@pytest.mark.parametrize(("factory", "side"), [(dssd320, 321), (dssd512, 513)])
def test_dssd_needs_caffes_pooling_on_odd_pictures(factory, side):
    other = on_meta(factory).eval()
    with pytest.raises(ValueError, match=r"maps must be halves of each other; .*DilatedResNetTrunk\(pool="):
        maps_of(other, side)


def test_ssd_on_a_resnet_is_dssd_without_the_way_back():
    trunk = TinyTrunk((4, 4, 4, 4, 4))
    merged, plain = (dssd320(num_classes=2, backbone=trunk, channels=8, merge=merge).eval() for merge in ("sum", None))
    body, images = plain.body, torch.randn(1, 3, 64, 64)
    assert not body.deconvolutions
    expected = [block(m) for block, m in zip(body.predictions, body.sources(images), strict=True)]
    for found, wanted in zip(body(images), expected, strict=True):
        assert_close(found, wanted)
    assert [block.main[0].in_channels for block in body.predictions] == [4, 4, 4, 8, 8, 8]
    assert [block.main[0].in_channels for block in merged.body.predictions] == [4, 4, 4, 4, 4, 8]
    target = {"boxes": torch.tensor([[10.0, 10, 40, 50]]), "labels": torch.tensor([1])}
    sum(plain.train().loss(images, pad_targets([target])).values()).backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_dssd_has_wide_kernels_on_its_two_finest_levels():
    detector = dssd320(num_classes=2, backbone="tiny", channels=8)
    for convolutions in detector.head.outputs.values():
        assert [conv.kernel_size[0] for conv in convolutions] == [5, 5, 3, 3, 3, 3]


def test_dssd_takes_the_papers_prediction_module_too():
    plain, small = (on_meta(dssd320, middle_kernel=kernel) for kernel in (3, 1))
    assert count(plain) - count(small) == 6 * 256 * 256 * 8  # six modules, nine weights a pair of channels to one


# --- RefineDet


def test_transfer_connections_by_hand():
    block = TransferConnections([3, 4], 2)
    fine, coarse = torch.randn(1, 3, 5, 5), torch.randn(1, 4, 3, 3)
    found = block([fine, coarse])
    inside = [layer[2](torch.relu(layer[0](m))) for layer, m in zip(block.inside, (fine, coarse), strict=True)]
    top = torch.relu(block.outside[1][0](torch.relu(inside[1])))
    bottom = torch.relu(block.outside[0][0](torch.relu(inside[0] + block.up[0](top)[..., :5, :5])))
    assert_close(found[1], top)
    assert_close(found[0], bottom)


def test_transfer_connections_of_the_resnet_version_are_normed():
    block = TransferConnections([3, 4], 2, norm=doubled)
    fine, coarse = torch.randn(1, 3, 5, 5), torch.randn(1, 4, 3, 3)
    first, second = ([m for m in layer if isinstance(m, nn.Conv2d)] for layer in (block.inside[0], block.inside[1]))
    top = torch.relu(2 * second[1](torch.relu(2 * second[0](coarse))))
    top = torch.relu(2 * block.outside[1][0](top))
    side = 2 * first[1](torch.relu(2 * first[0](fine))) + 2 * block.up[0][0](top)[..., :5, :5]
    found = block([fine, coarse])
    assert_close(found[1], top)
    assert_close(found[0], torch.relu(2 * block.outside[0][0](torch.relu(side))))
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(convolutions) == 7
    assert all(conv.bias is None for conv in convolutions)


def doubled(_):
    double = nn.Identity()
    double.register_forward_hook(lambda module, given, result: 2 * result)
    return double


def test_resnet_version_has_a_residual_block_before_every_output():
    head = RefineHead([4, 6], [2, 2], 4, DeltaCoder((10.0, 10.0, 5.0, 5.0)), width=4, block_width=8).eval()
    features = [torch.randn(2, 4, 4, 4), torch.randn(2, 6, 2, 2)]
    corner = torch.rand(1, 40, 2) * 50
    pred = head(features, Priors(torch.cat([corner, corner + 20], dim=-1), (32, 8)))
    for level, rows in enumerate((slice(0, 32), slice(32, 40))):
        first = head.arm_blocks[level](features[level])
        second = head.odm_blocks[level](head.transfer(features)[level])
        outputs = {"objectness": first, "arm_deltas": first, "logits": second, "deltas": second}
        for name, given in outputs.items():
            found = pred.extras[name] if name in pred.extras else getattr(pred, name)
            assert_close(found[:, rows], flatten_map(head.outputs[name][level](given), 2))
    assert [block.main[0].in_channels for block in head.odm_blocks] == [4, 4]  # the transferred maps, not the sources


def test_resnet_version_has_its_trunk_and_fourth_map():
    detector = on_meta(refinedet320, backbone="resnet50", norm="fixed")
    assert detector.inputs.warp_side == 320
    assert type(detector.body.trunk.stem[1]).__name__ == "FixedBatchNorm2d"
    assert all(p.requires_grad for p in detector.parameters())
    stage = detector.body.stage  # 128-128-512, its 1x1 convolutions of step 2
    kernels = [(m.out_channels, m.kernel_size[0], m.stride[0]) for m in stage.main if isinstance(m, nn.Conv2d)]
    assert kernels == [(128, 1, 2), (128, 3, 1), (512, 1, 1)]
    assert (stage.shortcut[0].kernel_size, stage.shortcut[0].stride) == ((1, 1), (2, 2))


def refine_head():
    torch.manual_seed(0)
    head = RefineHead([4, 4], [2, 2], 4, DeltaCoder((10.0, 10.0, 5.0, 5.0)), width=4)
    features = [torch.randn(2, 4, 4, 4), torch.randn(2, 4, 2, 2)]
    corner = torch.rand(1, 40, 2) * 50
    priors = Priors(torch.cat([corner, corner + 20], dim=-1), (32, 8), corner[0])
    return head, features, priors


def test_refine_head_moves_its_priors_twice():
    head, features, priors = refine_head()
    pred = head(features, priors)
    x1, y1, x2, y2 = priors.boxes[0, 7].tolist()
    for deltas, start, found in (
        (pred.extras["arm_deltas"][1, 7], (x1, y1, x2, y2), pred.priors.boxes[1, 7]),
        (pred.deltas[1, 7], pred.priors.boxes[1, 7].tolist(), pred.boxes[1, 7]),
    ):
        dx, dy, dw, dh = deltas.tolist()
        w, h = start[2] - start[0], start[3] - start[1]
        x, y = start[0] + w / 2 + 0.1 * dx * w, start[1] + h / 2 + 0.1 * dy * h
        w, h = w * torch.tensor(0.2 * dw).exp().item(), h * torch.tensor(0.2 * dh).exp().item()
        assert_close(found, torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2]), rtol=0, atol=1e-3)
    assert pred.extras["arm_priors"] is priors.boxes
    assert pred.priors.counts == priors.counts
    assert pred.priors.cells is priors.cells
    assert (pred.priors.boxes - priors.boxes).abs().max() > 1


def test_second_step_does_not_teach_the_first_to_move_boxes():
    detector = refinedet320(num_classes=3, backbone=TinyTrunk((4, 4, 4, 4, 4)), channels=8)
    target = {"boxes": torch.tensor([[10.0, 10, 40, 50]]), "labels": torch.tensor([1])}
    losses = detector.loss(torch.rand(1, 3, 64, 64), pad_targets([target]))
    (losses["cls"] + losses["box"]).backward()
    outputs = detector.head.outputs
    assert all(conv.weight.grad is None for name in ("arm_deltas", "objectness") for conv in outputs[name])
    assert any(conv.weight.grad.abs().sum() > 0 for conv in outputs["deltas"])
    assert detector.body.extras[0][0][0].weight.grad.abs().sum() > 0  # the maps are shared


def test_without_movement_the_second_step_is_a_plain_head():
    head, features, priors = refine_head()
    with torch.no_grad():
        for conv in head.outputs["arm_deltas"]:
            conv.weight.zero_()
    pred = head(features, priors)
    assert_close(pred.priors.boxes, priors.boxes.expand(2, -1, -1), rtol=0, atol=1e-4)


def test_refined_score_is_zero_where_the_first_step_saw_nothing():
    head, features, priors = refine_head()
    with torch.no_grad():
        for conv in head.outputs["objectness"]:
            conv.weight.mul_(8.0)
    pred = head(features, priors)
    nothing = pred.extras["objectness"].softmax(-1)[..., 0] < 0.01
    assert nothing.any()
    assert not nothing.all()
    scores = refined_score(pred)
    assert scores.ranking[nothing].eq(0).all()
    assert scores.classes[nothing].eq(0).all()
    assert scores.ranking[~nothing].equal(softmax_score(pred).ranking[~nothing])
    assert refined_score(pred, min_objectness=0.0).ranking.equal(softmax_score(pred).ranking)
    assert surely_background(pred).equal(nothing)


def test_refinedet_passes_its_options_to_both_steps():
    trunk = TinyTrunk((4, 4, 4, 4, 4))
    options = {"min_objectness": 0.1, "mining_ratio": 2.0, "positive_iou": 0.6, "rule": "bipartite"}
    detector = refinedet320(num_classes=3, backbone=trunk, channels=8, **options)
    terms = {name: term.keywords for name, (_, term) in detector.losses.items()}
    assert terms["cls"] == {"ratio": 2.0, "least": 0.1}
    assert terms["arm_cls"]["ratio"] == 2.0
    for name in ("arm_cls", "arm_box"):
        assert terms[name]["assign"].keywords == {"positive_iou": 0.6, "rule": "bipartite"}
    assert detector.score.keywords == {"min_objectness": 0.1}
    assert detector.select.keywords["candidates"] == 1000
    assert [norm.weight[0].item() for norm in detector.body.norms.values()] == [10.0, 8.0]


# --- torchvision's SSD300


RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
SCALES = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
STEPS = [8, 16, 32, 64, 100, 300]


def torchvision_ssd300(**options):
    """As ``ssd300_vgg16`` makes it, less the classifier it throws away; weights with something to detect."""
    backbone = torchvision_ssd.SSDFeatureExtractorVGG(make_layers(cfgs["D"]), False)
    anchors = TorchvisionGenerator(RATIOS, scales=options.pop("scales", SCALES), steps=STEPS)
    door = {"image_mean": [0.48235, 0.45882, 0.40784], "image_std": [1 / 255] * 3}
    model = torchvision_ssd.SSD(backbone, anchors, (300, 300), 6, **door, **options)
    with torch.no_grad():
        for conv in (m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        for conv in model.backbone.extra[1:].modules():
            if isinstance(conv, nn.Conv2d):
                conv.weight.mul_(0.7)
        for conv in model.head.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.normal_(conv.bias, std=0.3)
    return model.eval()


@functools.cache
def both():
    torch.manual_seed(0)
    theirs = torchvision_ssd300(score_thresh=0.25, topk_candidates=50, detections_per_img=60, nms_thresh=0.4)
    with torch.no_grad():
        theirs.backbone.features[0].weight.mul_(1 / 128)  # its door leaves values of +-128
    return theirs, from_torchvision(theirs)


def test_from_torchvision_gives_its_boxes_scores_and_labels():
    theirs, ours = both()
    assert not ours.training
    images = [torch.rand(3, 120, 200)]
    with torch.no_grad():
        expected, found = theirs(images), ours(images)
    for a, b in zip(expected, found, strict=True):
        assert len(a["scores"]) == len(b["scores"]) == 60
        assert len(a["labels"].unique()) > 2
        assert_close(b["scores"], a["scores"], rtol=0, atol=1e-4)
        assert_close(b["boxes"], a["boxes"], rtol=0, atol=5e-3)
        assert b["labels"].equal(a["labels"] - 1)


def test_from_torchvision_takes_over_its_options():
    _, ours = both()
    assert ours.select.keywords == {
        "score_threshold": 0.25,
        "candidates": 50,
        "nms_iou": 0.4,
        "max_detections": 60,
    }  # fmt: skip
    assert ours.assign.keywords == {"positive_iou": 0.5, "rule": "override"}
    assert ours.losses["cls"][1].keywords == {"ratio": 3.0}
    assert ours.num_classes == 5


def test_from_torchvision_has_its_losses():
    theirs, ours = both()
    images = [torch.rand(3, 200, 260)]
    boxes = torch.tensor([[10.0, 12, 80, 90], [60, 40, 250, 190], [100.0, 5, 130, 30]])
    targets = [{"boxes": boxes, "labels": torch.tensor([0, 4, 2])}]
    for model in (theirs, ours):
        model.train()
    try:
        with torch.no_grad():
            expected = theirs(images, [{**t, "labels": t["labels"] + 1} for t in targets])
            found = ours(images, targets)
    finally:
        for model in (theirs, ours):
            model.eval()
    assert_close(found["cls"], expected["classification"], rtol=1e-4, atol=1e-4)
    assert_close(found["box"], expected["bbox_regression"], rtol=1e-4, atol=1e-4)


def test_from_torchvision_refuses_other_models():
    with no_hook(), pytest.raises(ValueError, match="must be a torchvision SSD; got Linear"):
        from_torchvision(nn.Linear(1, 1))
    with torch.device("meta"):
        other = torchvision_ssd300(scales=[0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05])
        with pytest.raises(ValueError, match="must be ssd300_vgg16 with its own default boxes"):
            from_torchvision(other)
