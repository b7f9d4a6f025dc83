"""What checkers ask of a tensor that came back."""

import torch
from torch import Tensor

from detcore.exercises._base import Wrong


def as_tensor(value: object, shape: tuple[int, ...], what: str) -> Tensor:
    """The answer, or what is wrong with its kind."""
    if not isinstance(value, Tensor):
        raise Wrong(f"not a tensor: {what} must come back, got {type(value).__name__}")
    if tuple(value.shape) != shape:
        raise Wrong(f"not the right shape: {what} must have shape {shape}, got {tuple(value.shape)}")
    return value


def same(got: Tensor, want: Tensor, tolerance: float = 1e-3) -> bool:
    """Whether two answers agree."""
    return torch.allclose(got.detach().double(), want.double(), rtol=0, atol=tolerance)


def rows(values: Tensor) -> str:
    """Numbers for a message."""
    return "; ".join(" ".join(f"{v:.4g}" for v in row) for row in values.tolist())
