"""Convolutions Winograd's way against torch's own, their slopes, and where which of the two is taken."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from detcore import kernels
from detcore.kernels import _tiles, halves, winograd
from detcore.kernels.winograd import best_form, winograd_convolution, winograd_weights
from detcore.models import get_model
from detcore.nn import convolution
from detcore.nn.convolution import FastConv2d

FORMS = pytest.mark.parametrize("products", [16, 36])


@pytest.fixture
def pays(monkeypatch):
    """As on a processor where it pays."""
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setitem(winograd.HAS, dtype, True)
        monkeypatch.setitem(halves.HAS, dtype, True)


@pytest.fixture
def taken(monkeypatch):
    """The numbers of products with which convolutions were computed."""
    calls = []

    def noted(x, weights, bias):
        calls.append(len(weights))
        return winograd_convolution(x, weights, bias)

    monkeypatch.setattr(convolution, "winograd_convolution", noted)
    return calls


def maps(*size, dtype=torch.float32):
    return torch.randn(size, dtype=dtype).to(memory_format=torch.channels_last)


@FORMS
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("block", [1, 2000, 1 << 24], ids="block{}".format)
@pytest.mark.parametrize("size", [(2, 3, 8, 8), (1, 2, 5, 7), (2, 4, 1, 1), (3, 5, 13, 6), (1, 1, 4, 9)], ids=str)
def test_values_and_slopes_are_those_of_torch(size, block, has_bias, products, monkeypatch):
    monkeypatch.setattr(_tiles, "BLOCK", block)
    monkeypatch.setattr(_tiles, "TILES", 1)
    x, weight = maps(*size, dtype=torch.float64), torch.randn(6, size[1], 3, 3, dtype=torch.float64)
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True) if has_bias else None
    inputs += [bias] if has_bias else []
    wanted = F.conv2d(x, weight, bias, padding=1)
    found = winograd_convolution(x, winograd_weights(weight, products), bias)
    by = torch.randn_like(wanted)
    assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert_close(
        torch.autograd.grad(found, inputs, by), torch.autograd.grad(wanted, inputs, by), rtol=1e-12, atol=2e-12
    )
    with torch.no_grad():
        assert_close(winograd_convolution(x, winograd_weights(weight, products), bias), wanted, rtol=1e-12, atol=1e-12)


def test_one_dimension_by_hand():
    """Two outputs of (1, 2, 3, 4) under (1, 10, 100), one row of a map one tile high: 1 + 20 + 300, 2 + 30 + 400."""
    x, weight = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1] = torch.tensor([1.0, 10.0, 100.0])
    found = winograd_convolution(x, winograd_weights(weight, 16))
    assert_close(found, torch.tensor([[[[210.0, 321.0, 432.0, 43.0]]]]))


@pytest.mark.parametrize(("dtype", "products", "most"), [(torch.float32, 36, 4e-6), (torch.bfloat16, 16, 9e-3)])
def test_rounding_is_small(dtype, products, most):
    """Root of the mean squared error over that of the values: TF32 has 3e-4, bfloat16 by itself 2e-3."""
    x, weight = maps(2, 256, 20, 20).to(dtype), torch.randn(64, 256, 3, 3).to(dtype)
    found = winograd_convolution(x, winograd_weights(weight.float(), products).to(dtype))
    wanted = F.conv2d(x.double(), weight.double(), padding=1)
    assert 0 < (found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt() < most


@FORMS
def test_no_maps_make_no_maps(products):
    x, weights = maps(0, 2, 8, 8).requires_grad_(), winograd_weights(torch.randn(3, 2, 3, 3), products).requires_grad_()
    made = winograd_convolution(x, weights)
    assert made.shape == (0, 3, 8, 8)
    made.sum().backward()
    assert x.grad.shape == x.shape
    assert not weights.grad.any()


@FORMS
def test_maps_and_their_slopes_lie_channels_last(products):
    x = maps(2, 5, 9, 6).requires_grad_()
    made = winograd_convolution(x, winograd_weights(torch.randn(4, 5, 3, 3), products))
    made.relu_().sum().backward()  # layers after it may work in place
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_a_second_derivative_is_refused():
    x = maps(1, 2, 4, 4).requires_grad_()
    made = winograd_convolution(x, winograd_weights(torch.randn(2, 2, 3, 3), 16))
    with pytest.raises(RuntimeError, match=r"winograd_convolution: .* got create_graph=True.*disable"):
        torch.autograd.grad(made.sum(), x, create_graph=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own check
@FORMS
def test_the_compiler_is_told_the_truth(products):
    x, bias = maps(2, 3, 6, 5).requires_grad_(), torch.randn(4, requires_grad=True)
    weights = winograd_weights(torch.randn(4, 3, 3, 3), products).requires_grad_()
    slopes = (maps(2, 4, 6, 5), x.detach(), weights.detach())
    for op, inputs in ((winograd._recorded, (x, weights, bias)), (winograd.winograd_slopes, slopes)):
        assert set(torch.library.opcheck(op, inputs).values()) == {"SUCCESS"}


def test_memory_to_work_in_is_a_threads_own_and_outlives_inference_mode():
    x = maps(2, 8, 16, 16, dtype=torch.float64)
    weights = winograd_weights(torch.randn(8, 8, 3, 3, dtype=torch.float64), 36)
    wanted = winograd_convolution(x, weights)
    with torch.inference_mode():
        assert_close(winograd_convolution(x, weights), wanted)
    found = {}

    def work(name):
        found[name] = [winograd_convolution(name * x, weights) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, results in found.items():
        for result in results:
            assert_close(result, name * wanted)
    assert len(found) == 4


X = maps(4, 256, 40, 40)
WEIGHT = torch.zeros(256, 256, 3, 3)


@pytest.mark.usefixtures("pays")
@pytest.mark.parametrize(
    ("x", "weight", "dtype", "products"),
    [
        (X, WEIGHT, torch.float32, 36),
        (X, WEIGHT, torch.bfloat16, 16),
        (X, WEIGHT, torch.float64, None),
        (X, WEIGHT, torch.float16, None),
        (X.contiguous(), WEIGHT, torch.float32, None),
        (X, WEIGHT[:36], torch.float32, None),
        (X, WEIGHT[:128], torch.float32, 36),
        (X, WEIGHT[:128], torch.bfloat16, None),
        (maps(4, 256, 10, 10), WEIGHT, torch.float32, None),
        (maps(64, 256, 10, 10), WEIGHT, torch.float32, None),  # tiles of 12 x 12
        (maps(1, 256, 20, 20), WEIGHT, torch.float32, None),
        (X.to("meta"), WEIGHT, torch.float32, None),
    ],
)
def test_it_is_taken_where_it_was_measured_to_be_faster(x, weight, dtype, products):
    assert best_form(x, weight, dtype) == products


@pytest.mark.usefixtures("pays")
def test_weights_at_hand_pay_on_fewer_tiles():
    assert best_form(maps(1, 256, 20, 20), WEIGHT, torch.float32, is_ready=True) == 36
    assert best_form(maps(1, 256, 12, 12), WEIGHT, torch.float32, is_ready=True) is None


def test_other_processors_convolve_plainly(monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setitem(winograd.HAS, dtype, False)
        assert best_form(X, WEIGHT, dtype) is None


@pytest.mark.usefixtures("pays")
@pytest.mark.parametrize(
    "option",
    [
        {"stride": 2},
        {"padding": 0},
        {"padding": "same"},
        {"dilation": 2},
        {"groups": 2},
        {"padding_mode": "reflect"},
        {"kernel_size": 1},
        {"out_channels": 64},
    ],
    ids=str,
)
def test_only_convolutions_that_can_are_computed_so(option, taken):
    usual = {"in_channels": 128, "out_channels": 128, "kernel_size": 3, "padding": 1}
    x = maps(4, 128, 40, 40)
    FastConv2d(**usual).to(memory_format=torch.channels_last)(x)
    FastConv2d(**{**usual, **option}).to(memory_format=torch.channels_last)(x)
    assert taken == [36]


@pytest.mark.usefixtures("pays")
def test_detectors_use_it_with_their_weights_and_names_unchanged(taken):
    torch.manual_seed(0)
    detector = get_model("retinanet", num_classes=3, backbone="resnet18").to(memory_format=torch.channels_last)
    assert "head.class_tower.0.weight" in detector.state_dict()
    images = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        found = detector.eval().predict(images)
        assert set(taken) == {36}
        used = len(taken)
        with kernels.disable():
            wanted = detector.predict(images)
    assert len(taken) == used  # not once without kernels
    assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    assert_close(found.boxes, wanted.boxes, rtol=1e-4, atol=1e-2)


@pytest.mark.usefixtures("pays")
def test_autocast_computes_in_bfloat16_and_keeps_weights_in_float32(taken):
    conv = FastConv2d(256, 256, 3, padding=1).to(memory_format=torch.channels_last)
    x = maps(4, 256, 20, 20)
    slopes = []
    for context in (torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
        with context:
            made = conv(x)
        assert made.dtype == (torch.float32 if slopes else torch.bfloat16)
        slopes.append(torch.autograd.grad(made.float().square().mean(), list(conv.parameters())))
    assert taken == [16, 36]
    for found, wanted in zip(*slopes, strict=True):
        assert found.dtype == torch.float32
        assert (found - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.compile
@pytest.mark.usefixtures("pays")
def test_compiled_it_is_one_graph_with_the_same_slopes():
    conv = FastConv2d(128, 128, 3, padding=1).to(memory_format=torch.channels_last)
    x = maps(4, 128, 16, 16).requires_grad_()
    wanted = torch.autograd.grad(conv(x).square().sum(), [x, *conv.parameters()])
    found = torch.autograd.grad(torch.compile(conv, fullgraph=True)(x).square().sum(), [x, *conv.parameters()])
    assert_close(found, wanted, rtol=1e-4, atol=1e-3)
