"""Merged projections: the baseline that inference engines use, so that DF11 is not compared with a slower model than need be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from df11.fused import MERGED


class LeadingLinear(nn.Module):
    """The first of several linear layers with the same input, as one product."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
        self.sizes = [layer.out_features for layer in layers]
        self.in_features, self.out_features = layers[0].in_features, self.sizes[0]
        self.kept: tuple[torch.Tensor, list[torch.Tensor]] | None = None  # the input, and the others' outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own, *others = self.parts(x)
        self.kept = x, others
        return own

    def parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        return list(nn.functional.linear(x, self.weight, self.bias).split(self.sizes, -1))


class FollowingLinear(nn.Module):
    """One of the others."""

    def __init__(self, leader: LeadingLinear, index: int) -> None:
        super().__init__()
        self._leader = (leader,)  # in a tuple it is no child: its weights are its own
        self.index = index
        self.in_features, self.out_features = leader.in_features, leader.sizes[index]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        leader = self._leader[0]
        kept = leader.kept
        if kept is None or kept[0] is not x:
            return leader.parts(x)[self.index]
        if self.index == len(leader.sizes) - 1:
            leader.kept = None
        return kept[1][self.index - 1]


def merge_projections_(model: nn.Module) -> int:
    """Merge q, k and v, and gate and up, of every block of a model that has them apart, in place. Returns how many were made."""
    made = 0
    for parent in list(model.modules()):
        for names in MERGED:
            layers = [layer for name in names if isinstance(layer := getattr(parent, name, None), nn.Linear)]
            if len(layers) == len(names) and len({(layer.in_features, layer.bias is None) for layer in layers}) == 1:
                leader = LeadingLinear(layers)
                setattr(parent, names[0], leader)
                for index, name in enumerate(names[1:], 1):
                    setattr(parent, name, FollowingLinear(leader, index))
                made += 1
    return made
