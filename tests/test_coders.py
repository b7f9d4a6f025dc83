import math

import pytest
import torch
from hypothesis import given
from torch.testing import assert_close
from torchvision.models.detection._utils import BoxCoder as TorchvisionCoder
from torchvision.models.detection._utils import BoxLinearCoder

from detcore.coders import BoxCoder, DeltaCoder, DistanceCoder
from tests import reference
from tests.samples import FAST, any_box, no_hook, some_boxes

WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (1.0, 2.0, 3.0, 4.0)]
CODERS = [DeltaCoder(weights=w) for w in WEIGHTS] + [DistanceCoder(), DistanceCoder(normalise=True)]


def test_delta_coder_by_hand():
    # prior: centre (10, 20), 8 wide, 16 high. box: centre (14, 16), 16 wide, 4 high.
    prior, box = torch.tensor([6.0, 12, 14, 28]).double(), torch.tensor([6.0, 14, 22, 18]).double()
    # (14-10)/8 = .5, (16-20)/16 = -.25, ln(16/8) = ln 2, ln(4/16) = -ln 4; the four weights on top
    deltas = DeltaCoder(weights=(1.0, 2.0, 3.0, 4.0)).encode(box, prior)
    assert_close(deltas, torch.tensor([0.5, -0.5, 3 * math.log(2), -4 * math.log(4)]).double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_delta_coder_equals_torchvision_and_its_loop(weights):
    ours, theirs = DeltaCoder(weights=weights, clamp="upper"), TorchvisionCoder(weights)
    priors, boxes, deltas = some_boxes(50), some_boxes(50), torch.randn(50, 4).double() * 4
    encoded = ours.encode(boxes, priors)
    assert_close(encoded, theirs.encode_single(boxes, priors), rtol=1e-10, atol=1e-10)
    loop = [reference.encode_deltas(b, p, weights) for b, p in zip(boxes.tolist(), priors.tolist(), strict=True)]
    assert_close(encoded, torch.tensor(loop).double(), rtol=1e-6, atol=1e-6)
    assert_close(ours.decode(deltas, priors), theirs.decode_single(deltas, priors), rtol=1e-10, atol=1e-10)
    both = DeltaCoder(weights=weights)
    loop = [reference.decode_deltas(d, p, weights) for d, p in zip(deltas.tolist(), priors.tolist(), strict=True)]
    assert_close(both.decode(deltas, priors), torch.tensor(loop, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_delta_coder_clamps_log_ratios_on_the_sides_asked_for():
    prior = torch.tensor([0.0, 0.0, 16.0, 16.0]).double()
    deltas = torch.tensor([0.0, 0.0, 100.0, -100.0]).double()
    x1, y1, x2, y2 = DeltaCoder().decode(deltas, prior).tolist()
    assert_close(x2 - x1, 1000.0)  # 16 px * 1000 / 16
    assert_close(y2 - y1, 16 * 16 / 1000)
    upper = DeltaCoder(clamp="upper").decode(deltas, prior)
    assert_close((upper[2] - upper[0]).item(), 1000.0)
    assert (upper[3] - upper[1]).item() < 1e-40
    assert DeltaCoder().decode(torch.full((4,), 60000.0, dtype=torch.float16), prior.float()).isfinite().all()


def test_distance_coder_by_hand():
    # centre (16, 16), stride 8; box x 10..30, y 11..21: left 6, top 5, right 14, bottom 5
    point, box = torch.tensor([12.0, 12, 20, 20]), torch.tensor([10.0, 11, 30, 21])
    assert DistanceCoder().encode(box, point).tolist() == [6.0, 5.0, 14.0, 5.0]
    assert DistanceCoder(normalise=True).encode(box, point).tolist() == [0.75, 0.625, 1.75, 0.625]


@pytest.mark.parametrize("normalise", [False, True])
def test_distance_coder_equals_torchvision(normalise):
    ours, theirs = DistanceCoder(normalise=normalise), BoxLinearCoder(normalize_by_size=normalise)
    points, boxes, distances = some_boxes(50), some_boxes(50), torch.rand(50, 4).double() * 9
    assert_close(ours.encode(boxes, points), theirs.encode(points, boxes), rtol=1e-10, atol=1e-10)
    assert_close(ours.decode(distances, points), theirs.decode(distances, points), rtol=1e-10, atol=1e-10)


def test_random_boxes_tell_the_coders_apart():
    priors, boxes = some_boxes(50), some_boxes(50)
    codes = [coder.encode(boxes, priors) for coder in CODERS]
    for i in range(len(codes)):
        for j in range(i):
            assert (codes[i] - codes[j]).abs().median() > 100 * 1e-6


@pytest.mark.parametrize("coder", CODERS)
@FAST
@given(box=any_box(), prior=any_box())
def test_decoding_undoes_encoding(coder, box, prior):
    # sides 1 to 200 px: every log ratio is below the limit ln(62.5) only up to a ratio of 62.5
    ratios = [(box[i + 2] - box[i]) / (prior[i + 2] - prior[i]) for i in (0, 1)]
    if isinstance(coder, DistanceCoder) or all(1 / 62 < r < 62 for r in ratios):
        assert_close(coder.decode(coder.encode(box, prior), prior), box, rtol=1e-9, atol=1e-9)
    code = torch.tensor([0.3, -0.2, 0.5, -0.7], dtype=torch.float64)
    assert_close(coder.encode(coder.decode(code, prior), prior), code, rtol=1e-9, atol=1e-9)


def test_delta_coder_ignores_shift_and_scale():
    priors, boxes = some_boxes(20), some_boxes(20)
    code = DeltaCoder().encode(boxes, priors)
    assert_close(DeltaCoder().encode(boxes * 3 + 7, priors * 3 + 7), code, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_of_short_floats_is_computed_in_float32(coder, dtype):
    deltas, priors = torch.rand(5, 4).to(dtype), some_boxes(5, size=700, dtype=torch.float32)
    boxes = coder.decode(deltas, priors)
    assert boxes.dtype == torch.float32
    assert_close(boxes, coder.decode(deltas.float(), priors), rtol=0, atol=0)


@pytest.mark.parametrize("coder", CODERS)
def test_coders_are_hashable_values_with_gradients(coder):
    assert isinstance(coder, BoxCoder)
    assert len({coder, coder}) == 1
    deltas, priors = torch.randn(6, 4).double().requires_grad_(), some_boxes(6)
    assert torch.autograd.gradcheck(lambda d: coder.decode(d, priors), deltas)
    boxes = some_boxes(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda b: coder.encode(b, priors), boxes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": (1.0, 0.0, 1.0, 1.0)}, "weights .four. and limit must be > 0; got"),
        ({"weights": (1.0, 1.0)}, "weights .four."),
        ({"limit": 0.0}, "limit must be > 0"),
        ({"clamp": "lower"}, 'clamp must be "both" or "upper"; got .lower'),
    ],
)
def test_delta_coder_refuses_what_it_cannot_do(options, message):
    with no_hook(), pytest.raises(ValueError, match=message):
        DeltaCoder(**options)
