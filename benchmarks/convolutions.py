"""Convolutions of 3 x 3, torch's over ours, by size of map: ``python -m benchmarks.convolutions``.

Ours is Winograd's way. Where that is taken in a detector rests on this table: see
:func:`detcore.kernels.winograd.best_form`. On processors without bfloat16 its rows show what it saves to work them out
in float32, not Winograd's way: see :mod:`detcore.kernels.halves`.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import ROOT, Row, Timing, time_all
from detcore.kernels.halves import in_float32, multiplied_as
from detcore.kernels.winograd import winograd_convolution, winograd_weights

OUTPUT = ROOT / "results" / "benchmarks" / "convolutions.json"
MAPS = (
    # batch, channels in, channels out, side: P3 to P5 of 320 pixels and their class scores; VGG at 300 pixels
    (4, 256, 256, 40),
    (4, 256, 256, 20),
    (4, 256, 256, 10),
    (4, 256, 819, 40),
    (4, 128, 128, 75),
    (4, 512, 512, 38),
    (1, 256, 256, 40),
    (1, 256, 256, 20),
)
KINDS = {"fp32": (torch.float32, 36, 1e-5), "bf16": (torch.bfloat16, 16, 2e-2)}
"""Type, products of a tile, and the largest root mean squared error over that of the values."""

ONE_ROUNDING = 2e-3
"""That error of bfloat16 where only the result is rounded."""


@dataclass(frozen=True)
class Setting:
    """How long to measure."""

    repeats: int = 25
    budget: float = 8.0


def error(found: Tensor, wanted: Tensor) -> float:
    """Root mean squared error over the root mean square of what is wanted."""
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


def convolution_row(size: tuple[int, int, int, int], precision: str, *, is_ready: bool) -> Row:
    """Both ways on one map.

    Args:
        size: batch, channels in and out, side.
        precision: ``fp32`` or ``bf16``.
        is_ready: forwards only, with the weights transformed beforehand; otherwise forwards and back, all included.
    """
    batch, inside, outside, side = size
    dtype, products, tolerance = KINDS[precision]
    is_widened = multiplied_as(dtype) != dtype
    tolerance = ONE_ROUNDING if is_widened else tolerance
    generator = torch.Generator().manual_seed(0)
    x, weight, by = (
        torch.randn(shape, generator=generator).to(memory_format=torch.channels_last)
        for shape in ((batch, inside, side, side), (outside, inside, 3, 3), (batch, outside, side, side))
    )
    x, weight, by = x.to(dtype).requires_grad_(), (weight / inside**0.5 / 3).requires_grad_(), by.to(dtype)
    ready = winograd_weights(weight.detach(), products).to(dtype)

    def torchs() -> Tensor:
        return F.conv2d(x, weight.to(dtype), padding=1)

    def ours() -> Tensor:
        if is_widened:
            return in_float32(functools.partial(F.conv2d, padding=1), x, weight, None, dtype)
        return winograd_convolution(x, ready if is_ready else winograd_weights(weight, products).to(dtype))

    def check() -> None:
        wanted = F.conv2d(x.double(), weight.to(dtype).double(), padding=1)
        found = ours()
        assert error(found, wanted) < tolerance, f"error {error(found, wanted):.1e}"
        if not is_ready:
            slopes, truth = (torch.autograd.grad(y, (x, weight), by.to(y.dtype)) for y in (found, wanted))
            for one, other in zip(slopes, truth, strict=True):
                assert error(one, other.double()) < tolerance, f"error of a slope {error(one, other.double()):.1e}"

    def run(convolve: Callable[[], Tensor]) -> None:
        if is_ready:
            with torch.no_grad():
                convolve()
        else:
            torch.autograd.grad(convolve(), (x, weight), by)

    what = "forwards" if is_ready else "forwards and back"
    name = (
        f"{inside} to {outside} channels, {side} x {side}, B={batch}: {what}, {precision}{' in float32' * is_widened}"
    )
    return Row(name, check, functools.partial(run, torchs), functools.partial(run, ours))


def rows() -> dict[str, Callable[[], Row]]:
    """Every map, both precisions, a step of training and inference."""
    return {
        f"{inside}-{outside}-{side}-{batch}-{precision}{'-ready' * is_ready}": functools.partial(
            convolution_row, (batch, inside, outside, side), precision, is_ready=is_ready
        )
        for batch, inside, outside, side in MAPS
        for precision in KINDS
        for is_ready in (False, True)
    }


def main(arguments: list[str] | None = None) -> list[Timing]:
    """Check, time, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convolutions", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains TEXT; not written")
    parser.add_argument("--output", type=pathlib.Path, default=OUTPUT, help="JSON file")
    options = parser.parse_args(arguments)
    return time_all(
        rows,
        "torch",
        module="convolutions",
        arguments=arguments,
        output=None if options.only else options.output,
        setting=asdict(Setting()),
        repeats=Setting().repeats,
        budget=Setting().budget,
        only=options.only,
    )


if __name__ == "__main__":
    main()
