import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionGenerator
from torchvision.models.detection.image_list import ImageList

from detcore.boxes import area
from detcore.priors import AnchorGenerator, CachedPriors, PointGenerator, PriorGenerator
from tests import reference
from tests.samples import FAST, no_hook

STRIDES = (8, 16, 32, 64, 128)
SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
RATIOS = (0.5, 1.0, 2.0)
STYLES = ("exact", "mmdet0", "torchvision")
LOOPS = {"exact": reference.anchors, "mmdet0": reference.inclusive_anchors}


def maps_of(height, width):
    return [(-(-height // s), -(-width // s)) for s in STRIDES]


def features_of(maps):
    return [torch.zeros(1, 2, *size) for size in maps]


def torchvision_anchors(maps, height, width):
    sides = tuple((s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in (32, 64, 128, 256, 512))
    theirs = TorchvisionGenerator(sides, (RATIOS,) * 5)
    return theirs(ImageList(torch.zeros(1, 3, height, width), [(height, width)]), features_of(maps))[0]


@pytest.mark.parametrize(
    ("height", "width", "maps", "locations"),
    [
        (320, 320, [(40, 40), (20, 20), (10, 10), (5, 5), (3, 3)], 2134),
        (608, 1024, [(76, 128), (38, 64), (19, 32), (10, 16), (5, 8)], 12968),
    ],
)
def test_anchor_generator_counts(height, width, maps, locations):
    assert maps_of(height, width) == maps
    priors = AnchorGenerator()(features_of(maps), (height, width))
    assert priors.boxes.shape == (1, 9 * locations, 4)
    assert priors.counts == tuple(9 * h * w for h, w in maps)
    assert priors.level.bincount().tolist() == list(priors.counts)


@pytest.mark.parametrize("style", LOOPS)
def test_anchor_generator_equals_its_loop(style):
    maps = maps_of(96, 224)
    found = AnchorGenerator(style=style)(features_of(maps), (96, 224)).boxes[0]
    expected = LOOPS[style](STRIDES, maps, scales=SCALES, ratios=RATIOS)
    assert_close(found.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(320, 320), (608, 1024), (96, 224)])
def test_anchor_generator_equals_torchvision(size):
    maps = maps_of(*size)
    found = AnchorGenerator(style="torchvision")(features_of(maps), size).boxes[0]
    assert_close(found, torchvision_anchors(maps, *size), rtol=0, atol=0)


def test_anchor_styles_differ_on_these_maps():
    maps = maps_of(320, 320)
    boxes = [AnchorGenerator(style=style)(features_of(maps), (320, 320)).boxes for style in STYLES]
    for a, b in itertools.combinations(boxes, 2):
        assert (a - b).abs().max() > 100 * 1e-4


def test_torchvision_stride_comes_from_integer_division():
    # 320 // 3 = 106 on P7, where the true stride is 128
    maps = maps_of(320, 320)
    priors = AnchorGenerator(style="torchvision")(features_of(maps), (320, 320))
    first, second = priors.boxes[0, -81], priors.boxes[0, -72]
    assert (second - first).tolist() == [106.0, 0.0, 106.0, 0.0]


def test_anchors_of_a_cell_have_exact_ratio_area_and_order():
    boxes = AnchorGenerator()(features_of(maps_of(128, 128)), (128, 128)).boxes[0, :9].double()
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    # index = ratio * 3 + scale; side 32 * 2^(j/3) on P3
    assert_close(height / width, torch.tensor(RATIOS).double().repeat_interleave(3), rtol=1e-6, atol=0)
    assert_close(area(boxes), torch.tensor([(32 * s) ** 2 for s in SCALES] * 3).double(), rtol=1e-6, atol=0)
    assert_close((boxes[:, :2] + boxes[:, 2:]) / 2, torch.zeros(9, 2).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("style", ["exact", "mmdet0"])
def test_anchors_translate_by_the_stride(style):
    maps = maps_of(160, 96)
    priors = AnchorGenerator(style=style)(features_of(maps), (160, 96))
    for boxes, (height, width), stride in zip(priors.boxes[0].split(priors.counts), maps, STRIDES, strict=True):
        grid = boxes.view(height, width, 9, 4)
        to_right = torch.tensor([1.0, 0.0, 1.0, 0.0]) * stride
        assert_close(grid[:, 1:] - grid[:, :-1], to_right.expand(height, width - 1, 9, 4), rtol=0, atol=1e-4)
        down = torch.tensor([0.0, 1.0, 0.0, 1.0]) * stride
        assert_close(grid[1:] - grid[:-1], down.expand(height - 1, width, 9, 4), rtol=0, atol=1e-4)


@FAST
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.5, 8), st.sampled_from(["exact", "mmdet0"]))
def test_anchors_of_a_smaller_picture_are_those_of_a_larger_one(height, width, base, style):
    generator = AnchorGenerator([16], SCALES, RATIOS, base=base, style=style)
    large = generator([torch.zeros(1, 1, 20, 20)], (320, 320)).boxes.view(20, 20, 9, 4)
    small = generator([torch.zeros(1, 1, height, width)], (height * 16, width * 16)).boxes.view(height, width, 9, 4)
    assert_close(small, large[:height, :width], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_anchors_stay_float32_when_the_model_is_narrowed(dtype):
    generator = AnchorGenerator()
    expected = generator(features_of(maps_of(64, 64)), (64, 64)).boxes
    narrowed = generator.to(dtype)
    found = narrowed([f.to(dtype) for f in features_of(maps_of(64, 64))], (64, 64)).boxes
    assert found.dtype == torch.float32
    assert_close(found, expected, rtol=0, atol=0)


def test_anchors_follow_the_model_and_stay_out_of_its_state():
    generator = AnchorGenerator()
    assert not generator.state_dict()
    assert isinstance(generator, PriorGenerator)
    assert generator.to("meta").get_buffer("cell0").device.type == "meta"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": ()}, r"strides must be positive numbers; got \(\)"),
        ({"scales": (1.0, 0.0)}, r"scales must be positive numbers; got \(1.0, 0.0\)"),
        ({"ratios": (-1.0,)}, "ratios must be positive"),
        ({"base": 0.0}, r"base must be positive numbers; got \[0.0\]"),
        ({"style": "detectron"}, "style must be one of .*exact.*; got 'detectron'"),
    ],
)
def test_anchor_generator_names_what_is_wrong(options, message):
    with no_hook(), pytest.raises(ValueError, match=message):
        AnchorGenerator(**options)


def test_anchor_generator_wants_a_map_a_stride():
    with pytest.raises(ValueError, match="features must be 5 maps, one a stride; got 2"):
        AnchorGenerator()(features_of([(4, 4), (2, 2)]), (32, 32))


# --- points


def test_point_generator_equals_its_loop():
    maps = maps_of(96, 224)
    priors = PointGenerator()(features_of(maps), (96, 224))
    assert_close(priors.boxes[0].double(), reference.points(STRIDES, maps), rtol=0, atol=0)
    assert priors.counts == tuple(h * w for h, w in maps)
    centre = (priors.boxes[0, :, :2] + priors.boxes[0, :, 2:]) / 2
    half = torch.tensor([4.0, 8, 16, 32, 64]).repeat_interleave(torch.tensor(priors.counts))
    assert_close(centre - priors.cells, half[:, None].expand(-1, 2), rtol=0, atol=0)


def test_point_of_an_odd_stride_is_rounded_down():
    boxes = PointGenerator([5])([torch.zeros(1, 1, 1, 2)], (5, 10)).boxes[0]
    assert_close((boxes[:, :2] + boxes[:, 2:]) / 2, torch.tensor([[2.0, 2.0], [7.0, 2.0]]))


@pytest.mark.parametrize("size", [(320, 320), (608, 1024), (96, 224)])
def test_point_generator_equals_torchvision(size):
    maps = maps_of(*size)
    theirs = TorchvisionGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5)
    expected = theirs(ImageList(torch.zeros(1, 3, *size), [size]), features_of(maps))[0]
    found = PointGenerator(style="torchvision")(features_of(maps), size)
    assert_close(found.boxes[0], expected, rtol=0, atol=0)
    assert (PointGenerator()(features_of(maps), size).boxes[0] - expected).abs().max() >= 4


def test_points_stay_float32_when_the_model_is_narrowed():
    maps = features_of(maps_of(608, 64))
    narrowed = PointGenerator().bfloat16()([f.bfloat16() for f in maps], (608, 64))
    assert narrowed.boxes.dtype == torch.float32
    assert_close(narrowed.boxes, PointGenerator()(maps, (608, 64)).boxes, rtol=0, atol=0)
    assert isinstance(PointGenerator(), PriorGenerator)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strides": ()}, r"strides must be positive numbers; got \(\)"),
        ({"strides": (8, 0)}, r"strides must be positive numbers; got \(8, 0\)"),
        ({"style": "exact"}, 'style must be "half" or "torchvision"; got .exact'),
    ],
)
def test_point_generator_names_what_is_wrong(options, message):
    with no_hook(), pytest.raises(ValueError, match=message):
        PointGenerator(**options)


def test_point_generator_wants_a_map_a_stride():
    with pytest.raises(ValueError, match="features must be 5 maps, one a stride; got 2"):
        PointGenerator()(features_of([(4, 4), (2, 2)]), (32, 32))


# --- remembered priors


def test_cached_priors_are_those_of_the_generator():
    generator = AnchorGenerator([8, 16])
    cached = CachedPriors(generator)
    shapes = [([4, 4], [2, 2], (32, 32)), ([4, 6], [2, 3], (32, 48)), ([4, 4], [2, 2], (32, 30))]
    for _ in range(2):
        for fine, coarse, size in shapes:
            maps = [torch.zeros(1, 2, *fine), torch.zeros(1, 2, *coarse)]
            assert cached(maps, size).boxes.equal(generator(maps, size).boxes)
            assert cached(maps, size) is cached(maps, size)
    assert len(cached.known) == 3
    assert cached.num_priors == 9
    with pytest.raises(AttributeError, match="nothing"):
        _ = cached.nothing


def test_cached_priors_forget_the_oldest():
    cached = CachedPriors(AnchorGenerator([8]))
    for width in range(40):
        cached([torch.zeros(1, 2, 1, width + 1)], (8, 8 * width + 8))
    assert len(cached.known) == 16
    assert [shape[1] for (shape, _), _ in cached.known][-1] == 40


def test_priors_cached_in_inference_mode_serve_gradients_later():
    cached, maps = CachedPriors(AnchorGenerator([8])), [torch.zeros(1, 2, 2, 2)]
    with torch.inference_mode():
        cached(maps, (16, 16))
    x = torch.ones(1, requires_grad=True)
    (cached(maps, (16, 16)).boxes * x).sum().backward()
    assert x.grad.isfinite().all()


def test_copies_of_cached_priors_start_empty():
    cached, maps = CachedPriors(AnchorGenerator([8])), [torch.zeros(1, 2, 2, 2)]
    priors = cached(maps, (16, 16))
    twin = copy.deepcopy(cached)
    assert (len(cached.known), len(twin.known)) == (1, 0)
    assert twin(maps, (16, 16)).boxes.equal(priors.boxes)
