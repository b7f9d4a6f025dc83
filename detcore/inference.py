"""A trained detector made ready to detect: the same network with less to compute."""

import copy
from collections.abc import Callable, Hashable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.models.resnet import BasicBlock, Bottleneck

from detcore.kernels import enabled
from detcore.kernels.halves import HAS, multiplied_as
from detcore.kernels.winograd import winograd_convolution, winograd_weights
from detcore.nn.convolution import FAST, FastConv2d

__all__ = ["PackedConv2d", "Precision", "best_precision", "fold_batch_norm", "ready_to_detect"]

Precision = Literal["auto", "fp32", "bf16"]
_M = TypeVar("_M", bound=nn.Module)

FOLDED = {*FAST, *FAST.values()}
"""Convolutions that take up a batch norm."""

SIZES_KEPT = 10
"""Sizes of maps that a convolution keeps its weights for: the five levels of pictures that lie and that stand."""


def best_precision(device: torch.device | str = "cpu") -> str:
    """The precision that ``auto`` stands for on a device.

    Returns:
        ``bf16`` on GPUs that have it and on CPUs with AMX tiles (about 3 times faster than float32
        there, channels last), else ``fp32``. CPUs that multiply bf16 without AMX gain 1.3 to 1.7 times
        (``results/benchmarks/avx512_bf16``), which is left to those who ask for it.

    Example:
        >>> best_precision("meta")
        'fp32'
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if kind == "cpu" and _cpu_has_amx() else "fp32"


def _cpu_has_amx() -> bool:
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    flags = Path("/proc/cpuinfo")  # an older torch; elsewhere than on Linux the answer is no
    return flags.exists() and " amx_bf16" in flags.read_text(encoding="utf-8")


def ready_to_detect(detector: _M, *, precision: Precision = "auto") -> _M:
    """See :meth:`detcore.detector.DenseDetector.optimize_for_inference`.

    Example:
        >>> from detcore.models import get_model
        >>> detector = get_model("retinanet", num_classes=3, backbone="tiny")
        >>> sum(isinstance(m, nn.BatchNorm2d) for m in ready_to_detect(detector).modules())
        0
    """
    where = "optimize_for_inference"
    if precision not in ("auto", "fp32", "bf16"):
        raise ValueError(f'{where}: precision must be "auto", "fp32" or "bf16"; got {precision!r}.')
    compiled = [name for name in ("predict", "detect", "forward") if name in vars(detector)]
    if compiled:
        raise ValueError(
            f"{where}: the detector must not be compiled; got one whose {compiled[0]} is. Compile the result."
        )
    for name, value in detector.named_parameters():
        if value.is_meta or value.dtype != torch.float32:
            found = "the meta device" if value.is_meta else str(value.dtype).removeprefix("torch.")
            raise ValueError(f"{where}: weights must be float32 and in memory; got {name} in {found}.")
    for name, module in detector.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(f"{where}: weights must not be parametrized; got {name}. See remove_parametrizations.")
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is None:
            raise ValueError(f"{where}: batch norm must have running statistics; got {name} without.")
    ready = copy.deepcopy(detector).eval().requires_grad_(False)
    fold_batch_norm(ready)
    ready.to(memory_format=torch.channels_last)
    device = next((p.device for p in ready.parameters()), torch.device("cpu"))
    if (best_precision(device) if precision == "auto" else precision) == "bf16":
        ready.to(torch.bfloat16)
    for module in ready.modules():
        if type(module) in READY and device.type == "cpu":
            module.__class__ = READY[type(module)]
    return ready


@torch.no_grad()
def fold_batch_norm(module: nn.Module) -> None:
    """Put each batch norm in evaluation mode into the convolution right before it, in place.

    Those are found that follow their convolution in an ``nn.Sequential`` or in torchvision's residual blocks.
    Others stay, and so do pairs that are used in several places or that a hook watches.

    Example:
        >>> block = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).eval()
        >>> block[1].running_mean.fill_(2.0)
        tensor([2.])
        >>> before = block(torch.ones(1, 1, 1, 1))
        >>> fold_batch_norm(block)
        >>> type(block[1]).__name__, bool((block(torch.ones(1, 1, 1, 1)) - before).abs().max() < 1e-6)
        ('Identity', True)
    """
    uses: dict[nn.Module, int] = {}
    for _, part in module.named_modules(remove_duplicate=False):
        uses[part] = uses.get(part, 0) + 1
    for parent, first, second in list(_neighbours(module)):
        conv, norm = getattr(parent, first), getattr(parent, second)
        is_plain = not any(m._forward_hooks or m._forward_pre_hooks or uses[m] > 1 for m in (conv, norm))
        if norm.training or not is_plain:
            continue
        weight, bias = fuse_conv_bn_weights(
            conv.weight.double(),
            None if conv.bias is None else conv.bias.double(),
            norm.running_mean.double(),
            norm.running_var.double(),
            norm.eps,
            None if norm.weight is None else norm.weight.double(),
            None if norm.bias is None else norm.bias.double(),
            transpose=isinstance(conv, nn.ConvTranspose2d),
        )
        conv.weight = nn.Parameter(weight.to(conv.weight.dtype), conv.weight.requires_grad)
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype), conv.weight.requires_grad)
        setattr(parent, second, nn.Identity())


def _neighbours(module: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Convolution and batch norm that follow each other: their parent and their names in it."""
    for parent in module.modules():
        if type(parent) is nn.Sequential:
            names = list(parent._modules)
            pairs = list(pairwise(names))
        elif type(parent) in (BasicBlock, Bottleneck):
            pairs = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3) if hasattr(parent, f"conv{i}")]
        else:
            continue
        for first, second in pairs:
            conv, norm = getattr(parent, first), getattr(parent, second)
            if type(conv) in FOLDED and isinstance(norm, nn.BatchNorm2d):
                yield parent, first, second


class PackedConv2d(FastConv2d):
    """A convolution that keeps its weights as oneDNN or Winograd's way wants them; others arrange them in every call.

    Elsewhere than on a processor, in a compiled graph, under autocast and where gradients are wanted it is like others.

    Example:
        >>> conv, x = PackedConv2d(2, 3, 1).requires_grad_(False), torch.ones(1, 2, 4, 4)
        >>> bool((conv(x) - nn.Conv2d.forward(conv, x)).abs().max() < 1e-6)
        True
    """

    _packed: tuple[tuple[int, int, torch.dtype], dict[Hashable, Tensor]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of ``x``."""
        if torch.compiler.is_compiling() or not self._is_packable(x):
            return super().forward(x)
        dtype = _multiplied_in(x)
        return self._by_packed(x.to(dtype), None if self.bias is None else self.bias.to(dtype)).to(x.dtype)

    def _by_packed(self, x: Tensor, bias: Tensor | None) -> Tensor:
        form = self._best_form(x, x.dtype, is_ready=True) if enabled() else None
        if form is not None:
            weights = self._kept(form, lambda: winograd_weights(self.weight.to(x.dtype), form))
            return winograd_convolution(x, weights, bias)
        shape = (self.padding, self.stride, self.dilation, self.groups)
        weight = self._kept(
            x.shape,
            lambda: torch.ops.mkldnn._reorder_convolution_weight(self.weight.to(x.dtype), *shape, list(x.shape)),
        )  # in the order that maps of this very size want; in another, a call can take 100 times as long
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *shape, "none", [], "")

    def _best_form(self, x: Tensor, dtype: torch.dtype, *, is_ready: bool = False) -> int | None:
        # in a graph without gradients weights are frozen, and what is made of them is kept with it
        is_ready = is_ready or (torch.compiler.is_compiling() and not torch.is_grad_enabled())
        return super()._best_form(x, dtype, is_ready=is_ready)

    def _kept(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The weights rearranged, made at the first call for a key; the keys used last are kept."""
        made_of = (self.weight.data_ptr(), self.weight._version, self.weight.dtype)
        if self._packed is None or self._packed[0] != made_of:
            self._packed = (made_of, {})
        kept = self._packed[1]
        weight = kept.pop(key, None)
        if weight is None:
            weight = make()
        kept[key] = weight  # the last one used stands last
        if len(kept) > SIZES_KEPT:
            kept.pop(next(iter(kept)), None)  # another thread may have been first
        return weight

    def _is_packable(self, x: Tensor) -> bool:
        return (
            isinstance(x, Tensor)
            and x.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
            and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
            and torch.backends.mkldnn.enabled
            and x.dtype == self.weight.dtype
            and _is_ordered(_multiplied_in(x))
            and x.ndim == 4
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
            and not self.weight.is_inference()
            and not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad))
        )

    def __getstate__(self) -> dict:
        """Without the packed weights, which can be neither copied nor saved."""
        return {key: value for key, value in vars(self).items() if key != "_packed"}


def _multiplied_in(x: Tensor) -> torch.dtype:
    return multiplied_as(x.dtype) if enabled() else x.dtype


def _is_ordered(dtype: torch.dtype) -> bool:
    """Whether oneDNN has an order of its own for weights of this type on this processor."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and HAS[dtype])


READY = {nn.Conv2d: PackedConv2d, FastConv2d: PackedConv2d}
"""What becomes of a convolution that is made ready."""
