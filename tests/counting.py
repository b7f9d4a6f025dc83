"""Counts what a GPU would launch and where the host would wait, on any machine.

A dispatch mode sees every ATen call below autograd. On a GPU each call that is not a view or a bare
allocation is at least one kernel, and a few calls cannot return before the host has read a value.
"""

import collections
import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# They return memory without writing to it.
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# New names for old memory whose schema does not say so.
_RENAMINGS = {"_unsafe_view", "_reshape_alias", "lift_fresh", "alias", "detach"}
# The size of the result, or a Python number, depends on values: the host waits.
_READS = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "histc",
    "is_nonzero",
    "item",
    "masked_select",
    "nms",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}


class LaunchCounter(TorchDispatchMode):
    """Kernel launches and host synchronisations of what runs inside.

    ``launches`` and ``syncs`` map an operator's name to how often it was called; ``total`` is the sum of
    the launches. A tensor made from Python numbers (``torch.tensor([...])``) counts as the synchronisation
    ``upload``: on a GPU it is a copy from pageable memory, which waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: collections.Counter[str] = collections.Counter()
        self.syncs: collections.Counter[str] = collections.Counter()
        self._is_paused = False

    @property
    def total(self) -> int:
        return self.launches.total()

    @contextlib.contextmanager
    def paused(self):
        """Nothing inside is counted."""
        was, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = was

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self._is_paused:
            name = func._schema.name.split("::")[-1]
            if not _is_free(func, name):
                self.launches[name] += 1
            wait = _why_it_waits(func, name, args, kwargs)
            if wait:
                self.syncs[wait] += 1
        return func(*args, **kwargs)


def _is_free(func, name: str) -> bool:
    """Whether the call is a view or an allocation: no kernel."""
    views = [r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns]
    return name in _ALLOCATIONS or name in _RENAMINGS or (bool(views) and all(views))


def _why_it_waits(func, name: str, args: tuple, kwargs: dict) -> str:
    """The name under which the call is a synchronisation; empty if it is none."""
    if name in _READS:
        return name
    if name == "lift_fresh":
        return "upload"
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return name
    if name.startswith(("index", "_index", "_unsafe_index")) and len(args) > 1 and isinstance(args[1], list | tuple):
        masks = [i for i in args[1] if isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8)]
        return f"{name} by mask" if masks else ""
    if name in ("_to_copy", "copy_"):
        devices = {a.device.type for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)}
        devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") is not None else set()
        return "copy between devices" if len(devices) > 1 else ""
    return ""
