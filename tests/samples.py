"""What several test files start from: random boxes, batches and predictions, and a door past the shape hook."""

import contextlib

import jaxtyping
import torch
from hypothesis import settings
from hypothesis import strategies as st

from detcore.structures import BACKGROUND, Predictions, Priors, Targets

FAST = settings(max_examples=40, deadline=None, derandomize=True)


@contextlib.contextmanager
def no_hook():
    """Arguments reach the function as they do for a user: the shape hook would refuse a wrong literal before it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def some_boxes(count, *, size=100.0, dtype=torch.float64):
    """Boxes of all sizes and shapes inside about 2 * ``size`` pixels, every seventh of one pixel."""
    sides = torch.rand(count, 2, dtype=dtype) ** 2 * size + 1
    sides[::7] = 1.0
    corner = torch.rand(count, 2, dtype=dtype) * size
    return torch.cat([corner, corner + sides], dim=-1)


@st.composite
def any_box(draw, span=200):
    """Corners on a grid of quarter pixels, at least one pixel a side."""
    x, y = draw(st.integers(-span * 4, span * 4)) / 4, draw(st.integers(-span * 4, span * 4)) / 4
    w, h = draw(st.integers(4, span * 4)) / 4, draw(st.integers(4, span * 4)) / 4
    return torch.tensor([x, y, x + w, y + h], dtype=torch.float64)


def targets_of(*images, slots=None, sizes=None, dtype=torch.float64):
    """A batch of one ``(boxes, labels)`` an image, padded to ``slots``."""
    most = slots or max(1, *(len(boxes) for boxes, _ in images)) if images else 1
    boxes = torch.zeros(len(images), most, 4, dtype=dtype)
    labels = torch.full((len(images), most), BACKGROUND)
    valid = torch.zeros(len(images), most, dtype=torch.bool)
    for i, (own, classes) in enumerate(images):
        boxes[i, : len(own)] = torch.as_tensor(own, dtype=dtype).reshape(-1, 4)
        labels[i, : len(own)] = torch.as_tensor(classes, dtype=torch.int64)
        valid[i, : len(own)] = True
    return Targets(boxes, labels, valid, sizes)


def image_of(targets, i):
    """One image of a batch as a batch of its own."""
    sizes = None if targets.sizes is None else targets.sizes[i : i + 1]
    return Targets(targets.boxes[i : i + 1], targets.labels[i : i + 1], targets.valid[i : i + 1], sizes)


def some_priors(count=40, *, dtype=torch.float64):
    return Priors(some_boxes(count, dtype=dtype)[None], (count - count // 4, count // 4))


def some_predictions(priors, batch, classes, coder, *, spread=0.3, requires_grad=False):
    """Random predictions with an ``iou`` map; boxes are decoded from the deltas, so gradients reach both."""
    n, dtype = priors.boxes.shape[1], priors.boxes.dtype
    logits = (torch.randn(batch, n, classes, dtype=dtype) * 2).requires_grad_(requires_grad)
    deltas = (torch.randn(batch, n, 4, dtype=dtype) * spread).requires_grad_(requires_grad)
    quality = torch.randn(batch, n, 1, dtype=dtype).requires_grad_(requires_grad)
    return predictions_of(priors, logits, deltas, quality, coder)


def predictions_of(priors, logits, deltas, quality, coder):
    boxes = coder.decode(deltas, priors.boxes.expand(len(deltas), -1, -1))
    return Predictions(logits, deltas, boxes, priors, {"iou": quality})
