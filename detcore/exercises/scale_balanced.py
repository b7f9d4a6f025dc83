"""Exercises of the chapter on the scale-balanced loss: who owns what, what each prior weighs, and a neutral beta."""

import math
from types import MappingProxyType

import torch
from torch import Tensor

from detcore.exercises._base import Exercise, Wrong
from detcore.exercises.association import _differs, _row, _tensor

__all__ = ["EXERCISES"]


# --- matches_of_objects(ious)

_MATCHES = (  # overlaps of priors (rows) with objects (columns), M of each object, what the case tells apart
    (
        ((0.8, 0.1), (0.6, 0.2), (0.1, 0.7)),
        (2, 1),
        "plain overlaps",
    ),
    (
        ((0.6, 0.1), (0.1, 0.3), (0.0, 0.2)),
        (1, 1),
        "an object without a good prior: it takes the one it overlaps most, 0.3",
    ),
    (
        ((0.9, 0.6), (0.1, 0.8)),
        (1, 1),
        "a prior in two objects: it goes to the one it overlaps more, not to both",
    ),
    (
        ((0.5, 0.0), (0.7, 0.0), (0.0, 0.6)),
        (2, 1),
        "an overlap of exactly 0.5: it is enough",
    ),
    (
        ((0.4, 0.3), (0.2, 0.1)),
        (0, 1),
        "a dispute: both objects overlap the first prior most, the later wins and the other is left with nothing",
    ),
    (
        ((0.7, 0.4), (0.6, 0.2)),
        (1, 1),
        "a forced match: the second object takes the first prior although that overlaps the first object more",
    ),
)


def _check_matches(answer) -> None:
    for ious, want, reason in _MATCHES:
        goal = torch.tensor(want)
        got = _tensor(answer(torch.tensor(ious)), goal, "M of each object")
        if got.tolist() != goal.tolist():
            rows = "; ".join(_row(torch.tensor(row)) for row in ious)
            raise Wrong(f"{reason}; overlaps {rows} must give M = {list(want)}, got {got.tolist()}")


def _owned(ious: Tensor, *, least: float = 0.5, closed: bool = True, last_wins: bool = True) -> Tensor:
    best, owner = ious.max(dim=1)
    owner = torch.where(best >= least if closed else best > least, owner, -1)
    favourites = ious.argmax(dim=0).tolist()
    for j in range(ious.shape[1]) if last_wins else reversed(range(ious.shape[1])):
        owner[favourites[j]] = j
    return torch.stack([(owner == j).sum() for j in range(ious.shape[1])])


def _gentle(ious: Tensor) -> Tensor:
    """Forces a prior only where nobody else has it by overlap."""
    best, owner = ious.max(dim=1)
    owner = torch.where(best >= 0.5, owner, -1)
    for j in range(ious.shape[1]):
        prior = ious[:, j].argmax()
        if best[prior] < 0.5:
            owner[prior] = j
    return torch.stack([(owner == j).sum() for j in range(ious.shape[1])])


def _at_most_its_own(ious: Tensor) -> Tensor:
    best, owner = ious.max(dim=1)
    return torch.stack([((best >= 0.5) & (owner == j)).sum() for j in range(ious.shape[1])])


_OWNERS = Exercise(
    name="matches_of_objects",
    task=(
        "matches_of_objects(ious): ious (priors, objects); M of each object. A prior goes to the object it overlaps "
        "most, if by >= 0.5; each object takes the prior it overlaps most anyway, the later object winning."
    ),
    checker=_check_matches,
    solution=_owned,
    wrong=MappingProxyType(
        {
            "every overlap counts": lambda ious: (ious >= 0.5).sum(0).clamp(min=1),
            "no force": _at_most_its_own,
            "open bound": lambda ious: _owned(ious, closed=False),
            "the earlier object wins": lambda ious: _owned(ious, last_wins=False),
            "forces free priors only": _gentle,
            "priors in place of objects": lambda ious: (ious >= 0.5).sum(1),
        }
    ),
)


# --- prior_weights(matched, index, positive, alpha, beta)

_M = torch.tensor([0, 1, 2, 10])
_INDEX = torch.tensor([1, 2, 2, 3, 3, 0])
_POSITIVE = torch.tensor([True, True, True, True, False, False])


def _weights(matched: Tensor, index: Tensor, positive: Tensor, alpha: float, beta: float) -> Tensor:
    count = matched.clamp(min=1).double()
    weight = beta * (count.log() + alpha) / count
    return torch.where(positive, weight[index], 1.0)


def _by_log(log, matched: Tensor, index: Tensor, positive: Tensor, alpha: float, beta: float) -> Tensor:
    count = matched.clamp(min=1).double()
    return torch.where(positive, (beta * (log(count) + alpha) / count)[index], 1.0)


def _check_weights(answer) -> None:
    arguments = (_M, _INDEX, _POSITIVE)
    want = _weights(*arguments, 1.0, 3.0)
    got = _tensor(answer(*arguments, 1.0, 3.0), want, "the weight of every prior, not of every object")
    if not got.double().isfinite().all():
        raise Wrong(f"not finite: the first object owns nothing, and its logarithm must not be taken; got {_row(got)}")
    if _differs(got[~_POSITIVE], torch.ones(2)):
        raise Wrong(f"negatives too: a prior that owns nothing has weight 1, whatever its index; got {_row(got)}")
    for name, log in (("2", torch.log2), ("10", torch.log10)):
        if not _differs(got, _by_log(log, *arguments, 1.0, 3.0)):
            raise Wrong(f"logarithm to base {name}: the natural one is meant, weights {_row(want)}; got {_row(got)}")
    if not _differs(got[_POSITIVE], (_M * _weights(_M, torch.arange(4), _M >= 0, 1.0, 3.0))[_INDEX[_POSITIVE]]):
        raise Wrong(f"weight of the object: each of its M priors has an M-th part of it, {_row(want)}; got {_row(got)}")
    if _differs(got, want):
        raise Wrong(f"not beta (ln M + alpha) / M: M = {_M.tolist()} must give {_row(want)}, got {_row(got)}")
    got, want = answer(*arguments, 0.5, 3.0), _weights(*arguments, 0.5, 3.0)
    if _differs(got, want):
        raise Wrong(f"alpha does not enter as it should: at alpha = 0.5 want {_row(want)}, got {_row(got)}")
    got, want = answer(*arguments, 1.0, 1.0), _weights(*arguments, 1.0, 1.0)
    if _differs(got, want):
        raise Wrong(f"beta does not enter as it should: at beta = 1 want {_row(want)}, got {_row(got)}")


def _naive_log(matched, index, positive, alpha, beta):
    # ln 0 = -inf, and -inf / 0 = -inf: it waits for a negative prior whose index points at the empty object
    weight = beta * (matched.double().log() + alpha) / matched
    return weight[index]


_WEIGHT = Exercise(
    name="prior_weights",
    task=(
        "prior_weights(matched, index, positive, alpha, beta): beta (ln M + alpha) / M of each positive prior, "
        "1 for other priors; matched (objects,) may hold 0, index and positive are (priors,)."
    ),
    checker=_check_weights,
    solution=_weights,
    wrong=MappingProxyType(
        {
            "ln 0": _naive_log,
            "negatives weighed": lambda m, i, p, a, b: _weights(m, i, torch.ones_like(p), a, b),
            "base 2": lambda m, i, p, a, b: _by_log(torch.log2, m, i, p, a, b),
            "base 10": lambda m, i, p, a, b: _by_log(torch.log10, m, i, p, a, b),
            "times M": lambda m, i, p, a, b: torch.where(p, m[i] * _weights(m, i, p, a, b), 1.0),
            "1 / M": lambda m, i, p, a, b: torch.where(p, b / m.clamp(min=1)[i].double(), 1.0),
            "alpha fixed": lambda m, i, p, a, b: _weights(m, i, p, 1.0, b),
            "beta fixed": lambda m, i, p, a, b: _weights(m, i, p, a, 3.0),
            "an object each": lambda m, i, p, a, b: _weights(m, torch.arange(4), m >= 0, a, b),
        }
    ),
)


# --- balancing_beta(histogram, alpha)

_HISTOGRAM = (7, 40, 10, 0, 0, 6, 0, 0, 0, 0, 20)


def _beta(histogram, alpha: float) -> float:
    rows = [(float(n), m) for m, n in enumerate(histogram) if m and n]
    return sum(n * m for n, m in rows) / sum(n * (math.log(m) + alpha) for n, m in rows)


def _over_objects(histogram, alpha):
    rows = [(float(n), m) for m, n in enumerate(histogram) if m and n]
    return sum(n for n, _ in rows) / sum(n * (math.log(m) + alpha) / m for n, m in rows)


def _over_forms(histogram, alpha):
    values = [(math.log(m) + alpha) / m for m in range(1, len(histogram))]
    return len(values) / sum(values)


def _with_empty(histogram, alpha):
    objects = sum(float(n) for n in histogram)
    rows = [(float(n), m) for m, n in enumerate(histogram) if m and n]
    return (sum(n * m for n, m in rows) + histogram[0]) / (
        sum(n * (math.log(m) + alpha) for n, m in rows) + alpha * (objects - sum(n for n, _ in rows))
    )


def _check_beta(answer) -> None:
    def ask(histogram, alpha):
        try:
            return float(answer(list(histogram), alpha))
        except (TypeError, ValueError) as error:
            raise Wrong(f"not a number: one beta must come back; {error}") from None

    want, got = _beta(_HISTOGRAM, 1.0), ask(_HISTOGRAM, 1.0)

    def is_it(other: float) -> bool:
        return abs(got - other) <= 1e-6 * abs(other)

    if is_it(1 / want):
        raise Wrong(f"the mean weight itself: beta is one over it, {want:.4f}; got {got:.4f}")
    if is_it(_over_objects(_HISTOGRAM, 1.0)):
        raise Wrong(
            f"mean over objects: an object with M priors counts M times among positives; want {want:.4f}, got {got:.4f}"
        )
    if is_it(_over_forms(_HISTOGRAM, 1.0)):
        raise Wrong(f"histogram not used: each M counts as often as it occurs, times M; want {want:.4f}, got {got:.4f}")
    if not math.isfinite(got) or is_it(_with_empty(_HISTOGRAM, 1.0)):
        raise Wrong(
            f"objects with M = 0: {_HISTOGRAM[0]} here own no prior and weigh nothing; want {want:.4f}, got {got:.4f}"
        )
    if not is_it(want):
        raise Wrong(f"mean weight is not 1: histogram {list(_HISTOGRAM)} needs beta {want:.4f}, got {got:.4f}")
    want, got = _beta(_HISTOGRAM, 0.5), ask(_HISTOGRAM, 0.5)
    if not is_it(want):
        raise Wrong(f"alpha does not enter: at alpha = 0.5 want {want:.4f}, got {got:.4f}")


_BALANCE = Exercise(
    name="balancing_beta",
    task=(
        "balancing_beta(histogram, alpha): histogram[m] objects have M = m, m = 0, 1, ...; the beta with which "
        "beta (ln M + alpha) / M has mean 1 over positive priors."
    ),
    checker=_check_beta,
    solution=_beta,
    wrong=MappingProxyType(
        {
            "reciprocal": lambda h, a: 1 / _beta(h, a),
            "over objects": _over_objects,
            "over values of M": _over_forms,
            "empty objects counted": _with_empty,
            "alpha fixed": lambda h, a: _beta(h, 1.0),
            "the paper's": lambda h, a: 3.0,
            "all of them": lambda h, a: [_beta(h, a)],
        }
    ),
)

EXERCISES: tuple[Exercise, ...] = (_OWNERS, _WEIGHT, _BALANCE)
"""The chapter's exercises with code."""
