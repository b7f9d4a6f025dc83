"""A detector made ready to detect finds what the original finds, and the original notices nothing."""

import copy
import time

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torchvision.models.resnet import BasicBlock, Bottleneck

from detcore import inference, kernels
from detcore.inference import SIZES_KEPT, PackedConv2d, best_precision, fold_batch_norm
from detcore.kernels import halves, winograd
from detcore.kernels.winograd import winograd_weights
from detcore.models import get_model
from detcore.nn import FixedBatchNorm2d
from detcore.nn.convolution import FastConv2d
from detcore.structures import to_dicts
from tests.samples import no_hook
from tests.test_models import redraw
from tests.zoo import EVERY_NETWORK, ZOO, small

SIZES = torch.tensor([[128, 128], [100, 90]])


def lived(module):
    """Statistics and scales as after training, not the zeros and ones of a new batch norm."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.1)
    return module


def trained(name):
    return redraw(lived(small(name)))


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


@EVERY_NETWORK
def test_ready_detector_predicts_as_the_original(name):
    detector = trained(name).eval()
    ready = detector.optimize_for_inference(precision="fp32")
    images = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        wanted, found = detector.predict(images), ready.predict(images)
    assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    assert_close(found.boxes, wanted.boxes, rtol=1e-4, atol=1e-2)
    assert found.priors.counts == wanted.priors.counts
    for extra, value in wanted.extras.items():
        assert_close(found.extras[extra], value, rtol=1e-4, atol=1e-2 if extra == "arm_priors" else 1e-4)
    left = {"fssd300": 1, "fssd512": 1}  # it follows a concatenation, no convolution
    assert len(norms(ready)) == left.get(name, 0)
    assert not any(p.requires_grad for p in ready.parameters())
    assert not ready.training


@EVERY_NETWORK
def test_original_stays_as_it_was(name):
    detector = trained(name).train()
    state, modes = copy.deepcopy(detector.state_dict()), [m.training for m in detector.modules()]
    needs = [p.requires_grad for p in detector.parameters()]
    ready = detector.optimize_for_inference(precision="bf16")
    ready.detect(torch.rand(1, 3, 128, 128), SIZES[:1])
    assert [m.training for m in detector.modules()] == modes
    assert [p.requires_grad for p in detector.parameters()] == needs
    assert set(detector.state_dict()) == set(state)
    for key, value in detector.state_dict().items():
        assert value.equal(state[key]), key
        assert value.dtype == state[key].dtype
        assert value.stride() == state[key].stride(), key


@EVERY_NETWORK
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batch_equals_its_pictures_one_by_one(name, precision):
    ready = trained(name).optimize_for_inference(precision=precision)
    images = torch.rand(2, 3, 128, 128)
    together = ready.predict(images)
    for i in range(2):
        alone = ready.predict(images[i : i + 1])
        rounding = 1e-4 if precision == "fp32" else ZOO[name].half
        assert_close(alone.logits[0], together.logits[i], rtol=rounding, atol=rounding)


@pytest.mark.parametrize("name", ["retinanet", "iou_aware_fcos", "ssd300", "refinedet320"])
def test_ready_detector_detects_as_the_original(name):
    detector = trained(name).eval()
    images = torch.rand(2, 3, 128, 128)
    wanted, found = (
        detector.detect(images, SIZES),
        detector.optimize_for_inference(precision="fp32").detect(images, SIZES),
    )
    assert wanted.valid.any(1).all()
    assert_close(found.scores, wanted.scores, rtol=1e-3, atol=1e-4)
    same = (found.labels == wanted.labels) & (found.prior == wanted.prior)
    assert same.float().mean() > 0.95  # neighbours of nearly the same score may swap


@EVERY_NETWORK
def test_bfloat16_detector_predicts_about_the_same(name):
    detector = trained(name).eval()
    ready = detector.optimize_for_inference(precision="bf16")
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    with torch.no_grad():
        wanted, found = detector.predict(images), ready.predict(images)
    assert found.logits.dtype == torch.bfloat16
    assert found.boxes.dtype == torch.float32
    assert_close(found.logits.float(), wanted.logits, rtol=0.1, atol=max(ZOO[name].half, 0.15))
    assert ready.priors(*maps_of(ready, images)).boxes.equal(detector.priors(*maps_of(detector, images)).boxes)
    assert len(to_dicts(ready.detect(images, SIZES))) == 2


def maps_of(detector, images):
    features = detector.body(detector.inputs(images))
    return features[0] if isinstance(features, tuple) else features, tuple(images.shape[-2:])


def test_pictures_come_through_the_other_door_too():
    detector = trained("retinanet").eval()
    pictures = [torch.rand(3, 90, 70), torch.rand(3, 60, 100)]
    wanted, found = detector(pictures), detector.optimize_for_inference(precision="fp32")(pictures)
    for mine, other in zip(found, wanted, strict=True):
        assert_close(mine["scores"], other["scores"], rtol=1e-3, atol=1e-4)


def test_auto_is_the_best_precision_of_the_device(monkeypatch):
    for has_amx, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has_amx: {"amx_bf16": has}, raising=False)
        ready = small("retinanet").optimize_for_inference()
        assert {p.dtype for p in ready.parameters()} == {dtype}
        assert best_precision("cpu") == {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def test_weights_lie_channels_last():
    ready = small("retinanet").optimize_for_inference(precision="fp32")
    weights = [m.weight for m in ready.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_making_it_ready_twice_changes_nothing_more():
    once = trained("retinanet").optimize_for_inference(precision="fp32")
    twice = once.optimize_for_inference(precision="fp32")
    images = torch.rand(1, 3, 64, 64)
    assert twice.predict(images).logits.equal(once.predict(images).logits)


# --- folding


@pytest.mark.parametrize(
    "block",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, groups=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, groups=3), FixedBatchNorm2d(6)),
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 2, stride=2), nn.BatchNorm2d(4)),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)),
        lambda: BasicBlock(3, 3),
        lambda: Bottleneck(3, 3, downsample=nn.Sequential(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12))),
    ],
    ids=["plain", "groups", "transposed", "without scale", "basic block", "bottleneck"],
)
def test_folded_block_computes_the_same(block):
    block = block().double().eval()
    for norm in norms(block):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 3.0)
    x = torch.randn(2, 3, 8, 8).double()
    wanted = block(x)
    fold_batch_norm(block)
    assert not norms(block)
    assert_close(block(x), wanted, rtol=1e-9, atol=1e-9)


def test_pairs_that_others_use_or_watch_stay():
    conv = nn.Conv2d(3, 3, 1)
    shared = nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(3)), nn.Sequential(conv, nn.BatchNorm2d(3))).eval()
    watched = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    watched[0].register_forward_hook(lambda module, args, out: None)
    training = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train()
    apart = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)).eval()
    for block, left in ((shared, 2), (watched, 1), (training, 1), (apart, 1)):
        x, twin = torch.rand(1, 3, 4, 4), copy.deepcopy(block)
        wanted = twin(x)
        fold_batch_norm(block)
        assert len(norms(block)) == left
        assert_close(block(x), wanted, rtol=0, atol=0)


# --- packed weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["single", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"groups": 4}, {"groups": 8}, {"dilation": 2}, {"stride": 2}, {"padding": "same"}],
    ids=str,
)
def test_packed_convolution_computes_the_same(options, dtype):
    plain = nn.Conv2d(8, 16, 3, **{"padding": 1, **options}).requires_grad_(False)
    plain = plain.to(dtype, memory_format=torch.channels_last)
    packed = copy.deepcopy(plain)
    packed.__class__ = PackedConv2d
    for shape in ((2, 8, 9, 7), (1, 8, 3, 3), (0, 8, 5, 5)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            assert_close(packed(x), plain(x), rtol=tolerance, atol=tolerance)


def test_packed_weights_follow_the_weights():
    conv, x = PackedConv2d(8, 8, 3).requires_grad_(False), torch.randn(1, 8, 6, 6)
    first = conv(x)
    conv.weight.mul_(2)
    conv.bias.zero_()
    assert_close(conv(x), nn.Conv2d.forward(conv, x))
    assert not conv(x).equal(first)
    twin = copy.deepcopy(conv)
    assert twin._packed is None
    assert_close(twin.bfloat16()(x.bfloat16()), nn.Conv2d.forward(twin, x.bfloat16()))


@pytest.mark.parametrize("kernel", [1, 3])
def test_weights_are_packed_for_each_size_of_map(kernel):
    plain = nn.Conv2d(64, 96, kernel, padding=kernel // 2)
    packed = copy.deepcopy(plain)
    packed.__class__ = PackedConv2d
    with torch.no_grad():
        for side in (20, 5, 20):
            x = torch.randn(1, 64, side, side).to(memory_format=torch.channels_last)
            assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)
    assert [tuple(size) for size in packed._packed[1]] == [(1, 64, 5, 5), (1, 64, 20, 20)]  # the last one used is last


def test_weights_packed_for_long_ago_are_forgotten():
    packed = PackedConv2d(4, 4, 3, padding=1).requires_grad_(False)
    for width in range(1, SIZES_KEPT + 3):
        packed(torch.randn(1, 4, 1, width))
    assert [size[-1] for size in packed._packed[1]] == list(range(3, SIZES_KEPT + 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["single", "bfloat16"])
def test_no_size_of_map_falls_off_the_fast_path(dtype):
    # with weights in one order for all sizes, 36 and 720 outputs took 5 to 200 ms on small maps instead of 0.05 to 1
    for outputs in (36, 720):
        plain = nn.Conv2d(256, outputs, 3, padding=1).to(dtype, memory_format=torch.channels_last)
        packed = copy.deepcopy(plain)
        packed.__class__ = PackedConv2d
        for side in (2, 5, 16):
            x = torch.randn(1, 256, side, side).to(dtype, memory_format=torch.channels_last)
            with torch.no_grad():
                ours, theirs = fastest(packed, x), fastest(plain, x)
            assert ours <= 3 * theirs + 1e-3, f"{outputs} outputs, {side} x {side}: {ours:.2g} s, plain {theirs:.2g} s"


def fastest(module: nn.Module, x: torch.Tensor) -> float:
    times = []
    for _ in range(7):
        start = time.perf_counter()
        module(x)
        times.append(time.perf_counter() - start)
    return min(times)


def test_packed_convolution_leaves_gradients_and_autocast_to_the_plain_one():
    conv, x = PackedConv2d(8, 8, 3), torch.randn(1, 8, 6, 6)
    conv(x).sum().backward()
    assert conv.weight.grad.abs().sum() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16


def test_weights_are_packed_on_processors():
    ready = small("retinanet").optimize_for_inference(precision="fp32")
    ready.predict(torch.rand(1, 3, 64, 64))
    assert all(m._packed is not None for m in ready.modules() if isinstance(m, nn.Conv2d))


# --- what it refuses


def parametrized():
    detector = small("retinanet")
    parametrizations.weight_norm(detector.head.outputs["logits"])
    return detector


def compiled():
    detector = small("retinanet")
    detector.predict = torch.compile(detector.predict, backend="eager")
    return detector


def without_statistics():
    detector = small("retinanet")
    detector.body[0].stem[1] = nn.BatchNorm2d(16, track_running_stats=False)
    return detector


def on_meta():
    with torch.device("meta"):
        return get_model("retinanet", num_classes=3, backbone="tiny")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small("retinanet").bfloat16(), r"weights must be float32 and in memory; got .* in bfloat16"),
        (on_meta, "weights must be float32 and in memory; got .* in the meta device"),
        (parametrized, r"must not be parametrized; got head.outputs.logits. See remove_parametrizations"),
        (compiled, "must not be compiled; got one whose predict is. Compile the result"),
        (without_statistics, r"must have running statistics; got body.0.stem.1 without"),
    ],
)
def test_a_detector_it_cannot_handle_is_refused(make, message):
    with pytest.raises(ValueError, match=f"optimize_for_inference: .*{message}"):
        make().optimize_for_inference()


def test_an_unknown_precision_is_refused():
    with no_hook(), pytest.raises(ValueError, match=r'"fp32" or "bf16"; got .fp8'):
        small("retinanet").optimize_for_inference(precision="fp8")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str)
def test_weights_for_winograds_way_are_kept_and_follow_the_weights(dtype, tolerance, monkeypatch):
    monkeypatch.setitem(winograd.HAS, dtype, True)
    monkeypatch.setitem(halves.HAS, dtype, True)
    conv = FastConv2d(256, 256, 3, padding=1).requires_grad_(False).to(dtype)
    ready = PackedConv2d(256, 256, 3, padding=1).requires_grad_(False).to(dtype)
    ready.load_state_dict(conv.state_dict())
    x = torch.randn(1, 256, 40, 40, dtype=dtype).to(memory_format=torch.channels_last)
    made = []
    monkeypatch.setattr(inference, "winograd_weights", lambda *args: made.append(args) or winograd_weights(*args))
    for _ in range(2):
        for _ in range(2):
            wanted = nn.Conv2d.forward(conv, x)
            assert_close(ready(x), wanted, rtol=0.0, atol=tolerance)
        for part in (conv, ready):
            part.weight.mul_(-0.5)
    assert len(made) == 2
    with torch.autocast("cpu", torch.bfloat16), kernels.disable():
        assert_close(ready(x), nn.Conv2d.forward(conv, x))
    assert len(made) == 2


@pytest.mark.compile
def test_compiled_for_inference_it_is_one_graph(monkeypatch):
    monkeypatch.setitem(winograd.HAS, torch.float32, True)
    ready = PackedConv2d(128, 128, 3, padding=1).requires_grad_(False)
    x = torch.randn(1, 128, 40, 40).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_close(torch.compile(ready, fullgraph=True)(x), ready(x), rtol=1e-4, atol=1e-4)
