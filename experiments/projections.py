"""Merged projections: the baseline that inference engines use, so that DF11 is not compared with a slower model than need be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from df11.fused import MERGED, FollowingLinear


class LeadingLinear(nn.Module):
    """Several linear layers as one product: for the others, FollowingLinear, what a FusedLinear is, but of bf16 weights."""

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
                    setattr(parent, name, FollowingLinear(leader, index))  # type: ignore[arg-type]
                made += 1
    return made
