"""Geometry of axis-aligned boxes: corners (x1, y1, x2, y2) in pixels, width = x2 - x1.

The overlap measures work on unbound coordinates: stacking (..., 2) intermediates at training
size costs four times the memory of the result. Types below float32 are computed in float32.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "adaptive_iou",
    "area",
    "ciou",
    "clip_boxes",
    "cxcywh_to_xyxy",
    "diou",
    "giou",
    "iou",
    "pairwise_iou",
    "xyxy_to_cxcywh",
]

_EPS = 1e-9  # keeps 0 / 0 of two empty boxes at 0; far below the area of any real union


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def xyxy_to_cxcywh(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Corners to (centre x, centre y, width, height).

    Example:
        >>> xyxy_to_cxcywh(torch.tensor([10.0, 20.0, 30.0, 30.0]))
        tensor([20., 25., 20., 10.])
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=-1)


def cxcywh_to_xyxy(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """(Centre x, centre y, width, height) to corners.

    Example:
        >>> cxcywh_to_xyxy(torch.tensor([20.0, 25.0, 20.0, 10.0]))
        tensor([10., 20., 30., 30.])
    """
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=-1)


def area(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Width times height in square pixels; inverted boxes count as empty.

    Example:
        >>> area(torch.tensor([[0.0, 0.0, 4.0, 3.0], [4.0, 0.0, 0.0, 3.0]]))
        tensor([12.,  0.])
    """
    x1, y1, x2, y2 = _wide(boxes).unbind(-1)
    return (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)


def clip_boxes(boxes: Float[Tensor, "B n 4"], sizes: Int[Tensor, "B 2"]) -> Float[Tensor, "B n 4"]:
    """Move corners that lie outside their image onto its border.

    Args:
        boxes: corners in pixels.
        sizes: (height, width) of each image in pixels.

    Example:
        >>> clip_boxes(torch.tensor([[[-5.0, 2.0, 50.0, 9.0]]]), torch.tensor([[20, 40]]))
        tensor([[[ 0.,  2., 40.,  9.]]])
    """
    height, width = sizes.to(boxes.dtype)[:, :, None].unbind(1)  # B 1 each
    x1, y1, x2, y2 = boxes.unbind(-1)
    zero = torch.zeros_like(width)
    return torch.stack(
        [x1.clamp(zero, width), y1.clamp(zero, height), x2.clamp(zero, width), y2.clamp(zero, height)], dim=-1
    )


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and area of the union of boxes that broadcast against each other."""
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    inter = width * height
    union = (area(a) + area(b) - inter).clamp(min=_EPS)
    return inter / union, union


def iou(a: Float[Tensor, "*#n 4"], b: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*#n"]:
    r"""Intersection over union of boxes taken one to one.

    .. math:: \mathrm{IoU}(A, B) = \frac{|A \cap B|}{|A \cup B|}

    Returns:
        Values in [0, 1]; 0 for two empty boxes.

    Example:
        >>> wide, tall = torch.tensor([0.0, 0.0, 4.0, 1.0]), torch.tensor([0.0, 0.0, 1.0, 4.0])
        >>> iou(wide, tall)  # one square of seven
        tensor(0.1429)
    """
    return _overlap(_wide(a), _wide(b))[0]


def adaptive_iou(a: Float[Tensor, "*#n 4"], b: Float[Tensor, "*#n 4"], *, beta: float = 0.8) -> Float[Tensor, "*#n"]:
    r"""IoU of two boxes after both have shrunk about their own centres: their offset counts for more.

    .. math:: \mathrm{AIoU}_\beta(A, B) = \mathrm{IoU}(A_\beta, B_\beta)

    where :math:`A_\beta` has the centre of A and :math:`\beta` times its sides. It is the IoU that the
    boxes themselves would have if their centres were :math:`1/\beta` times as far apart; an error of size
    alone is untouched. :math:`\mathrm{AIoU} \le \mathrm{IoU}`, and 0 from where the shrunk boxes part:
    for equal boxes at an offset of :math:`\beta` sides.

    Args:
        a: corners in pixels.
        b: corners in pixels.
        beta: factor of the sides, in (0, 1]; 1 is :func:`iou`, bit for bit.

    Returns:
        Values in [0, 1].

    Raises:
        ValueError: if ``beta`` is outside (0, 1].

    Example:
        >>> a, b = torch.tensor([0.0, 0.0, 4.0, 4.0]), torch.tensor([1.0, 0.0, 5.0, 4.0])
        >>> iou(a, b), adaptive_iou(a, b)  # offset 1/4: 3/5, and (0.8 - 1/4) / (0.8 + 1/4)
        (tensor(0.6000), tensor(0.5238))

    Reference: SCOD, 2021, section on the AIoU loss. arXiv:2108.11021
    """
    if not 0 < beta <= 1:
        raise ValueError(f"adaptive_iou: beta must be in (0, 1]; got {beta}.")
    return iou(_shrunk(_wide(a), beta), _shrunk(_wide(b), beta))


def _shrunk(boxes: Tensor, beta: float) -> Tensor:
    margin = (boxes[..., 2:] - boxes[..., :2]) * ((1 - beta) / 2)
    return torch.cat([boxes[..., :2] + margin, boxes[..., 2:] - margin], dim=-1)


def _hull(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Width and height of the smallest box around both."""
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    return torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1), torch.maximum(ay2, by2) - torch.minimum(ay1, by1)


def giou(a: Float[Tensor, "*#n 4"], b: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*#n"]:
    r"""IoU less the share of the hull that neither box covers, so that boxes far apart differ.

    .. math:: \mathrm{GIoU} = \mathrm{IoU} - \frac{|H| - |A \cup B|}{|H|},
        \quad H \text{ the smallest box around both}

    Returns:
        Values in [-1, 1].

    Example:
        >>> giou(torch.tensor([0.0, 0.0, 4.0, 1.0]), torch.tensor([0.0, 0.0, 1.0, 4.0]))
        tensor(-0.4196)

    Reference: Rezatofighi et al., Generalized Intersection over Union, CVPR 2019, Alg. 1. arXiv:1902.09630
    """
    a, b = _wide(a), _wide(b)
    overlap, union = _overlap(a, b)
    width, height = _hull(a, b)
    hull = (width * height).clamp(min=_EPS)
    return overlap - (hull - union) / hull


def diou(a: Float[Tensor, "*#n 4"], b: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*#n"]:
    r"""IoU less the squared centre distance over the squared diagonal of the hull.

    .. math:: \mathrm{DIoU} = \mathrm{IoU} - \rho^2(A, B) / c^2

    Returns:
        Values in [-1, 1].

    Example:
        >>> diou(torch.tensor([0.0, 0.0, 4.0, 1.0]), torch.tensor([0.0, 0.0, 1.0, 4.0]))
        tensor(0.0022)

    Reference: Zheng et al., Distance-IoU Loss, AAAI 2020, Eq. (6). arXiv:1911.08287
    """
    a, b = _wide(a), _wide(b)
    width, height = _hull(a, b)
    dx = (a[..., 0] + a[..., 2] - b[..., 0] - b[..., 2]) / 2
    dy = (a[..., 1] + a[..., 3] - b[..., 1] - b[..., 3]) / 2
    return _overlap(a, b)[0] - (dx**2 + dy**2) / (width**2 + height**2).clamp(min=_EPS)


def ciou(a: Float[Tensor, "*#n 4"], b: Float[Tensor, "*#n 4"]) -> Float[Tensor, "*#n"]:
    r"""DIoU less a penalty for a different aspect ratio.

    .. math:: \mathrm{CIoU} = \mathrm{DIoU} - \alpha v, \quad
        v = \tfrac{4}{\pi^2}\left(\arctan\tfrac{w_b}{h_b} - \arctan\tfrac{w_a}{h_a}\right)^2, \quad
        \alpha = \frac{v}{1 - \mathrm{IoU} + v}

    The trade-off :math:`\alpha` is a constant for the gradient, as in the paper.

    Example:
        >>> ciou(torch.tensor([0.0, 0.0, 4.0, 1.0]), torch.tensor([0.0, 0.0, 1.0, 4.0]))
        tensor(-0.1662)

    Reference: Zheng et al., Distance-IoU Loss, AAAI 2020, Eq. (9)-(11). arXiv:1911.08287
    """
    a, b = _wide(a), _wide(b)
    angle_a = torch.atan2(a[..., 2] - a[..., 0], a[..., 3] - a[..., 1])
    angle_b = torch.atan2(b[..., 2] - b[..., 0], b[..., 3] - b[..., 1])
    v = 4 / math.pi**2 * (angle_b - angle_a) ** 2
    with torch.no_grad():
        trade_off = v / (1 - _overlap(a, b)[0] + v).clamp(min=_EPS)
    return diou(a, b) - trade_off * v


def pairwise_iou(a: Float[Tensor, "*#b n 4"], b: Float[Tensor, "*#b m 4"]) -> Float[Tensor, "*#b n m"]:
    """IoU of every box of ``a`` with every box of ``b``.

    Returns:
        Values in [0, 1], (..., n, m); leading axes broadcast.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0]])
        >>> pairwise_iou(boxes, boxes)
        tensor([[1.0000, 0.3333],
                [0.3333, 1.0000]])
    """
    return _overlap(_wide(a).unsqueeze(-2), _wide(b).unsqueeze(-3))[0]
