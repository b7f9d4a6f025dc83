"""VOC: box convention, official lists, difficult flags, and what is said about broken files."""

import gzip
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from detcore.data import VOC_CLASSES, DataError, DetectionDataset, VocDetection


def xml(objects, *, width=40, height=30):
    """One <object> a line, from line 3 on: (name, xmin, ymin, xmax, ymax, difficult)."""
    lines = ["<annotation>", f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"]
    for name, x1, y1, x2, y2, difficult in objects:
        box = f"<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>"
        lines.append(f"<object><name>{name}</name><difficult>{difficult}</difficult>{box}</object>")
    return "\n".join([*lines, "</annotation>"])


@pytest.fixture
def voc(tmp_path):
    """VOC2007 with three pictures: two objects, none, one difficult object."""
    base = tmp_path / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    pictures = {
        "000005": [("cat", 1, 1, 40, 30, 0), ("dog", 5, 6, 5, 6, 0)],
        "000007": [],
        "000009": [("dog", 2, 3, 10, 20, 1)],
    }
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for name, objects in pictures.items():
        Image.fromarray(pixels).save(base / "JPEGImages" / f"{name}.jpg")
        (base / "Annotations" / f"{name}.xml").write_text(xml(objects))
    (base / "ImageSets/Main/trainval.txt").write_text("\n".join(pictures) + "\n")
    return tmp_path


def rewrite(root, objects, name="000005"):
    (root / f"VOCdevkit/VOC2007/Annotations/{name}.xml").write_text(xml(objects))


def test_voc_boxes_are_continuous_corners(voc):
    dataset = VocDetection(voc)
    # 1-based inclusive 1..40 x 1..30 is the whole 40 x 30 picture; xmin = xmax is one pixel wide
    torch.testing.assert_close(
        dataset.target(0)["boxes"].as_subclass(torch.Tensor), torch.tensor([[0.0, 0, 40, 30], [4, 5, 5, 6]])
    )
    assert dataset.target(0)["area"].tolist() == [1200.0, 1.0]


def test_voc_target_has_what_the_protocol_says(voc):
    dataset = VocDetection(voc)
    assert isinstance(dataset, DetectionDataset)
    assert (len(dataset), dataset.image_ids, dataset.category_ids) == (3, (5, 7, 9), tuple(range(1, 21)))
    image, target = dataset[2]
    assert isinstance(image, tv_tensors.Image)
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 30, 40))
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert target["boxes"].canvas_size == (30, 40)
    assert target["labels"].tolist() == [VOC_CLASSES.index("dog")]
    assert target["ignore"].tolist() == [True]
    assert target["iscrowd"].tolist() == [0]
    assert (target["image_id"], target["original_size"].tolist()) == (9, [30, 40])
    types = {key: target[key].dtype for key in ("boxes", "labels", "area", "iscrowd", "ignore", "original_size")}
    assert list(types.values()) == [torch.float32, torch.int64, torch.float32, torch.int64, torch.bool, torch.int64]


def test_voc_keeps_pictures_without_objects(voc):
    target = VocDetection(voc)[1][1]
    assert tuple(target["boxes"].shape) == (0, 4)
    assert [len(target[key]) for key in ("labels", "area", "iscrowd", "ignore")] == [0, 0, 0, 0]


def test_voc_target_can_be_written_to(voc):
    dataset = VocDetection(voc)
    dataset.target(0)["boxes"].zero_()
    assert dataset.target(0)["boxes"].max() == 40


def test_voc_subset_of_classes_is_relabelled(voc):
    dataset = VocDetection(voc, classes=("dog", "cat"))
    assert (dataset.classes, dataset.category_ids) == (("dog", "cat"), (12, 8))
    assert [dataset.target(i)["labels"].tolist() for i in range(3)] == [[1, 0], [], [0]]
    # 000009 has a dog, but only a difficult one
    assert VocDetection(voc, classes=("dog",), only_with_objects=True).image_ids == (5,)
    with pytest.raises(DataError, match=r"classes must be different names out of aeroplane.*got \('dgo',\)"):
        VocDetection(voc, classes=("dgo",))


def test_voc_joins_years_and_opens_any_of_the_three_roots(voc):
    devkit = voc / "VOCdevkit"
    shutil.copytree(devkit / "VOC2007", devkit / "VOC2012")
    for folder, end in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (devkit / "VOC2012" / folder / f"000005.{end}").rename(devkit / "VOC2012" / folder / f"2008_000002.{end}")
    (devkit / "VOC2012/ImageSets/Main/train.txt").write_text("2008_000002\n")
    both = VocDetection(devkit, ("2007", "2012"), ("trainval", "train"))
    assert both.image_ids == (5, 7, 9, 2008000002)
    assert both.name == "voc2007-trainval+voc2012-train"
    assert len(VocDetection(devkit / "VOC2007")) == 3


def test_voc_list_of_one_class_leaves_out_minus_one(voc):
    (voc / "VOCdevkit/VOC2007/ImageSets/Main/dog_trainval.txt").write_text("000005  1\n000007 -1\n000009  0\n")
    assert VocDetection(voc, image_set="dog_trainval").image_ids == (5, 9)


def test_voc_ignores_boxes_of_body_parts(voc):
    part = "<part><name>head</name><bndbox><xmin>0</xmin><ymin>9</ymin><xmax>2</xmax><ymax>3</ymax></bndbox></part>"
    text = xml([("person", 2, 2, 9, 9, 0)]).replace("<bndbox>", f"{part}<bndbox>")
    (voc / "VOCdevkit/VOC2007/Annotations/000005.xml").write_text(text)
    assert VocDetection(voc).target(0)["boxes"].tolist() == [[1.0, 1.0, 9.0, 9.0]]


BAD_OBJECTS = [
    # (objects of 000005, what the message says, objects left by skip_bad)
    ([("cat", 1, 1, 9, 9, 0), ("dog", 20, 1, 10, 9, 0)], r"000005.xml line 4: .* object 2 .*xmin <= xmax.*\[20.0", 1),
    ([("dog", 1, 9, 10, 8, 0)], r"000005.xml line 3: bndbox of object 1 must have .* ymin <= ymax", 0),
    ([("dog", 1, 1, 50, 9, 0)], r"000005.xml line 3: .* inside the picture, 1..40 by 1..30; got .*50.0", 0),
    ([("dgo", 1, 1, 10, 9, 0)], r"000005.xml line 3: name of object 1 .* 20 classes; got 'dgo'. Did you mean dog\?", 0),
    ([("wombat", 1, 1, 10, 9, 0)], r"got 'wombat'. Pass names", 0),
    ([("dog", "one", 1, 10, 9, 0)], r"000005.xml line 3: bndbox of object 1 must hold the numbers .*'one'", 0),
    ([("dog", "nan", 1, 10, 9, 0)], r"000005.xml line 3: bndbox of object 1 must have", 0),
]


@pytest.mark.parametrize(("objects", "message", "left"), BAD_OBJECTS)
def test_voc_bad_object_is_named_or_left_out(voc, objects, message, left):
    rewrite(voc, objects)
    with pytest.raises(DataError, match=message):
        VocDetection(voc)
    dataset = VocDetection(voc, skip_bad=True)
    assert (len(dataset), len(dataset.target(0)["labels"]), len(dataset.skipped)) == (3, left, 1)


def test_voc_bad_pictures_are_named_or_left_out(voc):
    base = voc / "VOCdevkit/VOC2007"
    (base / "JPEGImages/000005.jpg").unlink()
    (base / "Annotations/000007.xml").unlink()
    (base / "Annotations/000009.xml").write_text("<annotation>\n<size>")
    with pytest.raises(DataError) as caught:
        VocDetection(voc)
    for part in (
        "3 faults",
        r"trainval.txt line 1: 000005 must have a picture and an XML file; ",
        "JPEGImages/000005.jpg not found",
        "trainval.txt line 2: 000007",
        "Annotations/000007.xml not found",
        "000009.xml line 2: must be well-formed XML",
        "--skip-bad",
    ):
        assert part in str(caught.value)
    dataset = VocDetection(voc, skip_bad=True)
    assert (len(dataset), len(dataset.skipped)) == (0, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("000005", r"trainval.txt line 4: names must be different; got 000005, as in line 1"),
        ("123456", r"trainval.txt line 4: 123456 must have a picture and an XML file; .*123456.jpg and .*123456.xml"),
    ],
)
def test_voc_bad_line_of_a_list_is_named(voc, line, message):
    with (voc / "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(DataError, match=message):
        VocDetection(voc)
    assert len(VocDetection(voc, skip_bad=True)) == 3


def test_voc_picture_without_size_is_named(voc):
    (voc / "VOCdevkit/VOC2007/Annotations/000007.xml").write_text(
        "<annotation><size><width>0</width></size></annotation>"
    )
    with pytest.raises(
        DataError, match=r"000007.xml: annotation/size must hold width and height > 0; got width 0, height None"
    ):
        VocDetection(voc)


def test_voc_missing_folder_or_list_says_what_is_there(voc, tmp_path):
    with pytest.raises(DataError, match=r"root must hold a folder VOC2012 .*detcore data download voc2012"):
        VocDetection(voc, "2012")
    with pytest.raises(DataError, match=r"image_set must be one of trainval in .*; got 'test'"):
        VocDetection(voc, image_set="test")
    with pytest.raises(DataError, match=r"one for each of the 1 years"):
        VocDetection(voc, image_set=("train", "val"))


def test_voc_first_of_many_faults_are_listed_and_the_rest_counted(voc):
    rewrite(voc, [("dgo", 1, 1, 9, 9, 0)] * 25)
    with pytest.raises(DataError, match=r"25 faults:(?s:.*)and 15 more"):
        VocDetection(voc)


# --- real pictures


def test_voc2007_first_test_picture(data_root):
    dataset = VocDetection(data_root / "samples_original", "2007", "test")
    image, target = dataset[dataset.image_ids.index(1)]
    # the XML says 48 240 195 371 for the dog, 8 12 352 498 for the person, in a picture of 353 x 500
    assert target["boxes"].tolist() == [[47.0, 239.0, 195.0, 371.0], [7.0, 11.0, 352.0, 498.0]]
    assert [dataset.classes[label] for label in target["labels"]] == ["dog", "person"]
    assert tuple(image.shape) == (3, 500, 353)
    # the official COCO-format copy of the same annotation, where area is width x height
    assert target["area"].tolist() == [19536.0, 345.0 * 487.0]


def test_voc2012_lists_hold_the_known_counts(data_root):
    sets = {
        name: VocDetection(data_root, "2012", name) for name in ("train", "val", "trainval", "minitrain", "minitest")
    }
    assert {name: len(dataset) for name, dataset in sets.items()} == {
        "train": 1697,
        "val": 1729,
        "trainval": 3426,
        "minitrain": 2808,
        "minitest": 800,
    }
    mini = [sets["minitrain"], sets["minitest"]]
    assert sum(len(dataset) for dataset in mini) == 3608
    assert sum(len(dataset.records.labels) for dataset in mini) == 7559
    assert sum(int(dataset.records.ignore.sum()) for dataset in mini) == 777


def test_voc2012_samples_equal_the_official_boxes(data_root):
    """Every box of the untouched XML files is that of the complete annotations, as x, y, width, height from 0."""
    dataset = VocDetection(data_root / "samples_original", "2012", "test")
    truth = {}
    for part in ("train2012", "val2012"):
        with gzip.open(data_root / f"voc_annotations/pascal_{part}.json.gz") as file:
            content = json.load(file)
        for row in content["annotations"]:
            truth.setdefault(row["image_id"], []).append((row["bbox"], row["category_id"], bool(row["ignore"])))
    assert len(dataset) == 32
    for index, image_id in enumerate(dataset.image_ids):
        target = dataset.target(index)
        x1, y1, x2, y2 = target["boxes"].as_subclass(torch.Tensor).unbind(1)
        xywh = torch.stack([x1, y1, x2 - x1, y2 - y1], 1).tolist()
        found = zip(xywh, (target["labels"] + 1).tolist(), target["ignore"].tolist(), strict=True)
        assert sorted(found) == sorted(truth[image_id])
