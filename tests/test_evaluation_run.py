from types import SimpleNamespace

import pytest
import torch
from torch import nn

from detcore.evaluation.coco import CocoEvaluator
from detcore.evaluation.run import Evaluator, collect, evaluate, rescale_boxes
from detcore.evaluation.voc import VocEvaluator
from detcore.structures import Detections


class Dataset:
    """Two pictures of 100 by 200 and 300 by 150 pixels with one object each, and one without."""

    targets = (
        {"boxes": torch.tensor([[20.0, 10.0, 180.0, 90.0]]), "labels": torch.tensor([0])},
        {"boxes": torch.tensor([[15.0, 30.0, 75.0, 240.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    )

    def target(self, index):
        return self.targets[index]


class Seer(nn.Module):
    """Finds one object a picture, where its brightness says; remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
        self.calls = []

    def detect(self, images, sizes):
        self.calls.append((self.training, torch.is_grad_enabled(), tuple(images.shape), sizes.tolist()))
        # The first pixels of the red channel hold the box, as shares of the picture's sides.
        height, width = sizes.float().unbind(1)
        boxes = images[:, 0, 0, :4] * torch.stack([width, height, width, height], dim=1)
        label = images[:, 1, 0, 0].long()
        shown = images[:, 2, 0, 0] > 0
        return Detections(
            boxes[:, None], torch.where(shown, 0.9, 0.0)[:, None], torch.where(shown, label, -1)[:, None],
            shown[:, None], quality=torch.full((len(images), 1), 0.5),
        )  # fmt: skip


def batch(indices, sizes, originals, shares, labels):
    images = torch.zeros(len(indices), 3, 64, 64)
    for i, (share, label) in enumerate(zip(shares, labels, strict=True)):
        images[i, 0, 0, :4] = torch.tensor(share)
        images[i, 1, 0, 0] = max(label, 0)
        images[i, 2, 0, 0] = label >= 0
    return SimpleNamespace(
        images=images,
        sizes=torch.tensor(sizes),
        original_sizes=torch.tensor(originals),
        indices=torch.tensor(indices),
        image_ids=torch.tensor(indices) + 40,
    )


def loader():
    """The third picture first; sides resized, each by its own factor."""
    shown = [(0.1, 0.1, 0.9, 0.9), (0.1, 0.1, 0.5, 0.8)]
    return [
        batch([2, 0], [[64, 64], [32, 60]], [[50, 50], [100, 200]], [(0.0,) * 4, shown[0]], [-1, 0]),
        batch([1], [[60, 30]], [[300, 150]], shown[1:], [1]),
    ]


def test_collect_gives_original_pixels_in_the_loaders_order():
    detections, targets = collect(Seer(), loader(), Dataset(), progress=False)
    assert [len(d["boxes"]) for d in detections] == [0, 1, 1]
    assert [t is Dataset.targets[i] for t, i in zip(targets, (2, 0, 1), strict=True)] == [True] * 3
    for found, truth in zip(detections[1:], targets[1:], strict=True):
        torch.testing.assert_close(found["boxes"], truth["boxes"])
        torch.testing.assert_close(found["labels"], truth["labels"])
    assert set(detections[0]) == {"boxes", "scores", "labels", "quality"}


@pytest.mark.parametrize("evaluator", [CocoEvaluator(2), VocEvaluator(2)])
def test_evaluate_resets_and_computes(evaluator):
    assert isinstance(evaluator, Evaluator)
    wrong = {"boxes": [[0, 0, 1, 1]], "labels": [0], "scores": [1.0]}
    evaluator.update([wrong], [{"boxes": [[5, 5, 9, 9]], "labels": [0]}])
    assert evaluate(Seer(), loader(), Dataset(), evaluator, progress=False)["AP"] == pytest.approx(1)
    assert evaluate(Seer(), loader()[1:], Dataset(), evaluator, progress=False)["AP"] == pytest.approx(1)


def test_the_detector_runs_in_evaluation_mode_without_gradients():
    model = Seer()
    collect(model, loader(), Dataset(), progress=False)
    assert model.calls == [
        (False, False, (2, 3, 64, 64), [[64, 64], [32, 60]]),
        (False, False, (1, 3, 64, 64), [[60, 30]]),
    ]
    assert torch.is_grad_enabled()


def test_every_module_gets_its_own_mode_back():
    model = Seer().train()
    model.norm.eval()  # a frozen batch norm in a model that trains
    collect(model, loader(), Dataset(), progress=False)
    assert [m.training for m in (model, model.norm, model.head, model.head[1])] == [True, False, True, True]
    collect(model.eval(), loader(), Dataset(), progress=False)
    assert not any(m.training for m in model.modules())


def test_modes_come_back_also_after_an_error():
    model = Seer().train()
    with pytest.raises(ValueError, match="num_classes = 1; got 1") as caught:
        evaluate(model, loader(), Dataset(), CocoEvaluator(1), progress=False)
    assert model.training, caught


def test_a_batch_must_know_its_pictures():
    lost = loader()
    lost[0].indices = torch.tensor([-1, 0])
    with pytest.raises(ValueError, match=r"positions in the dataset; got \[-1, 0\]"):
        collect(Seer(), lost, Dataset(), progress=False)


def test_the_bar_shows_only_if_wanted(capsys):
    collect(Seer(), loader(), Dataset(), progress=False)
    assert capsys.readouterr().err == ""
    collect(Seer(), loader(), Dataset(), progress=True)
    assert "evaluate" in capsys.readouterr().err


def test_the_device_is_asked_for_or_the_models():
    class Nowhere(Seer):  # no parameters at all
        def __init__(self):
            nn.Module.__init__(self)
            self.calls = []

    detections, _ = collect(Nowhere(), loader(), Dataset(), progress=False)
    assert detections[1]["boxes"].device.type == "cpu"
    with pytest.raises(RuntimeError, match="device"):
        collect(Seer(), loader(), Dataset(), device="nowhere", progress=False)


def test_rescale_boxes_scales_each_side_by_its_own_factor():
    boxes = torch.tensor([[3.0, 8.0, 30.0, 32.0]])
    out = rescale_boxes(boxes, torch.tensor([32, 60]), torch.tensor([100, 200]))
    torch.testing.assert_close(out, torch.tensor([[10.0, 25.0, 100.0, 100.0]]))
    same = rescale_boxes(boxes, torch.tensor([37, 41]), torch.tensor([37, 41]))
    assert torch.equal(same, boxes)
