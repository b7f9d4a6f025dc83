"""RetinaNet-Conf and the quality focal head: what they add to RetinaNet, and where they are RetinaNet."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from detcore.losses.terms import focal_term, iou_quality_term, quality_focal_term
from detcore.models import get_model
from detcore.models.gfl import retinanet_gfl
from detcore.models.retinanet_conf import retinanet_conf
from detcore.structures import Predictions, Priors
from tests.samples import no_hook
from tests.test_models import calm, count, redraw, two_pictures
from tests.zoo import ZOO, small

SIZES = torch.full((2, 2), 128)


def same_weights(detector, base):
    """``detector`` with the weights of ``base`` wherever both have one; what only it has."""
    return detector.load_state_dict(base.state_dict(), strict=False).missing_keys


def assert_same_detections(a, b, images):
    for detector in (a, b):
        detector.eval()
    mine, theirs = a.predict(images), b.predict(images)
    for name in ("logits", "deltas", "boxes"):
        assert getattr(mine, name).equal(getattr(theirs, name)), name
    mine, theirs = a.detect(images, SIZES), b.detect(images, SIZES)
    assert theirs.valid.sum() > 20
    for name in ("boxes", "scores", "labels", "valid", "class_scores", "prior"):
        assert getattr(mine, name).equal(getattr(theirs, name)), name


# --- RetinaNet-Conf


def test_conf_adds_one_convolution():
    with torch.device("meta"):
        detector = get_model("retinanet_conf", num_classes=80)
    assert count(detector) == 37_968_692 + 20_745
    assert count(detector.head.outputs["confidence"]) == 20_745


def test_conf_without_its_branch_is_retinanet():
    plain = redraw(small("retinanet", box_loss="l1"))
    conf = small("retinanet_conf", fusion_alpha=0.0)
    assert same_weights(conf, plain) == ["head.outputs.confidence.weight", "head.outputs.confidence.bias"]
    images, targets = two_pictures()
    for detector in (plain, conf):
        sum(value for name, value in detector.loss(images, targets).items() if name != "confidence").backward()
    ours, theirs = conf.loss(images, targets), plain.loss(images, targets)
    assert ours["cls"].equal(theirs["cls"])
    assert ours["box"].equal(theirs["box"])
    own = dict(conf.named_parameters())
    assert all(own[name].grad.equal(value.grad) for name, value in plain.named_parameters())
    assert_same_detections(conf, plain, images)  # alpha = 0: ranked by class alone


def test_conf_of_the_other_box_loss_is_another_loss():
    plain, conf = small("retinanet"), small("retinanet_conf")
    same_weights(conf, plain)
    images, targets = two_pictures()
    assert not conf.loss(images, targets)["box"].equal(plain.loss(images, targets)["box"])


@pytest.mark.parametrize("detach", [True, False])
def test_confidence_learns_on_the_class_tower(detach):
    detector = redraw(small("retinanet_conf", detach_iou_target=detach))
    images, targets = two_pictures()
    detector.loss(images, targets)["confidence"].backward()
    head = detector.head
    assert head.outputs["confidence"].weight.grad.abs().sum() > 0
    assert head.class_tower[0].weight.grad.abs().sum() > 0
    assert head.outputs["logits"].weight.grad is None
    # an attached target reaches the boxes, and the tower under them
    assert (head.outputs["deltas"].weight.grad is None) == detach
    assert (head.box_tower[0].weight.grad is None) == detach


@pytest.mark.parametrize(
    ("kind", "weight"),
    [("bce", 0.0), ("l1", 0.0), ("smooth_l1", 0.0), ("l2", 0.0), ("qfl", 0.0), ("bce", 1e-3), ("bce", 1e-4)],
)
def test_rows_of_table_2_reach_the_term(kind, weight):
    options = {"quality_loss": kind, "quality_weight": 3.0, "negative_weight": weight, "detach_iou_target": False}
    detector = calm(small("retinanet_conf", **options))
    images, targets = two_pictures()
    pred = detector.predict(images)
    match = detector.match(pred.priors, targets)
    term = partial(iou_quality_term, name="confidence", kind=kind, negative_weight=weight)
    found = detector.loss(images, targets)["confidence"]
    assert_close(found, 3 * term(pred, match))
    redrawn = redraw(detector)
    redrawn.loss(images, targets)["confidence"].backward()
    assert redrawn.head.outputs["deltas"].weight.grad is not None


def hand_made():
    """Two anchors of two classes: p = (.2, .6; .5, .1), confidence (.9, .4)."""
    boxes = torch.tensor([[[0.0, 0, 10, 10], [20, 0, 30, 10]]])
    logits = torch.tensor([[[0.2, 0.6], [0.5, 0.1]]]).logit()
    confidence = torch.tensor([[[0.9], [0.4]]]).logit()
    return Predictions(logits, torch.zeros(1, 2, 4), boxes, Priors(boxes, (2,)), {"confidence": confidence})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fusion_alpha": 0.0}, [[0.2, 0.6], [0.5, 0.1]]),
        ({"fusion_alpha": 0.0, "min_quality": 0.5}, [[0.2, 0.6], [0.0, 0.0]]),
        ({"fusion_alpha": None}, [[0.18, 0.54], [0.2, 0.04]]),
        ({"fusion_alpha": None, "min_quality": 0.5}, [[0.18, 0.54], [0.0, 0.0]]),
        ({"min_quality": 0.5}, [[0.36502, 0.70565], [0.0, 0.0]]),
        ({}, [[0.36502, 0.70565], [0.45731, 0.17411]]),  # .2^.6 .9^.4, ...: alpha = .4 belongs to the confidence
        ({"fusion_alpha": 1.0}, [[0.9, 0.9], [0.4, 0.4]]),
    ],
)
def test_rows_of_table_4_are_options(options, expected):
    detector = small("retinanet_conf", num_classes=2, **options)
    assert_close(detector.score(hand_made()).ranking[0], torch.tensor(expected), rtol=0, atol=1e-5)


def test_rows_of_table_4_on_the_whole_detector():
    # levels of 9 to 576 anchors lie below the 1000 candidates: they are fused and filtered like the large one
    images, _ = two_pictures()
    torch.manual_seed(0)
    for alpha, least in ((0.4, None), (0.4, 0.5), (None, 0.5)):
        everything = {"score_threshold": 0.0, "nms_iou": None, "max_detections": 6000}
        detector = redraw(small("retinanet_conf", fusion_alpha=alpha, min_quality=least, **everything)).eval()
        found = detector.detect(images, SIZES)
        p, q, v = found.class_scores, found.quality, found.valid
        assert v.sum() > 20
        fused = p * q if alpha is None else q**alpha * p ** (1 - alpha)
        assert_close(found.scores[v], fused[v], rtol=1e-5, atol=1e-6)
        assert (q[v].min() > 0.5) == (least is not None)
        levels = detector.predict(images).priors.level[found.prior[v]]
        assert levels.unique().tolist() == [0, 1, 2, 3, 4]


def test_conf_threshold_can_cut_the_class_score():
    images, _ = two_pictures()
    kept = {}
    for on in ("ranking", "classes"):
        torch.manual_seed(0)
        detector = small("retinanet_conf", fusion_alpha=0.5, threshold_on=on, max_detections=1000).eval()
        kept[on] = int(detector.detect(images, SIZES).valid.sum())
    assert kept["ranking"] > 100  # (.01 * .5)^.5 = .07
    assert kept["classes"] == 0


# --- the quality focal head


def test_gfl_has_no_branch():
    with torch.device("meta"):
        detector = get_model("retinanet_gfl", num_classes=80)
    assert count(detector) == 37_968_692


def test_gfl_is_retinanet_but_for_its_class_loss():
    plain, gfl = redraw(small("retinanet")), small("retinanet_gfl")
    assert same_weights(gfl, plain) == []
    images, targets = two_pictures()
    ours, theirs = gfl.loss(images, targets), plain.loss(images, targets)
    assert ours["box"].equal(theirs["box"])
    assert not ours["cls"].equal(theirs["cls"])
    assert_same_detections(gfl, plain, images)


@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0])
def test_gfl_of_perfect_boxes_is_focal_without_alpha(beta):
    detector = calm(redraw(small("retinanet_gfl", beta=beta)))
    images, targets = two_pictures()
    pred = detector.predict(images)
    match = detector.match(pred.priors, targets)
    perfect = Predictions(pred.logits, pred.deltas, match.boxes, pred.priors)
    _, term = detector.losses["cls"]
    assert_close(term(perfect, match), focal_term(pred, match, alpha=None, gamma=beta), rtol=1e-5, atol=0)
    assert_close(detector.loss(images, targets)["cls"], quality_focal_term(pred, match, beta=beta))
    assert detector.loss(images, targets)["cls"] < 0.95 * term(perfect, match)


def test_class_loss_of_gfl_leaves_the_boxes_alone():
    detector = redraw(small("retinanet_gfl"))
    images, targets = two_pictures()
    detector.loss(images, targets)["cls"].backward()
    assert detector.head.outputs["deltas"].weight.grad is None
    assert detector.head.box_tower[0].weight.grad is None


# --- mistakes


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("retinanet_conf", {"quality_loss": "huber"}, "kind must be .*got 'huber'"),
        ("retinanet_conf", {"quality_weight": -1.0}, r"quality_weight and negative_weight must be >= 0; got -1.0 and"),
        ("retinanet_conf", {"negative_weight": -0.1}, r"negative_weight must be >= 0; got 1.0 and -0.1"),
        ("retinanet_conf", {"fusion_alpha": 1.5}, r"conf_powers: alpha must be in \[0, 1\]; got 1.5"),
        ("retinanet_conf", {"min_quality": 1.5}, r"min_quality must be None or in \[0, 1\]; got 1.5"),
        ("retinanet_conf", {"min_quality": -0.5}, r"min_quality must be None or in \[0, 1\]; got -0.5"),
        ("retinanet_conf", {"threshold_on": "cls"}, 'threshold_on must be "ranking" or "classes"'),
        ("retinanet_conf", {"box_loss": "l2"}, "box_loss must be .*; got .l2"),
        ("retinanet_gfl", {"beta": -1.0}, r"quality_focal_loss: beta must be >= 0; got -1.0"),
    ],
)
def test_wrong_options_are_refused_when_the_model_is_built(name, options, message):
    with no_hook(), pytest.raises(ValueError, match=message):
        small(name, **options)


def test_options_without_meaning_are_refused():
    with pytest.raises(TypeError, match="retinanet_gfl: alpha, gamma belong to the focal loss; this one has beta"):
        small("retinanet_gfl", alpha=0.25, gamma=2.0)
    with pytest.raises(TypeError, match=r"class_extras"):
        retinanet_conf(num_classes=3, backbone="tiny", class_extras={"other": 1})
    with pytest.raises(TypeError, match="retinanet_gfl has no option fusion_alpha"):
        small("retinanet_gfl", fusion_alpha=0.4)


def test_factories_are_those_of_get_model():
    with torch.device("meta"):
        for factory, name in ((retinanet_conf, "retinanet_conf"), (retinanet_gfl, "retinanet_gfl")):
            assert count(factory(num_classes=3, backbone="tiny")) == ZOO[name].parameters
