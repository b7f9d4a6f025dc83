"""What a detection is ranked by, of every prior and class; and such scores that wait until they are read."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Concatenate, ParamSpec, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from detcore.structures import Predictions, Priors

__all__ = ["RowScores", "Scorer", "Scores", "by_rows"]

_P = ParamSpec("_P")


@dataclass(frozen=True)
class Scores:
    """Scores of every (prior, class) pair, in [0, 1].

    Args:
        ranking: what detections are sorted, suppressed and evaluated by.
        classes: class probability alone.
        quality: predicted localisation quality of each prior; ``None`` if there is none.
    """

    ranking: Float[Tensor, "B N C"]
    classes: Float[Tensor, "B N C"]
    quality: Float[Tensor, "B N"] | None = None

    def bound(self) -> "Scores":
        """At least the best score of every prior, as that of a single class.

        Example:
            >>> scores = torch.tensor([[[0.1, 0.7], [0.3, 0.2]]])
            >>> Scores(scores, scores).bound().ranking[..., 0]
            tensor([[0.7000, 0.3000]])
        """
        return Scores(self.ranking.amax(-1, keepdim=True), self.classes.amax(-1, keepdim=True), self.quality)

    def of(self, image: Int[Tensor, "B n"], prior: Int[Tensor, "B n"]) -> "Scores":
        """The scores of some priors.

        Example:
            >>> scores = torch.tensor([[[0.1, 0.7], [0.3, 0.2]]])
            >>> Scores(scores, scores).of(torch.tensor([[0]]), torch.tensor([[1]])).ranking
            tensor([[[0.3000, 0.2000]]])
        """
        quality = None if self.quality is None else self.quality[image, prior]
        return Scores(self.ranking[image, prior], self.classes[image, prior], quality)


Scorer = Callable[[Predictions], Scores]
"""What a detector accepts as ``score``."""


class RowScores(Scores):
    """Scores that are worked out when they are first read: all of them, or by :meth:`of` those of some priors.

    A picture has a hundred thousand priors and a few hundred that matter. Made by :func:`by_rows`.

    Attributes:
        scorer: gives the scores of any predictions; ``None`` once ``dataclasses.replace`` has given every field.
        pred: whose scores they are. They must not change before the scores are read.
        has_background: whether the last channel of the logits is no class.
    """

    scorer: Scorer | None = None
    pred: Predictions
    has_background: bool

    @classmethod
    def waiting(cls, scorer: Scorer, pred: Predictions, *, has_background: bool) -> "RowScores":
        """The scores that ``scorer`` will give."""
        scores = object.__new__(cls)
        vars(scores).update(scorer=scorer, pred=pred, has_background=has_background)
        return scores

    @functools.cached_property
    def _all(self) -> Scores:
        return cast(Scorer, self.scorer)(self.pred)  # where every field was given, nobody comes here

    # A field that was given stands in the instance and goes before these.
    @functools.cached_property
    def ranking(self) -> Tensor:
        """See :class:`Scores`."""
        return self._all.ranking

    @functools.cached_property
    def classes(self) -> Tensor:
        """See :class:`Scores`."""
        return self._all.classes

    @functools.cached_property
    def quality(self) -> Tensor | None:
        """See :class:`Scores`."""
        return self._all.quality

    def bound(self) -> Scores:
        """The scores of the best class alone; under a softmax, of it and background alone.

        Without background it is the best score itself, but for the last bit.
        """
        if self.scorer is None:
            return super().bound()
        logits = self.pred.logits
        if self.has_background:
            best = torch.cat([logits[..., :-1].amax(-1, keepdim=True), logits[..., -1:]], dim=-1)
        else:
            best = logits.amax(-1, keepdim=True)
        return self.scorer(replace(self.pred, logits=best))

    def of(self, image: Int[Tensor, "B n"], prior: Int[Tensor, "B n"]) -> Scores:
        """The scores of some priors; no others are worked out."""
        if self.scorer is None:
            return super().of(image, prior)
        return self.scorer(_taken(self.pred, lambda values: values[image, prior]))


def by_rows(
    *, has_background: bool = False
) -> Callable[[Callable[Concatenate[Predictions, _P], Scores]], Callable[Concatenate[Predictions, _P], Scores]]:
    """Let the scores of a scorer wait, and a selection read those of a few priors.

    The scorer must judge each prior by itself and never score a higher logit lower. It is tried on no priors at
    once, so that a wrong option is refused where it is given.

    Args:
        has_background: whether the last channel of the logits is no class.

    Example:
        >>> @by_rows()
        ... def squared(pred):
        ...     scores = pred.logits.sigmoid() ** 2
        ...     return Scores(scores, scores)
        >>> box = torch.zeros(1, 1, 4)
        >>> squared(Predictions(torch.zeros(1, 1, 3), box, box, Priors(box, (1,)))).bound().ranking
        tensor([[[0.2500]]])
    """

    def join(scorer: Callable[Concatenate[Predictions, _P], Scores]) -> Callable[Concatenate[Predictions, _P], Scores]:
        @functools.wraps(scorer)
        def waiting(pred: Predictions, *args: _P.args, **kwargs: _P.kwargs) -> Scores:
            chosen = functools.partial(scorer, *args, **kwargs)
            chosen(_taken(pred, lambda values: values[:, :0]))
            return RowScores.waiting(chosen, pred, has_background=has_background)

        return waiting

    return join


def _taken(pred: Predictions, take: Callable[[Tensor], Tensor]) -> Predictions:
    """Only some priors, the same number of every image, as a single level."""

    def of_every_image(values: Tensor) -> Tensor:  # what all images share is there once
        return take(values.expand(len(pred.logits), -1, -1))

    priors = of_every_image(pred.priors.boxes)
    return Predictions(
        logits=take(pred.logits),
        deltas=take(pred.deltas),
        boxes=take(pred.boxes),
        priors=Priors(priors, (priors.shape[1],)),
        extras={name: of_every_image(values) for name, values in pred.extras.items()},
        aside=pred.aside,
    )
