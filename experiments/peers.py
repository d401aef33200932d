"""Products with losslessly compressed weights by other packages, where they are installed: measured beside this project's."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from experiments.harness import timing


def _glyd(model: nn.Module) -> nn.Module:
    import glyd.gpu

    packed: nn.Module = glyd.gpu.compress(model, layout="mma12", compile=False)
    return packed


def _nwc(model: nn.Module) -> nn.Module:
    import nwc

    nwc.convert(model)
    return model


# codec: the package, what compresses a model in place, and the most rows of x that it multiplies without decompressing the weights
PEERS: dict[str, tuple[str, Callable[[nn.Module], nn.Module], float]] = {
    "glyd_mma12": ("glyd", _glyd, math.inf),
    "nwc": ("nwc", _nwc, 1),
}


class Peer:
    """A layer with these weights, bf16 [out, in], packed anew for each of `count` copies; `nbytes` is what one takes on the GPU."""

    def __init__(self, codec: str, weights: torch.Tensor, count: int) -> None:
        self.layers = []
        for _ in range(count):
            before = _allocated(weights)
            model = nn.Sequential(nn.Linear(weights.shape[1], weights.shape[0], bias=False, device="meta"))
            model[0].weight = nn.Parameter(weights.clone(), requires_grad=False)
            self.layers.append(PEERS[codec][1](model.eval())[0])  # type: ignore[index]
            del model
            self.nbytes = _allocated(weights) - before

    def __call__(self, i: int, x: torch.Tensor) -> Any:
        return self.layers[i](x)


def _allocated(weights: torch.Tensor) -> int:
    return torch.cuda.memory_allocated(weights.device) if weights.is_cuda else 0


class Peers:
    """The packages that are installed, with `count` copies of the weights each, compressed when they are first asked for."""

    def __init__(self, weights: torch.Tensor, count: int) -> None:
        self.weights, self.count = weights, count
        self.packed: dict[str, Peer | None] = {}

    def of(self, x: torch.Tensor) -> dict[str, Peer]:
        """Those that compute products with x: one that fails, or is far from right, is told and left out."""
        found = {}
        for codec, (package, _, most_rows) in PEERS.items():
            failed = self.packed.get(codec, self) is None
            if failed or len(x) > most_rows or importlib.util.find_spec(package) is None:
                continue
            try:
                found[codec] = self._checked(codec, x)
            except Exception as error:  # of code that is not this project's
                self.packed.setdefault(codec, None)
                print(f"{codec}: no rows of {len(self.weights)} x {self.weights.shape[1]}: {error}", file=sys.stderr)
        return found

    @torch.no_grad()
    def _checked(self, codec: str, x: torch.Tensor) -> Peer:
        peer = self.packed.get(codec) or Peer(codec, self.weights, self.count)
        self.packed[codec] = peer
        product, expected = (y.float() for y in (peer(0, x), nn.functional.linear(x, self.weights)))
        if x.is_cuda:
            timing.graph(partial(peer, 0, x))  # what cannot be captured fails here, alone
        if not (product - expected).norm() < 0.01 * expected.norm():
            raise ValueError("its product is not that of the weights")
        return peer
