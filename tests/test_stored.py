"""Stored outputs: what pruning must not change, what a file keeps, and what it refuses."""

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from detcore.postprocess import select_by_prior
from detcore.scoring import fused_score
from detcore.stored import StoredOutputs, load_outputs, prune, save_outputs
from detcore.structures import Predictions, Priors

SIZES = torch.tensor([[60, 80], [80, 70]])


def outputs(seed=0, *, num_classes=3, counts=(40, 20, 0, 5)):
    """Two pictures of chance predictions, mostly unlikely ones, with boxes that stick out."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(counts)
    corner = torch.rand(2, total, 2, generator=generator) * 70 - 8
    boxes = torch.cat([corner, corner + 3 + 30 * torch.rand(2, total, 2, generator=generator)], dim=-1)
    logits = (3 * torch.randn(2, total, num_classes, generator=generator) - 8).clamp(-15, 15)
    quality = {"iou": torch.randn(2, total, 1, generator=generator)}
    pred = Predictions(logits, torch.zeros(2, total, 4), boxes, Priors(boxes, counts), quality)
    dog = {
        "boxes": torch.tensor([[1.5, 2.25, 30.0, 40.0]]),
        "labels": torch.tensor([2]),
        "ignore": torch.tensor([True]),
    }
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return StoredOutputs(pred, SIZES, [dog, none], {"seed": seed})


def found(stored, u=0.5, v=0.5, threshold=0.05, nms_iou=0.5):
    return stored.detect(
        partial(fused_score, class_power=u, quality_power=v),
        partial(select_by_prior, score_threshold=threshold, nms_iou=nms_iou),
    )


def pruned(stored, floor):
    return StoredOutputs(prune(stored.pred, floor), stored.sizes, stored.targets, stored.about)


@pytest.mark.parametrize(
    ("u", "v", "threshold"), [(0.5, 0.5, 0.05), (1.0, 0.0, 0.0025), (1.0, 1.0, 0.01), (0.6, 0.4, 0.1)]
)
def test_pruning_changes_no_detection_above_the_floors_threshold(u, v, threshold):
    whole = outputs()
    less = pruned(whole, 0.0025)
    assert less.pred.logits.shape[1] < whole.pred.logits.shape[1]
    for before, after in zip(found(whole, u, v, threshold), found(less, u, v, threshold), strict=True):
        assert len(before["labels"]) > 1
        for name, values in before.items():
            assert_close(after[name], values, rtol=1e-6, atol=1e-7)


def test_pruning_does_cut_where_the_class_power_is_small():
    whole = outputs()
    counts = [sum(len(each["labels"]) for each in found(kept, 0.2, 0.8)) for kept in (whole, pruned(whole, 0.0025))]
    assert counts[0] > counts[1] > 0


def test_pruned_rows_keep_their_order_their_level_and_only_likely_classes():
    whole = outputs()
    left = prune(whole.pred, 0.05)
    for picture in range(2):
        start, begin = 0, 0
        for count, width in zip(whole.pred.priors.counts, left.priors.counts, strict=True):
            rows = [i for i in range(start, start + count) if whole.pred.logits[picture, i].sigmoid().max() > 0.05]
            mine = slice(begin, begin + len(rows))
            assert_close(left.boxes[picture, mine], whole.pred.boxes[picture, rows])
            logits = whole.pred.logits[picture, rows]
            assert_close(left.logits[picture, mine], torch.where(logits.sigmoid() > 0.05, logits, -math.inf))
            assert_close(left.extras["iou"][picture, mine], whole.pred.extras["iou"][picture, rows])
            assert left.logits[picture, begin + len(rows) : begin + width].eq(-math.inf).all()
            start, begin = start + count, begin + width


def test_a_file_gives_back_what_was_stored_within_its_steps(tmp_path):
    stored = pruned(outputs(), 0.01)
    path = tmp_path / "new" / "outputs.npz"
    save_outputs(path, stored)
    again = load_outputs(path)
    assert [file.name for file in path.parent.iterdir()] == ["outputs.npz"]  # and no draft beside it
    assert again.about == {"seed": 0}
    assert again.pred.priors.counts == stored.pred.priors.counts
    assert_close(again.sizes, SIZES)
    used = stored.pred.logits.isfinite()
    assert again.pred.logits.isfinite().equal(used)
    assert_close(again.pred.logits[used], stored.pred.logits[used], rtol=0, atol=1 / 2040)
    slots = used.any(-1)
    assert_close(again.pred.extras["iou"][slots], stored.pred.extras["iou"][slots], rtol=0, atol=1 / 2040)
    limit = SIZES.flip(1).repeat(1, 2)[:, None].float()  # x y x y
    clipped = torch.minimum(stored.pred.boxes.clamp(min=0), limit)
    assert_close(again.pred.boxes[slots], clipped[slots], rtol=0, atol=1 / 250)
    dog, none = again.targets
    assert (dog["boxes"].tolist(), dog["labels"].tolist(), dog["ignore"].tolist()) == (
        [[1.5, 2.25, 30.0, 40.0]],
        [2],
        [True],
    )
    assert (tuple(none["boxes"].shape), none["labels"].tolist()) == ((0, 4), [])


def test_a_loaded_file_finds_what_the_detector_finds(tmp_path):
    whole = outputs(1)
    save_outputs(tmp_path / "outputs.npz", pruned(whole, 0.0025))
    for before, after in zip(found(whole), found(load_outputs(tmp_path / "outputs.npz")), strict=True):
        assert before["labels"].equal(after["labels"])
        assert_close(after["boxes"], before["boxes"], rtol=0, atol=1 / 250)
        assert_close(after["scores"], before["scores"], rtol=0, atol=1e-3)
        assert_close(after["quality"], before["quality"], rtol=0, atol=1e-3)


def test_large_pictures_are_stored_coarser(tmp_path):
    whole = outputs()
    large = StoredOutputs(whole.pred, 40 * SIZES, whole.targets, {})
    save_outputs(tmp_path / "outputs.npz", large)
    step = 1 / (65535 // 3200)
    again = load_outputs(tmp_path / "outputs.npz").pred.boxes
    assert_close(again, whole.pred.boxes.clamp(min=0), rtol=0, atol=step / 2)
    assert not again.equal(whole.pred.boxes.clamp(min=0))


def test_a_file_can_be_read_from_memory(tmp_path):
    save_outputs(tmp_path / "outputs.npz", outputs())
    with (tmp_path / "outputs.npz").open("rb") as file:
        assert load_outputs(file).about == {"seed": 0}


def test_what_does_not_fit_is_refused(tmp_path):
    whole = outputs()
    with pytest.raises(ValueError, match="prune: floor must be in"):
        prune(whole.pred, 1.0)
    loud = Predictions(whole.pred.logits + 40, whole.pred.deltas, whole.pred.boxes, whole.pred.priors, {})
    with pytest.raises(ValueError, match="logits must be in"):
        save_outputs(tmp_path / "outputs.npz", StoredOutputs(loud, SIZES, whole.targets, {}))
    pair = {"iou": torch.zeros(2, 65, 2)}
    double = Predictions(whole.pred.logits, whole.pred.deltas, whole.pred.boxes, whole.pred.priors, pair)
    with pytest.raises(ValueError, match="one number a prior; got 2"):
        save_outputs(tmp_path / "outputs.npz", StoredOutputs(double, SIZES, whole.targets, {}))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "other.npz").write_text("not an archive")
    with pytest.raises(ValueError, match="load_outputs: file must be"):
        load_outputs(tmp_path / "other.npz")
