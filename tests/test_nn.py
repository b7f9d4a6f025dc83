import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.testing import assert_close
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detcore.coders import DeltaCoder
from detcore.nn import FPN, DenseHead, FixedBatchNorm2d, ImageInput, ResNetTrunk, TinyTrunk, build_trunk
from detcore.nn.layers import init_conv, prior_probability_bias
from detcore.priors import AnchorGenerator
from tests.samples import no_hook


def count(module, *, trainable=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


# --- trunks


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_trunk_widths_are_those_of_its_maps(name):
    with torch.device("meta"):
        trunk = ResNetTrunk(name)
        maps = trunk(torch.zeros(1, 3, 64, 96))
    assert trunk.channels == ((512, 1024, 2048) if name in ("resnet50", "resnet101") else (128, 256, 512))
    assert [tuple(m.shape) for m in maps] == [
        (1, c, 64 // s, 96 // s) for c, s in zip(trunk.channels, (8, 16, 32), strict=True)
    ]


def test_trunk_equals_torchvision_resnet():
    theirs = torchvision.models.resnet18(weights=None).eval()
    trunk = ResNetTrunk("resnet18").eval()
    pairs = {"stem.0": theirs.conv1, "stem.1": theirs.bn1}
    for name, module in pairs.items():
        trunk.get_submodule(name).load_state_dict(module.state_dict())
    for i in (1, 2, 3, 4):
        trunk.get_submodule(f"layer{i}").load_state_dict(theirs.get_submodule(f"layer{i}").state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        c5 = trunk(images)[-1]
        assert_close(theirs.fc(c5.mean((2, 3))), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("stages", "learning"),
    [(5, "stem layer1 layer2 layer3 layer4"), (3, "layer2 layer3 layer4"), (1, "layer4"), (0, "")],
)
def test_trainable_stages_counts_from_the_top(stages, learning):
    with torch.device("meta"):
        trunk = ResNetTrunk("resnet18", trainable_stages=stages)
    found = {name for name, child in trunk.named_children() if all(p.requires_grad for p in child.parameters())}
    frozen = {name for name, child in trunk.named_children() if not any(p.requires_grad for p in child.parameters())}
    assert found == set(learning.split())
    assert found | frozen == {"stem", "layer1", "layer2", "layer3", "layer4"}


def test_fixed_batch_norm_stays_as_it_is():
    layer = FixedBatchNorm2d(3)
    layer.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    layer.running_var.copy_(torch.tensor([4.0, 9.0, 16.0]))
    nn.Sequential(layer).train()
    x = torch.randn(2, 3, 4, 4)
    expected = (x - layer.running_mean[:, None, None]) / (layer.running_var + layer.eps).sqrt()[:, None, None]
    assert_close(layer(x), expected)
    assert layer.running_mean.tolist() == [1.0, 2.0, 3.0]
    assert layer.weight.requires_grad


@pytest.mark.parametrize(("norm", "moves"), [("fixed", False), ("batch", True)])
def test_norm_decides_whose_statistics_count(norm, moves):
    trunk = ResNetTrunk("resnet18", norm=norm).train()
    before = trunk.stem[1].running_mean.clone()
    trunk(torch.randn(2, 3, 64, 64))
    assert (not trunk.stem[1].running_mean.equal(before)) == moves


def test_tiny_trunk():
    maps = TinyTrunk()(torch.zeros(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, 64, 8, 12), (2, 96, 4, 6), (2, 128, 2, 3)]


def test_build_trunk_takes_a_trunk_of_your_own():
    class Mine(nn.Module):
        channels = (4, 5, 6)

    mine = Mine()
    assert build_trunk(mine) is mine


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ResNetTrunk("resnet19"), "name must be one of resnet18, .*; got 'resnet19'"),
        (lambda: ResNetTrunk("resnet18", norm="group"), 'norm must be "fixed" or "batch"; got .group'),
        (lambda: ResNetTrunk("resnet18", trainable_stages=6), "trainable_stages must be 0 to 5; got 6"),
        (lambda: TinyTrunk((1, 2)), r"widths must be five numbers, strides 2 to 32; got \(1, 2\)"),
        (lambda: build_trunk("vgg16"), "backbone must be one of .*tiny; got 'vgg16'"),
        (lambda: build_trunk("tiny", norm="fixed"), 'norm do not apply to "tiny"'),
        (lambda: build_trunk(nn.Identity()), "backbone Identity must have a tuple `channels`"),
        (
            lambda: build_trunk(TinyTrunk(), weights="DEFAULT"),
            "weights_backbone only apply to a backbone given by name",
        ),
        (lambda: FPN([1, 2]), r"in_channels must be the widths of C3, C4, C5; got \(1, 2\)"),
        (lambda: FPN([1, 2, 3], 4, p6="c4"), 'p6 must be "c5" or "p5"; got .c4'),
        (lambda: prior_probability_bias(1.0), r"probability must be in \(0, 1\); got 1.0"),
        (lambda: ImageInput(warp_side=0), "warp_side must be >= 1 and come without short_side; got 0 and None"),
        (lambda: ImageInput(short_side=5, long_side=9, warp_side=7), "warp_side must .*; got 7 and 5"),
        (lambda: ImageInput(short_side=5), "give both short_side and long_side, or none; got 5, None"),
        (lambda: DenseHead(4, 1, 2, DeltaCoder(), box_extras={"deltas": 1}), "extras must have names of their own"),
        (lambda: DenseHead(4, 1, 2, DeltaCoder(), class_extras={"q": 1}, box_extras={"q": 1}), "names of their own"),
        (lambda: DenseHead(4, 1, 2, DeltaCoder(), depth=-1), "depth must be >= 0; got -1"),
    ],
)
def test_parts_name_what_is_wrong(call, message):
    with no_hook(), pytest.raises(ValueError, match=message):
        call()


# --- neck


SIZES = [(12, 20), (6, 10), (3, 5)]


def neck_and_maps(**options):
    neck = FPN([4, 6, 8], 5, **options)
    for p in neck.parameters():
        nn.init.normal_(p, std=0.5)
    return neck, [torch.randn(2, c, *size) for c, size in zip((4, 6, 8), SIZES, strict=True)]


@pytest.mark.parametrize("p6", ["c5", "p5"])
@pytest.mark.parametrize("relu", [False, True])
def test_fpn_step_by_step(p6, relu):
    neck, maps = neck_and_maps(p6=p6, relu_before_p7=relu)
    m3, m4, m5 = (F.conv2d(x, conv.weight, conv.bias) for conv, x in zip(neck.laterals, maps, strict=True))

    def larger(small, like):  # nearest: floor(i * small / large)
        rows = torch.arange(like.shape[2]) * small.shape[2] // like.shape[2]
        columns = torch.arange(like.shape[3]) * small.shape[3] // like.shape[3]
        return small[:, :, rows][..., columns]

    m4 = m4 + larger(m5, m4)
    m3 = m3 + larger(m4, m3)
    p3, p4, p5 = (F.conv2d(m, c.weight, c.bias, padding=1) for m, c in zip((m3, m4, m5), neck.outputs, strict=True))
    sixth = F.conv2d(maps[2] if p6 == "c5" else p5, neck.p6.weight, neck.p6.bias, stride=2, padding=1)
    seventh = F.conv2d(sixth.relu() if relu else sixth, neck.p7.weight, neck.p7.bias, stride=2, padding=1)
    for found, expected in zip(neck(maps), [p3, p4, p5, sixth, seventh], strict=True):
        assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_fpn_variants_differ():
    torch.manual_seed(0)
    neck, maps = neck_and_maps(p6="p5")
    plain = neck(maps)[-1]
    neck.relu_before_p7 = True
    assert (neck(maps)[-1] - plain).abs().max() > 100 * 1e-5


def test_fpn_joins_maps_of_odd_sizes():
    neck = FPN([4, 6, 8], 5)
    maps = [torch.zeros(1, c, *size) for c, size in [(4, (75, 41)), (6, (38, 21)), (8, (19, 11))]]
    assert [tuple(p.shape[-2:]) for p in neck(maps)] == [(75, 41), (38, 21), (19, 11), (10, 6), (5, 3)]


# --- head


def test_head_parameter_counts():
    with torch.device("meta"):
        head = DenseHead(256, 9, 80, DeltaCoder(), box_extras={"iou": 1})
    assert count(head.class_tower[0]) == 590_080
    assert count(head.class_tower) == count(head.box_tower) == 4 * 590_080
    counts = {name: count(conv) for name, conv in head.outputs.items()}
    assert counts == {"logits": 1_659_600, "deltas": 82_980, "iou": 20_745}


def test_head_starts_small_and_sceptical():
    head = DenseHead(64, 9, 20, DeltaCoder(), box_extras={"iou": 1})
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            assert_close(module.weight.std().item(), 0.01, rtol=0.1, atol=0)
            assert module.bias.unique().tolist() == [0.0] or module is head.outputs["logits"]
    assert_close(head.outputs["logits"].bias, torch.full((180,), -math.log(99)))
    assert_close(prior_probability_bias(0.01), -math.log(99))


def test_head_flattens_y_x_prior_component():
    # 1x1 kernels in disguise: only the centre tap of each 3x3 output is set, to its channel number
    head = DenseHead(1, 2, 3, DeltaCoder(), depth=0, box_extras={"iou": 1})
    for conv in head.outputs.values():
        nn.init.zeros_(conv.weight)
        with torch.no_grad():
            conv.weight[:, 0, 1, 1] = torch.arange(len(conv.weight)).float()
            conv.bias.zero_()
    features = [1 + torch.arange(6.0).view(1, 1, 2, 3), 7 + torch.arange(2.0).view(1, 1, 1, 2)]
    anchors = AnchorGenerator([8, 16], [1.0], [1.0, 2.0])
    pred = head(features, anchors(features, (16, 24)))
    cells = torch.arange(1.0, 9.0)  # the pixel values in order of level, y, x
    channel = torch.arange(6.0).view(2, 3)  # prior, class
    assert_close(pred.logits[0], (cells[:, None, None] * channel).view(16, 3))
    assert_close(pred.deltas[0], (cells[:, None, None] * torch.arange(8.0).view(2, 4)).view(16, 4))
    assert_close(pred.extras["iou"][0], (cells[:, None, None] * torch.arange(2.0).view(2, 1)).view(16, 1))
    assert_close(pred.boxes, DeltaCoder().decode(pred.deltas, pred.priors.boxes))


@pytest.mark.parametrize("where", ["class", "box"])
def test_extra_output_hangs_on_the_tower_it_was_asked_for(where):
    head = DenseHead(4, 1, 2, DeltaCoder(), depth=1, **{f"{where}_extras": {"q": 1}})
    features = [torch.randn(1, 4, 4, 4)]
    pred = head(features, AnchorGenerator([8], [1.0], [1.0])(features, (32, 32)))
    pred.extras["q"].sum().backward()
    towers = {"class": head.class_tower, "box": head.box_tower}
    touched = {name for name, tower in towers.items() if tower[0].weight.grad is not None}
    assert touched == {where}


def test_init_conv_takes_a_convolution_without_bias():
    conv = init_conv(nn.Conv2d(8, 64, 3, bias=False), std=0.5)
    assert_close(conv.weight.std().item(), 0.5, rtol=0.1, atol=0)
    assert init_conv(nn.Conv2d(8, 4, 1), bias=2.0).bias.tolist() == [2.0] * 4


# --- pictures


def test_image_input_normalises_bytes_and_floats_alike():
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    door = ImageInput()
    assert_close(door(pixels), door(pixels.float() / 255), rtol=0, atol=1e-6)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for c in range(3):
        assert_close(door(pixels)[:, c], (pixels[:, c].float() / 255 - mean[c]) / std[c], rtol=0, atol=1e-5)


def test_image_input_pads_with_the_mean_colour():
    pictures = [torch.rand(3, 30, 50), torch.randint(0, 256, (3, 40, 20), dtype=torch.uint8)]
    door = ImageInput()
    batch = door.batch(pictures)
    assert batch.images.shape == (2, 3, 64, 64)
    assert batch.sizes.tolist() == [[30, 50], [40, 20]]
    assert batch.scales.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert_close(batch.images[0, :, :30, :50], pictures[0], rtol=0, atol=0)
    assert_close(batch.images[1, :, :40, :20], pictures[1].float() / 255, rtol=0, atol=0)
    normalised = door(batch.images)
    assert normalised[0, :, 30:].eq(0).all()
    assert normalised[1, :, :, 20:].eq(0).all()


@pytest.mark.parametrize("divisor", [32, 64])
def test_image_input_pads_no_more_than_it_must(divisor):
    batch = ImageInput(divisor=divisor).batch([torch.rand(3, 64, 65)])
    assert batch.images.shape[-2:] == (64, 96 if divisor == 32 else 128)


def test_image_input_resizes_as_torchvision_does():
    theirs = GeneralizedRCNNTransform(60, 100, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).eval()
    door = ImageInput(short_side=60, long_side=100)
    pictures = [
        torch.rand(3, h, w) for h, w in [(47, 61), (33, 90), (200, 60), (64, 64), (7, 333), (59, 60), (120, 200)]
    ]
    expected, _ = theirs(pictures)
    batch = door.batch(pictures)
    assert batch.sizes.tolist() == [list(size) for size in expected.image_sizes]
    # the padding as well; theirs resizes after normalising, which is the same up to rounding
    assert_close(door(batch.images), expected.tensors, rtol=0, atol=1e-5)
    for picture, (height, width), scale in zip(pictures, batch.sizes.tolist(), batch.scales.tolist(), strict=True):
        assert scale == pytest.approx([width / picture.shape[2], height / picture.shape[1]])
        assert max(height, width) <= 100
        assert min(height, width) in (59, 60) or max(height, width) in (99, 100)


def test_image_input_warps_as_torchvision_does():
    theirs = GeneralizedRCNNTransform(60, 60, [0.4, 0.5, 0.6], [0.2, 0.2, 0.3], size_divisible=1, fixed_size=(60, 60))
    door = ImageInput([0.4, 0.5, 0.6], [0.2, 0.2, 0.3], warp_side=60)
    pictures = [torch.rand(3, 47, 61), torch.rand(3, 120, 30), torch.randint(0, 256, (3, 60, 60), dtype=torch.uint8)]
    batch = door.batch(pictures)
    expected, _ = theirs.eval()([p.float() / 255 if p.dtype == torch.uint8 else p for p in pictures])
    assert_close(door(batch.images), expected.tensors, rtol=0, atol=1e-5)
    assert batch.sizes.tolist() == [[60, 60]] * 3
    assert_close(batch.scales, torch.tensor([[60 / 61, 60 / 47], [2.0, 0.5], [1.0, 1.0]]))


@pytest.mark.parametrize(
    ("pictures", "error", "message"),
    [
        ([], ValueError, "images must hold at least one picture; got none"),
        (
            [torch.rand(3, 4, 4), torch.rand(1, 4, 4)],
            ValueError,
            r"images\[1\] must have shape \(3, h, w\); got \(1, 4, 4\)",
        ),
        ([torch.rand(4, 4)], ValueError, r"got \(4, 4\)"),
        ([torch.rand(3, 0, 4)], ValueError, r"got \(3, 0, 4\)"),
        (
            [torch.zeros(3, 4, 4, dtype=torch.int64)],
            TypeError,
            r"images\[0\] must be uint8 .* or float .*; got torch.int64",
        ),
    ],
)
def test_image_input_names_what_is_wrong(pictures, error, message):
    with pytest.raises(error, match=message):
        ImageInput().batch(pictures)


def test_image_input_does_not_write_on_pictures():
    picture = torch.rand(3, 20, 20)
    before = picture.clone()
    ImageInput().batch([picture]).images.zero_()
    assert_close(picture, before, rtol=0, atol=0)


@pytest.mark.parametrize("size", [(1, 1), (4, 1), (1, 4)])
def test_fpn_trains_on_maps_one_pixel_wide(size):
    # Freed memory full of NaN: what oneDNN read there before the maps were widened (149 of 200 runs).
    torch.manual_seed(0)
    maps = [torch.randn(8, 32, size[0] * k, size[1] * k) for k in (4, 2, 1)]
    neck = FPN([32, 32, 32], 32).to(memory_format=torch.channels_last)
    for _ in range(10):
        waste = [torch.full((n,), float("nan")) for n in (9 * 32 * 32, 2 * 9 * 32 * 32, 100_000)]
        del waste
        neck.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            levels = neck([m.contiguous(memory_format=torch.channels_last) for m in maps])
        sum(level.float().sum() for level in levels).backward()
        assert all(p.grad.isfinite().all() for p in neck.parameters())


def test_fpn_widening_changes_no_value():
    torch.manual_seed(0)
    neck = FPN([4, 4, 4], 4).double()
    maps = [torch.randn(2, 4, s, s, dtype=torch.float64) for s in (4, 2, 1)]
    levels = neck(maps)
    assert_close(levels[3], neck.p6(maps[2]))
    assert_close(levels[4], neck.p7(neck.p6(maps[2])))
