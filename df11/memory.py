"""Several arrays in one piece of memory."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

import torch

ALIGNMENT = 256  # bytes; as torch's allocator does at least, so that cuBLAS chooses as for a tensor of its own


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def places(arrays: Iterable[torch.Tensor]) -> list[int]:
    """Where each begins, in bytes, and where the last one ends."""
    found = [0]
    for array in arrays:
        found.append(found[-1] + aligned(array.nbytes))
    return found


STAGED = 64 << 20  # bytes; larger arrays lose nothing by a copy each
_staging = threading.local()


def to_gpu(arrays: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Copies of arrays in host memory. Small ones go by one transfer from page-locked memory, and lie in one piece."""
    *starts, size = places(arrays.values())
    if size > STAGED:
        return {name: array.to(device, copy=True) for name, array in arrays.items()}
    buffer: torch.Tensor | None = getattr(_staging, "buffer", None)
    if buffer is None or buffer.numel() < size:
        buffer = _staging.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for start, array in zip(starts, arrays.values(), strict=True):
        view(buffer, start, array).copy_(array)
    piece = torch.empty(size, dtype=torch.uint8, device=device)
    piece.copy_(buffer[:size], non_blocking=True)
    torch.cuda.current_stream(device).synchronize()  # before others are written there
    return {name: view(piece, start, array) for start, (name, array) in zip(starts, arrays.items(), strict=True)}


def view(memory: torch.Tensor, at: int, like: torch.Tensor) -> torch.Tensor:
    """The part of `memory`, uint8, that holds an array of the same dtype and shape."""
    return memory[at : at + like.nbytes].view(like.dtype).view(like.shape)
