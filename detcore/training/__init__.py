"""Training: one visible loop (:mod:`detcore.training.loop`) and what it stands on."""

from detcore.training.config import TrainConfig, best_precision, learning_rate
from detcore.training.faults import NonFiniteLossError, worst_box
from detcore.training.history import History, Step
from detcore.training.loop import train

__all__ = [
    "History",
    "NonFiniteLossError",
    "Step",
    "TrainConfig",
    "best_precision",
    "learning_rate",
    "train",
    "worst_box",
]
