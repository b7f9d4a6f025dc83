"""How scenes look: shapes, textures, light. Only operations that IEEE 754 rounds in one way."""

from dataclasses import dataclass
from math import sqrt

import numpy as np

from detcore.data._layout import Draws, Shape, layout


@dataclass(frozen=True)
class Objects:
    boxes: np.ndarray  # float64 (n, 4), true corners
    labels: np.ndarray  # int64 (n,)
    visible: np.ndarray  # float64 (n,)


def _distance(shape: Shape, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """About the distance in pixels to the outline, negative inside, at the shape's own coordinates."""
    a, b = shape.half_width, shape.half_height
    shorter = min(a, b)
    t = shape.stroke * shorter
    if shape.kind in (0, 1):
        radius = np.sqrt(u * u * (1 / (a * a)) + v * v * (1 / (b * b)))
        d = (radius - 1) * shorter
        if shape.kind == 1:
            d = np.maximum(d, (1 - shape.stroke - radius) * shorter)
            # Distractor: an open ring.
            return d if shape.whole else np.maximum(d, np.minimum(0.45 * a - np.abs(u), -v))
        return d if shape.whole else np.maximum(d, v - 0.1 * b)  # distractor: half a disc
    across, down = np.abs(u), np.abs(v)
    if shape.kind in (2, 3):
        d = np.maximum(across - a, down - b)
        if shape.kind == 3:
            d = np.maximum(d, np.minimum(a - t - across, b - t - down))
            # Distractor: a frame open on one side.
            return d if shape.whole else np.maximum(d, np.minimum(a - t - across, -v))
        return d if shape.whole else np.maximum(d, np.minimum(u, -v))  # distractor: a quarter is missing
    if shape.kind == 4:
        slope = 1 / sqrt(4 * b * b + a * a)
        d = np.maximum(v - b, (across * (2 * b) - (v + b) * a) * slope)
        # Distractor: an arrow head, a triangle with a notch in its base.
        return d if shape.whole else np.maximum(d, (v * a - across * b) * slope)
    bar = np.maximum(across - a, down - t)
    # Distractor: a cross without one arm.
    pole = np.maximum(across - t, down - b if shape.whole else np.maximum(v - b, -v))
    return np.minimum(bar, pole)


def _colour(draws: Draws, saturation: tuple[float, float], value: tuple[float, float]) -> list[float]:
    """Red, green, blue in 0..255 of a drawn hue, saturation and value."""
    hue, s, v = draws.unit() * 6, draws.uniform(*saturation), draws.uniform(*value) * 255
    return [v - v * s * max(0.0, min(k, 4 - k, 1.0)) for k in ((n + hue) % 6 for n in (5, 3, 1))]


def _texture(draws: Draws, u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    """A pattern in [-1, 1] over the coordinates: none, stripes, checks, dots or grain."""
    kind = draws.below(6)
    if kind == 2:
        stripe = u * (1 / period)
        return np.where(stripe - np.floor(stripe) < 0.5, np.float32(1), np.float32(-1))
    if kind == 3:
        halves = (np.floor(u * (1 / period)) + np.floor(v * (1 / period))) * 0.5
        return np.where(halves == np.floor(halves), np.float32(1), np.float32(-1))
    if kind == 4:
        x, y = u * (1 / period), v * (1 / period)
        x, y = x - np.floor(x) - 0.5, y - np.floor(y) - 0.5
        return np.where(x * x + y * y < 0.1, np.float32(1), np.float32(-0.3))
    if kind == 5:
        return draws.grain(*np.broadcast_shapes(u.shape, v.shape))
    return np.zeros((1, 1), np.float32)


def _background(draws: Draws, size: int) -> np.ndarray:
    """Two muted colours mixed by a smooth random field, with a pattern; float32 (3, size, size)."""
    axis = np.arange(size, dtype=np.float32)
    cells = 2 + draws.below(4)
    nodes = draws.grain(cells + 1, cells + 1)
    where = axis * (cells / size)
    low = where.astype(np.int64)
    part = where - low
    part = part * part * (3 - 2 * part)  # no creases at the nodes
    rows = nodes[low] * (1 - part)[:, None] + nodes[low + 1] * part[:, None]
    field = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    value = draws.uniform(0.25, 0.8)
    first = np.array(_colour(draws, (0.05, 0.4), (value, value + 0.15)), np.float32)
    second = np.array(_colour(draws, (0.05, 0.4), (value, value + 0.15)), np.float32)
    mixed = field * 0.5 + 0.5
    ground = first[:, None, None] * mixed + second[:, None, None] * (1 - mixed)
    turn = draws.uniform(-1, 1)
    u, v = axis + axis[:, None] * turn, axis[:, None] - axis * turn
    pattern = _texture(draws, u, v, draws.uniform(0.05, 0.2) * size)
    return ground * (1 + pattern * draws.uniform(0.02, 0.1))


def paint(draws: Draws, size: int) -> tuple[np.ndarray, Objects]:
    canvas = _background(draws, size)
    owner = np.full((size, size), -1, np.int16)  # front-most shape of each pixel
    shadow = 2 + draws.below(2) if draws.unit() < 0.5 else 0
    boxes, labels, areas, ids = [], [], [], []
    for i, shape in enumerate(layout(draws, size)):
        left, up, right, down = shape.box
        x1, y1, x2, y2 = int(left // 1) - 1, int(up // 1) - 1, int(right // 1) + 2, int(down // 1) + 2
        x = np.arange(x1, x2, dtype=np.float32) + np.float32(0.5 - shape.x)
        y = (np.arange(y1, y2, dtype=np.float32) + np.float32(0.5 - shape.y))[:, None]
        u, v = x * shape.cos + y * shape.sin, y * shape.cos - x * shape.sin
        outline = _distance(shape, u, v)
        inside = outline <= 0
        window = slice(max(-y1, 0), size - y1), slice(max(-x1, 0), size - x1)
        total, shown = np.count_nonzero(inside), np.count_nonzero(inside[window])
        if 3 * shown < total or shown == 0:
            continue
        coverage = np.clip(0.5 - outline, 0, 1)[window]
        top, start = max(y1, 0), max(x1, 0)
        patch = slice(top, top + coverage.shape[0]), slice(start, start + coverage.shape[1])
        if shadow:
            shade = canvas[:, patch[0].start + shadow :, patch[1].start + shadow :]
            shade = shade[:, : coverage.shape[0], : coverage.shape[1]]
            shade *= 1 - 0.35 * coverage[: shade.shape[1], : shade.shape[2]]
        look = _look(draws, shape, u, v, outline, canvas, size)
        canvas[:, *patch] += (look[:, *window] - canvas[:, *patch]) * coverage
        owner[patch][inside[window]] = i
        if shape.whole:
            box = shape.box
            if shown < total:  # cut by the border: box of the part inside
                rows, columns = np.flatnonzero(inside[window].any(1)), np.flatnonzero(inside[window].any(0))
                box = start + columns[0], top + rows[0], start + columns[-1] + 1, top + rows[-1] + 1
            boxes.append([min(max(round(float(side) * 8) / 8, 0.0), float(size)) for side in box])
            labels.append(shape.kind)
            areas.append(shown)
            ids.append(i)
    seen = np.bincount(owner[owner >= 0], minlength=len(areas) + 1 + max(ids, default=0))[ids]
    kept = np.flatnonzero(seen)  # wholly hidden objects are nobody's to find
    objects = Objects(
        np.array(boxes, np.float64).reshape(-1, 4)[kept],
        np.array(labels, np.int64)[kept],
        (seen / np.array(areas, np.float64))[kept] if ids else np.zeros(0),
    )
    return _exposed(draws, canvas, size), objects


def _look(
    draws: Draws,
    shape: Shape,
    u: np.ndarray,
    v: np.ndarray,
    outline: np.ndarray,
    canvas: np.ndarray,
    size: int,
) -> np.ndarray:
    """Colours of a shape over its window, float32 (3, h, w)."""
    behind = canvas[:, min(max(int(shape.y), 0), size - 1), min(max(int(shape.x), 0), size - 1)].tolist()
    if draws.unit() < 0.12:  # low contrast: what lies behind, a little lighter or darker
        step = draws.uniform(20, 32) * (1 if max(behind) < 128 else -1)
        colour = [level + step for level in behind]
    else:
        for _ in range(6):
            colour = _colour(draws, (0.25, 0.85), (0.25, 0.95))
            if max(abs(level - back) for level, back in zip(colour, behind, strict=True)) > 70:
                break
    longer = max(shape.half_width, shape.half_height)
    period = max(4.0, draws.uniform(0.25, 0.7) * longer)
    light = (u * draws.uniform(-0.2, 0.2) + v * draws.uniform(-0.2, 0.2)) * (1 / longer)
    level = 1 + light + _texture(draws, u, v, period) * draws.uniform(0.05, 0.2)
    if draws.unit() < 0.4:
        level = level * np.where(outline > -max(1.0, 0.05 * longer), np.float32(0.6), np.float32(1))
    return np.array(colour, np.float32)[:, None, None] * level


def _exposed(draws: Draws, canvas: np.ndarray, size: int) -> np.ndarray:
    """Uneven light and sensor grain over the whole picture, then uint8."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (1 / size) - 0.5
    light = 1 + axis * draws.uniform(-0.5, 0.5) + axis[:, None] * draws.uniform(-0.5, 0.5)
    grain = draws.grain(3, size, size) * draws.uniform(1, 10)
    return (np.clip(canvas * light + grain, 0, 255) + 0.5).astype(np.uint8)
