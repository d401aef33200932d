"""Storage layouts, one file each, all behind the protocol `Format`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch

Chunks = Callable[[], Iterable[torch.Tensor]]
"""A flat bf16 stream in pieces: each call starts it anew and must give the same pieces (an encoder reads it twice)."""


class FormatError(ValueError):
    """Stored bytes that are not what they claim to be: truncated, altered or made by something else."""


class UnsupportedBits(ValueError):
    """Weights that the layout cannot express where strict compatibility was asked for."""


def expect(condition: bool, message: str) -> None:
    """Raise FormatError with the message unless the condition holds."""
    if not condition:
        raise FormatError(message)


class Format(Protocol):
    """A storage layout for one unit: tensors concatenated into one stream (a transformer block, an embedding ...)."""

    name: str

    def encode(self, chunks: Chunks, shapes: Sequence[tuple[int, ...]]) -> Any:
        """Compress a stream that holds tensors of these shapes one after the other."""

    def decode(self, unit: Any) -> list[torch.Tensor]:
        """The tensors, bit for bit. Raises FormatError; never returns wrong bits where a checksum is stored."""

    def stream(self, unit: Any) -> Iterator[torch.Tensor]:
        """The decoded stream in flat pieces of bounded size."""

    def nbytes(self, unit: Any) -> dict[str, int]:
        """Stored bytes by part; their sum is the compressed size."""

    def check(self, unit: Any) -> None:
        """Raise FormatError unless sizes, tables and indices fit each other."""


def chunks_of(tensors: Sequence[torch.Tensor]) -> Chunks:
    """Tensors in memory as a stream."""
    return lambda: (t.reshape(-1) for t in tensors)


def get_format(name: str, **options: Any) -> Format:
    """A format by its name in the `codec` column."""
    from df11.formats import baselines, dfloat11, tiled

    formats: dict[str, Callable[..., Format]] = {"bf16": baselines.BFloat16, "dfloat11": dfloat11.DFloat11, "tiled": tiled.Tiled}
    if name not in formats:
        raise ValueError(f"no format {name!r}: there are {', '.join(formats)}")
    return formats[name](**options)
