"""Exercises of the score-fusion laboratory: which exponents rank alike, and which thresholds then cut alike."""

import math
from types import MappingProxyType

import torch

from detcore.exercises._base import Exercise, Wrong

__all__ = ["EXERCISES"]


def _pair(value: object) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise Wrong(f"not two numbers: (alpha, alpha) must come back, got {value!r}")
    return float(value[0]), float(value[1])


def _close(got: float, want: float) -> bool:
    return math.isfinite(got) and abs(got - want) <= 1e-6 * max(1.0, abs(want))


# --- as_means(class_power, quality_power)

_P = torch.tensor([0.9, 0.5, 0.3, 0.7, 0.05], dtype=torch.float64)
_Q = torch.tensor([0.3, 0.8, 0.9, 0.5, 0.95], dtype=torch.float64)


def _check_means(answer) -> None:
    first, second = _pair(answer(0.75, 0.25))
    if _close(first, 0.25) and _close(second, 0.75):
        raise Wrong(
            "conventions swapped: at exponents 0.75 of the class and 0.25 of the quality the IoU-aware alpha, the "
            "class's, is 0.75 and RetinaNet-Conf's 0.25; got 0.25 and 0.75"
        )
    if not (_close(first, 0.75) and _close(second, 0.25)):
        raise Wrong(f"a mean is not itself: exponents 0.75 and 0.25 are a mean already, got {first:.4g}, {second:.4g}")
    for u, v in ((1.0, 1.0), (0.4, 0.2), (3.0, 0.5), (0.7, 0.0), (0.0, 2.0)):
        first, second = _pair(answer(u, v))
        where = f"u = {u:g}, v = {v:g} gave {first:.4g} and {second:.4g}"
        if not (0 <= first <= 1 and 0 <= second <= 1):
            raise Wrong(f"outside [0, 1]: an alpha is a share of the sum of exponents, {where}")
        if not _close(first + second, 1.0):
            raise Wrong(f"the two do not sum to 1: one paper's alpha is 1 minus the other's, {where}")
        mean = _P**first * _Q ** (1 - first)
        if not mean.argsort().equal((_P**u * _Q**v).argsort()):
            raise Wrong(f"another ranking: the mean must rank five boxes as p^u q^v does, {where}")
        if not _close(first, u / (u + v)):
            raise Wrong(f"another ranking of other boxes: only one alpha ranks all boxes as p^u q^v does, {where}")


def _means(class_power: float, quality_power: float) -> tuple[float, float]:
    total = class_power + quality_power
    return class_power / total, quality_power / total


_MEANS = Exercise(
    name="as_means",
    task="as_means(class_power, quality_power): (alpha of the IoU-aware paper, alpha of RetinaNet-Conf) of the mean "
    "that ranks as p^u q^v does; two numbers, not both 0.",
    checker=_check_means,
    solution=_means,
    wrong=MappingProxyType(
        {
            "conventions swapped": lambda u, v: _means(v, u),
            "the exponents themselves": lambda u, v: (u, v),
            "shares of the squares": lambda u, v: _means(u**2, v**2),
            "1 minus the quality's, for both": lambda u, v: (u, 1 - u) if u <= 1 else (1.0, 0.0),
            "one number": lambda u, v: u / (u + v),
        }
    ),
)


# --- map_threshold(threshold, old, new)


def _check_threshold(answer) -> None:
    root, product = (0.5, 0.5), (1.0, 1.0)
    got = answer(0.05, root, product)
    if not isinstance(got, float | int):
        raise Wrong(f"not a number: the new threshold must come back, got {type(got).__name__}")
    if _close(got, 0.05):
        raise Wrong(
            "unmoved: a product of two numbers below 1 lies below its root, so the same 0.05 cuts more boxes; "
            f"a box at 0.05 by the root is at {0.05**2:.4g} by the product"
        )
    if _close(got, 0.05**0.5):
        raise Wrong(f"the wrong way: 0.05 on the root is 0.0025 on the product, got {got:.4g}")
    if not _close(got, 0.0025):
        raise Wrong(f"not the same boxes: 0.05 on the root is 0.0025 on the product, got {got:.4g}")
    for t, old, new in ((0.05, product, root), (0.3, (0.6, 0.4), (1.5, 1.0)), (0.5, (0.2, 0.8), (0.1, 0.4))):
        got, want = float(answer(t, old, new)), t ** (sum(new) / sum(old))
        if not _close(got, want):
            raise Wrong(
                f"right for root and product only: {t} on powers {old} is {want:.4g} on powers {new}, got {got:.4g}"
            )
    for old, new in (((0.0, 1.0), (0.0, 2.0)), ((1.0, 0.0), (2.0, 0.0))):
        got = float(answer(0.5, old, new))
        if not _close(got, 0.25):
            raise Wrong(f"lost where a power is 0: 0.5 on {old} is 0.25 on {new}, got {got:.4g}")


def _threshold(threshold: float, old: tuple[float, float], new: tuple[float, float]) -> float:
    return threshold ** (sum(new) / sum(old))


_THRESHOLD = Exercise(
    name="map_threshold",
    task="map_threshold(threshold, old, new): the threshold that lets through with powers `new` what `threshold` does "
    "with powers `old`; pairs (class, quality) in one ratio.",
    checker=_check_threshold,
    solution=_threshold,
    wrong=MappingProxyType(
        {
            "unmoved": lambda threshold, old, new: threshold,
            "the inverse": lambda threshold, old, new: threshold ** (sum(old) / sum(new)),
            "scaled": lambda threshold, old, new: threshold * sum(old) / sum(new),
            "always squared": lambda threshold, old, new: threshold**2,
            "by the class's powers": lambda threshold, old, new: (
                threshold ** (new[0] / old[0]) if old[0] else threshold
            ),
        }
    ),
)

EXERCISES: tuple[Exercise, ...] = (_MEANS, _THRESHOLD)
"""The laboratory's exercises with code."""
