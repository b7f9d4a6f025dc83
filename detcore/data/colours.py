"""SSD's change of colours: brightness, contrast, saturation and hue of one picture, or of a batch at once.

Everything here runs in float32 between two conversions, on the device of the pictures.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

__all__ = ["PhotometricDistort", "change_colours", "draw_colours"]

GREY = (0.2989, 0.587, 0.114)
"""Red, green and blue of a picture's grey, as torchvision mixes it."""

NEUTRAL = (0.0, 1.0, 1.0, 0.0, 1.0)
"""What changes nothing, in the order of :func:`draw_colours`."""

PIXELS_AT_ONCE = 1 << 15  # with more, the system hands out and clears memory for every operation, for twice the time


def draw_colours(chance: Float[Tensor, "B 9"]) -> Float[Tensor, "B 5"]:
    """What becomes of the colours of B pictures: shift, factor, saturation, turn, factor, applied in this order.

    Ranges are those of SSD's Caffe code, each with probability 0.5: brightness shifted by up to 32 of 255,
    contrast and saturation times [0.5, 1.5], hue turned by up to a tenth of the circle, 36 degrees (18 on OpenCV's
    half circle). Contrast comes before or after the other two with equal chance: one of the two factors is 1.

    Args:
        chance: uniform in [0, 1).

    Example:
        >>> draw_colours(torch.full((1, 9), 0.75)).tolist()  # 0.75 is above 0.5: left alone
        [[0.0, 1.0, 1.0, 0.0, 1.0]]
        >>> [round(number, 2) for number in draw_colours(torch.full((1, 9), 0.25))[0].tolist()]
        [-16.0, 0.75, 0.75, -0.05, 1.0]

    Reference: Liu et al., SSD, ECCV 2016, section 2.2, after Howard, arXiv:1312.5402.
    """
    drawn, size, contrast_first = chance[:, :4] < 0.5, 2 * chance[:, 4:8] - 1, chance[:, 8] < 0.5
    size = torch.where(drawn, size, 0.0)
    shift, factor, saturation, turn = 32 * size[:, 0], 1 + 0.5 * size[:, 1], 1 + 0.5 * size[:, 2], 0.1 * size[:, 3]
    first, last = torch.where(contrast_first, factor, 1.0), torch.where(contrast_first, 1.0, factor)
    return torch.stack([shift, first, saturation, turn, last], 1)


def change_colours(
    images: UInt8[Tensor, "B 3 H W"], changes: Float[Tensor, "B 5"], *, spare: tuple[int, int, int] | None = None
) -> UInt8[Tensor, "B 3 H W"]:
    """Change the colours of a batch, each picture's by its own numbers, without reading any of them on the host.

    Values are cut to 0..255 after every change and rounded once, at the end.

    Args:
        images: red, green, blue.
        changes: shift of brightness, factor, saturation, turn of the hue by at most a sixth of the circle, and
            second factor, in this order; see :func:`draw_colours`.
        spare: pixels of exactly this colour stay as they are: the filling around pictures, known by its colour.

    Example:
        >>> orange = torch.tensor([200, 100, 0], dtype=torch.uint8).view(1, 3, 1, 1)
        >>> change_colours(orange, torch.tensor([[0.0, 1.0, 1.0, 1 / 6, 1.0]])).flatten().tolist()
        [100, 200, 0]
    """
    numbers = changes.to(torch.float32).T[..., None, None, None]
    changed = _change(images, *numbers)
    if spare is None:
        return changed
    r, g, b = (images[:, c] == value for c, value in enumerate(spare))
    return torch.where((r & g & b)[:, None], images, changed)


def _change(
    image: Tensor,
    shift: float | Tensor,
    first: float | Tensor,
    saturation: float | Tensor,
    turn: float | Tensor,
    last: float | Tensor,
) -> Tensor:
    """The changed picture or batch; a number that is known to be neutral costs nothing."""
    pixels = image.to(torch.float32, memory_format=torch.contiguous_format)
    if _matters(shift, 0.0):
        pixels.add_(shift).clamp_(0, 255)
    if _matters(first, 1.0):
        pixels.mul_(first).clamp_(0, 255)
    if _matters(saturation, 1.0):
        r, g, b = pixels.unbind(-3)
        grey = (GREY[0] * r).add_(g, alpha=GREY[1]).add_(b, alpha=GREY[2]).unsqueeze(-3)
        pixels.mul_(saturation).add_(grey.mul_(1 - saturation)).clamp_(0, 255)
    if _matters(turn, 0.0):
        _turn_hue(pixels, 6 * turn)
    if _matters(last, 1.0):
        pixels.mul_(last).clamp_(0, 255)
    return pixels.add_(0.5).to(torch.int16).to(torch.uint8)  # straight to uint8 takes three times as long


def _matters(value: float | Tensor, neutral: float) -> bool:
    return isinstance(value, Tensor) or value != neutral


def _turn_hue(pixels: Tensor, turn: float | Tensor) -> None:
    """Add ``turn`` sixths of the circle, in [-1, 1], to the hue in HSV, in place.

    A colour lies between its smallest channel, ``low``, and its largest; how much of that way each channel goes
    depends on the hue alone: all of it within one sixth of its own hue, none from two sixths on.
    """
    r, g, b = pixels.unbind(-3)
    low = torch.minimum(r, g).minimum(b)
    high = torch.maximum(r, g).maximum(b)
    way = high - low
    # The hue in sixths, from -1 to 5, times the way; where it is 0 the pixel is grey and any hue will do. The weights
    # are 0 or 1, and lerp with them is exact: on a processor torch.where takes ten times as long.
    at_r, at_g, at_b = g - b, (b - r).add_(way, alpha=2), (r - g).add_(way, alpha=4)
    at_g.lerp_(at_b, (high - g).sign_())
    hue = at_r.lerp_(at_g, high.sub_(r).sign_())
    hue.div_(way.clamp(min=1e-6)).add_(turn[..., 0, :, :] if isinstance(turn, Tensor) else turn)
    # Distance to the hue of red (0 and 6), green (2) and blue (4 and -2); hue is in [-2, 6] here.
    for channel, distance in (
        (r, (hue - 3).abs_().sub_(3).abs_()),
        (g, (hue - 2).abs_()),
        (b, (hue - 1).abs_().sub_(3).abs_()),
    ):
        torch.addcmul(low, way, distance.neg_().add_(2).clamp_(0, 1), out=channel)


class PhotometricDistort(nn.Module):
    """Brightness, contrast, saturation and hue of a picture, each changed with probability 0.5.

    Ranges and order are those of :func:`draw_colours`, and the arithmetic is that of :func:`change_colours`.

    Example:
        >>> tuple(PhotometricDistort()(torch.zeros(3, 4, 5, dtype=torch.uint8)).shape)
        (3, 4, 5)

    Reference: Liu et al., SSD, ECCV 2016, section 2.2, after Howard, arXiv:1312.5402.
    Deviation: saturation mixes with grey instead of scaling HSV's S.
    """

    def forward(self, image: Tensor) -> Tensor:
        """The distorted picture, uint8 (3, H, W) as the one given."""
        changes = draw_colours(torch.rand(1, 9))[0].tolist()
        pixels = image.as_subclass(Tensor)
        if tuple(changes) == NEUTRAL:
            return pixels
        changed = torch.empty_like(pixels)
        rows = max(1, PIXELS_AT_ONCE // pixels.shape[-1])
        for part, result in zip(pixels.split(rows, dim=1), changed.split(rows, dim=1), strict=True):
            result.copy_(_change(part, *changes))
        return changed
