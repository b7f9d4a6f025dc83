"""FCOS with the association loss, the limits where it is FCOS, and the loss on every other detector."""

import copy
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from detcore.losses.association import association_term
from detcore.models import get_model
from detcore.models.fcos_association import fcos_association
from tests.samples import no_hook
from tests.test_models import calm, count, outputs_of, redraw, two_pictures
from tests.test_models_conf import assert_same_detections, same_weights
from tests.zoo import ZOO, small


def test_nothing_is_added_to_the_network():
    with torch.device("meta"):
        detector = get_model("fcos_association", num_classes=80)
    assert count(detector) == 32_297_370 - 2_305  # the centre-ness convolution
    assert list(detector.head.outputs) == ["logits", "deltas"]


@pytest.mark.parametrize(
    ("kind", "centerness"), [("pse", None), ("pce", None), ("pse", "class_tower"), ("pce", "box_tower")]
)
def test_weight_zero_is_fcos(kind, centerness):
    options = {"centerness": centerness}
    plain = redraw(small("fcos", **options))
    other = small("fcos_association", association=kind, association_weight=0.0, **options)
    assert same_weights(other, plain) == []
    images, targets = two_pictures()
    ours, theirs = other.loss(images, targets), plain.loss(images, targets)
    assert ours.pop("association") == 0
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(value) for name, value in theirs.items())
    for detector in (other, plain):
        sum(detector.loss(images, targets).values()).backward()
    own = dict(other.named_parameters())
    for name, value in plain.named_parameters():
        assert own[name].grad.equal(value.grad), name
    assert_same_detections(other, plain, images)


def test_score_is_the_class_score():
    detector = redraw(small("fcos_association")).eval()
    found = detector.detect(two_pictures()[0], torch.full((2, 2), 128))
    assert found.valid.sum() > 20
    assert found.scores.equal(found.class_scores)
    assert found.quality is None


@pytest.mark.parametrize("kind", ["pse", "pce"])
@pytest.mark.parametrize("score", ["label", "max"])
def test_options_reach_the_term(kind, score):
    options = {"association": kind, "beta": 0.7, "k": 0.9, "association_score": score}
    detector = calm(redraw(small("fcos_association", association_weight=3.0, **options)))
    images, targets = two_pictures()
    pred = detector.predict(images)
    match = detector.match(pred.priors, targets)
    found = detector.loss(images, targets)["association"]
    assert_close(found, 3 * association_term(pred, match, kind=kind, beta=0.7, k=0.9, score=score))
    others = [association_term(pred, match), association_term(pred, match, kind="pce", score="max", k=0.9, beta=0.7)]
    assert all((found - 3 * other).abs() > 1e-3 for other in others) == ((kind, score) != ("pce", "max"))


@pytest.mark.parametrize("kind", ["pse", "pce"])
@pytest.mark.parametrize("score", ["label", "max"])
def test_association_moves_no_box(kind, score):
    # section III.C of the paper: it must not affect the localisation branch
    detector = redraw(small("fcos_association", association=kind, association_score=score))
    images, targets = two_pictures()
    detector.loss(images, targets)["association"].backward()
    head = detector.head
    assert head.outputs["logits"].weight.grad.abs().sum() > 0
    assert head.class_tower[0].weight.grad.abs().sum() > 0
    kept = [head.outputs["deltas"], head.box_tower, head.on_deltas]
    frozen = [value for part in kept for value in part.parameters()]
    assert len(frozen) > 5 + 2  # the scales of the levels are among them
    assert all(value.grad is None for value in frozen)
    assert detector.body[0].stem[0].weight.grad.abs().sum() > 0  # what both towers share does move


def test_a_step_brings_scores_nearer_to_what_the_boxes_reach():
    torch.manual_seed(0)
    detector = calm(redraw(small("fcos_association", association_weight=1.0)))
    images, targets = two_pictures()
    before = detector.loss(images, targets)["association"]
    before.backward()
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.02 * parameter.grad)
    assert detector.loss(images, targets)["association"] < 0.99 * before


@pytest.mark.parametrize("kind", ["pse", "pce"])
@pytest.mark.parametrize("name", ["retinanet", "iou_aware_retinanet", "retinanet_gfl", "fcos", "ssd300"])
def test_association_rides_on_every_detector(name, kind):
    detector = calm(small(name))
    base = copy.deepcopy(detector)
    term = partial(association_term, kind=kind, activation="softmax" if ZOO[name].softmax else "sigmoid")
    detector.losses["association"] = (0.5, term)
    images, targets = two_pictures()
    losses, without = detector.loss(images, targets), base.loss(images, targets)
    assert losses["association"] > 0
    assert all(losses[term].equal(value) for term, value in without.items())
    for model, values in ((detector, losses), (base, without)):
        sum(values.values()).backward()
        torch.optim.SGD(model.parameters(), 1e-3).step()
    assert all(value.isfinite() for value in detector.loss(images, targets).values())
    for output, changes in (("logits", True), ("deltas", False)):
        pairs = zip(outputs_of(detector, output), outputs_of(base, output), strict=True)
        assert any(not ours.weight.equal(theirs.weight) for ours, theirs in pairs) == changes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"association": "mse"}, 'fcos_association: association must be "pse" or "pce"; got .mse'),
        ({"association_score": "own"}, 'association_score must be "label" or "max"; got .own'),
        ({"association_weight": -1.0}, r"association_weight must be >= 0; got -1.0"),
        ({"beta": -1.0}, r"beta must be >= 0 and k > 0; got -1.0 and 1.0"),
        ({"association": "pce", "k": 0.0}, r"beta must be >= 0 and k > 0; got 1.0 and 0.0"),
        ({"centerness": "tower"}, "centerness must be"),
        ({"range_base": 0.0}, "range_base must be > 0"),
    ],
)
def test_wrong_options_are_refused_when_the_model_is_built(options, message):
    with no_hook(), pytest.raises(ValueError, match=message):
        small("fcos_association", **options)


def test_unknown_options_are_named():
    with pytest.raises(TypeError, match=r"has no option gama; it has .*association.*gamma.*range_base"):
        small("fcos_association", gama=2.0)


def test_factory_is_the_one_behind_get_model():
    with torch.device("meta"):
        assert count(fcos_association(num_classes=3, backbone="tiny")) == ZOO["fcos_association"].parameters
