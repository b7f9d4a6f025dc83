"""The texts that name a data set."""

import json
import shutil

import pytest
from PIL import Image

from detcore.data import DataError, DetectionDataset, open_dataset


def make_voc(root, lists):
    """One picture a list: ``{"2007/trainval": "000005"}``."""
    for place, name in lists.items():
        year, _, image_set = place.partition("/")
        base = root / "VOCdevkit" / f"VOC{year}"
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(base / f"JPEGImages/{name}.jpg")
        text = "<annotation><size><width>8</width><height>8</height></size></annotation>"
        (base / f"Annotations/{name}.xml").write_text(text)
        (base / f"ImageSets/Main/{image_set}.txt").write_text(name)


@pytest.mark.parametrize(
    ("lists", "train", "test"),
    [
        # the papers' 07+12: train on both trainvals, test on 2007 test
        ({"2007/trainval": "1", "2007/test": "2", "2012/trainval": "3", "2012/val": "4"}, (1, 3), (2,)),
        ({"2007/trainval": "1", "2007/test": "2"}, (1,), (2,)),
        # without a test list, trainval would hold the pictures of val
        ({"2012/trainval": "3", "2012/train": "4", "2012/val": "5"}, (4,), (5,)),
    ],
)
def test_open_dataset_chooses_lists_that_do_not_meet(tmp_path, lists, train, test):
    make_voc(tmp_path, lists)
    assert open_dataset(f"voc:{tmp_path}").image_ids == train
    assert open_dataset(f"voc:{tmp_path}", "test").image_ids == test


def test_open_dataset_takes_lists_by_name(tmp_path):
    make_voc(tmp_path, {"2007/mini": "1", "2012/mini": "2", "2012/other": "3"})
    spec = f"voc:{tmp_path},train=2007/mini+2012/mini,test=2012/other"
    assert open_dataset(spec).image_ids == (1, 2)
    assert open_dataset(spec, "test").image_ids == (3,)
    with pytest.raises(DataError, match=r"must hold VOC2007/ImageSets/Main/train.txt or .* to train; none found"):
        open_dataset(f"voc:{tmp_path}")
    with pytest.raises(ValueError, match=r"train must be YEAR/LIST, or several joined by \+; got '2007'"):
        open_dataset(f"voc:{tmp_path},train=2007")


@pytest.fixture
def files(tmp_path):
    """``instances_{train,test,other}.json`` with the image ids 1, 2, 3."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg")
    for image_id, name in enumerate(("train", "test", "other"), start=1):
        image = {"id": image_id, "file_name": "x.jpg", "width": 8, "height": 8}
        rows = {
            "images": [image],
            "annotations": [],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        }
        (tmp_path / f"instances_{name}.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.mark.parametrize(
    ("rest", "train", "test"),
    [
        ("", 1, 2),
        ("/instances_train.json", 1, 2),  # tested on its sibling
        ("/instances_test.json", 2, 2),
        ("/instances_other.json", 3, 3),
        ("/instances_train.json,test={0}/instances_other.json", 1, 3),
        ("/instances_train.json,test={0}/instances_train.json", 1, 1),  # asked for, so granted
    ],
)
def test_open_dataset_finds_both_splits_of_a_json(files, rest, train, test):
    spec = f"coco-json:{files}{rest.format(files)}"
    assert open_dataset(spec, "train").image_ids == (train,)
    assert open_dataset(spec, "test").image_ids == (test,)


def test_open_dataset_uses_a_training_file_without_sibling_as_it_is(files):
    (files / "instances_test.json").unlink()
    assert open_dataset(f"coco-json:{files}/instances_train.json", "test").image_ids == (1,)
    shutil.copy(files / "instances_other.json", files / "instances_val.json")
    assert open_dataset(f"coco-json:{files}/instances_train.json", "test").image_ids == (3,)


def test_open_dataset_finds_the_official_folders_of_coco(files):
    (files / "annotations").mkdir()
    for split, name in (("train", "train2017"), ("test", "val2017")):
        (files / name).mkdir()
        shutil.copy(files / "x.jpg", files / name)
        (files / f"instances_{split}.json").rename(files / f"annotations/instances_{name}.json")
    assert open_dataset(f"coco:{files}").image_ids == (1,)
    assert open_dataset(f"coco:{files}").path(0) == files / "train2017" / "x.jpg"
    assert open_dataset(f"coco:{files}", "test").path(0) == files / "val2017" / "x.jpg"


def test_open_dataset_passes_its_options_on(files):
    spec = f"coco-json:{files}"
    assert open_dataset(spec, classes=("dog",)).classes == ("dog",)
    assert len(open_dataset(spec, only_with_objects=True)) == 0
    (files / "x.jpg").write_bytes(b"")
    assert len(open_dataset(spec, skip_bad=True)) == 0


def test_open_dataset_makes_scenes():
    train = open_dataset("scenes:images=7,test_images=3,size=48,seed=5,noise=0.1")
    test = open_dataset("scenes:images=7,test_images=3,size=48,seed=5,noise=0.1", "test")
    assert isinstance(train, DetectionDataset)
    assert (len(train), len(test)) == (7, 3)
    assert (train.size, train.seed, train.noise, test.noise) == (48, 5, 0.1, 0.0)
    assert not (train[0][0] == test[0][0]).all()
    assert len(open_dataset("scenes")) == 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("voc",), r"spec must be voc:DIR, coco:DIR, coco-json:FILE or scenes; got 'voc'"),
        (("kitti:x",), r"spec must be .*; got 'kitti:x'"),
        (("scenes", "val"), r'split must be "train" or "test"; got \'val\''),
        (("scenes:colour=3",), r"scenes takes key=number out of images, .*; got 'colour=3' in 'scenes:colour=3'"),
        (("scenes:size=big",), r"got 'size=big'"),
        (("scenes", "train", False, ("disc",)), r"classes and only_with_objects must be left out for scenes"),
    ],
)
def test_open_dataset_says_what_it_understands(arguments, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(*arguments)


# --- real pictures


def test_open_dataset_opens_the_real_ones(data_root):
    found = {
        (spec, split): len(open_dataset(spec.format(data_root), split))
        for spec in (
            "coco-json:{}/voc20/instances_train.json",
            "coco:{}/coco",
            "coco:{}/coco,train=minitrain,test=minitest",
            "voc:{},train=2012/minitrain,test=2012/minitest",
            "voc:{}",
        )
        for split in ("train", "test")
    }
    assert list(found.values()) == [5291, 1384, 341, 2874, 2615, 600, 2808, 800, 1697, 1729]
