"""The SSD family at full size: parameters, maps, other people's weights. What holds for every detector: test_models."""

import functools

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models.detection import ssd as torchvision_ssd
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator as TorchvisionGenerator
from torchvision.models.vgg import cfgs, make_layers

from detcore.models.ssd import from_torchvision, ssd300, ssd512
from detcore.nn import TinyTrunk
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


@pytest.mark.parametrize(
    ("factory", "classes", "parameters", "maps", "priors"),
    [
        (ssd300, 20, 26_285_486, SSD300_MAPS, 8732),
        (ssd300, 80, 34_305_206, SSD300_MAPS, 8732),
        (ssd512, 20, 27_188_676, SSD512_MAPS, 24564),
        (ssd512, 80, 36_038_196, SSD512_MAPS, 24564),
    ],
)
def test_ssd_has_the_published_size(factory, classes, parameters, maps, priors):
    detector = on_meta(factory, num_classes=classes)
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
