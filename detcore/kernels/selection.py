"""What the fast selections share: the rule they follow, and which priors may matter."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from detcore.scores import Scores

__all__ = ["SLACK", "Rule", "is_sound", "open_priors"]

SLACK = 1e-5
"""Bounds may be off by the last bits: relatively this much lies between them and what they bound, to be sure."""


@dataclass(frozen=True)
class Rule:
    """Options of :mod:`detcore.postprocess`, and who competes: a level's priors, its pairs, or a class's priors."""

    by: Literal["prior", "pair", "class"]
    score_threshold: float
    threshold_on: Literal["ranking", "classes"]
    candidates: int
    nms_iou: float | None
    max_detections: int

    def passing(self, scores: Scores) -> Tensor:
        """What the threshold cuts."""
        return scores.ranking if self.threshold_on == "ranking" else scores.classes


def is_sound(
    score_threshold: float, threshold_on: str, candidates: int, nms_iou: float | None, max_detections: int
) -> bool:
    """Whether the options are in range; if not, the plain forms say what is wrong.

    Example:
        >>> is_sound(0.05, "ranking", 1000, 0.5, 100), is_sound(0.05, "ranking", 0, 0.5, 100)
        (True, False)
    """
    return (
        0 <= score_threshold <= 1
        and threshold_on in ("ranking", "classes")
        and candidates >= 1
        and (nms_iou is None or 0 <= nms_iou <= 1)
        and max_detections >= 1
    )


def open_priors(bound: Scores, rule: Rule) -> Bool[Tensor, "B N"]:
    """Priors that may have a pair above the threshold, or take the place of one that has.

    Example:
        >>> scores = torch.tensor([[[0.1], [0.3]]])
        >>> open_priors(Scores(scores, scores), Rule("pair", 0.2, "ranking", 1000, 0.5, 100))
        tensor([[False,  True]])
    """
    if rule.by == "prior" and rule.threshold_on == "classes":
        return torch.ones_like(bound.ranking[..., 0], dtype=torch.bool)
    return ~(rule.passing(bound)[..., 0] <= rule.score_threshold * (1 - SLACK))
