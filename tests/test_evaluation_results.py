import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detcore.evaluation.coco import CocoEvaluator
from detcore.evaluation.results import from_coco_results, load_coco_results, to_coco_results
from tests.pictures import as_coco_json, pictures

IMAGE_IDS = [900 - 7 * i for i in range(14)]  # with gaps, not ascending
CATEGORY_IDS = [1, 5, 90]


def write(folder, truth, results):
    paths = folder / "truth.json", folder / "results.json"
    for path, content in zip(paths, (truth, results), strict=True):
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return paths


def numbers(detections, targets):
    evaluator = CocoEvaluator(3)
    evaluator.update(detections, targets)
    return evaluator.compute()


def test_results_equal_those_written_down_box_by_box():
    detections, targets = pictures()
    assert (
        to_coco_results(detections, IMAGE_IDS, CATEGORY_IDS)
        == as_coco_json(detections, targets, IMAGE_IDS, CATEGORY_IDS)[1]
    )


def test_results_come_back_as_they_were():
    detections, _ = pictures()
    detections = [d | {"class_scores": d["scores"] / 2, "quality": d["scores"] / 3} for d in detections]
    text = json.dumps(to_coco_results(detections, IMAGE_IDS, CATEGORY_IDS))
    again = from_coco_results(json.loads(text), IMAGE_IDS, CATEGORY_IDS)
    for ours, given in zip(again, detections, strict=True):
        assert set(ours) == {"boxes", "labels", "scores", "class_scores", "quality"}
        for key, values in given.items():
            np.testing.assert_allclose(ours[key].numpy(), values, rtol=0, atol=1e-12)


def test_files_give_the_numbers_of_the_official_script(tmp_path):
    detections, targets = pictures()
    truth, results = write(tmp_path, *as_coco_json(detections, targets, IMAGE_IDS, CATEGORY_IDS))
    ours = numbers(*load_coco_results(truth, str(results))[:2])
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO(str(truth))
        official = COCOeval(ground, ground.loadRes(str(results)), "bbox")
        official.evaluate()
        official.accumulate()
        official.summarize()
    names = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
    names += ["AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"]
    np.testing.assert_allclose([ours[name] for name in names], official.stats, rtol=0, atol=1e-12)


def test_files_are_read_in_the_order_of_the_ids(tmp_path):
    truth = {
        "images": [{"id": 9}, {"id": 4}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 18, "bbox": [1, 2, 4, 2], "iscrowd": 1, "area": 3.5},
            {"id": 2, "image_id": 9, "category_id": 17, "bbox": [0, 0, 5, 5], "ignore": 1},
        ],
    }
    results = [{"image_id": 9, "category_id": 17, "bbox": [0, 0, 5, 4], "score": 0.5}]
    detections, targets, classes = load_coco_results(*write(tmp_path, truth, results))
    assert classes == ("cat", "dog")
    assert [t["image_id"] for t in targets] == [4, 9]
    assert [len(d["scores"]) for d in detections] == [0, 1]
    assert targets[0]["boxes"].shape == (0, 4)
    assert targets[1]["boxes"].tolist() == [[1, 2, 5, 4], [0, 0, 5, 5]]
    assert targets[1]["labels"].tolist() == [1, 0]
    assert targets[1]["area"].tolist() == [3.5, 25]
    assert targets[1]["iscrowd"].tolist() == [1, 0]
    assert targets[1]["ignore"].tolist() == [True, True]


def test_no_results_are_empty_detections(tmp_path):
    detections, targets = pictures()
    truth, _ = as_coco_json(detections, targets, IMAGE_IDS, CATEGORY_IDS)
    found, objects, _ = load_coco_results(*write(tmp_path, truth, []))
    assert [len(f["boxes"]) for f in found] == [0] * 14
    assert numbers(found, objects)["AP"] == 0


TRUTH = {
    "images": [{"id": 4}, {"id": 9}],
    "categories": [{"id": 17, "name": "cat"}],
    "annotations": [{"id": 31, "image_id": 4, "category_id": 17, "bbox": [0, 0, 5, 5]}],
}
RESULT = {"image_id": 4, "category_id": 17, "bbox": [0, 0, 5, 4], "score": 0.5}
OBJECT = TRUTH["annotations"][0]


def with_object(**changes):
    return TRUTH | {"annotations": [OBJECT, OBJECT | {"id": 32} | changes]}


@pytest.mark.parametrize(
    ("truth", "results", "error", "message"),
    [
        (
            TRUTH,
            [RESULT, RESULT | {"image_id": 5}],
            ValueError,
            r"results.json\[1\] has the unknown image_id 5; .*4, 9",
        ),
        (TRUTH, [RESULT | {"category_id": 3}], ValueError, r"results.json\[0\] has the unknown category_id 3; .*17"),
        (TRUTH, [{"image_id": 4, "category_id": 17, "bbox": [0, 0, 1, 1]}], KeyError, r"results.json\[0\].*score"),
        (TRUTH, [RESULT | {"bbox": [0, 0, 5]}], ValueError, r"results.json\[0\] must have a bbox \[x, y, width"),
        (TRUTH, [RESULT | {"bbox": [0, 0, 5, "4"]}], ValueError, r"results.json\[0\] must have a bbox"),
        (TRUTH, [RESULT | {"bbox": [9, 9, -5, 4]}], ValueError, r"results.json\[0\].*width and height >= 0"),
        (TRUTH, {"annotations": []}, ValueError, "results.json must hold a list of results; got a dict"),
        (TRUTH, '[{"image_id": 4, ', ValueError, "results.json must be JSON; .*line 1, column .*written to the end"),
        ([], [], ValueError, "truth.json must hold an object"),
        ({"images": [], "categories": []}, [], KeyError, 'truth.json must have the key \\\\?"annotations'),
        (with_object(image_id=5), [], ValueError, "truth.json: annotation 32 has the unknown image_id 5"),
        (with_object(category_id=5), [], ValueError, "truth.json: annotation 32 has the unknown category_id 5"),
        (with_object(bbox=[0, 0, -1, 2]), [], ValueError, "truth.json: annotation 32 must have a finite bbox"),
        (TRUTH | {"images": [{"id": 4}, {"id": 4}]}, [], ValueError, "truth.json: images.* got 4 twice"),
        (TRUTH | {"images": [{"file_name": "a"}]}, [], KeyError, r"truth.json: images\[0\]"),
        (TRUTH | {"annotations": [{"id": 7, "image_id": 4}]}, [], KeyError, "annotation 7 must have the key"),
    ],
)
def test_files_are_named_with_what_is_wrong(tmp_path, truth, results, error, message):
    with pytest.raises(error, match=message):
        load_coco_results(*write(tmp_path, truth, results))


def test_a_missing_file_is_named(tmp_path):
    truth, _ = write(tmp_path, TRUTH, [])
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        load_coco_results(truth, tmp_path / "absent.json")


def test_results_need_an_id_for_every_image_and_class():
    seen = {"boxes": [[0, 0, 4, 4]], "labels": [1], "scores": [0.5]}
    with pytest.raises(ValueError, match="one id an image, 1 of them; got 2"):
        to_coco_results([seen], [1, 2], [3, 4])
    with pytest.raises(ValueError, match="num_classes = 1; got 1"):
        to_coco_results([seen], [1], [3])


def test_a_long_list_of_known_ids_is_cut():
    with pytest.raises(ValueError, match=r"7\] and 92 more"):
        from_coco_results([RESULT | {"image_id": -1}], range(100), [17])
