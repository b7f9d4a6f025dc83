"""The command line, run in this process on pictures of 64 pixels: what each verb writes, and what mistakes get."""

import dataclasses
import importlib
import json
import logging
import re
import runpy
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detcore.checkpoint import load_checkpoint, model_weights
from detcore.cli import VERBS, detectors, main, parse
from detcore.cli.detectors import buckets_for, cached_loader, choose_pictures, loader_to_test, transform_for
from detcore.cli.options import read_pairs, split_pairs
from detcore.data import Loader, Scenes
from detcore.models import get_model
from detcore.training import TrainConfig

SCENES = "scenes:size=64,images=12,test_images=4,seed=3"
MODULES = {"eval": "evaluate"}
PLAIN = ["--backbone", "tiny", "--batch-size", "4", "--workers", "0", "--warmup-steps", "0", "--schedule", "constant"]
PLAIN += ["--device", "cpu", "--precision", "fp32", "--threads", "1"]
TRAIN = ["train", "--model", "iou_aware_retinanet", "--data", SCENES, *PLAIN, "anchor_base=2.0", "fusion_alpha=0.4"]
DETECT = ["--device", "cpu", "--workers", "0"]


def run(*words):
    return main([str(word) for word in words])


def read(*path):
    return json.loads(Path(*path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs on scenes; averaged weights are kept."""
    folder = tmp_path_factory.mktemp("runs") / "scenes"
    assert run(*TRAIN, "--epochs", 2, "--ema-decay", 0.5, "--output", folder) == 0
    return folder


# --- the words


def test_key_value_words_are_told_from_the_rest():
    words = ["--classes", "cat", "dog", "anchor_base=2.0", "--data", "scenes:size=64", "--size=96"]
    rest, pairs = split_pairs(words)
    assert pairs == ["anchor_base=2.0"]
    assert rest == ["--classes", "cat", "dog", "--data", "scenes:size=64", "--size=96"]


def test_values_are_literals_or_texts():
    read_back = read_pairs(["a=0.4", "b=None", "c=giou", "d=(1, 2)", "e=__import__('os')"])
    assert read_back == {"a": 0.4, "b": None, "c": "giou", "d": (1, 2), "e": "__import__('os')"}  # nothing is run


@pytest.mark.parametrize("verb", VERBS)
def test_help_explains_every_flag_and_ends_with_examples(verb, capsys):
    assert run(verb, "--help") == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert f"detcore {verb}" in shown.split("examples:")[1]
    module = importlib.import_module(f"detcore.cli.{MODULES.get(verb, verb)}")
    assert module.EXAMPLES in shown
    for command in (
        [module.COMMAND] if isinstance(module.COMMAND, type) else [module.List, module.Download, module.Check]
    ):
        docs = "\n".join(base.__doc__ or "" for base in command.__mro__)
        for field in dataclasses.fields(command):
            is_hidden = "Suppress" in str(field.type)
            assert is_hidden or re.search(rf"^ +{field.name}: \S", docs, re.MULTILINE), f"{verb}: {field.name}"


def documented():
    """Every command line of the README, the book and the helps, continued lines joined."""
    root = Path(__file__).parent.parent
    texts = [page.read_text(encoding="utf-8") for page in [root / "README.md", *(root / "book").rglob("*.md")]]
    for notebook in (root / "notebooks").glob("*.ipynb"):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        texts += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    texts += [importlib.import_module(f"detcore.cli.{MODULES.get(verb, verb)}").EXAMPLES for verb in VERBS]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if re.match(r" *(torchrun|detcore) ", line)]
    return [words[words.index("detcore") + 1 :] for words in found if "..." not in words]


def test_documented_commands_exist():
    commands = documented()
    assert {words[0] for words in commands} == set(VERBS)
    for verb, *words in commands:
        assert parse(verb, words).words.startswith(f"detcore {verb}"), words


def test_every_setting_of_training_is_a_flag(capsys):
    run("train", "--help")
    shown = capsys.readouterr().out
    missing = [f.name for f in dataclasses.fields(TrainConfig) if f"-{f.name.replace('_', '-')}" not in shown]
    assert missing == ["output_dir"]  # it is --output


def test_the_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["detcore", "--version"])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("detcore", run_name="__main__", alter_sys=False)
    assert done.value.code == 0
    assert re.fullmatch(r"detcore \S+\n", capsys.readouterr().out)


def test_verbs_are_listed(capsys):
    assert run("--help") == 0
    assert all(f"  {verb} " in capsys.readouterr().out for verb in ["train"])
    assert run() == 2
    assert "usage: detcore VERB" in capsys.readouterr().out


# --- train and eval


def test_train_writes_a_run(trained):
    names = {"last.pt", "best.pt", "metrics.jsonl", "result.json"}
    assert names <= {path.name for path in trained.iterdir()}
    result = read(trained, "result.json")
    assert result["data"]["train"]["pictures"] == 12
    assert result["data"]["test"] | {"objects": 0} == {
        "name": "scenes", "pictures": 4, "objects": 0, "num_skipped": 0, "skipped": [],
    }  # fmt: skip
    assert result["data"]["test"]["objects"] == sum(
        int((~Scenes(4, size=64, seed=3, split="test").target(i)["ignore"]).sum()) for i in range(4)
    )
    assert result["config"]["epochs"] == 2
    assert result["model"]["fusion_alpha"] == 0.4
    assert result["provenance"]["command"].startswith("detcore train --model iou_aware_retinanet --data scenes:")
    assert "AP50" in result["metrics"]


def test_a_checkpoint_says_how_to_build_its_detector(trained):
    checkpoint = load_checkpoint(trained / "last.pt")  # with weights_only=True
    assert checkpoint["spec"] == {
        "name": "iou_aware_retinanet", "num_classes": 6, "backbone": "tiny", "anchor_base": 2.0, "fusion_alpha": 0.4,
    }  # fmt: skip
    assert checkpoint["classes"] == list(Scenes(1).classes)
    assert checkpoint["pictures"] == {"category_ids": [0, 1, 2, 3, 4, 5]}
    detector = get_model(**checkpoint["spec"])
    detector.load_state_dict(checkpoint["model"])


def test_eval_repeats_the_numbers_of_training(trained, tmp_path, capsys):
    output = tmp_path / "numbers.json"
    assert run("eval", "--checkpoint", trained, "--data", SCENES, "--voc", "--output", output, *DETECT) == 0
    numbers = read(output)["metrics"]
    expected = read(trained, "result.json")["metrics"]
    assert {name: numbers[name] for name in expected} == expected
    assert 0 <= numbers["VOC_11point_AP50"] <= 1
    assert "AP50" in capsys.readouterr().out


def test_eval_adds_recall_by_size_and_voc_at_several_ious(trained, tmp_path, capsys):
    output = tmp_path / "numbers.json"
    words = ["eval", "--checkpoint", trained, "--data", SCENES, "--voc", "--output", output, *DETECT]
    assert run(*words, "--recall", "voc") == 0
    assert "no box of a score below 0.05" in capsys.readouterr().out
    assert run(*words, "--recall", "voc", "score_threshold=0.001") == 0
    assert "no box of a score" not in capsys.readouterr().out
    content = read(output)
    names = {f"VOC_{rule}_{name}" for rule in ("area", "11point") for name in ("AP", "AP50", "AP70", "AP90")}
    assert names <= set(content["metrics"])
    counts = content["recall_by_size"]
    assert sum(counts["objects"].values()) == read(trained, "result.json")["data"]["test"]["objects"]
    assert counts["score_thresholds"] == [0.01, 0.1, 0.3]


def test_eval_counts_recall_by_score(trained, tmp_path, monkeypatch):
    collect = importlib.import_module("detcore.cli.evaluate").collect

    def truth(*args, **options):
        _, targets = collect(*args, **options)
        return [{**t, "scores": torch.full((len(t["boxes"]),), 0.2)} for t in targets], targets

    monkeypatch.setattr("detcore.cli.evaluate.collect", truth)
    output = tmp_path / "numbers.json"
    words = ["eval", "--checkpoint", trained, "--data", SCENES, "--recall", "coco", "--output", output, *DETECT]
    assert run(*words) == 0
    metrics = read(output)["metrics"]
    assert (metrics["AP"], metrics["R0.01"], metrics["R0.1"], metrics["R0.3"]) == (pytest.approx(1), 1, 1, 0)


def test_eval_takes_options_that_leave_the_weights(trained, tmp_path):
    output = tmp_path / "numbers.json"
    words = ["eval", "--checkpoint", trained / "best.pt", "--data", SCENES, "--output", output, *DETECT]
    assert run(*words, "max_detections=1", "fusion_alpha=1.0") == 0
    content = read(output)
    assert content["model"]["max_detections"] == 1
    assert content["metrics"]["AR1"] == content["metrics"]["AR100"]


def test_resumed_run_is_the_unbroken_one(trained, tmp_path):
    words = [*TRAIN, "--ema-decay", 0.5, "--output", tmp_path / "run"]
    assert run(*words, "--epochs", 1) == 0
    assert run(*words, "--epochs", 2, "--resume", "auto") == 0
    ours, theirs = (load_checkpoint(folder / "last.pt") for folder in (tmp_path / "run", trained))
    for name, weight in model_weights(theirs).items():
        assert torch.equal(model_weights(ours)[name], weight), name
    assert read(tmp_path, "run", "result.json")["metrics"] == read(trained, "result.json")["metrics"]
    # nothing is left to do: the numbers are found again
    assert run(*words, "--epochs", 2, "--resume", "auto") == 0
    assert read(tmp_path, "run", "result.json")["metrics"] == read(trained, "result.json")["metrics"]


def test_resuming_asks_for_the_same_detector(trained, capsys):
    words = [word for word in TRAIN if word != "fusion_alpha=0.4"]
    assert run(*words, "--epochs", 2, "--output", trained, "--resume", "auto") == 2
    assert "--resume must go on with the same spec" in capsys.readouterr().err


def test_evaluation_every_other_epoch(tmp_path):
    words = [*TRAIN, "--epochs", 3, "--eval-every", 2, "--output", tmp_path / "run"]
    assert run(*words) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["AP" in row["metrics"] for row in rows if row["kind"] == "epoch"] == [False, True, True]


@pytest.mark.slow
def test_two_processes_train_and_write_once(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    words = [*launch, "-m", "detcore", *TRAIN, "--epochs", "1", "--batch-size", "2", "--output", tmp_path / "run"]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = read(tmp_path, "run", "result.json")
    assert result["processes"] == 2
    assert done.stdout.count("wrote ") == 1


SSD = ["train", "--model", "ssd300", "--data", SCENES, *PLAIN, "--epochs", 1]


@pytest.mark.parametrize("where", ["workers", "device"])
def test_ssd_trains_with_its_augmentation(where, tmp_path, monkeypatch):
    if where == "device":  # as on a GPU
        monkeypatch.setattr(detectors, "CHANGE_COLOURS", ("cpu",))
    words = [*SSD, "--augment", "ssd", "--difficult", "--size", 64]
    for name in ("one", "two"):
        assert run(*words, "--output", tmp_path / name) == 0
    result = read(tmp_path, "one", "result.json")
    assert (result["augment"], result["difficult"]) == ("ssd", True)
    assert result["pictures"] == {"size": 64}
    ours, theirs = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("one", "two"))
    for name, weight in ours.items():
        assert torch.equal(theirs[name], weight), name  # what is random follows from the seed


def test_colours_are_changed_once_wherever_that_is(monkeypatch):
    data, given = Scenes(4, size=64, seed=3), {"augment": "ssd", "difficult": False, "device": torch.device("cpu")}

    def made():
        order = {"seed": 0, "batch_size": 4, "shuffle": False}
        return detectors.loader_to_train(data, {"size": 64}, **given, **order)

    assert isinstance(made(), Loader)
    monkeypatch.setattr(detectors, "CHANGE_COLOURS", ("cpu",))
    loader = made()
    [changed] = loader
    loader.set_epoch(0)
    [plain] = loader.loader
    assert torch.equal(changed.targets.boxes, plain.targets.boxes)
    moved = changed.images.float().mean((1, 2, 3)) - plain.images.float().mean((1, 2, 3))
    assert (moved.abs() > 1).any()


def test_augmentation_reaches_the_pictures():
    image, target = Scenes(1, size=64, seed=3)[0]
    seen = {}
    for augment in ("flip", "ssd", "none"):
        transform = transform_for({"size": 64}, augment=augment)
        seen[augment] = set()
        for seed in range(12):
            torch.manual_seed(seed)
            seen[augment].add(transform(image, target)[0].numpy().tobytes())
    assert {name: len(pictures) for name, pictures in seen.items()} == {"flip": 2, "ssd": 12, "none": 1}


@pytest.mark.parametrize("pictures", [{}, {"size": 64}, {"short_side": 64, "long_side": 96}], ids=str)
def test_difficult_objects_are_learnt_if_asked_for(pictures):
    image, target = Scenes(1, size=64, seed=3)[0]
    number = len(target["boxes"])
    assert number >= 2
    flags = torch.arange(number) == 0
    target |= {"ignore": torch.ones(number, dtype=torch.bool), "iscrowd": flags.long()}
    assert transform_for(pictures, difficult=True)(image, target)[1]["ignore"].tolist() == flags.tolist()
    plain = transform_for(pictures)
    assert plain is None or plain(image, target)[1]["ignore"].all()


def test_batches_to_evaluate_on_hold_pictures_of_like_shape_or_come_in_order():
    class Shapes(Scenes):  # every other one stands
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return image[..., : 64 - 16 * (index % 2)], target

        def target(self, index):
            return {**super().target(index), "original_size": torch.tensor([64, 64 - 16 * (index % 2)])}

    pictures = {"short_side": 64, "long_side": 96}
    batches = {
        in_order: list(loader_to_test(Shapes(8, size=64), pictures, batch_size=4, workers=0, in_order=in_order))
        for in_order in (True, False)
    }
    assert [batch.indices.tolist() for batch in batches[True]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [tuple(batch.images.shape[-2:]) for batch in batches[True]] == [(96, 64)] * 2
    assert [batch.indices.tolist() for batch in batches[False]] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [tuple(batch.images.shape[-2:]) for batch in batches[False]] == [(64, 96), (96, 64)]
    assert buckets_for(Scenes(2, size=64), {"size": 64}) is None


def choose(model, backbone=None, *, size=None, short_side=None, as_they_are=False):
    return choose_pictures(
        model, backbone, {}, size=size, short_side=short_side, long_side=None, as_they_are=as_they_are
    )


def test_the_ssd_family_has_sizes_of_its_own():
    assert choose("ssd300") == choose("ssd300", size=300, as_they_are=True) == {"size": 300, "multiple": 1}
    assert choose("ssd512", "vgg16_bn", as_they_are=True) == {"size": 512, "multiple": 1}
    assert choose("ssd300", "tiny") == {"size": 300}  # any size would do
    assert choose("ssd300", "tiny", size=96) == {"size": 96}
    assert choose("ssd300", "tiny", as_they_are=True) == {}
    for asked in ({"size": 128}, {"short_side": 300}):
        with pytest.raises(ValueError, match=r"ssd300 takes squares of 300 pixels; got --s.*--backbone tiny"):
            choose("ssd300", **asked)
    assert choose("retinanet", "tiny") == {"short_side": 800, "long_side": 1333}
    assert choose("retinanet", "tiny", size=96) == {"size": 96}
    assert choose("retinanet", "tiny", short_side=600) == {"short_side": 600, "long_side": 1000}
    assert choose("retinanet", "tiny", as_they_are=True) == {}


def test_squares_of_one_size_are_not_padded():
    scenes = Scenes(3, size=50)
    fixed = {"size": 50, "multiple": 1}
    for pictures, side in ((fixed, 50), ({"size": 50}, 64)):
        cached = cached_loader(scenes, pictures, threads=0, batch_size=3, shuffle=False)
        plain = loader_to_test(scenes, pictures, batch_size=3, workers=0)
        assert [tuple(batch.images.shape) for batch in (*cached, *plain)] == [(3, 3, side, side)] * 2


def test_ssd_augmentation_needs_squares(tmp_path, capsys):
    words = ["train", "--model", "retinanet", "--data", SCENES, *PLAIN, "--augment", "ssd"]
    assert run(*words, "--output", tmp_path / "run") == 2
    assert "--augment ssd makes squares; it must come with --size" in capsys.readouterr().err


# --- predict, diagnose, show


def test_predict_on_files(trained, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, index in (("b.png", 0), ("a.jpg", 1)):
        image, _ = Scenes(2, size=64)[index]
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize((90, 70)).save(pictures / name)
    (pictures / "notes.txt").write_text("not a picture")
    output = tmp_path / "found"
    words = ["--score-threshold", 0, "max_detections=5", *DETECT]
    assert run("predict", pictures, "--checkpoint", trained, "--output", output, *words) == 0
    results = read(output, "results.json")
    assert [image["file_name"] for image in read(output, "images.json")["images"]] == ["a.jpg", "b.png"]
    assert {result["image_id"] for result in results} == {1, 2}
    assert len(results) == 10
    for x, y, width, height in (result["bbox"] for result in results):
        assert 0 <= x <= x + width <= 90 + 1e-3
        assert 0 <= y <= y + height <= 70 + 1e-3
    drawn = sorted(path.name for path in (output / "pictures").iterdir())
    assert drawn == ["000001_a.png", "000002_b.png"]
    with Image.open(output / "pictures" / drawn[0]) as picture:
        assert picture.size == (640, 497)


def test_predictions_on_data_fit_its_annotations(coco, tmp_path, capsys):
    run_folder, found = tmp_path / "run", tmp_path / "found"
    words = ["--data", f"coco-json:{coco}", "--classes", "dog", "cat", "--short-side", 64, "--long-side", 96]
    assert run("train", "--model", "retinanet", *words, *PLAIN, "--epochs", 1, "--output", run_folder) == 0
    checkpoint = load_checkpoint(run_folder / "last.pt")
    assert checkpoint["pictures"] == {"short_side": 64, "long_side": 96, "category_ids": [17, 3]}
    assert checkpoint["spec"]["short_side"] == 64
    words = ["--checkpoint", run_folder, "--data", f"coco-json:{coco}", *DETECT]
    assert run("predict", *words, "--output", found, "--draw", 1, "--truth") == 0
    assert {result["category_id"] for result in read(found, "results.json")} <= {17, 3}
    assert len(list((found / "pictures").iterdir())) == 1

    assert run("eval", *words) == 0
    gt = coco / "instances_test.json"
    capsys.readouterr()
    given = ["--gt", gt, "--detections", found / "results.json"]
    assert run("diagnose", *given, "--bootstrap", 5, "--output", tmp_path / "diagnosis") == 0
    assert "average precision" in capsys.readouterr().out
    report = read(tmp_path, "diagnosis", "diagnosis.json")
    # two classes of three, and the third has no box in the test pictures: the same AP
    assert report["average_precision"]["as scored"]["AP"] == pytest.approx(
        read(run_folder, "result.json")["metrics"]["AP"], abs=1e-6
    )
    assert (tmp_path / "diagnosis" / "diagnosis.png").stat().st_size > 10_000


def test_diagnose_looks_at_what_nms_had(trained, tmp_path, capsys):
    words = ["--checkpoint", trained, "--data", SCENES, "--bootstrap", 0, "--output", tmp_path, *DETECT]
    assert run("diagnose", *words, "--recall", "coco", "max_detections=10") == 0
    shown = capsys.readouterr().out
    assert "objects lost by NMS" in shown
    assert "recall by size" in shown
    report = read(tmp_path, "diagnosis.json")
    assert sum(report["recall_by_size"]["objects"].values()) == report["num_objects"]
    assert report["num_detections"] <= 40 < report["counts"]["before NMS"]["boxes"]


@pytest.mark.parametrize(
    ("model", "options", "changed"),
    [
        (
            "retinanet_conf",
            {"anchor_base": 2.0, "quality_loss": "qfl", "negative_weight": 1e-4, "candidates": 20},
            {"fusion_alpha": None, "min_quality": 0.2},
        ),
        (
            "fcos_association",
            {"range_base": 4.0, "association": "pce", "beta": 0.5, "candidates": 20},
            {"score_threshold": 0.01, "nms_iou": 0.5},
        ),
    ],
)
def test_every_verb_takes_the_detectors_of_other_papers(model, options, changed, tmp_path):
    folder, found = tmp_path / "run", tmp_path / "found"
    words, changes = ([f"{key}={value}" for key, value in pairs.items()] for pairs in (options, changed))
    assert run("train", "--model", model, "--data", SCENES, *PLAIN, *words, "--epochs", 1, "--output", folder) == 0
    result = read(folder, "result.json")
    assert result["model"] == {"name": model, "num_classes": 6, "backbone": "tiny", **options}

    used = ["--checkpoint", folder, "--data", SCENES, *DETECT]
    assert run("eval", *used) == 0
    assert read(folder, "eval.json")["metrics"] == result["metrics"]
    assert run("eval", *used, "--output", tmp_path / "changed.json", *changes) == 0
    assert read(tmp_path, "changed.json")["model"] == {**result["model"], **changed}
    assert run("predict", *used, "--output", found, "--draw", 1, "score_threshold=0.0", "max_detections=5") == 0
    assert len(read(found, "results.json")) == 4 * 5
    assert run("diagnose", *used, "--bootstrap", 0, "--output", tmp_path / "why", "score_threshold=0.0") == 0
    assert read(tmp_path, "why", "diagnosis.json")["num_detections"] > 4 * 5
    assert run("train", "--model", model, "--data", SCENES, *PLAIN, *words, "no_such=1", "--output", found) == 2


def test_show_draws_data_priors_and_assignments(trained, tmp_path):
    assert run("show", "--data", SCENES, "--count", 1, "--output", tmp_path / "data") == 0
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["boxes_000000.png"]
    words = ["show", "--data", SCENES, "--count", 1, "--first", 2, "--output"]
    assert run(*words, tmp_path / "run", "--checkpoint", trained, "--split", "test") == 0
    assert run(*words, tmp_path / "model", "--model", "retinanet", "anchor_base=2.0") == 0
    for folder in ("run", "model"):
        names = sorted(path.name for path in (tmp_path / folder).iterdir())
        assert names == ["assignment_000002.png", "boxes_000002.png", "priors_000002.png", "show.json"]
    counts = read(tmp_path, "model", "show.json")["2"]
    assert sum(counts.values()) == 9 * (64 + 16 + 4 + 1 + 1)  # nine anchors a cell of strides 8 to 128
    assert counts["positive"] > 0


# --- data with faults


def save_pictures(folder, names):
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    for name in names:
        Image.fromarray(pixels).save(folder / name)


@pytest.fixture
def coco(tmp_path):
    """Five pictures to train on and three to test on; ids with gaps."""
    root = tmp_path / "set"
    save_pictures(root / "images", [f"{i}.jpg" for i in range(1, 9)])
    categories = [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}, {"id": 20, "name": "cow"}]
    for split, ids in (("train", range(1, 6)), ("test", range(6, 9))):
        images = [{"id": i, "file_name": f"images/{i}.jpg", "width": 40, "height": 30} for i in ids]
        objects = [
            {"id": 100 + i, "image_id": i, "category_id": (3, 17)[i % 2], "bbox": [4, 5, 20 + i, 15]} for i in ids
        ]
        (root / f"instances_{split}.json").write_text(
            json.dumps({"images": images, "categories": categories, "annotations": objects})
        )
    return root


def truncate(file):
    file.write_bytes(file.read_bytes()[:-200])


def change_object(coco, number, **values):
    file = coco / "instances_train.json"
    content = read(file)
    content["annotations"][number] |= values
    file.write_text(json.dumps(content))


COCO_FAULTS = {
    "inverted box": (
        lambda coco: change_object(coco, 0, bbox=[20, 5, -9, 15]),
        r"instances_train\.json: annotation id 101 .*bbox must be .*\[20, 5, -9, 15\]",
    ),
    "unknown class": (
        lambda coco: change_object(coco, 1, category_id=4),
        r"instances_train\.json: annotation id 102 .*category_id must be .*got 4",
    ),
    "missing picture": (
        lambda coco: (coco / "images/3.jpg").unlink(),
        r"instances_train\.json: image id 3: .*3\.jpg is not there",
    ),
    "truncated JPEG": (
        lambda coco: truncate(coco / "images/4.jpg"),
        r"4\.jpg \(image id 4\) must be a whole picture",
    ),
}

VOC_OBJECT = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>4</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object>"
)


def write_xml(root, name, *objects):
    """One object a line, from line 3 on."""
    size = "<size><width>40</width><height>30</height></size>"
    lines = ["<annotation>", size, *(VOC_OBJECT.format(*one) for one in objects), "</annotation>"]
    (root / f"VOC2007/Annotations/{name}.xml").write_text("\n".join(lines))


@pytest.fixture
def voc(tmp_path):
    """VOC2007 with five pictures to train on and two to test on."""
    root = tmp_path / "VOCdevkit"
    names = [f"00000{i}" for i in range(1, 8)]
    save_pictures(root / "VOC2007/JPEGImages", [f"{name}.jpg" for name in names])
    for folder in ("Annotations", "ImageSets/Main"):
        (root / "VOC2007" / folder).mkdir(parents=True)
    for name in names:
        write_xml(root, name, ("cat", 3), ("dog", 5))
    (root / "VOC2007/ImageSets/Main/trainval.txt").write_text("\n".join(names[:5]))
    (root / "VOC2007/ImageSets/Main/test.txt").write_text("\n".join(names[5:]))
    return root


VOC_FAULTS = {
    "inverted box": (
        lambda voc: write_xml(voc, "000001", ("cat", 3), ("dog", 35)),
        r"000001\.xml line 4: .*object 2",
    ),
    "unknown class": (
        lambda voc: write_xml(voc, "000002", ("dgo", 3)),
        r"000002\.xml line 3: name .*got 'dgo'\. Did you mean dog\?",
    ),
    "missing picture": (
        lambda voc: (voc / "VOC2007/JPEGImages/000003.jpg").unlink(),
        r"trainval\.txt line 3: 000003 must have a picture",
    ),
    "truncated JPEG": (
        lambda voc: truncate(voc / "VOC2007/JPEGImages/000004.jpg"),
        r"000004\.jpg \(image id 4\) must be a whole picture",
    ),
}


def train_on(data, folder, *more):
    words = ["--data", data, *PLAIN, "--size", 64, "--epochs", 1, "--output", folder]
    return run("train", "--model", "retinanet", *words, *more)


@pytest.mark.parametrize("fault", COCO_FAULTS)
def test_a_fault_of_a_coco_file_is_named(fault, coco, tmp_path, capsys):
    spoil, message = COCO_FAULTS[fault]
    spoil(coco)
    assert train_on(f"coco-json:{coco}", tmp_path / "run") == 2
    told = capsys.readouterr().err
    assert told.startswith("detcore: error: ")
    assert re.search(message, told)
    assert "Traceback" not in told


@pytest.mark.parametrize("fault", VOC_FAULTS)
def test_a_fault_of_a_voc_file_is_named(fault, voc, tmp_path, capsys):
    spoil, message = VOC_FAULTS[fault]
    spoil(voc)
    assert train_on(f"voc:{voc}", tmp_path / "run") == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("kind", ["coco-json", "voc"])
def test_bad_data_is_checked_and_skipped(kind, request, tmp_path, capsys):
    root = request.getfixturevalue(kind.partition("-")[0])
    data = f"{kind}:{root}"
    assert run("data", "check", data) == 0
    assert "train: " in capsys.readouterr().out
    faults = {"coco-json": COCO_FAULTS, "voc": VOC_FAULTS}[kind]
    for spoil, _ in faults.values():
        spoil(root)
    assert run("data", "check", data) == 1
    told = capsys.readouterr().out
    assert "4 faults" in told
    assert all(re.search(message, told) for _, message in faults.values())

    assert train_on(data, tmp_path / "run", "--skip-bad") == 0
    assert "4 faults left out" in capsys.readouterr().out
    described = read(tmp_path, "run", "result.json")["data"]
    assert described["train"]["num_skipped"] == 4
    assert all(re.search(message, "\n".join(described["train"]["skipped"])) for _, message in faults.values())
    assert described["train"]["pictures"] == 3
    assert described["test"]["num_skipped"] == 0


def test_data_lists_what_can_be_downloaded(capsys):
    assert run("data", "list") == 0
    assert re.search(r"voc2007 +0\.9 GB +voc2007-trainval \+ voc2007-test", capsys.readouterr().out)
    assert run("data", "download", "voc1066") == 2
    assert "name must be one of voc2007, voc2012" in capsys.readouterr().err


# --- mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trane"], "VERB must be one of train, eval"),
        (["train", "--model", "retinanot", "--data", SCENES], "must be one of .*'iou_aware_retinanet', .*'retinanet'"),
        ([*TRAIN, "anchorbase=2"], r"has no option anchorbase; it has .*'anchor_base'"),
        ([*TRAIN, "anchor_base"], "must be KEY=VALUE"),
        ([*TRAIN, "--lr", "-1"], "TrainConfig: lr must be > 0"),
        ([*TRAIN, "--size", "64", "--short-side", "64"], "--size warps to a square"),
        ([*TRAIN, "--long-side", "64"], "must come with --short-side"),
        ([*TRAIN, "--batch-size", "0"], "--batch-size must be >= 1"),
        ([*TRAIN, "--threads", "0"], "--threads must be >= 1"),
        ([*TRAIN, "--only-with-objects"], "is for pictures from files"),
        (["train", "--model", "retinanet", "--data", "kitti:x", *PLAIN], "spec must be voc:DIR"),
        (["train", "--model", "retinanet", "--data", "coco-json:nowhere.json", *PLAIN], "nowhere.json does not exist"),
        (["eval", "--checkpoint", "nowhere.pt", "--data", SCENES], "nowhere.pt, which does not exist"),
        (["predict", "--checkpoint", "nowhere.pt"], "either pictures or --data"),
        (["predict", "--checkpoint", "nowhere.pt", "a.png", "--truth"], "--truth must come with --data"),
        (["diagnose", "--gt", "a.json"], "takes either --gt and --detections .* got --gt"),
        (["diagnose", "--gt", "a.json", "--detections", "b.json", "nms_iou=1"], "must come with --checkpoint"),
        (["show", "--data", SCENES, "anchor_base=2.0"], "must come with --model or --checkpoint"),
        (["show", "--data", SCENES, "--first", "12"], r"--first must be in \[0, 12\)"),
    ],
)
def test_a_mistake_is_one_message(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    told = capsys.readouterr().err
    assert told.startswith("detcore: error: ")
    assert re.search(message, told), told
    assert "Traceback" not in told


def test_an_unknown_flag_is_refused(capsys):
    assert run(*TRAIN, "--epoch", "2") == 2
    assert "--epochs" in capsys.readouterr().err  # what was meant


def test_debug_shows_where(trained, capsys):
    assert run("eval", "--checkpoint", trained, "--data", "kitti:x", "--debug", *DETECT) == 2
    assert "Traceback" in capsys.readouterr().err


def test_another_run_is_not_overwritten(trained, capsys):
    before = (trained / "last.pt").read_bytes()
    assert run(*TRAIN, "--output", trained) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert (trained / "last.pt").read_bytes() == before


def test_foreign_files_are_no_checkpoints(trained, tmp_path, capsys):
    file = tmp_path / "weights.pt"
    torch.save({"weight": torch.zeros(1)}, file)
    assert run("eval", "--checkpoint", file, "--data", SCENES) == 2
    assert "must be a checkpoint of detcore" in capsys.readouterr().err
    assert run("eval", "--checkpoint", trained, "--data", SCENES, "channels=32", *DETECT) == 2
    assert "must not change the weights" in capsys.readouterr().err


def test_a_diverging_run_names_step_and_images(tmp_path, capsys):
    assert run(*TRAIN, "--lr", "1e30", "--epochs", 2, "--output", tmp_path / "run") == 2
    assert re.search(r"error: train: every loss .* at step 2 .*Images: \[\d+", capsys.readouterr().err)


def test_classes_of_the_checkpoint_must_be_in_the_data(trained, coco, capsys):
    assert run("eval", "--checkpoint", trained, "--data", f"coco-json:{coco}", *DETECT) == 2
    assert "classes must be different names out of cat, dog, cow" in capsys.readouterr().err


def test_a_command_leaves_no_handler_behind(capsys):
    before = list(logging.getLogger("detcore").handlers)
    run("data", "list")
    assert logging.getLogger("detcore").handlers == before
    capsys.readouterr()
