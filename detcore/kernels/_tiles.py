"""Maps cut into tiles that overlap, and small matrices applied to every tile at once."""

import functools
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FORMS", "Form", "Grid", "scratch", "transposed"]

Matrix = tuple[tuple[float | int, ...], ...]

BLOCK = 8 * 1024 * 1024
"""Bytes of values that are worked on at once: they shall stay in the cache until they are multiplied."""

TILES = 128
"""And at least so many tiles at once, or the products have too few rows to be fast."""

KEPT = 4 * BLOCK
"""Bytes of memory to work in that are kept for the next call, of each name."""


@dataclass(frozen=True)
class Form:
    """The matrices of one size of tiles.

    Args:
        inputs: B^T, n x n for n - 2 outputs in a row.
        weights: G, n x 3.
        outputs: A^T, (n - 2) x n.
    """

    inputs: Matrix
    weights: Matrix
    outputs: Matrix

    @property
    def step(self) -> int:
        """Outputs of a tile in a row, and so the distance from tile to tile."""
        return len(self.outputs)


FORMS = {
    16: Form(
        inputs=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
        weights=((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
        outputs=((1, 1, 1, 0), (0, 1, -1, -1)),
    ),
    36: Form(
        inputs=(
            (4, 0, -5, 0, 1, 0),
            (0, -4, -4, 1, 1, 0),
            (0, 4, -4, -1, 1, 0),
            (0, -2, -1, 2, 1, 0),
            (0, 2, -1, -2, 1, 0),
            (0, 4, 0, -5, 0, 1),
        ),
        weights=(
            (1 / 4, 0, 0),
            (-1 / 6, -1 / 6, -1 / 6),
            (-1 / 6, 1 / 6, -1 / 6),
            (1 / 24, 1 / 12, 1 / 6),
            (1 / 24, -1 / 12, 1 / 6),
            (0, 0, 1),
        ),
        outputs=((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
    ),
}
"""By the number of products of a tile: four outputs of 16 products, sixteen of 36 (sections 4.1 and 4.2)."""


@dataclass(frozen=True)
class Grid:
    """Tiles that cover a map.

    Args:
        step: outputs of a tile in a row.
        down: rows of tiles.
        right: tiles in a row.
        row_tiles: tiles in a row, of all pictures.
        row_bytes: of the values of a row of tiles.
    """

    step: int
    down: int
    right: int
    row_tiles: int
    row_bytes: int

    @classmethod
    def over(cls, x: Tensor, weights: Tensor) -> "Grid":
        """The tiles that cover a map."""
        step = FORMS[len(weights)].step
        right = -(-x.shape[3] // step)
        row_bytes = len(x) * right * len(weights) * max(weights.shape[1:]) * x.element_size()
        return cls(step, -(-x.shape[2] // step), right, len(x) * right, row_bytes)

    def cover(self, x: Tensor, *, border: int) -> Tensor:
        """The map with its channels last, filled up with zeros to whole tiles: (B, H', W', C)."""
        below, right = self.down * self.step - x.shape[2], self.right * self.step - x.shape[3]
        last = x.permute(0, 2, 3, 1)
        if border == below == right == 0:
            return last
        return F.pad(last, (0, 0, border, border + right, border, border + below))

    def uncover(self, covered: Tensor, x: Tensor, *, border: int) -> Tensor:
        """Of (B, H', W', C) the part that is a map as large as ``x``."""
        return covered[:, border : border + x.shape[2], border : border + x.shape[3]].permute(0, 3, 1, 2)

    def blocks(self) -> list[range]:
        """Rows of tiles that are worked on at once."""
        count = max(1, BLOCK // max(1, self.row_bytes), round(TILES / max(1, self.row_tiles)))
        return [range(first, min(first + count, self.down)) for first in range(0, self.down, count)]

    def to_places(self, matrix: Matrix, x: Tensor, rows: range, *, name: str = "values") -> Tensor:
        """M d M^T of some rows of tiles: (n, n, B, rows, columns, C), columns of a tile before its rows."""
        half = scratch("half", x, len(matrix), len(x), len(rows), *x.shape[2:])
        combine(matrix, list(self._strided(x, 1, rows, len(matrix[0]))), half.unbind(0))
        made = scratch(name, x, len(matrix), *half.shape[:3], self.right, x.shape[-1])
        combine(matrix, list(self._strided(half, 3, range(self.right), len(matrix[0]))), made.unbind(0))
        return made

    def from_places(self, matrix: Matrix, values: Tensor, out: Tensor, rows: range) -> None:
        """M v M^T of (n, n, B, rows, columns, C), written to some rows of tiles; where tiles overlap, added."""
        half = scratch("half", out, *values.shape[1:4], *out.shape[2:])
        half[:, :, :, self.right * self.step :] = 0.0  # the border right of the last tiles: it is only added to
        self._write(matrix, values.unbind(0), half, 3, range(self.right))
        self._write(matrix, half.unbind(0), out, 1, rows)

    def _write(self, matrix: Matrix, values: Sequence[Tensor], out: Tensor, dim: int, tiles: range) -> None:
        targets = list(self._strided(out, dim, tiles, len(matrix)))
        combine(matrix[: self.step], values, targets[: self.step])
        combine(matrix[self.step :], values, targets[self.step :], is_added=True)

    def _strided(self, x: Tensor, dim: int, tiles: range, count: int) -> Iterator[Tensor]:
        """Along ``dim`` the first value of each tile, then the second of each, and so on."""
        size, strides, start = list(x.shape), list(x.stride()), x.storage_offset()
        along, size[dim] = strides[dim], len(tiles)
        strides[dim] *= self.step
        for first in range(tiles.start * self.step, tiles.start * self.step + count):
            yield x.as_strided(size, strides, start + first * along)  # as slices it is three times as many calls


class Scratch(threading.local):
    """Memory to work in, a thread's own: memory fresh from the system costs as much as the additions done in it."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """A tensor of any content. The last one of this name is lost, unless it is larger than is kept."""
        size = math.prod(shape) * like.element_size()
        if size > KEPT:
            return like.new_empty(shape)
        if name not in self.kept or len(self.kept[name]) < size:
            with torch.inference_mode(False):  # or it could not be written to elsewhere
                self.kept[name] = torch.empty(size, dtype=torch.uint8)
        return self.kept[name][:size].view(like.dtype).view(shape)


scratch = Scratch()


def transposed(matrix: Matrix) -> Matrix:
    """The matrix with its rows as columns."""
    return tuple(zip(*matrix, strict=True))


@functools.cache
def terms_of(row: tuple[float | int, ...]) -> list[tuple[int, float | int]]:
    """Where a row is not 0, and what it is there; a 1 comes first, which saves a pass."""
    return sorted(((place, by) for place, by in enumerate(row) if by), key=lambda term: term[1] != 1)


def combine(matrix: Matrix, parts: Sequence[Tensor], out: Sequence[Tensor], *, is_added: bool = False) -> None:
    """``out[i]`` becomes the sum of ``matrix[i][j] * parts[j]``, or has it added; entries of 0 cost nothing."""
    for row, made in zip(matrix, out, strict=True):
        terms = terms_of(row)
        if not is_added:
            (place, by), *terms = terms
            if by == 1 and terms:
                (second, by), *terms = terms
                torch.add(parts[place], parts[second], alpha=by, out=made)
            else:
                torch.mul(parts[place], by, out=made)
        for place, by in terms:
            made.add_(parts[place], alpha=by)
