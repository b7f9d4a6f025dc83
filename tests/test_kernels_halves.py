"""Half precision on processors without it: the same numbers as where there is, to one rounding."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from detcore import kernels
from detcore.inference import PackedConv2d
from detcore.kernels import halves, winograd
from detcore.kernels.halves import in_float32, multiplied_as
from detcore.models import get_model
from detcore.nn.convolution import FastConv2d, FastConvTranspose2d, use_fast_convolutions
from tests.samples import no_hook
from tests.zoo import EVERY_NETWORK, ZOO, small

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def without(monkeypatch):
    """As on a processor that has neither type."""
    for dtype in (torch.bfloat16, torch.float16):
        monkeypatch.setitem(halves.HAS, dtype, False)


@pytest.fixture
def widened(monkeypatch):
    """The types in which convolutions were worked out."""
    found = []

    def noting(convolve):
        return lambda x, *args, **kwargs: found.append(x.dtype) or convolve(x, *args, **kwargs)

    for name in ("conv2d", "conv_transpose2d"):
        monkeypatch.setattr(F, name, noting(getattr(F, name)))
    return found


def truth(conv, x, dtype):
    """Rounded inputs, exact products and sums, one rounding of the result: what such hardware does."""
    exact = copy.deepcopy(conv).to(dtype).double()
    plain = nn.ConvTranspose2d if isinstance(conv, nn.ConvTranspose2d) else nn.Conv2d
    return plain.forward(exact, x.to(dtype).double())


CONVOLUTIONS = {
    "plain": lambda: FastConv2d(8, 16, 3, padding=1),
    "no bias": lambda: FastConv2d(8, 16, 1, bias=False),
    "strided": lambda: FastConv2d(8, 16, 3, stride=2),
    "groups": lambda: FastConv2d(8, 16, 3, groups=4, dilation=2),
    "same": lambda: FastConv2d(8, 16, 3, padding="same"),
    "reflected": lambda: FastConv2d(8, 16, 3, padding=1, padding_mode="reflect"),
    "transposed": lambda: FastConvTranspose2d(8, 16, 2, stride=2),
    "transposed, uneven": lambda: FastConvTranspose2d(8, 16, 3, stride=2, padding=1, output_padding=1, bias=False),
}


@pytest.mark.usefixtures("without")
@HALVES
@pytest.mark.parametrize("is_autocast", [True, False], ids=["autocast", "weights"])
@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_result_is_the_exact_one_rounded_once(make, is_autocast, dtype, widened):
    conv, x = make(), torch.randn(2, 8, 9, 7)
    wanted = truth(conv, x, dtype)
    with torch.autocast("cpu", dtype, enabled=is_autocast):
        found = conv(x) if is_autocast else conv.to(dtype)(x.to(dtype))
    assert widened == [torch.float64, torch.float32]  # of the truth and of what was found
    assert found.dtype == dtype
    # half of the last place, and float32's own rounding where terms cancel
    assert_close(found.double(), wanted, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=2e-6)


@pytest.mark.usefixtures("without")
@HALVES
def test_slopes_are_the_exact_ones_rounded(dtype):
    conv, x = FastConv2d(8, 16, 3, padding=1).to(dtype), torch.randn(2, 8, 9, 7).to(dtype)
    exact, wide = copy.deepcopy(conv).double(), x.double().requires_grad_()
    x.requires_grad_()
    by = torch.randn(2, 16, 9, 7).to(dtype)
    found = torch.autograd.grad(conv(x), [x, *conv.parameters()], by)
    wanted = torch.autograd.grad(nn.Conv2d.forward(exact, wide), [wide, *exact.parameters()], by.double())
    for mine, other in zip(found, wanted, strict=True):
        assert mine.dtype == dtype
        assert_close(mine.double(), other, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-5)


@pytest.mark.usefixtures("without")
def test_autocast_leaves_slopes_of_weights_in_float32():
    conv, x = FastConv2d(4, 4, 3), torch.randn(1, 4, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        conv(x).sum().backward()
    assert conv.weight.grad.dtype == torch.float32
    assert conv.weight.grad.equal(conv.weight.grad.bfloat16().float())  # rounded on the way, as autocast does


@pytest.mark.usefixtures("without")
def test_many_channels_take_winograds_way_in_float32(monkeypatch):
    monkeypatch.setitem(winograd.HAS, torch.float32, True)
    conv = FastConv2d(128, 128, 3, padding=1).bfloat16().to(memory_format=torch.channels_last)
    x = torch.randn(1, 128, 40, 40).bfloat16().to(memory_format=torch.channels_last)
    forms = []
    made = winograd.winograd_convolution
    monkeypatch.setattr(
        "detcore.nn.convolution.winograd_convolution",
        lambda x, weights, bias: forms.append((x.dtype, len(weights))) or made(x, weights, bias),
    )
    found = conv(x)
    assert forms == [(torch.float32, 36)]
    assert_close(found.double(), truth(conv, x, torch.bfloat16), rtol=2**-8, atol=1e-4)


@pytest.mark.usefixtures("without")
def test_switched_off_and_with_a_size_asked_for_it_is_torchs(widened):
    conv, x = FastConv2d(4, 4, 3).bfloat16(), torch.randn(1, 4, 6, 6).bfloat16()
    with kernels.disable():
        conv(x)
    up = FastConvTranspose2d(4, 4, 2, stride=2).bfloat16()
    assert up(x, output_size=[13, 13]).shape[-2:] == (13, 13)
    assert widened == [torch.bfloat16, torch.bfloat16]


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("make", [FastConv2d, FastConvTranspose2d])
def test_maps_of_another_type_than_the_weights_are_refused_as_everywhere(make):
    with pytest.raises(RuntimeError, match=r"should be the same|expected scalar type"):
        make(4, 4, 3)(torch.randn(1, 4, 6, 6).bfloat16())


@pytest.mark.parametrize("make", [FastConv2d, FastConvTranspose2d, PackedConv2d])
def test_what_is_no_tensor_is_refused_as_everywhere(make):
    with no_hook(), pytest.raises(TypeError, match=r"got \(tuple|not tuple"):
        make(4, 4, 3)((torch.zeros(1, 4, 6, 6),) * 2)


def test_other_types_and_processors_that_have_it_are_left_alone(monkeypatch, widened):
    monkeypatch.setitem(halves.HAS, torch.bfloat16, True)
    assert multiplied_as(torch.float64) == torch.float64
    assert multiplied_as(torch.uint8) == torch.uint8
    assert multiplied_as(torch.bfloat16) == torch.bfloat16
    FastConv2d(4, 4, 3).bfloat16()(torch.randn(1, 4, 6, 6).bfloat16())
    assert widened == [torch.bfloat16]


def test_it_asks_onednn_what_the_processor_has():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("needs a torch with oneDNN: without it nothing is asked and the answer is no")
    assert halves.HAS[torch.bfloat16] == torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_a_convolution_of_floats_by_hand():
    """1.001 is 1 in bfloat16 and 3 x 1 + 2 is 5; in float32 it would be 5.003, which bfloat16 has not either."""
    x, filters = torch.tensor([[[[1.001]]]]), torch.full((1, 1, 1, 1), 3.0)
    assert in_float32(torch.conv2d, x, filters, torch.tensor([2.0]), torch.bfloat16).item() == 5.0
    assert in_float32(torch.conv2d, x, filters, torch.tensor([2.0]), torch.float32).item() == pytest.approx(5.003)


# --- in detectors


def test_every_convolution_becomes_its_fast_form_and_no_other_module():
    class Own(nn.Conv2d):
        """Somebody's own: it may do what it likes."""

    net = nn.Sequential(
        nn.Conv2d(1, 1, 1), nn.Sequential(nn.ConvTranspose2d(1, 1, 1)), Own(1, 1, 1), nn.Conv1d(1, 1, 1)
    )
    names = list(net.state_dict())
    use_fast_convolutions(net)
    assert [type(m) for m in net] == [FastConv2d, nn.Sequential, Own, nn.Conv1d]
    assert type(net[1][0]) is FastConvTranspose2d
    assert list(net.state_dict()) == names


@EVERY_NETWORK
def test_no_convolution_of_a_detector_is_left(name):
    kinds = {type(m) for m in small(name).modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)}
    assert kinds <= {FastConv2d, FastConvTranspose2d}


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("name", ["retinanet", "fcos", "ssd300", "dssd320", "refinedet320"])
def test_detectors_multiply_in_float32_throughout(name, widened):
    detector = small(name).eval()
    images = torch.rand(1, 3, 128, 128)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = detector.predict(images).logits
    assert set(widened) == {torch.float32}
    widened.clear()
    with torch.no_grad():
        ready = detector.optimize_for_inference(precision="bf16")
        again = ready.predict(images).logits
    assert set(widened) <= {torch.float32}  # packed convolutions go past torch.nn
    assert again.dtype == torch.bfloat16
    with torch.no_grad(), kernels.disable():
        wanted = detector.predict(images).logits
    for logits in (found, again):
        assert_close(logits.float(), wanted, rtol=0.1, atol=max(ZOO[name].half, 0.15))


@pytest.mark.usefixtures("without")
def test_packed_weights_are_float32_and_follow_the_weights():
    ready = get_model("retinanet", num_classes=3, backbone="tiny").optimize_for_inference(precision="bf16")
    conv = ready.head.outputs["logits"]
    x = torch.randn(1, conv.in_channels, 6, 6).bfloat16().to(memory_format=torch.channels_last)
    first = conv(x)
    assert {value.dtype for value in conv._packed[1].values()} == {torch.float32}
    conv.weight.mul_(2)
    conv.bias.zero_()
    assert_close(conv(x).double(), truth(conv, x, torch.bfloat16), rtol=2**-8, atol=1e-6)
    assert not conv(x).equal(first)


@pytest.mark.compile
@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("is_autocast", [True, False], ids=["autocast", "weights"])
def test_compiled_it_is_one_graph_with_the_same_numbers(is_autocast):
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2))
    use_fast_convolutions(net)
    x = torch.randn(1, 8, 6, 6)
    net, x = (net, x) if is_autocast else (net.bfloat16(), x.bfloat16())
    x.requires_grad_()
    results = []
    for form in (net, torch.compile(net, fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            made = form(x)
        assert made.dtype == torch.bfloat16
        results.append((made, *torch.autograd.grad(made.float().square().sum(), [x, *net.parameters()])))
    for mine, other in zip(*results, strict=True):
        assert mine.dtype == other.dtype
        # the compiler leaves out roundings to a type and back, and then a ReLU may fall the other way
        assert (mine - other).float().norm() < 0.1 * mine.float().norm()
