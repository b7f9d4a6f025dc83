"""Scenes: a seeded synthetic detection set, made in memory, the same on every machine.

Six classes, two of them the other's look-alike with a hole (disc and ring, square and frame),
sizes from 8 pixels to most of the picture, crowds of one class, occlusion, truncation, textures,
shadows, uneven light, objects hardly brighter than what lies behind them, pictures with nothing
in them, and distractors: each is a class with a piece missing and has no box.

Every bit is reproducible. Random numbers are taken from PCG64's raw 64-bit words, the part of
NumPy's generators that is promised never to change, and pictures are computed with sums,
differences, products, quotients, square roots and comparisons only, which IEEE 754 rounds in one
way. No library sine, power, sum of floats or matrix product is used, since those differ between
processors.
"""

from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from tqdm import tqdm

from detcore.data._layout import Draws
from detcore.data._paint import Objects, paint

__all__ = ["SCENE_CLASSES", "Scenes"]

SCENE_CLASSES = ("disc", "ring", "square", "frame", "triangle", "cross")
"""Class names of :class:`Scenes`; the index is the label."""

_SPLITS = {"train": 0, "val": 1, "test": 2}


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
        self._objects: list[Objects | None] = [None] * len(self)

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
            "boxes": tv_tensors.BoundingBoxes(  # pyright: ignore[reportCallIssue]  # torchvision's overloads
                xyxy, format="XYXY", canvas_size=(self.size, self.size)
            ),
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

    def _make(self, index: int) -> "Objects":
        if not -len(self) <= index < len(self):
            raise IndexError(f"Scenes: index must be below {len(self)}; got {index}.")
        index %= len(self)
        objects = self._objects[index]
        if objects is None:
            draws = Draws(self.seed, _SPLITS[self.split], self.size, index)
            self._pictures[index], objects = paint(draws, self.size)
            self._objects[index] = objects
        return objects

    def _jittered(self, boxes: np.ndarray, index: int) -> np.ndarray:
        # Own stream: the pictures must not change with the noise.
        draws = Draws(self.seed, _SPLITS[self.split], self.size, index % len(self), 1)
        steps = np.array([draws.below(2049) - 1024 for _ in range(boxes.size)], np.float64).reshape(boxes.shape)
        sides = np.tile(boxes[:, 2:] - boxes[:, :2], (1, 2))
        moved = boxes + sides * (steps / 1024 * self.noise)
        # A box at the border may be pushed out of the picture: at least a pixel stays inside.
        moved[:, :2] = np.clip(moved[:, :2], 0, self.size - 1)
        moved[:, 2:] = np.clip(moved[:, 2:], moved[:, :2] + 1, self.size)
        return moved
