"""Heads: a pyramid of maps and its priors to predictions."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from detcore.coders import BoxCoder
from detcore.nn.layers import init_conv, prior_probability_bias
from detcore.structures import Predictions, Priors

__all__ = ["DenseHead"]

_NOTHING: Mapping[str, int] = MappingProxyType({})


class DenseHead(nn.Module):
    """Two towers shared by all levels; classes from one, boxes from the other.

    Each tower is ``depth`` times (3x3 convolution, normalisation if any, ReLU); each output is
    one more 3x3 convolution. Channel = prior of the cell * n + component.

    Args:
        in_channels: width of every level.
        num_priors: priors a cell.
        num_classes: logits a prior (C for sigmoid).
        coder: reads deltas back as boxes.
        depth: convolutions a tower, >= 0.
        norm: makes the normalisation of so many channels; RetinaNet has none, FCOS group norm.
        on_deltas: what each level's deltas go through, one module a level; none: nothing.
        class_extras: further outputs on the class tower's last feature: name to components a prior.
        box_extras: the same on the box tower.
        prior_probability: what the class sigmoid answers before training.

    Raises:
        ValueError: if ``depth`` is negative, or a name is used twice or is "logits" or "deltas".

    Example:
        >>> from detcore.coders import DeltaCoder
        >>> head = DenseHead(256, 9, 80, DeltaCoder(), box_extras={"iou": 1})
        >>> sum(p.numel() for p in head.outputs["iou"].parameters())
        20745

    Reference: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, section 4. arXiv:1708.02002
    """

    def __init__(
        self,
        in_channels: int,
        num_priors: int,
        num_classes: int,
        coder: BoxCoder,
        *,
        depth: int = 4,
        norm: Callable[[int], nn.Module] | None = None,
        on_deltas: Sequence[nn.Module] = (),
        class_extras: Mapping[str, int] = _NOTHING,
        box_extras: Mapping[str, int] = _NOTHING,
        prior_probability: float = 0.01,
    ) -> None:
        super().__init__()
        if depth < 0:
            raise ValueError(f"DenseHead: depth must be >= 0; got {depth}.")
        names = ["logits", *class_extras, "deltas", *box_extras]
        if len(set(names)) != len(names):
            raise ValueError(f'DenseHead: extras must have names of their own, not "logits" or "deltas"; got {names}.')
        self.coder, self.num_priors = coder, num_priors
        self.class_tower, self.box_tower = _tower(in_channels, depth, norm), _tower(in_channels, depth, norm)
        self.on_deltas = nn.ModuleList(on_deltas)
        self.on_class_tower = ("logits", *class_extras)
        sizes = {"logits": num_classes, **class_extras, "deltas": 4, **box_extras}
        biases = {"logits": prior_probability_bias(prior_probability)}
        self.outputs = nn.ModuleDict(
            {
                name: init_conv(nn.Conv2d(in_channels, num_priors * n, 3, padding=1), bias=biases.get(name, 0.0))
                for name, n in sizes.items()
            }
        )

    def forward(self, features: Sequence[Tensor], priors: Priors) -> Predictions:
        """Predictions of every prior, levels joined.

        Raises:
            ValueError: if there are not as many maps as modules on the deltas.
        """
        if self.on_deltas and len(features) != len(self.on_deltas):
            raise ValueError(f"DenseHead: features must be {len(self.on_deltas)} maps; got {len(features)}.")
        maps: dict[str, list[Tensor]] = {name: [] for name in self.outputs}
        for level, feature in enumerate(features):
            on_class, on_box = self.class_tower(feature), self.box_tower(feature)
            for name, conv in self.outputs.items():
                grid = conv(on_class if name in self.on_class_tower else on_box)
                if name == "deltas" and self.on_deltas:
                    grid = self.on_deltas[level](grid)
                maps[name].append(self._flatten(grid))
        joined = {name: torch.cat(levels, dim=1) for name, levels in maps.items()}  # B N n
        logits, deltas = joined.pop("logits"), joined.pop("deltas")
        boxes = self.coder.decode(deltas, priors.boxes.expand(len(deltas), -1, -1))
        return Predictions(logits, deltas, boxes, priors, joined)

    def _flatten(self, maps: Tensor) -> Tensor:
        batch, channels, height, width = maps.shape
        n = channels // self.num_priors
        grid = maps.view(batch, self.num_priors, n, height, width)
        return grid.permute(0, 3, 4, 1, 2).reshape(batch, height * width * self.num_priors, n)


def _tower(channels: int, depth: int, norm: Callable[[int], nn.Module] | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers.append(init_conv(nn.Conv2d(channels, channels, 3, padding=1)))
        if norm is not None:
            layers.append(norm(channels))
        layers.append(nn.ReLU(inplace=True))  # neither convolution nor norm needs its output again
    return nn.Sequential(*layers)
