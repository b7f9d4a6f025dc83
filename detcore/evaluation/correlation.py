"""How well scores follow IoU: three correlation coefficients and what other images might have given."""

from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

__all__ = ["Correlation", "correlate"]

COEFFICIENTS = ("pearson", "spearman", "kendall")


@dataclass(frozen=True)
class Correlation:
    """Correlation of two values over the same boxes, each in [-1, 1].

    A coefficient is nan where there are fewer than two boxes or one of the values never varies.

    Args:
        count: number of boxes.
        pearson: how close the two are to a line.
        spearman: Pearson's coefficient of the ranks: how close they are to any rising curve.
        kendall: Kendall's tau-b: pairs of boxes in the same order less pairs in opposite order, over
            the geometric mean of the pairs that each value tells apart. Ties are many where boxes on
            the background all have IoU 0.
        intervals: (low, high) of each coefficient, by its name; nan where it could not be had.
        level: probability that the intervals are made for.
    """

    count: int
    pearson: float
    spearman: float
    kendall: float
    intervals: dict[str, tuple[float, float]]
    level: float = 0.95

    def as_dict(self) -> dict:
        """The fields, as JSON types."""
        return asdict(self) | {"intervals": {name: list(pair) for name, pair in self.intervals.items()}}


def correlate(
    a: Float[np.ndarray, " D"],
    b: Float[np.ndarray, " D"],
    image: Int[np.ndarray, " D"],
    *,
    bootstrap: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Correlation:
    """Pearson's, Spearman's and Kendall's correlation over boxes, with intervals over images.

    Boxes of one picture share its light, its crowding and its objects: they are not independent, and an
    interval that takes them to be is far too narrow. So whole images are drawn anew, with replacement,
    and the interval holds the middle of what the draws give.

    Args:
        a: one value a box, such as its score.
        b: another, such as its IoU.
        image: index of the box's image.
        bootstrap: number of draws, >= 0; 0 for no intervals.
        level: probability, in (0, 1).
        seed: of the draws.

    Raises:
        ValueError: if ``bootstrap`` or ``level`` is out of range.

    Example:
        >>> score = np.array([0.1, 0.4, 0.6, 0.9])
        >>> result = correlate(score, score**4, np.arange(4), bootstrap=0)  # a rising curve, not a line
        >>> round(result.pearson, 3), round(result.spearman, 3), round(result.kendall, 3)
        (0.879, 1.0, 1.0)
    """
    if bootstrap < 0:
        raise ValueError(f"correlate: bootstrap must be >= 0; got {bootstrap}.")
    if not 0 < level < 1:
        raise ValueError(f"correlate: level must be in (0, 1); got {level}.")
    # Ranks need sorting, once: a draw only changes how often each box counts.
    place_a, place_b = (np.unique(values, return_inverse=True)[1] for values in (a, b))
    point = _coefficients(a, b, place_a, place_b, np.ones(len(a), dtype=np.int64))
    names, member = np.unique(image, return_inverse=True)
    intervals: dict[str, tuple[float, float]] = dict.fromkeys(COEFFICIENTS, (float("nan"), float("nan")))
    if bootstrap and len(names) > 1:
        generator = np.random.default_rng(seed)
        times = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=bootstrap)
        draws = np.array([_coefficients(a, b, place_a, place_b, row[member]) for row in times])
        for name, drawn in zip(COEFFICIENTS, draws.T, strict=True):
            values = drawn[~np.isnan(drawn)]
            if len(values) > 1:
                low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
                intervals[name] = (float(low), float(high))
    return Correlation(len(a), *point, intervals, level)


def _coefficients(
    a: np.ndarray, b: np.ndarray, place_a: np.ndarray, place_b: np.ndarray, weights: np.ndarray
) -> tuple[float, float, float]:
    """The three coefficients where box i counts ``weights[i]`` times."""
    present = weights > 0
    if not (np.ptp(place_a[present]) if present.any() else 0) or not np.ptp(place_b[present]):
        return float("nan"), float("nan"), float("nan")
    pearson = _pearson(a, b, weights)
    spearman = _pearson(_ranks(place_a, weights), _ranks(place_b, weights), weights)
    repeated = np.repeat(np.arange(len(a)), weights)
    if len(repeated) == 2:  # SciPy's p-value divides by n - 2; tau-b is the same with every box taken twice
        repeated = np.tile(repeated, 2)
    kendall = stats.kendalltau(place_a[repeated], place_b[repeated], method="asymptotic")
    return pearson, spearman, float(np.asarray(kendall)[0])  # SciPy gives (tau-b, p-value)


def _pearson(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> float:
    a = a - np.average(a, weights=weights)
    b = b - np.average(b, weights=weights)
    covariance = (weights * a * b).sum()
    return float(np.clip(covariance / np.sqrt((weights * a * a).sum() * (weights * b * b).sum()), -1, 1))


def _ranks(place: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean rank of each value, equal values sharing theirs, up to a constant."""
    size = np.bincount(place, weights=weights)
    return (np.cumsum(size) - size / 2)[place]
