"""The door for pictures: any sizes in, one batch out, and the numbers to map boxes back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

__all__ = ["ImageBatch", "ImageInput"]


@dataclass(frozen=True)
class ImageBatch:
    """Pictures of different sizes in one tensor.

    Args:
        images: in [0, 1], padded on the right and at the bottom with the mean colour.
        sizes: (height, width) of each picture inside the batch.
        scales: (x, y) factors each picture was resized by.
    """

    images: Float[Tensor, "B 3 H W"]
    sizes: Int[Tensor, "B 2"]
    scales: Float[Tensor, "B 2"]


class ImageInput(nn.Module):
    """Resize (if asked), pad and normalise pictures, on the device they are on.

    Args:
        mean: colour subtracted, RGB in [0, 1]; also what the padding is filled with, so that it is
            zero after normalisation.
        std: what the rest is divided by.
        divisor: height and width of a batch are padded to multiples of this.
        short_side: pictures given to :meth:`batch` are resized so that their short side has this
            many pixels, unless the long side would exceed ``long_side``. ``None``: left as they are.
        long_side: see ``short_side``.
        warp_side: pictures given to :meth:`batch` are resized to squares of this side, whatever their
            shape, and a batch is not padded.

    Raises:
        ValueError: if only one of ``short_side`` and ``long_side`` is given, or ``warp_side`` with them.

    Example:
        >>> door = ImageInput()
        >>> batch = door.batch([torch.zeros(3, 30, 50), torch.zeros(3, 40, 20)])
        >>> tuple(batch.images.shape), batch.sizes.tolist()
        ((2, 3, 64, 64), [[30, 50], [40, 20]])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        *,
        divisor: int = 32,
        short_side: int | None = None,
        long_side: int | None = None,
        warp_side: int | None = None,
    ) -> None:
        super().__init__()
        if (short_side is None) != (long_side is None):
            raise ValueError(f"ImageInput: give both short_side and long_side, or none; got {short_side}, {long_side}.")
        if warp_side is not None and (short_side is not None or warp_side < 1):
            raise ValueError(
                f"ImageInput: warp_side must be >= 1 and come without short_side; got {warp_side} and {short_side}."
            )
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.dtype = torch.get_default_dtype()
        self.divisor = divisor if warp_side is None else 1
        self.short_side, self.long_side, self.warp_side = short_side, long_side, warp_side

    def _apply(self, fn, recurse: bool = True) -> "ImageInput":
        # follow the model to its device and type, but keep the colours as they are: bfloat16 has no 0.485
        like = fn(torch.empty(0, dtype=self.dtype, device=self.mean.device))
        self.dtype = like.dtype
        return super()._apply(lambda colour: colour.to(like.device), recurse)

    def forward(self, images: Shaped[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Normalised pictures in the model's type, from uint8 in 0..255 or floats in 0..1."""
        scale = 255 if images.dtype == torch.uint8 else 1
        wide = images.to(torch.promote_types(self.dtype, torch.float32))
        return ((wide / scale - self.mean) / self.std).to(self.dtype)

    def batch(self, images: Sequence[Tensor] | Tensor) -> ImageBatch:
        """One batch of pictures (3, h, w), uint8 or float, each of its own size.

        Raises:
            ValueError: if there is no picture, or one is not (3, h, w) or has an empty side.
            TypeError: if one is neither uint8 nor floating point.
        """
        if not len(images):
            raise ValueError("ImageInput: images must hold at least one picture; got none.")
        resized, scales = [], []
        for i, image in enumerate(images):  # the door: pictures come one by one, in different sizes
            picture = self._resize(_checked(i, image))
            scales.append([picture.shape[-1] / image.shape[-1], picture.shape[-2] / image.shape[-2]])
            resized.append(picture)
        sizes = [list(p.shape[-2:]) for p in resized]
        height, width = (-(-max(side) // self.divisor) * self.divisor for side in zip(*sizes, strict=True))
        batch = self.mean.to(resized[0]).expand(len(resized), 3, height, width).clone()
        for i, picture in enumerate(resized):
            batch[i, :, : picture.shape[-2], : picture.shape[-1]] = picture
        device = batch.device
        return ImageBatch(batch, torch.tensor(sizes, device=device), torch.tensor(scales, device=device))

    def _resize(self, image: Tensor) -> Tensor:
        if image.shape[-2:] == (self.warp_side, self.warp_side):
            return image
        if self.warp_side is not None:
            return F.interpolate(image[None], size=(self.warp_side, self.warp_side), mode="bilinear")[0]
        if self.short_side is None or self.long_side is None:
            return image
        sides = image.shape[-2:]
        factor = min(self.short_side / min(sides), self.long_side / max(sides))
        return F.interpolate(image[None], scale_factor=factor, mode="bilinear", recompute_scale_factor=True)[0]


def _checked(i: int, image: Tensor) -> Tensor:
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"ImageInput: images[{i}] must have shape (3, h, w); got {tuple(image.shape)}.")
    if image.dtype == torch.uint8:
        return image.as_subclass(Tensor).float() / 255
    if not image.is_floating_point():
        raise TypeError(f"ImageInput: images[{i}] must be uint8 (0..255) or float (0..1); got {image.dtype}.")
    return image.as_subclass(Tensor)
