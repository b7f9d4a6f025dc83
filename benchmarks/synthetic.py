"""Seeded stand-ins: pictures, objects, and head outputs as a trained detector gives them."""

import math

import torch
from torch import Tensor

from detcore.assigners import centerness_target
from detcore.boxes import pairwise_iou
from detcore.coders import BoxCoder
from detcore.structures import Assignment, Priors


def seeded(seed: int) -> torch.Generator:
    """A generator on the default device, where tensors without a device of their own are made."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


Shape = tuple[int, int]
"""Height and width in pixels."""


def pictures(batch: int, shape: Shape, *, seed: int = 0) -> list[Tensor]:
    """Noise, (3, H, W) in 0..1 each."""
    generator = seeded(seed)
    return [torch.rand(3, *shape, generator=generator) for _ in range(batch)]


def objects(batch: int, shape: Shape, count: int, num_classes: int, *, same_boxes: bool = False, seed: int = 0):
    """One dict of ``boxes`` and ``labels`` a picture; sides log-uniform from 16 pixels to most of the short side.

    Args:
        batch: pictures.
        shape: of a picture.
        count: objects a picture.
        num_classes: labels are 0..``num_classes`` - 1.
        same_boxes: give every picture the same boxes (labels still differ): then every picture has as many
            positive priors as the next, and normalising by picture or by batch is the same.
        seed: of the generator.
    """
    generator = seeded(seed)
    boxes = [_boxes(count, shape, generator) for _ in range(batch)]
    return [
        {
            "boxes": boxes[0 if same_boxes else i],
            "labels": torch.randint(num_classes, (count,), generator=generator),
        }
        for i in range(batch)
    ]


def _boxes(count: int, shape: Shape, generator: torch.Generator) -> Tensor:
    x, y, scale, aspect = torch.rand(4, count, generator=generator)
    side = 16 * torch.exp(scale * math.log(0.9 * min(shape) / 16))
    stretch = torch.exp((aspect - 0.5) * 0.6)
    end = torch.tensor(shape[::-1])
    corner = (torch.stack([x, y], dim=1) * end).minimum(end - 16)
    return torch.cat([corner, (corner + torch.stack([side * stretch, side / stretch], dim=1)).minimum(end)], dim=1)


def trained_outputs(
    priors: Priors,
    targets: list[dict[str, Tensor]],
    num_classes: int,
    *,
    coder: BoxCoder,
    threshold: float,
    per_level: int,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits (B, N, C) and deltas (B, N, 4) with the statistics that post-processing meets after training.

    On every level about ``per_level`` (prior, class) pairs of background score above ``threshold`` (on small levels
    at most 2 in 100). Priors that overlap an object by more than 0.4 score the higher for its class the more they
    overlap, and decode to nearly its box.
    """
    generator = seeded(seed)
    batch, count = len(targets), sum(priors.counts)
    logits = _background(priors, batch, num_classes, threshold, per_level, generator)
    deltas = 0.2 * torch.randn(batch, count, 4, generator=generator)
    for i, target in enumerate(targets):
        overlap, index = pairwise_iou(priors.boxes[0], target["boxes"]).max(dim=1)
        near = (overlap > 0.4).nonzero()[:, 0]
        own = index[near]
        noise = torch.randn(len(near), 5, generator=generator)
        logits[i, near, target["labels"][own]] = 12 * (overlap[near] - 0.4) - 2 + 0.7 * noise[:, 0]
        deltas[i, near] = coder.encode(target["boxes"][own], priors.boxes[0, near]) + 0.05 * noise[:, 1:]
    return logits, deltas


def trained_points(
    priors: Priors,
    match: Assignment,
    coder: BoxCoder,
    num_classes: int,
    *,
    threshold: float,
    per_level: int,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`trained_outputs` for FCOS: logits, distances and centre-ness logits.

    The background's centre-ness is about 1/2, and ``threshold`` is that of the root of the product. Points that own
    an object score the higher the more central they are.
    """
    generator = seeded(seed)
    batch, count = match.labels.shape
    logits = _background(priors, batch, num_classes, 2 * threshold**2, per_level, generator)
    centerness = 0.1 * torch.randn(batch, count, 1, generator=generator)
    deltas = torch.randn(batch, count, 4, generator=generator).exp()
    noise = torch.randn(batch, count, 6, generator=generator)
    at = match.positive
    central = centerness_target(priors.boxes, match.boxes)[at].clamp(0.02, 0.98)
    logits[(*at.nonzero(as_tuple=True), match.labels[at])] = 4 * central - 2 + 0.7 * noise[at][:, 0]
    centerness[at] = (central.logit() + 0.3 * noise[at][:, 1])[:, None]
    wanted = coder.encode(match.boxes, priors.boxes.expand_as(match.boxes))
    deltas[at] = wanted[at] * (0.05 * noise[at][:, 2:]).exp()
    return logits, deltas, centerness


def _background(
    priors: Priors, batch: int, num_classes: int, threshold: float, per_level: int, generator: torch.Generator
) -> Tensor:
    """Logits of which about ``per_level`` a level pass the threshold, at most 2 in 100."""
    cut = math.log(threshold / (1 - threshold))
    logits = torch.randn(batch, sum(priors.counts), num_classes, generator=generator)
    for level in logits.split(priors.counts, dim=1):
        share = min(0.02, per_level / (level.shape[1] * num_classes))
        level.add_(cut - torch.special.ndtri(torch.tensor(1 - share, dtype=torch.float64)).item())
    return logits
