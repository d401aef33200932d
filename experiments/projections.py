"""Merged projections: the baseline that inference engines use, so that DF11 is not compared with a slower model than need be."""

from __future__ import annotations

import torch
from torch import nn

MERGED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # in the order in which they are called


class First(nn.Module):
    """Computes all of several linear layers of one input as one product; keeps the others' outputs for them."""

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers.values()]), requires_grad=False)
        biases = [layer.bias for layer in layers.values()]
        self.bias = nn.Parameter(torch.cat(biases).detach(), requires_grad=False) if biases[0] is not None else None
        self.sizes = [layer.out_features for layer in layers.values()]
        self.names = list(layers)[1:]
        self.kept: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own, *others = nn.functional.linear(x, self.weight, self.bias).split(self.sizes, -1)
        self.kept.update(zip(self.names, others, strict=True))
        return own


class Next(nn.Module):
    """Stands for a layer that a First has computed."""

    def __init__(self, name: str, kept: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.name, self.kept = name, kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kept.pop(self.name)


def merge_projections_(model: nn.Module) -> int:
    """Merge q, k and v, and gate and up, of every block of a model that has them apart, in place. Returns how many were made."""
    made = 0
    for parent in list(model.modules()):
        for names in MERGED:
            layers = {name: getattr(parent, name, None) for name in names}
            if all(isinstance(layer, nn.Linear) for layer in layers.values()):
                first = First(layers)  # type: ignore[arg-type]
                setattr(parent, names[0], first)
                for name in names[1:]:
                    setattr(parent, name, Next(name, first.kept))
                made += 1
    return made
