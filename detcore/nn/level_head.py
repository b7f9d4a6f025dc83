"""SSD's head: each level its own convolutions, straight on its map."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from detcore.coders import BoxCoder
from detcore.nn.layers import _xavier
from detcore.structures import Predictions, Priors

__all__ = ["LevelHead", "flatten_map", "level_outputs"]


def flatten_map(maps: Tensor, num_priors: int) -> Tensor:
    """An output map to (B, N, n): y, then x, then prior of the cell, as priors are ordered.

    Channel = prior of the cell * n + component.

    Example:
        >>> two_priors = torch.tensor([0.0, 1.0, 10.0, 11.0]).view(1, 4, 1, 1)  # two components each
        >>> flatten_map(two_priors, 2).tolist()
        [[[0.0, 1.0], [10.0, 11.0]]]
    """
    batch, channels, height, width = maps.shape
    n = channels // num_priors
    grid = maps.view(batch, num_priors, n, height, width)
    return grid.permute(0, 3, 4, 1, 2).reshape(batch, height * width * num_priors, n)


def level_outputs(
    in_channels: Sequence[int], num_priors: Sequence[int], sizes: Mapping[str, int], kernels: Sequence[int]
) -> nn.ModuleDict:
    """For each name a convolution a level, Xavier's weights and no bias at the start.

    Args:
        in_channels: width of each level's map.
        num_priors: priors a cell of each level.
        sizes: name to components a prior.
        kernels: side of each level's kernel, odd.

    Example:
        >>> outputs = level_outputs([8, 4], [2, 3], {"deltas": 4}, [3, 1])
        >>> [conv.out_channels for conv in outputs["deltas"]]
        [8, 12]
    """
    outputs = nn.ModuleDict()
    for name, n in sizes.items():
        rows = zip(in_channels, num_priors, kernels, strict=True)
        convs = [nn.Conv2d(c, a * n, k, padding=k // 2) for c, a, k in rows]
        for conv in convs:
            _xavier(conv)
        outputs[name] = nn.ModuleList(convs)
    return outputs


def _join_levels(convs: nn.Module, maps: Sequence[Tensor], num_priors: Sequence[int]) -> Tensor:
    """One output of every prior, levels joined; ``convs`` is an entry of :func:`level_outputs`."""
    rows = zip(cast(nn.ModuleList, convs), maps, num_priors, strict=True)
    return torch.cat([flatten_map(conv(x), n) for conv, x, n in rows], dim=1)  # B N n


class LevelHead(nn.Module):
    """Logits, deltas and what else a paper adds, by one convolution a level.

    Args:
        in_channels: width of each level's map.
        num_priors: priors a cell of each level.
        num_logits: logits a prior; C + 1 for softmax detectors, background last.
        coder: reads deltas back as boxes.
        kernels: side of each level's kernels, odd; one number for all.
        extras: further outputs: name to components a prior.

    Raises:
        ValueError: if the levels do not pair up, or a name is used twice or is "logits" or "deltas".

    Example:
        >>> from detcore.coders import DeltaCoder
        >>> head = LevelHead([512, 1024], [4, 6], 21, DeltaCoder())
        >>> [conv.out_channels for conv in head.outputs["logits"]]
        [84, 126]

    Reference: Liu et al., SSD, ECCV 2016, section 2.1. arXiv:1512.02325
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_priors: Sequence[int],
        num_logits: int,
        coder: BoxCoder,
        *,
        kernels: int | Sequence[int] = 3,
        extras: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        kernels = [kernels] * len(in_channels) if isinstance(kernels, int) else list(kernels)
        if not len(in_channels) == len(num_priors) == len(kernels):
            raise ValueError(
                "LevelHead: in_channels, num_priors and kernels must have one value a level; "
                f"got {tuple(in_channels)}, {tuple(num_priors)} and {tuple(kernels)}."
            )
        if {"logits", "deltas"} & set(extras):
            raise ValueError(
                f'LevelHead: extras must have names of their own, not "logits" or "deltas"; got {[*extras]}.'
            )
        self.coder, self.num_priors = coder, tuple(num_priors)
        sizes = {"logits": num_logits, "deltas": 4, **extras}
        self.outputs = level_outputs(in_channels, num_priors, sizes, kernels)

    def forward(self, features: Sequence[Tensor], priors: Priors) -> Predictions:
        """Predictions of every prior, levels joined."""
        joined = {name: _join_levels(convs, features, self.num_priors) for name, convs in self.outputs.items()}
        logits, deltas = joined.pop("logits"), joined.pop("deltas")
        boxes = self.coder.decode(deltas, priors.boxes.expand(len(deltas), -1, -1))
        return Predictions(logits, deltas, boxes, priors, joined)
