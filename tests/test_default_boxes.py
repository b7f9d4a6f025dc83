import math

import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator as TorchvisionGenerator
from torchvision.models.detection.image_list import ImageList

from detcore.boxes import area, xyxy_to_cxcywh
from detcore.default_boxes import LAYOUTS, DefaultBoxGenerator, DefaultBoxLayout
from detcore.priors import PriorGenerator
from tests.samples import no_hook

COUNTS = {
    "ssd300_voc": (5776, 2166, 600, 150, 36, 4),
    "ssd300_coco": (5776, 2166, 600, 150, 36, 4),
    "ssd512_voc": (16384, 6144, 1536, 384, 96, 16, 4),
    "ssd512_coco": (16384, 6144, 1536, 384, 96, 16, 4),
    "fssd300_voc": (5776, 2166, 600, 150, 36, 4),
    "fssd300_coco": (5776, 2166, 600, 150, 36, 4),
    "fssd512_voc": (16384, 6144, 1536, 384, 96, 16, 4),
    "fssd512_coco": (16384, 6144, 1536, 384, 96, 16, 4),
    "dssd320": (12800, 3200, 800, 200, 72, 8),
    "dssd321": (12800, 3200, 800, 200, 72, 8),
    "dssd512": (32768, 8192, 2048, 512, 128, 32, 8),
    "dssd513": (32768, 8192, 2048, 512, 128, 32, 8),
    "refinedet320": (4800, 1200, 300, 75),
    "refinedet512": (12288, 3072, 768, 192),
}
TOTALS = {"ssd300": 8732, "ssd512": 24564, "fssd300": 8732, "fssd512": 24564, "dssd320": 17080, "dssd321": 17080}
TOTALS |= {"dssd512": 43688, "dssd513": 43688, "refinedet320": 6375, "refinedet512": 16320}
EVERY_LAYOUT = pytest.mark.parametrize("name", sorted(LAYOUTS))


def features_of(maps):
    return [torch.zeros(1, 2, height, width) for height, width in maps]


def centre_size(boxes):
    return xyxy_to_cxcywh(boxes).unbind(-1)


def default_boxes_one_by_one(layout, clip):
    """The slow twin: corners in pixels, as a student would write it from section 2.2 of SSD."""
    size, rows = layout.size, []
    following = [*layout.sides[1:], layout.last_side]
    for k, side in enumerate(layout.maps):
        step = layout.steps[k] if layout.steps else size / side
        m = layout.sides[k]
        shapes = [(m, m)]
        if layout.last_side:
            shapes.append((math.sqrt(m * following[k]),) * 2)
        for r in layout.ratios[k]:
            shapes += [(m * math.sqrt(r), m / math.sqrt(r)), (m / math.sqrt(r), m * math.sqrt(r))]
        for i in range(side):
            for j in range(side):
                for wide, high in shapes:
                    x, y, w, h = (j + 0.5) * step, (i + 0.5) * step, wide, high
                    if clip == "cxcywh":
                        x, y = min(x, size), min(y, size)
                    if clip in ("cxcywh", "sizes"):
                        w, h = min(w, size), min(h, size)
                    box = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
                    rows.append([min(max(v, 0.0), size) for v in box] if clip == "corners" else box)
    return torch.tensor(rows, dtype=torch.float64)


def own_maps(name):
    return [(side, side) for side in LAYOUTS[name].maps]


def boxes_of(name, **options):
    size = LAYOUTS[name].size
    return DefaultBoxGenerator(LAYOUTS[name], **options)(features_of(own_maps(name)), (size, size)).boxes[0]


@EVERY_LAYOUT
def test_default_boxes_have_the_published_counts(name):
    layout = LAYOUTS[name]
    priors = DefaultBoxGenerator(layout)(features_of(own_maps(name)), (layout.size, layout.size))
    assert priors.counts == COUNTS[name]
    assert priors.boxes.shape == (1, TOTALS[name.partition("_")[0]], 4)
    assert layout.total == TOTALS[name.partition("_")[0]]
    assert priors.cells.shape == (layout.total, 2)


def test_every_layout_is_counted():
    assert set(COUNTS) == set(LAYOUTS)


# sums over all boxes, as shares of the picture; RefineDet's centres tile it, so their sum is 6375 / 2
@pytest.mark.parametrize(
    ("name", "centres", "sides"),
    [("ssd300_voc", 4443.946666, 1510.429284), ("refinedet320", 3187.5, 936.396103)],
)
def test_default_boxes_have_the_published_checksums(name, centres, sides):
    size = LAYOUTS[name].size
    x, y, w, h = centre_size(boxes_of(name).double() / size)
    for found, expected in ((x, centres), (y, centres), (w, sides), (h, sides)):
        assert_close(found.sum().item(), expected, rtol=0, atol=2e-3)


def test_default_boxes_of_a_cell_by_hand():
    # SSD300-VOC, level 1: m = 60, M = 111, ratios 2 and 3; cell (2, 0) of step 16 is centred on (40, 8)
    cell = boxes_of("ssd300_voc")[5776 + 12 : 5776 + 18].double()
    x, y, w, h = centre_size(cell)
    assert_close(x, torch.full((6,), 40.0).double(), rtol=0, atol=1e-4)
    assert_close(y, torch.full((6,), 8.0).double(), rtol=0, atol=1e-4)
    wide = [60, 81.6088, 84.8528, 42.4264, 103.9230, 34.6410]  # 60, sqrt(60 * 111), 60 * sqrt 2, 60 / sqrt 2, ...
    high = [60, 81.6088, 42.4264, 84.8528, 34.6410, 103.9230]
    assert_close(w, torch.tensor(wide).double(), rtol=0, atol=1e-3)
    assert_close(h, torch.tensor(high).double(), rtol=0, atol=1e-3)


def test_refinedet_has_no_second_square_and_dssd_one_everywhere():
    assert LAYOUTS["refinedet320"].shapes(1)[0] == (64.0, 64.0)
    assert len(LAYOUTS["refinedet320"].shapes(1)) == 3
    # .92 * 320 = 294.4 and the last 1.10 * 320 = 352: sqrt(294.4 * 352) = 321.9135
    assert_close(LAYOUTS["dssd320"].shapes(5)[1], (321.9135, 321.9135), rtol=0, atol=1e-3)
    assert_close(LAYOUTS["dssd320"].shapes(0)[2], (32 * 1.6**0.5, 32 / 1.6**0.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "clip"),
    [(n, c) for n in ("ssd300_voc", "fssd300_coco", "refinedet320") for c in (None, "cxcywh", "corners", "sizes")]
    + [(n, None) for n in ("ssd512_voc", "dssd320", "dssd513", "refinedet512")],
)
def test_default_box_generator_equals_its_loop(name, clip):
    expected = default_boxes_one_by_one(LAYOUTS[name], clip)
    assert_close(boxes_of(name, clip=clip).double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("steps", [True, False])
@pytest.mark.parametrize(("name", "side"), [("ssd300_coco", 300), ("ssd512_coco", 512)])
def test_default_box_generator_equals_torchvision(name, side, steps):
    layout = LAYOUTS[name if steps else f"f{name}"]
    ratios = [[int(r) for r in level] for level in layout.ratios]
    scales = [s / side for s in (*layout.sides, layout.last_side)]
    theirs = TorchvisionGenerator(ratios, scales=scales, steps=list(layout.steps) if steps else None, clip=True)
    features = features_of(own_maps(name))
    expected = theirs(ImageList(torch.zeros(1, 3, side, side), [(side, side)]), features)[0]
    found = DefaultBoxGenerator(layout, clip="sizes")(features, (side, side)).boxes[0]
    assert_close(found, expected, rtol=0, atol=2e-4)
    unclipped = DefaultBoxGenerator(layout)(features, (side, side)).boxes[0]
    assert (unclipped - expected).abs().max() > 10  # the clip matters on this layout


def test_clipping_moves_as_many_boxes_as_it_was_counted_to():
    plain, clipped = boxes_of("ssd300_voc"), boxes_of("ssd300_voc", clip="cxcywh")
    assert int((plain - clipped).abs().amax(-1).gt(1e-3).sum()) == 134
    plain, clipped = boxes_of("ssd300_coco"), boxes_of("ssd300_coco", clip="cxcywh")
    assert int((plain - clipped).abs().amax(-1).gt(1e-3).sum()) == 116
    corners = boxes_of("ssd300_voc", clip="corners")
    assert corners.min() == 0
    assert corners.max() == 300
    assert area(corners).min() > 0


def test_published_steps_leave_the_picture_and_quotients_do_not():
    ssd, fssd = (centre_size(boxes_of(name))[0] for name in ("ssd300_voc", "fssd300_voc"))
    assert ssd.max() == 9.5 * 32  # 304: the last centre of the 10 x 10 map
    assert fssd.max() < 300
    assert_close(boxes_of("ssd512_voc"), boxes_of("fssd512_voc"), rtol=0, atol=1e-4)  # 512 has no such quirk


def test_default_boxes_scale_with_the_picture():
    generator = DefaultBoxGenerator(LAYOUTS["ssd300_voc"])
    maps = [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1), (1, 1)]
    priors = generator(features_of(maps), (96, 128))
    assert priors.counts == tuple(n * h * w for n, (h, w) in zip((4, 6, 6, 6, 4, 4), maps, strict=True))
    first, last = priors.boxes[0, 0], priors.boxes[0, -4]
    # 30 / 300 of 128 and of 96 around (4, 4); 264 / 300 around the middle
    assert_close(first, torch.tensor([4 - 6.4, 4 - 4.8, 4 + 6.4, 4 + 4.8]), rtol=0, atol=1e-4)
    assert_close(last, torch.tensor([64 - 56.32, 48 - 42.24, 64 + 56.32, 48 + 42.24]), rtol=0, atol=1e-4)
    x, y, _, _ = centre_size(priors.boxes[0])
    assert x.max() < 128
    assert y.max() < 96


def test_cells_begin_half_a_step_before_their_centres():
    priors = DefaultBoxGenerator(LAYOUTS["ssd300_voc"])(features_of(own_maps("ssd300_voc")), (300, 300))
    x, y, _, _ = centre_size(priors.boxes[0])
    step = torch.tensor((8.0, 16, 32, 64, 100, 300))[priors.level]
    assert_close(priors.cells, torch.stack([x - step / 2, y - step / 2], dim=-1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_default_boxes_stay_float32_and_out_of_the_state(dtype):
    generator = DefaultBoxGenerator(LAYOUTS["refinedet320"])
    features = features_of(own_maps("refinedet320"))
    expected = generator(features, (320, 320)).boxes
    narrowed = generator.to(dtype)
    assert narrowed([f.to(dtype) for f in features], (320, 320)).boxes.equal(expected)
    assert expected.dtype == torch.float32
    assert not generator.state_dict()
    assert isinstance(generator, PriorGenerator)
    assert generator.to("meta").get_buffer("shares0").device.type == "meta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sides": (30.0,)}, r"sides must be 2 values, one a level; got \(30.0,\)"),
        ({"steps": (8,)}, "steps must be 2 values"),
        ({"ratios": ()}, "ratios must be 2 values"),
        ({"maps": (), "sides": (), "ratios": ()}, "maps must be 0 values, one a level"),
        ({"sides": (30.0, 0.0)}, "all numbers must be > 0; got DefaultBoxLayout"),
        ({"last_side": -1.0}, "all numbers must be > 0"),
        ({"ratios": ((2.0,), (-2.0,))}, "all numbers must be > 0"),
    ],
)
def test_layouts_name_what_is_wrong(change, message):
    sound = {"size": 300, "maps": (4, 2), "sides": (30.0, 60.0), "last_side": None, "ratios": ((2.0,), (2.0,))}
    with no_hook(), pytest.raises(ValueError, match=message):
        DefaultBoxLayout(**{**sound, **change})


def test_default_box_generator_names_what_is_wrong():
    with no_hook(), pytest.raises(ValueError, match=r"clip must be None, .*; got 'box'"):
        DefaultBoxGenerator(LAYOUTS["ssd300_voc"], clip="box")
    with pytest.raises(ValueError, match="features must be 6 maps, one a level; got 2"):
        DefaultBoxGenerator(LAYOUTS["ssd300_voc"])(features_of([(4, 4), (2, 2)]), (32, 32))
