"""Fast forms of matching, losses and suppression: each computes what a plain function elsewhere says.

The plain function is what one reads; its fast form, in a file of this package, has the same signature.
:func:`accelerated` joins the two where the plain one is defined, and is the only place that chooses. Tests hold
the two to equal values and gradients; a fast form that is not well ahead of the plain one is deleted.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

__all__ = ["accelerated", "compiled", "disable", "enabled", "uses_compiled"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_NAME = "DETCORE_KERNELS"
_switch = {"on": os.environ.get(_NAME, "1") != "0", "compiled": os.environ.get(_NAME) == "compiled"}


def enabled() -> bool:
    """Whether fast forms may be used: yes, unless :func:`disable` or ``DETCORE_KERNELS=0`` says no.

    Example:
        >>> with disable():
        ...     enabled()
        False
    """
    return _switch["on"]


@contextlib.contextmanager
def disable() -> Iterator[None]:
    """Use the plain functions only, as long as the context lasts. To be sure that a result is not a kernel's doing.

    For a whole process set the environment variable ``DETCORE_KERNELS=0``.

    Example:
        >>> from detcore.losses import sigmoid_focal_loss
        >>> with disable():
        ...     round(float(sigmoid_focal_loss(torch.zeros(()), torch.tensor(True))), 4)
        0.0433
    """
    before, _switch["on"] = _switch["on"], False
    try:
        yield
    finally:
        _switch["on"] = before


@contextlib.contextmanager
def compiled() -> Iterator[None]:
    """Let fast forms that can be compiled be compiled, as long as the context lasts.

    They are faster still, but the first call for each shape takes seconds and needs a C++ compiler, and their sums
    are rounded in another order. So this is never chosen for anybody. For a whole process set the environment
    variable ``DETCORE_KERNELS=compiled``.

    Example:
        >>> from detcore.losses import focal_sum
        >>> with compiled():
        ...     value = focal_sum(torch.zeros(1, 1, 2), torch.tensor([[-1]]), torch.ones(1, 1))
    """
    before, _switch["compiled"] = _switch["compiled"], True
    try:
        yield
    finally:
        _switch["compiled"] = before


def uses_compiled() -> bool:
    """Whether :func:`compiled` or ``DETCORE_KERNELS=compiled`` asks for compiled forms.

    Example:
        >>> with compiled():
        ...     uses_compiled()
        True
    """
    return _switch["compiled"]


def accelerated(fast: Callable[_P, _R], *, when: Callable[_P, bool]) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Call ``fast`` instead of the decorated function, where it applies.

    A compiler is always given the plain function: it fuses by itself, and sees one graph.

    Args:
        fast: of the same signature and result.
        when: given the arguments, whether ``fast`` can take them. It must not read values on a GPU.

    Returns:
        A decorator. What it returns keeps the plain function as ``__wrapped__``.

    Example:
        >>> @accelerated(lambda x: x << 1, when=lambda x: isinstance(x, int))
        ... def double(x):
        ...     return x + x
        >>> double(3), double("ab"), double.__wrapped__(3)
        (6, 'abab', 6)
    """

    def join(plain: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(plain)
        def choose(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            usable = enabled() and not torch.compiler.is_compiling() and when(*args, **kwargs)
            return (fast if usable else plain)(*args, **kwargs)

        return choose

    return join
