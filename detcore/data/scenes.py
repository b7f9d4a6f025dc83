"""Scenes: a seeded synthetic detection set, made in memory, the same on every machine.

Six classes, two of them the other's look-alike with a hole (disc and ring, square and frame),
sizes from 8 pixels to most of the picture, crowds of one class, occlusion, truncation, textures,
shadows, uneven light, objects hardly brighter than what lies behind them, pictures with nothing
in them, and distractors: each is a class with a piece missing and has no box.

Every bit is reproducible. Random numbers are taken from PCG64's raw 64-bit words, the part of
NumPy's generators that is promised never to change, and pictures are computed with +, -, *, /,
square root and comparisons only, which IEEE 754 rounds in one way. No library sine, power, sum
of floats or matrix product is used, since those differ between processors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from tqdm import tqdm

__all__ = ["SCENE_CLASSES", "Scenes"]

SCENE_CLASSES = ("disc", "ring", "square", "frame", "triangle", "cross")
"""Class names of :class:`Scenes`; the index is the label."""

_SPLITS = {"train": 0, "val": 1, "test": 2}
_SMALLEST = 8.0  # pixels, shorter side of a box


class Scenes:
    """A synthetic detection set: ``num_images`` square pictures and their boxes.

    Picture ``i`` depends on ``(seed, split, size, i)`` only: a larger ``num_images`` extends the
    set, and any picture can be made alone. Pictures are made when first asked for and kept in one
    uint8 array (49 kB each at 128 pixels).

    A box covers the whole object, also what another hides; objects cut by the border are boxed
    by the part inside, and left out of the picture where less than a third would be inside. An
    object of which less than a quarter can be seen behind others is flagged ``ignore``.

    Args:
        num_images: pictures in the set, >= 1.
        size: height and width in pixels, >= 32.
        seed: picks the set, >= 0.
        noise: annotation noise, in [0, 0.5). Each side of a box is moved by a uniform amount of
            up to ``noise`` times the box's width or height; pictures do not change. Sloppy boxes
            are what parts score from IoU; evaluate on a set with ``noise=0`` (see :meth:`clean`).
        split: ``"train"``, ``"val"`` or ``"test"``: three sets without a picture in common.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> scenes = Scenes(100, size=64)
        >>> image, target = scenes[3]
        >>> tuple(image.shape), [scenes.classes[k] for k in target["labels"]]
        ((3, 64, 64), ['square', 'cross'])
    """

    name = "scenes"
    classes = SCENE_CLASSES
    category_ids = tuple(range(len(SCENE_CLASSES)))
    skipped: tuple[str, ...] = ()

    def __init__(
        self, num_images: int, *, size: int = 128, seed: int = 0, noise: float = 0.0, split: str = "train"
    ) -> None:
        if num_images < 1:
            raise ValueError(f"Scenes: num_images must be >= 1; got {num_images}.")
        if size < 32:
            raise ValueError(f"Scenes: size must be >= 32 pixels; got {size}.")
        if seed < 0:
            raise ValueError(f"Scenes: seed must be >= 0; got {seed}.")
        if not 0 <= noise < 0.5:
            raise ValueError(f"Scenes: noise must be in [0, 0.5), a fraction of a box's sides; got {noise}.")
        if split not in _SPLITS:
            raise ValueError(f"Scenes: split must be one of {sorted(_SPLITS)}; got {split!r}.")
        self.size, self.seed, self.noise, self.split = size, seed, noise, split
        self.image_ids = tuple(range(num_images))
        self._forget()

    def _forget(self) -> None:
        # Pages of an empty array cost nothing until they are written.
        self._pictures = np.empty((len(self), 3, self.size, self.size), np.uint8)
        self._objects: list[_Objects | None] = [None] * len(self)

    def __getstate__(self) -> dict[str, Any]:
        # A spawned loader worker makes its own pictures: sending them would cost more.
        return {k: v for k, v in self.__dict__.items() if k not in ("_pictures", "_objects")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __repr__(self) -> str:
        return f"Scenes({len(self)}, size={self.size}, seed={self.seed}, noise={self.noise}, split={self.split!r})"

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, dict[str, Any]]:
        """Picture ``index``, uint8 (3, size, size), and its target."""
        target = self.target(index)
        return tv_tensors.Image(torch.from_numpy(self._pictures[index].copy())), target

    def target(self, index: int) -> dict[str, Any]:
        """The objects of picture ``index``, in pixels of the picture.

        Returns:
            ``boxes`` (xyxy), ``labels``, ``area`` (of the box), ``iscrowd`` (zeros), ``ignore``,
            ``image_id`` and ``original_size`` (height, width).
        """
        objects = self._make(index)
        boxes = self._jittered(objects.boxes, index) if self.noise else objects.boxes
        xyxy = torch.from_numpy(boxes.astype(np.float32))
        return {
            "boxes": tv_tensors.BoundingBoxes(xyxy, format="XYXY", canvas_size=(self.size, self.size)),
            "labels": torch.from_numpy(objects.labels.copy()),
            "image_id": self.image_ids[index],
            "area": (xyxy[:, 2] - xyxy[:, 0]) * (xyxy[:, 3] - xyxy[:, 1]),
            "iscrowd": torch.zeros(len(xyxy), dtype=torch.int64),
            "ignore": torch.from_numpy(objects.visible < 0.25),
            "original_size": torch.tensor([self.size, self.size]),
        }

    def visible(self, index: int) -> np.ndarray:
        """Share of each object's pixels inside the picture that no other object hides, (n,) in (0, 1]."""
        return self._make(index).visible.copy()

    def clean(self) -> "Scenes":
        """The same pictures with the true boxes; pictures already made are shared."""
        twin = Scenes(len(self), size=self.size, seed=self.seed, split=self.split)
        twin._pictures, twin._objects = self._pictures, self._objects
        return twin

    def make_all(self, *, progress: bool = True) -> "Scenes":
        """Make every picture now, with a progress bar, before loader workers are forked."""
        for i in tqdm(range(len(self)), desc="making scenes", disable=not progress):
            self._make(i)
        return self

    def _make(self, index: int) -> "_Objects":
        if not -len(self) <= index < len(self):
            raise IndexError(f"Scenes: index must be below {len(self)}; got {index}.")
        index %= len(self)
        objects = self._objects[index]
        if objects is None:
            draws = _Draws(self.seed, _SPLITS[self.split], self.size, index)
            self._pictures[index], objects = _paint(draws, self.size)
            self._objects[index] = objects
        return objects

    def _jittered(self, boxes: np.ndarray, index: int) -> np.ndarray:
        # Own stream: the pictures must not change with the noise.
        draws = _Draws(self.seed, _SPLITS[self.split], self.size, index % len(self), 1)
        steps = np.array([draws.below(2049) - 1024 for _ in range(boxes.size)], np.float64).reshape(boxes.shape)
        sides = np.tile(boxes[:, 2:] - boxes[:, :2], (1, 2))
        moved = boxes + sides * (steps / 1024 * self.noise)
        # A box at the border may be pushed out of the picture: at least a pixel stays inside.
        moved[:, :2] = np.clip(moved[:, :2], 0, self.size - 1)
        moved[:, 2:] = np.clip(moved[:, 2:], moved[:, :2] + 1, self.size)
        return moved


@dataclass(frozen=True)
class _Objects:
    boxes: np.ndarray  # float64 (n, 4), true corners
    labels: np.ndarray  # int64 (n,)
    visible: np.ndarray  # float64 (n,)


class _Draws:
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


# --- Where things are ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
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


def _upright(draws: _Draws, kind: int, side: float, *, whole: bool = True) -> _Shape:
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
    left, up, right, down = _Shape(kind, whole, 0.0, 0.0, a, b, c, s, stroke).reach
    wide, high = left + right, up + down
    scale = max(side / max(wide, high), _SMALLEST / min(wide, high))
    return _Shape(kind, whole, 0.0, 0.0, a * scale, b * scale, c, s, stroke)


def _at(shape: _Shape, x: float, y: float) -> _Shape:
    return _Shape(
        shape.kind, shape.whole, x, y, shape.half_width, shape.half_height, shape.cos, shape.sin, shape.stroke
    )


def _overlap(a: _Shape, b: _Shape) -> float:
    """Intersection of the boxes over the smaller box."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a.box, b.box
    wide, high = min(ax2, bx2) - max(ax1, bx1), min(ay2, by2) - max(ay1, by1)
    if wide <= 0 or high <= 0:
        return 0.0
    return wide * high / min((ax2 - ax1) * (ay2 - ay1), (bx2 - bx1) * (by2 - by1))


def _place(draws: _Draws, shape: _Shape, others: Sequence[_Shape], size: int) -> list[_Shape]:
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


def _side(draws: _Draws, size: int) -> float:
    """Longer side of a box: an octave from 8 pixels up to 0.9 of the picture, then uniform in it."""
    octaves = [_SMALLEST]
    while octaves[-1] * 2 < 0.9 * size:
        octaves.append(octaves[-1] * 2)
    k = int(draws.unit() * draws.uniform(0.4, 1.0) * len(octaves))  # of four: 38, 36, 20, 6 percent
    return draws.uniform(octaves[k], min(octaves[k] * 2, 0.9 * size))


def _layout(draws: _Draws, size: int) -> list[_Shape]:
    """What is in a picture, back to front."""
    shapes: list[_Shape] = []
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


def _crowd(draws: _Draws, size: int) -> list[_Shape]:
    """Four to nine objects of one class and about one size, overlapping."""
    kind, side = draws.below(6), draws.uniform(max(12.0, 0.12 * size), max(16.0, 0.28 * size))
    crowd: list[_Shape] = []
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


# --- How they look ---------------------------------------------------------------------------


def _distance(shape: _Shape, u: np.ndarray, v: np.ndarray) -> np.ndarray:
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


def _colour(draws: _Draws, saturation: tuple[float, float], value: tuple[float, float]) -> list[float]:
    """Red, green, blue in 0..255 of a drawn hue, saturation and value."""
    hue, s, v = draws.unit() * 6, draws.uniform(*saturation), draws.uniform(*value) * 255
    return [v - v * s * max(0.0, min(k, 4 - k, 1.0)) for k in ((n + hue) % 6 for n in (5, 3, 1))]


def _texture(draws: _Draws, u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
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


def _background(draws: _Draws, size: int) -> np.ndarray:
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


def _paint(draws: _Draws, size: int) -> tuple[np.ndarray, _Objects]:
    canvas = _background(draws, size)
    owner = np.full((size, size), -1, np.int16)  # front-most shape of each pixel
    shadow = 2 + draws.below(2) if draws.unit() < 0.5 else 0
    boxes, labels, areas, ids = [], [], [], []
    for i, shape in enumerate(_layout(draws, size)):
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
    objects = _Objects(
        np.array(boxes, np.float64).reshape(-1, 4)[kept],
        np.array(labels, np.int64)[kept],
        (seen / np.array(areas, np.float64))[kept] if ids else np.zeros(0),
    )
    return _exposed(draws, canvas, size), objects


def _look(
    draws: _Draws,
    shape: _Shape,
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


def _exposed(draws: _Draws, canvas: np.ndarray, size: int) -> np.ndarray:
    """Uneven light and sensor grain over the whole picture, then uint8."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (1 / size) - 0.5
    light = 1 + axis * draws.uniform(-0.5, 0.5) + axis[:, None] * draws.uniform(-0.5, 0.5)
    grain = draws.grain(3, size, size) * draws.uniform(1, 10)
    return (np.clip(canvas * light + grain, 0, 255) + 0.5).astype(np.uint8)
