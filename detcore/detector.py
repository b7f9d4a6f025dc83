"""One detector made of parts. It is never subclassed: a new idea is another part."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from detcore.inference import Precision, ready_to_detect
from detcore.losses.terms import LossTerm
from detcore.nn.convolution import use_fast_convolutions
from detcore.nn.inputs import ImageInput
from detcore.postprocess import Selector
from detcore.priors import CachedPriors, PriorGenerator
from detcore.scoring import Scorer
from detcore.structures import Assignment, Detections, Predictions, Priors, Targets, pad_targets, to_dicts

__all__ = ["Assigner", "DenseDetector", "Detector", "Head"]

Assigner = Callable[[Priors, Targets], Assignment]
Head = Callable[[Sequence[Tensor], Priors], Predictions]


@runtime_checkable
class Detector(Protocol):
    """What training, evaluation and the command line ask of a detector: an ``nn.Module`` with these."""

    num_classes: int
    spec: Mapping[str, Any]

    def predict(self, images: Shaped[Tensor, "B 3 H W"]) -> Predictions:
        """Raw predictions of every prior."""
        ...

    def loss(self, images: Shaped[Tensor, "B 3 H W"], targets: Targets) -> dict[str, Tensor]:
        """The terms of the training loss by name, weights included; their sum is minimised."""
        ...

    def detect(self, images: Shaped[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> Detections:
        """Detections in pixels of the batch."""
        ...


class DenseDetector(nn.Module):
    """Trunk and neck, priors, head; assignment and loss terms to train; score and selection to detect.

    Two doors. ``detector(images, targets)`` is torchvision's: lists of pictures of any sizes, lists
    of dicts. :meth:`predict`, :meth:`loss` and :meth:`detect` take one padded batch, uint8 in 0..255
    or floats in 0..1; :meth:`predict` and :meth:`loss` are one compiled graph each.

    Args:
        body: images to a list of feature maps; or to a pair, that list and what becomes of
            :attr:`~detcore.structures.Predictions.aside`.
        priors: feature maps and (height, width) of the batch to priors; those of the last few shapes are kept.
        head: feature maps and priors to predictions.
        num_classes: C; labels are 0..C-1.
        assign: priors and targets to an assignment.
        losses: named terms, or (weight, term).
        score: predictions to scores.
        select: scores, predictions and image sizes to detections.
        inputs: resizing, padding and normalisation; default: ImageNet's colours, no resizing.
        spec: how this detector was asked for (name and options), kept in checkpoints.

    Raises:
        ValueError: if ``losses`` is empty or a weight is negative.

    Example:
        >>> from detcore.models import get_model
        >>> detector = get_model("retinanet", num_classes=3, backbone="tiny")
        >>> picture, target = (
        ...     torch.rand(3, 50, 70),
        ...     {"boxes": torch.tensor([[5.0, 5.0, 40.0, 30.0]]), "labels": torch.tensor([2])},
        ... )
        >>> sorted(detector([picture], [target]))
        ['box', 'cls']
        >>> sorted(detector.eval()([picture])[0])
        ['boxes', 'class_scores', 'labels', 'scores']
    """

    def __init__(
        self,
        body: nn.Module,
        priors: PriorGenerator,
        head: nn.Module,
        *,
        num_classes: int,
        assign: Assigner,
        losses: Mapping[str, LossTerm | tuple[float, LossTerm]],
        score: Scorer,
        select: Selector,
        inputs: ImageInput | None = None,
        spec: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.inputs = inputs or ImageInput()
        self.body, self.head = body, head
        use_fast_convolutions(self)
        self.priors = priors if isinstance(priors, CachedPriors) else CachedPriors(priors)
        self.num_classes, self.spec = num_classes, dict(spec)
        self.assign, self.score, self.select = assign, score, select
        self.losses = {name: term if isinstance(term, tuple) else (1.0, term) for name, term in losses.items()}
        if not self.losses or any(weight < 0 for weight, _ in self.losses.values()):
            raise ValueError(f"DenseDetector: losses must be named terms of weight >= 0; got {losses}.")

    def predict(self, images: Shaped[Tensor, "B 3 H W"]) -> Predictions:
        """Raw predictions of every prior; the batch is normalised here."""
        features = self.body(self.inputs(images))
        features, aside = features if isinstance(features, tuple) else (features, {})
        height, width = images.shape[-2:]
        pred = self.head(features, self.priors(features, (height, width)))
        return replace(pred, aside=aside) if aside else pred

    def match(self, priors: Priors, targets: Targets) -> Assignment:
        """Which object each prior has to predict."""
        with torch.no_grad():
            return self.assign(priors, targets)

    def loss(self, images: Shaped[Tensor, "B 3 H W"], targets: Targets) -> dict[str, Float[Tensor, ""]]:
        """The terms of the training loss by name, weights included; their sum is minimised."""
        pred = self.predict(images)
        match = self.match(pred.priors, targets)
        return {name: weight * term(pred, match) for name, (weight, term) in self.losses.items()}

    @torch.no_grad()
    def detect(self, images: Shaped[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"]) -> Detections:
        """Detections in pixels of the batch, clipped to each picture's (height, width)."""
        pred = self.predict(images)
        return self.select(self.score(pred), pred, sizes)

    def optimize_for_inference(self, *, precision: Precision = "auto") -> "DenseDetector":
        """A copy that detects the same in less time; this one stays as it is.

        In evaluation mode, weights without gradients and channels last in memory, each batch norm folded into the
        convolution before it. For more, compile what it predicts with:
        ``ready.predict = torch.compile(ready.predict)``; with ``mode="reduce-overhead"`` a GPU replays it as one graph,
        and a processor is faster still where the first call is made under
        ``torch._inductor.config.patch(freezing=True)``: then the weights are put into order once.

        Args:
            precision: ``"fp32"``, ``"bf16"``, where weights are bfloat16 too, or ``"auto"``, what
                :func:`detcore.inference.best_precision` says of the device. In float32 scores differ by rounding
                alone, about 1e-5.

        Raises:
            ValueError: if the weights are not float32 or not there (meta device), are parametrized, a batch norm
                keeps no statistics, or the detector is compiled.

        Example:
            >>> from detcore.models import get_model
            >>> ready = get_model("retinanet", num_classes=3, backbone="tiny").optimize_for_inference(precision="bf16")
            >>> ready.predict(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).logits.dtype
            torch.bfloat16
        """
        return ready_to_detect(self, precision=precision)

    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Torchvision's convention: losses in training mode, detections in evaluation mode.

        Args:
            images: pictures (3, h, w), uint8 or float in 0..1, each of its own size.
            targets: in training, one dict a picture: ``boxes`` (n, 4) xyxy in its pixels, ``labels``
                (n,) in 0..C-1. Unlike in torchvision, background is nobody's label.

        Returns:
            Training: the terms of :meth:`loss`. Evaluation: one dict a picture with ``boxes`` in
            its own pixels, ``scores``, ``labels``, ``class_scores`` and, where the detector
            predicts one, ``quality``.

        Raises:
            ValueError: if pictures or targets are not as described, or do not pair up.
        """
        batch = self.inputs.batch(images)
        if not self.training:
            detections = to_dicts(self.detect(batch.images, batch.sizes))
            factors = batch.scales.repeat(1, 2)  # x y x y
            return [{**d, "boxes": d["boxes"] / f} for d, f in zip(detections, factors, strict=True)]
        if targets is None:
            raise ValueError("DenseDetector: targets must be given in training mode; call .eval() to detect.")
        if len(targets) != len(images):
            raise ValueError(f"DenseDetector: {len(images)} images need as many targets; got {len(targets)}.")
        padded = pad_targets(targets, num_classes=self.num_classes, sizes=batch.sizes).to(batch.images.device)
        boxes = padded.boxes * batch.scales.repeat(1, 2)[:, None]
        return self.loss(batch.images, Targets(boxes, padded.labels, padded.valid, batch.sizes))
