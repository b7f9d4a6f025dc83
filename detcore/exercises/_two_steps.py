"""RefineDet's two steps: an exercise of the primer on the SSD family."""

from types import MappingProxyType

import torch
from torch import Tensor

from detcore.exercises._answers import as_tensor, rows, same
from detcore.exercises._base import Exercise, Wrong

_PRIORS = torch.tensor([[10.0, 20.0, 50.0, 60.0], [0.0, 0.0, 20.0, 40.0]])
_FIRST = torch.tensor([[2.0, 0.0, 2.0, 0.0], [0.0, -1.0, 1.0, -2.0]])
_SECOND = torch.tensor([[1.0, 1.0, -1.0, 0.5], [0.5, 0.0, 0.0, 1.0]])


def _decode(priors: Tensor, deltas: Tensor, centre: float = 0.1, size: float = 0.2) -> Tensor:
    sides = priors[:, 2:] - priors[:, :2]
    middle = (priors[:, :2] + priors[:, 2:]) / 2 + centre * deltas[:, :2] * sides
    sides = sides * (size * deltas[:, 2:]).exp()
    return torch.cat([middle - sides / 2, middle + sides / 2], dim=1)


def _two_steps(priors: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return _decode(_decode(priors, first.detach()), second)


def _check_steps(answer) -> None:
    want = _two_steps(_PRIORS, _FIRST, _SECOND)
    first = _FIRST.clone().requires_grad_()
    second = _SECOND.clone().requires_grad_()
    got = as_tensor(answer(_PRIORS, first, second), (2, 4), "the box of each prior after both steps, as corners,")
    if same(got, _decode(_PRIORS, _SECOND)):
        raise Wrong("one step only: the second moves what the first has made of the prior, not the prior")
    if same(got, _decode(_PRIORS, _FIRST + _SECOND)):
        raise Wrong(
            "deltas added: the second step's are shares of the *refined* box's sides, so 1 + 1 is not 2; "
            f"want {rows(want)}"
        )
    if same(got, _decode(_decode(_PRIORS, _FIRST, 1.0, 1.0), _SECOND, 1.0, 1.0)):
        raise Wrong("without variances: a delta of 1 moves a centre by 0.1 of a side and a side by exp(0.2)")
    if not same(got, want):
        raise Wrong(f"another box: want {rows(want)}, got {rows(got)}")
    if not got.requires_grad:
        raise Wrong("nothing learns: the second step's deltas need a gradient")
    got.sum().backward()
    if first.grad is not None and first.grad.abs().sum() > 0:
        raise Wrong("the second step teaches the first: refined boxes are constants to it, detach them")


TWO_STEPS = Exercise(
    name="two_steps",
    task=(
        "two_steps(priors, first, second): (n, 4) corners after RefineDet's two steps; deltas as SSD writes them, "
        "variances 0.1 and 0.2; the second step is not to teach the first."
    ),
    checker=_check_steps,
    solution=_two_steps,
    wrong=MappingProxyType(
        {
            "second only": lambda priors, first, second: _decode(priors, second),
            "deltas added": lambda priors, first, second: _decode(priors, first + second),
            "no variances": lambda priors, first, second: _decode(_decode(priors, first, 1.0, 1.0), second, 1.0, 1.0),
            "the other order": lambda priors, first, second: _decode(_decode(priors, second), first),
            "not detached": lambda priors, first, second: _decode(_decode(priors, first), second),
            "all detached": lambda priors, first, second: _two_steps(priors, first, second).detach(),
        }
    ),
)
