from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from detcore.data.batch import PAD_COLOUR, Batch, collate
from detcore.data.colours import change_colours, draw_colours
from detcore.data.loader import (
    CachedDataset,
    CachedLoader,
    EpochSampler,
    Recoloured,
    TransformedDataset,
    make_loader,
)
from detcore.data.sampling import mix
from detcore.data.scenes import Scenes
from detcore.data.transforms import flip_transform, retinanet_transform, square_transform, ssd_transform
from detcore.structures import BACKGROUND

# Python 3.12 warns of forks in a process with threads; torch's loader forks in one that has torch's.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def scenes():
    return Scenes(22, size=64).make_all(progress=False)


def a_sample(height, width, boxes, image_id, **more):
    image = tv_tensors.Image(torch.full((3, height, width), image_id, dtype=torch.uint8))
    labels = torch.arange(len(boxes))
    return image, {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": labels, "image_id": image_id, **more}


def assert_same(batch, other):
    assert isinstance(batch, Batch)
    for name in ("images", "image_ids", "sizes", "original_sizes", "indices"):
        torch.testing.assert_close(getattr(batch, name), getattr(other, name), rtol=0, atol=0)
    # Caches pad to the most objects of the whole set, collate to those of the batch.
    for name in ("boxes", "labels"):
        for i in range(len(batch)):
            kept = [getattr(b.targets, name)[i][b.targets.valid[i]] for b in (batch, other)]
            torch.testing.assert_close(kept[0], kept[1], rtol=0, atol=0)
    torch.testing.assert_close(batch.targets.sizes, other.targets.sizes)


# --- collate


def test_collate_pads_to_multiples_with_the_mean_colour():
    batch = collate(
        [
            a_sample(20, 50, [[1.0, 2.0, 30.0, 15.0]], 5, original_size=torch.tensor([40, 100]), index=9),
            a_sample(33, 10, [], 6),
        ]
    )
    assert tuple(batch.images.shape) == (2, 3, 64, 64)  # 33 and 50, rounded up
    assert batch.images.dtype == torch.uint8
    assert (batch.images[0, :, :20, :50] == 5).all()
    assert batch.images[0, :, 20, 0].tolist() == list(PAD_COLOUR)
    assert batch.images[0, :, 0, 50].tolist() == list(PAD_COLOUR)
    assert batch.images[1, :, 32, 9].tolist() == [6, 6, 6]
    assert batch.images[1, :, 32, 10].tolist() == list(PAD_COLOUR)
    assert batch.sizes.tolist() == batch.targets.sizes.tolist() == [[20, 50], [33, 10]]
    assert batch.original_sizes.tolist() == [[40, 100], [33, 10]]
    assert batch.image_ids.tolist() == [5, 6]
    assert batch.indices.tolist() == [9, -1]
    assert batch.targets.valid.sum(1).tolist() == [1, 0]
    assert batch.targets.boxes[0, 0].tolist() == [1, 2, 30, 15]


def test_collate_of_empty_pictures_only():
    batch = collate([a_sample(32, 32, [], 1), a_sample(32, 32, [], 2)])
    assert tuple(batch.images.shape) == (2, 3, 32, 32)
    assert not batch.targets.valid.any()
    assert (batch.targets.labels == BACKGROUND).all()


def test_collate_keeps_other_multiples():
    assert tuple(collate([a_sample(300, 300, [], 1)], multiple=1).images.shape) == (1, 3, 300, 300)
    assert tuple(collate([a_sample(300, 300, [], 1)]).images.shape) == (1, 3, 320, 320)


def test_collate_leaves_out_ignored_and_crowds():
    boxes = [[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 5.0, 5.0], [0.0, 0.0, 6.0, 6.0]]
    flags = {"ignore": torch.tensor([True, False, False]), "iscrowd": torch.tensor([0, 1, 0])}
    batch = collate([a_sample(32, 32, boxes, 1, **flags)])
    assert batch.targets.labels[0][batch.targets.valid[0]].tolist() == [2]


def test_collate_names_the_picture_of_a_bad_box():
    good, bad = a_sample(32, 32, [[1.0, 1.0, 9.0, 9.0]], 70), a_sample(32, 32, [[9.0, 1.0, 1.0, 9.0]], 71)
    with pytest.raises(ValueError, match=r"image id 71 \(number 1 of its batch\): pad_targets.*\[9.0, 1.0, 1.0, 9.0\]"):
        collate([good, bad])


def test_collate_rejects_no_samples():
    with pytest.raises(ValueError, match="at least one"):
        collate([])


def test_batch_to_keeps_what_only_the_host_reads():
    batch = collate([a_sample(32, 32, [[1.0, 1.0, 9.0, 9.0]], 1)]).to("meta")
    assert {batch.images.device.type, batch.targets.boxes.device.type, batch.sizes.device.type} == {"meta"}
    assert batch.image_ids.tolist() == [1]
    assert batch.original_sizes.tolist() == [[32, 32]]


@pytest.mark.gpu
def test_batch_pins_all_its_tensors(gpu):
    batch = collate([a_sample(32, 32, [[1.0, 1.0, 9.0, 9.0]], 1)]).pin_memory()
    assert batch.images.is_pinned()
    assert batch.targets.boxes.is_pinned()
    assert batch.to(gpu, non_blocking=True).images.device.type == gpu.type


# --- randomness


def test_mix_separates_seeds_epochs_and_indices():
    words = np.concatenate([mix(seed, epoch, np.arange(50)) for seed in range(5) for epoch in range(5)])
    assert len(np.unique(words)) == 1250
    assert 0.45 < (words >> np.uint64(63)).mean() < 0.55
    # Frozen: checkpoints of older versions must resume to the same augmentation.
    assert mix(1, 2, np.array([3]))[0] == 0xD0734750FDE362B3


def test_transformed_dataset_depends_on_seed_epoch_and_index_only(scenes):
    view = TransformedDataset(scenes, ssd_transform(64, train=True), seed=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, _ = view[2, 5]
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generator is not touched
    torch.manual_seed(99)
    again, target = view[2, 5]
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert target["index"] == 5
    others = [view[3, 5][0], TransformedDataset(scenes, view.transform, seed=4)[2, 5][0]]
    assert not any(torch.equal(other, first) for other in others)


def test_transformed_dataset_gives_the_generator_back_after_an_error(scenes):
    def fails(image, target):
        raise RuntimeError("transform")

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="transform"):
        TransformedDataset(scenes, fails)[0]
    assert torch.equal(torch.get_rng_state(), before)


# --- sampler


def order(sampler):
    return [[index for _, index in batch] for batch in sampler]


def flat(lists):
    return list(chain.from_iterable(lists))


def test_sampler_orders():
    plain = EpochSampler(5, batch_size=2, shuffle=False, seed=0)
    assert order(plain) == [[0, 1], [2, 3], [4]]
    shuffled = EpochSampler(100, batch_size=10, shuffle=True, seed=0)
    first = order(shuffled)
    assert order(shuffled) == first
    assert sorted(flat(first)) == list(range(100))
    shuffled.set_epoch(1)
    assert {epoch for batch in shuffled for epoch, _ in batch} == {1}
    assert order(shuffled) != first
    assert order(EpochSampler(100, batch_size=10, shuffle=True, seed=1)) != first


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("length", [24, 25, 29, 31])
def test_ranks_share_an_epoch_without_overlap(length, drop_last):
    whole = order(EpochSampler(length, batch_size=8, shuffle=True, seed=2, drop_last=drop_last))
    ranks = [
        EpochSampler(length, batch_size=4, shuffle=True, seed=2, rank=r, world_size=2, drop_last=drop_last)
        for r in range(2)
    ]
    shares = [order(rank) for rank in ranks]
    assert [len(rank) for rank in ranks] == [len(share) for share in shares]
    # Step by step, two processes see what one with the doubled batch sees.
    for step, batch in enumerate(whole):
        assert flat(share[step] for share in shares if step < len(share)) == batch
    seen = sorted(flat(flat(shares)))
    assert len(seen) == (24 if drop_last else length)
    assert len(set(seen)) == len(seen)
    if drop_last:
        assert len(ranks[0]) == len(ranks[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be >= 1; got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1; got 0"),
        ({"seed": -1}, "seed must be >= 0; got -1"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size = 2\); got 2"),
        ({"length": 7, "batch_size": 4, "world_size": 2, "drop_last": True}, "= 8 with drop_last; got 7"),
    ],
)
def test_sampler_rejects_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(**{"length": 10, "batch_size": 2, "shuffle": True, "seed": 0, **options})


def test_sampler_refuses_the_state_of_another_run():
    state = EpochSampler(10, batch_size=2, shuffle=True, seed=0).state_dict()
    with pytest.raises(ValueError, match="batch_size must be 2, as in the interrupted run; got 5"):
        EpochSampler(10, batch_size=5, shuffle=True, seed=0).load_state_dict(state)


# --- loader


def loaders(scenes, kind):
    """A function that makes one and the same loader anew."""
    if kind == "cached":
        cached = CachedDataset(scenes, progress=False)
        return lambda: CachedLoader(cached, batch_size=4, shuffle=True, seed=5, flip=0.5)
    transform = ssd_transform(64, train=True)
    return lambda: make_loader(scenes, transform, batch_size=4, shuffle=True, seed=5, num_workers=kind)


@pytest.mark.parametrize("kind", [0, 2, "cached"])
def test_resumed_loader_goes_on_like_an_unbroken_one(scenes, kind):
    make = loaders(scenes, kind)
    unbroken = make()
    expected = [batch for _ in range(2) for batch in unbroken]
    assert len(expected) == 12  # 22 pictures: 6 batches an epoch

    interrupted = make()
    seen, state = [], None
    for batch in interrupted:
        seen.append(batch)
        if len(seen) == 3:
            state = interrupted.state_dict()  # workers are ahead by now
            break
    assert state["position"] == 3
    resumed = make()
    resumed.load_state_dict(state)
    resumed.set_epoch(0)  # what a training loop does first; keeps the position
    seen += list(resumed)
    assert resumed.state_dict()["epoch"] == 1
    seen += list(resumed)
    assert len(seen) == 12
    for batch, other in zip(seen, expected, strict=True):
        assert_same(batch, other)


@pytest.mark.parametrize("kind", [0, "cached"])
def test_loader_resumed_at_the_end_of_an_epoch_goes_to_the_next(scenes, kind):
    make = loaders(scenes, kind)
    finished, resumed = make(), make()
    resumed.load_state_dict({**finished.state_dict(), "position": len(finished)})
    assert list(resumed) == []
    assert len(list(finished)) == 6
    assert_same(next(iter(resumed)), next(iter(finished)))  # both in epoch 1


def test_workers_change_nothing(scenes):
    pairs = zip(loaders(scenes, 0)(), loaders(scenes, 2)(), strict=True)
    for alone, shared in pairs:
        assert_same(alone, shared)


def test_loader_starts_over_after_a_break(scenes):
    loader = loaders(scenes, 0)()
    first, again = next(iter(loader)), next(iter(loader))
    assert_same(first, again)
    assert len(loader) == 6


def test_loader_leaves_the_global_generator_alone(scenes):
    loader = loaders(scenes, 0)()
    before = torch.get_rng_state()
    assert sum(len(batch) for batch in loader) == 22
    assert torch.equal(torch.get_rng_state(), before)


def narrow(image, target):
    """Crop to different heights, then RetinaNet's resize."""
    height = 24 + 8 * target["image_id"]
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(height, 64))
    return retinanet_transform(80, 150, train=True)(tv_tensors.Image(image[:, :height]), {**target, "boxes": boxes})


def test_loader_of_pictures_of_unequal_sizes(scenes):
    batch = next(iter(make_loader(scenes, narrow, batch_size=3, shuffle=False)))
    # 24 x 64 and 32 x 64 are limited by 150 / 64 = 2.34; 40 x 64 is doubled.
    assert batch.sizes.tolist() == [[56, 150], [75, 150], [80, 128]]
    assert tuple(batch.images.shape) == (3, 3, 96, 160)
    assert batch.original_sizes.tolist() == [[64, 64]] * 3


# --- cache


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("num_threads", [0, 2])
def test_cached_equals_uncached(scenes, where, num_threads, tmp_path):
    resize = square_transform(32, train=False)
    path = tmp_path / "pixels.bin" if where == "file" else None
    cached = CachedDataset(scenes, resize, path=path, num_threads=num_threads, progress=False)
    assert cached.image_size == (32, 32)
    assert cached.num_bytes == 22 * 3 * 32 * 32
    assert cached.classes == scenes.classes
    assert cached.target(3)["boxes"].tolist() == scenes.target(3)["boxes"].tolist()
    options = {"batch_size": 5, "shuffle": True, "seed": 1}
    plain = list(make_loader(scenes, resize, **options))
    for batch, again, direct in zip(
        plain, make_loader(cached, None, **options), CachedLoader(cached, **options), strict=True
    ):
        assert_same(again, batch)
        assert_same(direct, batch)


def test_cached_pictures_may_differ_in_size(scenes):
    def shrink(image, target):
        side = 8 + 4 * target["image_id"]  # grows: the first pictures tell too little
        return square_transform(side, train=False)(image, target)

    cached = CachedDataset(scenes, shrink, progress=False)
    assert cached.image_size is None
    for i in (0, 7, 21):
        image, target = cached[i]
        expected, resized = shrink(*scenes[i])
        torch.testing.assert_close(image, expected, rtol=0, atol=0)
        torch.testing.assert_close(target["boxes"], resized["boxes"], rtol=0, atol=0)
    with pytest.raises(ValueError, match="one size; got 22 sizes"):
        CachedLoader(cached, batch_size=2, shuffle=False)


def test_cache_says_how_much_memory_it_takes(scenes, capsys):
    CachedDataset(scenes, square_transform(256, train=False))
    assert "caching 22 pictures, about 4 MB in memory" in capsys.readouterr().err  # 22 * 3 * 256 * 256 = 4.3e6


def test_cached_loader_flips_pictures_with_their_boxes(scenes):
    cached = CachedDataset(scenes, square_transform(40, train=False), progress=False)
    plain, flipping = (list(CachedLoader(cached, batch_size=11, shuffle=False, seed=2, flip=p)) for p in (0.0, 0.5))
    flips = 0
    for batch, other in zip(plain, flipping, strict=True):
        assert tuple(batch.images.shape) == (11, 3, 64, 64)
        for i in range(11):
            pixels, flipped = batch.images[i, :, :40, :40], other.images[i, :, :40, :40]
            boxes, moved = batch.targets.boxes[i], other.targets.boxes[i]
            valid = batch.targets.valid[i]
            if not torch.equal(pixels, flipped):
                flips += 1
                pixels = pixels.flip(-1)
                mirrored = torch.stack([40 - boxes[:, 2], boxes[:, 1], 40 - boxes[:, 0], boxes[:, 3]], 1)
                boxes = torch.where(valid[:, None], mirrored, boxes)
            torch.testing.assert_close(flipped, pixels, rtol=0, atol=0)
            torch.testing.assert_close(moved, boxes)
            assert (moved[~valid] == 0).all()
            # Padding stays where it was.
            assert other.images[i, :, :40, 40:].unique().tolist() == sorted(PAD_COLOUR)
    assert 5 <= flips <= 17


def test_cached_loader_draws_new_flips_each_epoch(scenes):
    cached = CachedDataset(scenes, progress=False)
    loader = CachedLoader(cached, batch_size=22, shuffle=False, flip=0.5)
    (first,), (second,) = list(loader), list(loader)
    changed = (first.images != second.images).flatten(1).any(1)
    assert 3 < int(changed.sum()) < 19
    # The cache itself must not have been turned round.
    torch.testing.assert_close(cached[4][0], scenes[4][0], rtol=0, atol=0)


def test_cached_loader_batches_have_one_shape(scenes):
    loader = CachedLoader(CachedDataset(scenes, progress=False), batch_size=4, shuffle=True, drop_last=True)
    assert len({(batch.images.shape, batch.targets.boxes.shape) for batch in loader}) == 1
    assert len(loader) == 5


def test_cached_loader_ranks_share_the_data(scenes):
    cached = CachedDataset(scenes, progress=False)
    seen = [
        index
        for rank in range(2)
        for batch in CachedLoader(cached, batch_size=4, shuffle=True, rank=rank, world_size=2)
        for index in batch.indices.tolist()
    ]
    assert sorted(seen) == list(range(22))


def test_cached_loader_rejects_an_impossible_probability(scenes):
    with pytest.raises(ValueError, match=r"flip must be a probability in \[0, 1\]; got 2.0"):
        CachedLoader(CachedDataset(scenes, progress=False), batch_size=4, shuffle=True, flip=2.0)


def test_cached_dataset_with_a_random_transform_in_the_loader(scenes):
    cached = CachedDataset(scenes, square_transform(32, train=False), progress=False)
    loader = make_loader(cached, flip_transform(), batch_size=22, shuffle=False)
    [batch] = loader
    stored = cached.images
    turned = [torch.equal(batch.images[i], stored[i].flip(-1)) for i in range(22)]
    as_is = [torch.equal(batch.images[i], stored[i]) for i in range(22)]
    assert sum(turned) + sum(as_is) == 22
    assert 3 < sum(turned) < 19


@pytest.mark.gpu
def test_cached_loader_on_a_gpu_equals_the_cpu(scenes, gpu):
    cached = CachedDataset(scenes, square_transform(40, train=False), progress=False)
    both = (CachedLoader(cached, batch_size=6, shuffle=True, flip=0.5, device=d) for d in ("cpu", gpu))
    for batch, other in zip(*both, strict=True):
        assert other.images.device.type == gpu.type
        assert_same(batch, other.to("cpu"))


# --- colours on the device


def test_recoloured_batches_differ_in_colours_only(scenes):
    plain = list(loaders(scenes, "cached")())
    recoloured = list(Recoloured(loaders(scenes, "cached")(), device="cpu", seed=3))
    changed = 0
    for batch, other in zip(plain, recoloured, strict=True):
        assert_same(replace(other, images=batch.images), batch)
        changed += int((batch.images != other.images).any(dim=(1, 2, 3)).sum())
    assert 0.8 * len(scenes) < changed < len(scenes) + 1  # 1 in 16 is left alone, greys more often


def test_recoloured_depends_on_seed_epoch_and_index_only(scenes):
    def pictures(seed, epoch, **order):
        order = {"batch_size": 4, "shuffle": False, **order}
        loader = Recoloured(make_loader(scenes, None, **order), device="cpu", seed=seed)
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader)
        indices = torch.cat([batch.indices for batch in batches])
        return torch.cat([batch.images for batch in batches])[indices.argsort()]

    first = pictures(1, 0)
    assert torch.equal(pictures(1, 0, batch_size=5, shuffle=True), first)
    for other in (pictures(2, 0), pictures(1, 1)):
        assert (other != first).any(dim=(1, 2, 3)).float().mean() > 0.8


def test_recoloured_keeps_the_padding_and_answers_as_its_loader(scenes):
    loader = Recoloured(make_loader(scenes, narrow, batch_size=3, shuffle=False), device="cpu", seed=5)
    iterator = iter(loader)
    batch = next(iterator)
    assert (batch.images[0, :, 56:].flatten(1) == torch.tensor(PAD_COLOUR)[:, None]).all()
    assert loader.state_dict()["position"] == 1
    assert loader.dataset is loader.loader.dataset
    chance = loader._chance(batch.indices)
    plain = next(iter(make_loader(scenes, narrow, batch_size=3, shuffle=False)))
    wanted = change_colours(plain.images, draw_colours(chance), spare=PAD_COLOUR)
    torch.testing.assert_close(batch.images, wanted, rtol=0, atol=0)
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = loader.colour


def test_recoloured_draws_evenly_and_apart_from_flips(scenes):
    loader = Recoloured(make_loader(scenes, None, batch_size=4, shuffle=False), device="cpu", seed=1)
    chance = loader._chance(torch.arange(5000))
    assert ((chance >= 0) & (chance < 1)).all()
    error = (1 / 12 / 5000) ** 0.5
    assert (chance.mean(0) - 0.5).abs().max() < 4 * error
    assert (torch.corrcoef(chance.T) - torch.eye(9)).abs().max() < 4.5 / 5000**0.5
    flips = torch.from_numpy((mix(1, 0, 9 * np.arange(5000)) >> np.uint64(40)).astype(np.float32))  # of the same keys
    assert torch.corrcoef(torch.stack([flips, chance[:, 0]]))[0, 1].abs() < 4 / 5000**0.5
