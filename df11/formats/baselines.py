"""What the other formats are measured against, behind the same protocol."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from df11.formats import Chunks, expect


@dataclass(frozen=True)
class RawUnit:
    shapes: tuple[tuple[int, ...], ...]
    weights: torch.Tensor  # bf16 [n]


class BFloat16:
    """Uncompressed."""

    name = "bf16"

    def encode(self, chunks: Chunks, shapes: Sequence[tuple[int, ...]]) -> RawUnit:
        pieces = list(chunks())
        unit = RawUnit(tuple(shapes), torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.bfloat16))
        self.check(unit)
        return unit

    def decode(self, unit: RawUnit) -> list[torch.Tensor]:
        self.check(unit)
        parts = torch.split(unit.weights, [math.prod(s) for s in unit.shapes])
        return [part.view(shape) for part, shape in zip(parts, unit.shapes, strict=True)]

    def stream(self, unit: RawUnit) -> Iterator[torch.Tensor]:
        self.check(unit)
        yield from torch.split(unit.weights, 1 << 24)

    def nbytes(self, unit: RawUnit) -> dict[str, int]:
        return {"weights": unit.weights.nbytes}

    def check(self, unit: RawUnit) -> None:
        expected = sum(math.prod(s) for s in unit.shapes)
        expect(unit.weights.numel() == expected, f"{unit.weights.numel()} weights where the shapes ask for {expected}")
