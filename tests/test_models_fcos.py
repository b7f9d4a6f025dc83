"""What is FCOS's own; what every model has to hold is in ``test_models.py``."""

import copy
import functools
import math

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms.functional import pil_to_tensor

from detcore.assigners import centerness_target
from detcore.coders import DistanceCoder
from detcore.losses.terms import iou_quality_term
from detcore.models import get_model
from detcore.models.fcos import fcos, from_torchvision
from detcore.nn import DenseHead, Exp, Scale
from detcore.nn.convolution import FastConv2d
from detcore.priors import PointGenerator
from detcore.structures import pad_targets
from tests import reference
from tests.samples import no_hook
from tests.test_models import assert_detect_alike, assert_detect_alike_few, calm, count, redraw, two_pictures
from tests.zoo import small

NAMES = pytest.mark.parametrize("name", ["fcos", "fcos_improved", "iou_aware_fcos"])


# --- parameters and parts


def test_fcos_has_the_reference_number_of_parameters():
    with torch.device("meta"):
        detector = get_model("fcos", num_classes=80)
        plain = get_model("fcos", num_classes=80, centerness=None)
        aware = get_model("iou_aware_fcos", num_classes=80)
    assert count(detector) == 32_297_370
    assert count(detector.head.outputs["centerness"]) == 2_305
    assert count(plain) == 32_297_370 - 2_305
    assert count(aware) == 32_297_370 + 2_305


def test_towers_are_normalised_in_groups_of_eight_channels():
    with torch.device("meta"):
        towers = [fcos(num_classes=3, channels=c).head.box_tower for c in (256, 64)]
        bare = fcos(num_classes=3, group_norm=False).head.box_tower
    assert [[m.num_groups for m in tower if isinstance(m, nn.GroupNorm)] for tower in towers] == [[32] * 4, [8] * 4]
    assert [type(m) for m in towers[0]] == [FastConv2d, nn.GroupNorm, nn.ReLU] * 4
    assert [type(m) for m in bare] == [FastConv2d, nn.ReLU] * 4


@pytest.mark.parametrize(
    ("name", "tower"), [("fcos", "class_tower"), ("fcos_improved", "box_tower"), ("iou_aware_fcos", "class_tower")]
)
def test_centerness_stands_on_its_tower(name, tower):
    detector = small(name)
    detector.predict(two_pictures()[0]).extras["centerness"].sum().backward()
    touched = {t for t in ("class_tower", "box_tower") if getattr(detector.head, t)[0].weight.grad is not None}
    assert touched == {tower}


def raw_head(on_deltas, coder):
    """A head whose distances, before ``on_deltas``, are x, 2x, 3x and -x of its only channel x."""
    head = DenseHead(1, 1, 1, coder, depth=0, on_deltas=on_deltas)
    nn.init.zeros_(head.outputs["deltas"].weight)
    with torch.no_grad():
        head.outputs["deltas"].weight[:, 0, 1, 1] = torch.tensor([1.0, 2.0, 3.0, -1.0])
    features = [torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), 1.0)]
    return head(features, PointGenerator([8, 16])(features, (16, 16)))


def test_distances_are_exponentials_scaled_on_their_level():
    pred = raw_head([nn.Sequential(Scale(1.0), Exp()), nn.Sequential(Scale(2.0), Exp())], DistanceCoder())
    expected = torch.tensor([[0.5, 1.0, 1.5, -0.5], [2.0, 4.0, 6.0, -2.0]]).exp()
    assert_close(pred.deltas[0], expected)
    e = expected.tolist()
    assert_close(pred.boxes[0, 0], torch.tensor([4 - e[0][0], 4 - e[0][1], 4 + e[0][2], 4 + e[0][3]]))  # pixels
    assert_close(pred.boxes[0, 1], torch.tensor([8 - e[1][0], 8 - e[1][1], 8 + e[1][2], 8 + e[1][3]]))


def test_distances_are_cut_at_zero_and_count_in_strides():
    pred = raw_head([nn.Sequential(Scale(1.0), nn.ReLU()), nn.ReLU()], DistanceCoder(normalise=True))
    assert_close(pred.deltas[0], torch.tensor([[0.5, 1.0, 1.5, 0.0], [1.0, 2.0, 3.0, 0.0]]))
    assert_close(pred.boxes[0], torch.tensor([[0.0, -4, 16, 4], [-8, -24, 56, 8]]))


def test_head_with_levels_of_its_own_refuses_other_maps():
    head = DenseHead(1, 1, 1, DistanceCoder(), depth=0, on_deltas=[Exp(), Exp()])
    features = [torch.zeros(1, 1, 1, 1)]
    with pytest.raises(ValueError, match="features must be 2 maps; got 1"):
        head(features, PointGenerator([8])(features, (8, 8)))


def test_exp_of_short_floats_is_float32():
    x = torch.tensor([5.7], dtype=torch.bfloat16)
    assert_close(Exp()(x), x.float().exp())
    assert Exp()(x.double()).dtype == torch.float64


@NAMES
def test_each_level_learns_its_scale(name):
    detector = small(name)
    images, targets = two_pictures()
    sum(detector.loss(images, targets).values()).backward()
    factors = [level[0].factor for level in detector.head.on_deltas]
    assert [f.item() for f in factors] == [1.0] * 5
    match = detector.match(detector.predict(images).priors, targets)
    owned = [level.any().item() for level in match.positive.split(detector.predict(images).priors.counts, dim=1)]
    assert any(owned)
    assert not all(owned)
    assert [f.grad.item() != 0 for f in factors] == owned  # a level without positives has nothing to learn from
    assert [type(level) for level in small(name, level_scales=False).head.on_deltas] == [
        type(detector.head.on_deltas[0][1])
    ] * 5


def test_range_base_scales_every_level():
    detector = fcos(num_classes=1, backbone="tiny", range_base=3.0)
    assert detector.assign.keywords["ranges"] == (24.0, 48.0, 96.0, 192.0, math.inf)
    assert fcos(num_classes=1, backbone="tiny").assign.keywords["ranges"] == (64.0, 128.0, 256.0, 512.0, math.inf)


# --- losses


def test_loss_of_a_batch_with_an_empty_picture_equals_its_loops():
    detector = calm(redraw(small("fcos")))
    images, _ = two_pictures()
    objects = {"boxes": torch.tensor([[10.0, 10, 60, 60], [5, 70, 30, 120]]), "labels": torch.tensor([1, 0])}
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    targets = pad_targets([objects, nothing])
    with torch.no_grad():
        losses, pred = detector.loss(images, targets), detector.predict(images)
    match = detector.match(pred.priors, targets)
    labels, index = reference.fcos_assign(
        pred.priors.boxes[0].tolist(),
        pred.priors.counts,
        objects["boxes"].tolist(),
        [1, 0],
        ranges=[4.0 * s for s in (8, 16, 32, 64)] + [math.inf],
    )
    assert match.labels.tolist() == [labels, [-1] * len(labels)]
    assert len(set(index)) == 3  # both objects and nobody
    assert_close(losses["cls"].item(), reference.focal_term(pred.logits, match), rtol=1e-4, atol=0)
    assert_close(losses["box"].item(), reference.centerness_box_term(pred, match), rtol=1e-4, atol=0)
    assert_close(losses["centerness"].item(), reference.centerness_term(pred, match), rtol=1e-4, atol=0)


def test_without_centerness_boxes_are_not_weighted_and_scores_are_class_scores():
    # the baseline of the association loss: -ln IoU / N, score = p
    detector = calm(redraw(small("fcos", centerness=None)))
    images, targets = two_pictures()
    with torch.no_grad():
        losses, pred = detector.loss(images, targets), detector.predict(images)
    assert set(losses) == {"cls", "box"}
    match = detector.match(pred.priors, targets)
    assert_close(losses["box"].item(), reference.box_loss_term(pred, match), rtol=1e-4, atol=0)
    found = detector.detect(images, torch.full((2, 2), 128))
    assert found.valid.sum() > 20
    assert found.scores.equal(found.class_scores)
    assert found.quality is None


@pytest.mark.parametrize(
    ("kind", "loop"),
    [
        ("log_iou", reference.log_iou),
        ("log_iou_plus_one", functools.partial(reference.log_iou, added=1.0)),
        ("giou", lambda a, b: 1 - reference.giou(a, b)),
    ],
)
def test_box_loss_option_reaches_the_term(kind, loop):
    detector = calm(redraw(small("fcos", box_loss=kind)))
    images, targets = two_pictures()
    with torch.no_grad():
        losses, pred = detector.loss(images, targets), detector.predict(images)
    match = detector.match(pred.priors, targets)
    assert_close(losses["box"].item(), reference.centerness_box_term(pred, match, loop), rtol=1e-4, atol=0)


def test_improved_samples_centres():
    images, targets = two_pictures()
    centres = []
    for name in ("fcos", "fcos_improved"):
        detector = small(name, range_base=8.0)  # at 4, distances up to 32 on P3 would hold no point far from a centre
        pred = detector.predict(images)
        match = detector.match(pred.priors, targets)
        centres.append(centerness_target(pred.priors.boxes, match.boxes)[match.positive])
    assert len(centres[1]) < len(centres[0])
    assert centres[1].mean() > centres[0].mean()


# --- scores


def test_fcos_ranks_by_the_root_of_the_product_and_cuts_class_scores():
    detector = redraw(small("fcos", max_detections=1000)).eval()
    found = detector.detect(two_pictures()[0], torch.full((2, 2), 128))
    assert found.valid.sum() > 20
    assert_close(found.scores, (found.class_scores * found.quality).sqrt(), rtol=1e-5, atol=1e-6)
    assert found.class_scores[found.valid].min() > 0.05
    assert (found.scores - found.class_scores).abs().max() > 0.05


def test_iou_aware_fcos_ranks_by_iou_and_still_learns_centerness():
    detector = redraw(small("iou_aware_fcos")).eval()
    images, targets = two_pictures()
    found = detector.detect(images, torch.full((2, 2), 128))
    assert found.valid.sum() > 20
    assert_close(found.scores, found.class_scores**0.3 * found.quality**0.7, rtol=1e-5, atol=1e-6)
    pred = detector.predict(images)
    at = torch.arange(2)[:, None], found.prior
    assert_close(found.quality[found.valid], pred.extras["iou"][..., 0].sigmoid()[at][found.valid])
    match = detector.match(pred.priors, targets)
    assert_close(detector.loss(images, targets)["iou"], iou_quality_term(pred, match))
    assert set(small("iou_aware_fcos", centerness=None).losses) == {"cls", "box", "iou"}


# --- options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fcos", {"num_classes": 0}, "fcos: num_classes must be >= 1"),
        ("fcos", {"box_loss": "l1"}, "box_loss must be one of .*log_iou_plus_one.*; got 'l1'"),
        ("fcos", {"distances": "softplus"}, 'distances must be "exp" or "relu"; got .softplus'),
        ("fcos", {"centerness": "both"}, 'centerness must be "class_tower", "box_tower" or None; got .both'),
        ("fcos", {"range_base": 0.0}, "range_base must be > 0; got 0.0"),
        ("fcos", {"radius": -1.0}, "radius must be None or > 0; got -1.0"),
        ("fcos", {"channels": 20}, "channels must be a multiple of 8 with group_norm; got 20"),
        ("fcos", {"point_style": "exact"}, 'style must be "half" or "torchvision"'),
        ("fcos", {"gamma": -1.0}, "gamma must be >= 0; got -1.0"),
        ("fcos", {"score_threshold": 2.0}, r"score_threshold must be in \[0, 1\]"),
        ("fcos_improved", {"threshold_on": "iou"}, 'threshold_on must be "ranking" or "classes"'),
        ("iou_aware_fcos", {"quality_weight": -1.0}, "iou_aware_fcos: quality_weight must be >= 0; got -1.0"),
        ("iou_aware_fcos", {"fusion_alpha": 1.5}, r"alpha must be in \[0, 1\]; got 1.5"),
    ],
)
def test_wrong_options_are_refused_when_the_model_is_built(name, options, message):
    with no_hook(), pytest.raises(ValueError, match=message):
        small(name, **options)


def test_get_model_knows_where_options_go():
    with pytest.raises(TypeError, match=r"fcos_improved has no option anchor_base; it has .*'group_norm'.*'radius'"):
        get_model("fcos_improved", num_classes=3, anchor_base=2.0)
    with pytest.raises(TypeError, match=r"iou_aware_fcos has no option box_losses; it has .*'fusion_alpha'.*'radius'"):
        get_model("iou_aware_fcos", num_classes=3, box_losses="giou")
    assert get_model("fcos_improved", num_classes=3, backbone="tiny", group_norm=False).num_classes == 3


# --- torchvision's FCOS


def torchvision_fcos(**options):
    """On ResNet-18, random weights, outputs re-drawn so that hundreds of boxes pass the threshold."""
    trunk = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    theirs = detection.FCOS(trunk, **{"num_classes": 21, "min_size": 128, "max_size": 200, **options})
    with torch.no_grad():
        theirs.head.classification_head.cls_logits.weight.normal_(std=0.05)
        theirs.head.classification_head.cls_logits.bias.fill_(-3.0)
        theirs.head.regression_head.bbox_reg.weight.normal_(std=0.02)
        theirs.head.regression_head.bbox_reg.bias.fill_(2.0)
        theirs.head.regression_head.bbox_ctrness.weight.normal_(std=0.05)
        for norm in (m for m in theirs.modules() if isinstance(m, nn.GroupNorm)):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(std=0.1)
    return theirs.eval()


@functools.cache
def both():
    torch.manual_seed(0)
    theirs = torchvision_fcos()
    return theirs, from_torchvision(theirs)


def test_from_torchvision_gives_its_boxes_and_scores():
    theirs, ours = both()
    assert not ours.training
    assert_detect_alike(theirs, ours, [torch.rand(3, 90, 140), torch.rand(3, 200, 110), torch.rand(3, 64, 64)])


def test_from_torchvision_gives_its_boxes_and_scores_on_real_pictures(data_root):
    theirs, ours = both()
    paths = sorted((data_root / "samples_original").rglob("*.jpg"))[:3]
    assert paths
    assert_detect_alike(theirs, ours, [pil_to_tensor(Image.open(p).convert("RGB")).float() / 255 for p in paths])


def test_from_torchvision_has_its_losses_on_a_batch():
    # unlike its RetinaNet, its FCOS divides by the positives of the batch
    theirs, ours = (copy.deepcopy(m).train() for m in both())
    for model in (theirs, ours):
        calm(model)
    pictures = [torch.rand(3, 128, 180), torch.rand(3, 128, 180)]
    # the last one's centre (64, 64) is a point of P3 and P4, exactly 64 from its sides: torchvision gives it to neither
    boxes = torch.tensor([[10.0, 12, 80, 90], [60, 40, 170, 120], [100, 5, 130, 30], [0, 0, 128, 128]])
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    targets = [{"boxes": boxes, "labels": torch.tensor([3, 20, 7, 5])}, nothing]
    expected, found = theirs(pictures, targets), ours(pictures, targets)
    assert_close(found["cls"], expected["classification"], rtol=1e-4, atol=1e-5)
    assert_close(found["box"], expected["bbox_regression"], rtol=1e-4, atol=1e-5)
    assert_close(found["centerness"], expected["bbox_ctrness"], rtol=1e-4, atol=1e-5)
    sum(found.values()).backward()
    sum(expected.values()).backward()
    for mine, other in (
        (ours.head.outputs["deltas"], theirs.head.regression_head.bbox_reg),
        (ours.head.class_tower[0], theirs.head.classification_head.conv[0]),
        (ours.body[0].stem[0], theirs.backbone.body.conv1),
    ):
        assert_close(mine.weight.grad, other.weight.grad, rtol=1e-3, atol=1e-5)


def test_from_torchvision_keeps_detection_options():
    theirs = torchvision_fcos(score_thresh=0.3, nms_thresh=0.3, detections_per_img=7, topk_candidates=40)
    assert_detect_alike_few(theirs, from_torchvision(theirs), [torch.rand(3, 100, 150)])


def test_from_torchvision_keeps_the_radius_of_centre_sampling():
    with torch.device("meta"):
        theirs = detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, center_sampling_radius=2)
        assert from_torchvision(theirs).assign.keywords["radius"] == 2.0


def test_from_torchvision_refuses_what_it_does_not_know():
    with no_hook(), pytest.raises(ValueError, match="must be a torchvision FCOS; got Linear"):
        from_torchvision(nn.Linear(1, 1))
    with torch.device("meta"):
        theirs = torchvision_fcos()
        theirs.anchor_generator.sizes = ((4,),) * 5
        with pytest.raises(ValueError, match=r"must have torchvision's default points; got sizes \(\(4,\)"):
            from_torchvision(theirs)
