"""COCO: ids with gaps, crowds, pictures without objects, where pictures lie, and what is said about broken files."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

from detcore.data import AnnotatedPictures, CocoDetection, DataError, DetectionDataset
from detcore.data.records import read_picture
from detcore.structures import pad_targets

CONTENT = {
    "images": [
        {"id": 30, "file_name": "a.jpg", "width": 40, "height": 30},
        {"id": 9, "file_name": "sub/b.jpg", "width": 40, "height": 30},
        {"id": 36, "file_name": "c.png", "width": 40, "height": 30},
    ],
    "annotations": [
        {"id": 1, "image_id": 36, "category_id": 90, "bbox": [1, 2, 3, 4], "area": 7.5, "iscrowd": 0},
        {"id": 2, "image_id": 30, "category_id": 18, "bbox": [0, 0, 40.009, 30], "iscrowd": 0},
        {"id": 3, "image_id": 36, "category_id": 17, "bbox": [5, 5, 6, 7], "area": 42, "iscrowd": 1},
        {"id": 4, "image_id": 36, "category_id": 18, "bbox": [5, 5, 0.5, 7], "area": 3, "iscrowd": 0, "ignore": 1},
    ],
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
}


@pytest.fixture
def folder(tmp_path):
    """Three pictures, the second without an object, the third with a crowd and an ignored object."""
    (tmp_path / "sub").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for image in CONTENT["images"]:
        Image.fromarray(pixels).save(tmp_path / image["file_name"])
    write(tmp_path, CONTENT)
    return tmp_path


def write(folder, content):
    (folder / "instances_train.json").write_text(json.dumps(content))


def open_it(folder, **options):
    return CocoDetection(folder, folder / "instances_train.json", **options)


def test_coco_labels_are_ranks_of_category_ids(folder):
    dataset = open_it(folder)
    assert isinstance(dataset, DetectionDataset)
    assert (dataset.classes, dataset.category_ids) == (("cat", "dog", "toothbrush"), (17, 18, 90))
    assert dataset.image_ids == (30, 9, 36)  # in the order of the file
    assert dataset.target(2)["labels"].tolist() == [2, 0, 1]
    assert [dataset.category_ids[label] for label in dataset.target(2)["labels"]] == [90, 17, 18]


def test_coco_target_has_corners_area_crowd_and_ignore(folder):
    target = open_it(folder)[2][1]
    assert target["boxes"].tolist() == [[1.0, 2.0, 4.0, 6.0], [5.0, 5.0, 11.0, 12.0], [5.0, 5.0, 5.5, 12.0]]
    assert target["area"].tolist() == [7.5, 42.0, 3.0]
    assert target["iscrowd"].tolist() == [0, 1, 0]
    assert target["ignore"].tolist() == [False, True, True]
    assert (target["image_id"], target["original_size"].tolist()) == (36, [30, 40])
    # crowds and ignored objects are for evaluation: training sees the toothbrush only
    assert pad_targets([target]).labels[0].tolist() == [2] + [-1] * 7


def test_coco_area_defaults_to_the_box(folder):
    torch.testing.assert_close(open_it(folder).target(0)["area"], torch.tensor([40.009 * 30]))


def test_coco_keeps_pictures_without_objects(folder):
    image, target = open_it(folder)[1]
    assert (tuple(image.shape), tuple(target["boxes"].shape)) == ((3, 30, 40), (0, 4))
    assert open_it(folder, only_with_objects=True).image_ids == (30, 36)


def test_coco_subset_of_classes_is_relabelled(folder):
    dataset = open_it(folder, classes=("toothbrush", "cat"))
    assert (dataset.classes, dataset.category_ids) == (("toothbrush", "cat"), (90, 17))
    assert [dataset.target(i)["labels"].tolist() for i in range(3)] == [[], [], [0, 1]]
    # the cat of picture 36 is a crowd
    assert len(open_it(folder, classes=("cat",), only_with_objects=True)) == 0


def test_coco_finds_pictures_near_the_file(folder):
    (folder / "annotations").mkdir()
    file = (folder / "instances_train.json").rename(folder / "annotations" / "instances_train.json")
    assert CocoDetection(None, file).path(0) == folder / "a.jpg"


def test_coco_index_out_of_range(folder):
    dataset = open_it(folder)
    assert dataset[-1][1]["image_id"] == 36
    with pytest.raises(IndexError, match="index must be below 3"):
        dataset[3]


def change(path, value):
    """CONTENT with one value replaced, or removed where ``value`` is ``...``."""
    content = copy.deepcopy(CONTENT)
    *way, last = path
    place = content
    for key in way:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


BAD = [
    # (path, value, what the message says, pictures and objects left by skip_bad)
    (
        ("images", 0, "width"),
        float("inf"),
        r'image id 30: "width" must be a whole number of pixels >= 1; got inf',
        2,
        3,
    ),
    (
        ("annotations", 0, "bbox"),
        [9, 9, 0, 4],
        r"annotation id 1 \(image id 36\): bbox .*width > 0.*got \[9, 9, 0, 4\]",
        3,
        3,
    ),
    (("annotations", 0, "bbox"), [9, 9, -3, 4], r"annotation id 1 .*got \[9, 9, -3, 4\]. Correct or remove", 3, 3),
    (("annotations", 0, "bbox"), [9, 9, float("nan"), 4], r"annotation id 1 .*must be finite", 3, 3),
    (
        ("annotations", 0, "bbox"),
        [9, 9, 35, 25],
        r"annotation id 1 .*inside its picture of 40 x 30.*corners written",
        3,
        3,
    ),
    (
        ("annotations", 0, "bbox"),
        [9, 9, 3],
        r'annotation id 1: "bbox" must be \[x, y, width, height\]; got \[9, 9, 3\]',
        3,
        3,
    ),
    (("annotations", 0, "bbox"), ["9", 9, 3, 4], r'annotation id 1: "bbox" must be', 3, 3),
    (("annotations", 0, "bbox"), ..., r'annotation id 1: "bbox" must be .*; the key is missing, got \[\'area\'', 3, 3),
    (("annotations", 0, "category_id"), 5, r"annotation id 1 .*: category_id must be one of the 3 .*got 5", 3, 3),
    (("annotations", 0, "image_id"), 37, r"annotation id 1 \(image id 37\): image_id must be an id in images", 3, 3),
    (("annotations", 0, "image_id"), "36", r"annotation id 1: \"image_id\" must be an integer; got '36'", 3, 3),
    (
        ("images", 0, "width"),
        ...,
        r'image id 30: "width" must be a whole number of pixels >= 1; the key is missing',
        2,
        3,
    ),
    (("images", 0, "height"), 0, r'image id 30: "height" must be a whole number of pixels >= 1; got 0', 2, 3),
    (("images", 0, "id"), ..., r'image number 0 \(from 0, without id\): "id" must be an integer', 2, 3),
    (
        ("images", 0, "file_name"),
        "z.jpg",
        r"image id 30: file_name must be a picture below .*; z.jpg is not there \(1 obj",
        2,
        3,
    ),
    (("images", 1, "id"), 30, r"image id 30 must be unique; got it for a.jpg and sub/b.jpg", 2, 4),
]


@pytest.mark.parametrize(("path", "value", "message", "pictures", "objects"), BAD)
def test_coco_bad_entry_is_named_or_left_out(folder, path, value, message, pictures, objects):
    write(folder, change(path, value))
    with pytest.raises(DataError, match=r"instances_train.json: (?s:.*)" + message):
        open_it(folder)
    dataset = open_it(folder, skip_bad=True)
    assert (len(dataset), len(dataset.records.labels)) == (pictures, objects)
    # one fault, one message; an annotation of a picture without id refers to nothing and is a fault of its own
    assert len(dataset.skipped) == (2 if path == ("images", 0, "id") else 1)
    assert [dataset[i][1]["image_id"] for i in range(pictures)] == list(dataset.image_ids)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [], "annotations"', r"instances_train.json must be JSON; got: .*line 1 column.*cut short"),
        (
            '{"images": [], "categories": []}',
            r"lists images, annotations and categories; got \['categories', 'images'\]",
        ),
        ("[]", r"annotations and categories; got a list. Results files"),
        (
            '{"images": [], "annotations": [], "categories": []}',
            r"categories must have different ids and names, at least",
        ),
    ],
)
def test_coco_bad_file_is_named(folder, text, message):
    (folder / "instances_train.json").write_text(text)
    for skip_bad in (False, True):  # nothing is left to go on with
        with pytest.raises(DataError, match=message):
            open_it(folder, skip_bad=skip_bad)


def test_coco_missing_file_is_named(folder):
    with pytest.raises(DataError, match=r"annotation_json must be a file; .*nowhere.json does not exist"):
        CocoDetection(folder, folder / "nowhere.json")


def test_coco_opens_with_the_two_known_slips_of_the_official_file(folder):
    content = change(("images", 0, "id"), 200365)
    content["annotations"][1] |= {"image_id": 200365, "bbox": [296.65, 388.33, 1.03, 0.0]}
    write(folder, content)
    dataset = open_it(folder)
    assert len(dataset.records.labels) == 3
    assert "known slip of the official file" in dataset.skipped[0]


def test_coco_wrong_folder_is_found_out_quickly(folder):
    content = copy.deepcopy(CONTENT)
    content["images"] = [{"id": i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in range(3000)]
    content["annotations"] = []
    write(folder, content)
    with pytest.raises(DataError, match=r"3000 faults:(?s:.*)0.jpg is not there(?s:.*)and 2990 more"):
        open_it(folder)


# --- pictures that cannot be decoded


def truncate(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("name", ["a.jpg", "c.png"])
def test_truncated_picture_raises_when_it_is_read(folder, name):
    truncate(folder / name)
    dataset = open_it(folder)
    index = {"a.jpg": 0, "c.png": 2}[name]
    with pytest.raises(
        DataError, match=rf"{name} \(image id {dataset.image_ids[index]}\) must be a whole picture; got .*"
    ):
        dataset[index]
    assert [name in message for message in dataset.verify(progress=False)] == [True]


@pytest.mark.parametrize("name", ["a.jpg", "c.png"])
def test_truncated_picture_is_left_out_by_skip_bad(folder, name):
    truncate(folder / name)
    dataset = open_it(folder, skip_bad=True)
    assert len(dataset) == 2
    assert [name in message for message in dataset.skipped] == [True]
    assert "1 left out" in repr(dataset)
    assert dataset.verify(progress=False) == ()
    for i in range(2):
        assert dataset[i][1]["image_id"] == dataset.image_ids[i]


def test_picture_lost_later_does_not_stop_a_loader_that_skips(folder):
    dataset = open_it(folder, skip_bad=True)
    (folder / "a.jpg").unlink()
    with pytest.warns(RuntimeWarning, match=r"a.jpg \(image id 30\) must be a whole picture.*An empty picture"):
        image, target = dataset[0]
    assert image.unique().tolist() == [104, 116, 124]
    assert (tuple(image.shape), len(target["boxes"]), target["image_id"]) == ((3, 30, 40), 0, 30)
    assert len(dataset.target(0)["boxes"]) == 0  # evaluation does not count what could not be seen
    again, _ = dataset[0]  # and it is said once
    assert (len(dataset.skipped), tuple(again.shape)) == (1, (3, 30, 40))


def test_skip_bad_keeps_a_picture_with_bytes_after_its_end(folder):
    with (folder / "a.jpg").open("ab") as file:
        file.write(b"\0" * 100)  # as some cameras write
    assert len(open_it(folder, skip_bad=True)) == 3


def test_picture_of_another_size_is_named(folder):
    Image.new("RGB", (30, 40)).save(folder / "a.jpg")
    with pytest.raises(DataError, match=r"a.jpg \(image id 30\) must be 40 x 30 pixels.*got 30 x 40. It is turned"):
        open_it(folder)[0]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK"])
def test_read_picture_gives_rgb_of_every_mode(tmp_path, mode):
    file = tmp_path / ("x.jpg" if mode in ("L", "RGB", "CMYK") else "x.png")
    Image.new("RGB", (8, 6), (200, 100, 50)).convert(mode).save(
        file, **({"quality": 100} if file.suffix == ".jpg" else {})
    )
    pixels = read_picture(file)
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (3, 6, 8))
    want = [124, 124, 124] if mode == "L" else [200, 100, 50]  # grey is 0.299 R + 0.587 G + 0.114 B
    torch.testing.assert_close(pixels[:, 3, 3].int(), torch.tensor(want, dtype=torch.int32), atol=4, rtol=0)


def test_read_picture_does_not_turn_by_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    Image.new("RGB", (8, 6)).save(tmp_path / "x.jpg", exif=exif)
    assert tuple(read_picture(tmp_path / "x.jpg").shape) == (3, 6, 8)


# --- real pictures


def test_coco_opens_the_official_sample(data_root):
    dataset = CocoDetection(None, data_root / "samples_original/coco/annotations/instances_val2017.json")
    assert (len(dataset), len(dataset.classes), dataset.category_ids[-1]) == (32, 80, 90)
    assert (len(dataset.records.labels), int(dataset.records.crowd.sum())) == (455, 9)
    assert dataset.verify(progress=False) == ()  # decodes, and has the annotated sizes


@pytest.mark.parametrize(
    ("split", "pictures", "objects", "cats_dogs"),
    [("train", 5291, 21003, (1035, 1317)), ("test", 1384, 5193, (284, 375))],
)
def test_coco_opens_voc20(data_root, split, pictures, objects, cats_dogs):
    dataset = CocoDetection(None, data_root / f"voc20/instances_{split}.json")
    assert (len(dataset), len(dataset.records.labels), dataset.name) == (pictures, objects, f"voc20-{split}")
    assert dataset.category_ids == tuple(range(1, 21))
    animals = CocoDetection(
        None, data_root / f"voc20/instances_{split}.json", classes=("cat", "dog"), only_with_objects=True
    )
    counts = np.bincount(animals.records.labels[~animals.records.ignore])
    assert tuple(counts.tolist()) == cats_dogs
    assert isinstance(animals, AnnotatedPictures)
    assert tuple(animals[0][0].shape[-2:]) == tuple(animals[0][1]["original_size"].tolist())


def test_coco_and_voc_readers_agree_on_the_same_pictures(data_root):
    """voc20 holds minitest's boxes as JSON: x, y from 0 and width, height, made from the XML by another program."""
    from detcore.data import VocDetection

    voc = VocDetection(data_root, "2012", "minitest")
    coco = CocoDetection(None, data_root / "voc20/instances_test.json")
    by_name = {coco.path(i).name: coco.target(i) for i in range(len(coco)) if "VOC2012" in str(coco.path(i))}
    assert len(by_name) == len(voc) == 800
    for i in range(len(voc)):
        a, b = voc.target(i), by_name[voc.path(i).name]
        for key in ("boxes", "labels", "ignore", "original_size"):
            torch.testing.assert_close(a[key], b[key])
