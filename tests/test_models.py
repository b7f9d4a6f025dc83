import copy
import functools
import math

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torchvision.models import detection, resnet
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms.functional import pil_to_tensor

from detcore.boxes import iou
from detcore.detector import Detector
from detcore.losses.functional import sigmoid_focal_loss
from detcore.losses.terms import iou_quality_term
from detcore.models import MODELS, get_model, list_models
from detcore.models.retinanet import from_torchvision, retinanet
from detcore.nn import FixedBatchNorm2d, TinyTrunk
from detcore.structures import Targets, pad_targets, to_dicts
from tests.samples import no_hook
from tests.zoo import EVERY_NETWORK, ZOO, small, thin

EVERY_MODEL = pytest.mark.parametrize("name", sorted(MODELS))


def two_pictures(size=128):
    """Coloured rectangles on noise, one object in the first picture and two in the second."""
    images = torch.rand(2, 3, size, size) * 0.3
    images[0, :, 10:60, 10:60] = 1.0
    images[1, 1, 20:100, 30:110] = 1.0
    images[1, 0, 70:120, 5:30] = 1.0
    first = {"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1])}
    second = {"boxes": torch.tensor([[30.0, 20, 110, 100], [5, 70, 30, 120]]), "labels": torch.tensor([2, 0])}
    return images, pad_targets([first, second])


def count(module, *, trainable=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def redraw(detector, std=0.02):
    """Untrained heads answer 0.01 everywhere; with these weights there is something to detect."""
    with torch.no_grad():
        for name in detector.head.outputs:
            for conv in outputs_of(detector, name):
                conv.weight.normal_(std=std)
                if name == "logits":
                    conv.bias.fill_(-2.0)
    return detector


def outputs_of(detector, name):
    """The convolutions behind one of the head's outputs: one, or one a level."""
    return [m for m in detector.head.outputs[name].modules() if isinstance(m, nn.Conv2d)]


def calm(detector):
    """Batch statistics off: pictures no longer see each other."""
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return detector


# --- parameters


def test_retinanet_has_the_reference_number_of_parameters():
    with torch.device("meta"):
        detector = get_model("retinanet", num_classes=80, trainable_stages=3)
    assert count(detector) == 37_968_692
    assert count(detector, trainable=True) == 37_743_348  # stem and C2 frozen


def test_iou_aware_retinanet_adds_one_convolution():
    with torch.device("meta"):
        detector = get_model("iou_aware_retinanet", num_classes=80)
    assert count(detector) == 37_968_692 + 20_745
    assert count(detector.head.outputs["iou"]) == 20_745


# --- the matrix


def test_matrix_covers_every_model():
    assert set(ZOO) == set(MODELS) == set(list_models())


@EVERY_MODEL
def test_model_has_the_shapes_and_terms_it_promises(name):
    detector, row = small(name), ZOO[name]
    images, targets = two_pictures()
    pred = detector.predict(images)
    total = sum(row.counts)
    assert pred.logits.shape == (2, total, 4 if row.softmax else 3)
    assert pred.deltas.shape == pred.boxes.shape == (2, total, 4)
    assert {extra: value.shape[-1] for extra, value in pred.extras.items()} == row.extras
    assert pred.priors.counts == row.counts
    losses = detector.loss(images, targets)
    assert set(losses) == row.terms
    assert all(value.shape == () and value.isfinite() and value > 0 for value in losses.values())
    found = detector.detect(images, torch.tensor([[128, 128], [100, 90]]))
    assert found.boxes.shape == (2, row.detections, 4)
    assert (found.quality is not None) == (row.quality is not None)
    assert isinstance(detector, Detector)
    assert count(detector) == row.parameters


@EVERY_MODEL
def test_every_weight_learns(name):
    detector = small(name)
    images, targets = two_pictures()
    sum(detector.loss(images, targets).values()).backward()
    for parameter, value in detector.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.isfinite().all(), parameter


@EVERY_MODEL
def test_state_dict_rebuilds_the_same_detector(name):
    detector = redraw(small(name)).eval()
    twin = get_model(**detector.spec).eval()
    images, _ = two_pictures()
    assert not twin.predict(images).logits.equal(detector.predict(images).logits)
    twin.load_state_dict(detector.state_dict())
    assert twin.predict(images).boxes.equal(detector.predict(images).boxes)
    assert twin.detect(images, torch.full((2, 2), 128)).scores.equal(
        detector.detect(images, torch.full((2, 2), 128)).scores
    )


@EVERY_NETWORK
def test_half_precision_model_detects(name):
    detector = redraw(small(name)).eval()
    images, _ = two_pictures()
    wide = detector.predict(images)
    narrow = copy.deepcopy(detector).bfloat16()
    pred = narrow.predict(images)
    assert pred.logits.dtype == torch.bfloat16
    assert pred.boxes.dtype == torch.float32
    first, second = (p.extras.get("arm_priors", p.priors.boxes) for p in (pred, wide))
    assert first.equal(second)  # no pixel is lost to 8 bits of mantissa
    assert pred.boxes.isfinite().all()
    assert_close(pred.logits.float(), wide.logits, rtol=0.1, atol=ZOO[name].half)
    found = narrow.detect(images, torch.full((2, 2), 128))
    assert found.valid.any()
    assert found.scores.isfinite().all()
    assert found.boxes.isfinite().all()


@EVERY_NETWORK
def test_autocast_loss_is_close_to_float32(name):
    detector = small(name)
    images, targets = two_pictures()
    wide = detector.loss(images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = detector.loss(images, targets)
    assert all(value.dtype == torch.float32 for value in narrow.values())
    for term, value in wide.items():
        assert_close(narrow[term], value, rtol=ZOO[name].rounding, atol=0.01)


@EVERY_NETWORK
def test_channels_last_changes_nothing(name):
    detector = redraw(small(name)).eval()
    images, targets = two_pictures()
    plain, losses = detector.predict(images), detector.loss(images, targets)
    turned = detector.to(memory_format=torch.channels_last)
    last = images.to(memory_format=torch.channels_last)
    assert_close(turned.predict(last).logits, plain.logits, rtol=1e-4, atol=1e-4)
    assert_close(turned.predict(last).boxes, plain.boxes, rtol=1e-4, atol=1e-3)
    for term, value in turned.loss(last, targets).items():
        assert_close(value, losses[term], rtol=1e-4, atol=1e-4)


@EVERY_NETWORK
def test_bytes_and_floats_give_the_same(name):
    detector = redraw(small(name)).eval()
    images, targets = two_pictures()
    pixels = (images * 255).round().to(torch.uint8)
    floats = pixels.float() / 255
    assert_close(detector.predict(pixels).logits, detector.predict(floats).logits, rtol=1e-4, atol=1e-5)
    for term, value in detector.loss(pixels, targets).items():
        assert_close(value, detector.loss(floats, targets)[term], rtol=1e-4, atol=1e-5)


@EVERY_NETWORK
def test_batch_equals_its_images_one_by_one(name):
    detector = redraw(small(name)).eval()
    images, targets = two_pictures()
    sizes = torch.tensor([[128, 128], [100, 90]])
    together = detector.predict(images)
    found = to_dicts(detector.detect(images, sizes))
    joint = detector.loss(images, targets)
    match = detector.match(together.priors, targets)
    parts = dict.fromkeys(joint, 0.0)
    for i in range(2):
        alone = detector.predict(images[i : i + 1])
        assert_close(alone.logits[0], together.logits[i], rtol=1e-4, atol=1e-5)
        assert_close(alone.boxes[0], together.boxes[i], rtol=1e-4, atol=1e-3)
        one = to_dicts(detector.detect(images[i : i + 1], sizes[i : i + 1]))[0]
        assert_close(one["scores"], found[i]["scores"], rtol=1e-4, atol=1e-5)
        own = Targets(targets.boxes[i : i + 1], targets.labels[i : i + 1], targets.valid[i : i + 1])
        part = detector.match(alone.priors, own)
        for term, value in detector.loss(images[i : i + 1], own).items():
            normaliser = ZOO[name].normalisers.get(term, lambda _, match: match.num_positive)
            parts[term] += value * normaliser(alone, part) / normaliser(together, match)
    for term, value in joint.items():
        assert_close(parts[term], value, rtol=1e-4, atol=1e-5)


@EVERY_NETWORK
def test_pictures_without_objects_train_the_classes_only(name):
    detector = small(name)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = detector.loss(torch.rand(2, 3, 64, 64), pad_targets([empty, empty]))
    sum(losses.values()).backward()
    taught = set() if ZOO[name].softmax else {"cls"}  # negatives are mined for the positives of their picture
    taught |= ZOO[name].without_objects
    assert all((value > 0) == (term in taught) for term, value in losses.items())
    assert all(value >= 0 for value in losses.values())
    assert all(conv.weight.grad.eq(0).all() for conv in outputs_of(detector, "deltas"))
    assert all(conv.weight.grad.isfinite().all() for conv in outputs_of(detector, "logits"))


@EVERY_NETWORK
def test_overfits_two_pictures(name):
    torch.manual_seed(1)
    detector = thin(name, (8, 16, 32, 32, 32), channels=32)
    images, targets = two_pictures()
    optimizer = torch.optim.AdamW(detector.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=ZOO[name].steps)
    for _ in range(ZOO[name].steps):
        optimizer.zero_grad()
        sum(detector.loss(images, targets).values()).backward()
        nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    detector.eval()
    pred = detector.predict(images)
    match = detector.match(pred.priors, targets)
    assert iou(pred.boxes, match.boxes)[match.positive].mean() > 0.9
    first, second = to_dicts(detector.detect(images, torch.full((2, 2), 128)))
    assert first["labels"][0] == 1
    assert sorted(second["labels"][:2].tolist()) == [0, 2]
    if (quality := ZOO[name].quality) in ("iou", "confidence"):
        reached = iou(pred.boxes, match.boxes)[match.positive]
        assert (pred.extras[quality][..., 0].sigmoid()[match.positive] - reached).abs().mean() < 0.05


# --- limits: one model is another


def test_iou_aware_retinanet_without_its_branch_is_retinanet():
    plain = redraw(small("retinanet"))
    aware = small("iou_aware_retinanet", fusion_alpha=1.0)
    missing = aware.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["head.outputs.iou.weight", "head.outputs.iou.bias"]
    images, targets = two_pictures()
    ours, theirs = aware.loss(images, targets), plain.loss(images, targets)
    assert ours["cls"].equal(theirs["cls"])
    assert ours["box"].equal(theirs["box"])
    for detector in (plain, aware):
        detector.eval()
    a, b = aware.predict(images), plain.predict(images)
    assert a.logits.equal(b.logits)
    assert a.boxes.equal(b.boxes)
    sizes = torch.full((2, 2), 128)
    a, b = aware.detect(images, sizes), plain.detect(images, sizes)  # alpha = 1: ranked by class alone
    assert b.valid.sum() > 20
    assert a.boxes.equal(b.boxes)
    assert a.scores.equal(b.scores)
    assert a.labels.equal(b.labels)


@pytest.mark.parametrize("alpha", [0.3, 0.5])
def test_iou_aware_retinanet_ranks_by_the_fused_score(alpha):
    detector = redraw(small("iou_aware_retinanet", fusion_alpha=alpha)).eval()
    found = detector.detect(two_pictures()[0], torch.full((2, 2), 128))
    assert found.valid.sum() > 20
    fused = found.class_scores**alpha * found.quality ** (1 - alpha)
    assert_close(found.scores, fused, rtol=1e-5, atol=1e-6)
    assert (found.scores - found.class_scores).abs().max() > 0.05


def test_threshold_on_classes_keeps_other_boxes():
    # half-certain quality lifts .01 to .07: with the threshold on the fused score nearly everything passes
    images = two_pictures()[0]
    kept = {}
    for on in ("ranking", "classes"):
        torch.manual_seed(0)
        detector = small("iou_aware_retinanet", threshold_on=on, max_detections=1000).eval()
        kept[on] = int(detector.detect(images, torch.full((2, 2), 128)).valid.sum())
    assert kept["ranking"] > 100
    assert kept["classes"] == 0


@pytest.mark.parametrize("detach", [True, False])
def test_detach_flag_decides_whether_the_iou_term_moves_boxes(detach):
    detector = small("iou_aware_retinanet", detach_iou_target=detach)
    redraw(detector)
    images, targets = two_pictures()
    detector.loss(images, targets)["iou"].backward()
    deltas = detector.head.outputs["deltas"].weight.grad
    assert (deltas is None) == detach
    assert detector.head.outputs["iou"].weight.grad.abs().sum() > 0
    assert detector.head.box_tower[0].weight.grad.abs().sum() > 0  # the tower is shared
    assert detector.head.class_tower[0].weight.grad is None


@pytest.mark.parametrize("kind", ["bce", "l1", "smooth_l1", "l2", "qfl"])
def test_quality_options_reach_the_term(kind):
    detector = small("iou_aware_retinanet", quality_loss=kind, quality_weight=3.0)
    images, targets = two_pictures()
    calm(detector)
    pred = detector.predict(images)
    match = detector.match(pred.priors, targets)
    assert_close(detector.loss(images, targets)["iou"], 3 * iou_quality_term(pred, match, kind=kind))


# --- the start of training


@pytest.mark.parametrize("name", [name for name, row in ZOO.items() if not row.softmax])
def test_initial_losses_are_sane(name):
    detector = small(name)
    images, targets = two_pictures()
    losses = calm(detector).loss(images, targets)
    pred = detector.predict(images)
    match = detector.match(pred.priors, targets)
    assert_close(pred.logits.sigmoid().mean().item(), 0.01, rtol=0.2, atol=0)
    if ZOO[name].focal:
        # each prior answers about .01 to every class: 1.128 a positive and 7.5e-7 for every other entry
        o = torch.tensor(-math.log(99))
        entries = match.labels.ne(-2).sum() * 3 - match.positive.sum()
        expected = sigmoid_focal_loss(o, torch.tensor(True))
        expected = expected + entries * sigmoid_focal_loss(o, torch.tensor(False)) / match.num_positive
        assert_close(losses["cls"], expected, rtol=0.1, atol=0)
    for term in losses.keys() & ZOO[name].extras.keys():  # q = 1/2: ln 2 whatever the target
        assert_close(losses[term].item(), math.log(2), rtol=0.1, atol=0)


# --- get_model


def test_get_model_names_what_is_wrong():
    with pytest.raises(KeyError, match=r"name must be one of \[.*'iou_aware_retinanet'.*'retinanet'.*\]; got 'yolo'"):
        get_model("yolo", num_classes=3)
    with pytest.raises(TypeError, match=r"retinanet has no option detach; it has \['aiou_beta', 'alpha'"):
        get_model("retinanet", num_classes=3, detach=True)
    with pytest.raises(TypeError, match=r"iou_aware_retinanet has no option fusion; it has .*fusion_alpha.*nms_iou"):
        get_model("iou_aware_retinanet", num_classes=3, fusion=0.4)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("retinanet", {"num_classes": 0}, "num_classes must be >= 1, background not counted; got 0"),
        ("retinanet", {"box_loss": "l2"}, "box_loss must be .*; got .l2"),
        ("retinanet", {"candidates_by": "class"}, 'candidates_by must be "prior" or "pair"'),
        ("retinanet", {"positive_iou": 0.3}, "negative_iou <= positive_iou <= 1; got 0.4 and 0.3"),
        ("retinanet", {"force_match": "all"}, "force_match must be"),
        ("retinanet", {"alpha": 2.0}, r"alpha must be None or in \[0, 1\]; got 2.0"),
        ("retinanet", {"gamma": -1.0}, "gamma must be >= 0; got -1.0"),
        ("retinanet", {"score_threshold": 2.0}, r"score_threshold must be in \[0, 1\]"),
        ("retinanet", {"max_detections": 0}, "max_detections must be >= 1"),
        ("retinanet", {"backbone": "vgg"}, "backbone must be one of"),
        ("iou_aware_retinanet", {"quality_loss": "huber"}, "kind must be .*got 'huber'"),
        ("iou_aware_retinanet", {"quality_weight": -1.0}, "quality_weight must be >= 0; got -1.0"),
        ("iou_aware_retinanet", {"fusion_alpha": 1.5}, r"alpha must be in \[0, 1\]; got 1.5"),
        ("iou_aware_retinanet", {"threshold_on": "iou"}, 'threshold_on must be "ranking" or "classes"'),
    ],
)
def test_wrong_options_are_refused_when_the_model_is_built(name, options, message):
    with no_hook(), pytest.raises(ValueError, match=message):
        small(name, **options)


def test_get_model_takes_a_trunk_of_your_own():
    detector = get_model("retinanet", num_classes=2, backbone=TinyTrunk((4, 6, 8, 10, 12)), channels=8, depth=0)
    assert detector.predict(torch.rand(1, 3, 64, 64)).logits.shape[-1] == 2
    assert "backbone" not in detector.spec


def test_spec_of_a_fine_tuned_model_rebuilds_its_norm_and_frozen_stages(monkeypatch):
    # a checkpoint is rebuilt without ImageNet's weights, but what depended on them must stay
    def no_download(weights=None, **options):
        return resnet.ResNet(resnet.BasicBlock, [2, 2, 2, 2], **options)

    monkeypatch.setattr("torchvision.models.resnet18", no_download)
    detector = get_model(
        "retinanet", num_classes=2, backbone="resnet18", weights_backbone="DEFAULT", channels=8, depth=0
    )
    assert not detector.body[0].stem[0].weight.requires_grad
    twin = get_model(**detector.spec)
    assert "weights_backbone" not in detector.spec
    for (name, ours), theirs in zip(detector.named_parameters(), twin.parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad, name
    fixed = [sum(isinstance(m, FixedBatchNorm2d) for m in model.modules()) for model in (detector, twin)]
    assert fixed == [20, 20]


# --- torchvision's RetinaNet


def torchvision_retinanet(**options):
    """Random weights, outputs re-drawn so that hundreds of boxes pass the threshold."""
    theirs = detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, **{"num_classes": 21, "min_size": 128, "max_size": 200, **options}
    )
    with torch.no_grad():
        theirs.head.classification_head.cls_logits.weight.normal_(std=0.02)
        theirs.head.classification_head.cls_logits.bias.fill_(-3.0)
        theirs.head.regression_head.bbox_reg.weight.normal_(std=0.005)
    return theirs.eval()


@functools.cache
def both():
    torch.manual_seed(0)
    theirs = torchvision_retinanet()
    return theirs, from_torchvision(theirs)


def assert_detect_alike(theirs, ours, images):
    """The same detections but for one in fifty: of overlaps as large as the threshold, rounding decides."""
    with torch.no_grad():
        expected, found = theirs(images), ours(images)
    for a, b in zip(expected, found, strict=True):
        assert len(a["scores"]) > 10
        assert abs(len(b["scores"]) - len(a["scores"])) <= 0.02 * len(a["scores"])
        same = (
            (a["labels"][:, None] == b["labels"])
            & ((a["scores"][:, None] - b["scores"]).abs() < 1e-4)
            & ((a["boxes"][:, None] - b["boxes"]).abs().amax(dim=-1) < 1e-3)  # pixels; 2e-4 measured
        )
        for side in (0, 1):
            assert same.any(dim=side).float().mean() >= 0.98


def test_from_torchvision_gives_its_boxes_and_scores():
    theirs, ours = both()
    assert not ours.training
    assert_detect_alike(theirs, ours, [torch.rand(3, 90, 140), torch.rand(3, 200, 110), torch.rand(3, 64, 64)])


def test_from_torchvision_gives_its_boxes_and_scores_on_real_pictures(data_root):
    theirs, ours = both()
    paths = sorted((data_root / "samples_original").rglob("*.jpg"))[:3]
    assert paths
    assert_detect_alike(theirs, ours, [pil_to_tensor(Image.open(p).convert("RGB")).float() / 255 for p in paths])


def test_from_torchvision_has_its_losses_on_one_picture():
    # theirs averages over images what we divide by the positives of the batch; on one image they agree
    theirs, ours = (copy.deepcopy(m).train() for m in both())
    for model in (theirs, ours):
        calm(model)
    picture = torch.rand(3, 128, 180)
    boxes = torch.tensor([[10.0, 12, 80, 90], [60, 40, 170, 120], [100, 5, 130, 30]])
    target = {"boxes": boxes, "labels": torch.tensor([3, 20, 7])}
    with torch.no_grad():
        expected, found = theirs([picture], [target]), ours([picture], [target])
    assert_close(found["cls"], expected["classification"], rtol=1e-4, atol=1e-5)
    assert_close(found["box"], expected["bbox_regression"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"score_thresh": 0.2, "nms_thresh": 0.3, "detections_per_img": 7, "topk_candidates": 40}]
)
def test_from_torchvision_keeps_detection_options(options):
    theirs = torchvision_retinanet(**options)
    with torch.no_grad():
        theirs.head.classification_head.cls_logits.bias.fill_(-1.0)
    assert_detect_alike_few(theirs, from_torchvision(theirs), [torch.rand(3, 100, 150)])


def assert_detect_alike_few(theirs, ours, images):
    with torch.no_grad():
        expected, found = theirs(images)[0], ours(images)[0]
    assert len(expected["scores"]) == 7
    assert_close(found["scores"], expected["scores"], rtol=0, atol=1e-4)
    assert_close(found["boxes"], expected["boxes"], rtol=0, atol=1e-3)


def test_from_torchvision_refuses_version_2():
    theirs = detection.retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None)
    with pytest.raises(ValueError, match=r"must be retinanet_resnet50_fpn \(version 1\)"):
        from_torchvision(theirs)


def test_from_torchvision_refuses_other_anchors():
    generator = detection.anchor_utils.AnchorGenerator(((16,), (32,), (64,), (128,), (256,)), ((1.0,),) * 5)
    theirs = torchvision_retinanet(anchor_generator=generator)
    with pytest.raises(ValueError, match="must have torchvision's default anchors; got sizes"):
        from_torchvision(theirs)


def retinanet_on(trunk, p6_from=256):
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name=trunk,
        weights=None,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(p6_from, 256),
    )
    anchors = detection.retinanet._default_anchorgen()
    return detection.RetinaNet(backbone, 5, anchor_generator=anchors, min_size=96, max_size=160, score_thresh=0.009)


def test_from_torchvision_takes_any_resnet():
    theirs = retinanet_on("resnet18").eval()
    with torch.no_grad():
        theirs.head.classification_head.cls_logits.weight.normal_(std=0.05)
        theirs.head.regression_head.bbox_reg.weight.normal_(std=0.005)
    assert_detect_alike(theirs, from_torchvision(theirs), [torch.rand(3, 90, 140), torch.rand(3, 64, 64)])


@pytest.mark.parametrize(
    ("trunk", "p6_from", "message"),
    [
        ("resnet152", 256, r"must have a ResNet 18, 34, 50 or 101; got blocks \(3, 8, 36, 3\)"),
        ("resnext50_32x4d", 256, "this one has another trunk or pyramid"),
        ("resnet50", 2048, "this one has another trunk or pyramid"),
    ],
)
def test_from_torchvision_refuses_other_trunks(trunk, p6_from, message):
    with torch.device("meta"):
        theirs = retinanet_on(trunk, p6_from)
        with pytest.raises(ValueError, match=message):
            from_torchvision(theirs)


def test_from_torchvision_refuses_what_is_no_retinanet():
    with no_hook(), pytest.raises(ValueError, match="must be a torchvision RetinaNet; got Linear"):
        from_torchvision(nn.Linear(1, 1))


def test_retinanet_is_the_factory_behind_get_model():
    with torch.device("meta"):
        assert count(retinanet(num_classes=3, backbone="tiny")) == ZOO["retinanet"].parameters
