"""What the fast forms' own backward passes have in common."""

import torch

__all__ = ["refuse_second_derivative"]


def refuse_second_derivative(where: str) -> None:
    """To be called in a backward pass that works with constants: with ``create_graph`` they would pass for the truth.

    Raises:
        RuntimeError: if what is computed now is to be differentiated again.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{where}: the fast form must be differentiated once only; got create_graph=True. "
            "Work under detcore.kernels.disable() instead."
        )
