"""Convolutions of 3 x 3 with fewer multiplications: Winograd's way to filter a few neighbours at once.

A tile of outputs is Y = A^T [(G g G^T) * (B^T d B)] A, with the filter g, the tile of inputs and its border d, and *
the products of places that correspond. Summed over channels these are one matrix product a place. Four outputs in a
row take six products instead of twelve, a square of sixteen takes 36 instead of 144. The rest is additions.

Reference: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, section 4. arXiv:1509.09308
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from detcore.kernels._autograd import refuse_second_derivative
from detcore.kernels._tiles import FORMS, Grid, scratch, transposed

__all__ = ["best_form", "winograd_convolution", "winograd_weights"]


def _has(flag: str) -> bool:
    flags = Path("/proc/cpuinfo")
    return flags.exists() and f" {flag} " in flags.read_text(encoding="utf-8")


HAS = {torch.float32: _has("avx2"), torch.bfloat16: _has("avx512_bf16") and not _has("amx_bf16")}
"""By type, whether it pays on this processor. The tiles of AMX multiply so fast that little is left to save."""


def best_form(x: Tensor, weight: Tensor, dtype: torch.dtype, *, is_ready: bool = False) -> int | None:
    """The products of a tile with which these maps are convolved fastest; ``None`` if plainly.

    Args:
        x: (B, C, H, W).
        weight: (O, C, 3, 3).
        dtype: that is computed in.
        is_ready: whether the transformed weights are at hand, so that fewer tiles pay.

    Example:
        >>> x, weight = torch.zeros(4, 5, 5, 128).permute(0, 3, 1, 2), torch.zeros(256, 128, 3, 3)
        >>> best_form(x, weight, torch.float32) is None
        True
    """
    products, channels, tiles = {torch.float32: (36, 128, 64), torch.bfloat16: (16, 256, 400)}.get(dtype, (0, 0, 0))
    if not products or x.device.type != "cpu" or not HAS[dtype] or torch.compiler.is_exporting():
        return None
    if min(weight.shape[:2]) < channels or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    step = FORMS[products].step
    count = len(x) * -(-x.shape[2] // step) * -(-x.shape[3] // step)
    is_enough = count >= (tiles // 4 if is_ready else tiles)
    return products if is_enough and count * step**2 <= 1.3 * x[:, 0].numel() else None


def winograd_weights(weight: Float[Tensor, "O C 3 3"], products: int) -> Float[Tensor, "n C O"]:
    """G g G^T of every filter, as :func:`winograd_convolution` wants it; differentiable.

    Args:
        weight: filters.
        products: of a tile, 16 or 36.

    Example:
        >>> winograd_weights(torch.ones(1, 1, 3, 3), 16).view(4, 4)[0]
        tensor([1.0000, 1.5000, 0.5000, 1.0000])
    """
    g = weight.new_tensor(FORMS[products].weights)
    across = weight.permute(3, 2, 0, 1)  # columns of a tile come before its rows, below too
    made = torch.kron(g, g) @ across.flatten(0, 1).flatten(1)
    return made.unflatten(1, across.shape[2:]).transpose(1, 2)  # as weights lie: to turn them round costs more


def winograd_convolution(
    x: Float[Tensor, "B C H W"], weights: Float[Tensor, "n C O"], bias: Float[Tensor, " O"] | None = None
) -> Float[Tensor, "B O H W"]:
    """The convolution of maps that have a border of zeros. Its gradient cannot be differentiated again.

    Args:
        x: maps, best channels last.
        weights: of :func:`winograd_weights`, n = 16 or 36. 36 is faster and rounds more: in float32 still far less
            than TF32, in bfloat16 too much.
        bias: of the outputs.

    Returns:
        Maps, channels last.

    Example:
        >>> filters, x = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 2, 3)
        >>> winograd_convolution(x, winograd_weights(filters, 16))[0, 0]
        tensor([[4., 6., 4.],
                [4., 6., 4.]])
    """
    is_plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return (_convolution if is_plain else _recorded)(x, weights, bias)  # to record takes a tenth of a millisecond


def _convolution(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    form, grid = FORMS[len(weights)], Grid.over(x, weights)
    padded, made = grid.cover(x, border=1), _like(x, weights.shape[2])
    size = (len(x), grid.down * form.step, grid.right * form.step, weights.shape[2])
    stands_out = size[1:3] != x.shape[2:]
    whole = scratch("whole", x, *size) if stands_out else made.permute(0, 2, 3, 1)
    for rows in grid.blocks():
        values = grid.to_places(form.inputs, padded, rows)
        products = scratch("products", x, *values.shape[:-1], weights.shape[2])
        torch.bmm(values.flatten(0, 1).flatten(1, 3), weights, out=products.flatten(0, 1).flatten(1, 3))
        if bias is not None:
            products[1, 1] += bias  # A^T leaves what is added here as it is, and adds it to every output
        grid.from_places(form.outputs, products, whole, rows)
    return made.copy_(grid.uncover(whole, x, border=0)) if stands_out else made


def _like(x: Tensor, channels: int | torch.SymInt) -> Tensor:
    size = (len(x), channels, *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


_recorded = torch.library.custom_op("detcore::winograd_convolution", _convolution, mutates_args=())


@_recorded.register_fake
def _(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    return _like(x, weights.shape[2])


@torch.library.custom_op("detcore::winograd_slopes", mutates_args=())
def winograd_slopes(slope: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes of x, of the weights and of a bias: every step of the way there, transposed, in the other order."""
    form, grid = FORMS[len(weights)], Grid.over(x, weights)
    padded, slope = grid.cover(x, border=1), grid.cover(slope, border=0)
    of_x, (of_weights, of_bias) = torch.empty_like(padded), _zeros(weights)
    of_x[:, grid.down * form.step :] = 0.0
    for rows in reversed(grid.blocks()):  # the border below a block is added to what the block below it has written
        products = grid.to_places(transposed(form.outputs), slope, rows, name="products")
        of_bias += products[1, 1].flatten(0, 2).sum(dim=0)
        products = products.flatten(0, 1).flatten(1, 3)
        values = grid.to_places(form.inputs, padded, rows)
        flat = values.flatten(0, 1).flatten(1, 3)
        of_weights.baddbmm_(products.transpose(1, 2), flat)
        torch.bmm(products, weights.transpose(1, 2), out=flat)  # now slopes of the values
        grid.from_places(transposed(form.inputs), values, of_x, rows)
    of_x = grid.uncover(of_x, x, border=1).clone(memory_format=torch.channels_last)
    return of_x, of_weights.transpose(1, 2), of_bias.to(slope.dtype)


def _zeros(weights: Tensor) -> tuple[Tensor, Tensor]:
    """For sums: of the weights, which lie (n, O, C), and of a bias, which must not round on the way."""
    n, inside, outside = weights.shape
    wide = torch.promote_types(weights.dtype, torch.float32)
    return weights.new_zeros(n, outside, inside), weights.new_zeros(outside, dtype=wide)


@winograd_slopes.register_fake
def _(slope: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    of_weights, of_bias = _zeros(weights)
    return _like(x, x.shape[1]), of_weights.transpose(1, 2), of_bias.to(slope.dtype)


def _keep(ctx, inputs, output):
    x, weights, _ = inputs
    ctx.save_for_backward(x, weights)


def _backward(ctx, slope):
    refuse_second_derivative("winograd_convolution")
    *slopes, of_bias = winograd_slopes(slope, *ctx.saved_tensors)
    return *slopes, of_bias if ctx.needs_input_grad[2] else None


_recorded.register_autograd(_backward, setup_context=_keep)
