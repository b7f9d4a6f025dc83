"""Random numbers of a scene, and which shapes lie where in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np

SMALLEST = 8.0  # pixels, shorter side of a box


class Draws:
    """Random numbers for one picture, from the raw words of PCG64."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))
        self._words: list[int] = []

    def unit(self) -> float:
        """Uniform in [0, 1), 53 bits."""
        if not self._words:
            self._words = self._bits.random_raw(128).tolist()
        return (self._words.pop() >> 11) * 2.0**-53

    def uniform(self, low: float | int, high: float | int) -> float:
        return low + (high - low) * self.unit()

    def below(self, n: int) -> int:
        return int(self.unit() * n)

    def grain(self, *shape: int) -> np.ndarray:
        """Uniform in [-1, 1), float32, one byte fine."""
        count = 1
        for side in shape:
            count *= side
        octets = self._bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]
        return (octets.astype(np.float32) * np.float32(1 / 128) - 1).reshape(shape)


@dataclass(frozen=True)
class Shape:
    """One shape: its own axes are (right, down) = (cos, sin), (-sin, cos); lengths in pixels."""

    kind: int
    whole: bool  # false for a distractor
    x: float
    y: float
    half_width: float
    half_height: float
    cos: float
    sin: float
    stroke: float  # of ring, frame and cross, as a share of the shorter half side

    @property
    def reach(self) -> tuple[float, float, float, float]:
        """How far the shape goes left, up, right, down of its centre."""
        a, b, c, s = self.half_width, self.half_height, self.cos, self.sin
        if self.kind in (0, 1):
            rx, ry = sqrt(a * c * a * c + b * s * b * s), sqrt(a * s * a * s + b * c * b * c)
            return rx, ry, rx, ry
        t = self.stroke * min(a, b)
        corners = {
            4: [(0.0, -b), (a, b), (-a, b)],
            5: [(i, j) for p, q in ((a, t), (t, b)) for i in (p, -p) for j in (q, -q)],
        }.get(self.kind, [(a, b), (a, -b), (-a, b), (-a, -b)])
        xs, ys = [c * u - s * v for u, v in corners], [s * u + c * v for u, v in corners]
        return -min(xs), -min(ys), max(xs), max(ys)

    @property
    def box(self) -> tuple[float, float, float, float]:
        left, up, right, down = self.reach
        return self.x - left, self.y - up, self.x + right, self.y + down

    @property
    def side(self) -> float:
        x1, y1, x2, y2 = self.box
        return max(x2 - x1, y2 - y1)


def _upright(draws: Draws, kind: int, side: float, *, whole: bool = True) -> Shape:
    """A shape around (0, 0) whose box's longer side is ``side``; aspect, turn and stroke are drawn."""
    aspect = draws.uniform(0.7, 1.0)
    a, b = (1.0, aspect) if draws.unit() < 0.5 else (aspect, 1.0)
    # A direction without sine: a point on a square's edge, scaled to length 1; quarter turns too.
    tilt = draws.uniform(-0.4, 0.4) if kind in (2, 3) else draws.uniform(-1.0, 1.0)
    length = sqrt(1.0 + tilt * tilt)
    c, s = 1.0 / length, tilt / length
    for _ in range(draws.below(4)):
        c, s = -s, c
    stroke = draws.uniform(0.3, 0.42) if kind == 5 else draws.uniform(0.3, 0.5)
    left, up, right, down = Shape(kind, whole, 0.0, 0.0, a, b, c, s, stroke).reach
    wide, high = left + right, up + down
    scale = max(side / max(wide, high), SMALLEST / min(wide, high))
    return Shape(kind, whole, 0.0, 0.0, a * scale, b * scale, c, s, stroke)


def _at(shape: Shape, x: float, y: float) -> Shape:
    return Shape(shape.kind, shape.whole, x, y, shape.half_width, shape.half_height, shape.cos, shape.sin, shape.stroke)


def _overlap(a: Shape, b: Shape) -> float:
    """Intersection of the boxes over the smaller box."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.box, b.box
    wide, high = min(ax2, bx2) - max(ax1, bx1), min(ay2, by2) - max(ay1, by1)
    if wide <= 0 or high <= 0:
        return 0.0
    return wide * high / min((ax2 - ax1) * (ay2 - ay1), (bx2 - bx1) * (by2 - by1))


def _place(draws: Draws, shape: Shape, others: Sequence[Shape], size: int) -> list[Shape]:
    """The shape at a free place, or nothing. One in six may be cut by the border."""
    left, up, right, down = shape.reach
    cut = draws.unit() < 1 / 6
    limit = 0.9 if draws.unit() < 0.35 else 0.25
    for _ in range(8):
        if cut or left + right > size or up + down > size:
            x, y = draws.uniform(0, size), draws.uniform(0, size)
        else:
            x, y = draws.uniform(left, size - right), draws.uniform(up, size - down)
        placed = _at(shape, x, y)
        if all(_overlap(placed, other) <= limit for other in others):
            return [placed]
    return []


def _side(draws: Draws, size: int) -> float:
    """Longer side of a box: an octave from 8 pixels up to 0.9 of the picture, then uniform in it."""
    octaves = [SMALLEST]
    while octaves[-1] * 2 < 0.9 * size:
        octaves.append(octaves[-1] * 2)
    k = int(draws.unit() * draws.uniform(0.4, 1.0) * len(octaves))  # of four: 38, 36, 20, 6 percent
    return draws.uniform(octaves[k], min(octaves[k] * 2, 0.9 * size))


def layout(draws: Draws, size: int) -> list[Shape]:
    """What is in a picture, back to front."""
    shapes: list[Shape] = []
    lot = draws.unit()
    num_scattered, num_distractors = 1 + draws.below(6), draws.below(3)
    if lot < 0.05:
        num_scattered = 0
    elif lot < 0.15:  # one that fills most of the picture, a few others on it
        big = _upright(draws, draws.below(6), draws.uniform(0.6, 0.92) * size)
        shapes += _place(draws, big, shapes, size)
        num_scattered = draws.below(4)
    elif lot < 0.35:
        shapes += _crowd(draws, size)
        num_scattered = draws.below(3)
    for i in range(num_scattered + num_distractors):
        shape = _upright(draws, draws.below(6), _side(draws, size), whole=i < num_scattered)
        shapes += _place(draws, shape, shapes, size)
    # Large things lie behind small ones, mostly.
    keys = [shape.side * draws.uniform(0.5, 1.5) for shape in shapes]
    return [shapes[i] for i in sorted(range(len(shapes)), key=lambda i: -keys[i])]


def _crowd(draws: Draws, size: int) -> list[Shape]:
    """Four to nine objects of one class and about one size, overlapping."""
    kind, side = draws.below(6), draws.uniform(max(12.0, 0.12 * size), max(16.0, 0.28 * size))
    crowd: list[Shape] = []
    x, y = draws.uniform(0.25, 0.75) * size, draws.uniform(0.25, 0.75) * size
    for _ in range(4 + draws.below(6)):
        shape = _upright(draws, kind, side * draws.uniform(0.8, 1.2))
        for _ in range(8):
            member = _at(shape, x, y)
            if 0 < x < size and 0 < y < size and all(_overlap(member, other) <= 0.6 for other in crowd):
                crowd.append(member)
                break
            start = crowd[draws.below(len(crowd))] if crowd else member
            x, y = start.x + draws.uniform(-1, 1) * side, start.y + draws.uniform(-1, 1) * side
    return crowd
