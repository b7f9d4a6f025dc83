import json

import pytest
import torch
from PIL import Image

from benchmarks.padding import BATCHES, SIDES, filling, main
from detcore.data.buckets import Buckets


def test_padding_of_two_shapes_by_hand():
    # 64 x 32 and 32 x 64: together 64 x 64, half of it empty; each alone fills its canvas
    sizes = torch.tensor([[64, 32], [32, 64]] * 20)
    share, shapes = filling(sizes, 40, None)
    assert (share, shapes) == (0.5, 1)
    buckets = Buckets(((64, 32), (32, 64)), torch.tensor([0, 1] * 20))
    assert filling(sizes, 20, buckets) == (0.0, 2)
    # 32 x 32 in canvases of 32 x 64: half again, though all are alike
    small = torch.full((8, 2), 32)
    assert filling(small, 4, Buckets(((32, 64),), torch.zeros(8, dtype=torch.int64))) == (0.5, 1)


def test_command_counts_a_data_set(tmp_path, capsys):
    images = []
    for number, (width, height) in enumerate([(40, 30), (30, 40)] * 4, start=1):
        Image.new("RGB", (width, height)).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
    boxes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0} for i in range(1, 9)
    ]
    file = tmp_path / "instances_train.json"
    file.write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}))
    rows = main([f"coco-json:{file}", "--output", str(tmp_path / "padding.json")])
    assert [(row["short_side"], row["batch"]) for row in rows] == [(s, b) for s, _ in SIDES for b in BATCHES]
    stored = json.loads((tmp_path / "padding.json").read_text())
    assert stored["rows"] == rows
    assert str(tmp_path) not in (tmp_path / "padding.json").read_text()
    all_together = rows[1]  # 800 x 600 and 600 x 800 in 800 x 800
    assert all_together["mixed_padding"] == pytest.approx(1 - 480_000 / 640_000, abs=1e-3)
    assert all_together["grouped_padding"] == all_together["mixed_padding"]  # four of a kind fill no batch of eight
    assert rows[0]["grouped_padding"] == pytest.approx(1 - 600 / 608, abs=1e-3)
    assert "times fewer pixels" in capsys.readouterr().out
