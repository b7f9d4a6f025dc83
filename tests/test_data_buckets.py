from collections import Counter
from itertools import pairwise

import pytest
import torch
from torchvision import tv_tensors

from detcore.data.batch import collate
from detcore.data.buckets import Buckets, size_buckets, smallest_canvas
from detcore.data.loader import make_loader
from detcore.data.sampling import EpochSampler
from detcore.data.transforms import ResizeShortSide, retinanet_transform


class Shapes:
    """Grey pictures of given sizes, a box each."""

    name, classes, category_ids, skipped = "shapes", ("thing",), (1,), ()

    def __init__(self, sizes):
        self.sizes = sizes
        self.image_ids = tuple(range(len(sizes)))

    def __len__(self):
        return len(self.sizes)

    def target(self, index):
        height, width = self.sizes[index]
        boxes = torch.tensor([[0.0, 0.0, width / 2, height / 2]])
        labels, size = torch.zeros(1, dtype=torch.int64), torch.tensor([height, width])
        return {"boxes": boxes, "labels": labels, "image_id": index, "original_size": size}

    def __getitem__(self, index):
        return torch.full((3, *self.sizes[index]), 9, dtype=torch.uint8), self.target(index)


LYING, LONG, STANDING = (48, 64), (40, 80), (64, 48)


def pixels(image, target):
    """RetinaNet's resize of a plain tensor and plain boxes."""
    size = list(ResizeShortSide(48, 80).size(*image.shape[-2:]))
    resized = torch.nn.functional.interpolate(image[None].float(), size)[0].byte()
    scale = torch.tensor([size[1] / image.shape[2], size[0] / image.shape[1]]).repeat(2)
    return resized, {**target, "boxes": target["boxes"] * scale}


def test_canvases_of_retinanet_on_coco_and_on_voc():
    coco = size_buckets(Shapes([(480, 640), (640, 480), (427, 640), (640, 360)]), 800, 1333)
    # 640 x 480 becomes 1066.7 x 800, 640 x 427 becomes 1199 x 800, 360 x 640 becomes 749.8 x 1333
    assert coco.canvases == ((800, 1088), (800, 1344), (1088, 800), (1344, 800))
    assert coco.groups.tolist() == [0, 2, 1, 3]
    voc = size_buckets(Shapes([(375, 500), (500, 333), (100, 500)]), 600, 1000, multiple=128)
    assert voc.canvases == ((640, 896), (640, 1024), (896, 640), (1024, 640))
    assert voc.groups.tolist() == [0, 3, 1]


def test_canvases_coincide_where_the_long_side_is_short():
    buckets = size_buckets(Shapes([(10, 10), (10, 30)]), 64, 64)
    assert buckets.canvases == ((64, 64),)
    assert buckets.groups.tolist() == [0, 0]


@pytest.mark.parametrize(("short", "long"), [(800, 1333), (600, 1000), (64, 70), (50, 400)])
def test_every_picture_fits_its_canvas_and_none_that_is_smaller(short, long):
    sizes = [(height, width) for height in range(20, 700, 61) for width in range(20, 700, 53)]
    buckets = size_buckets(Shapes(sizes), short, long)
    for size, group in zip(sizes, buckets.groups.tolist(), strict=True):
        height, width = ResizeShortSide(short, long).size(*size)
        fitting = [h * w for h, w in buckets.canvases if h >= height and w >= width]
        assert buckets.canvases[group][0] * buckets.canvases[group][1] == min(fitting)
        assert buckets.canvases[group][0] >= height
        assert buckets.canvases[group][1] >= width


def test_no_canvas_for_what_is_too_large():
    assert smallest_canvas(torch.tensor([[33, 10], [32, 32]]), [(32, 32), (32, 64)]).tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("canvases", "groups", "message"),
    [
        ((), [0], "canvases must hold at least one"),
        (((32, 32),), [0, 1], r"groups must be in \[0, 1\), one canvas each; got 1"),
        (((32, 32),), [-1], "got -1"),
    ],
)
def test_buckets_reject_groups_without_a_canvas(canvases, groups, message):
    with pytest.raises(ValueError, match=message):
        Buckets(canvases, torch.tensor(groups))


# --- batches


def test_collate_takes_the_smallest_canvas_that_holds_all():
    samples = [Shapes([(20, 30), (32, 10)])[i] for i in range(2)]
    for canvases, size in (
        ([(64, 64), (32, 64), (64, 32)], (32, 64)),
        ([(16, 64)], (32, 32)),  # too low: as without
        ([], (32, 32)),
    ):
        batch = collate(samples, canvases=canvases)
        assert batch.images.shape[-2:] == size
        assert batch.sizes.tolist() == [[20, 30], [32, 10]]
        inside = [(image == 9).all(0).sum().item() for image in batch.images]
        assert inside == [600, 320]


def test_batches_hold_one_canvas_each():
    data = Shapes([LYING] * 9 + [LONG] * 5 + [STANDING] * 7)
    buckets = size_buckets(data, 48, 80, multiple=16)
    loader = make_loader(data, pixels, batch_size=4, shuffle=True, seed=1, multiple=16, buckets=buckets)
    shapes = Counter(tuple(batch.images.shape) for batch in loader)
    # 2 + 1 + 1 full batches of their like, then 1 + 1 + 3 left: a mixed batch and a single picture
    assert shapes[4, 3, 48, 64] == 2
    assert shapes[4, 3, 48, 80] == 1
    assert shapes[4, 3, 64, 48] == 1
    assert sum(shapes.values()) == len(loader) == 6


def test_pictures_of_a_batch_without_buckets_differ():
    data = Shapes([LYING, STANDING] * 4)
    [batch, _] = make_loader(data, pixels, batch_size=4, shuffle=False, multiple=16)
    assert tuple(batch.images.shape) == (4, 3, 64, 64)


def test_buckets_and_retinanets_own_resize_agree():
    data = Shapes([(375, 500), (500, 375)])
    buckets = size_buckets(data, 60, 100)
    for index, group in enumerate(buckets.groups.tolist()):
        image, target = data[index]
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=data.sizes[index])
        resized = retinanet_transform(60, 100, train=False)(tv_tensors.Image(image), {**target, "boxes": boxes})
        assert collate([resized], canvases=buckets.canvases).images.shape[-2:] == buckets.canvases[group]


# --- the sampler's groups


def batches(sampler):
    return [[index for _, index in batch] for batch in sampler]


@pytest.mark.parametrize("drop_last", [False, True])
def test_groups_share_batches_and_every_sample_comes(drop_last):
    groups = [i % 3 for i in range(31)]  # 11, 10, 10
    sampler = EpochSampler(31, batch_size=4, shuffle=True, seed=0, drop_last=drop_last, groups=groups)
    seen: Counter = Counter()
    for epoch in range(40):
        sampler.set_epoch(epoch)
        made = batches(sampler)
        assert len(made) == len(sampler) == (7 if drop_last else 8)
        assert sum(len({groups[i] for i in batch}) == 1 for batch in made) >= 6
        counted = Counter(index for batch in made for index in batch)
        assert set(counted.values()) == {1}
        seen += counted
    assert set(seen) == set(range(31))  # even one whose group fills no batch
    assert sum(seen.values()) == 40 * (28 if drop_last else 31)


def test_groups_without_shuffling_keep_the_order_within_each():
    sampler = EpochSampler(9, batch_size=2, shuffle=False, seed=0, groups=[1, 0, 1, 0, 1, 0, 0, 1, 1])
    assert batches(sampler) == [[1, 3], [5, 6], [0, 2], [4, 7], [8]]


def test_batches_of_groups_come_in_random_order():
    sampler = EpochSampler(200, batch_size=4, shuffle=True, seed=0, groups=[0] * 100 + [1] * 100)
    kinds = [batch[0] >= 100 for batch in batches(sampler)]
    assert 10 < sum(a != b for a, b in pairwise(kinds)) < 40


def test_one_group_changes_nothing():
    options = {"batch_size": 4, "shuffle": True, "seed": 3}
    assert batches(EpochSampler(30, **options, groups=[7] * 30)) == batches(EpochSampler(30, **options))


def test_ranks_share_batches_of_groups():
    groups = [i % 4 == 0 for i in range(50)]
    whole = batches(EpochSampler(50, batch_size=8, shuffle=True, seed=2, groups=groups, drop_last=True))
    shares = [
        batches(
            EpochSampler(50, batch_size=4, shuffle=True, seed=2, rank=r, world_size=2, groups=groups, drop_last=True)
        )
        for r in range(2)
    ]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole


def test_sampler_goes_on_within_groups_and_refuses_others():
    groups = [i % 3 for i in range(30)]
    make = lambda: EpochSampler(30, batch_size=4, shuffle=True, seed=2, groups=groups)  # noqa: E731
    sampler = make()
    sampler.set_epoch(2)
    whole = batches(sampler)
    resumed = make()
    resumed.load_state_dict({**sampler.state_dict(), "position": 3})
    assert batches(resumed) == whole[3:]
    old = {name: value for name, value in sampler.state_dict().items() if name != "num_groups"}
    EpochSampler(30, batch_size=4, shuffle=True, seed=2).load_state_dict(old)  # of before there were groups
    with pytest.raises(ValueError, match="num_groups must be 3, as in the interrupted run; got 1"):
        EpochSampler(30, batch_size=4, shuffle=True, seed=2).load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match="groups must be one number a sample, 30; got 2"):
        EpochSampler(30, batch_size=4, shuffle=True, seed=2, groups=[0, 1])
