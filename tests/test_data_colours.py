import itertools

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from detcore.data import colours
from detcore.data.batch import PAD_COLOUR
from detcore.data.colours import PhotometricDistort, change_colours, draw_colours

# Every colour on a grid of 6 x 6 x 6, the greys and the corners of the cube among them.
CUBE = torch.tensor(list(itertools.product(range(0, 256, 51), repeat=3)), dtype=torch.uint8).T.reshape(3, 12, 18)
NOTHING = [0.0, 1.0, 1.0, 0.0, 1.0]


def by_torchvision(image, shift, first, saturation, turn, last):
    """The same changes one after another, in floats."""
    pixels = (image.float() / 255 + shift / 255).clamp(0, 1)
    pixels = (pixels * first).clamp(0, 1)
    pixels = F.adjust_saturation(pixels, saturation)
    pixels = F.adjust_hue(pixels, turn)
    return (pixels * last).clamp(0, 1) * 255


@pytest.mark.parametrize(
    "change",
    [
        NOTHING,
        [31.0, 1.0, 1.0, 0.0, 1.0],
        [-32.0, 1.0, 1.0, 0.0, 1.0],
        [0.0, 1.5, 1.0, 0.0, 1.0],
        [0.0, 1.0, 0.5, 0.0, 1.0],
        [0.0, 1.0, 1.5, 0.0, 1.0],
        [0.0, 1.0, 1.0, 0.1, 1.0],
        [0.0, 1.0, 1.0, -0.1, 1.0],
        [0.0, 1.0, 1.0, 1 / 6, 1.0],
        [0.0, 1.0, 1.0, -1 / 6, 1.0],
        [0.0, 1.0, 1.0, 0.0, 0.5],
        [20.0, 0.7, 1.3, -0.07, 1.0],
        [-11.0, 1.0, 0.6, 0.04, 1.4],
    ],
)
def test_colours_change_as_torchvision_changes_them(change):
    wanted = by_torchvision(CUBE, *change)
    [batched] = change_colours(CUBE[None], torch.tensor([change]))
    for mine in (batched, colours._change(CUBE, *change)):
        assert mine.dtype == torch.uint8
        assert (mine.float() - wanted).abs().max() < 0.502  # rounded once
    assert change == NOTHING or not torch.equal(batched, CUBE)


def test_colours_of_a_batch_are_those_of_its_pictures():
    torch.manual_seed(0)
    images = torch.randint(256, (40, 3, 9, 11), dtype=torch.uint8)
    changes = draw_colours(torch.rand(40, 9))
    together = change_colours(images, changes)
    singly = torch.stack([colours._change(i, *c.tolist()) for i, c in zip(images, changes, strict=True)])
    torch.testing.assert_close(together, singly, rtol=0, atol=1)  # a factor is float32 here and a number there
    assert (together != singly).float().mean() < 1e-3
    assert (together != images).any(dim=(1, 2, 3)).sum() > 30


def test_pixels_of_the_spare_colour_stay():
    torch.manual_seed(0)
    image = torch.randint(100, (1, 3, 6, 6), dtype=torch.uint8)
    image[0, :, 2:4, 1:5] = torch.tensor(PAD_COLOUR, dtype=torch.uint8)[:, None, None]
    change = torch.tensor([[30.0, 1.0, 1.0, 0.0, 1.0]])
    kept, all_changed = change_colours(image, change, spare=PAD_COLOUR), change_colours(image, change)
    assert (all_changed == image + 30).all()
    assert torch.equal(kept[0, :, 2:4, 1:5], image[0, :, 2:4, 1:5])
    kept[0, :, 2:4, 1:5] += 30
    assert torch.equal(kept, all_changed)
    almost = (
        torch.tensor(PAD_COLOUR, dtype=torch.uint8).view(1, 3, 1, 1) + torch.tensor([0, 0, 1])[:, None, None].byte()
    )
    assert (change_colours(almost, change, spare=PAD_COLOUR) != almost).all()


def test_draws_have_the_published_numbers():
    torch.manual_seed(0)
    shift, first, saturation, turn, last = draw_colours(torch.rand(20000, 9)).T
    for values, neutral, low, high in (
        (shift, 0.0, -32.0, 32.0),
        (saturation, 1.0, 0.5, 1.5),
        (turn, 0.0, -0.1, 0.1),  # 36 degrees are a tenth of the circle, 18 on OpenCV's half circle
        (first * last, 1.0, 0.5, 1.5),
    ):
        changed = values[values != neutral]
        span = high - low
        assert len(changed) / 20000 == pytest.approx(0.5, abs=4 * 0.5 / 20000**0.5)
        assert low <= changed.min() < low + 0.002 * span
        assert high - 0.002 * span < changed.max() <= high
        assert changed.mean().item() == pytest.approx(neutral, abs=4 * span / 12**0.5 / 10000**0.5)
    assert ((first == 1) | (last == 1)).all()
    assert (first != 1).float().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 20000) ** 0.5)
    together = torch.stack([shift, first * last - 1, saturation - 1, turn]).ne(0).float()
    assert (torch.corrcoef(together) - torch.eye(4)).abs().max() < 4 / 20000**0.5  # each by itself


@pytest.mark.parametrize("pixels_at_once", [1 << 15, 40, 1])
def test_photometric_distort_draws_from_torch_and_changes_the_picture(monkeypatch, pixels_at_once):
    monkeypatch.setattr(colours, "PIXELS_AT_ONCE", pixels_at_once)
    for seed in range(20):
        torch.manual_seed(seed)
        change = draw_colours(torch.rand(1, 9))
        torch.manual_seed(seed)
        mine = PhotometricDistort()(CUBE)
        torch.testing.assert_close(mine, change_colours(CUBE[None], change)[0], rtol=0, atol=1)


def test_photometric_distort_leaves_its_input_alone():
    before = CUBE.clone()
    for seed in range(10):
        torch.manual_seed(seed)
        PhotometricDistort()(CUBE)
    assert torch.equal(CUBE, before)
