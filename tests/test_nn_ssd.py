import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torchvision.models.detection.ssd import SSDHead
from torchvision.models.vgg import VGG, cfgs, make_layers

from detcore.coders import DeltaCoder
from detcore.nn import TinyTrunk
from detcore.nn.deconvolution import (
    DeconvolutionModule,
    DeconvolutionPyramid,
    ResidualBlock,
    StageShape,
    UpShape,
    group_norm,
)
from detcore.nn.dilated import DilatedResNetTrunk
from detcore.nn.level_head import LevelHead, flatten_map
from detcore.nn.pyramids import ExtraShape, L2Norm, SSDPyramid, convolution, extra_layers, halving_extras
from detcore.nn.vgg import VGGTrunk
from detcore.structures import Priors
from tests.samples import no_hook


def count(module):
    return sum(p.numel() for p in module.parameters())


def shapes(maps):
    return [tuple(m.shape[1:]) for m in maps]


# --- VGG


@pytest.mark.parametrize(
    ("stride", "side", "expected"),
    [
        (16, 300, [(512, 38, 38), (1024, 19, 19)]),  # 75 rounds up to 38
        (16, 512, [(512, 64, 64), (1024, 32, 32)]),
        (32, 320, [(512, 40, 40), (512, 20, 20), (1024, 10, 10)]),
        (32, 512, [(512, 64, 64), (512, 32, 32), (1024, 16, 16)]),
    ],
)
def test_vgg_maps(stride, side, expected):
    with torch.device("meta"):
        trunk = VGGTrunk(stride=stride)
        maps = trunk(torch.zeros(1, 3, side, side))
    assert shapes(maps) == expected
    assert trunk.channels == tuple(channels for channels, _, _ in expected)


def test_vgg_parameters():
    # thirteen convolutions of VGG-16: 14 714 688; fc6 512 * 1024 * 9 + 1024, fc7 1024 * 1024 + 1024
    with torch.device("meta"):
        plain, normed = VGGTrunk(), VGGTrunk("vgg16_bn")
    assert count(plain) == 14_714_688 + 4_719_616 + 1_049_600
    assert count(normed) == count(plain) + 2 * (4224 + 2048)  # a scale and a shift a channel
    assert sum(isinstance(m, nn.BatchNorm2d) for m in normed.modules()) == 15


def empty_trunk(name="vgg16", **options):
    """A trunk whose weights are still to come: drawing twenty million takes long."""
    with torch.device("meta"):
        trunk = VGGTrunk(name, **options)
    return trunk.to_empty(device="cpu")


@functools.cache
def torchvision_vgg(batch_norm=False):
    """Real convolutions; fc6 and fc7 hold their own row numbers, without the memory of 120 million weights."""
    torch.manual_seed(0)
    features = make_layers(cfgs["D"], batch_norm=batch_norm)
    with torch.device("meta"):
        net = VGG(nn.Identity(), init_weights=False)
    net.features = features
    for layer, inside in ((net.classifier[0], 25088), (net.classifier[3], 4096)):
        rows = torch.arange(4096.0)
        layer.weight = nn.Parameter(rows[:, None].expand(4096, inside))
        layer.bias = nn.Parameter(rows)
    return net


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_vgg_equals_torchvision_up_to_conv5(name):
    net = torchvision_vgg(name == "vgg16_bn").eval()
    trunk = empty_trunk(name, stride=32).eval()
    for norm in (m for m in trunk.fc if isinstance(m, nn.BatchNorm2d)):
        norm.reset_parameters()
    trunk.copy_from(net)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        conv4, conv5, fc7 = trunk(images)
        x, pooled = images, []
        for layer in net.features:
            pooled += [x] if isinstance(layer, nn.MaxPool2d) else []
            x = layer(x)
    assert_close(conv4, pooled[3], rtol=1e-5, atol=1e-5)
    assert_close(conv5, pooled[4], rtol=1e-5, atol=1e-5)
    assert fc7.shape == (1, 1024, 1, 1)


def test_vgg_thins_out_the_classifier():
    # row numbers: output o of ours is output 4 o of theirs
    trunk = empty_trunk()
    trunk.copy_from(torchvision_vgg())
    fc6, fc7 = trunk.fc[0], trunk.fc[2]
    fourth = torch.arange(0.0, 4096.0, 4.0)
    assert fc6.bias.equal(fourth)
    assert fc7.bias.equal(fourth)
    assert fc6.weight.equal(fourth[:, None, None, None].expand(1024, 512, 3, 3))
    assert fc7.weight.equal(fourth[:, None, None, None].expand(1024, 1024, 1, 1))


def test_vgg_keeps_every_third_row_and_column_of_fc6(monkeypatch):
    net = torchvision_vgg()
    columns = torch.arange(25088.0)  # channel * 49 + row * 7 + column
    changed = {"0.weight": columns.expand(4096, 25088), "3.weight": torch.arange(4096.0).expand(4096, 4096)}
    for name, value in changed.items():
        monkeypatch.setitem(net.classifier[int(name[0])]._parameters, "weight", nn.Parameter(value))
    trunk = empty_trunk()
    trunk.copy_from(net)
    kept = torch.tensor([[0.0, 3, 6], [21, 24, 27], [42, 45, 48]])
    assert trunk.fc[0].weight[7, 0].equal(kept)
    assert trunk.fc[0].weight[7, 511].equal(kept + 511 * 49)
    assert trunk.fc[2].weight[9, :, 0, 0].equal(torch.arange(0.0, 4096.0, 4.0))


def test_vgg_loads_imagenet_weights_by_name(monkeypatch):
    asked = []

    monkeypatch.setattr(nn.init, "kaiming_normal_", lambda weight, **_: weight)

    def no_download(weights=None):
        asked.append(weights)
        return torchvision_vgg()

    monkeypatch.setattr("torchvision.models.vgg16", no_download)
    trunk = VGGTrunk(weights="DEFAULT")
    assert asked == ["DEFAULT"]
    assert trunk.blocks[0][0].weight.equal(torchvision_vgg().features[0].weight)


def test_vgg_refuses_weights_without_a_classifier(monkeypatch):
    net = torchvision_vgg()
    nothing = torch.tensor(torch.nan).expand(4096, 25088)
    monkeypatch.setitem(net.classifier[0]._parameters, "weight", nn.Parameter(nothing))
    with pytest.raises(ValueError, match=r"net must have a classifier.*Use IMAGENET1K_V1"):
        empty_trunk().copy_from(net)


def test_random_vgg_neither_fades_nor_explodes():
    trunk = VGGTrunk().train()
    with torch.no_grad():
        maps = trunk(torch.randn(2, 3, 32, 32))
    assert all(0.1 < m.std() < 10 for m in maps)


# --- layers


def test_l2_norm_by_hand():
    # (3, 4) has length 5, (0, 0) stays; weights 10 and 20
    norm = L2Norm(2, 10.0)
    with torch.no_grad():
        norm.weight[1] = 20.0
    x = torch.tensor([[3.0, 0.0], [4.0, 0.0]]).view(1, 2, 1, 2).requires_grad_()
    found = norm(x)
    assert_close(found[0, :, 0], torch.tensor([[6.0, 0.0], [16.0, 0.0]]))
    found.sum().backward()
    assert x.grad.isfinite().all()
    assert norm.weight.grad.tolist() == [pytest.approx(0.6), pytest.approx(0.8)]


def test_l2_norm_keeps_its_type_and_its_range():
    norm = L2Norm(512, 20.0).half()
    found = norm(torch.full((1, 512, 1, 1), 200.0).half())  # the sum of squares, 2e7, is no half
    assert found.dtype == torch.float16
    assert_close(found.float(), torch.full((1, 512, 1, 1), 20 / 512**0.5), rtol=1e-2, atol=0)


def test_extra_layers_are_pairs_of_convolutions():
    layers = extra_layers(8, [ExtraShape(4, 6), ExtraShape(3, 5, 3, 1, 0)])
    x = torch.randn(1, 8, 9, 9)
    first, second = (m for m in layers[0].modules() if isinstance(m, nn.Conv2d))
    expected = F.relu(F.conv2d(F.relu(F.conv2d(x, first.weight)), second.weight, stride=2, padding=1))
    assert_close(layers[0](x), expected)
    assert layers[1](layers[0](x)).shape == (1, 5, 3, 3)
    assert first.bias.eq(0).all()


@pytest.mark.parametrize("side", [1, 2, 3])
def test_halving_convolution_on_small_maps_is_the_plain_one(side):
    layer, x = convolution(3, 4, 3, 2, 1), torch.randn(2, 3, side, side)
    conv = next(m for m in layer if isinstance(m, nn.Conv2d))
    assert_close(layer(x), F.relu(F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1)))


@pytest.mark.parametrize(
    ("side", "expected"),
    [(64, [8, 4, 2, 1, 1, 1]), (96, [12, 6, 3, 2, 1, 1]), (128, [16, 8, 4, 2, 1, 1]), (320, [40, 20, 10, 5, 3, 2])],
)
def test_pyramid_on_a_small_trunk_takes_any_picture(side, expected):
    with torch.device("meta"):
        body = SSDPyramid(TinyTrunk(), halving_extras(32, 3), {0: 20.0})
        maps = body(torch.zeros(1, 3, side, side))
    assert [m.shape[-1] for m in maps] == expected
    assert tuple(m.shape[1] for m in maps) == body.channels


def test_pyramid_normalises_the_source_but_not_what_the_extras_see():
    trunk = TinyTrunk((4, 4, 4, 4, 4)).eval()
    plain = SSDPyramid(trunk, halving_extras(4, 1))
    normed = SSDPyramid(trunk, halving_extras(4, 1), {0: 20.0, 2: 3.0})
    normed.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    a, b = plain(images), normed(images)
    assert_close(b[0].norm(dim=1), torch.where(a[0].norm(dim=1) > 0, 20.0, 0.0), rtol=1e-4, atol=1e-4)
    assert b[1].equal(a[1])
    assert (b[2] - a[2]).abs().max() > 0.1
    assert b[3].equal(a[3])


# --- DSSD's parts


@pytest.mark.parametrize(
    ("pool", "side", "expected"),
    [
        ("torchvision", 320, [40, 20]),
        ("torchvision", 512, [64, 32]),
        ("torchvision", 321, [41, 21]),
        ("torchvision", 513, [65, 33]),
        ("caffe", 321, [40, 20]),
        ("caffe", 513, [64, 32]),
    ],
)
def test_dilated_resnet_maps(pool, side, expected):
    with torch.device("meta"):
        trunk = DilatedResNetTrunk("resnet50", pool=pool)
        maps = trunk(torch.zeros(2, 3, side, side))
    assert [m.shape[-1] for m in maps] == expected
    assert tuple(m.shape[1] for m in maps) == trunk.channels == (512, 2048)
    assert {m.dilation for m in trunk.layer4.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)} == {
        (1, 1),  # of the first block, whose input is not dilated yet
        (2, 2),
    }


def test_dilated_resnet_norm_follows_its_weights():
    with torch.device("meta"):
        norms = {norm: type(DilatedResNetTrunk("resnet50", norm=norm).stem[1]).__name__ for norm in ("fixed", "batch")}
        assert type(DilatedResNetTrunk("resnet50").stem[1]).__name__ == "BatchNorm2d"
    assert norms == {"fixed": "FixedBatchNorm2d", "batch": "BatchNorm2d"}


def test_residual_block_by_hand():
    block = ResidualBlock(6, 8, StageShape(2, 2), norm=lambda _: nn.Identity())
    x = torch.randn(1, 6, 4, 4)
    first, second, third = (m.weight for m in block.main if isinstance(m, nn.Conv2d))
    assert [tuple(w.shape) for w in (first, second, third)] == [(2, 6, 2, 2), (2, 2, 3, 3), (8, 2, 1, 1)]
    main = F.conv2d(F.relu(F.conv2d(F.relu(F.conv2d(x, first, stride=2)), second, padding=1)), third)
    assert_close(block(x), F.relu(main + F.conv2d(x, block.shortcut[0].weight, stride=2)))


def test_residual_stage_trains_in_half_precision_on_maps_one_pixel_wide():
    # freed memory full of NaN, which oneDNN reads unless the map is widened: see test_fpn_trains_on_maps_one_pixel_wide
    block = ResidualBlock(64, 64, StageShape(3, 2, 1), norm=group_norm)
    x = torch.randn(16, 64, 1, 1)
    for _ in range(10):
        waste = [torch.full((n,), float("nan")) for n in (9 * 64 * 16, 9 * 64 * 64, 100_000)]
        del waste
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            result = block(x)
        result.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in block.parameters())
    assert_close(block(x), torch.relu(block.main(x) + block.shortcut(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("merge", "combine"), [("product", torch.mul), ("sum", torch.add)])
def test_deconvolution_module_by_hand(merge, combine):
    module = DeconvolutionModule(3, 2, 4, UpShape(2, 2), merge=merge, norm=lambda _: nn.Identity())
    coarse, fine = torch.randn(1, 3, 2, 2), torch.randn(1, 2, 3, 3)
    enlarged = module.up(coarse)
    assert enlarged.shape == (1, 4, 4, 4)
    left = F.conv2d(enlarged[..., :3, :3], module.coarse[0].weight, padding=1)
    one, two = (m.weight for m in module.fine if isinstance(m, nn.Conv2d))
    right = F.conv2d(F.relu(F.conv2d(fine, one, padding=1)), two, padding=1)
    assert_close(module(coarse, fine), F.relu(combine(left, right)))


@pytest.mark.parametrize("side", [64, 96, 128])
def test_deconvolution_pyramid_on_a_small_trunk_takes_any_picture(side):
    body = DeconvolutionPyramid(
        TinyTrunk((4, 4, 4, 4, 4)), [StageShape(3, 2, 1)] * 3, [UpShape()] * 5, 8, norm=group_norm
    )
    one = body.train()(torch.randn(1, 3, side, side))  # one cell of one picture, in training
    assert [m.shape[1:] for m in one] == [(8, s, s) for s in (side // 8, side // 16, side // 32, -(-side // 64), 1, 1)]


# --- head


def some_features(channels, sides, batch=2):
    return [torch.randn(batch, c, s, s) for c, s in zip(channels, sides, strict=True)]


def boxes_for(features, per_cell):
    counts = tuple(n * f.shape[-1] * f.shape[-2] for f, n in zip(features, per_cell, strict=True))
    corner = torch.rand(1, sum(counts), 2) * 50
    return Priors(torch.cat([corner, corner + 10], dim=-1), counts)


def test_level_head_equals_torchvision():
    channels, per_cell, classes = [8, 12, 6], [4, 6, 4], 5
    theirs = SSDHead(channels, per_cell, classes)
    ours = LevelHead(channels, per_cell, classes, DeltaCoder())
    for i in range(3):
        ours.outputs["logits"][i].load_state_dict(theirs.classification_head.module_list[i].state_dict())
        ours.outputs["deltas"][i].load_state_dict(theirs.regression_head.module_list[i].state_dict())
    features = some_features(channels, [5, 3, 1])
    expected, found = theirs(features), ours(features, boxes_for(features, per_cell))
    assert_close(found.logits, expected["cls_logits"])
    assert_close(found.deltas, expected["bbox_regression"])
    assert_close(found.boxes, DeltaCoder().decode(found.deltas, found.priors.boxes.expand(2, -1, -1)))


def test_flatten_map_follows_the_order_of_the_priors():
    # value = 1000 prior + 100 component + 10 y + x
    y, x = torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")
    maps = torch.stack([1000 * p + 100 * c + 10 * y + x for p in range(2) for c in range(4)])[None].float()
    flat = flatten_map(maps, 2)
    assert flat.shape == (1, 12, 4)
    assert flat[0, 2 * (1 * 3 + 2) + 1].tolist() == [1012, 1112, 1212, 1312]  # y 1, x 2, prior 1


def test_level_head_has_kernels_and_extras():
    head = LevelHead([4, 8], [2, 3], 5, DeltaCoder(), kernels=[5, 3], extras={"quality": 2})
    assert [conv.kernel_size for conv in head.outputs["deltas"]] == [(5, 5), (3, 3)]
    features = some_features([4, 8], [4, 2])
    pred = head(features, boxes_for(features, [2, 3]))
    assert pred.extras["quality"].shape == (2, 2 * 16 + 3 * 4, 2)
    assert all(conv.bias.eq(0).all() for convs in head.outputs.values() for conv in convs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VGGTrunk("vgg19"), 'name must be "vgg16" or "vgg16_bn"; got .vgg19'),
        (lambda: VGGTrunk(stride=8), "stride must be 16 or 32; got 8"),
        (
            lambda: empty_trunk().copy_from(torchvision_vgg(batch_norm=True)),
            "net must be torchvision's vgg16; got other",
        ),
        (lambda: DilatedResNetTrunk("resnet18"), 'name must be "resnet50" or "resnet101"; got .resnet18'),
        (lambda: DilatedResNetTrunk("resnet50", norm="group"), 'norm must be "fixed" or "batch"; got .group'),
        (lambda: DilatedResNetTrunk("resnet50", pool="max"), 'pool must be "torchvision" or "caffe"; got .max'),
        (lambda: DeconvolutionModule(2, 2, 2, merge="max"), 'merge must be "product" or "sum"; got .max'),
        (lambda: LevelHead([4], [2, 3], 5, DeltaCoder()), r"must have one value a level; got \(4,\), \(2, 3\) and"),
        (lambda: LevelHead([4], [2], 5, DeltaCoder(), kernels=[3, 3]), "must have one value a level"),
        (lambda: LevelHead([4], [2], 5, DeltaCoder(), extras={"deltas": 1}), "extras must have names of their own"),
    ],
)
def test_ssd_parts_name_what_is_wrong(call, message):
    with no_hook(), pytest.raises(ValueError, match=message):
        call()
